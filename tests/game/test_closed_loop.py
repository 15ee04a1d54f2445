"""The closed loop on the real game: episodes end as they should, seeds are paired, nothing is left behind."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import play_reflex
from common.video import VideoReader
from supertux_env import closed_loop
from supertux_env.closed_loop import Constant
from tests.synthetic import write_session
from tests.unit.test_play_reflex import write_model

ROOT = Path(__file__).parents[2]
RIGHT = ["KEY_RIGHT", "KEY_SPACE", "KEY_X"]


class Unwilling(Constant):
    """A player whose episodes are void."""

    def step(self, frame, position, time_s):
        raise RuntimeError("it did not want to")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[dict, Path]:
    """A policy that holds right (and what does nothing) beside two baselines, two episodes each."""
    folder = tmp_path_factory.mktemp("closed_loop")
    write_session(folder / "run_1", 40)
    args = play_reflex.ClosedLoop(
        model=write_model(folder / "model", allowed_keys=RIGHT[:1]), level="generated:3", episodes=2, games=2,
        players=("policy", "always-right", "no-op"), replay_session=folder / "run_1", output=folder / "results",
    )  # fmt: skip
    return play_reflex.main(args), folder / "results"


def test_a_policy_that_holds_right_plays_as_always_right(result):
    summary, _ = result
    policy, right = (summary["players"][name] for name in ("policy", "always-right"))
    assert policy["outcomes"] == right["outcomes"], "both run against the first step up, or both do not"
    assert policy["key_rates"]["KEY_RIGHT"] > 0.95 and policy["key_rates"]["KEY_SPACE"] == 0
    assert policy["tiles"]["mean"] == pytest.approx(right["tiles"]["mean"], abs=2) and policy["tiles"]["mean"] > 5
    assert policy["logic_hz"]["lowest"] >= 50 and policy["decision_ms"]["p50"] < 100


def test_an_idle_player_is_stuck_after_ten_seconds(result):
    summary, folder = result
    idle = [e for e in json.loads((folder / "closed_loop.json").read_text())["episodes"] if e["player"] == "no-op"]
    assert [e["outcome"] for e in idle] == ["stuck", "stuck"]
    assert all(e["seconds"] == pytest.approx(10, abs=0.5) and e["tiles"] < 0.5 for e in idle)


def test_players_meet_the_same_seeds(result):
    _, folder = result
    episodes = json.loads((folder / "closed_loop.json").read_text())["episodes"]
    starts = {(e["player"], e["seed"]): (e["delay_s"], e["spawn_x"], e["level"]) for e in episodes}
    assert len(starts) == 6 and len({starts[player, 0] for player in ("policy", "always-right", "no-op")}) == 1
    assert starts["policy", 0] != starts["policy", 1]


def test_the_results_folder(result):
    summary, folder = result
    assert sorted(path.name for path in folder.iterdir()) == sorted(closed_loop.RESULTS)
    episodes = json.loads((folder / "closed_loop.json").read_text())["episodes"]
    best = max((e for e in episodes if e["player"] == "policy"), key=lambda e: e["progress"])
    assert VideoReader(folder / "best.mp4").n_frames == best["decisions"]
    assert summary["command"] and "commit" in summary


def test_the_demonstrator_gets_further_than_holding_right():
    makers = {"skilled": partial(closed_loop.Skilled, 10.0), "right": partial(Constant, frozenset({"KEY_RIGHT"}))}
    skilled, right = closed_loop.play_episodes(makers, "generated:4", [0], 10.0, games=2)
    assert skilled["tiles"] > right["tiles"] + 10
    assert {key for held in skilled["held"] for key in held} >= {"KEY_RIGHT", "KEY_SPACE"}


def test_a_void_episode_is_played_again_and_then_given_up(monkeypatch):
    monkeypatch.setattr(closed_loop, "TRIES", 2)
    makers = {"unwilling": partial(Unwilling, frozenset())}
    with pytest.raises(RuntimeError, match="seed 4 was void 2 times, at last because it did not want to"):
        closed_loop.play_episodes(makers, "generated:3", [4], 10.0, games=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_stopped_run_leaves_no_game_and_no_results(tmp_path, number):
    write_session(tmp_path / "run_1", 40)
    command = [sys.executable, "play_reflex.py", "closed-loop", "--model", str(write_model(tmp_path / "model"))]
    command += ["--players", "no-op", "--episodes", "4", "--games", "2", "--replay-session", str(tmp_path / "run_1")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while sum("supertux2" in name for name in descendants(process.pid).values()) < 2:
        assert process.poll() is None and time.monotonic() < end, "no two games began"
        time.sleep(0.2)
    family = descendants(process.pid)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    if number != signal.SIGKILL:
        assert process.returncode == 1 and "Nothing was written" in said
        assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["means.onnx", "means_manifest.json"]
    end = time.monotonic() + 15
    while left := family.keys() & running().keys():
        assert time.monotonic() < end, f"still there: {[family[pid] for pid in left]}"
        time.sleep(0.2)


def running() -> dict[int, tuple[int, str]]:
    """pid -> pid of the parent, name; of all processes that have not ended."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                name, rest = (folder / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            except OSError:  # it has just gone
                continue
            state, parent = rest.split()[:2]
            if state != "Z":
                found[int(folder.name)] = int(parent), name
    return found


def descendants(pid: int) -> dict[int, str]:
    """Processes that came from this one: pid -> name."""
    processes, found = running(), {pid}
    while more := {child for child, (parent, _) in processes.items() if parent in found} - found:
        found |= more
    return {child: processes[child][1] for child in found - {pid} if child in processes}
