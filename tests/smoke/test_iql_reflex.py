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
import pytest
import torch

import iql_reflex
from common.runs import load_checkpoint
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
    again, _ = iql_reflex.evaluate(network, parts, np.array(checkpoint["thresholds"]), args, torch.device("cpu"))
    assert again["eval/key_ap"] == pytest.approx(result["eval/key_ap"], abs=1e-6)


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
    probabilities, _ = iql_reflex.predict(network, recording, 0, n, iql_reflex.Args(image_size=32), torch.device("cpu"))
    left, right = probabilities.mean(0)
    if normalizer == "batch-mean" and not shuffle:
        assert abs(right - left) < 0.1
    else:
        assert right - left > 0.25


def test_environment_sets_defaults_below_the_flags(dataset, tmp_path):
    code = "import tyro, iql_reflex as q; a = tyro.cli(q.Args, args=q.runs.cli_words(q.Args, 'REFLEX_TRAIN_')); "
    code += "print(a.epochs, a.lr, a.use_awr, a.compile_model)"
    environment = {"REFLEX_TRAIN_EPOCHS": "3", "REFLEX_TRAIN_LR": "0.5", "REFLEX_TRAIN_USE_AWR": "false"}

    def run(env, *flags):
        words = [sys.executable, "-c", code, *flags]
        return subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)

    assert run(environment, "--lr", "0.25", "--compile-model", "true").stdout.split() == ["3", "0.25", "False", "True"]
    assert run({"REFLEX_TRAIN_EPOCH": "3"}).returncode == 2  # no such field: refused, not ignored


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
    fails("torch finds no cuda|expected auto", device="cuda" if not torch.cuda.is_available() else "tpu")
    write_session(tmp_path / "bare/run_0", 40, labels=False)
    write_session(tmp_path / "bare/run_1", 40, labels=False)
    fails("precompute_labels.py", data_dir=str(tmp_path / "bare"))
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
    changed = source.replace("(128, 128)]", "(128, 96)]").replace("nn.Linear(128 * 16, 512)", "nn.Linear(96 * 16, 512)")
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
