"""play_reflex.py on a small ONNX model written by hand: which keys are held when, and what is written about it."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

import play_reflex as p
from common.sessions import FRAMES, WIN_KEY, load_session, read_table, write_table
from common.video import VideoReader, iter_frames
from tests.reference import naive_event_f1, naive_key_table
from tests.synthetic import write_session

KEYS = ["KEY_RIGHT", "KEY_SPACE", "KEY_X"]


INTENTS = ["RUN", "LEAP", "WAIT"]


def write_goal_model(folder: Path) -> Path:
    """A model that presses keys by its goal and by the last frame's mean, a level: key g is likely (logit 5) where goal
    g is told, else not (-5). It names intent 0, 1 or 2 for levels below 50, 100 and above."""
    constants = {"axes": np.array([1, 2, 3]), "last": np.array(2), "ten": np.float32(10), "five": np.float32(5)}
    constants |= {"centres": np.array([[25, 75, 125]], np.float32), "one": np.array([1]), "two": np.array([2])}
    constants |= {"zero": np.array([0])}
    nodes = [
        helper.make_node("Mul", ["goal", "ten"], ["tens"]),
        helper.make_node("Sub", ["tens", "five"], ["keys_logits"]),
        helper.make_node("Slice", ["keys_logits", "zero", "two", "one"], ["mouse_pos"]),
        helper.make_node("ReduceMean", ["goal", "one"], ["value"], keepdims=0),
        helper.make_node("Gather", ["pixels", "last"], ["frame"], axis=1),
        helper.make_node("Cast", ["frame"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["level"], keepdims=0),  # (B,)
        helper.make_node("Unsqueeze", ["level", "one"], ["column"]),
        helper.make_node("Sub", ["column", "centres"], ["apart"]),
        helper.make_node("Abs", ["apart"], ["distance"]),
        helper.make_node("Neg", ["distance"], ["intent_logits"]),
    ]
    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    inputs = [
        helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, "height", "width", 3]),
        helper.make_tensor_value_info("goal", TensorProto.FLOAT, ["batch", 3]),
    ]
    shapes = {"keys_logits": 3, "mouse_pos": 2, "value": None, "intent_logits": 3}
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size] if size else ["batch"])
        for name, size in shapes.items()
    ]
    graph = helper.make_graph(nodes, "goals", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    write_model(folder)
    path, content = folder / "goals.onnx", model.SerializeToString()
    path.write_bytes(content)
    manifest = json.loads((folder / "means_manifest.json").read_text())
    manifest["model"]["sha256"] = hashlib.sha256(content).hexdigest()
    manifest["inputs"]["goal"] = {"shape": ["batch", 3], "intents": INTENTS}
    manifest["outputs"]["intent_logits"] = {"shape": ["batch", 3], "intents": INTENTS}
    (folder / "goals_manifest.json").write_text(json.dumps(manifest))
    return path


def write_model(folder: Path, threshold: float = 0.5, fps: float = 10.0, keys=KEYS, **changes) -> Path:
    """A model whose logit k is the mean of frame k of the stack, minus 60."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),  # (B, T)
        helper.make_node("Sub", ["means", "sixty"], ["keys_logits"]),
        helper.make_node("ReduceMean", ["floats", "axes"], ["ignored"], keepdims=0),
        helper.make_node("Slice", ["ignored", "zero", "two", "one"], ["mouse_pos"]),
        helper.make_node("ReduceMean", ["means", "one"], ["value"], keepdims=0),
    ]
    constants = {"axes": np.array([2, 3, 4]), "sixty": np.float32(60)}
    constants |= {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, "height", "width", 3])
    shapes = {"keys_logits": ["batch", 3], "mouse_pos": ["batch", 2], "value": ["batch"]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "means", [pixels], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    folder.mkdir(exist_ok=True)
    (folder / "means.onnx").write_bytes(model.SerializeToString())
    manifest = {
        "model": {"sha256": hashlib.sha256(model.SerializeToString()).hexdigest()},
        "inputs": {"pixels": {"stack_order": ["t-2", "t-1", "t"]}},
        "outputs": {"keys_logits": {"keys": keys}},
        "fps": fps,
        "horizon": {"frames": 2, "ms": 200},
        "thresholds": [threshold] * 3,
        "allowed_keys": keys,
    }
    (folder / "means_manifest.json").write_text(json.dumps(manifest | changes))
    return folder / "means.onnx"


# the decision rule ----------------------------------------------------------------------------------------------------
def keys_held(probabilities, thresholds, debounce: int, max_keys: int) -> list[set[int]]:
    """The rule in other words: key k flips at frame i when on each of the last `debounce` frames, all of them after its
    last flip, it was wanted and not held, or held and not wanted."""
    wanted = []
    for row in probabilities:
        over = sorted((k for k in range(len(row)) if row[k] > thresholds[k]), key=lambda k: (-row[k], k))
        wanted.append(set(over[:max_keys] if max_keys else over))
    held, flipped, history = set(), {}, []
    for i in range(len(wanted)):
        for k in range(len(thresholds)):
            window = range(i - debounce + 1, i + 1)
            if window[0] > flipped.get(k, -1) and all((k in wanted[j]) != (k in held) for j in window):
                held, flipped[k] = held ^ {k}, i
        history.append(set(held))
    return history


@pytest.mark.parametrize("debounce", [1, 2, 3])
@pytest.mark.parametrize("max_keys", [0, 1, 2, 4])
def test_decision_rule_against_its_definition(debounce, max_keys):
    rng = np.random.default_rng(debounce + 10 * max_keys)
    probabilities = np.clip(0.5 + np.cumsum(rng.normal(0, 0.1, (400, 6)), 0) % 1 - 0.5, 0, 1).round(1)  # many ties
    probabilities[rng.random((400, 6)) < 0.2] = 0.9
    thresholds = np.array([0.5, 0.2, 0.5, 0.8, 0.5, np.inf])
    rule, held = p.DecisionRule(thresholds, debounce, max_keys), []
    for row in probabilities:
        before = rule.active.copy()
        pressed, released = rule.step(row)
        assert not (pressed & released).any() and not (pressed & before).any() and not (released & ~before).any()
        assert ((before | pressed) & ~released).tolist() == rule.active.tolist()
        held.append(set(np.flatnonzero(rule.active).tolist()))
    assert held == keys_held(probabilities, thresholds, debounce, max_keys)
    assert len({frozenset(keys) for keys in held}) > 4 and not any(5 in keys for keys in held)


def test_decision_rule_by_hand():
    def held(rows, **settings):
        rule = p.DecisionRule(np.array([0.5, 0.5, 0.5]), **settings)
        result = []
        for row in rows:
            rule.step(np.array(row))
            result.append("".join(k for k, down in zip("abc", rule.active, strict=True) if down))
        return result

    a, none = (0.9, 0, 0), (0, 0, 0)
    assert held([a, a, a, none, a, none, none, a]) == ["", "a", "a", "a", "a", "a", "", ""]
    assert held([a, none, a], debounce=1) == ["a", "", "a"]
    assert held([(0.5, 0.51, 0)], debounce=1) == ["b"]  # above the threshold, not at it
    assert held([(0.7, 0.9, 0.8), (0.7, 0.9, 0.6)], debounce=1, max_keys=2) == ["bc", "ab"]
    assert held([(0.7, 0.9, 0.8)], debounce=1, max_keys=0) == ["abc"]


# goals ----------------------------------------------------------------------------------------------------------------
def goals_told(levels, stability: int) -> list[int | None]:
    """By definition: the goal at frame i is the last intent that was named on `stability` frames in a row before i."""
    named = [min(level // 50, 2) for level in levels]
    ends = [[j for j in range(stability, i + 1) if len(set(named[j - stability : j])) == 1] for i in range(len(levels))]
    return [named[those[-1] - 1] if those else None for those in ends]


def keys_by_goal(model: Path, levels, **flags) -> list[int | None]:
    """Which key a policy finds likely on grey frames of the given levels."""
    policy = p.Policy(model)
    policy.follow_goal(p.Eval(model=model, session=Path("unused"), **flags))
    wanted = [np.flatnonzero(policy(np.full((8, 8, 3), level, np.uint8))[0] > 0.5).tolist() for level in levels]
    assert all(len(keys) <= 1 for keys in wanted) and policy.q is None
    assert policy.goals == [policy.intents[keys[0]] if keys else None for keys in wanted]
    policy.reset()
    assert policy.goals == []
    assert policy.goal_rule.goal.argmax() == policy.goal_rule.fixed or not policy.goal_rule.goal.any()
    return [keys[0] if keys else None for keys in wanted]


@pytest.mark.parametrize("stability", [1, 2, 5])
def test_the_intent_that_was_named_often_enough_becomes_the_goal(tmp_path, stability):
    model, rng = write_goal_model(tmp_path), np.random.default_rng(stability)
    levels = np.repeat(rng.choice([10, 40, 60, 90, 110, 140], 60), rng.integers(1, 8, 60)).tolist()
    told = keys_by_goal(model, levels, auto_intent=True, intent_stability=stability)
    assert told == goals_told(levels, stability)
    assert set(told) == {None, 0, 1, 2}


def test_a_fixed_goal_stays_and_none_is_none(tmp_path):
    model = write_goal_model(tmp_path)
    assert keys_by_goal(model, [10, 120, 70] * 4, goal_intent="LEAP") == [1] * 12
    assert keys_by_goal(model, [10, 10, 10] * 4) == [None] * 12


def test_goals_that_cannot_be_are_refused(tmp_path):
    model, plain = write_goal_model(tmp_path), write_model(tmp_path)

    def follow(model, **flags):
        p.Policy(model).follow_goal(p.Eval(model=model, session=tmp_path, **flags))

    with pytest.raises(ValueError, match="means.onnx takes no goal, which --goal-intent.*iql_reflex.py --intents"):
        follow(plain, goal_intent="LEAP")
    with pytest.raises(ValueError, match="means.onnx takes no goal"):
        follow(plain, auto_intent=True)
    follow(plain)
    with pytest.raises(ValueError, match="--goal-intent FLY: .*goals.onnx knows RUN, LEAP, WAIT"):
        follow(model, goal_intent="FLY")
    with pytest.raises(ValueError, match="--goal-intent LEAP --intent-stability 5 --auto-intent: expected a fixed"):
        follow(model, goal_intent="LEAP", auto_intent=True)
    with pytest.raises(ValueError, match="--intent-stability 0"):
        follow(model, auto_intent=True, intent_stability=0)


def test_a_goal_reaches_eval_and_closed_loop(tmp_path):
    model, session = write_goal_model(tmp_path), write_session(tmp_path / "run_0", 20, labels=False)
    result = p.evaluate(p.Eval(model=model, session=session, goal_intent="LEAP", video=False))
    assert result["settings"]["goal_intent"] == "LEAP" and result["settings"]["auto_intent"] is False
    table = pq.read_table(tmp_path / "goals_eval_run_0" / "preds.parquet")
    assert table["active"].to_pylist()[2:] == [["KEY_SPACE"]] * 18 and table["goal"].to_pylist() == ["LEAP"] * 20
    p.evaluate(p.Eval(model=model, session=session, video=False, overwrite=True))
    assert pq.read_table(tmp_path / "goals_eval_run_0" / "preds.parquet")["goal"].to_pylist() == [None] * 20
    with pytest.raises(SystemExit, match="--goal-intent FLY"):
        p.evaluate(p.Eval(model=model, session=session, goal_intent="FLY", overwrite=True))
    player = p.PolicyPlayer(p.ClosedLoop(model=model, auto_intent=True, intent_stability=2, debounce=1))
    frames = [np.full((8, 8, 3), level, np.uint8) for level in (120, 120, 120, 20)]
    assert [next(player.step(f, None, 0.1 * i))[1] for i, f in enumerate(frames)] == [set(), set()] + [{"KEY_X"}] * 2


# the policy -----------------------------------------------------------------------------------------------------------
def test_stack_is_oldest_first_and_begins_with_the_first_frame_repeated(tmp_path):
    policy = p.Policy(write_model(tmp_path))
    frames = [np.full((20, 30, 3), level, np.uint8) for level in (57, 60, 63, 61)]
    logits = {level: 1 / (1 + np.exp(60.0 - level)) for level in (57, 60, 61, 63)}
    expected = [(57, 57, 57), (57, 57, 60), (57, 60, 63), (60, 63, 61)]
    for frame, levels in zip(frames, expected, strict=True):
        probability, value = policy(frame)
        assert probability == pytest.approx([logits[level] for level in levels], abs=1e-5)
        assert value == pytest.approx(np.mean(levels), abs=1e-3)
    policy.reset()
    assert policy(frames[2])[0] == pytest.approx([logits[63]] * 3, abs=1e-5)


def test_keys_that_may_not_be_sent_are_never_wanted(tmp_path):
    keys = ["KEY_RIGHT", WIN_KEY, "KEY_X"]
    policy = p.Policy(write_model(tmp_path, keys=keys, allowed_keys=["KEY_RIGHT", WIN_KEY]))
    rule = policy.decision_rule(p.Args(model=tmp_path, threshold=0.0, debounce=1))
    rule.step(np.ones(3))
    assert rule.active.tolist() == [True, False, False]


def test_files_that_do_not_fit_are_named(tmp_path):
    model = write_model(tmp_path)
    manifest = tmp_path / "means_manifest.json"
    good = json.loads(manifest.read_text())
    with pytest.raises(FileNotFoundError, match="other.onnx is missing.*export_reflex.py"):
        p.Policy(tmp_path / "other.onnx")
    with pytest.raises(FileNotFoundError, match="m.json is missing"):
        p.Policy(model, tmp_path / "m.json")
    for broken in ("{", "[]", json.dumps(good | {"fps": None}), json.dumps(good | {"thresholds": [0.5]})):
        manifest.write_text(broken)
        with pytest.raises(ValueError, match="means_manifest.json is no manifest"):
            p.Policy(model)
    manifest.write_text(json.dumps(good))
    model.write_bytes(model.read_bytes() + b"x")
    with pytest.raises(ValueError, match="belongs to another model"):
        p.Policy(model)
    model.write_bytes(b"no model")
    manifest.write_text(json.dumps(good | {"model": {"sha256": hashlib.sha256(b"no model").hexdigest()}}))
    with pytest.raises(ValueError, match="means.onnx does not load"):
        p.Policy(model)


# over a session -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Path:
    """40 grey pictures whose brightness crosses the model's 60 every few frames; no labels."""
    rng = np.random.default_rng(3)
    level = np.where(np.repeat(rng.random(14) < 0.5, 3)[:40], 90, 20)
    pictures = np.broadcast_to(level[:, None, None, None], (40, 48, 64, 3)).astype(np.uint8)
    bright = level > 60
    keys = {"KEY_RIGHT": bright, "KEY_SPACE": np.roll(bright, 3)}
    return write_session(tmp_path_factory.mktemp("data") / "run_1", 40, keys=keys, pictures=pictures, labels=False)


def test_eval_writes_what_the_policy_would_have_held(session, tmp_path):
    model = write_model(tmp_path)
    result = p.main(p.Eval(model=model, session=session))
    output = tmp_path / "means_eval_run_1"
    assert {path.name for path in output.iterdir()} == {"preds.parquet", "metrics.json", "overlay.mp4"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["means.onnx", "means_eval_run_1", "means_manifest.json"]

    # brightness of the frame two, one and no frames ago decides the three keys
    pictures = np.concatenate([chunk.numpy() for _, chunk in iter_frames(session / "recording.mp4")])
    level = pictures.mean((1, 2, 3))
    stack = np.stack([level[np.maximum(np.arange(40) - ago, 0)] for ago in (2, 1, 0)], 1)  # (N, K)
    probability = 1 / (1 + np.exp(60 - stack))
    held = keys_held(probability, [0.5] * 3, 2, 4)
    table = pq.read_table(output / "preds.parquet")
    assert table["frame_idx"].to_pylist() == list(range(40))
    assert table["timestamp"].to_pylist() == load_session(session).timestamps.tolist()
    assert [set(row) for row in table["active"].to_pylist()] == [{KEYS[k] for k in keys} for keys in held]
    before = [set(), *held[:-1]]
    assert [set(r) for r in table["pressed"].to_pylist()] == [
        {KEYS[k] for k in a - b} for a, b in zip(held, before, strict=True)
    ]
    assert [set(r) for r in table["released"].to_pylist()] == [
        {KEYS[k] for k in b - a} for a, b in zip(held, before, strict=True)
    ]
    assert np.abs(table["probability_KEY_SPACE"].to_numpy() - probability[:, 1]).max() < 1e-3
    assert table["value"].to_numpy() == pytest.approx(stack.mean(1), abs=0.01)

    # the metrics, from their definitions
    true = naive_key_table(load_session(session), KEYS)[1][2:]  # (N - h, K)
    mine = np.array([[k in keys for k in range(3)] for keys in held])[:38]
    assert mine.any(0).all() and len(np.unique(mine, axis=0)) > 2
    assert result["agreement"] == pytest.approx((mine == true).mean())
    assert result["agreement_all_keys"] == pytest.approx(
        np.mean([list(a) == list(b) for a, b in zip(mine, true, strict=True)])
    )
    metrics = json.loads((output / "metrics.json").read_text())["metrics"]
    assert metrics["eval/onset_f1"] == pytest.approx(naive_event_f1(mine, true, +1))
    assert metrics["eval/release_f1"] == pytest.approx(naive_event_f1(mine, true, -1))
    f1 = [2 * (m & t).sum() / max(m.sum() + t.sum(), 1) for m, t in zip(mine.T, true.T, strict=True)]
    assert metrics["eval/key_f1"] == pytest.approx(np.mean(f1))
    last = np.concatenate([np.zeros((1, 3), bool), naive_key_table(load_session(session), KEYS)[1][:37]])
    assert metrics["eval/onset_f1_repeat_last"] == pytest.approx(naive_event_f1(last, true, +1))
    assert metrics["eval/chatter"] == pytest.approx((mine[1:] != mine[:-1]).mean())
    assert metrics["eval/chatter_player"] == pytest.approx((true[1:] != true[:-1]).mean())
    assert result["per_key"]["KEY_SPACE"]["rate_policy"] == pytest.approx(mine[:, 1].mean())

    video = VideoReader(output / "overlay.mp4")
    assert (video.n_frames, video.height > 48) == (40, True)


def test_settings_change_the_keys(session, tmp_path):
    model = write_model(tmp_path)

    def active(**settings):
        p.main(p.Eval(model=model, session=session, overwrite=True, video=False, **settings))
        return pq.read_table(tmp_path / "means_eval_run_1/preds.parquet")["active"].to_pylist()

    assert all(row == [] for row in active(threshold=1.0))
    assert active(debounce=1) != active(debounce=2)
    assert max(len(row) for row in active(max_keys=1, debounce=1)) == 1
    for wrong in ({"debounce": 0}, {"max_keys": -1}, {"threshold": 1.5}):
        with pytest.raises(SystemExit, match="expected at least 1"):
            active(**wrong)


def test_a_faster_session_is_thinned_a_slower_one_refused(session, tmp_path, capsys):
    model = write_model(tmp_path, fps=4.0)
    p.main(p.Eval(model=model, session=session, video=False))
    assert "warning" in (said := capsys.readouterr().out) and "10 frames a second" in said
    table = pq.read_table(tmp_path / "means_eval_run_1/preds.parquet")
    times = load_session(session).timestamps
    nearest = [int(np.abs(times - (times[0] + 250 * tick)).argmin()) for tick in range(16)]
    assert table["frame_idx"].to_pylist() == nearest
    assert table["timestamp"].to_pylist() == times[nearest].tolist()
    with pytest.raises(SystemExit, match="has 10 frames a second, the model needs 30"):
        p.main(p.Eval(model=write_model(tmp_path, fps=30.0), session=session, overwrite=True))


def test_nearest_frames_at_uneven_times(session):
    recorded, rng = load_session(session), np.random.default_rng(4)
    recorded.timestamps, recorded.fps = 1000 + np.cumsum(rng.integers(10, 60, 300)), 30.0
    frames = p.frames_at_rate(recorded, 300, 10.0)
    ticks = np.arange(recorded.timestamps[0], recorded.timestamps[-1] + 1, 100)
    distance = np.abs(recorded.timestamps - ticks[:, None])  # (ticks, N)
    assert len(frames) == len(ticks) and (distance[np.arange(len(ticks)), frames] == distance.min(1)).all()
    recorded.fps = 10.4
    assert p.frames_at_rate(recorded, 300, 10.0).tolist() == list(range(300))


def test_results_are_replaced_only_when_asked_and_nothing_else_is(session, tmp_path):
    model = write_model(tmp_path)
    output = tmp_path / "results"
    settings = dict(model=model, session=session, output=output, video=False)
    p.main(p.Eval(**settings))
    (output / "metrics.json").write_text("kept")
    with pytest.raises(SystemExit, match="results is there already.*--overwrite"):
        p.main(p.Eval(**settings))
    assert (output / "metrics.json").read_text() == "kept"
    (output / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is no results folder .mine.txt"):
        p.main(p.Eval(overwrite=True, **settings))
    (output / "mine.txt").unlink()
    p.main(p.Eval(overwrite=True, **settings))
    assert json.loads((output / "metrics.json").read_text())["frames"] == 40
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_error_half_way_keeps_the_old_results(session, tmp_path, monkeypatch):
    model = write_model(tmp_path)
    p.main(p.Eval(model=model, session=session, video=False))
    output = tmp_path / "means_eval_run_1"
    before = (output / "metrics.json").read_bytes()
    monkeypatch.setattr(p, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        p.main(p.Eval(model=model, session=session, video=False, overwrite=True))
    assert (output / "metrics.json").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_sessions_that_cannot_be_played_are_named(session, tmp_path, capsys, monkeypatch):
    model = write_model(tmp_path)
    with pytest.raises(SystemExit, match="nowhere is not a folder"):
        p.main(p.Eval(model=model, session=tmp_path / "nowhere"))
    shutil.copytree(session, tmp_path / "data/run_1")
    shutil.copytree(session, tmp_path / "data/run_2")
    with pytest.raises(SystemExit, match="holds 2 sessions. Name one: --session .*run_1"):
        p.main(p.Eval(model=model, session=tmp_path / "data"))

    # more rows than the video has frames: those it has are played
    run = tmp_path / "data/run_2"
    frames = read_table(run / "frames.parquet", FRAMES).to_pydict()
    longer = {"frame_idx": list(range(50)), "repeated": [False] * 50}
    longer["timestamp"] = frames["timestamp"] + [frames["timestamp"][-1] + 100 * i for i in range(1, 11)]
    write_table(run / "frames.parquet", longer, FRAMES, {"fps": "10"})
    assert p.main(p.Eval(model=model, session=run, video=False))["frames"] == 40
    assert "has 40 frames for 50 rows" in capsys.readouterr().out
    monkeypatch.chdir(run)
    assert p.main(p.Eval(model=model, session=Path("."), video=False, overwrite=True))["session"] == "run_2"
