"""The scripts of benchmarks/speed run and write what they say; how fast is not asked here."""

import importlib
import json
import shutil

import pytest

from benchmarks.speed import paired

RIVALS = {"decode": ("cv2", "ffmpeg"), "template_matching": ("cv2",)}


@pytest.mark.parametrize(
    "name, settings, written",
    [
        ("decode", {"sessions": 1, "rounds": 1}, ["decode"]),
        (
            "template_matching",
            {"rounds": 1, "detections": 3, "labelled": 1},
            ["template_matching_deaths", "template_matching", "labelling"],
        ),
        (
            "labelling_gpu",
            {"device": "cpu", "rounds": 1, "frames": 16, "sessions": 1},
            ["cpu_decode", "cpu_labelling", "cpu_search"],
        ),
        ("train_step", {"rounds": 1, "steps": 1}, ["train_step_resnet18", "train_step_cnn"]),
        ("episodes", {"rounds": 1, "batches": 1}, ["episodes"]),
        (
            "agent",
            {"rounds": 1, "updates": 1, "frames": 4, "dreams": 1},
            ["agent_dreams", "agent_play", "agent_training"],
        ),
        pytest.param(
            "controls",
            {"rounds": 1, "batches": 1, "updates": 1, "steps": 2, "megabytes": 1},
            ["controls_batches", "controls_policy", "controls_training"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_speed_scripts_run(tmp_path, monkeypatch, name, settings, written):
    for rival in RIVALS.get(name, ()):
        if rival == "ffmpeg" and not shutil.which("ffmpeg"):
            pytest.skip("ffmpeg missing: apt-get install ffmpeg")
        elif rival != "ffmpeg":
            pytest.importorskip(rival)
    monkeypatch.setattr(paired, "RESULTS", tmp_path)
    script = importlib.import_module(f"benchmarks.speed.{name}")
    script.main(script.Args(**settings))
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(written)
    for stem in written:
        result = json.loads((tmp_path / f"{stem}.json").read_text())
        assert len(result["ways"]) >= 2 and result["machine"]["cores"] >= 1
        assert all(seconds > 0 for way in result["ways"].values() for seconds in way["cpu_seconds"])
