"""The collector on the emulator: the scripted expert plays the quest to its end, kills and replays included."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import collect as speed
from benchmarks.speed import paired
from collect_expert_data import Args, main
from pokemon_env import QUEST_ROM
from pokemon_env.episodes import read_episodes
from pokemon_env.experts import BUTTONS, Driver
from pokemon_env.milestones import QUEST_MILESTONES

EMULATOR = True  # tests/conftest.py: what these tests need
ROOT = Path(__file__).parents[2]
QUEST = "pokemon_env:Quest-v0"


def collect(folder: Path, **options) -> dict:
    return main(Args(expert_data_dir=folder, **{"env_id": QUEST, "episodes": 1} | options))


def load(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_the_expert_finishes_the_quest_and_every_file_is_whole(tmp_path):
    summary = collect(tmp_path, episodes=4, num_workers=2, seed=300)
    assert summary["success"] == [True] * 4 and all(150 <= length <= 600 for length in summary["lengths"])
    episodes, names = read_episodes(tmp_path)
    assert names == list(BUTTONS) and len(episodes) == 4
    starts = set()
    for number, episode in enumerate(episodes, 1):
        T = episode["shape"][0]
        assert episode["shape"] == (T, 160, 240, 3) and episode["seed"] == 300 + number
        assert (
            episode["success"] and not episode["truncated"] and episode["dones"].tolist() == [False] * (T - 1) + [True]
        )
        infos = episode["infos"]
        assert [info["step_count"] for info in infos] == list(range(T))
        assert [info["prev_action"] for info in infos] == [None, *episode["actions"][:-1].tolist()]
        final = episode["final_info"]
        assert final["step_count"] == T and final["milestones"]["next"] is None
        assert final["milestones"]["completed"][-1] == "FIRST_GYM_COMPLETE"
        assert set(final["milestones"]["completed"]) == {milestone.id for milestone in QUEST_MILESTONES}
        assert episode["episode_return"] == pytest.approx(final["episode_reward"], abs=1e-3)
        starts.add((infos[0]["player"]["x"], infos[0]["player"]["y"]))
    assert len(starts) > 1 and len(summary["milestones"]) == len(QUEST_MILESTONES)


def test_one_worker_and_two_write_the_same_and_a_replay_makes_it_again(tmp_path):
    options = {"episodes": 2, "epsilon": 0.2, "max_steps": 60}
    collect(tmp_path / "one", **options)
    collect(tmp_path / "two", **options, num_workers=2)
    first = tmp_path / "one" / "episode_0002.npz"
    collect(tmp_path / "again", expert=f"replay:{first}", max_steps=60)
    a, b, c = load(first), load(tmp_path / "two" / first.name), load(tmp_path / "again" / "episode_0001.npz")
    assert a["truncated"] and (a["taken_actions"] != a["actions"]).any()
    for key in ("observations", "taken_actions", "rewards", "infos", "final_observation", "seed", "rom_sha1"):
        assert np.array_equal(a[key], b[key]) and np.array_equal(a[key], c[key]), key
    assert np.array_equal(a["actions"], b["actions"])


def test_the_expert_gets_out_of_whatever_chance_got_into(tmp_path):
    """100 random steps, of which START, D-pad and A open all menus; then the expert alone, with some noise."""
    import gymnasium as gym

    env = gym.make(QUEST, max_steps=None)
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        obs, info = env.reset(seed=seed)
        expert = Driver("scripted", list(BUTTONS), 10)
        expert.reset(info)
        for t in range(800):
            action, error = expert.action(obs, info)
            assert error == ""
            if t < 100 or rng.random() < 0.15:
                action = int(rng.integers(10))
            obs, _, terminated, _, info = env.step(action)
            if terminated:
                break
        assert terminated, f"seed {seed} ends at {info['player']}, {info['milestones']['next']} is next"
    env.close()


def test_the_code_agent_example_plays(tmp_path):
    collect(tmp_path, expert=str(ROOT / "pokemon_env/examples/code_agent.py:make_expert"), max_steps=40)
    ((episode,), _) = read_episodes(tmp_path)
    walked = {(info["player"]["x"], info["player"]["y"]) for info in episode["infos"]}
    assert len(episode["actions"]) == 40 and len(walked) >= 4


def test_a_kill_loses_no_whole_chunk(tmp_path):
    command = [sys.executable, "collect_expert_data.py", "--env-id", QUEST, "--expert-data-dir", str(tmp_path)]
    command += ["--num-workers", "2", "--chunk-steps", "20", "--episodes", "9"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while len(list(tmp_path.glob("*.part/chunk_0001.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    chunks = {part.stem: 20 * len(list(part.glob("chunk_*.json"))) for part in tmp_path.glob("*.part")}
    assert len(chunks) == 2
    n = 0
    while list(tmp_path.glob("*.part")) and time.monotonic() < until:  # until the workers have noticed
        collect(tmp_path, max_steps=5)
        n += 1
    for name, steps in chunks.items():
        episode = load(tmp_path / f"{name}.npz")
        assert steps - 1 <= episode["episode_length"] <= steps + 200 and episode["interrupted"]
    assert len(read_episodes(tmp_path)[0]) == 2 + n


def test_the_quest_is_played_where_there_is_no_other_rom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(Args(episodes=1, max_steps=3, expert_data_dir=tmp_path / "data"))
    assert QUEST in capsys.readouterr().out and QUEST_ROM.is_file()
    with pytest.raises(SystemExit, match="no.gba is missing"):
        main(Args(episodes=1, rom_path=Path("no.gba"), expert_data_dir=tmp_path / "data"))


def test_the_benchmark_plays_the_same_episodes_bare(tmp_path, monkeypatch):
    monkeypatch.setattr(paired, "RESULTS", tmp_path)
    speed.main(speed.Args(episodes=1, worker_rounds=0))
    result = json.loads((tmp_path / "collect.json").read_text())
    assert 0 < result["ms_a_step_of_the_bare_emulator"] and set(result["ways"]) >= {"bare emulator", "collector"}
