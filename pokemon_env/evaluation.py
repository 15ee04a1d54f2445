"""Policies against the game: many episodes side by side, their table, their picture, their film.

Used by the evaluation of `bc_pokemon.py`; works for any vector of `pokemon_env.wrappers.make_env` environments.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest, bootstrap
from tqdm import tqdm

from common.video import VideoWriter, draw_keys
from pokemon_env.wrappers import NO_ACTION, make_env

Act = Callable[[np.ndarray, list[dict], np.ndarray], np.ndarray]
"""(observations (E, H, W, 3), infos, which environments begin an episode (E,) bool) -> actions (E,)"""


def make_envs(num_envs: int, *where) -> gym.vector.VectorEnv:
    """Environments in processes of their own, as an emulator allows one per process. `where`: what `make_env` takes."""
    return gym.vector.AsyncVectorEnv(
        [partial(make_env, *where)] * num_envs, context="spawn", autoreset_mode=gym.vector.AutoresetMode.DISABLED
    )


def rollout(envs, act: Act, seeds: list[int], patience: int, desc: str, ask: bool = False) -> Iterator[dict]:
    """Play one episode per seed, side by side. Yields every single step of every environment: `seed`, `env`, the `obs`
    and `info` that the action was chosen from, `action`, `begun`, and at an episode's end `result`. `patience`: steps
    without a new milestone that end an episode, 0 for never. With `ask` an info has the expert's advice as
    `expert_action`, -1 for none, and as `expert_error` why there is none."""
    E, waiting = envs.num_envs, list(seeds)
    has_goal = envs.get_attr("has_goal")[0]
    seed_of = [waiting.pop(0) if waiting else None for _ in range(E)]  # None: nothing left to play
    to_reset = np.ones(E, bool)  # at first all of them: what was never reset has no picture
    obs, infos = np.zeros(envs.observation_space.shape, np.uint8), [{}] * E  # {}: nothing is played there
    total, length, n_reached, reached_at = np.zeros(E), np.zeros(E, int), np.zeros(E, int), np.zeros(E, int)

    def unpack(received: dict, e: int) -> dict:
        packed = {name: received[name][e] for name in ("expert_action", "expert_error", "success")}
        return json.loads(received["json"][e]) | packed

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the cores are the emulators'
    progress = tqdm(total=len(seeds), desc=desc, unit="episode", leave=False)
    try:
        while any(seed is not None for seed in seed_of):
            begun = to_reset
            if begun.any():
                options = {"reset_mask": begun, "ask": ask}
                obs, received = envs.reset(seed=[seed or 0 for seed in seed_of], options=options)
                for e in np.flatnonzero(begun):
                    infos[e] = unpack(received, e) if seed_of[e] is not None else {}
                    total[e], length[e], n_reached[e], reached_at[e] = 0, 0, n_milestones(infos[e]), 0
            to_reset, playing = np.zeros(E, bool), [e for e in range(E) if seed_of[e] is not None]
            actions = np.where([seed is not None for seed in seed_of], act(obs, infos, begun), NO_ACTION)
            before, infos_before = obs, list(infos)
            obs, rewards, terminated, truncated, received = envs.step(actions)
            for e in playing:
                infos[e] = unpack(received, e)
                total[e], length[e] = total[e] + rewards[e], length[e] + 1
                if n_milestones(infos[e]) > n_reached[e]:
                    n_reached[e], reached_at[e] = n_milestones(infos[e]), length[e]
                stuck = patience and n_reached[e] and length[e] - reached_at[e] >= patience
                step = {"seed": seed_of[e], "env": e, "begun": bool(begun[e]), "action": int(actions[e])}
                step |= {"obs": before[e], "info": infos_before[e]}
                if terminated[e] or truncated[e] or stuck:
                    step["result"] = {
                        "seed": seed_of[e],
                        "return": float(total[e]),
                        "length": int(length[e]),
                        "success": bool(infos[e]["success"]) if has_goal else None,
                        "milestones": infos[e].get("milestones", {}).get("completed", []),
                    }
                    seed_of[e] = waiting.pop(0) if waiting else None
                    to_reset[e] = seed_of[e] is not None
                    infos[e] = {}
                    progress.update()
                yield step
    finally:
        progress.close()
        torch.set_num_threads(threads)


def n_milestones(info: dict) -> int:
    return len(info.get("milestones", {}).get("completed", ()))


def play(envs, act: Act, seeds: list[int], patience: int = 0, desc: str = "", film=None, ask=False) -> list[dict]:
    """The results of one episode per seed, in the order of the seeds: `seed`, `return`, `length`, `milestones` reached
    and `success`, None in a game without a goal. `film(step)` sees the steps of the first one."""
    results = {}
    for step in rollout(envs, act, seeds, patience, desc, ask):
        if film and step["seed"] == seeds[0]:
            film(step)
        if "result" in step:
            results[step["seed"]] = step["result"]
    return [results[seed] for seed in seeds]


def summarise(results: list[dict]) -> dict:
    """Means with 95 % intervals, [mean, low, high]: bootstrap for `return` and `length`, Wilson's for `success`, which
    is missing in a game without a goal, and for each of the `milestones`."""
    summary = {"episodes": len(results)}
    for name in ("return", "length"):
        values = np.array([result[name] for result in results], float)
        interval = (values.mean(), values.mean())
        if len(values) > 1 and np.ptp(values) > 0:
            interval = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
        summary[name] = [float(values.mean()), float(interval[0]), float(interval[1])]

    def rate(hits: int) -> list[float]:
        interval = binomtest(hits, len(results)).proportion_ci(method="wilson")
        return [hits / len(results), interval.low, interval.high]

    if results[0]["success"] is not None:
        summary["success"] = rate(sum(result["success"] for result in results))
    reached = list(dict.fromkeys(name for result in results for name in result["milestones"]))
    summary["milestones"] = {name: rate(sum(name in r["milestones"] for r in results)) for name in reached}
    return summary


def ask_expert(frames, infos, begun) -> np.ndarray:
    for info in infos:
        if info and info["expert_error"]:
            raise ValueError(f"the expert failed: {info['expert_error']}. Name another with --expert, or --expert None")
    return np.array([info["expert_action"] if info else 0 for info in infos])


def in_words(interval: list[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*interval)


def report(summaries: dict[str, dict]):
    """For the terminal: who plays how well, and how far they get."""
    print(f"\n{'':<18}{'episodes':>9}{'success, 95 %':>22}{'return, 95 %':>26}{'length':>8}")
    for name, summary in summaries.items():
        success = in_words(summary["success"]) if "success" in summary else "-"
        row = f"{name:<18}{summary['episodes']:>9}{success:>22}{in_words(summary['return']):>26}"
        print(f"{row}{summary['length'][0]:>8.0f}")
    reached = milestones_reached(summaries)
    if reached:
        print(f"\n{'milestone reached':<28}" + "".join(f"{name:>17}" for name in summaries))
    for milestone in reached:
        rates = [summary["milestones"].get(milestone, [0.0])[0] for summary in summaries.values()]
        print(f"{milestone:<28}" + "".join(f"{rate:>17.2f}" for rate in rates))


def milestones_reached(summaries: dict[str, dict]) -> list[str]:
    return list(dict.fromkeys(m for summary in summaries.values() for m in summary["milestones"]))


def plot_evaluation(path: Path, summaries: dict[str, dict]):
    """Success and return with intervals, and how often each milestone is reached, as far as the game has them."""
    names, reached = list(summaries), milestones_reached(summaries)
    bars = [key for key in ("success", "return") if all(key in summary for summary in summaries.values())]
    widths = [1] * len(bars) + [2] * bool(reached)
    figure = Figure(figsize=(3.5 * sum(widths), 4.8), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axis, key in zip(axes, bars, strict=False):
        mean, low, high = np.array([summaries[name][key] for name in names]).T
        axis.barh(names, mean, xerr=[mean - low, high - mean], capsize=3)
        axis.invert_yaxis()
        axis.set(title=f"{key}, 95 %", xlim=(0, 1.02) if key == "success" else None)
    if reached:
        for name in names:
            rates = [summaries[name]["milestones"].get(milestone, [0.0])[0] for milestone in reached]
            axes[-1].plot(range(len(reached)), rates, marker="o", markersize=3, label=name)
        axes[-1].set(title="share of episodes that reach a milestone", ylim=(-0.02, 1.02))
        axes[-1].set_xticks(
            range(len(reached)), [m.replace("_", " ").lower() for m in reached], rotation=60, ha="right"
        )
        axes[-1].tick_params(axis="x", labelsize=7)
        axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


class Film:
    """eval.mp4: what the policy sees, at twice the size, with its action and the expert's."""

    def __init__(self, path: Path, names: list[str]):
        self.path, self.names, self.video = path, names, None

    def __call__(self, step: dict):
        buttons = np.arange(len(self.names))
        rows = {"policy": buttons == step["action"], "expert": buttons == step["info"]["expert_action"]}
        milestones = step["info"].get("milestones", {})
        note = f"seed {step['seed']}  next {milestones['next']}" if milestones else f"seed {step['seed']}"
        drawn = draw_keys(step["obs"].repeat(2, 0).repeat(2, 1), self.names, rows, note)
        self.video = self.video or VideoWriter(self.path, 4, drawn.shape[1], drawn.shape[0], crf=23)
        self.video.add(drawn)
        if "result" in step:
            self.video.close()
