"""What PokemonEnv and `collect_expert_data.py` cost beyond the emulator, and what a second worker gains.

    python -m benchmarks.speed.collect

The rival is the bare emulator: the same buttons for the same frames from the same power-on, and nothing read. The
collector plays, reads pictures and memory, asks the scripted expert and writes the files. Processor time, in turn. Then
one worker against two, by the clock on the wall, starting the processes included. Writes results/collect.json.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import collect_expert_data
from benchmarks.speed.paired import report, run_in_turn
from pokemon_env import QUEST_ROM
from pokemon_env.emulator import open_emulator
from pokemon_env.wrappers import make_env

MOST_MS = 0.4  # a step, beyond the bare emulator
LEAST_GAIN = 1.8  # of two workers over one
HOLD = 12  # frames that PokemonEnv holds a button


@dataclass
class Args:
    episodes: int = 4
    """episodes of each way in a round"""
    rounds: int = 7
    """how often the ways take turns"""
    worker_episodes: int = 40
    """episodes of each run with one or two workers"""
    worker_rounds: int = 3
    """how often one and two workers take turns; 0 leaves them out"""


def collect(episodes: int, workers: int = 1) -> float:
    """Seconds on the wall that the collector takes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = collect_expert_data.Args(episodes=episodes, num_workers=workers, expert_data_dir=Path(folder))
        begin = time.perf_counter()
        collect_expert_data.main(args)
        return time.perf_counter() - begin


def record(episodes: int) -> list[tuple[int, list[tuple[str, int]]]]:
    """Of the episodes that `collect` plays: frames until the first picture, then the button and the frames per step."""
    env, seed, played = make_env(expert="scripted"), collect_expert_data.Args().seed, []
    frames = []  # of every call of the emulator's `run`
    emulator = env.unwrapped.emulator
    run = emulator.run
    emulator.run = lambda buttons, n: (frames.append((tuple(buttons), n)), run(buttons, n))[1]
    for number in range(1, episodes + 1):
        frames.clear()
        _, packed = env.reset(seed=seed + number)
        over = False
        while not over:
            _, _, terminated, truncated, packed = env.step(packed["expert_action"])
            over = terminated or truncated
        played.append(list(frames))
        steps = json.loads(packed["json"])["step_count"]
        played[-1] = (steps, played[-1])
    env.close()
    return played


def main(args: Args):
    torch.set_num_threads(1)
    played = record(args.episodes)
    steps = sum(count for count, _ in played)

    def bare(_):
        emulator = open_emulator(QUEST_ROM)
        for _, frames in played:
            emulator.reset()
            for buttons, n in frames:
                emulator.run(buttons, n)
        emulator.close()

    seconds = run_in_turn({"bare emulator": bare, "collector": lambda _: collect(args.episodes)}, args.rounds)
    beyond = [1000 * (b - a) / steps for a, b in zip(seconds["bare emulator"], seconds["collector"], strict=True)]
    ms = statistics.median(beyond)
    more = {"ms_a_step_beyond": ms, "least_to_most": [min(beyond), max(beyond)], "target_ms": MOST_MS}
    more["ms_a_step_of_the_bare_emulator"] = 1000 * statistics.median(seconds["bare emulator"]) / steps
    print(f"\n{ms:.3f} ms a step beyond the bare emulator, target {MOST_MS}: {'holds' if ms <= MOST_MS else 'MISSED'}")
    if args.worker_rounds:
        pairs = [[collect(args.worker_episodes, workers) for workers in (1, 2)] for _ in range(args.worker_rounds)]
        gains = [one / two for one, two in pairs]
        gain = float(np.median(gains))
        more |= {"two_workers_over_one": gain, "gains": gains, "wall_seconds": pairs, "target_gain": LEAST_GAIN}
        print(f"two workers over one: {gain:.2f}, target {LEAST_GAIN}: {'holds' if gain >= LEAST_GAIN else 'MISSED'}")
    report("collect", seconds, steps, "steps", [], more)


if __name__ == "__main__":
    main(tyro.cli(Args))
