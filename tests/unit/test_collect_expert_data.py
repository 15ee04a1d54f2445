"""The collector on small games and experts: what is in the files, kills, full disks, two runs at once."""

import errno
import json
import os
import subprocess
import sys
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from collect_expert_data import Args, main
from pokemon_env import episode_writer, experts
from pokemon_env.episode_writer import Writer, crc_of_both, recover
from pokemon_env.episodes import read_episode, read_episodes
from pokemon_env.experts import EpisodeEnd
from tests import fake_games

ROOT = Path(__file__).parents[2]
GAME = "tests.fake_games:Corridor-v0"
EXPERTS = "tests/fake_experts.py"
FACTS = {"env_id": GAME, "rom_sha1": "", "action_meanings": ["A", "B"], "shape": (4, 5, 3), "expert": "x", "epsilon": 0}


def collect(folder: Path, expert: str = "Walker", **options) -> dict:
    expert = f"{EXPERTS}:{expert}" if expert[0].isupper() else expert
    options = {"env_id": GAME, "episodes": 3, "chunk_steps": 4} | options
    return main(Args(expert=expert, expert_data_dir=folder, **options))


def load(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def same(a: dict, b: dict, but: tuple = ()) -> bool:
    keys = a.keys() - set(but)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in keys)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# what is in a file ----------------------------------------------------------------------------------------------------
def test_an_episode_holds_what_was_seen_and_done(tmp_path):
    summary = collect(tmp_path, seed=7)
    env = gym.make(GAME)
    for number in (1, 2, 3):
        path = tmp_path / f"episode_{number:04d}.npz"
        assert zipfile.ZipFile(path).testzip() is None
        episode = load(path)
        obs, info = env.reset(seed=7 + number)
        T = int(episode["episode_length"])
        assert T == len(episode["observations"]) == summary["lengths"][number - 1] > 5
        for t in range(T):
            assert np.array_equal(episode["observations"][t], obs)
            assert json.loads(str(episode["infos"][t]))["x"] == info["x"]
            obs, reward, terminated, truncated, info = env.step(1)
            assert episode["rewards"][t] == reward
            assert episode["dones"][t] == (terminated or truncated) == (t == T - 1)
        assert np.array_equal(episode["final_observation"], obs)
        assert json.loads(str(episode["final_info"]))["x"] == 12
        assert (episode["actions"] == 1).all() and (episode["taken_actions"] == 1).all()
        assert episode["episode_return"] == pytest.approx(summary["returns"][number - 1])
        assert episode["seed"] == 7 + number and episode["format_version"] == 1
        assert episode["success"] and not episode["truncated"] and not episode["interrupted"]
        assert episode["action_meanings"].tolist() == ["LEFT", "RIGHT", "UP", "DOWN"]
        types = {"observations": "uint8", "actions": "int32", "rewards": "float32", "dones": "bool"}
        assert {name: str(episode[name].dtype) for name in types} == types
    assert len(read_episodes(tmp_path)[0]) == 3
    assert summary["actions"] == {"LEFT": 0, "RIGHT": summary["steps"], "UP": 0, "DOWN": 0}
    assert summary["milestones"] == {"START": 3, "HALF": 3, "END": 3} and summary["success"] == [True] * 3


@pytest.mark.parametrize("options", [{"chunk_steps": 1}, {"chunk_steps": 10_000}, {"compress": True}])
def test_chunks_and_compression_change_nothing_in_it(tmp_path, options):
    collect(tmp_path / "a")
    collect(tmp_path / "b", **options)
    for path in (tmp_path / "a").glob("*.npz"):
        assert same(load(path), load(tmp_path / "b" / path.name))
    stored, other = ((tmp_path / d / "episode_0001.npz").stat().st_size for d in "ab")
    assert other < stored / 2 if "compress" in options else other == stored


def test_two_workers_collect_what_one_does(tmp_path):
    collect(tmp_path / "one", episodes=5, epsilon=0.4)
    collect(tmp_path / "two", episodes=5, epsilon=0.4, num_workers=2)
    assert names(tmp_path / "one") == names(tmp_path / "two")
    for path in (tmp_path / "one").glob("*.npz"):
        assert same(load(path), load(tmp_path / "two" / path.name))


def test_epsilon_changes_what_is_played_and_not_the_label(tmp_path):
    summary = collect(tmp_path, episodes=20, epsilon=0.5)
    episodes = [load(path) for path in tmp_path.glob("*.npz")]
    labels = np.concatenate([episode["actions"] for episode in episodes])
    taken = np.concatenate([episode["taken_actions"] for episode in episodes])
    assert (labels == 1).all() and set(taken) == {0, 1, 2, 3}
    assert abs((taken != labels).mean() - 0.5 * 3 / 4) < 0.1
    assert summary["actions"]["RIGHT"] == len(labels)
    assert not same(*(load(tmp_path / f"episode_000{n}.npz") for n in (1, 2)))  # each has its own chance


def test_an_episode_that_reaches_the_limit_is_truncated(tmp_path):
    collect(tmp_path, expert="random:3", max_steps=6)
    for path in tmp_path.glob("*.npz"):
        episode = load(path)
        assert episode["truncated"] and not episode["interrupted"] and not episode["success"]
        assert episode["episode_length"] == 6 and episode["dones"].tolist() == [False] * 5 + [True]


def test_a_limit_of_0_is_the_environments_own(tmp_path):
    collect(tmp_path / "a")
    collect(tmp_path / "b", max_steps=0)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for path in (tmp_path / "a").glob("*.npz"):
        assert same(load(path), load(tmp_path / "b" / path.name))


def test_actions_without_names_are_called_by_their_number(tmp_path):
    collect(tmp_path, expert="random", env_id="tests.fake_games:Nameless-v0", max_steps=5)
    assert load(tmp_path / "episode_0001.npz")["action_meanings"].tolist() == ["0", "1", "2", "3"]
    read_episodes(tmp_path)


def test_a_replay_makes_the_same_episode_again(tmp_path):
    collect(tmp_path / "a", episodes=2, epsilon=0.3)
    first = tmp_path / "a" / "episode_0002.npz"
    collect(tmp_path / "b", expert=f"replay:{first}", episodes=1, seed=99)
    again = load(tmp_path / "b" / "episode_0001.npz")
    assert same(load(first), again, but=("actions", "expert", "epsilon"))
    short = tmp_path / "short.txt"
    short.write_text("right, RIGHT 1 # three steps\nup")
    collect(tmp_path / "c", expert=f"replay:{short}", episodes=1)  # exit status 0: cut short, not failed
    episode = load(tmp_path / "c" / "episode_0001.npz")
    assert episode["taken_actions"].tolist() == [1, 1, 1, 2] and episode["truncated"]


def test_a_video_stands_beside_the_episode(tmp_path):
    from common.video import VideoReader

    collect(tmp_path, env_id="tests.fake_games:Wide-v0", episodes=1, record_video=True)
    T = int(load(tmp_path / "episode_0001.npz")["episode_length"])
    reader = VideoReader(tmp_path / "episode_0001.mp4")
    assert len(reader.read(0, T)) == T and reader.read(0, 1).shape[-2:] == (32, 48)
    assert names(tmp_path) == ["episode_0001.mp4", "episode_0001.npz"]


def test_numbers_and_seeds_go_on(tmp_path):
    collect(tmp_path, episodes=2)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "episode_0005.npz").touch()
    collect(tmp_path, episodes=2, seed=10)
    assert names(tmp_path) == [*sorted(before), "episode_0006.npz", "episode_0007.npz", "failed"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert load(tmp_path / "episode_0006.npz")["seed"] == 16


# experts that fail ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("expert,message", [("Waverer", "no answer from the agent"), ("Nonsense", "'no_op'")])
def test_a_failed_episode_is_kept_aside_and_told(tmp_path, capsys, expert, message, workers):
    with pytest.raises(SystemExit) as stopped:
        collect(tmp_path, expert=expert, episodes=4, num_workers=workers)
    out = capsys.readouterr().out
    failed = sorted((tmp_path / "failed").glob("*.npz"))
    assert len(failed) == 2 and stopped.value.code == "2 of 4 episodes failed"
    for path in failed:
        episode = load(path)
        assert message in str(episode["error"]) and f"{path.stem[-4:]} failed: " in out and message in out
        assert episode["episode_length"] == 5 == len(episode["actions"]) and not episode["dones"].any()
    episodes, _ = read_episodes(tmp_path)
    assert len(episodes) == 2 and all(episode["success"] for episode in episodes)


def test_an_expert_that_fails_at_once_leaves_no_labels(tmp_path):
    with pytest.raises(SystemExit, match="3 of 3"):
        collect(tmp_path, expert="Failing")
    assert names(tmp_path) == ["failed"]
    assert load(tmp_path / "failed" / "episode_0001.npz")["observations"].shape == (0, 8, 6, 3)


class Finished:
    """Has nothing to play in the first `empty` episodes."""

    empty = 0

    def reset(self, info):
        self.over, Finished.empty = Finished.empty > 0, Finished.empty - 1

    def get_action(self, obs, info):
        if self.over:
            raise EpisodeEnd("nothing to play")
        return "RIGHT"


@pytest.fixture
def finished(monkeypatch):
    monkeypatch.setattr(experts, "make_expert", lambda *_: Finished())


def test_a_run_without_a_step_collects_nothing(tmp_path, capsys, monkeypatch, finished):
    monkeypatch.setattr(Finished, "empty", 3)
    with pytest.raises(SystemExit, match="no episode was collected: --expert .*:Finished ended all 3 at once"):
        collect(tmp_path, expert="Finished")
    out = capsys.readouterr().out
    assert "before their first step, without a file: 3" in out and "START" not in out
    assert names(tmp_path) == []


def test_episodes_without_a_step_are_not_counted(tmp_path, capsys, monkeypatch, finished):
    monkeypatch.setattr(Finished, "empty", 1)
    summary = collect(tmp_path, episodes=3)
    assert summary["episodes"] == 2 and summary["empty"] == 1 and min(summary["lengths"]) > 5
    assert summary["milestones"] == {"START": 2, "HALF": 2, "END": 2} and summary["success"] == [True] * 2
    assert "before their first step, without a file: 1" in capsys.readouterr().out
    assert names(tmp_path) == ["episode_0001.npz", "episode_0002.npz"]  # the number of the empty one is taken again


# kills, Ctrl-C, crashes -----------------------------------------------------------------------------------------------
def subprocess_collect(folder: Path, expert: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "collect_expert_data.py", "--env-id", GAME, "--expert-data-dir", str(folder)]
    command += ["--expert", f"{EXPERTS}:{expert}", "--chunk-steps", "2", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_after_a_kill_all_whole_chunks_are_joined(tmp_path, capsys):
    done = subprocess_collect(tmp_path, "Killed", "--episodes", "4")
    assert done.returncode == -9
    assert names(tmp_path) == ["episode_0001.npz", "episode_0002.part"]
    collect(tmp_path, episodes=1)
    assert "episode_0002.npz: joined" in capsys.readouterr().out
    assert names(tmp_path) == ["episode_0001.npz", "episode_0002.npz", "episode_0003.npz"]
    episode = load(tmp_path / "episode_0002.npz")
    assert zipfile.ZipFile(tmp_path / "episode_0002.npz").testzip() is None
    assert episode["interrupted"] and episode["truncated"] and not episode["dones"].any()
    assert episode["episode_length"] == 4  # it was killed while the expert thought about the sixth step
    assert episode["observations"][:, 0, 0, 1].tolist() == [0, 1, 2, 3] and episode["final_observation"][0, 0, 1] == 4
    assert len(read_episodes(tmp_path)[0]) == 3


def test_a_worker_that_dies_ends_the_run_and_loses_nothing(tmp_path):
    done = subprocess_collect(tmp_path, "Killed", "--episodes", "6", "--num-workers", "2")
    assert done.returncode == 1 and "a worker died" in done.stderr.splitlines()[-1]
    collect(tmp_path, episodes=1)
    assert not list(tmp_path.glob("*.part"))
    lengths = [int(episode["episode_length"]) for episode in read_episodes(tmp_path)[0]]
    assert len(lengths) >= 3 and min(lengths) >= 1


@pytest.mark.parametrize("expert,workers", [("CtrlC", 1), ("CtrlCFromWorker", 2)])
def test_ctrl_c_keeps_what_is_there(tmp_path, capsys, expert, workers):
    with pytest.raises(SystemExit) as stopped:
        collect(tmp_path, expert=expert, episodes=50, num_workers=workers)
    assert stopped.value.code == 130
    assert "cut short: episodes" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part"))
    episodes, _ = read_episodes(tmp_path)
    cut = [episode for episode in episodes if episode["interrupted"]]
    whole_first = 1 if workers == 1 else 0  # a second worker may still be starting when the first is stopped
    assert 1 + whole_first <= len(episodes) < 50 and 1 <= len(cut) <= workers
    assert any(len(episode["actions"]) == 5 for episode in cut)
    for episode in cut:
        assert episode["truncated"] and not episode["dones"].any()


def test_a_game_that_crashes_is_told_and_its_steps_are_kept(tmp_path):
    with pytest.raises(SystemExit, match="Crash-v0 failed: RuntimeError: the game fell over"):
        collect(tmp_path, env_id="tests.fake_games:Crash-v0")
    assert load(tmp_path / "episode_0001.npz")["episode_length"] == 19


def begin(folder: Path, chunk_steps: int = 4) -> Writer:
    folder.mkdir(exist_ok=True)
    return Writer.begin(folder, 1, None, FACTS, chunk_steps)


ENDING = {"truncated": False, "interrupted": False, "success": True, "error": "", "final_info": "{}"}


def fill(writer: Writer, pictures: int, steps: int):
    for t in range(pictures):
        writer.observe(np.full((4, 5, 3), t, np.uint8))
        if t < steps:
            writer.step(t, t + 1, t / 2, False, json.dumps({"t": "x" * t}))


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "Connection refused"), OSError(28, "No space left")])
def test_an_oserror_of_the_game_is_not_the_folders(tmp_path, monkeypatch, error):
    def step(self, action):
        if self.steps == 6:
            raise error
        return walk(self, action)

    walk = fake_games.Corridor.step
    monkeypatch.setattr(fake_games.Corridor, "step", step)
    with pytest.raises(SystemExit) as stopped:
        collect(tmp_path, chunk_steps=100)
    assert str(stopped.value.code).startswith(f"{GAME} failed: {type(error).__name__}: [Errno {error.errno}]")
    assert load(tmp_path / "episode_0001.npz")["episode_length"] == 6  # its unfinished chunk too
    monkeypatch.setattr(fake_games.Corridor, "steps", 6, raising=False)
    monkeypatch.setattr(fake_games.Corridor, "reset", lambda self, **_: self.step(0))
    with pytest.raises(SystemExit, match=f"{GAME} failed: {type(error).__name__}"):
        collect(tmp_path)
    assert names(tmp_path) == ["episode_0001.npz"]


@pytest.mark.parametrize("pictures,steps,expected", [(8, 8, 7), (9, 8, 8), (10, 9, 8), (3, 3, None), (0, 0, None)])
def test_recovered_episodes_know_where_their_last_step_led(tmp_path, pictures, steps, expected):
    writer = begin(tmp_path)
    fill(writer, pictures, steps)
    assert recover(tmp_path, False) == [] and writer.part.exists()  # its collector still runs
    writer.file.close()
    joined = recover(tmp_path, False)
    assert not writer.part.exists() and len(joined) == (expected is not None)
    if expected:
        episode = load(joined[0])
        assert episode["actions"].tolist() == list(range(expected)) and episode["interrupted"]
        assert (episode["final_observation"] == expected).all() and episode["observations"].shape == (expected, 4, 5, 3)
        assert [json.loads(str(info))["t"] for info in episode["infos"]] == ["x" * t for t in range(expected)]


def test_a_run_killed_while_joining_is_joined_again(tmp_path, monkeypatch):
    for fails_at in ("rename", "truncate", "chunk"):
        writer = begin(tmp_path)
        fill(writer, 7, 6)
        with monkeypatch.context() as patch:
            if fails_at == "rename":
                patch.setattr(episode_writer.os, "rename", lambda *_: 1 / 0)
            elif fails_at == "truncate":
                patch.setattr(episode_writer.np.lib.format, "write_array", lambda *_, **__: 1 / 0)
            else:
                patch.setattr(episode_writer, "join", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                writer.close(ENDING, compress=False)
        (path,) = recover(tmp_path, False)
        episode = load(path)
        assert zipfile.ZipFile(path).testzip() is None
        assert episode["success"] and not episode["interrupted"] and len(episode["observations"]) == 6
        assert (episode["final_observation"] == 6).all()


@pytest.mark.parametrize("killed", [False, True])
def test_more_than_ten_thousand_chunks_keep_their_order(tmp_path, killed):
    writer = begin(tmp_path, chunk_steps=1)
    writer.chunks = 9998
    fill(writer, 5, 4)
    for number in range(9998):
        (writer.part / f"chunk_{number:04d}.json").write_text('{"steps": []}')
    if killed:
        writer.file.close()
        recover(tmp_path, False)
    else:
        writer.close(ENDING, compress=False)
    episode = load(tmp_path / "episode_0001.npz")
    assert episode["actions"].tolist() == [0, 1, 2, 3] and episode["observations"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert [len(json.loads(str(info))["t"]) for info in episode["infos"]] == [0, 1, 2, 3]


STEP = '[1, 1, 0.5, false, "{}"]'
DAMAGES = {
    "empty": b"",
    "zeros": bytes(100),
    "half": b'{"steps": [[0, 1, 0.0, fal',
    "no object": b"[]",
    "no steps": b"{}",
    "a short step": b'{"steps": [[1, 2]]}',
    "no label": f'{{"steps": [{STEP.replace("1", "null", 1)}]}}'.encode(),
    "not utf-8": b'{"steps": "\xff"}',
    "half an ending": b'{"steps": [], "ending": {"error": ""}}',
    "missing": None,
}


def spoil(path: Path, kind: str):
    path.unlink() if DAMAGES[kind] is None else path.write_bytes(DAMAGES[kind])


@pytest.mark.parametrize("joining", [False, True])
@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_before_a_damaged_chunk_is_kept(tmp_path, capsys, monkeypatch, kind, joining):
    damaged, whole = begin(tmp_path), begin(tmp_path)
    for writer in (damaged, whole):
        fill(writer, 15, 14)
        if joining:  # it was killed when its last picture was already cut off
            with monkeypatch.context() as patch:
                patch.setattr(episode_writer.np.lib.format, "write_array", lambda *_, **__: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    writer.close(ENDING, compress=False)
        writer.file.close()
    spoil(damaged.part / "chunk_0001.json", kind)
    assert [path.name for path in recover(tmp_path, False)] == ["episode_0001.npz", "episode_0002.npz"]
    out = capsys.readouterr().out
    assert f"{damaged.part / 'chunk_0001.json'} is " in out and "The 4 steps before it are kept" in out
    assert "episode_0001.npz: joined" in out and "chunk_0000" not in out and "chunk_0002" not in out
    episode = load(tmp_path / "episode_0001.npz")
    assert zipfile.ZipFile(tmp_path / "episode_0001.npz").testzip() is None
    assert episode["actions"].tolist() == [0, 1, 2, 3] and episode["observations"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert (episode["final_observation"] == 4).all() and episode["interrupted"] and not episode["success"]
    assert str(episode["final_info"]) == "null" and len(episode["infos"]) == 4
    assert load(tmp_path / "episode_0002.npz")["episode_length"] == (14 if joining else 12)
    assert names(tmp_path) == ["episode_0001.npz", "episode_0002.npz"]
    assert read_episode(tmp_path / "episode_0001.npz")["shape"] == (4, 4, 5, 3)


@pytest.mark.parametrize("content", [b"", bytes(100)], ids=["empty", "zeros"])
def test_a_last_picture_that_cannot_be_read_costs_one_step(tmp_path, monkeypatch, content):
    writer = begin(tmp_path)
    fill(writer, 7, 6)
    with monkeypatch.context() as patch:
        patch.setattr(episode_writer.os, "rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.close(ENDING, compress=False)
    (writer.part / "final_6.npy").write_bytes(content)
    (path,) = recover(tmp_path, False)
    episode = read_episode(path)
    assert episode["actions"].tolist() == [0, 1, 2, 3, 4] and (episode["final_observation"] == 5).all()
    assert episode["interrupted"] and episode["final_info"] is None


@pytest.mark.parametrize("file", ["facts.json", "chunk_0000.json", "episode.npz"])
@pytest.mark.parametrize("kind", ["empty", "half", "no object", "no steps", "missing"])
def test_a_folder_that_cannot_be_joined_is_named_and_let_alone(tmp_path, capsys, file, kind):
    (tmp_path / "data").mkdir()
    damaged, whole = begin(tmp_path / "data"), begin(tmp_path / "data")
    for writer in (damaged, whole):
        fill(writer, 9, 8)
        writer.file.close()
    spoil(damaged.part / file, kind)
    before = {path.name: path.read_bytes() for path in damaged.part.iterdir()}
    for _ in range(2):  # at every start, until it is moved away
        joined = recover(tmp_path / "data", False)
        out = capsys.readouterr().out
        assert f"{damaged.part / file} is " in out and f"Move {damaged.part} out of the folder" in out
        assert {path.name: path.read_bytes() for path in damaged.part.iterdir()} == before
    assert joined == [] and names(tmp_path / "data") == ["episode_0001.part", "episode_0002.npz"]
    assert load(tmp_path / "data" / "episode_0002.npz")["episode_length"] == 8
    damaged.part.rename(tmp_path / "moved")
    assert recover(tmp_path / "data", False) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("error", ["", "the expert failed"])
def test_a_run_killed_right_after_joining_leaves_no_folder(tmp_path, monkeypatch, compress, error):
    ending = {"truncated": False, "interrupted": False, "success": True, "error": error, "final_info": "{}"}
    writer = begin(tmp_path)
    fill(writer, 7, 6)
    with monkeypatch.context() as patch:
        patch.setattr(episode_writer.shutil, "rmtree", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.close(ending, compress)
    recover(tmp_path, compress)
    (path,) = tmp_path.rglob("episode_*.npz")
    assert not writer.part.exists() and load(path)["actions"].tolist() == list(range(6))


@pytest.mark.parametrize("killed", [False, True])
def test_memory_does_not_grow_with_the_episode(tmp_path, killed):
    shape, T, info = (64, 64, 3), 3000, json.dumps({"x": "y" * 2000})
    picture = np.zeros(shape, np.uint8)
    ending = {"truncated": False, "interrupted": False, "success": True, "error": "", "final_info": None}
    tracemalloc.start()
    writer = Writer.begin(tmp_path, 1, None, FACTS | {"shape": shape}, 100)
    for t in range(T):
        writer.observe(picture)
        writer.step(t % 2, 0, 0.0, False, info)
    writer.observe(picture)
    if killed:
        writer.file.close()
        recover(tmp_path, False)
    else:
        writer.close(ending, compress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path = tmp_path / "episode_0001.npz"
    assert load(path)["observations"].shape == (T, *shape) and path.stat().st_size > 50 << 20
    assert peak < 12 << 20


# two at once, full disks ----------------------------------------------------------------------------------------------
def test_collectors_side_by_side_take_different_numbers(tmp_path):
    writers, errors = [], []

    def run():
        try:
            for _ in range(5):
                writer = begin(tmp_path)
                fill(writer, 3, 2)
                recover(tmp_path, False)
                writers.append(writer.number)
                ending = {"truncated": True, "interrupted": False, "success": False, "error": "", "final_info": None}
                writer.close(ending, compress=False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and sorted(writers) == list(range(1, 31))
    assert names(tmp_path) == [f"episode_{n:04d}.npz" for n in range(1, 31)]
    assert not any(load(path)["interrupted"] for path in tmp_path.glob("*.npz"))


class Full:
    """Makes a function fail from its call number `at` on, as a full disk does."""

    def __init__(self, function, at: int):
        self.function, self.left = function, at

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("where", ["picture", "chunk", "join"])
def test_a_full_disk_stops_the_run_and_spoils_nothing(tmp_path, monkeypatch, where, compress):
    with monkeypatch.context() as patch:
        if where == "picture":
            full = Full(Writer.observe, 30)
            patch.setattr(Writer, "observe", lambda *args: full(*args))
        elif where == "chunk":
            patch.setattr(episode_writer, "write_json", Full(episode_writer.write_json, 11))
        else:
            patch.setattr(episode_writer.np.lib.format, "write_array", Full(np.lib.format.write_array, 40))
        with pytest.raises(SystemExit) as stopped:
            collect(tmp_path, episodes=9, compress=compress)
    assert "No space left on device" in str(stopped.value.code) and "Free some space" in str(stopped.value.code)
    assert 1 <= len(list(tmp_path.glob("*.npz"))) < 9
    read_episodes(tmp_path)
    collect(tmp_path, episodes=1)
    assert all(name.endswith(".npz") for name in names(tmp_path))
    for path in tmp_path.glob("*.npz"):
        assert zipfile.ZipFile(path).testzip() is None
    assert all(len(episode["actions"]) >= 1 for episode in read_episodes(tmp_path)[0])


def test_a_picture_that_fits_by_half_is_a_full_disk(tmp_path):
    class Disk:
        def write(self, picture):
            return picture.nbytes // 2

    writer = begin(tmp_path)
    fill(writer, 6, 5)
    writer.file, file = Disk(), writer.file
    with pytest.raises(OSError, match="No space left"):
        fill(writer, 1, 0)
    file.write(b"half")
    file.close()
    (path,) = recover(tmp_path, False)
    assert load(path)["actions"].tolist() == [0, 1, 2, 3]


# other games in the folder --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"env_id": "tests.fake_games:Crash-v0"},
            "env_id is '" + GAME + "', in episode_0001.npz 'tests.fake_games:Crash-v0'",
        ),
        ({"rom_sha1": "beef"}, "rom_sha1 is '', in episode_0001.npz 'beef'"),
        ({"action_meanings": ["LEFT", "RIGHT", "DOWN", "UP"]}, "actions mean"),
        ({"shape": (8, 4, 3)}, r"frames are (8, 6, 3), in episode_0001.npz (8, 4, 3)"),
    ],
)
def test_another_game_in_the_folder_is_refused_at_the_start(tmp_path, change, message):
    facts = FACTS | {"action_meanings": fake_games.NAMES, "shape": (8, 6, 3)}
    for facts_of_one in (facts | change, facts):  # only the first is looked at
        writer = Writer.begin(tmp_path, 1, None, facts_of_one, 4)
        for _ in range(2):
            writer.observe(np.zeros(writer.facts["shape"], np.uint8))
            if writer.steps == 0:
                writer.step(1, 1, 0.0, True, "{}")
        writer.close(ENDING, compress=False)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(SystemExit) as stopped:
        collect(tmp_path)
    assert message in str(stopped.value.code) and "--expert-data-dir" in str(stopped.value.code)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    (tmp_path / "episode_0001.npz").rename(tmp_path / "episode_0001.failed.npz")
    collect(tmp_path, episodes=1)


@pytest.mark.parametrize("array", [False, True])
def test_a_first_episode_that_cannot_be_read_is_named(tmp_path, array):
    with open(tmp_path / "episode_0004.npz", "wb") as file:
        np.save(file, np.zeros(3)) if array else file.write(b"PK")
    with pytest.raises(SystemExit, match="episode_0004.npz is cut off or damaged"):
        collect(tmp_path)


# wrong use ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options,message",
    [
        ({"episodes": 0}, "--episodes 0: expected 1 or more"),
        ({"epsilon": 1.5}, "--epsilon 1.5: expected 0 to 1"),
        ({"chunk_steps": 0}, "--chunk-steps 0"),
        ({"max_steps": -1}, "--max-steps -1: expected 0 or more"),
        ({"num_workers": 0}, "--num-workers 0"),
        ({"steps_per_s": 0.0}, "--steps-per-s 0.0"),
        ({"expert": "keyboard", "num_workers": 2}, "one person plays one game"),
        ({"expert": "nobody"}, "there is no expert 'nobody', expected scripted"),
        ({"expert": "tests/missing.py:f"}, "tests/missing.py is missing"),
        ({"expert": f"{EXPERTS}:f"}, "has no f"),
        ({"expert": f"{EXPERTS}:not_an_expert"}, "expected an object with get_action"),
        ({"expert": "replay:missing.npz"}, "missing.npz is missing"),
        ({"expert": "checkpoint:missing"}, "missing is missing"),
        ({"env_id": "tests.fake_games:Grey-v0"}, "expected RGB pictures"),
        ({"env_id": "CartPole-v1"}, "expected RGB pictures"),
        ({"env_id": "Nowhere-v0"}, "Nowhere"),
        ({"rom_path": Path("missing.gba")}, "--rom-path is for PokemonEnv"),
        ({"env_id": None, "rom_path": Path("missing.gba")}, "missing.gba is missing"),
    ],
)
def test_wrong_arguments_are_told_and_nothing_is_written(tmp_path, options, message):
    with pytest.raises(SystemExit) as stopped:
        collect(tmp_path / "data", **options)
    assert message in str(stopped.value.code)
    assert not (tmp_path / "data").exists() or names(tmp_path / "data") == []


def test_what_was_recovered_is_told_before_a_wrong_flag(tmp_path, capsys):
    writer = begin(tmp_path)
    fill(writer, 6, 5)
    writer.file.close()
    with pytest.raises(SystemExit, match="there is no expert 'nobody'"):
        collect(tmp_path, expert="nobody")
    assert f"{tmp_path / 'episode_0001.npz'}: joined from what a killed run left" in capsys.readouterr().out


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(SystemExit, match="is a file, expected a folder"):
        collect(tmp_path / "data")


@pytest.mark.parametrize(
    "keys,message", [(("z",), "expected KEY=ACTION"), (("z=JUMP",), "--keys z=JUMP"), (("no key=UP",), "keyboard: ")]
)
def test_wrong_keys_are_told(tmp_path, monkeypatch, keys, message):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with pytest.raises(SystemExit) as stopped:
        collect(tmp_path, expert="keyboard", keys=keys)
    assert message in str(stopped.value.code)


# small parts ----------------------------------------------------------------------------------------------------------
def test_crc_of_two_pieces():
    rng = np.random.default_rng(0)
    for n, m in ((0, 0), (5, 0), (0, 7), (1, 1), (100, 12345), (3, 1 << 20)):
        first, second = rng.bytes(n), rng.bytes(m)
        assert crc_of_both(zlib.crc32(first), zlib.crc32(second), m) == zlib.crc32(first + second)
