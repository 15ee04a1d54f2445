"""bc_pokemon.main on a world of pixels: does it learn, save, stop, go on and evaluate as the page says."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bc_pokemon
from common.runs import load_checkpoint
from pokemon_env.wrappers import make_env

ROOT = Path(__file__).parents[2]
WORLD, GOOD = "tests.pixel_world:PixelWorld-v0", "tests/pixel_world.py:good"
SMALL = {
    "env_id": WORLD,
    "expert": GOOD,
    "obs_height": 16,
    "obs_width": 32,
    "hidden_dim": 32,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "total_training_steps": 60,
    "final_eval_episodes": 8,
    "baseline_episodes": 8,
    "eval_frequency": 0,
    "num_envs": 2,
    "val_frequency": 20,
    "log_every": 10,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight episodes of the expert, with a wrong button in between now and then."""
    folder = tmp_path_factory.mktemp("expert_data")
    env, rng = make_env(WORLD, expert=GOOD), np.random.default_rng(0)
    for number in range(1, 9):
        obs, packed = env.reset(seed=number)
        rows = {name: [] for name in ("observations", "actions", "taken_actions", "rewards", "dones", "infos")}
        done = False
        while not done:
            taken = int(rng.integers(3)) if rng.random() < 0.2 else packed["expert_action"]
            values = [obs, packed["expert_action"], taken]
            infos = packed["json"]
            obs, reward, terminated, truncated, packed = env.step(taken)
            done = terminated or truncated
            for name, value in zip(rows, [*values, reward, done, infos], strict=True):
                rows[name].append(value)
        arrays = {name: np.array(values) for name, values in rows.items()}
        arrays |= {"rewards": arrays["rewards"].astype(np.float32), "final_observation": obs, "truncated": truncated}
        np.savez(folder / f"episode_{number:04d}.npz", action_meanings=["A", "LEFT", "RIGHT"], **arrays)
    return folder


def train(data: Path, tmp_path: Path, **settings) -> dict:
    places = {"expert_data_dir": str(data), "run_root": str(tmp_path / "runs"), "model_dir": str(tmp_path / "models")}
    return bc_pokemon.main(bc_pokemon.Args(**SMALL | places | settings))


def scalars(run_dir: str, name: str) -> list[float]:
    events = EventAccumulator(run_dir)
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def test_cloning_learns_and_leaves_the_files_of_the_specification(data, tmp_path, capsys):
    settings = {"capture_video": True, "export_onnx": str(tmp_path / "policy.onnx"), "save_frequency": 30}
    result = train(data, tmp_path, total_training_steps=120, **settings)
    losses = scalars(result["run_dir"], "train/bc_loss")
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 2
    assert result["eval/success_rate"] == 1 and result["eval/accuracy"] > 0.9
    assert result["eval/accuracy"] > result["eval/accuracy_majority"]
    run_dir, names = Path(result["run_dir"]), {"best_model.pth", "best_val.pth", "final_model.pth"}
    names |= {f"checkpoint_{step}.pth" for step in (30, 60, 90, 120)}
    assert (
        {path.name for path in run_dir.glob("*.pth")} == names == {p.name for p in (tmp_path / "models").glob("*.pth")}
    )
    left = {path.name for path in run_dir.iterdir()}
    assert {"args.json", "bc_pokemon.py", "eval.json", "eval.mp4", "eval.png", "last.pt", "provenance.json"} <= left
    evaluation = json.loads((run_dir / "eval.json").read_text())
    rates = {name: summary["success"][0] for name, summary in evaluation["summaries"].items()}
    assert rates["expert"] == 1 and rates["majority"] == rates["repeat_previous"] == 0
    assert len(evaluation["episodes"]["policy"]) == 8 and evaluation["metrics"]["eval/success_rate"] == 1
    printed = capsys.readouterr().out
    assert "DOOR_OPEN" in printed and "minutes" in printed and "policy.onnx" in printed
    # the checkpoint plays as the run did, from the script copy beside it
    play = f"checkpoint:{run_dir}"
    env = make_env(WORLD, expert=play)
    (_, packed), done = env.reset(seed=1_000_000), False
    total = 0.0
    while not done:
        _, reward, terminated, truncated, packed = env.step(packed["expert_action"])
        total, done = total + reward, terminated or truncated
    assert total == pytest.approx(evaluation["episodes"]["policy"][0]["return"])


def test_dagger_labels_what_the_student_sees(data, tmp_path):
    settings = {"algorithm": "dagger", "label_budget": 45, "dagger_rounds": 3, "dagger_steps": 5, "eval_episodes": 2}
    settings["dagger_episodes"] = 4
    result = train(data, tmp_path, total_training_steps=160, **settings)
    run_dir = Path(result["run_dir"])
    rounds = [np.load(run_dir / f"dagger_round_{number}.npz") for number in (1, 2, 3)]
    assert [r["labelled"].sum() for r in rounds] == [5, 5, 5] and [len(r["lengths"]) for r in rounds] == [4, 4, 4]
    assert scalars(str(run_dir), "train/expert_labels") == [35, 40, 45]
    shares = scalars(str(run_dir), "train/expert_share")
    assert len(shares) == 3 and all(0 <= share <= 1 for share in shares)
    assert result["eval/success_rate"] > 0.5


def test_hybrid_learns_values_of_the_rewards(data, tmp_path):
    settings = {"algorithm": "hybrid", "target_frequency": 20, "prioritized": True, "frame_stack": 2}
    result = train(data, tmp_path, total_training_steps=200, **settings)
    td = scalars(result["run_dir"], "train/td_loss")
    assert np.isfinite(td).all() and np.mean(td[-5:]) < td[0]
    assert len(scalars(result["run_dir"], "train/q_mean")) == len(td) == len(scalars(result["run_dir"], "train/q_std"))
    assert result["eval/success_rate"] > 0.5


def test_curriculum_milestones_class_weights_and_the_best_episodes(data, tmp_path):
    settings = {"milestone_curriculum": True, "state_inputs": "milestone", "class_weights": "sqrt", "top_fraction": 0.5}
    result = train(data, tmp_path, total_training_steps=150, anneal_lr=True, **settings)
    split = json.loads((Path(result["run_dir"]) / "split.json").read_text())
    assert result["eval/success_rate"] > 0.5 and len(split["heldout"]) == 1


def test_state_inputs_that_the_infos_lack_are_refused(data, tmp_path):
    with pytest.raises(SystemExit, match="infos lack what --state-inputs vector reads"):
        train(data, tmp_path, state_inputs="vector")


def test_another_runs_models_are_replaced_only_when_asked(data, tmp_path):
    quick = {"total_training_steps": 2, "final_eval_episodes": 0}
    first = Path(train(data, tmp_path, **quick)["run_dir"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()}
    with pytest.raises(SystemExit, match="--model-dir .* files of another run.*--overwrite"):
        train(data, tmp_path, **quick)
    assert {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()} == before
    second = Path(train(data, tmp_path, overwrite=True, seed=2, **quick)["run_dir"])
    assert load_checkpoint(tmp_path / "models/final_model.pth")["run_dir"] == str(second.resolve())
    assert (first / "final_model.pth").read_bytes() == before["final_model.pth"]
    best = load_checkpoint(second / "best_model.pth")  # nothing was evaluated: the best by held-out loss
    torch.testing.assert_close(best["model_state_dict"], load_checkpoint(second / "best_val.pth")["model_state_dict"])


def test_an_expert_that_cannot_play_here_is_named_before_training(data, tmp_path):
    with pytest.raises(SystemExit, match="the expert fails: .*plays PokemonEnv only.*--expert"):
        train(data, tmp_path, expert="scripted")
    assert not (tmp_path / "runs").exists()


def test_an_expert_that_fails_later_costs_only_its_own_row(data, tmp_path):
    quick = {"total_training_steps": 2, "expert": "tests/pixel_world.py:raises"}
    run_dir = Path(train(data, tmp_path, **quick)["run_dir"])
    summaries = json.loads((run_dir / "eval.json").read_text())["summaries"]
    assert "expert" not in summaries and {"policy", "random", "replay"} <= set(summaries)


def test_budgets_that_dagger_cannot_keep_are_refused(data, tmp_path):
    for budget in (30, 10_000):
        with pytest.raises(SystemExit, match=f"--label-budget {budget}: expected more than the 36"):
            train(data, tmp_path, algorithm="dagger", dagger_rounds=3, dagger_steps=12, label_budget=budget)


def test_dagger_ends_with_the_expert_and_keeps_what_is_learnt(data, tmp_path):
    settings = {"algorithm": "dagger", "expert": "tests/pixel_world.py:raises", "total_training_steps": 20}
    with pytest.raises(SystemExit, match="no idea.*are kept.*--resume"):
        train(data, tmp_path, **settings)
    (run_dir,) = (tmp_path / "runs").iterdir()
    checkpoint = load_checkpoint(run_dir / "last.pt")
    assert (checkpoint["step"], checkpoint["rounds_done"]) == (5, 1)
    assert np.load(run_dir / "dagger_round_1.npz")["labelled"].any()


def test_a_full_disk_stops_with_a_message(data, tmp_path, monkeypatch):
    def full(path, checkpoint):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(bc_pokemon.runs, "save_checkpoint", full)
    with pytest.raises(SystemExit, match="best_val.pth cannot be written.*No space left.*--resume"):
        train(data, tmp_path, final_eval_episodes=0)


def test_evaluations_on_the_way_keep_their_tables(data, tmp_path):
    settings = {"eval_frequency": 30, "eval_episodes": 2, "final_eval_episodes": 0, "total_training_steps": 70}
    run_dir = Path(train(data, tmp_path, **settings)["run_dir"])
    for step in (30, 60):
        summaries = json.loads((run_dir / f"eval_{step}.json").read_text())
        assert set(summaries) == {"policy", "policy, sampled"}
        assert all(s["episodes"] == 2 and "START" in s["milestones"] for s in summaries.values())
    assert len(scalars(str(run_dir), "eval/success_rate_sampled")) == 2 and (run_dir / "best_model.pth").exists()


def test_flags_at_their_default_hold_beside_resume(data, tmp_path, monkeypatch):
    settings = {"final_eval_episodes": 0, "total_training_steps": 20}
    run_dir = train(data, tmp_path, **settings)["run_dir"]
    default = bc_pokemon.Args().final_eval_episodes
    monkeypatch.setattr(sys, "argv", ["bc_pokemon.py", "--final-eval-episodes", str(default)])
    args = bc_pokemon.runs.resume_args(bc_pokemon.Args(resume=run_dir), ("final_eval_episodes",))
    assert args.final_eval_episodes == default
    monkeypatch.setattr(sys, "argv", ["bc_pokemon.py", f"--batch-size={bc_pokemon.Args().batch_size}"])
    with pytest.raises(ValueError, match="--batch-size 64 differs from 32"):
        bc_pokemon.runs.resume_args(bc_pokemon.Args(resume=run_dir), ("final_eval_episodes",))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"log_every": 0}, "--log-every 0: expected 1 or more"),
        ({"learning_rate": -1.0}, "--learning-rate -1.0: expected above 0"),
        ({"stack_dropout": 0.1}, "--stack-dropout does nothing without --frame-stack above 1"),
        ({"capture_video": True, "final_eval_episodes": 0}, "--capture-video does nothing without"),
        ({"gamma": 0.9}, "--gamma is for --algorithm hybrid, which is bc"),
        ({"algorithm": "dagger", "prioritized": True}, "--prioritized is for --algorithm hybrid, which is dagger"),
        ({"algorithm": "hybrid", "dagger_steps": 3}, "--dagger-steps is for --algorithm dagger"),
        ({"algorithm": "dagger", "label_budget": 50}, "--label-budget 50 needs --dagger-steps"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(data, tmp_path, settings, message):
    with pytest.raises(SystemExit, match=message):
        train(data, tmp_path, **settings)


def test_frames_of_another_environment_are_refused(data, tmp_path):
    with pytest.raises(SystemExit, match=r"holds frames \(16, 32, 3\) and the actions A, LEFT, RIGHT, .*--env-id"):
        train(data, tmp_path, env_id="pokemon_env:Quest-v0", expert=None)


FLAGS = [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))]
DIES = """
import os, signal, sys
import bc_pokemon
save = bc_pokemon.runs.save_checkpoint
def save_and_die(path, checkpoint):
    save(path, checkpoint)
    if path.name == "last.pt" and checkpoint["step"] == 20:
        os.kill(os.getpid(), signal.SIGKILL)
bc_pokemon.runs.save_checkpoint = save_and_die
if __name__ == "__main__":
    bc_pokemon.main(bc_pokemon.tyro.cli(bc_pokemon.Args))
"""


@pytest.mark.parametrize("algorithm", ["bc", "hybrid", "dagger"])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(data, tmp_path, algorithm):
    settings = {"algorithm": algorithm, "final_eval_episodes": 0, "baseline_episodes": 0, "eval_episodes": 2}
    settings |= {"dagger_rounds": 2, "dagger_episodes": 3} if algorithm == "dagger" else {}
    settings |= {"frame_stack": 2, "prioritized": algorithm == "hybrid"}
    whole = Path(train(data, tmp_path / "whole", **settings)["run_dir"])
    flags = [w for k, v in settings.items() if k != "prioritized" for w in (f"--{k.replace('_', '-')}", str(v))]
    flags += ["--prioritized"] * (algorithm == "hybrid") + ["--expert-data-dir", str(data)]
    flags += ["--run-root", str(tmp_path / "runs"), "--model-dir", str(tmp_path / "models")]
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    process = subprocess.run(
        [sys.executable, str(script), *FLAGS, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr
    (killed,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(killed / "last.pt")["step"] == 20
    bc_pokemon.main(bc_pokemon.Args(resume=str(killed)))
    first, second = (load_checkpoint(run / "final_model.pth") for run in (whole, killed))
    assert second["step"] == 60
    for name, tensor in first["model_state_dict"].items():
        assert torch.equal(tensor, second["model_state_dict"][name]), name
    with pytest.raises(SystemExit, match="--learning-rate"):
        bc_pokemon.main(bc_pokemon.Args(resume=str(killed), learning_rate=1.0))


def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    flags = [
        "--expert-data-dir",
        str(data),
        "--run-root",
        str(tmp_path / "runs"),
        "--model-dir",
        str(tmp_path / "models"),
    ]
    process = subprocess.Popen(
        [sys.executable, "bc_pokemon.py", *FLAGS, *flags, "--total-training-steps", "100000", "--val-frequency", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 60
    while process.poll() is None and not list((tmp_path / "runs").glob("*/last.pt")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in output, output
    (stopped,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(stopped / "last.pt")["step"] > 0


def test_a_folder_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(SystemExit, match="--model-dir"):
        train(data, tmp_path, total_training_steps=2, final_eval_episodes=0)
