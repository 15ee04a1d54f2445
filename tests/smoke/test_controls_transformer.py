"""controls_transformer.py from end to end, on small sessions in which landmarks say what the player does."""

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

import controls_transformer as script
from common.runs import load_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = {
    "d_model": 32,
    "nhead": 2,
    "num_layers": 1,
    "dim_feedforward": 64,
    "dropout": 0.0,
    "epochs": 4,
    "warmup_epochs": 1,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "action_history_dropout": 0.9,
    "loss_norm": "masked-mean",
    "log_every": 5,
    "export_onnx": False,
    "device": "cpu",
}
RARE = {"epochs": 3, "val_stride": 4}  # for runs that only have to run


def write_session(path: Path, n: int, seed: int, **changes):
    """Every 8 to 15 frames another thing to do, and landmarks of its own that show it in the same frame."""
    rng = np.random.default_rng(seed)
    frames, controls, state = np.zeros((n, 260)), np.zeros((n, 28)), np.zeros((n, 46))
    frames[:, :225], frames[:, 225:] = rng.normal(0, 0.01, (n, 225)), 1
    state[:, [5, 10, 11, 12, 14, 24]] = 1
    t, kind = 0, 0
    while t < n:
        now, kind = slice(t, t + int(rng.integers(8, 16))), int(kind + rng.integers(1, 6)) % 6
        if kind == 1:
            controls[now, 0], frames[now, :30] = 1, 0.5
        elif kind == 2:
            controls[now, 9], frames[now, 30:60] = 0.6, 0.5
        elif kind == 3:
            controls[t : t + 4, 7], frames[t : t + 4, 60:90] = 1, 0.5
        elif kind == 4:
            slot = int(rng.integers(2))
            controls[t, 14 + slot], state[t + 1 :, 44] = 1, slot / 8
            frames[t, 90 + 30 * slot : 120 + 30 * slot] = 0.5
        elif kind == 5:
            state[now, 38], frames[now, 150:180] = 0.33, 0.5
            controls[now, 23], controls[now, 24] = 0.7, 0.3
            controls[t + 2 : t + 6, 25], frames[t + 2 : t + 6, 180:210] = 1, 0.5
        t = now.stop
    controls[state[:, 38] <= 0, 23:] = 0
    arrays = {"frames": frames, "controls": controls, "game_state": state}
    session = {name: array.astype(np.float32) for name, array in arrays.items()}
    session |= {"timestamps": 1.7e9 + np.arange(n) / 30, "fps": np.float32(30), "version": np.int32(2)}
    np.savez_compressed(path, **session | {"session_type": "mixed"} | changes)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(1, 5):
        write_session(folder / f"session_{number:03d}.npz", 240, number, person="ada" if number < 3 else "ben")
    return folder


def settings(recordings: Path, tmp_path: Path, **changes) -> dict:
    places = {"recordings_dir": str(recordings), "run_root": str(tmp_path / "runs")}
    return SMALL | places | {"model_dir": str(tmp_path / "models")} | changes


def train(recordings: Path, tmp_path: Path, **changes) -> dict:
    return script.main(script.Args(**settings(recordings, tmp_path, **changes)))


@pytest.fixture(scope="module")
def trained(recordings, tmp_path_factory) -> tuple[dict, Path, str]:
    """What main returns, the folder of models, and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    result, printed = None, folder / "printed.txt"
    with open(printed, "w") as file:
        out, sys.stdout = sys.stdout, file
        try:
            result = train(recordings, folder, epochs=16, export_onnx=True)
        finally:
            sys.stdout = out
    return result, folder / "models", printed.read_text()


def scalars(run_dir: str, name: str) -> list[float]:
    events = EventAccumulator(run_dir)
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def test_training_learns_and_beats_doing_nothing(trained):
    result, _, _ = trained
    losses = scalars(result["run_dir"], "train/loss")
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 5
    metrics = result["metrics"]
    assert metrics["tuned"]["score_present"] > metrics["do_nothing"]["score_present"] + 0.3
    assert metrics["tuned"]["change_f1"] > 0 == metrics["repeat_last"]["change_f1"]
    assert metrics["free_running"]["score"] > metrics["tuned"]["score"] - 0.1
    assert metrics["free_running"]["event_f1"] > 0.6 and metrics["do_nothing"]["event_f1"] == 0
    assert metrics["tuned"]["hotbar_accuracy"] > 0.6 and metrics["tuned"]["look_mse"] < 0.01


def test_the_files_of_the_specification(trained):
    result, models, printed = trained
    run_dir = Path(result["run_dir"])
    files = {"control_policy.pt", "control_config.json", "training_log.json", "control_policy.onnx"}
    assert files <= {path.name for path in models.iterdir()} & {path.name for path in run_dir.iterdir()}
    left = {"args.json", "provenance.json", "split.json", "eval.json", "last.pt", "best.pt", "controls_transformer.py"}
    assert left <= {path.name for path in run_dir.iterdir()}
    config = json.loads((models / "control_config.json").read_text())
    assert config["version"] == 2 and config["input_dim"] == 671 and config["control_names"] == list(script.CONTROLS)
    assert len(config["feature_mean"]) == len(config["feature_std"]) == 671 and config["look_smoothing_alpha"] == 0.35
    assert (
        config["thresholds"]["swap_offhand"] == 0.5 and config["training"]["threshold_positives"]["swap_offhand"] == 0
    )
    assert config["training"]["epochs_trained"] == 16
    log = json.loads((models / "training_log.json").read_text())
    assert [row["epoch"] for row in log] == list(range(1, 17)) and log[-1]["train"]["loss"] < log[0]["train"]["loss"]
    best = max(log, key=lambda row: row["score"])
    assert best["better"] and config["training"]["best_combined_score"] == best["score"]
    split = json.loads((run_dir / "split.json").read_text())
    assert len(split["train"]) == len(split["val"]) == 2  # one person each
    assert len({split["person"][name] for name in split["val"]}) == 1
    rows = [line for line in printed.splitlines() if line[:4].strip().isdigit()]
    assert len(rows) == 16 and rows[0].endswith(" *") and "Ep  TrLoss  Act    Look  Hbar   Curs   Inv" in printed


def test_the_checkpoint_reloads_to_the_same_evaluation(trained, recordings):
    result, models, _ = trained
    run_dir = Path(result["run_dir"])
    args = script.Args(**settings(recordings, run_dir))
    saved = load_checkpoint(models / "control_policy.pt")
    network = script.ControlTransformer(**saved["network"])
    network.load_state_dict(saved["model"])
    held = json.loads((run_dir / "split.json").read_text())["val"]
    sessions, _ = script.check_sessions([recordings / name for name in held], False)
    scale = script.Scale(saved["feature_mean"], saved["feature_std"], saved["feature_clip"])
    data = script.lay_out(sessions, scale, "cpu")
    rows = data.rows({i: (0, length) for i, length in enumerate(data.lengths)})
    ones = torch.ones(12), torch.ones(3)
    metrics, _ = script.evaluate(network, data, rows, ones, args, bf16=False)
    for name, value in result["metrics"]["teacher_forced"].items():
        if not name.startswith("loss"):
            assert metrics["teacher_forced"][name] == pytest.approx(value, abs=1e-6), name


def test_replay_is_the_free_run_of_the_evaluation(trained, recordings, tmp_path, capsys):
    result, models, _ = trained
    held = sorted(json.loads((Path(result["run_dir"]) / "split.json").read_text())["val"])
    session = script.load_session(recordings / held[0])
    seen = {}
    for engine in ("onnx", "torch"):
        places = {"replay": str(recordings / held[0]), "model": str(models), "run_root": str(tmp_path)}
        replayed = script.main(script.Args(**places, engine=engine))
        assert 0 < replayed["latency_ms"]["p50"] <= replayed["latency_ms"]["p99"]
        assert replayed["metrics"]["free_running"]["score_present"] > 0.7
        seen[engine] = dict(np.load(Path(replayed["run_dir"]) / "predictions.npz"))
        written = json.loads((Path(replayed["run_dir"]) / "metrics.json").read_text())
        assert written["metrics"] == replayed["metrics"]
    assert "latency of a step in ms" in capsys.readouterr().out
    for name, array in seen["onnx"].items():
        np.testing.assert_allclose(array, seen["torch"][name], atol=1e-3, err_msg=name)
    controls = seen["onnx"]["controls"]
    assert controls.shape == (240, 28) and np.isfinite(controls).all()
    forward = (controls[:, 0] > 0.5) == (session["controls"][:, 0] > 0.5)
    assert forward.mean() > 0.9
    attacks = controls[:, 7] > 0.5
    assert attacks.any() and not (attacks[1:] & attacks[:-1]).any()  # a pulse lasts one frame
    opened = np.flatnonzero(np.diff((session["game_state"][:, 38] > 0).astype(int)) != 0) + 1
    assert all((controls[t : t + 3] == 0).all() for t in opened)  # nothing for three frames


def test_a_policy_that_is_missing_is_named(tmp_path, recordings):
    with pytest.raises(SystemExit, match="control_config.json is missing.*--model"):
        script.main(script.Args(replay=str(recordings / "session_001.npz"), model=str(tmp_path)))


def test_another_runs_models_are_replaced_only_when_asked(recordings, tmp_path):
    first = train(recordings, tmp_path, **RARE)
    before = {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()}
    with pytest.raises(SystemExit, match="--model-dir .* files of another run.*--overwrite"):
        train(recordings, tmp_path, **RARE)
    assert {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()} == before
    second = train(recordings, tmp_path, **RARE, seed=2, overwrite=True)
    saved = load_checkpoint(tmp_path / "models/control_policy.pt")
    assert saved["run_dir"] == str(Path(second["run_dir"]).resolve())
    assert (Path(first["run_dir"]) / "control_policy.pt").read_bytes() == before["control_policy.pt"]


def test_a_bad_session_stops_the_script_or_is_left_out_and_listed(recordings, tmp_path, capsys):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for path in recordings.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_session(folder / "session_005.npz", 100, 5, controls=np.full((100, 28), np.nan, np.float32))
    (folder / "session_006.npz").write_bytes((folder / "session_001.npz").read_bytes()[:5000])
    message = "session_005.npz: controls row 0, column 0 is nan, expected 0 to 1.*--skip-bad-sessions"
    with pytest.raises(SystemExit, match=message):
        train(folder, tmp_path, **RARE)
    assert not (tmp_path / "runs").exists()
    result = train(folder, tmp_path, **RARE, skip_bad_sessions=True)
    printed = capsys.readouterr().out
    assert "left out" in printed and "session_005.npz" in printed and "session_006.npz" in printed
    split = json.loads((Path(result["run_dir"]) / "split.json").read_text())
    assert len(split["left_out"]) == 2 and len(split["train"]) + len(split["val"]) == 4


def test_no_recordings_say_how_to_get_some(tmp_path):
    with pytest.raises(SystemExit, match="no session_.*python benchmarks/make_control_sessions.py"):
        train(tmp_path, tmp_path)


def test_a_single_session_is_split_by_time(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    write_session(folder / "session_001.npz", 500, 1)
    result = train(folder, tmp_path, **RARE)
    split = json.loads((Path(result["run_dir"]) / "split.json").read_text())
    assert split["train"] == {"session_001.npz": [0, 400]} and split["val"] == {"session_001.npz": [435, 500]}


@pytest.mark.parametrize(
    "changes",
    [
        {"history_form": "per-frame", "selection": "score_free_running", "loss_norm": "seed"},
        {"learnable_decay": True, "selection": "score_no_history", "open_inventory_always": True, "stride": 3},
        {"selection": "score_present", "compile": False, "precision": "bf16"},
    ],
)
def test_options_run_to_their_end(recordings, tmp_path, changes):
    result = train(recordings, tmp_path, **RARE | changes)
    losses = scalars(result["run_dir"], "train/loss")
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    log = json.loads((Path(result["run_dir"]) / "training_log.json").read_text())
    player = changes["selection"].removeprefix("score_")
    by = log[0][f"val_{player}"]["score"] if player != "present" else log[0]["val"]["score_present"]
    assert log[0]["score"] == by


def test_without_history_the_free_run_is_the_teacher_forced_one(recordings, tmp_path):
    metrics = train(recordings, tmp_path, **RARE, action_history_dropout=1.0)["metrics"]
    for name, value in metrics["free_running"].items():
        assert (
            value
            == pytest.approx(metrics["tuned"][name], rel=1e-3, abs=1e-3)
            == pytest.approx(metrics["no_history"][name], rel=1e-3, abs=1e-3)
        )


def test_the_curriculum_freezes_what_is_not_yet_its_turn(recordings, tmp_path):
    result = train(recordings, tmp_path, curriculum=True, curriculum_epochs=(1, 1), epochs=3, early_stop_patience=1)
    log = json.loads((Path(result["run_dir"]) / "training_log.json").read_text())
    assert [row["stage"] for row in log] == [1, 2, 3]
    first, second, third = (row["train"] for row in log)
    assert first["weight_cursor"] == first["weight_hotbar"] == second["weight_inv"] == 0 < third["weight_inv"]
    assert first["weight_look"] > 0
    best = load_checkpoint(Path(result["run_dir"]) / "best.pt")
    assert best["epoch"] == 3  # an early stage leaves no policy


def test_early_stopping(recordings, tmp_path):
    result = train(recordings, tmp_path, learning_rate=0.0, epochs=20, early_stop_patience=2, val_stride=4)
    log = json.loads((Path(result["run_dir"]) / "training_log.json").read_text())
    assert len(log) == 3 and [row["better"] for row in log] == [True, False, False]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nhead": 3}, "--d-model 32 is no multiple of --nhead 3"),
        ({"time_warp": 0.9}, "--time-warp 0.9: expected 0 to 0.5"),
        ({"curriculum_share": 0.9}, "--curriculum-share are for --curriculum"),
        ({"batch_size": 10_000}, "too few for --batch-size 10000"),
    ],
)
def test_settings_that_cannot_be_are_refused(recordings, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        train(recordings, tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


DIES = """
import os, signal
import controls_transformer as script
save = script.runs.save_checkpoint
def save_and_die(path, checkpoint):
    save(path, checkpoint)
    if path.name == "last.pt" and checkpoint["update"] == 40:
        os.kill(os.getpid(), signal.SIGKILL)
script.runs.save_checkpoint = save_and_die
if __name__ == "__main__":
    script.main(script.tyro.cli(script.Args))
"""


def flags(changes: dict) -> list[str]:
    words = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(str(v) for v in (value if isinstance(value, tuple) else (value,)))]
    return words


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3, "save_every": 10},
        {"curriculum": True, "curriculum_epochs": (1, 1), "save_every": 40}
        | {"mirror": 0.5, "noise": 0.005, "time_warp": 0.2, "hand_dropout": 0.1},
    ],
    ids=["plain", "curriculum and augmentations"],
)
def test_resume_equals_an_uninterrupted_run_bit_for_bit(recordings, tmp_path, changes):
    """30 updates an epoch: it is killed in the second."""
    changes = RARE | changes
    whole = Path(train(recordings, tmp_path / "whole", **changes)["run_dir"])
    dies = tmp_path / "dies.py"
    dies.write_text(DIES)
    process = subprocess.run(
        [sys.executable, str(dies), *flags(settings(recordings, tmp_path, **changes))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr
    (killed,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(killed / "last.pt")["update"] == 40
    with pytest.raises(SystemExit, match="--learning-rate"):
        script.main(script.Args(resume=str(killed), learning_rate=1.0))
    script.main(script.Args(resume=str(killed)))
    for name in ("last.pt", "best.pt"):
        first, second = (load_checkpoint(run / name) for run in (whole, killed))
        assert first["update"] == second["update"]
        for key, tensor in first["model"].items():
            assert torch.equal(tensor, second["model"][key]), (name, key)
    logs = [json.loads((run / "training_log.json").read_text()) for run in (whole, killed)]
    assert logs[0] == logs[1]


def test_ctrl_c_saves_and_says_how_to_go_on(recordings, tmp_path):
    words = flags(settings(recordings, tmp_path, epochs=1000, save_every=1))
    process = subprocess.Popen(
        [sys.executable, "controls_transformer.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 120
    while process.poll() is None and not list((tmp_path / "runs").glob("*/last.pt")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in output, output
    (stopped,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(stopped / "last.pt")["update"] > 0
