"""The closed loop without a game: levels and seeds, players, what a life scores, intervals."""

import time

import numpy as np
import pytest

import play_reflex
from benchmarks.play import compare, offline_metrics
from common.sessions import WIN_KEY, load_session
from supertux_env import closed_loop as c
from supertux_env import demonstrators
from supertux_env.launch import Truth
from supertux_env.levels import TILE, Terrain, generate_level, move_spawn
from tests.synthetic import START_NS, write_session
from tests.unit.test_play_reflex import KEYS, write_model

TERRAIN = Terrain(np.zeros((15, 100), bool), spawn_x=96.0, goal_x=96.0 + 50 * TILE)


# levels ---------------------------------------------------------------------------------------------------------------
def test_levels_by_name():
    assert c.level_variants("generated:3") == [("generated", 3)]
    assert c.level_variants("generated:8-11") == [("generated", n) for n in (8, 9, 10, 11)]
    assert c.level_variants("welcome_antarctica") == [("welcome_antarctica", 0)]


@pytest.mark.parametrize(
    "level", ["generated", "generated:", "generated:x", "generated:5-3", "generated:-1", "nowhere"]
)
def test_an_unknown_level_is_named(level):
    with pytest.raises(ValueError, match=f"--level {level} is not known.*generated:3.*welcome_antarctica"):
        c.level_variants(level)


def test_the_spawn_point_moves_and_nothing_else(tmp_path):
    before = generate_level(3, tmp_path / "level.stl").read_text()
    after = move_spawn(tmp_path / "level.stl", 40.25).read_text()
    assert '(spawnpoint (name "main") (x 96)' in before
    assert after == before.replace('(spawnpoint (name "main") (x 96)', '(spawnpoint (name "main") (x 136.2)')


# players --------------------------------------------------------------------------------------------------------------
def play(player, seconds: float, fps: float = 10.0) -> list[tuple[float, set[str]]]:
    """(time, keys held from then on) of a player without eyes."""
    times = np.arange(round(seconds * fps)) / fps
    return [(t + after, set(keys)) for t in times for after, keys in player.step(None, None, t)]


def make(session_folder, name: str, fps: float = 10.0, seed: int = 0):
    return c.baselines(load_session(session_folder), fps)[name](TERRAIN, seed)


def test_replay_sends_every_change_at_its_time(tmp_path):
    write_session(tmp_path / "run_1", 40, seed=2)
    session = load_session(tmp_path / "run_1")
    rows = [row for row in session.inputs.to_pylist() if row["key_name"] != WIN_KEY]
    expected = [(row["timestamp"] - session.timestamps[0]) / 1000 for row in rows]
    for fps in (10.0, 4.0):
        played = play(make(tmp_path / "run_1", "replay", fps), 4, fps)
        assert [t for t, _ in played] == pytest.approx(expected)
    down = set()
    for row, (_, keys) in zip(rows, played, strict=True):
        down = down | {row["key_name"]} if row["state"] == "down" else down - {row["key_name"]}
        assert keys == down
    assert len(rows) > 4


def test_random_keys_have_the_rate_and_the_length_of_the_session(tmp_path):
    pattern = np.tile(np.arange(20) < 5, 30)  # down for 0.5 s, up for 1.5 s
    write_session(tmp_path / "run_1", 600, keys={"KEY_SPACE": pattern}, pictures=np.zeros((600, 16, 16, 3), np.uint8))
    played = np.array(["KEY_SPACE" in keys for _, keys in play(make(tmp_path / "run_1", "random"), 2000)])
    assert played.mean() == pytest.approx(0.25, abs=0.03)
    assert played.sum() / (np.diff(played.astype(int)) == 1).sum() == pytest.approx(5, abs=0.5)
    again = [play(make(tmp_path / "run_1", "random", seed=seed), 20) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_constant_players(tmp_path):
    write_session(tmp_path / "run_1", 40)
    assert {frozenset(keys) for _, keys in play(make(tmp_path / "run_1", "always-right"), 1)} == {frozenset({c.RIGHT})}
    assert {frozenset(keys) for _, keys in play(make(tmp_path / "run_1", "no-op"), 1)} == {frozenset()}


def test_a_session_without_keys_is_refused(tmp_path):
    folder = write_session(tmp_path / "run_1", 40, keys={"KEY_SPACE": np.zeros(40, bool)}) or tmp_path / "run_1"
    with pytest.raises(ValueError, match="run_1 holds no key of a game"):
        c.baselines(load_session(folder), 10.0)


def test_the_demonstrator_looks_ten_times_a_second():
    assert [c.frame_step(fps) for fps in (10, 20, 30, 60)] == [1, 2, 3, 6]
    for fps in (5, 15, 25):
        with pytest.raises(ValueError, match=f"does not divide {fps} frames.*skilled.*--players"):
            c.frame_step(fps)


# the policy as a player -----------------------------------------------------------------------------------------------
def grey_frames(n: int) -> np.ndarray:
    """Pictures whose keys change often: the model's logit is their mean minus 60."""
    levels = np.random.default_rng(1).integers(50, 72, n)
    return np.broadcast_to(levels[:, None, None, None], (n, 8, 8, 3)).astype(np.uint8)


def test_the_policy_plays_the_keys_of_eval(tmp_path):
    model = write_model(tmp_path / "model")
    for threshold, debounce, max_keys in ((None, 2, 4), (0.9, 1, 2)):
        args = play_reflex.ClosedLoop(model=model, threshold=threshold, debounce=debounce, max_keys=max_keys)
        player, policy = play_reflex.PolicyPlayer(args), play_reflex.Policy(model)
        rule, changes = policy.decision_rule(args), 0
        for frame in grey_frames(100):
            ((after_s, keys),) = player.step(frame, None, 0.0)
            before = rule.active
            rule.step(policy(frame)[0])
            changes += (before != rule.active).any()
            assert after_s == 0 and keys == {key for key, down in zip(KEYS, rule.active, strict=True) if down}
        assert changes > 10


def test_a_key_held_too_long_goes_up_for_one_decision(tmp_path):
    model = write_model(tmp_path / "model")
    player = play_reflex.PolicyPlayer(play_reflex.ClosedLoop(model=model, debounce=1, max_hold=0.5))
    frame = np.full((8, 8, 3), 255, np.uint8)  # all keys, all the time
    held = [keys for tick in range(18) for _, keys in player.step(frame, None, tick / 10)]
    assert [tick for tick, keys in enumerate(held) if keys != set(KEYS)] == [5, 11, 17]
    assert held[5] == set()


def test_the_demonstrator_is_measured_without_random_acts():
    player = c.Skilled(10.0, TERRAIN, 1)
    assert player.demonstrator.skill.random == 0 < demonstrators.SKILLS["skilled"].random


def test_sampled_keys_have_their_probabilities(tmp_path):
    model = write_model(tmp_path / "model", allowed_keys=KEYS[:2])
    frame = np.full((8, 8, 3), 61, np.uint8)  # logit 1
    args = play_reflex.ClosedLoop(model=model, decode="sample")
    player = play_reflex.PolicyPlayer(args, TERRAIN, 3)
    held = np.array([[key in keys for key in KEYS] for _ in range(2000) for _, keys in player.step(frame, None, 0.0)])
    assert held.mean(0)[:2] == pytest.approx([0.731, 0.731], abs=0.03)
    assert not held[:, 2].any(), "a key that is not allowed"
    assert np.corrcoef(held[:, 0], held[:, 1])[0, 1] == pytest.approx(0, abs=0.1)


# the loop -------------------------------------------------------------------------------------------------------------
class Fake:
    """A game, its screen and its keyboard: Tux moves `speed` pixels a second and dies `dies_s` after the first look."""

    def __init__(self, speed: float = 100.0, dies_s: float = 1e9):
        self.speed, self.dies_s, self.start, self.held, self.sent, self.failure = speed, dies_s, None, set(), [], ""

    def grab(self):
        self.start = self.start or time.monotonic()
        return np.zeros((4, 4, 3), np.uint8), time.monotonic_ns()

    def count(self, what):
        return int(what == "start" or (what == "death" and time.monotonic() - self.start > self.dies_s))

    def position(self):
        return 96 + self.speed * (time.monotonic() - self.start), 400.0, 0.0, 0.0

    def running(self):
        return True

    def hold(self, keys):
        self.sent.append((time.monotonic() - self.start, set(keys)))
        self.held = set(keys)


class Slow(c.Constant):
    def step(self, frame, position, time_s):
        self.times = [*getattr(self, "times", []), time_s]
        time.sleep(0.12)
        yield 0.0, self.keys


def test_what_is_late_is_left_out(monkeypatch):
    monkeypatch.setattr(c, "EPISODE_S", 1.0)
    fake, player = Fake(), Slow(frozenset({c.RIGHT}), TERRAIN, 0)
    played = c._play(player, fake, fake, fake, 20.0, None)
    assert played["outcome"] == "time" and 20 <= played["decisions"] + played["left_out"] <= 22
    assert 6 <= played["decisions"] <= 9 and min(played["decision_ms"]) > 119
    assert np.allclose(np.array(player.times) * 20 % 1, 0), "decisions lie on the grid of frames"
    assert played["held"] == [[c.RIGHT]] * played["decisions"]


def test_plans_of_a_player_are_kept_to_the_moment(monkeypatch):
    monkeypatch.setattr(c, "EPISODE_S", 0.5)
    fake = Fake()
    changes = [(0.03, "KEY_SPACE", True), (0.18, "KEY_SPACE", False), (0.31, c.RIGHT, True)]
    played = c._play(c.Replay(changes, 10.0, TERRAIN, 0), fake, fake, fake, 10.0, None)
    assert [keys for _, keys in fake.sent] == [{"KEY_SPACE"}, set(), {c.RIGHT}]
    assert [t for t, _ in fake.sent] == pytest.approx([0.03, 0.18, 0.31], abs=0.03)
    assert played["decisions"] == 5 and played["left_out"] == 0


@pytest.mark.parametrize("speed, dies_s, outcome", [(0.0, 9, "stuck"), (100.0, 9, "time"), (100.0, 0.25, "stuck")])
def test_an_episode_ends(monkeypatch, speed, dies_s, outcome):
    monkeypatch.setattr(c, "EPISODE_S", 0.6)
    monkeypatch.setattr(c, "STUCK_S", 0.3)
    fake = Fake(speed, dies_s)
    played = c._play(c.Constant(frozenset(), TERRAIN, 0), fake, fake, fake, 10.0, None)
    assert played["decisions"] == {9: 3 if outcome == "stuck" else 6, 0.25: 3}[dies_s]
    assert dies_s < 9 or played["outcome"] == outcome  # a death is told by the game's events


# what a life scores ---------------------------------------------------------------------------------------------------
def life(*events: tuple[float, str]) -> tuple[list, list]:
    """Events at seconds after the start; Tux runs 5 tiles a second for 10 s, whatever happens."""
    told = [Truth(START_NS + round(1e9 * t), what, "") for t, what in events]
    times = np.arange(0, 10, 0.015)
    return told, [(START_NS + round(1e9 * t), 96 + 5 * TILE * t, 400.0, 160.0, 0.0) for t in times]


def score(*events: tuple[float, str], stop_s: float = 9.0) -> dict:
    return c.score(*life(*events), START_NS, START_NS + round(1e9 * stop_s), TERRAIN)


def test_progress_counts_up_to_the_first_death():
    figures = score((1, "squish"), (2, "kill"), (4, "death"), (6, "squish"), (8, "win"))
    assert figures["outcome"] == "death" and figures["seconds"] == pytest.approx(4)
    assert figures["tiles"] == pytest.approx(20, abs=0.1) and figures["progress"] == pytest.approx(0.4, abs=0.002)
    assert figures["squishes"] == 1 and figures["other_kills"] == 1


def test_a_win_is_the_whole_way():
    figures = score((0, "start"), (7, "win"), (8, "death"))
    assert figures["outcome"] == "win" and figures["progress"] == 1 and figures["tiles"] == 50


def test_an_end_by_the_clock_counts_all_that_was_played():
    figures = score((0, "start"), (3, "coins"))
    assert "outcome" not in figures and figures["seconds"] == pytest.approx(9)
    assert figures["tiles"] == pytest.approx(45, abs=0.1)


# intervals ------------------------------------------------------------------------------------------------------------
def test_wilson_against_published_values():
    assert c.wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=5e-4)  # Newcombe's method 3
    assert c.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-4)
    assert c.wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-4)


def test_the_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).normal(10, 4, 100)
    interval = c.mean_interval(values, c.resample(["generated:1"] * 100))
    half = 1.96 * values.std() / 10
    assert (interval["low"], interval["high"]) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15)
    assert interval["mean"] == pytest.approx(values.mean())


def test_episodes_of_one_level_are_drawn_together():
    levels = [f"generated:{i % 5}" for i in range(20)]
    values = np.array([10.0 * (i % 5) for i in range(20)])  # a level's own figure, four times
    weights = c.resample(levels)
    assert (weights.sum(1) == 20).all() and (weights[:, 0] == weights[:, 5]).all()
    clustered, single = c.mean_interval(values, weights), c.mean_interval(values, c.resample(["generated:1"] * 20))
    assert clustered["high"] - clustered["low"] > 1.7 * (single["high"] - single["low"])


def test_a_summary_by_hand():
    def episode(player, seed, tiles, outcome, ms):
        return {
            "player": player, "seed": seed, "level": "generated:1", "tiles": tiles, "progress": tiles / 50,
            "seconds": 5.0, "squishes": 1, "outcome": outcome, "decisions": 3, "left_out": 1, "decision_ms": ms,
            "held": [["KEY_RIGHT"], ["KEY_RIGHT", "KEY_SPACE"], []], "voids": [], "logic_hz": 60.0 + seed,
        }  # fmt: skip

    episodes = [episode("policy", s, 20.0 + s, "death", [5.0, 10.0, 150.0]) for s in range(3)]
    episodes += [episode("no-op", s, float(s), "win" if s else "stuck", [1.0] * 3) for s in range(3)]
    summary = c.summarise(episodes, fps=10.0)
    policy, no_op = summary["players"]["policy"], summary["players"]["no-op"]
    assert policy["tiles"]["mean"] == 21 and 20 <= policy["tiles"]["low"] < 21 < policy["tiles"]["high"] <= 22
    assert no_op["outcomes"] == {"win": 2, "death": 0, "stuck": 1, "time": 0}
    assert policy["inside_their_frame"] == pytest.approx(2 / 4), "one took longer than 100 ms, one was left out"
    assert policy["key_rates"] == pytest.approx(dict.fromkeys(c.KEYS, 0) | {"KEY_RIGHT": 2 / 3, "KEY_SPACE": 1 / 3})
    difference = summary["reference_minus"]["no-op"]["tiles"]
    assert difference == {"mean": 20.0, "low": 20.0, "high": 20.0}, "pairs differ by 20 each"


def test_ways_are_compared_by_the_mean_of_their_models():
    tiles = {"a": np.array([[10.0, 20.0], [30.0, 40.0]]), "b": np.array([[5.0, 15.0]])}
    summary = compare.summarise(tiles, ["x", "x"])
    assert summary["ways"]["a"]["models"] == [15.0, 35.0] and summary["ways"]["a"]["mean"] == 25.0
    assert summary["differences"] == {"a - b": {"mean": 15.0, "low": 15.0, "high": 15.0}}


def test_what_cannot_be_compared_is_named(tmp_path):
    slow, model = write_model(tmp_path / "slow", fps=5.0), write_model(tmp_path / "model")
    for models, words in [
        ((f"bc+best={model}",), "after the . of a way comes q, sample, auto or an intent"),
        ((f"bc+LEAP={model}",), "takes no goal"),
        ((str(model),), "expected <way>=<file.onnx>"),
        ((f"iql+q={model}",), "has no Q head"),
        ((f"a={model}", f"b={slow}"), r"\[5.0, 10.0\] frames a second, expected one rate"),
        ((), "expected one rate"),
    ]:
        with pytest.raises(SystemExit, match=words):
            compare.main(compare.Args(models=models))


def test_rank_correlation_over_checkpoints():
    tiles = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    same = offline_metrics.correlate(tiles**3, tiles, 200)
    assert [same[name] for name in ("rho", "low", "high")] == pytest.approx([1, 1, 1])
    assert offline_metrics.correlate(-tiles, tiles, 200)["rho"] == pytest.approx(-1)
    assert np.isnan(offline_metrics.correlate(np.ones(6), tiles, 200)["rho"])


# flags ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"episodes": 1}, "--episodes 1.*expected 2 or more"),
        ({"players": ()}, "--players.*each player once"),
        ({"players": ("no-op", "no-op")}, "--players.*each player once"),
        ({"decode": "sample", "threshold": 0.5}, "--threshold 0.5 means nothing to --decode sample"),
        ({"decode": "q"}, "has no Q head, which --decode q asks"),
        ({"debounce": 0}, "--debounce 0"),
        ({"max_hold": -1.0}, "--max-hold -1: expected 0 seconds or more"),
        ({"level": "nowhere"}, "--level nowhere"),
        ({"replay_session": "missing"}, "missing"),
    ],
)
def test_bad_flags_are_named_and_nothing_starts(tmp_path, changes, message):
    write_session(tmp_path / "run_1", 40)
    settings = {"model": write_model(tmp_path / "model"), "replay_session": tmp_path / "run_1"} | changes
    if changes.get("replay_session"):
        settings["replay_session"] = tmp_path / changes["replay_session"]
    with pytest.raises(SystemExit, match=message):
        play_reflex.main(play_reflex.ClosedLoop(**settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run_1"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["means.onnx", "means_manifest.json"]


def test_other_peoples_folders_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(play_reflex, "find_program", lambda name: name)
    write_session(tmp_path / "run_1", 40)
    args = play_reflex.ClosedLoop(
        model=write_model(tmp_path / "model"), replay_session=tmp_path / "run_1", output=tmp_path / "mine"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(SystemExit, match="is no results folder.*letter.txt"):
        play_reflex.main(args)
    (tmp_path / "mine/letter.txt").rename(tmp_path / "mine/closed_loop.json")
    with pytest.raises(SystemExit, match="is there already.*--overwrite"):
        play_reflex.main(args)
    assert (tmp_path / "mine/closed_loop.json").read_text() == "dear"
