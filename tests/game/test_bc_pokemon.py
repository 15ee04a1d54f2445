"""Collector and trainer on the emulator and on an Atari game, as their pages say, in small."""

import json
from pathlib import Path

import numpy as np
import pytest

import bc_pokemon
import collect_expert_data
from pokemon_env import QUEST_ROM

EMULATOR = True  # tests/conftest.py: what these tests need
SMALL = {
    "total_training_steps": 20,
    "batch_size": 16,
    "obs_height": 20,
    "obs_width": 30,
    "hidden_dim": 32,
    "learning_rate": 1e-3,
    "num_envs": 2,
    "eval_frequency": 0,
    "final_eval_episodes": 2,
    "baseline_episodes": 1,
    "device": "cpu",
}


def train(folder: Path, **settings) -> dict:
    places = {"run_root": str(folder / "runs"), "model_dir": str(folder / "models")}
    return bc_pokemon.main(bc_pokemon.Args(expert_data_dir=str(folder / "data"), **SMALL | places | settings))


@pytest.fixture(scope="module")
def quest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quest")
    collect_expert_data.main(collect_expert_data.Args(episodes=2, expert_data_dir=folder / "data", epsilon=0.2))
    return folder


def test_clones_the_scripted_expert_on_the_quest(quest, tmp_path):
    settings = {"model_dir": str(tmp_path / "models"), "eval_patience": 60, "capture_video": True}
    run_dir = Path(train(quest, **settings)["run_dir"])
    evaluation = json.loads((run_dir / "eval.json").read_text())
    assert evaluation["summaries"]["expert"]["success"][0] == 1
    assert {"policy", "policy, sampled", "random", "majority", "repeat_previous", "replay"} < set(
        evaluation["summaries"]
    )
    assert all("GAME_RUNNING" in game["milestones"] for game in evaluation["episodes"]["policy"])
    assert (run_dir / "eval.mp4").stat().st_size > 1000


def test_dagger_asks_the_scripted_expert(quest, tmp_path):
    settings = {
        "algorithm": "dagger",
        "dagger_rounds": 1,
        "dagger_episodes": 2,
        "dagger_patience": 5,
        "dagger_steps": 4,
    }
    settings |= {"dagger_share": "decay", "baseline_episodes": 0, "final_eval_episodes": 0}
    run_dir = Path(train(quest, model_dir=str(tmp_path / "models"), **settings)["run_dir"])
    assert np.load(run_dir / "dagger_round_1.npz")["labelled"].sum() == 4


def test_episodes_of_another_rom_are_refused(quest, tmp_path):
    other = tmp_path / "other.gba"
    other.write_bytes(QUEST_ROM.read_bytes() + b"\0")
    with pytest.raises(SystemExit, match="SHA-1.*--rom-path"):
        train(quest, model_dir=str(tmp_path / "models"), rom_path=str(other))


def test_any_gymnasium_game_works(tmp_path):
    pytest.importorskip("ale_py")
    pong = {"env_id": "ALE/Pong-v5", "expert": "benchmarks/train/pong_expert.py:make_expert", "max_steps": 40}
    data = tmp_path / "data"
    collect_expert_data.main(collect_expert_data.Args(episodes=2, expert_data_dir=data, **pong))
    run_dir = Path(train(tmp_path, **pong)["run_dir"])
    summaries = json.loads((run_dir / "eval.json").read_text())["summaries"]
    assert "success" not in summaries["policy"] and summaries["policy"]["length"][0] == 40
