"""Games side by side: players that see one screen each, their scores over the same seeds, with intervals."""

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import gymnasium as gym
import numpy as np
from scipy.stats import bootstrap
from tqdm import tqdm

from common.video import VideoWriter
from retro_env.airstriker import make_player, spread
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


def make_envs(env_id: str, num_envs: int, max_steps: int, sticky: float = 0.05) -> gym.vector.AsyncVectorEnv:
    """Games in processes of their own, as an emulator allows one per process."""
    make = partial(make_game, env_id, max_steps=max_steps, sticky=sticky)
    return gym.vector.AsyncVectorEnv([make] * num_envs, context="spawn")


def check_game(env_id: str, meta: dict):
    """Raise an error where the game of `env_id` cannot be played, or not with the actions of meta.json's episodes."""
    packed = (meta.get("source") or {}).get("env_id", env_id)
    if packed != env_id:
        raise ValueError(f"--env-id {env_id}: the packed episodes are of {packed}. Name that game")
    n_actions = meta["n_movement"] << len(meta["keys"])
    with closing(make_game(env_id)) as game:
        if game.action_space.n != n_actions:
            raise ValueError(
                f"{env_id} takes {game.action_space.n} actions, the packed episodes have {n_actions}: "
                f"{meta['n_movement']} movements and the keys {', '.join(meta['keys'])}. Name the game that was packed"
            )


def play_games(
    envs: gym.vector.VectorEnv, player, seeds: list[int], desc: str, film_dir: Path | None = None
) -> tuple[list[dict], float]:
    """One game per seed, side by side. `player`: `reset(seeds)`, `act(screens)` and `took(actions)` as of Crowd.
    Returns `seed`, `score` and `steps` of each game, and on how many screens the player decided per second. With
    `film_dir` it writes <seed>.mp4 of each there."""
    results, spent, decided, E = [], 0.0, 0, envs.num_envs
    progress = tqdm(total=len(seeds), desc=desc, unit="game", leave=False)
    for first in range(0, len(seeds), E):
        mine = seeds[first : first + E]
        padded = mine + [mine[0]] * (E - len(mine))  # games that fill up the vector do not count
        screens, _ = envs.reset(seed=padded)
        player.reset(padded)
        score, steps, over = np.zeros(E), np.zeros(E, int), np.zeros(E, bool)
        size = screens.shape[2], screens.shape[1], 23, "ultrafast"
        paths = [film_dir / f"{seed}.mp4" for seed in mine] if film_dir else []
        films = [VideoWriter(path, envs.metadata["render_fps"], *size) for path in paths]
        while not over[: len(mine)].all():
            for e, film in enumerate(films):
                if not over[e]:
                    film.add(screens[e])
            began = time.perf_counter()
            actions = player.act(screens)
            spent, decided = spent + time.perf_counter() - began, decided + E
            screens, reward, terminated, truncated, info = envs.step(actions)  # one that is over begins anew by itself
            player.took(info["action"])
            score, steps = score + reward * ~over, steps + ~over
            over |= terminated | truncated
        for film in films:
            film.close()
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


def compare_players(
    env_id: str,
    meta: dict,
    agents: dict,
    seeds: list[int],
    num_envs: int,
    max_steps: int,
    run_dir: Path,
    baselines: bool = True,
) -> dict:
    """Scores of the agents and, as `baselines`, of random play and of the recorded mix (meta.json's players), each on
    all `seeds`, with 95 % intervals, also of the differences to random play and, of an agent <way>, to an agent
    bc_<way>. The game is one that `check_game` lets pass. Writes films of the first agent's best and median game:
    best.mp4 and median.mp4."""
    source = meta.get("source") or {}
    envs = make_envs(env_id, min(num_envs, len(seeds)), max_steps, source.get("sticky", 0.05))
    try:
        names = {"random": ["random"]} if baselines else {}
        if baselines and source.get("players"):
            names["mix"] = list(islice(spread(source["players"]), len(seeds)))
        players = {way: Crowd([partial(make_player, name) for name in mine]) for way, mine in names.items()} | agents
        with TemporaryDirectory() as films:
            film_dir = {next(iter(agents)): Path(films)}
            played = {name: play_games(envs, p, seeds, name, film_dir.get(name)) for name, p in players.items()}
            order = sorted(played[next(iter(agents))][0], key=lambda game: game["score"])
            for name, game in (("best", order[-1]), ("median", order[len(order) // 2])):
                shutil.copy(Path(films) / f"{game['seed']}.mp4", run_dir / f"{name}.mp4")
    finally:
        envs.close()
    scores = {name: np.array([game["score"] for game in games]) for name, (games, _) in played.items()}
    with_bc = [name for name in agents if f"bc_{name}" in agents]
    with_random = agents if baselines else []
    return {
        "env_id": env_id,
        "score": {name: interval(score) for name, score in scores.items()},
        "minus_bc": {name: interval(scores[name] - scores[f"bc_{name}"]) for name in with_bc},
        "minus_random": {name: interval(scores[name] - scores["random"]) for name in with_random},
        "decisions_per_second": {name: played[name][1] for name in agents},
        "games": {name: games for name, (games, _) in played.items()},
    }
