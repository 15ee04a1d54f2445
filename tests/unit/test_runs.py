"""The run folder: arguments, atomic files, generators, the command line's extras."""

import random
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import tyro

from common import runs


@dataclass
class Args:
    exp_name: str = "test"
    seed: int = 1
    run_root: str = "runs"
    resume: str | None = None
    keys: tuple[str, ...] = ()
    lr: float = 0.1
    epochs: int = 10
    use_awr: bool = True


def test_two_runs_in_one_second_get_two_folders(tmp_path):
    args = Args(run_root=str(tmp_path))
    first, second = (runs.make_run_dir(args, __file__, "task") for _ in range(2))
    assert first != second and first.name.startswith("task__test__1__")
    assert (first / "test_runs.py").exists() and (first / "args.json").exists()


def test_resume_takes_the_runs_arguments(tmp_path):
    run_dir = runs.make_run_dir(Args(run_root=str(tmp_path), lr=0.5, keys=("KEY_A",)), __file__, "task")
    resumed = runs.resume_args(Args(resume=str(run_dir), epochs=20), may_change=("epochs",))
    assert (resumed.lr, resumed.epochs, resumed.keys, resumed.resume) == (0.5, 20, ("KEY_A",), str(run_dir))
    with pytest.raises(ValueError, match="--lr 0.2 differs from 0.5"):
        runs.resume_args(Args(resume=str(run_dir), lr=0.2), may_change=("epochs",))


def test_checkpoints_are_whole_and_without_wrapper_prefixes(tmp_path):
    network = torch.nn.Linear(2, 2)
    wrapped = {f"_orig_mod.{name}": value for name, value in network.state_dict().items()}
    runs.save_checkpoint(tmp_path / "last.pt", {"model": wrapped, "rng": runs.rng_state(), "update": 3})
    network.load_state_dict(runs.load_checkpoint(tmp_path / "last.pt")["model"])
    with pytest.raises(TypeError):  # what cannot be saved leaves the old file as it was
        runs.save_checkpoint(tmp_path / "last.pt", {"model": (i for i in range(3))})
    assert runs.load_checkpoint(tmp_path / "last.pt")["update"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    (tmp_path / "last.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        runs.load_checkpoint(tmp_path / "last.pt")


def test_generators_go_on_where_they_were(tmp_path):
    runs.seed_everything(3)
    runs.save_checkpoint(tmp_path / "rng.pt", {"rng": runs.rng_state()})
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: E731
    expected = draw()
    runs.seed_everything(4)
    runs.set_rng_state(runs.load_checkpoint(tmp_path / "rng.pt")["rng"])
    assert draw() == expected


def test_command_line_words(monkeypatch, capsys):
    def parse(*words, **environment):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return tyro.cli(Args, args=runs.cli_words(Args, "TEST_"))

    assert parse(TEST_NOTHING="1") == Args()  # of another script
    assert "TEST_NOTHING is left out" in capsys.readouterr().err
    assert parse("--use-awr", "false").use_awr is False
    assert parse("--use_awr", "True").use_awr is True
    assert parse("--no-use-awr").use_awr is False
    assert parse("--exp-name", "true").exp_name == "true"
    assert parse("--lr", "0.3", TEST_LR="0.2", TEST_EPOCHS="4", TEST_USE_AWR="false") == Args(
        lr=0.3, epochs=4, use_awr=False
    )


def test_devices():
    assert runs.pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="expected auto, cpu"):
        runs.pick_device("gpu")


def test_fingerprint_sees_a_changed_byte(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(bytes(100))
    before = runs.fingerprint([file])
    file.write_bytes(bytes(99) + b"1")
    assert runs.fingerprint([file]) != before


@dataclass
class Saves:
    model_dir: str
    resume: str | None = None
    overwrite: bool = False


def test_two_scripts_share_a_model_dir_and_two_runs_of_one_do_not(tmp_path):
    folder, scripts = tmp_path / "models", {name: tmp_path / name for name in ("first.py", "second.py")}
    for (name, path), pattern in zip(scripts.items(), ("first_*.pt", "second_*.pt"), strict=True):
        path.write_text("# a script")
        words = Saves(str(folder)), pattern, path
        runs.check_checkpoint_dir(*words, field="model_dir")
        runs.open_checkpoint_dir(*words, tmp_path / f"run of {name}", field="model_dir")
        (folder / pattern.replace("*", "policy")).write_text("")
    names = ["first.py", "first_args.json", "first_policy.pt", "second.py", "second_args.json", "second_policy.pt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for (name, path), pattern in zip(scripts.items(), ("first_*.pt", "second_*.pt"), strict=True):
        with pytest.raises(ValueError, match=f"holds 3 files of another run, such as {name}"):
            runs.check_checkpoint_dir(Saves(str(folder)), pattern, path, "model_dir")
        runs.check_checkpoint_dir(
            Saves(str(folder), resume=str(tmp_path / f"run of {name}")), pattern, path, "model_dir"
        )
    runs.open_checkpoint_dir(
        Saves(str(folder), overwrite=True), "first_*.pt", scripts["first.py"], tmp_path / "new", "model_dir"
    )
    assert sorted(path.name for path in folder.iterdir()) == names[:2] + names[3:]
