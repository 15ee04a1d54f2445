"""The recorder on the real game: what it wrote is what happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import record_session
from common.desktop import Keyboard, KeyListener
from common.sessions import TRUTH, WIN_KEY, key_table, load_session, read_table
from common.video import VideoReader
from supertux_env.demonstrators import Demonstrator
from supertux_env.launch import Xvfb
from supertux_env.levels import STOCK, generate_level, instrument_level, read_terrain

SECONDS, FPS = 16, 10


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A session of the skilled demonstrator, and the decisions it meant to send."""
    folder, meant = tmp_path_factory.mktemp("dataset"), []

    class Watched(Demonstrator):
        def due(self):
            meant.append(super().due())
            return meant[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_session, "Demonstrator", Watched)
        args = record_session.Args(
            demonstrator="skilled", seed=3, seconds=SECONDS, fps=FPS, output=folder, name="run_1"
        )
        result = record_session.main(args)
    return folder / "run_1", result, meant


def test_frames_have_real_times(recording):
    folder, result, _ = recording
    session = load_session(folder)
    assert result["frames"] == session.n_frames == VideoReader(session.video).n_frames
    assert 0.8 * SECONDS * FPS <= session.n_frames <= SECONDS * FPS
    assert np.median(np.diff(session.timestamps)) == pytest.approx(1000 / FPS, abs=5)
    assert session.metadata["demonstrator"] == "skilled" and session.metadata["resolution"] == "640x480"


def test_recorded_keys_are_those_sent(recording):
    folder, _, meant = recording
    session = load_session(folder)
    keys = sorted(set.union(*meant))
    assert {"KEY_RIGHT", "KEY_SPACE"} <= set(keys) and set(keys) <= set(key_table_names(session))
    state, _ = key_table(session, keys)
    sent = np.array([[key in keys_now for key in keys] for keys_now in meant])  # (N, K) held from frame i on
    agree = (state[1:] == sent[:-1]).mean()
    assert agree > 0.99, f"only {agree:.3f} of the key states agree with what was sent"
    assert set(session.inputs["source"].to_pylist()) == {"script"}


def key_table_names(session) -> list[str]:
    return session.inputs["key_name"].unique().to_pylist()


def test_truth_follows_the_game(recording):
    folder, result, _ = recording
    session = load_session(folder)
    truth = read_table(folder / "truth.parquet", TRUTH)
    positions = [row for row in truth.to_pylist() if row["what"] == "pos"]
    assert [row["timestamp"] for row in positions] == session.timestamps.tolist()
    x = np.array([float(row["data"].split()[0]) for row in positions])
    assert x.max() > x[0] + 800, "Tux did not get on"
    assert sum(row["what"] == "death" for row in truth.to_pylist()) == result["deaths"]
    assert result["logic_hz"] > 50 and result["progress"] > 0.1


def test_pictures_show_the_game(recording):
    folder, _, _ = recording
    frames = VideoReader(folder / "recording.mp4").read(40, 44).float()  # (4, 3, H, W)
    assert frames.shape == (4, 3, 480, 640)
    assert frames.std() > 20 and (frames[0] - frames[3]).abs().mean() > 1, "a still or empty picture"


def test_folder_is_never_overwritten(recording):
    folder, _, _ = recording
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SystemExit, match="never overwritten"):
        record_session.main(record_session.Args(output=folder.parent, name=folder.name))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_sigterm_keeps_what_was_recorded(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "record_session.py", "--demonstrator", "skilled", "--seconds", "60"]
    command += ["--output", str(tmp_path), "--name", "run_1"]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    frames = tmp_path / "run_1" / "frames.jsonl"
    end = time.monotonic() + 60
    while not (frames.exists() and len(frames.read_text().splitlines()) > 20):
        assert process.poll() is None and time.monotonic() < end, "the recorder did not begin"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    session = load_session(tmp_path / "run_1")
    assert session.n_frames > 20
    assert sorted(p.name for p in (tmp_path / "run_1").iterdir()) == [
        *("frames.parquet", "inputs.parquet", "recording.mp4", "truth.parquet")
    ]


def test_failure_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(record_session, "MIN_LOGIC_HZ", 1000.0)
    with pytest.raises(SystemExit, match="void"):
        record_session.main(record_session.Args(demonstrator="skilled", seconds=2, output=tmp_path, name="run_1"))
    assert list(tmp_path.iterdir()) == []


def test_keys_carry_the_servers_time():
    with Xvfb() as display:
        keyboard, listener = Keyboard(display), KeyListener(display)
        for name in ("KEY_LEFTCTRL", "KEY_SPACE", WIN_KEY):
            keyboard.tap(name, 0.02)
        keyboard.hold({"KEY_RIGHT"})
        time.sleep(1.0)  # a held key repeats
        keyboard.close()
        listener.close()
        heard = listener.drain()
    sent = keyboard.sent
    assert [event[1:] for event in heard if event[2] != "repeat"] == [event[1:] for event in sent]
    assert {event[1] for event in heard if event[2] == "repeat"} == {"KEY_RIGHT"}
    late = [h[0] - s[0] for h, s in zip([h for h in heard if h[2] != "repeat"], sent, strict=True)]
    assert max(abs(ns) for ns in late) < 50e6


def test_levels_are_as_described(tmp_path):
    level = generate_level(3, tmp_path / "level.stl")
    terrain = read_terrain(level)
    assert terrain.solid.shape == (15, 260) and terrain.spawn_x == 96 and 5000 < terrain.goal_x < 260 * 32
    assert generate_level(3, tmp_path / "again.stl").read_text() == level.read_text()
    assert generate_level(4, tmp_path / "other.stl").read_text() != level.read_text()
    pits = ~terrain.solid.any(0)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], pits, [0]]))))[::2]  # widths
    assert len(runs) >= 2 and set(runs) <= {2, 3, 4}

    copy = instrument_level(STOCK["welcome_antarctica"], tmp_path / "copy.stl")
    text = copy.read_text()
    assert text.count("T kill") >= 10 and "T win" in text and "T pos" in text
    assert read_terrain(copy).goal_x == 8960


def test_missing_game_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="apt-get install .*supertux"):
        record_session.main(record_session.Args(demonstrator="skilled", seconds=1, output=tmp_path, name="run_1"))
    assert list(tmp_path.iterdir()) == [] and os.path.isdir(tmp_path)
