"""Games side by side: players that see one screen each, scores with intervals."""

import time
from collections.abc import Callable
from functools import partial

import gymnasium as gym
import numpy as np
from scipy.stats import bootstrap
from tqdm import tqdm

from retro_env.game import make_game


class Crowd:
    """Players that see one game each; the game of a seed is played by `makers[seed % len(makers)]`."""

    def __init__(self, makers: list[Callable]):
        self.makers = makers

    def reset(self, seeds: list[int]):
        self.players = [self.makers[seed % len(self.makers)]() for seed in seeds]
        for player, seed in zip(self.players, seeds, strict=True):
            player.reset(seed)

    def act(self, screens: np.ndarray) -> np.ndarray:
        """uint8 (E, H, W, 3) -> actions (E,)"""
        return np.array([player.act(screen) for player, screen in zip(self.players, screens, strict=True)])

    def took(self, actions: np.ndarray):
        """What was really done (E,); they do not ask."""


def make_envs(env_id: str, num_envs: int, max_steps: int) -> gym.vector.AsyncVectorEnv:
    """Games in processes of their own, as an emulator allows one per process."""
    return gym.vector.AsyncVectorEnv([partial(make_game, env_id, max_steps=max_steps)] * num_envs, context="spawn")


def play_games(envs: gym.vector.VectorEnv, player, seeds: list[int], desc: str) -> tuple[list[dict], float]:
    """One game per seed, side by side. `player`: `reset(seeds)`, `act(screens)` and `took(actions)` as of Crowd.
    Returns `seed`, `score` and `steps` of each game, and on how many screens the player decided per second."""
    results, spent, decided, E = [], 0.0, 0, envs.num_envs
    progress = tqdm(total=len(seeds), desc=desc, unit="game", leave=False)
    for first in range(0, len(seeds), E):
        mine = seeds[first : first + E]
        padded = mine + [mine[0]] * (E - len(mine))  # games that fill up the vector do not count
        screens, _ = envs.reset(seed=padded)
        player.reset(padded)
        score, steps, over = np.zeros(E), np.zeros(E, int), np.zeros(E, bool)
        while not over[: len(mine)].all():
            began = time.perf_counter()
            actions = player.act(screens)
            spent, decided = spent + time.perf_counter() - began, decided + E
            screens, reward, terminated, truncated, info = envs.step(actions)  # one that is over begins anew by itself
            player.took(info["action"])
            score, steps = score + reward * ~over, steps + ~over
            over |= terminated | truncated
        results += [{"seed": s, "score": float(score[e]), "steps": int(steps[e])} for e, s in enumerate(mine)]
        progress.update(len(mine))
    progress.close()
    return results, decided / spent


def interval(values: np.ndarray) -> list[float]:
    """Mean, and its 95 % interval over resampled games."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 3
    low, high = bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=0).confidence_interval
    return [float(values.mean()), float(low), float(high)]
