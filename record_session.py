"""Record a session of a game: the pixels of its window and your keys and pointer, all on one clock.

You play, and a window is recorded, or the whole screen where none is named. Keys are recorded as the X server heard
them, with its own time. Or a scripted demonstrator plays SuperTux on a virtual screen of its own; there a level's
scripts add the truth (positions, deaths, squishes, wins). The page is docs/record_session.md, the files docs/data.md.

    python record_session.py --fps 10 --window "SuperTux" --output dataset/
    python record_session.py --demonstrator skilled --seconds 60 --seed 1

In: a running game, or for a demonstrator the installed one (apt-get install supertux xvfb). Out: dataset/run_<time>/
with recording.mp4, frames.parquet, inputs.parquet. A killed recording leaves .jsonl journals, which are read as well.
"""

import json
import math
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common.desktop import EvdevListener, Keyboard, KeyListener, Listener, PynputListener, Screen, Window
from common.runs import StopSignal
from common.sessions import MARKER_KEYS, WIN_KEY, SessionWriter
from common.video import VideoWriter
from supertux_env.demonstrators import KEYS, Demonstrator
from supertux_env.launch import MIN_LOGIC_HZ, Game, Xvfb
from supertux_env.levels import make_level, read_terrain

TURN_NS = 5_000_000_000  # how long a policy plays, then the demonstrator that corrects it
AFTER_WIN_S = 1.5  # the game ends itself 6 s after a win


@dataclass
class Args:
    # what is recorded, and for how long
    window: str = ""
    """part of the title of the window to record, in any case (X11); empty means the first monitor"""
    fps: float = 10.0
    """pictures per second, 1 to 60; the real time of each one is stored"""
    seconds: float = 0.0
    """longest recording; 0 means until the stop key, Ctrl-C, or the end of the window or game"""
    start_key: str = ""
    """evdev name of a function key that starts the recording, such as KEY_F9; empty means at once"""
    stop_key: str = "KEY_F10"
    """evdev name of a function key that ends the recording; empty means none"""
    input: Literal["auto", "x11", "pynput", "evdev"] = "auto"
    """where keys are heard: auto is x11 on Linux, pynput elsewhere; evdev reads the kernel's devices"""

    # where it goes
    output: Path = Path("dataset")
    """folder that receives the session's folder"""
    name: str = ""
    """name of the session's folder; empty means run_<time>"""
    crf: int = 27
    """x264 quality, 0 (lossless) to 51; 26 to 28 keeps the sprites recognisable"""
    preset: Literal["ultrafast", "superfast", "veryfast", "fast", "medium"] = "fast"
    """x264 effort; a faster one where a large window makes many pictures drop"""

    # a scripted player
    demonstrator: Literal["skilled", "sloppy"] | None = None
    """who plays SuperTux on a virtual screen; None means you play, on this one"""
    level: Literal["generated", "welcome_antarctica"] = "generated"
    """of a demonstrator: a level made from the seed, or one that comes with the game"""
    seed: int = 1
    """of a demonstrator: picks the generated level, the pause before the first key (0 to 1 s), and the random acts"""
    width: int = 640
    """of a demonstrator's window, in pixels; 640x480 is the smallest that is drawn at full scale"""
    height: int = 480
    """of a demonstrator's window, in pixels"""
    policy: Path | None = None
    """an exported reflex policy that a demonstrator corrects (DAgger): they play in turns of 5 s, and the keys recorded
    are always those that the demonstrator would press"""


class Play:
    """A demonstrator at work: looks at frames, sends keys, and writes down what the game tells."""

    def __init__(self, args: Args, game: Game, policy=None):
        self.game, self.keyboard, self.policy = game, Keyboard(game.display), policy
        self.terrain = read_terrain(game.level)
        self.player = Demonstrator(args.demonstrator, self.terrain, args.seed)
        self.pause_ns = round(np.random.default_rng(args.seed).uniform(0, 1e9))
        self.metadata = {"game": "supertux", "level": args.level, "seed": str(args.seed)}
        self.metadata |= {"demonstrator": args.demonstrator, "reaction_frames": str(self.player.skill.reaction_frames)}
        game.skip_intro(self.keyboard)
        self.told, self.start_ns, self.won_ns = len(game.events), None, None
        self.advised = set()  # keys that were last written down as the demonstrator's
        if policy:  # no pause and no random act: what is written is the demonstrator's best advice
            self.metadata["policy"] = args.policy.name
            self.pause_ns, self.player.skill = 0, replace(self.player.skill, random=0.0)

    def step(self, frame: np.ndarray, now_ns: int, writer: SessionWriter) -> bool:
        """Send what was decided some frames ago, then decide on this frame (H, W, 3). False when play is over."""
        position = self.game.position()
        self.start_ns = self.start_ns or now_ns
        won = self.game.count("win") > 0
        # written down in the frame's own millisecond, a key would be taken for one that was held before; the X server
        # tells its time in whole ones, so that up to one more is lost
        time.sleep(max(0.0, 0.003 - (time.monotonic_ns() - now_ns) / 1e9))
        keys = set() if won else self.player.due()
        if self.policy:
            self.advise(now_ns + 1_000_000, keys, writer)
            for _, theirs in self.policy.step(frame, position, (now_ns - self.start_ns) / 1e9):
                if (now_ns - self.start_ns) // TURN_NS % 2 == 0 and not won:
                    keys = theirs
        self.keyboard.hold(keys)
        acting = self.game.alive and not won and now_ns - self.start_ns > self.pause_ns
        self.player.decide(frame, position if acting else None)
        if won and self.won_ns is None:
            self.keyboard.tap(WIN_KEY)
            self.won_ns = now_ns
        writer.truth(now_ns, "pos", " ".join(f"{value:.1f}" for value in position))
        for event in self.game.events[self.told :]:
            writer.truth(*event)
            self.told += 1
        return self.won_ns is None or now_ns - self.won_ns <= AFTER_WIN_S * 1e9

    def advise(self, now_ns: int, keys: set[str], writer: SessionWriter):
        """Write down what the demonstrator would do from now on."""
        for name in sorted(keys ^ self.advised):
            writer.key(now_ns, name, "down" if name in keys else "up", "script")
        self.advised = keys

    def way(self, x: float) -> float:
        """Part of the way from spawn to goal."""
        return (x - self.terrain.spawn_x) / (self.terrain.goal_x - self.terrain.spawn_x)

    def state(self) -> str:
        deaths, squishes = self.game.count("death"), self.game.count("squish")
        advice = " ".join(sorted(name.removeprefix("KEY_") for name in self.advised))
        advice = f", advice {advice or '-'}" if self.policy else ""
        return advice + f", deaths {deaths}, squishes {squishes}, way {self.way(self.game.position()[0]):.0%}"

    def result(self) -> dict:
        return {
            "deaths": self.game.count("death"),
            "squishes": self.game.count("squish"),
            "wins": self.game.count("win"),
            "progress": round(min(1.0, self.way(max(p[1] for p in self.game.positions))), 3),
            "random_acts": round(self.player.random_acts / max(1, self.player.decisions), 3),
            "logic_hz": round(self.game.logic_hz(), 1),
        }


def load_policy(args: Args):
    """The policy as a player. ValueError or OSError name the file that does not fit."""
    from play_reflex import RATE_TOLERANCE, ClosedLoop, PolicyPlayer

    player = PolicyPlayer(ClosedLoop(model=args.policy, debounce=1))
    if abs(player.policy.fps - args.fps) > RATE_TOLERANCE * args.fps:
        rate = f"{player.policy.fps:g}"
        raise ValueError(f"{args.policy} plays at {rate} frames a second, not {args.fps:g}. Record with --fps {rate}")
    return player


class InputLog:
    """Writes what a listener heard. While another window has the focus only releases of keys already down are written:
    what is typed there is not the game's."""

    def __init__(self, args: Args, listener: Listener, writer: SessionWriter):
        self.listener, self.writer, self.hotkeys = listener, writer, (args.start_key, args.stop_key)
        self.corrected = args.policy is not None  # what a corrected policy presses is no label
        self.stop_key, self.source = args.stop_key, "script" if args.demonstrator else "human"
        self.down, self.names = set(), set()  # keys whose last row is no release; all keys written
        self.left_out, self.stopped, self.pointer = 0, False, listener.pointer()

    def begin(self, now_ns: int, focused: bool):
        """Keys that are held already go down with the first frame."""
        self.listener.drain()
        for name in sorted(self.listener.held if focused else ()):
            self._write(now_ns, name, "down")

    def update(self, focused: bool):
        for now_ns, name, state in self.listener.drain():
            self.stopped |= name == self.stop_key and state == "down"
            if focused or (state == "up" and name in self.down):
                self._write(now_ns, name, state)
            else:
                self.left_out += state == "down"

    def point(self, now_ns: int, region: tuple[int, int, int, int], width: int, height: int):
        """A row where the pointer has moved, in pixels of the picture; none outside it."""
        pointer = self.listener.pointer()
        if pointer is not None and pointer != self.pointer:
            left, top, region_width, region_height = region  # macOS counts the pointer in points, not in pixels
            x, y = (pointer[0] - left) * width // region_width, (pointer[1] - top) * height // region_height
            if 0 <= x < width and 0 <= y < height:
                self.writer.mouse(now_ns, x, y, self.source)
            self.pointer = pointer

    def end(self, now_ns: int, focused: bool):
        """Keys that are still held go up with the end of the recording."""
        self.listener.close()
        self.update(focused)
        for name in sorted(self.down):
            self._write(now_ns, name, "up")

    def _write(self, now_ns: int, name: str, state: str):
        if name not in self.hotkeys and (not self.corrected or name == WIN_KEY):
            self.writer.key(now_ns, name, state, self.source)
            self.names.add(name)
            (self.down.discard if state == "up" else self.down.add)(name)


def make_listener(args: Args, display: str | None) -> Listener:
    kind = args.input if args.input != "auto" else "x11" if sys.platform == "linux" else "pynput"
    return KeyListener(display) if kind == "x11" else EvdevListener() if kind == "evdev" else PynputListener()


def record(args: Args, folder: Path, play: Play | None, counts: dict) -> str:
    """Record until the time is up, a key or a signal ends it, or the window or game does. Fills `counts` while it runs
    and returns why it ended."""
    display = play.game.display if play else None
    window = Window(display, args.window) if args.window else None
    screen = Screen(display, window.region() if window else None)
    frame, _ = screen.grab()  # (H, W, 3)
    if frame is None:
        raise ValueError(f"nothing can be grabbed at {screen.region}: {screen.failure}. Bring all of it on screen.")
    H, W = (length // 2 * 2 for length in frame.shape[:2])  # yuv420p needs even ones
    listener = make_listener(args, display)
    does = {args.start_key: "starts", args.stop_key: "ends", "Ctrl-C": "ends", WIN_KEY: "marks a win"}
    keys = ", ".join(f"{key.removeprefix('KEY_')} {what}" for key, what in does.items() if key)
    print(f"{window.title if window else 'the screen'}, {W}x{H}, into {folder}: {keys}", flush=True)
    with StopSignal() as stop:
        while args.start_key:
            pressed = {name for _, name, state in listener.drain() if state == "down"}
            if args.start_key in pressed:
                break
            if stop or args.stop_key in pressed or (window and window.region() is None):
                return "before the start key"
            time.sleep(0.02)

        metadata = {"crf": str(args.crf), "preset": args.preset}
        metadata |= play.metadata if play else {"window": window.title if window else "", "platform": sys.platform}
        writer = SessionWriter(folder, args.fps, W, H, list(KEYS) if play else [], metadata)
        video = VideoWriter(folder / "recording.mp4", args.fps, W, H, args.crf, args.preset)
        log = InputLog(args, listener, writer)
        n_ticks, period_ns = round(args.seconds * args.fps) or math.inf, round(1e9 / args.fps)
        bar = tqdm(total=n_ticks if args.seconds else None, unit="frame", desc=folder.name, mininterval=0.5)
        tick, start_ns, first_ns, focused, why = 0, time.monotonic_ns(), None, True, "the time is up"
        try:
            while tick < n_ticks:
                time.sleep(max(0.0, (start_ns + tick * period_ns - time.monotonic_ns()) / 1e9))

                # grab: the newest picture; where there is none the last one is written again
                picture, now_ns = screen.grab()
                if window:
                    region = window.region()
                    if region is None or region[2:] != screen.region[2:]:
                        why = f"the window became {region[2]}x{region[3]}" if region else "the window was closed"
                        break
                    if region != screen.region:  # it moved
                        screen.region = region
                        picture, now_ns = screen.grab()
                    shown = window.shown()
                    picture, focused = picture if shown else None, shown and window.focused()
                frame = frame if picture is None else picture
                first_ns = first_ns or now_ns

                # listen
                if writer.n_frames == 0:
                    log.begin(now_ns, focused)
                log.update(focused)
                if focused and not play:
                    log.point(now_ns, screen.region, W, H)
                if log.stopped or stop or not listener.thread.is_alive() or (play and not play.game.running()):
                    why = "the stop key" if log.stopped else "a signal" if stop else "the game or the X server ended"
                    break

                # act, write
                playing = play is None or play.step(frame, now_ns, writer)
                video.add(frame, now_ns - first_ns)
                writer.frame(now_ns, repeated=picture is None)
                counts["frames"], counts["repeated"] = writer.n_frames, counts["repeated"] + (picture is None)
                if not playing:
                    why = "the level is won"
                    break

                # wait; what is late is left out
                next_tick = max(tick + 1, (time.monotonic_ns() - start_ns) // period_ns)
                counts["dropped"] += next_tick - tick - 1
                tick = next_tick
                bar.update(1)
                held = " ".join(sorted(name.removeprefix("KEY_") for name in log.down))
                state = f"dropped {counts['dropped']}, repeated {counts['repeated']}, keys {held or '-'}"
                bar.set_postfix_str(state + (play.state() if play else ""), refresh=False)
        except KeyboardInterrupt:  # a second signal
            why = "a signal"
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # a third one would cut off the files
                signal.signal(number, signal.SIG_IGN)
            bar.close()
            if play:
                play.keyboard.close()  # released keys are heard before the listener goes
                play.advise(time.monotonic_ns(), set(), writer)
            log.end(time.monotonic_ns(), focused)
            screen.close()
            video.close()
            names = list(KEYS) if play else sorted(log.names - set(MARKER_KEYS))
            writer.metadata |= {"keys": json.dumps(names), "dropped": counts["dropped"], "repeated": counts["repeated"]}
            writer.close()
    if log.left_out:
        print(f"{log.left_out} key presses went to other windows and were left out")
    return why


def check(args: Args):
    """Raises SystemExit for flags that cannot be met."""
    if not (1 <= args.fps <= 60 and args.seconds >= 0 and 0 <= args.crf <= 51):
        given = f"--fps {args.fps:g} --seconds {args.seconds:g} --crf {args.crf}"
        raise SystemExit(f"{given}: expected 1 to 60, 0 or more, and 0 to 51")
    for flag, key in (("--start-key", args.start_key), ("--stop-key", args.stop_key)):
        if key and (key not in MARKER_KEYS or key == WIN_KEY):
            raise SystemExit(f"{flag} {key}: expected a key that no game plays with, KEY_F1 to KEY_F12 or KEY_SYSRQ")
    if args.window and sys.platform != "linux":
        raise SystemExit(f"--window {args.window!r}: windows are found on X11 only. Leave it out to record the screen.")
    if args.demonstrator and (args.window or args.input != "auto"):
        raise SystemExit("--window and --input are for a person's recording. Leave them out, or --demonstrator.")
    for field in ("level", "seed", "width", "height", "policy"):
        if not args.demonstrator and getattr(args, field) != getattr(Args, field):
            raise SystemExit(f"--{field} belongs to a scripted player. Add --demonstrator skilled, or leave it out.")


def main(args: Args) -> dict:
    """Record one session into a new folder. One without a frame, or in which the game was starved, leaves no folder."""
    check(args)
    torch.set_num_threads(1)  # the game needs the other core
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before the recording begins it ends us as Ctrl-C does
    folder = args.output / (args.name or time.strftime("run_%Y-%m-%d_%H-%M-%S"))
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} is there already and is never overwritten. Choose another --name.") from None
    except OSError as error:
        raise SystemExit(f"{folder} cannot be made ({error.strerror}). Choose another --output.") from None
    result, void = {"frames": 0, "dropped": 0, "repeated": 0}, False
    try:
        with ExitStack() as machine:
            play = None
            if args.demonstrator:
                policy = load_policy(args) if args.policy else None
                scratch = machine.enter_context(tempfile.TemporaryDirectory())
                level = make_level(args.level, args.seed, Path(scratch) / "level.stl")
                display = machine.enter_context(Xvfb(args.width, args.height))
                play = Play(args, machine.enter_context(Game(level, display, args.width, args.height)), policy)
            why = record(args, folder, play, result)
            result |= play.result() if play else {}
        void = play is not None and result["logic_hz"] < MIN_LOGIC_HZ
        if void:
            raise RuntimeError(
                f"void: the game ran at {result['logic_hz']} steps a second, expected {MIN_LOGIC_HZ:g} or more of its "
                f"66.7, and {folder} was removed. Record again with less running beside it."
            )
        if result["frames"] == 0:
            raise ValueError(f"ended ({why}) before the first picture")
    except BaseException as error:
        kept = result["frames"] > 0 and not void
        if not kept:
            shutil.rmtree(folder)
        if not isinstance(error, (RuntimeError, ValueError, OSError, ImportError, KeyboardInterrupt)):
            raise
        mend = f"{result['frames']} frames are in {folder}. Mend it with: python verify_dataset.py --repair {folder}"
        words = str(error).rstrip(".") or "stopped"
        raise SystemExit(f"{words}. {mend if kept else 'Nothing was recorded.'}") from None
    print(f"{folder}: {why}; " + ", ".join(f"{name} {value}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
