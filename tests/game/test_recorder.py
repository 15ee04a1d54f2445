"""A person's recording: the recorder as a process of its own, on a window, against the game's own record of its keys.

The game plays a level on which Tux cannot die, as `--record-demo` loses all at a death. A demo file holds the controls
of every step of 15 ms. `pytest -s` prints what was measured.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import record_session
from common.desktop import Keyboard, Window
from common.sessions import TRUTH, WIN_KEY, key_table, load_session, mouse_table, read_table
from common.video import VideoReader
from supertux_env import levels
from supertux_env.launch import Game, Xvfb
from tests.unit.test_play_reflex import write_model

ROOT = Path(__file__).parents[2]
CONTROLS = ("KEY_LEFT", "KEY_RIGHT", "KEY_UP", "KEY_DOWN", "KEY_SPACE", "KEY_LEFTCTRL")  # in the order of a demo file
STEP_MS, DEMO_HEADER = 15, 23


def flat_level(path: Path, columns: int = 400) -> Path:
    """No enemy, no pit, no goal, a wall at both ends."""
    solid = np.arange(levels.ROWS)[:, None] >= np.full(columns, levels.ROWS - 3)  # (ROWS, columns)
    solid[:, :2] = solid[:, -2:] = True
    place = f"(x {8 * levels.TILE}) (y {(levels.ROWS - 5) * levels.TILE})"
    return levels._write(
        path,
        f"""(supertux-level (version 3) (name "flat") (author "this project") (license "MIT")
(sector (name "main") (init-script {levels._quote(levels.TRUTH_SCRIPT)}) (ambient-light (color 1 1 1))
(background (color 1 1 1) (alignment "bottom") (speed 0.35) (image "images/background/arctis2.png") (z-pos -200))
(camera (name "Camera") (mode "normal")) (spawnpoint (name "main") {place})
{levels._tilemap(levels._snow(solid), solid=True, z=0)}
))
""",
    )


@pytest.fixture
def recorder(tmp_path):
    """Starts record_session.py as a person would, on a display of ours; waits for its first frames."""
    processes = []

    def start(display: str, *flags: str, name: str = "run_1", frames: int = 3) -> subprocess.Popen:
        command = [sys.executable, "record_session.py", "--output", str(tmp_path), "--name", name, *flags]
        environment = os.environ | {"DISPLAY": display, "XDG_SESSION_TYPE": "x11"}
        log = open(tmp_path / f"{name}.log", "w+")
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        process.log = log
        processes.append(process)
        wait_for_frames(process, tmp_path / name, frames)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.log.close()


def wait_for_frames(process: subprocess.Popen, folder: Path, frames: int, timeout_s: float = 60):
    journal, end = folder / "frames.jsonl", time.monotonic() + timeout_s
    while frames and not (journal.exists() and journal.read_text().count("\n") >= frames):
        assert process.poll() is None and time.monotonic() < end, f"the recorder did not begin: {said(process)}"
        time.sleep(0.02)


def said(process: subprocess.Popen) -> str:
    process.log.seek(0)
    return process.log.read()


def key_rows(session, states=("down", "up")) -> list[tuple[str, str, int]]:
    rows = session.inputs.to_pylist()
    return [(r["key_name"], r["state"], r["timestamp"]) for r in rows if r["state"] in states]


# keys on the real game ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fps, seconds",
    [(10, 15), pytest.param(10, 60, marks=pytest.mark.slow), pytest.param(30, 60, marks=pytest.mark.slow)],
)
def test_every_key_of_the_games_own_demo_is_recorded(tmp_path, recorder, fps, seconds):
    """Random keys beside a busy process; the demo counts steps of play, so the two clocks are laid over each other by
    the median distance."""
    rng, demo = np.random.default_rng(fps + seconds), tmp_path / "played.demo"
    with Xvfb() as display, Game(flat_level(tmp_path / "flat.stl"), display, demo=demo) as game:
        keyboard = Keyboard(display)
        game.skip_intro(keyboard)
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            process = recorder(display, "--window", "SuperTux", "--fps", str(fps))
            end = time.monotonic() + seconds
            while time.monotonic() < end:  # 0.1 to 0.9 s: longer than a stall of the game, and the server's repeats too
                keyboard.hold({name for name in CONTROLS if rng.random() < 0.3})
                time.sleep(rng.uniform(0.1, 0.25) if rng.random() < 0.8 else rng.uniform(0.5, 0.9))
            keyboard.hold(set())
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, said(process)
        finally:
            busy.kill()
            busy.wait()
        keyboard.close()
    assert game.count("death") == 0

    controls = np.frombuffer(demo.read_bytes()[DEMO_HEADER:], np.uint8).reshape(-1, 6) > 0  # (steps, 6)
    session = load_session(tmp_path / "run_1")
    offset_ns = int(session.metadata["clock_offset_ns"])
    stepped = np.array([(position[0] + offset_ns) / 1e6 for position in game.positions])  # ms, one per step
    recorded, away, stalls = key_rows(session), [], []
    for column, name in zip(controls.T, CONTROLS, strict=True):
        changes = np.flatnonzero(np.diff(column.astype(int), prepend=0))  # steps
        mine = [(state, ms) for key, state, ms in recorded if key == name]
        assert [state for state, _ in mine] == ["down" if column[step] else "up" for step in changes], name
        away += [ms - step * STEP_MS for (_, ms), step in zip(mine, changes, strict=True)]
        stalls += [longest_step(stepped, ms) for _, ms in mine]
    away, stalls = np.abs(away - np.median(away)), np.array(stalls)  # (events,) ms
    in_step = stalls <= STEP_MS + 5
    assert len(away) > 3 * seconds and len(away) == len(recorded)
    interval = np.diff(session.timestamps)
    print(
        f"\n{fps} fps, {seconds} s: all {len(away)} events of the demo found, off by {np.median(away):.1f} ms in the "
        f"median, {away[in_step].max(initial=0):.1f} ms at most; {(~in_step).sum()} of them while the game stalled, "
        f"{away.max():.1f} ms at most; {session.n_frames} frames, {session.metadata['dropped']} dropped"
    )
    # a starved game reads its keys late and goes through the lost steps after that, so there the demo is off
    assert (away <= 20 + np.maximum(0, stalls - STEP_MS)).all()
    assert np.median(interval) == pytest.approx(1000 / fps, abs=3)
    assert session.n_frames + int(session.metadata["dropped"]) == pytest.approx(
        (session.timestamps[-1] - session.timestamps[0]) * fps / 1000 + 1, abs=1
    )
    assert not session.repeated.any() and session.metadata["repeated"] == "0"


def longest_step(stepped: np.ndarray, ms: float) -> float:
    """The longest time between two steps of the game around a moment, in ms."""
    first, last = np.searchsorted(stepped, (ms - 20, ms + 40))
    return np.diff(stepped[max(0, first - 1) : last + 1]).max()


@pytest.mark.slow
def test_a_killed_recorder_loses_at_most_a_second(tmp_path, recorder):
    moments = np.random.default_rng(5).uniform(1.5, 6, 5)  # seconds after the first pictures
    losses = []
    with Xvfb() as display, Game(flat_level(tmp_path / "flat.stl"), display) as game:
        keyboard = Keyboard(display)
        game.skip_intro(keyboard)
        for number, moment in enumerate(moments):
            keyboard.hold({"KEY_LEFT" if number % 2 else "KEY_RIGHT"})
            process = recorder(display, "--window", "SuperTux", name=f"run_{number}")
            time.sleep(moment)
            process.kill()
            killed_ms = time.time() * 1000
            process.wait()
            session = load_session(tmp_path / f"run_{number}")  # as it lies there
            n_video = VideoReader(session.video).n_frames
            losses.append(killed_ms - session.timestamps[min(n_video, session.n_frames) - 1])
        keyboard.close()
    print(f"\nlost by kill -9: {', '.join(f'{ms:.0f}' for ms in losses)} ms")
    assert max(losses) <= 1000
    command = [sys.executable, "verify_dataset.py", str(tmp_path), "--output", "None"]
    repaired = subprocess.run([*command, "--repair"], cwd=ROOT, capture_output=True, text=True)
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and " 0 errors" in again.stdout, again.stdout
    for number in range(len(moments)):
        session = load_session(tmp_path / f"run_{number}")
        assert session.n_frames <= VideoReader(session.video).n_frames and not list(session.folder.glob("*.jsonl"))


def test_a_corrected_policy_plays_and_the_demonstrators_keys_are_recorded(tmp_path):
    model = write_model(tmp_path / "model", keys=["KEY_RIGHT", "KEY_SPACE", "KEY_LEFT"], thresholds=[1.0] * 3)  # no key
    out = tmp_path / "dataset"
    flags = ["--demonstrator", "skilled", "--seed", "7", "--seconds", "8", "--policy", model, "--output", out]
    words = [sys.executable, "record_session.py", *flags, "--name", "run_1"]
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    session = load_session(out / "run_1")
    assert set(session.inputs["source"].to_pylist()) == {"script"}
    down = key_table(session, ["KEY_RIGHT"])[0][:, 0]
    truth = read_table(session.folder / "truth.parquet", TRUTH).to_pylist()
    x = [float(row["data"].split()[0]) for row in truth if row["what"] == "pos"]
    assert down[5:45].mean() > 0.8 and np.ptp(x[:45]) == 0, "it would walk, and the policy stands still"
    assert x[-1] > x[45] + 100, "in its own turn it walks"


@pytest.mark.slow
def test_a_killed_demonstration_leaves_no_game_behind(tmp_path, recorder):
    process = recorder("", "--demonstrator", "skilled", "--seconds", "60")
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    pids = [int(word) for word in children.stdout.split()]
    assert len(pids) == 2  # Xvfb and the game
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "the game or its X server is still there"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


# a window of our own --------------------------------------------------------------------------------------------------
class Pane:
    """A window of one colour, drawn by the server, so that it stays when it moves."""

    def __init__(self, display: str, title: str, left: int, top: int, width: int, height: int, colour: int):
        from Xlib.display import Display

        self.display = Display(display)
        screen = self.display.screen()
        self.window = screen.root.create_window(
            left, top, width, height, 0, screen.root_depth, background_pixel=colour, override_redirect=False
        )
        self.window.set_wm_name(title)
        self.window.map()
        self.display.sync()

    def move(self, left: int, top: int):
        self.window.configure(x=left, y=top)
        self.display.sync()

    def focus(self):
        from Xlib import X

        self.window.set_input_focus(X.RevertToPointerRoot, X.CurrentTime)
        self.display.sync()

    def close(self):
        self.display.close()


@pytest.fixture
def display():
    with Xvfb(800, 600) as display:
        yield display


def test_the_window_is_followed_and_its_end_ends_the_recording(tmp_path, display, recorder):
    behind = Pane(display, "the desktop", 0, 0, 800, 600, 0x0000FF)
    pane = Pane(display, "My GAME 1.0", 100, 50, 200, 150, 0xFF0000)
    process = recorder(display, "--window", "my game", frames=6)
    pane.move(450, 300)
    wait_for_frames(process, tmp_path / "run_1", 12)
    pane.close()
    assert process.wait(30) == 0 and "the window was closed" in said(process)
    session = load_session(tmp_path / "run_1")
    frames = VideoReader(session.video).read(0, session.n_frames).float()  # (N, 3, 150, 200)
    assert frames.shape[1:] == (3, 150, 200) and len(frames) >= 12
    assert session.metadata["window"] == "My GAME 1.0"
    red, _, blue = frames.mean((2, 3)).unbind(1)
    assert red.min() > 240 and blue.max() < 15, "something else than the window was recorded"
    behind.close()


def test_a_window_half_off_the_screen_repeats_the_last_picture(tmp_path, display, recorder):
    pane = Pane(display, "game", 0, 0, 200, 150, 0xFF0000)
    process = recorder(display, "--window", "game", frames=5)
    pane.move(700, 0)
    time.sleep(0.5)
    pane.move(100, 100)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    session = load_session(tmp_path / "run_1")
    repeated = np.flatnonzero(session.repeated)
    assert len(repeated) >= 2 and (np.diff(repeated) == 1).all() and repeated[0] >= 4 and not session.repeated[-1]
    assert session.metadata["repeated"] == str(len(repeated))
    pane.close()


def test_a_window_that_changes_its_size_ends_the_recording(tmp_path, display, recorder):
    pane = Pane(display, "game", 0, 0, 200, 150, 0xFF0000)
    process = recorder(display, "--window", "game")
    pane.window.configure(width=300)
    pane.display.sync()
    assert process.wait(30) == 0 and "the window became 300x150" in said(process)
    assert load_session(tmp_path / "run_1").metadata["resolution"] == "200x150"
    pane.close()


def test_hotkeys_start_and_stop_and_the_win_marker_is_recorded(tmp_path, display, recorder):
    keyboard = Keyboard(display)
    process = recorder(display, "--start-key", "KEY_F7", "--stop-key", "KEY_F8", frames=0)
    end = time.monotonic() + 60
    while "F7 starts" not in said(process):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    keyboard.tap("KEY_A")  # before the start
    keyboard.hold({"KEY_LEFT"})  # held at the start
    keyboard.tap("KEY_F7")
    wait_for_frames(process, tmp_path / "run_1", 5)
    keyboard.tap("KEY_SPACE")
    keyboard.tap(WIN_KEY)
    time.sleep(0.3)
    keyboard.tap("KEY_F8")
    assert process.wait(30) == 0 and "the stop key" in said(process)
    keyboard.close()
    session = load_session(tmp_path / "run_1")
    rows = key_rows(session)
    expected = [("KEY_LEFT", "down"), ("KEY_SPACE", "down"), ("KEY_SPACE", "up"), (WIN_KEY, "down"), (WIN_KEY, "up")]
    assert [row[:2] for row in rows] == [*expected, ("KEY_LEFT", "up")]
    assert rows[0][2] == session.timestamps[0] and rows[-1][2] >= session.timestamps[-1]
    assert session.metadata["keys"] == '["KEY_LEFT", "KEY_SPACE"]'
    assert set(session.inputs["source"].to_pylist()) == {"human"}


def test_keys_typed_elsewhere_are_left_out(tmp_path, display, recorder):
    game = Pane(display, "game", 0, 0, 200, 150, 0xFF0000)
    chat = Pane(display, "chat", 300, 0, 200, 150, 0x00FF00)
    keyboard = Keyboard(display)
    game.focus()
    process = recorder(display, "--window", "game")
    keyboard.hold({"KEY_RIGHT"})
    time.sleep(0.4)
    chat.focus()
    time.sleep(0.4)
    keyboard.tap("KEY_S")
    keyboard.hold(set())  # the release of a key that went down in the game counts
    time.sleep(0.4)
    game.focus()
    time.sleep(0.4)
    keyboard.tap("KEY_UP")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0 and "1 key presses went to other windows" in said(process)
    keys = [row[:2] for row in key_rows(load_session(tmp_path / "run_1"))]
    assert keys == [("KEY_RIGHT", "down"), ("KEY_RIGHT", "up"), ("KEY_UP", "down"), ("KEY_UP", "up")]
    for thing in (game, chat, keyboard):
        thing.close()


def test_the_pointer_is_in_pixels_of_the_picture(tmp_path, display, recorder):
    pane = Pane(display, "game", 100, 50, 200, 150, 0xFF0000)
    root = pane.display.screen().root
    process = recorder(display, "--window", "game")
    for x, y in ((150, 70), (299, 199), (99, 70), (400, 300), (100, 50)):  # the third and fourth are outside
        root.warp_pointer(x, y)
        pane.display.sync()
        time.sleep(0.35)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    session = load_session(tmp_path / "run_1")
    rows = [(r["x"], r["y"]) for r in session.inputs.to_pylist() if r["event_type"] == "mouse"]
    assert rows == [(50, 20), (199, 149), (0, 0)]
    xy, known = mouse_table(session)
    assert not known[0] and known[-1] and xy[-1].tolist() == [0, 0]
    pane.close()


def test_two_signals_at_once_still_end_it_cleanly(tmp_path, display, recorder):
    process = recorder(display, "--seconds", "60", frames=10)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (0, -signal.SIGINT)  # the third may come when all is written
    names = sorted(path.name for path in (tmp_path / "run_1").iterdir())
    assert names == ["frames.parquet", "inputs.parquet", "recording.mp4"]
    session = load_session(tmp_path / "run_1")
    assert session.n_frames == VideoReader(session.video).n_frames >= 10


def test_what_cannot_begin_leaves_no_folder(tmp_path, display, monkeypatch):
    panes = [Pane(display, "chess", 0, 0, 200, 150, 0xFF0000), Pane(display, "half", 700, 0, 200, 150, 0xFF0000)]
    (tmp_path / "file").write_text("")
    cases = [
        (display, {"window": "supertux"}, "no window has 'supertux' in its title. The titles are: 'chess', 'half'"),
        (display, {"window": "Half"}, "nothing can be grabbed at .700, 0, 200, 150.: .* Bring all of it on screen"),
        (":4321", {}, "the screen of DISPLAY=':4321' cannot be grabbed"),
        ("", {}, "the screen of DISPLAY='' cannot be grabbed"),
        (":4321", {"window": "chess"}, "no X server answers at ':4321'"),
        (display, {"output": tmp_path / "file"}, "file/run_1 cannot be made .Not a directory."),
        (display, {"input": "evdev"}, "evdev"),
    ]
    for where, fields, message in cases:
        monkeypatch.setenv("DISPLAY", where)
        with pytest.raises(SystemExit, match=message):
            record_session.main(record_session.Args(**{"output": tmp_path, "name": "run_1"} | fields))
        assert not (tmp_path / "run_1").exists()
    for pane in panes:
        pane.close()


def test_giving_up_before_the_start_leaves_no_folder(tmp_path, display, recorder):
    process = recorder(display, "--start-key", "KEY_F9", frames=0)
    end = time.monotonic() + 60
    while "F9 starts" not in said(process):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 1 and "Nothing was recorded" in said(process)
    assert not (tmp_path / "run_1").exists()


def test_a_full_disk_keeps_what_was_recorded(tmp_path, display, recorder):
    """A file size limit stands in for the full disk."""
    pane = Pane(display, "game", 0, 0, 200, 150, 0xFF0000)
    process = recorder(display, "--window", "game", frames=10)
    size = (tmp_path / "run_1" / "recording.mp4").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size + 1000, size + 1000))
    assert process.wait(60) == 1
    words = said(process)
    assert "File too large" in words and "--repair" in words, words
    assert load_session(tmp_path / "run_1").n_frames >= 10
    command = [sys.executable, "verify_dataset.py", str(tmp_path / "run_1"), "--repair", "--output", "None"]
    subprocess.run(command, cwd=ROOT, capture_output=True)  # a red pane is a still picture, which is an error
    session = load_session(tmp_path / "run_1")
    assert VideoReader(session.video).n_frames >= session.n_frames >= 3
    pane.close()


def test_the_end_of_the_x_server_ends_the_recording(tmp_path, recorder):
    with Xvfb(320, 240) as display:
        process = recorder(display, frames=5)
    assert process.wait(30) == 0 and "the X server ended" in said(process)
    session = load_session(tmp_path / "run_1")
    assert session.n_frames == VideoReader(session.video).n_frames >= 5


def test_a_window_inside_a_managers_frame(display):
    """As a window manager has it: a frame around the window, a list of windows, a terminal that quotes the title."""
    from Xlib import X, Xatom

    frame, game = Pane(display, "", 50, 40, 300, 200, 0x00FF00), Pane(display, "", 0, 0, 280, 160, 0xFF0000)
    quoting = Pane(display, "python record_session.py --window SuperTux", 400, 0, 100, 100, 0)
    xlib, utf8 = game.display, game.display.intern_atom("UTF8_STRING")
    game.window.change_property(xlib.intern_atom("_NET_WM_NAME"), utf8, 8, "SuperTux – Спутник".encode())
    game.window.reparent(frame.window, 10, 30)
    inner = game.window.create_window(0, 0, 10, 10, 0, X.CopyFromParent)
    inner.map()
    xlib.sync()
    listed = [quoting.window.id, game.window.id]
    xlib.screen().root.change_property(xlib.intern_atom("_NET_CLIENT_LIST"), Xatom.WINDOW, 32, listed)
    xlib.sync()

    window = Window(display, "supertux")
    assert window.title == "SuperTux – Спутник" and window.region() == (60, 70, 280, 160)
    frame.move(100, 100)
    assert window.region() == (110, 130, 280, 160) and window.shown()
    for focus, expected in ((inner, True), (game.window, True), (quoting.window, False), (frame.window, False)):
        focus.set_input_focus(X.RevertToPointerRoot, X.CurrentTime)
        (quoting if focus == quoting.window else frame if focus == frame.window else game).display.sync()
        assert window.focused() is expected
    frame.window.unmap()
    frame.display.sync()
    assert not window.shown() and window.region() is not None
    game.window.destroy()
    xlib.sync()
    assert window.region() is None and not window.shown()
    for pane in (frame, game, quoting):
        pane.close()
