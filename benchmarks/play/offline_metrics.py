"""Do the figures of a held-out session say how well a policy plays? Spearman's correlation over many checkpoints.

Every checkpoint is scored on the same held-out sessions, exported, and plays the same episodes of one level of the real
game.

    python benchmarks/play/offline_metrics.py --checkpoints models/bc/*.pth models/awr/*.pth --data-dir dataset

Out: benchmarks/results/offline_metrics.json and docs/offline_metrics.png. Needs SuperTux and Xvfb.
"""

import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import export_reflex  # noqa: E402
import iql_reflex  # noqa: E402
import play_reflex  # noqa: E402
from common import runs  # noqa: E402
from common.sessions import find_sessions  # noqa: E402
from supertux_env import closed_loop  # noqa: E402

METRICS = ("key_ap", "key_f1", "onset_f1", "release_f1", "change_f1", "change_accuracy", "key_ece", "chatter")


@dataclass
class Args:
    checkpoints: tuple[Path, ...]
    """files of iql_reflex.py, of equal keys; 12 or more make a figure that says something"""
    data_dir: Path
    """its sessions named `heldout` are those scored on; labelled"""
    heldout: str = "heldout*"
    """name or pattern of those sessions"""
    level: str = "generated:0"
    """the level that is played"""
    episodes: int = 8
    """of each checkpoint"""
    seed: int = 100
    """the first of their seeds"""
    debounce: int = 1
    """as of play_reflex.py"""
    max_hold: float = 3.0
    """as of play_reflex.py"""
    games: int = 3
    """how many games run side by side"""
    output: Path = ROOT / "benchmarks/results/offline_metrics.json"
    """the figures"""
    figure: Path = ROOT / "docs/offline_metrics.png"
    """their picture"""


def score(path: Path, args: Args) -> dict:
    """Metrics of a checkpoint on the held-out sessions."""
    checkpoint = runs.load_checkpoint(path)
    network = iql_reflex.ReflexNet(**checkpoint["network"])
    network.load_state_dict(checkpoint["model"])
    folders = [folder for folder in find_sessions(args.data_dir) if fnmatch(folder.name, args.heldout)]
    if not folders:
        raise SystemExit(
            f"{args.data_dir} has no session {args.heldout}. Name those that were not trained on: --heldout"
        )
    recordings = [iql_reflex.load_recording(f, checkpoint["keys"], checkpoint["action_horizon"]) for f in folders]
    parts = [(recording, 0, len(recording.usable)) for recording in recordings]
    settings = iql_reflex.Args(image_size=checkpoint["image_size"])
    thresholds = np.array(checkpoint["thresholds"])
    metrics, _ = iql_reflex.evaluate(network, parts, thresholds, settings, torch.device("cpu"))
    return {name: float(metrics[f"eval/{name}"]) for name in METRICS}


def correlate(metric: np.ndarray, tiles: np.ndarray, draws: int = 2000) -> dict:
    """Spearman's rho of (N,) and (N,), and its 95 % interval over resampled checkpoints."""
    rng, rhos = np.random.default_rng(0), []
    for _ in range(draws):
        rows = rng.integers(0, len(tiles), len(tiles))
        if np.ptp(metric[rows]) and np.ptp(tiles[rows]):
            rhos.append(spearmanr(metric[rows], tiles[rows]).statistic)
    if not rhos:  # all equal
        return dict.fromkeys(("rho", "low", "high"), float("nan"))
    low, high = np.percentile(rhos, [2.5, 97.5])
    return {"rho": float(spearmanr(metric, tiles).statistic), "low": float(low), "high": float(high)}


def draw(rows: list[dict], correlations: dict, path: Path, title: str):
    """A panel per metric, a point per checkpoint."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 4, sharey=True).flat, METRICS, strict=True):
        for run in sorted({row["run"] for row in rows}):
            mine = [row for row in rows if row["run"] == run]
            axes.plot([row[name] for row in mine], [row["tiles"] for row in mine], "o", markersize=4, label=run)
        rho = correlations[name]
        axes.set_title(f"{name}: {rho['rho']:+.2f} ({rho['low']:+.2f} to {rho['high']:+.2f})", fontsize="medium")
    figure.axes[0].legend(fontsize="small")
    figure.supylabel("tiles in the game")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(args: Args) -> dict:
    rows = []
    for path in tqdm(args.checkpoints, desc="held-out sessions", unit="checkpoint"):
        rows.append({"checkpoint": path.name, "run": path.parent.name, **score(path, args)})
    with tempfile.TemporaryDirectory() as name:
        players = {}
        for number, path in enumerate(args.checkpoints):
            model = Path(name) / f"{number}.onnx"
            export_reflex.main(export_reflex.Args(checkpoint=path, output=model))
            rule = {"debounce": args.debounce, "max_hold": args.max_hold}
            settings = play_reflex.ClosedLoop(model=model, level=args.level, **rule)
            players[str(number)] = partial(play_reflex.PolicyPlayer, settings)
        fps, seeds = play_reflex.Policy(model).fps, list(range(args.seed, args.seed + args.episodes))
        episodes = closed_loop.play_episodes(players, args.level, seeds, fps, args.games)
        facts = runs.write_provenance(Path(name), list(args.checkpoints))
    for number, row in enumerate(rows):
        row["tiles"] = float(np.mean([e["tiles"] for e in episodes if e["player"] == str(number)]))
    tiles = np.array([row["tiles"] for row in rows])
    correlations = {metric: correlate(np.array([row[metric] for row in rows]), tiles) for metric in METRICS}
    result = {
        "commit": facts["commit"],
        "command": facts["command"],
        "level": args.level,
        "episodes": args.episodes,
        "spearman": correlations,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(args.output, result | {"checkpoints": rows})
    draw(rows, correlations, args.figure, f"{len(rows)} checkpoints, {args.episodes} episodes each on {args.level}")
    print(f"\n{'held-out figure':<18}{'rho':>7}   95 %")
    for metric, row in correlations.items():
        print(f"{metric:<18}{row['rho']:>+7.2f}   {row['low']:+.2f} to {row['high']:+.2f}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
