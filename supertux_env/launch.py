"""Start SuperTux under its own X server and read the truth its level prints.

    with Xvfb() as display, Game(level, display) as game:
        game.skip_intro(keyboard)
        game.position()  # (x, y, vx, vy)

Tried with Debian's SuperTux 0.6.3 only. Facts behind the settings: the game's default renderer is too slow without a
GPU, the software one takes 13 % of a core; a level opened from the command line waits behind an intro screen; a death
restarts the level after 3.0 s; a win ends the process with exit code 0.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

DATA_DIR = Path("/usr/share/games/supertux2")
APT = "apt-get install -y --no-install-recommends supertux xvfb"
MIN_LOGIC_HZ = 50.0  # the game steps at 66.7 Hz; a starved one drops time and the recording is void
BOUNCES = (-300, -520)  # Tux's speed when he has stomped on an enemy, without and with the jump key held
CONFIG = '(supertux-config\n  (pause_on_focusloss #f)\n  (locale "en")\n  (show_fps #f)\n)\n'


class Truth(NamedTuple):
    """One thing the level reported: start, pos, coins, kill, squish, sequence, win, death."""

    monotonic_ns: int
    what: str
    data: str


def find_program(name: str) -> str:
    """Its path, looked up on PATH and in /usr/games. Raises FileNotFoundError with the command that installs it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/games:/usr/local/games:/usr/local/bin")
    if found is None:
        raise FileNotFoundError(f"{name} was found neither on PATH nor in /usr/games. Install it: {APT}")
    return found


class Xvfb:
    """A virtual screen for one game. The context value is the display, such as ":7"."""

    def __init__(self, width: int = 640, height: int = 480):
        self.screen = f"{width}x{height}x24"

    def __enter__(self) -> str:
        read_fd, write_fd = os.pipe()
        command = [find_program("Xvfb"), "-displayfd", str(write_fd), "-screen", "0", self.screen]
        command += ["-nolisten", "tcp", "-noreset"]
        self.log = tempfile.TemporaryFile()
        self.process = _start(command, pass_fds=[write_fd], stdout=self.log, stderr=self.log)
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            number = pipe.readline()  # the whole line: a pipe closed before its newline kills Xvfb
        if not number.strip():
            self.__exit__()
            raise RuntimeError(f"Xvfb did not start: {self.said()}. Try it by hand: Xvfb :9 -screen 0 {self.screen}")
        return f":{int(number)}"

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()[-300:]

    def __exit__(self, *_):
        _stop(self.process)


class Game:
    """A running SuperTux on one level. Truth lines are stamped by a thread as they come; `events` only grows. `demo` is
    a file that the game writes its controls to: complete after the end, and lost at the first death."""

    def __init__(self, level: Path | str, display: str, width: int = 640, height: int = 480, demo: Path | None = None):
        self.level, self.display, self.size = Path(level).absolute(), display, f"{width}x{height}"
        self.options = ["--record-demo", str(Path(demo).absolute())] if demo else []
        self.events: list[Truth] = []
        self.positions: list[tuple[int, float, float, float, float]] = []  # (ns, x, y, vx, vy), one per game step
        self.alive, self.log = False, []

    def __enter__(self) -> "Game":
        program = find_program("supertux2")
        if not self.level.is_file():
            raise FileNotFoundError(f"{self.level} is missing. Make it with supertux_env.levels.generate_level.")
        self.home = tempfile.TemporaryDirectory(prefix="supertux_")
        (Path(self.home.name) / "config").write_text(CONFIG)
        settings = {
            "HOME": self.home.name,  # the game moves files of an older version found in HOME
            "SUPERTUX2_USER_DIR": self.home.name,
            "DISPLAY": self.display,
            "LC_ALL": "C.UTF-8",
            "SDL_VIDEODRIVER": "x11",
            "SDL_AUDIODRIVER": "dummy",
            "ALSOFT_DRIVERS": "null",
            "SDL_RENDER_DRIVER": "software",
            "SDL_FRAMEBUFFER_ACCELERATION": "0",
        }
        command = [program, "--window", "--geometry", self.size, "--renderer", "sdl", "--disable-sound"]
        command += ["--disable-music", *self.options, str(self.level)]
        self.process = _start(
            command,
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.reader = threading.Thread(target=self._read, name="supertux-truth", daemon=True)
        self.reader.start()  # a full pipe would block the game
        return self

    def _read(self):
        for line in self.process.stderr:
            now = time.monotonic_ns()
            match = re.match(r"\[SCRIPTING\] T (\w+) ?(.*)", line)
            if match is None:
                self.log = (self.log + [line.strip()])[-20:]
                continue
            what, data = match[1], match[2].strip()
            if what == "pos":
                x, y, vx, vy = map(float, data.split())
                self.positions.append((now, x, y, vx, vy))
                if self.alive and vx == 0 and vy <= -650:  # the kick of dying is -700, no jump passes -600
                    self.alive = False
                    self.events.append(Truth(now, "death", f"{x:.0f} {y:.0f}"))
                continue
            if what == "start":
                self.alive = True
            if what == "kill" and round(float(data.split()[-1])) in BOUNCES:
                what = "squish"
            self.events.append(Truth(now, what, data))

    def count(self, what: str) -> int:
        return sum(event.what == what for event in list(self.events))

    def position(self) -> tuple[float, float, float, float]:
        """Newest (x, y, vx, vy): pixels, pixels per second, y downwards; x, y is the top left of Tux's hit box."""
        return self.positions[-1][1:]

    def running(self) -> bool:
        return self.process.poll() is None

    def skip_intro(self, keyboard, timeout_s: float = 30):
        """Leave the intro screen with Return. Play has begun when the position loop has printed twice."""
        self._wait(lambda: self.count("start"), timeout_s, "the level to load")
        time.sleep(0.4)
        for _ in range(5):  # a busy machine can miss the first one
            keyboard.tap("KEY_ENTER", 0.1)
            try:
                return self._wait(lambda: len(self.positions) >= 2, timeout_s / 5, "play to begin")
            except TimeoutError as error:
                late = error
        raise late

    def _wait(self, done, timeout_s: float, what: str):
        end = time.monotonic() + timeout_s
        while not done():
            if not self.running():
                raise RuntimeError(
                    f"SuperTux ended with {self.process.returncode}, waiting for {what}: {self.log[-3:]}"
                )
            if time.monotonic() > end:
                raise TimeoutError(f"waited {timeout_s:.0f} s for {what} in {self.level}; it said: {self.log[-3:]}")
            time.sleep(0.01)

    def logic_hz(self, window_s: float = 5.0) -> float:
        """The slowest game step rate over any `window_s` of play, in Hz. Below MIN_LOGIC_HZ a recording is void.

        What passes while a level loads or its intro shows does not count.
        """
        starts = np.array([e.monotonic_ns for e in self.events if e.what == "start"])
        times = np.array([p[0] for p in self.positions])
        lives = np.searchsorted(starts, times)  # (N,) which life a position belongs to
        first = np.append(True, np.diff(lives) > 0)  # printed at load, before the intro
        ends = np.cumsum(np.diff(times)[~first[1:] & ~first[:-1]] / 1e9)  # (S,) seconds of play up to each step
        if len(ends) == 0:
            return 0.0
        last = np.searchsorted(ends, np.arange(window_s, ends[-1], window_s))  # steps that end a window
        last = last if len(last) else np.array([len(ends) - 1])
        return float((np.diff(last, prepend=0) / np.diff(ends[last], prepend=0)).min())

    def __exit__(self, *_):
        _stop(self.process)
        self.reader.join(5)
        self.process.stderr.close()
        self.home.cleanup()


def _start(command: list[str], **options) -> subprocess.Popen:
    """Its own session: Ctrl-C reaches the recorder alone, which stops the X server last. The kernel kills it with the
    thread that started it (prctl 1 is PR_SET_PDEATHSIG), so that a killed recorder leaves nothing behind. SIGTERM would
    not do: a game that loses its X server while it quits can hang."""
    libc = ctypes.CDLL(None)  # before the fork
    die_with_parent = partial(libc.prctl, 1, signal.SIGKILL)
    return subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent, **options)


def _stop(process: subprocess.Popen):
    """SIGTERM, which both programs take as a clean quit; SIGKILL after 5 s."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
