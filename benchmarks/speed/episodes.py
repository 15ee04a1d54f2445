"""Batches for `bc_pokemon.py`: its data path beside the loop of the specification.

    python -m benchmarks.speed.episodes

The rival holds an episode's frames as they were recorded, picks 64 at random, turns each into float32, resizes it to
84x84 and divides by 255, one after the other. The script gathers the rows of a memory-mapped uint8 cache, which was
resized once, and converts the batch as a whole. Also timed: making the cache. Writes results/episodes.json.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import bc_pokemon
from benchmarks.speed.paired import cpu_seconds, report, run_in_turn
from pokemon_env.episodes import read_episodes


@dataclass
class Args:
    data: Path | None = None
    """folder of episodes; None makes eight of 250 frames of noise, which take as long as real ones"""
    batches: int = 20
    """batches of each way in a round"""
    rounds: int = 9
    """how often the ways take turns"""


def make_episodes(folder: Path, count: int = 8, T: int = 250):
    rng = np.random.default_rng(1)
    for number in range(1, count + 1):
        np.savez(
            folder / f"episode_{number:04d}.npz",
            observations=rng.integers(0, 256, (T, 160, 240, 3), np.uint8),
            actions=rng.integers(0, 10, T).astype(np.int32),
            rewards=np.zeros(T, np.float32),
            dones=np.arange(T) == T - 1,
            infos=np.array(["{}"] * T),
        )


def main(args: Args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.data or Path(temporary)
        if args.data is None:
            make_episodes(folder)
        settings = bc_pokemon.Args(expert_data_dir=str(folder), cache_dir=f"{temporary}/cache")
        episodes, _ = read_episodes(folder)
        begin = cpu_seconds()
        caches = [bc_pokemon.cache_frames(episode, settings) for episode in episodes]
        cache_seconds = cpu_seconds() - begin
        demos = bc_pokemon.Demonstrations(0.99, 5)
        rows = []
        for episode, frames in zip(episodes, caches, strict=True):
            T = len(episode["actions"])
            facts = episode["actions"], episode["actions"], episode["rewards"], True, True
            rows.append(demos.add(frames, *facts, np.zeros((T + 1, 0), np.float32), np.zeros(T + 1)))
        rows = np.concatenate(rows)
        observations = np.concatenate([np.load(episode["path"])["observations"] for episode in episodes])
        actions = np.concatenate([episode["actions"] for episode in episodes])

        def script(_):
            for step in range(args.batches):
                chosen, _ = bc_pokemon.sample_rows(rows, demos.rows["stage"], None, settings, step)
                pixels = demos.gather(chosen, 1)
                labels, _ = demos.batch(chosen, "cpu", "action", "features")
                assert (pixels.float() / 255).shape == (64, 3, 84, 84) and len(labels) == 64

        def specification(_):
            for step in range(args.batches):
                chosen = np.random.default_rng(step).integers(0, len(actions), 64)
                samples = []
                for i in chosen:
                    picture = torch.FloatTensor(observations[i]).permute(2, 0, 1)[None]  # (1, 3, 160, 240)
                    samples.append(F.interpolate(picture, (84, 84), mode="bilinear", antialias=True) / 255)
                labels = torch.LongTensor(actions[chosen])
                assert torch.cat(samples).shape == (64, 3, 84, 84) and len(labels) == 64

        seconds = run_in_turn({"specification's loop": specification, "bc_pokemon.py": script}, args.rounds)
        more = {"frames": len(actions), "cache_frames_per_cpu_second": len(actions) / cache_seconds}
        report(
            "episodes", seconds, 64 * args.batches, "samples", [("bc_pokemon.py", "specification's loop", 5.0)], more
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
