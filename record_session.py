"""Record a session of a game: its window's pixels and the keys, both on one clock.

A scripted demonstrator plays SuperTux on a virtual screen of its own, so that nothing on your desktop is touched. Keys
are recorded as the X server heard them, not as they were meant; a level's scripts add the truth (positions, deaths,
squishes, wins) for checking labels. The page is docs/record_session.md, the files are described in docs/data.md.

    python record_session.py --demonstrator skilled --seconds 60 --seed 1

In: the installed game (apt-get install supertux xvfb). Out: dataset/run_<timestamp>/ with recording.mp4,
frames.parquet, inputs.parquet, truth.parquet. A killed recording leaves .jsonl journals, which are read as they are.
"""

import shutil
import sys
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


@dataclass
class Args:
    game: Literal["supertux"] = "supertux"
    """what to record"""
    demonstrator: Literal["skilled", "sloppy"] = "skilled"
    """who plays"""
    level: str = "generated"
    """generated (from the seed) or a stock level: welcome_antarctica"""
    seed: int = 1
    """picks the generated level, the pause before the first key (0 to 1 s), and the demonstrator's random acts"""
    seconds: float = 60.0
    """longest recording; a win ends it earlier"""
    output: Path = Path("dataset")
    """folder that receives the session's folder"""
    name: str = ""
    """name of the session's folder; empty means run_<timestamp>"""
    fps: float = 10.0
    """pictures per second; the real time of each one is stored"""
    crf: int = 27
    """x264 quality, 0 (lossless) to 51; 26 to 28 keeps the sprites recognisable"""
    width: int = 640
    """of the game's window in pixels; 640x480 is the smallest that is drawn at full scale"""
    height: int = 480
    """of the game's window in pixels"""


def main(args: Args) -> dict:
    if args.seconds <= 0 or not 1 <= args.fps <= 60:
        raise ValueError(f"--seconds {args.seconds} --fps {args.fps}: expected seconds above 0 and 1 to 60 fps")
    torch.set_num_threads(1)  # the game needs the other core
    now = time.time()
    folder = args.output / (
        args.name or time.strftime("run_%Y%m%d_%H%M%S", time.localtime(now)) + f"_{int(now * 1e3) % 1000:03d}"
    )
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(f"{folder} is there already and is never overwritten. Choose another --name.") from None
    level = folder / ".level.stl"
    try:
        make_level(args.level, args.seed, level)
        result = record(args, folder, level)
    except BaseException:
        shutil.rmtree(folder)
        raise
    level.unlink()
    if result["frames"] == 0:
        shutil.rmtree(folder)
        sys.exit("nothing was recorded")
    if result["logic_hz"] < MIN_LOGIC_HZ:
        shutil.rmtree(folder)
        sys.exit(
            f"void: the game ran at {result['logic_hz']:.1f} Hz, expected {MIN_LOGIC_HZ:.0f} or more of its 66.7. "
            f"{folder} was removed. Record again with less running beside it."
        )
    print(f"{folder}: " + ", ".join(f"{key} {value}" for key, value in result.items()))
    return result


def record(args: Args, folder: Path, level: Path) -> dict:
    """Play and record until time is up, the level is won, the game ends, or a signal comes."""
    terrain = read_terrain(level)
    player = Demonstrator(args.demonstrator, terrain, args.seed, args.fps)
    metadata = {
        "game": args.game,
        "level": args.level,
        "seed": str(args.seed),
        "demonstrator": args.demonstrator,
        "reaction_frames": str(player.skill.reaction_frames),
    }
    with Xvfb(args.width, args.height) as display, Game(level, display, args.width, args.height) as game:
        screen, keyboard = Screen(display, args.width, args.height), Keyboard(display)
        game.skip_intro(keyboard)
        listener = KeyListener(display)
        writer = SessionWriter(folder, args.fps, args.width, args.height, list(KEYS), metadata)
        video = VideoWriter(folder / "recording.mp4", args.fps, args.width, args.height, args.crf)
        stop = StopSignal()
        try:
            with stop:
                _play(args, game, terrain, player, screen, keyboard, listener, writer, video, stop)
        finally:
            keyboard.close()
            listener.close()
            for time_ns, name, state in listener.drain():
                writer.key(time_ns, name, state, source="script")
            screen.close()
            video.close()
            writer.close()
        progress = (max(p[1] for p in game.positions) - terrain.spawn_x) / (terrain.goal_x - terrain.spawn_x)
        return {
            "frames": writer.n_frames,
            "deaths": game.count("death"),
            "squishes": sum(is_squish(e) for e in game.events),
            "kills": game.count("kill"),
            "wins": game.count("win"),
            "progress": round(min(1.0, progress), 3),
            "logic_hz": round(game.logic_hz(), 1),
            "random_acts": round(player.random_acts / max(1, player.decisions), 3),
        }


def _play(args, game, terrain, player, screen, keyboard, listener, writer, video, stop):
    pause_s = np.random.default_rng(args.seed).uniform(0, 1)
    told, start_ns, won_ns = 0, time.monotonic_ns(), None
    bar = tqdm(total=round(args.seconds * args.fps), unit="frame", desc=args.name or args.demonstrator, leave=False)
    period_ns, tick = round(1e9 / args.fps), 0
    while tick < round(args.seconds * args.fps) and game.running() and not stop:
        time.sleep(max(0.0, (start_ns + tick * period_ns - time.monotonic_ns()) / 1e9))
        # grab; the truth known at that moment belongs to the picture
        frame, now = screen.grab()
        position = game.position()
        writer.frame(now)
        # act
        acting = game.alive and not game.count("win") and now - start_ns > pause_s * 1e9
        keys = player.act(frame, position if acting else None)
        if game.count("win") and won_ns is None:
            keyboard.hold(set())
            keyboard.tap(WIN_KEY)
            won_ns = now
        elif won_ns is None:
            keyboard.hold(keys)
        # write
        video.add(frame, now - start_ns)
        writer.truth(now, "pos", " ".join(f"{value:.1f}" for value in position))
        for event in game.events[told:]:
            if event.monotonic_ns >= start_ns:
                what = "squish" if is_squish(event) else event.what
                writer.truth(event.monotonic_ns, what, event.data)
            told += 1
        for time_ns, name, state in listener.drain():
            writer.key(time_ns, name, state, source="script")
        late = (time.monotonic_ns() - start_ns) // period_ns - tick  # ticks that went by meanwhile are left out
        tick += 1 + max(0, late)
        bar.update(1 + max(0, late))
        bar.set_postfix(deaths=game.count("death"), kills=game.count("kill"), x=f"{position[0] / terrain.goal_x:.0%}")
        if won_ns is not None and now - won_ns > 1.5e9:
            break
    bar.close()


def is_squish(event) -> bool:
    """A kill at which Tux was bouncing off: upwards at 300, or at 520 with jump held."""
    return event.what == "kill" and round(float(event.data.split()[-1])) in (-300, -520)


if __name__ == "__main__":
    main(tyro.cli(Args))
