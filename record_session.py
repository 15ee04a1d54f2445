"""Record a session of a game: its window's pixels and the keys, both on one clock.

A scripted demonstrator plays SuperTux on a virtual screen of its own, so that nothing on your desktop is touched. Keys
are recorded as the X server heard them, not as they were meant; a level's scripts add the truth (positions, deaths,
squishes, wins) for checking labels. The page is docs/record_session.md, the files are described in docs/data.md.

    python record_session.py --demonstrator skilled --seconds 60 --seed 1

In: the installed game (apt-get install supertux xvfb). Out: dataset/run_<time>/ with recording.mp4, frames.parquet,
inputs.parquet, truth.parquet. A killed recording leaves .jsonl journals, which are read as they are.
"""

import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common.desktop import Keyboard, KeyListener, Screen
from common.runs import StopSignal
from common.sessions import WIN_KEY, SessionWriter
from common.video import VideoWriter
from supertux_env.demonstrators import KEYS, Demonstrator
from supertux_env.launch import MIN_LOGIC_HZ, Game, Xvfb
from supertux_env.levels import make_level, read_terrain

AFTER_WIN_S = 1.5  # the game ends itself 6 s after a win


@dataclass
class Args:
    game: Literal["supertux"] = "supertux"
    """what to record"""
    demonstrator: Literal["skilled", "sloppy"] = "skilled"
    """who plays"""
    level: Literal["generated", "welcome_antarctica"] = "generated"
    """a level made from the seed, or one that comes with the game"""
    seed: int = 1
    """picks the generated level, the pause before the first key (0 to 1 s), and the demonstrator's random acts"""
    seconds: float = 60.0
    """longest recording, above 0; a win ends it earlier"""
    output: Path = Path("dataset")
    """folder that receives the session's folder"""
    name: str = ""
    """name of the session's folder; empty means run_<time>"""
    fps: float = 10.0
    """pictures per second, 1 to 60; the real time of each one is stored"""
    crf: int = 27
    """x264 quality, 0 (lossless) to 51; 26 to 28 keeps the sprites recognisable"""
    width: int = 640
    """of the game's window in pixels; 640x480 is the smallest that is drawn at full scale"""
    height: int = 480
    """of the game's window in pixels"""


def record(args: Args, folder: Path, level: Path) -> dict:
    """Play and record until the time is up, the level is won, the game ends, or a signal comes. Returns the counts."""
    terrain = read_terrain(level)
    player = Demonstrator(args.demonstrator, terrain, args.seed)
    metadata = {"game": args.game, "level": args.level, "seed": str(args.seed), "demonstrator": args.demonstrator}
    metadata |= {"crf": str(args.crf), "reaction_frames": str(player.skill.reaction_frames)}
    period_ns = round(1e9 / args.fps)
    n_ticks = round(args.seconds * args.fps)
    pause_ns = round(np.random.default_rng(args.seed).uniform(0, 1e9))
    with Xvfb(args.width, args.height) as display, Game(level, display, args.width, args.height) as game:
        screen, keyboard = Screen(display, args.width, args.height), Keyboard(display)
        game.skip_intro(keyboard)
        listener = KeyListener(display)
        writer = SessionWriter(folder, args.fps, args.width, args.height, list(KEYS), metadata)
        video = VideoWriter(folder / "recording.mp4", args.fps, args.width, args.height, args.crf)
        bar = tqdm(total=n_ticks, unit="frame", desc=args.name or args.demonstrator, mininterval=0.5)
        tick, told, start_ns, won_ns = 0, len(game.events), time.monotonic_ns(), None
        try:
            with StopSignal() as stop:
                while tick < n_ticks and game.running() and not stop:
                    time.sleep(max(0.0, (start_ns + tick * period_ns - time.monotonic_ns()) / 1e9))

                    # grab: the newest picture, and where Tux is in it
                    frame, now_ns = screen.grab()  # (H, W, 3)
                    position = game.position()
                    writer.frame(now_ns)

                    # act: first what was decided some frames ago, then decide
                    won = game.count("win") > 0
                    keyboard.hold(set() if won else player.due())
                    acting = game.alive and not won and now_ns - start_ns > pause_ns
                    player.decide(frame, position if acting else None)
                    if won and won_ns is None:
                        keyboard.tap(WIN_KEY)
                        won_ns = now_ns

                    # write
                    video.add(frame, now_ns - start_ns)
                    writer.truth(now_ns, "pos", " ".join(f"{value:.1f}" for value in position))
                    for event in game.events[told:]:
                        writer.truth(*event)
                        told += 1
                    for event in listener.drain():
                        writer.key(*event, source="script")

                    # wait; what is late is left out
                    next_tick = max(tick + 1, (time.monotonic_ns() - start_ns) // period_ns)
                    bar.update(next_tick - tick)
                    tick = next_tick
                    progress = (position[0] - terrain.spawn_x) / (terrain.goal_x - terrain.spawn_x)
                    bar.set_postfix(
                        {"deaths": game.count("death"), "squishes": game.count("squish"), "way": f"{progress:.0%}"}
                    )
                    if won_ns is not None and now_ns - won_ns > AFTER_WIN_S * 1e9:
                        break
        finally:
            bar.close()
            keyboard.close()  # released keys are heard before the listener goes
            listener.close()
            for event in listener.drain():
                writer.key(*event, source="script")
            screen.close()
            video.close()
            writer.close()
        furthest = max(p[1] for p in game.positions)
        return {
            "frames": writer.n_frames,
            "seconds": round((time.monotonic_ns() - start_ns) / 1e9, 1),
            "deaths": game.count("death"),
            "squishes": game.count("squish"),
            "wins": game.count("win"),
            "progress": round(min(1.0, (furthest - terrain.spawn_x) / (terrain.goal_x - terrain.spawn_x)), 3),
            "random_acts": round(player.random_acts / max(1, player.decisions), 3),
            "logic_hz": round(game.logic_hz(), 1),
        }


def main(args: Args) -> dict:
    """Record one session into a new folder. A recording that failed or is void leaves no folder."""
    if args.seconds <= 0 or not 1 <= args.fps <= 60:
        raise SystemExit(
            f"--seconds {args.seconds:g} --fps {args.fps:g}: expected more than 0 seconds, and 1 to 60 fps"
        )
    torch.set_num_threads(1)  # the game needs the other core
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before play begins it ends us as Ctrl-C does
    folder = args.output / (args.name or time.strftime("run_%Y-%m-%d_%H-%M-%S"))
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} is there already and is never overwritten. Choose another --name.") from None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            result = record(args, folder, make_level(args.level, args.seed, Path(scratch) / "level.stl"))
        if result["logic_hz"] < MIN_LOGIC_HZ:
            raise RuntimeError(
                f"void: the game ran at {result['logic_hz']} steps a second, expected {MIN_LOGIC_HZ:g} or more of its "
                f"66.7, and {folder} was removed. Record again with less running beside it."
            )
    except BaseException as error:
        shutil.rmtree(folder)
        if isinstance(error, (RuntimeError, ValueError, OSError, ImportError)):
            raise SystemExit(str(error)) from None
        raise
    print(f"{folder}: " + ", ".join(f"{name} {value}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
