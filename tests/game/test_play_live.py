"""Live play as a process of its own: on windows of ours whose colour decides what the policy wants, and on the game.

The model of the tests wants all its keys on a bright picture and none on a dark one. Key states are the X server's.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import export_reflex
import play_reflex
from common.desktop import Keyboard, KeyListener
from common.sessions import load_session
from common.video import VideoReader
from supertux_env.launch import Game, Xvfb
from supertux_env.levels import generate_level
from tests.game.test_recorder import Pane, said
from tests.unit.test_play_reflex import KEYS, write_model

ROOT = Path(__file__).parents[2]
BRIGHT, DARK = 0xB0B0B0, 0x101010


@pytest.fixture
def display():
    with Xvfb(400, 300) as display:
        yield display


@pytest.fixture
def keyboard(display):
    keyboard = Keyboard(display)
    yield keyboard
    keyboard.close()


@pytest.fixture
def player(tmp_path):
    """Starts `play_reflex.py live` as a person would; waits until it plays."""
    processes = []

    def start(display: str, *flags: str, model: Path | None = None, begun: bool = True) -> subprocess.Popen:
        model = model or write_model(tmp_path / "model", allowed_keys=KEYS[:2])
        command = [sys.executable, "play_reflex.py", "live", "--model", str(model), "--output", str(tmp_path)]
        command += ["--name", "play", "--window", "game", "--max-still", "0", *flags]
        log = open(tmp_path / "play.log", "w+")
        environment = os.environ | {"DISPLAY": display, "XDG_SESSION_TYPE": "x11"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        process.log = log
        processes.append(process)
        if begun:
            journal = tmp_path / "play/frames.jsonl"
            until(lambda: journal.exists() and journal.read_text().count("\n") > 3, process, 60)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.log.close()


def until(done, process: subprocess.Popen, seconds: float = 10):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end and process.poll() is None, said(process)
        time.sleep(0.005)


def paint(pane: Pane, colour: int):
    pane.window.change_attributes(background_pixel=colour)
    pane.window.clear_area(0, 0, 0, 0)
    pane.display.sync()


def rows_of(session) -> list[tuple[str, str, str]]:
    return [(row["key_name"], row["state"], row["source"]) for row in session.inputs.to_pylist()]


def test_keys_follow_the_picture_and_the_play_is_a_session(tmp_path, display, keyboard, player):
    pane = Pane(display, "My game", 20, 10, 200, 150, DARK)
    listener = KeyListener(display)
    process = player(display, "--send-keys")
    assert keyboard.down() == set()
    for _ in range(3):
        paint(pane, BRIGHT)
        until(lambda: keyboard.down() == set(KEYS[:2]), process)
        paint(pane, DARK)
        until(lambda: not keyboard.down(), process)
    paint(pane, BRIGHT)
    until(lambda: keyboard.down() == set(KEYS[:2]), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0 and "play ended: a signal" in said(process), said(process)
    assert keyboard.down() == set()
    heard = {name for _, name, _ in listener.drain()}
    listener.close()
    assert heard == set(KEYS[:2])  # the third one is not in the allow-list

    # what was saved
    folder = tmp_path / "play"
    session = load_session(folder)
    assert session.n_frames == VideoReader(session.video).n_frames > 10
    rows = rows_of(session)
    for key in KEYS[:2]:
        assert [row for row in rows if row[0] == key] == [(key, "down", "policy"), (key, "up", "policy")] * 4
    assert session.metadata["dry_run"] == "false" and json.loads(session.metadata["keys"]) == sorted(KEYS)
    latency = json.loads((folder / "latency.json").read_text())
    assert latency["decisions"] == session.n_frames and latency["ended"] == "a signal" and not latency["dry_run"]
    assert (folder / "latency.png").stat().st_size > 1000

    # the recording through eval: the same decisions
    output = tmp_path / "eval"
    model = tmp_path / "model/means.onnx"
    play_reflex.main(play_reflex.Eval(model=model, session=folder, output=output, video=False))
    live, again = (pq.read_table(where / "preds.parquet") for where in (folder, output))
    assert live["timestamp"].to_pylist() == again["timestamp"].to_pylist() == session.timestamps.tolist()
    assert live["active"].to_pylist() == again["active"].to_pylist()
    pane.close()


def test_a_dry_run_sends_nothing_and_hears_the_person(tmp_path, display, keyboard, player):
    pane = Pane(display, "game", 0, 0, 200, 150, BRIGHT)
    process = player(display)
    assert "dry run, no key is pressed: add --send-keys" in said(process)
    keyboard.tap("KEY_UP")
    time.sleep(0.5)
    keyboard.tap("KEY_F12")
    assert process.wait(30) == 0 and "dry run ended: the panic key" in said(process)
    session = load_session(tmp_path / "play")
    assert rows_of(session) == [("KEY_UP", "down", "human"), ("KEY_UP", "up", "human")]
    table = pq.read_table(tmp_path / "play/preds.parquet")
    assert table["active"].to_pylist()[-1] == KEYS[:2] and not any(table["sent"].to_pylist())
    assert json.loads((tmp_path / "play/latency.json").read_text())["dry_run"]
    pane.close()


def test_a_persons_key_pauses_the_policy_and_is_flagged(tmp_path, display, keyboard, player):
    pane = Pane(display, "game", 0, 0, 200, 150, BRIGHT)
    process = player(display, "--send-keys", "--resume-after", "0.8")
    until(lambda: keyboard.down() == set(KEYS[:2]), process)
    keyboard.hold({"KEY_UP"})
    until(lambda: keyboard.down() == {"KEY_UP"}, process, 1)
    time.sleep(1.2)  # longer than the pause: it is still held
    assert keyboard.down() == {"KEY_UP"}
    keyboard.hold(set())
    released = time.monotonic()
    until(lambda: keyboard.down() == set(KEYS[:2]), process)
    assert time.monotonic() - released > 0.7
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, said(process)
    assert keyboard.down() == set()
    rows = [row for row in rows_of(load_session(tmp_path / "play")) if row[1] != "repeat"]
    ours = [(key, state, "policy") for state in ("down", "up") for key in KEYS[:2]]
    assert rows == [*ours, ("KEY_UP", "down", "human"), ("KEY_UP", "up", "human"), *ours] or rows == [
        *ours[:2], ("KEY_UP", "down", "human"), *ours[2:], ("KEY_UP", "up", "human"), *ours
    ]  # fmt: skip
    pane.close()


def test_a_persons_release_of_a_key_that_the_policy_holds_pauses_it(tmp_path, display, keyboard, player):
    pane = Pane(display, "game", 0, 0, 200, 150, BRIGHT)
    process = player(display, "--send-keys", "--resume-after", "60")
    until(lambda: keyboard.down() == set(KEYS[:2]), process)
    time.sleep(1)  # the server repeats what the policy holds, which is no person's key
    assert keyboard.down() == set(KEYS[:2])
    keyboard.tap(KEYS[0])
    until(lambda: not keyboard.down(), process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0 and keyboard.down() == set(), said(process)
    assert (KEYS[0], "up", "human") in rows_of(load_session(tmp_path / "play"))
    pane.close()


def test_a_full_disk_ends_the_play_and_releases_the_keys(tmp_path, display, keyboard, player):
    """A file size limit stands in for the full disk."""
    pane = Pane(display, "game", 0, 0, 200, 150, BRIGHT)
    process = player(display, "--send-keys")
    until(lambda: keyboard.down() == set(KEYS[:2]), process)
    size = (tmp_path / "play/frames.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size + 500, size + 500))
    assert process.wait(30) == 1 and keyboard.down() == set()
    assert "File too large" in said(process) and "frames are in" in said(process), said(process)
    assert load_session(tmp_path / "play").n_frames > 3
    pane.close()


def test_a_key_is_held_no_longer_than_allowed(tmp_path, display, keyboard, player):
    pane = Pane(display, "game", 0, 0, 200, 150, BRIGHT)
    process = player(display, "--send-keys", "--max-hold", "0.5", "--max-seconds", "3")
    assert process.wait(30) == 0, said(process)
    session = load_session(tmp_path / "play")
    times = session.inputs["timestamp"].to_numpy()
    mine = np.array([row[0] == KEYS[0] for row in rows_of(session)])
    spans = times[mine].reshape(-1, 2)  # down, up
    assert len(spans) >= 4 and np.diff(spans, axis=1).max() <= 700
    assert not list((tmp_path / "play").glob("*.jsonl"))
    pane.close()


def test_it_waits_until_the_window_has_the_focus(tmp_path, display, keyboard, player):
    game = Pane(display, "game", 0, 0, 100, 80, BRIGHT)
    terminal = Pane(display, "terminal", 200, 0, 100, 80, BRIGHT)
    terminal.focus()
    process = player(display, "--send-keys", begun=False)
    until(lambda: "click into game to begin" in said(process), process, 60)
    time.sleep(0.3)
    assert keyboard.down() == set() and not (tmp_path / "play").exists()
    game.focus()
    until(lambda: keyboard.down() == set(KEYS[:2]), process)
    terminal.focus()
    assert process.wait(30) == 0 and "the window lost the focus" in said(process)
    assert keyboard.down() == set()
    for pane in (game, terminal):
        pane.close()


def test_a_player_that_hangs_holds_no_key(tmp_path, display, keyboard, player):
    pane = Pane(display, "game", 0, 0, 200, 150, BRIGHT)
    process = player(display, "--send-keys")
    until(lambda: keyboard.down() == set(KEYS[:2]), process)
    process.send_signal(signal.SIGSTOP)
    until(lambda: not keyboard.down(), process, 5)
    process.kill()
    process.wait()
    time.sleep(0.3)
    assert keyboard.down() == set()
    assert load_session(tmp_path / "play").n_frames > 3  # the journals of a killed recording
    pane.close()


def test_after_every_kind_of_exit_no_key_is_down(tmp_path):
    output = tmp_path / "exits.json"
    command = [sys.executable, "benchmarks/play/exits.py", "--times", "1", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert len(result["kinds"]) == 13
    for kind, row in result["kinds"].items():
        assert row["released"] == row["ended"] == row["trials"] == 1, (kind, result["failures"])
        status = {"kill -9": [-9], "exception": [1], "kill -9 of its watchdog": [1]}.get(kind, [0])
        assert row["status"] == status, kind


def test_what_cannot_begin_leaves_no_folder(tmp_path, display, player):
    pane = Pane(display, "chess", 0, 0, 100, 80, BRIGHT)
    process = player(display, "--send-keys", begun=False)
    assert process.wait(60) == 1
    assert "no window has 'game' in its title. The titles are: 'chess'. Nothing was played" in said(process)
    assert not (tmp_path / "play").exists()
    pane.close()


def test_fifteen_seconds_of_the_game(tmp_path, player):
    """A small network with random weights that presses keys now and then, as its thresholds are set to the middle."""
    script = (ROOT / "iql_reflex.py").read_text()
    script = script.replace('= "resnet18"', '= "cnn"', 1).replace("image_size: int = 224", "image_size: int = 64")
    (tmp_path / "small.py").write_text(script)
    model = tmp_path / "small.onnx"
    export_reflex.main(export_reflex.Args(random=True, script=tmp_path / "small.py", output=model))
    set_thresholds(model)
    with Xvfb() as display, Game(generate_level(3, tmp_path / "level.stl"), display) as game:
        keyboard = Keyboard(display)
        game.skip_intro(keyboard)
        first = len(game.positions)
        flags = ("--send-keys", "--max-seconds", "15", "--debounce", "1", "--window", "supertux")
        process = player(display, *flags, model=model)
        listener = KeyListener(display)
        assert process.wait(60) == 0, said(process)
        heard = listener.drain()
        listener.close()
        assert keyboard.down() == set()
        moved = np.ptp([position[1] for position in game.positions[first:]])
        logic_hz = game.logic_hz()
        keyboard.close()
    session, result = load_session(tmp_path / "play"), json.loads((tmp_path / "play/latency.json").read_text())
    rows = [row for row in rows_of(session) if row[1] != "repeat"]
    presses, releases = ([name for name, state, _ in rows if state == which] for which in ("down", "up"))
    in_time = f"{result['within_frame']:.1%} of {result['decisions']} decisions in time"
    print(f"\n{len(presses)} presses, Tux moved {moved:.0f} pixels, {logic_hz:.1f} Hz, {in_time}")
    assert {source for _, _, source in rows} == {"policy"}
    assert len(presses) >= 3 and sorted(presses) == sorted(releases)
    assert {name for _, name, state in heard if state == "down"} <= set(presses) and heard
    assert moved > 32, "the keys did not arrive in the game"
    assert session.n_frames + result["left_out"] == pytest.approx(150, abs=2)
    command = [sys.executable, "verify_dataset.py", str(tmp_path / "play"), "--output", "None"]
    verified = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert verified.returncode == 0 and " 0 errors" in verified.stdout, verified.stdout


def set_thresholds(model: Path):
    """Thresholds at which each key is pressed on about half of the pictures of the sample."""
    policy = play_reflex.Policy(model)
    pictures = play_reflex.read_pictures(VideoReader(ROOT / "sample_dataset/run_1/recording.mp4"), np.arange(0, 200, 4))
    thresholds = np.median([policy(picture)[0] for picture in pictures], axis=0)
    path = model.with_name(f"{model.stem}_manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thresholds": thresholds.tolist()}))
