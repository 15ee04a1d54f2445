"""What PokemonEnv and `collect_expert_data.py` cost beyond the emulator, and what a second worker gains.

    python -m benchmarks.speed.collect

The rival is the same emulator bare: the same buttons for the same frames from the same power-on, and nothing read. The
collector plays, reads pictures and memory, asks the scripted expert and writes and joins the file. They take turns
episode by episode, bare, collector, bare, in processor time. Then one worker against two, by the clock on the wall,
starting the processes included. Writes results/collect.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import collect_expert_data
from benchmarks.speed.paired import report, run_in_turn

ROOT = Path(__file__).resolve().parents[2]
MOST_MS = 0.4  # a step, beyond the bare emulator
LEAST_GAIN = 1.8  # of two workers over one


@dataclass
class Args:
    episodes: int = 20
    """episodes that both play"""
    worker_episodes: int = 40
    """episodes of each run with one or two workers"""
    worker_rounds: int = 3
    """how often one and two workers take turns; 0 leaves them out"""


def collect(episodes: int, workers: int) -> float:
    """Seconds on the wall that the command takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "collect_expert_data.py", "--episodes", str(episodes), "--num-workers", str(workers)]
        begin = time.perf_counter()
        subprocess.run([*command, "--expert-data-dir", folder], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - begin


def main(args: Args):
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    settings = collect_expert_data.Args(expert_data_dir=Path(folder.name))
    where = (settings.env_id, settings.rom_path, settings.core, settings.init_state, settings.max_steps)
    recorder = collect_expert_data.Recorder(settings, where, None)
    emulator = recorder.env.unwrapped.emulator
    played, steps = [], []  # per episode: every call of the emulator's `run`; steps

    def collector(_=None):
        reports = [recorder.reset()]
        while recorder.writer:
            reports.append(recorder.step(collect_expert_data.PLAY))
        steps.append(sum(json.loads(report[-1]["report"])["steps"] for report in reports))

    def bare(number):
        emulator.reset()
        for buttons, n in played[number]:
            emulator.run(buttons, n)

    run = emulator.run
    for _ in range(1 + args.episodes):  # which buttons it presses; the first warms up
        played.append([])
        emulator.run = lambda buttons, n: (played[-1].append((tuple(buttons), n)), run(buttons, n))[1]
        collector()
    emulator.run = run
    for path in Path(folder.name).glob("episode_*.npz"):
        path.unlink()  # so that the same episodes begin again
    steps.clear()
    seconds = run_in_turn({"bare emulator": bare, "collector": collector}, args.episodes)
    recorder.close()
    folder.cleanup()

    steps = np.array(steps[1:])
    first, second, collected = (np.array(seconds[w]) for w in ("bare emulator", "bare emulator, again", "collector"))
    beyond = 1000 * (collected - (first + second) / 2) / steps
    ms = float(np.median(beyond))
    more = {"ms_a_step_beyond": ms, "least_to_most": [float(beyond.min()), float(beyond.max())], "target_ms": MOST_MS}
    more["ms_a_step_of_the_bare_emulator"] = float(1000 * np.median(first / steps))
    print(f"\n{ms:.3f} ms a step beyond the bare emulator, target {MOST_MS}: {'holds' if ms <= MOST_MS else 'MISSED'}")
    if args.worker_rounds:
        pairs = [[collect(args.worker_episodes, workers) for workers in (1, 2)] for _ in range(args.worker_rounds)]
        gains = [one / two for one, two in pairs]
        gain = float(np.median(gains))
        more |= {"two_workers_over_one": gain, "gains": gains, "wall_seconds": pairs, "target_gain": LEAST_GAIN}
        print(f"two workers over one: {gain:.2f}, target {LEAST_GAIN}: {'holds' if gain >= LEAST_GAIN else 'MISSED'}")
    report("collect", seconds, float(np.median(steps)), "steps", [], more)


if __name__ == "__main__":
    main(tyro.cli(Args))
