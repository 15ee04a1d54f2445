"""iql_reflex.py from sessions to a policy, on small recordings whose keys can be seen in the picture."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import iql_reflex
from common.runs import load_checkpoint
from common.sessions import EVENTS, INTENT, INTENT_NAMES, key_table, load_session, read_table, write_table
from session_labels.files import recording_of
from session_labels.intents import label_intents
from tests.synthetic import write_session

ROOT = Path(iql_reflex.__file__).parent
SMALL = dict(backbone="cnn", image_size=32, batch_size=16, lr=1e-3, bootstrap=50, video_seconds=2.0, workers=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for number, outcome in enumerate(["DEATH", "WIN", "INCOMPLETE"]):
        write_session(folder / f"run_{number}", 160, seed=number, outcome=outcome)
    write_session(folder / "heldout_0", 160, seed=9)
    return folder


def test_learns_what_the_picture_shows(dataset, tmp_path):
    result = iql_reflex.main(iql_reflex.Args(data_dir=str(dataset), run_root=str(tmp_path), max_updates=60, **SMALL))
    assert result["eval/key_ap"] > 0.95 > result["eval/key_ap_random"]
    assert result["eval/key_f1"] > result["eval/key_f1_always_on"]
    assert result["eval/onset_f1"] > 2 * result["eval/onset_f1_random"]
    run_dir = Path(result["run_dir"])
    names = {
        "args.json",
        "provenance.json",
        "split.json",
        "iql_reflex.py",
        "last.pt",
        "best.pt",
        "eval.json",
        "eval.png",
    }
    assert names | {"eval.mp4"} <= {path.name for path in run_dir.iterdir()}
    split = json.loads((run_dir / "split.json").read_text())
    assert split["heldout"] == ["heldout_0"] and "KEY_BACKSLASH" not in split["keys"]

    # the checkpoint alone gives the same evaluation
    checkpoint = load_checkpoint(run_dir / "best.pt")
    network = iql_reflex.ReflexNet(**checkpoint["network"])
    network.load_state_dict(checkpoint["model"])
    recording = iql_reflex.load_recording(dataset / "heldout_0", checkpoint["keys"], checkpoint["action_horizon"])
    args = iql_reflex.Args(image_size=checkpoint["image_size"])
    parts = [(recording, 0, len(recording.usable))]
    thresholds = np.array(checkpoint["thresholds"])
    again, _ = iql_reflex.evaluate(network, parts, thresholds, args, torch.device("cpu"))
    assert again == pytest.approx({name: result[name] for name in again}, abs=1e-6)
    assert checkpoint["script"] == "iql_reflex.py" and Path(checkpoint["run_dir"]) == run_dir.resolve()

    # changes of keys, chatter and the table of keys by loops over the frames
    probability, _, _ = iql_reflex.predict(network, recording, 0, 160, args, torch.device("cpu"))
    rows, h = range(2, 158), 2  # the stack, and the label two frames ahead, lie in the episode
    down = key_table(load_session(dataset / "heldout_0"), checkpoint["keys"])[1]  # (N, K)
    table = json.loads((run_dir / "eval.json").read_text())["per_key"]
    right, changes = 0, 0
    for k, key in enumerate(checkpoint["keys"]):
        on = {i: bool(probability[i, k] > thresholds[k]) for i in rows}
        changed = [i for i in rows if down[i + h, k] != down[i - 1, k]]
        right, changes = right + sum(on[i] == down[i + h, k] for i in changed), changes + len(changed)
        hits = sum(on[i] and down[i + h, k] for i in rows)
        assert table[key]["support"] == sum(down[i + h, k] for i in rows)
        assert table[key]["precision"] == pytest.approx(hits / sum(on.values()))
        assert table[key]["recall"] == pytest.approx(hits / table[key]["support"])
        assert table[key]["chatter"] == pytest.approx(np.mean([on[i] != on[i - 1] for i in rows[1:]]))
    assert changes > 20 and result["eval/change_accuracy"] == pytest.approx(right / changes)
    assert result["eval/change_accuracy_repeat_last"] == result["eval/change_f1_repeat_last"] == 0
    assert result["eval/change_f1"] > result["eval/change_f1_always_on"]
    assert {"heldout/key_ap", "heldout/inv_dyn_f1"} <= set(tensorboard(run_dir).Tags()["scalars"])


def tensorboard(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return events


def test_runs_with_and_without_awr_compare_side_by_side(dataset, tmp_path):
    settings = dict(SMALL, data_dir=str(dataset), max_updates=12, video_seconds=0.0)
    runs = [
        iql_reflex.main(iql_reflex.Args(run_root=str(tmp_path), exp_name=name, use_awr=name == "awr", **settings))
        for name in ("awr", "no_awr")
    ]
    logs = [tensorboard(Path(run["run_dir"])) for run in runs]
    assert logs[0].Tags() == logs[1].Tags()
    for run, log in zip(runs, logs, strict=True):
        assert not [path for path in Path(run["run_dir"]).iterdir() if path.is_dir()]  # no stray run for HPARAMS
        plugin = {tag: content.plugin_data.content for tag, content in log.summary_metadata.items()}
        started = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info
        assert started.hparams["use_awr"].number_value == float(run is runs[0])
        compared = HParamsPluginData.FromString(plugin["_hparams_/experiment"]).experiment.metric_infos
        assert {info.name.tag for info in compared} == {m.replace("eval/", "heldout/") for m in run if "/" in m}
        assert log.Scalars("heldout/key_ap")[-1].value == pytest.approx(run["eval/key_ap"])
    assert runs[0]["eval/key_ap"] != runs[1]["eval/key_ap"]


def test_inverse_dynamics_reads_what_moved_the_picture(tmp_path):
    """Keys are thrown like a coin for every frame and move a block: no stack shows the key of its own last frame, the
    next frame does."""
    n, rng = 200, np.random.default_rng(0)
    for name in ("run_0", "run_1", "heldout_0"):
        right = rng.random(n) < 0.5
        x = (10 + np.cumsum(np.r_[0, np.where(right, 8, -8)[:-1]])) % 56  # the key of frame i moves it to i + 1
        pictures = np.full((n, 48, 64, 3), 40, np.uint8)
        for i in range(n):
            pictures[i, 16:32, x[i] : x[i] + 8] = 250
        write_session(tmp_path / "data" / name, n, keys={"KEY_RIGHT": right, "KEY_LEFT": ~right}, pictures=pictures)
    arguments = SMALL | dict(run_root=str(tmp_path), data_dir=str(tmp_path / "data"), video_seconds=0.0, lr=2e-3)
    result = iql_reflex.main(iql_reflex.Args(max_updates=150, random_shift=0, val_fraction=0.0, **arguments))
    assert result["eval/inv_dyn_f1"] > 0.85 > result["eval/inv_dyn_f1_always_on"]
    assert result["eval/key_ap"] < result["eval/key_ap_random"] + 0.1  # two frames later the keys are open again

    without = iql_reflex.main(iql_reflex.Args(max_updates=2, inv_dyn_weight=0.0, **arguments))
    assert "eval/inv_dyn_f1" not in without
    checkpoint = load_checkpoint(Path(without["run_dir"]) / "last.pt")
    assert not checkpoint["network"]["inverse_dynamics"] and not any("inverse" in name for name in checkpoint["model"])


@pytest.fixture(scope="module")
def with_intents(dataset, tmp_path_factory) -> Path:
    folder = shutil.copytree(dataset, tmp_path_factory.mktemp("with_intents") / "data")
    for session in sorted(folder.iterdir()):
        label_intents(load_session(session), "keys", 0.5, recording_of(session, 160))
    return folder


def test_intents_of_other_episodes_are_refused(with_intents, tmp_path):
    folder = shutil.copytree(with_intents, tmp_path / "data")
    (path,) = (folder / "heldout_0").glob("intent.parquet")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"cuts": b"[3, 7]"}), path)
    with pytest.raises(SystemExit, match="heldout_0/intent.parquet was made for other episodes"):
        iql_reflex.main(iql_reflex.Args(intents=True, **dict(SMALL, data_dir=str(folder), run_root=str(tmp_path))))


def test_plays_with_and_without_a_goal(with_intents, tmp_path):
    settings = dict(SMALL, data_dir=str(with_intents), run_root=str(tmp_path), video_seconds=0.0)
    result = iql_reflex.main(iql_reflex.Args(intents=True, max_updates=80, **settings))
    assert result["eval/key_f1"] > result["eval/key_f1_always_on"]  # nothing is told
    assert result["eval/key_ap"] > 0.9 and result["eval/key_ap_leaking_goal"] > 0.9
    assert result["eval/intent_accuracy"] > result["eval/intent_accuracy_majority"] + 0.1
    run_dir = Path(result["run_dir"])
    checkpoint = load_checkpoint(run_dir / "best.pt")
    assert checkpoint["intents"] == list(INTENT_NAMES) and checkpoint["network"]["n_intents"] == 7
    losses = [row.value for row in tensorboard(run_dir).Scalars("train/intent_loss")]
    assert losses[-1] < losses[0] < np.log(7) + 1
    network = iql_reflex.ReflexNet(**checkpoint["network"])
    network.load_state_dict(checkpoint["model"])

    # the metrics by loops over the frames
    recording = iql_reflex.load_recording(with_intents / "heldout_0", checkpoint["keys"], 2, intents=True)
    args, N = iql_reflex.Args(image_size=32), 160
    _, _, _, logits, told = iql_reflex.predict(network, recording, 0, N, args, torch.device("cpu"))
    true = read_table(with_intents / "heldout_0" / "intent.parquet", INTENT)["intent"].to_pylist()
    right = [INTENT_NAMES[logits[i].argmax()] == true[i] for i in range(2, N - 2)]
    assert result["eval/intent_accuracy"] == pytest.approx(np.mean(right), abs=0.01)
    counts = [true[2 : N - 2].count(name) for name in INTENT_NAMES]
    assert result["eval/intent_accuracy_majority"] == pytest.approx(max(counts) / sum(counts))
    on = told[2 : N - 2] > np.array(checkpoint["thresholds"])
    f1 = iql_reflex.f1(on, recording.keys[2 : N - 2]).mean()
    assert result["eval/key_f1_leaking_goal"] == pytest.approx(f1, abs=0.01)


def test_intents_left_out_change_nothing(dataset, with_intents, tmp_path):
    settings = dict(SMALL, max_updates=8, video_seconds=0.0, run_root=str(tmp_path))
    plain, there = (
        iql_reflex.main(iql_reflex.Args(data_dir=str(folder), **settings)) for folder in (dataset, with_intents)
    )
    models = [load_checkpoint(Path(run["run_dir"]) / "last.pt")["model"] for run in (plain, there)]
    assert models[0].keys() == models[1].keys() and not any("goal" in name for name in models[0])
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not [name for name in plain if "intent" in name or "goal" in name]


def test_resume_with_intents_equals_an_uninterrupted_run(with_intents, tmp_path):
    settings = dict(SMALL, intents=True, data_dir=str(with_intents), run_root=str(tmp_path), video_seconds=0.0)
    whole = iql_reflex.main(iql_reflex.Args(max_updates=12, anneal_lr=False, **settings))
    first = iql_reflex.main(iql_reflex.Args(max_updates=6, anneal_lr=False, **settings))
    again = iql_reflex.main(iql_reflex.Args(resume=first["run_dir"], max_updates=12))
    models = [load_checkpoint(Path(run["run_dir"]) / "last.pt")["model"] for run in (whole, again)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_checkpoint_dir_receives_every_epoch_and_keeps_another_runs(dataset, tmp_path):
    folder, runs = tmp_path / "checkpoints", tmp_path / "runs"
    settings = dict(SMALL, data_dir=str(dataset), run_root=str(runs), checkpoint_dir=str(folder), video_seconds=0.0)
    first = Path(iql_reflex.main(iql_reflex.Args(epochs=3, **settings))["run_dir"])
    names = {"config.json", "iql_reflex.py", "reflex_epoch_0.pth", "reflex_epoch_1.pth", "reflex_epoch_2.pth"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((first / "args.json").read_text()) | {"run_dir": str(first.resolve())}
    states = [load_checkpoint(folder / f"reflex_epoch_{n}.pth") for n in range(3)]
    updates = states[0]["update"]
    assert [state["update"] for state in states] == [updates, 2 * updates, 3 * updates]
    last = load_checkpoint(first / "last.pt")
    assert all(torch.equal(states[2]["model"][name], last["model"][name]) for name in last["model"])
    assert not torch.equal(states[0]["model"]["value_head.0.weight"], last["model"]["value_head.0.weight"])

    before = (folder / "reflex_epoch_2.pth").read_bytes()
    with pytest.raises(SystemExit, match="files of another run.*--overwrite"):
        iql_reflex.main(iql_reflex.Args(epochs=1, **settings))
    assert (folder / "reflex_epoch_2.pth").read_bytes() == before and len(list(runs.iterdir())) == 1
    iql_reflex.main(iql_reflex.Args(resume=str(first), epochs=4))  # its own files
    assert (folder / "reflex_epoch_3.pth").is_file() and (folder / "reflex_epoch_2.pth").read_bytes() == before

    second = iql_reflex.main(iql_reflex.Args(epochs=1, overwrite=True, **settings))
    assert {path.name for path in folder.iterdir()} == {"config.json", "iql_reflex.py", "reflex_epoch_0.pth"}
    assert load_checkpoint(folder / "reflex_epoch_0.pth")["run_dir"] == str(Path(second["run_dir"]).resolve())
    with pytest.raises(SystemExit, match="files of another run"):
        iql_reflex.main(iql_reflex.Args(resume=str(first), epochs=5))
    with pytest.raises(SystemExit, match="no folder of its own"):
        iql_reflex.main(iql_reflex.Args(**settings | {"checkpoint_dir": str(ROOT)}))


DIES_AT_10 = """
import os, signal, sys, tyro
import iql_reflex
from common import runs
save = runs.save_checkpoint
def save_then_die(path, checkpoint):
    save(path, checkpoint)
    if checkpoint["update"] == 10:
        os.kill(os.getpid(), signal.SIGKILL)
runs.save_checkpoint = save_then_die
iql_reflex.main(tyro.cli(iql_reflex.Args))
"""


def start(*words) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, **pipes)


def assert_same_run(one: Path, other: Path):
    a, b = load_checkpoint(one / "last.pt"), load_checkpoint(other / "last.pt")
    assert a["update"] == b["update"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert torch.equal(a["running"], b["running"]) and torch.equal(a["rng"]["torch"], b["rng"]["torch"])


def test_resume_after_kill_and_after_sigterm_equals_an_uninterrupted_run(dataset, tmp_path):
    settings = dict(SMALL, save_every=10, max_updates=60, data_dir=str(dataset), buffer_frames=64)
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    settings, flags = settings | {"q_head": True, "action_horizon": 0}, [*flags, "--q-head", "--action-horizon", "0"]
    whole = Path(iql_reflex.main(iql_reflex.Args(run_root=str(tmp_path / "whole"), **settings))["run_dir"])

    process = start("-c", DIES_AT_10, *flags, "--run-root", str(tmp_path / "killed"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    (killed,) = (tmp_path / "killed").iterdir()
    assert load_checkpoint(killed / "last.pt")["update"] == 10
    iql_reflex.main(iql_reflex.Args(resume=str(killed)))
    assert_same_run(whole, killed)
    changed = shutil.copytree(dataset, tmp_path / "changed")
    shutil.copy(changed / "run_1/returns.parquet", changed / "run_0/returns.parquet")
    words = killed / "args.json"
    words.write_text(words.read_text().replace(str(dataset), str(changed)))
    with pytest.raises(SystemExit, match="recordings or labels have changed"):
        iql_reflex.main(iql_reflex.Args(resume=str(killed)))

    process = start("iql_reflex.py", *flags, "--run-root", str(tmp_path / "stopped"), "--save-every", "1")
    while process.poll() is None and not list((tmp_path / "stopped").glob("*/last.pt")):
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in output, output
    (stopped,) = (tmp_path / "stopped").iterdir()
    assert 0 < load_checkpoint(stopped / "last.pt")["update"] < 60
    iql_reflex.main(iql_reflex.Args(resume=str(stopped)))
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("normalizer", ["running", "batch-mean"])
def test_only_batch_mean_on_sequential_batches_cancels_the_advantage(tmp_path, shuffle, normalizer):
    """Two sessions show the same pictures; in one RIGHT ends in a win, in the other LEFT in a death."""
    n = 66
    pictures = np.random.default_rng(5).integers(60, 120, (n, 32, 32, 3), np.uint8)
    for name, outcome, key in (("run_good", "WIN", "KEY_RIGHT"), ("run_bad", "DEATH", "KEY_LEFT")):
        keys = {k: np.full(n, k == key) for k in ("KEY_LEFT", "KEY_RIGHT")}
        write_session(tmp_path / "data" / name, n, outcome=outcome, keys=keys, pictures=pictures)
    shutil.copytree(tmp_path / "data/run_good", tmp_path / "data/heldout")
    result = iql_reflex.main(
        iql_reflex.Args(
            data_dir=str(tmp_path / "data"), run_root=str(tmp_path), epochs=40, shuffle=shuffle, val_fraction=0.0,
            iql_adv_normalizer=normalizer, **SMALL | {"lr": 3e-4, "anneal_lr": False, "video_seconds": 0.0},
        )
    )  # fmt: skip
    checkpoint = load_checkpoint(Path(result["run_dir"]) / "last.pt")
    network = iql_reflex.ReflexNet(**checkpoint["network"])
    network.load_state_dict(checkpoint["model"])
    recording = iql_reflex.load_recording(tmp_path / "data/run_bad", checkpoint["keys"], checkpoint["action_horizon"])
    probabilities, _, _ = iql_reflex.predict(
        network, recording, 0, n, iql_reflex.Args(image_size=32), torch.device("cpu")
    )
    left, right = probabilities.mean(0)
    if normalizer == "batch-mean" and not shuffle:
        assert abs(right - left) < 0.1
    else:
        assert right - left > 0.25


def test_doubtful_episodes_wait_for_the_bar_to_fall(tmp_path):
    """One sure and one doubtful session; how the doubtful one ended must not matter while the bar is above it."""

    def train(outcome, **changes):
        data = tmp_path / outcome
        if not data.exists():
            for name, ending in (("run_sure", "WIN"), ("run_doubtful", outcome), ("heldout", "WIN")):
                write_session(data / name, 60, outcome=ending)
            row = {"frame_idx": [59], "event": [outcome], "confidence": [0.5]}
            write_table(data / "run_doubtful" / "events.parquet", row, EVENTS)
        options = SMALL | {"val_fraction": 0.0, "log_every": 1, "run_root": str(tmp_path)} | changes
        return Path(iql_reflex.main(iql_reflex.Args(data_dir=str(data), **options))["run_dir"])

    def learnt(outcome, **changes):
        return load_checkpoint(train(outcome, max_updates=1, **changes) / "last.pt")["model"]

    def same(one, other):
        return all(torch.equal(one[name], other[name]) for name in one)

    assert same(learnt("WIN", confident_from=0.9), learnt("DEATH", confident_from=0.9))
    assert not same(learnt("WIN"), learnt("DEATH"))
    assert not same(learnt("WIN", confident_from=0.5), learnt("DEATH", confident_from=0.5)), "as sure as is asked"
    scalars = tensorboard(train("DEATH", max_updates=8, confident_from=0.9)).Scalars("train/confident_frac")
    assert [s.value < 1 for s in scalars] == [True] * 4 + [False] * 4, "from 0.9 to 0.5 in four updates"


def test_environment_sets_defaults_below_the_flags(dataset, tmp_path):
    code = "import tyro, iql_reflex as q; a = tyro.cli(q.Args, args=q.runs.cli_words(q.Args, 'REFLEX_TRAIN_')); "
    code += "print(a.epochs, a.lr, a.use_awr, a.compile_model)"
    environment = {"REFLEX_TRAIN_EPOCHS": "3", "REFLEX_TRAIN_LR": "0.5", "REFLEX_TRAIN_USE_AWR": "false"}

    def run(env, *flags):
        words = [sys.executable, "-c", code, *flags]
        return subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)

    assert run(environment, "--lr", "0.25", "--compile-model", "true").stdout.split() == ["3", "0.25", "False", "True"]
    other = run({"REFLEX_TRAIN_EPOCH": "3"})  # another script's, or a slip: said, not silent
    assert other.returncode == 0 and "REFLEX_TRAIN_EPOCH is left out: there is no --epoch here" in other.stderr


def test_errors_name_the_file_and_the_mend(dataset, tmp_path):
    def fails(words: str, **changes):
        with pytest.raises(SystemExit, match=words):
            iql_reflex.main(
                iql_reflex.Args(**dict(SMALL, data_dir=str(dataset), run_root=str(tmp_path / "runs")) | changes)
            )

    fails("is not a folder", data_dir=str(tmp_path / "nothing"))
    fails("holds no session", data_dir=str(tmp_path))
    fails("--resume takes a run folder", resume=str(tmp_path))
    fails("fewer than --batch-size", batch_size=4096)
    fails("--bootstrap 0", bootstrap=0)
    fails("--action-horizon -1 .* expected 0 or more", action_horizon=-1)
    fails("--val-fraction 2 .* 0 to 0.5", val_fraction=2)
    fails("--confident-from 9: expected a confidence", confident_from=9.0)
    fails("--cnn-grid 0 --q-tau 0.005: expected 1 or more", cnn_grid=0)
    fails("--cnn-grid 7 belongs to --backbone cnn", cnn_grid=7, backbone="resnet18")
    fails("--q-coef 2 --q-tau 0.005 do nothing without --q-head", q_coef=2.0)
    fails("--q-head with --action-horizon 2: .* Add --action-horizon 0", q_head=True)
    many = tuple(f"KEY_{letter}" for letter in "ABCDEFGHI")
    fails("--q-head takes 8 keys at most", q_head=True, action_horizon=0, keys=many)
    write_session(shutil.copytree(dataset, tmp_path / "gammas") / "run_9", 40, gamma=0.9)
    fails(
        "one gamma in all labels.*run_9/returns.parquet 0.9",
        q_head=True,
        action_horizon=0,
        data_dir=str(tmp_path / "gammas"),
    )
    advice = shutil.copytree(dataset, tmp_path / "advice") / "run_0/frames.parquet"
    table = pq.read_table(advice)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"policy": b"reflex.onnx"}), advice)
    fails("in run_0 a policy played .* --no-use-awr --inv-dyn-weight 0", data_dir=str(tmp_path / "advice"))
    fails("torch finds no cuda|expected auto", device="cuda" if not torch.cuda.is_available() else "tpu")
    write_session(tmp_path / "bare/run_0", 40, labels=False)
    write_session(tmp_path / "bare/run_1", 40, labels=False)
    fails("precompute_labels.py", data_dir=str(tmp_path / "bare"))
    write_session(shutil.copytree(dataset, tmp_path / "short") / "heldout_short", 4)
    fails("heldout_short: no two held-out frames", data_dir=str(tmp_path / "short"), heldout="heldout_short")
    broken = shutil.copytree(dataset, tmp_path / "broken")
    (broken / "run_1/recording.mp4").write_bytes(b"not a video")
    fails("run_1/recording.mp4 .* cannot be opened", data_dir=str(broken))
    assert not (tmp_path / "runs").exists()  # bad input leaves no run folder


def test_a_truncated_video_trains_on_what_it_has(dataset, tmp_path, capsys):
    cut = shutil.copytree(dataset, tmp_path / "cut")
    video = cut / "run_0/recording.mp4"
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 6 // 10])
    arguments = dict(SMALL, video_seconds=0.0, max_updates=4, data_dir=str(cut), run_root=str(tmp_path))
    assert iql_reflex.main(iql_reflex.Args(**arguments))["update"] == 4
    assert "for 160 rows" in capsys.readouterr().out


def test_a_changed_copy_trains_with_no_other_edit(dataset, tmp_path):
    source = Path(iql_reflex.__file__).read_text()
    copy = ROOT / "my_reflex.py"
    changed = source.replace("(128, 128)]", "(128, 96)]").replace("nn.Linear(128 * grid**2", "nn.Linear(96 * grid**2")
    assert changed != source
    try:
        copy.write_text(changed)
        arguments = (
            f"--data-dir {dataset} --run-root {tmp_path} --max-updates 4 --backbone cnn --image-size 32 --bootstrap 20"
        )
        process = start(copy.name, *arguments.split())
        output, _ = process.communicate(timeout=120)
    finally:
        copy.unlink()
    assert process.returncode == 0, output
    (run_dir,) = tmp_path.glob("*__my_reflex__*")
    assert (run_dir / "my_reflex.py").read_text() == changed
