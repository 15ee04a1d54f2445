"""Policies trained in different ways play the same episodes of the real game: means and paired differences of the ways.

Models of one way (other seeds of the training, say) carry the same name.

    python benchmarks/play/compare.py --models awr=awr_1.onnx awr=awr_2.onnx bc=bc_1.onnx bc=bc_2.onnx iql+q=iql_1.onnx

`+q` and `+sample` after a name are the ways of play_reflex.py's --decode, `+auto` is its --auto-intent, and an intent,
as in `+LEAP`, its --goal-intent. Out: benchmarks/results/closed_loop_arms.json and docs/closed_loop_arms.png. Needs
SuperTux and Xvfb.
"""

import itertools
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import play_reflex  # noqa: E402
from common import runs  # noqa: E402
from supertux_env import closed_loop  # noqa: E402


@dataclass
class Args:
    models: tuple[str, ...]
    """<way>=<file.onnx>; a way that ends in +q, +sample, +auto or an intent such as +LEAP is played so"""
    level: str = "generated:0-9"
    """as of play_reflex.py closed-loop"""
    episodes: int = 20
    """of each model, on the same seeds"""
    seed: int = 100
    """the first of their seeds"""
    debounce: int = 1
    """as of play_reflex.py"""
    max_hold: float = 3.0
    """as of play_reflex.py"""
    games: int = 3
    """how many games run side by side"""
    output: Path = ROOT / "benchmarks/results/closed_loop_arms.json"
    """the figures"""
    figure: Path = ROOT / "docs/closed_loop_arms.png"
    """their picture"""


def summarise(tiles: dict[str, np.ndarray], levels: list[str]) -> dict:
    """`tiles` {way: (M, E)} of its M models in E episodes -> means, and differences of each pair of ways, with 95 %
    intervals over resampled levels; the models of a way are averaged first."""
    weights = closed_loop.resample(levels)
    means = {way: closed_loop.mean_interval(rows.mean(0), weights) for way, rows in tiles.items()}
    means = {way: row | {"models": tiles[way].mean(1).tolist()} for way, row in means.items()}
    pairs = itertools.combinations(tiles, 2)
    differences = {
        f"{a} - {b}": closed_loop.mean_interval(tiles[a].mean(0) - tiles[b].mean(0), weights) for a, b in pairs
    }
    return {"ways": means, "differences": differences}


def draw(summary: dict, path: Path, title: str):
    """Mean and interval of each way, a cross per model."""
    figure = Figure(figsize=(7, 1 + 0.5 * len(summary["ways"])), layout="constrained")
    axes = figure.subplots()
    for row, way in enumerate(summary["ways"].values()):
        axes.plot(way["models"], [row] * len(way["models"]), "x", color="tab:blue")
        axes.plot([way["low"], way["high"]], [row, row], color="black", linewidth=2)
        axes.plot(way["mean"], row, "D", color="black", markersize=5)
    axes.set_yticks(range(len(summary["ways"])), list(summary["ways"]))
    axes.invert_yaxis()
    axes.set_xlabel("progress in tiles of 32 pixels: models, mean, 95 % interval")
    axes.set_title(title)
    figure.savefig(path, dpi=110)


def main(args: Args) -> dict:
    players, policies = {}, {}
    try:
        for number, model in enumerate(args.models):
            way, _, path = model.partition("=")
            ending = way.partition("+")[2]
            if not path:
                raise ValueError(f"{model}: expected <way>=<file.onnx>")
            how = {"": {}, "q": {"decode": "q"}, "sample": {"decode": "sample"}, "auto": {"auto_intent": True}}
            if ending not in how and not ending.isupper():
                raise ValueError(f"{model}: after the + of a way comes q, sample, auto or an intent such as LEAP")
            how = how.get(ending, {"goal_intent": ending})
            rule = {"debounce": args.debounce, "max_hold": args.max_hold, **how}
            settings = play_reflex.ClosedLoop(model=Path(path), level=args.level, **rule)
            policies[path] = play_reflex.PolicyPlayer(settings).policy
            players[f"{way} {number}"] = partial(play_reflex.PolicyPlayer, settings)
        rates = {policy.fps for policy in policies.values()}
        if len(rates) != 1:
            raise ValueError(f"--models play at {sorted(rates)} frames a second, expected one rate")
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    fps = rates.pop()
    episodes = closed_loop.play_episodes(
        players, args.level, list(range(args.seed, args.seed + args.episodes)), fps, args.games
    )
    tiles: dict[str, list] = {}
    for player in players:
        mine = [episode for episode in episodes if episode["player"] == player]
        tiles.setdefault(player.rpartition(" ")[0], []).append([episode["tiles"] for episode in mine])
    summary = summarise({way: np.array(rows) for way, rows in tiles.items()}, [e["level"] for e in mine])
    for folder in (args.output.parent, args.figure.parent):
        folder.mkdir(parents=True, exist_ok=True)
    draw(summary, args.figure, f"{args.episodes} episodes each on {args.level}")
    rows = [{name: e[name] for name in e if name not in closed_loop.PER_DECISION} for e in episodes]
    with tempfile.TemporaryDirectory() as name:
        facts = runs.write_provenance(Path(name), [Path(path) for path in policies])
    models = {path: policy.sha256 for path, policy in policies.items()}
    result = {"commit": facts["commit"], "command": facts["command"], "level": args.level, "sha256": models}
    result |= {**summary, "episodes": rows}
    runs.write_json(args.output, result)
    print(f"\n{'way':<14}{'tiles':>6}   95 %                models")
    for way, row in summary["ways"].items():
        each = ", ".join(f"{mean:.0f}" for mean in row["models"])
        print(f"{way:<14}{row['mean']:>6.1f}   {row['low']:>5.1f} to {row['high']:<8.1f} {each}")
    for pair, row in summary["differences"].items():
        print(f"{pair}: {row['mean']:+.1f} tiles, {row['low']:+.1f} to {row['high']:+.1f}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
