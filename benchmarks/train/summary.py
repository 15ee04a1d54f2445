"""Means over seeds, paired differences between arms, and their intervals, from the eval.json files of many runs.

    python benchmarks/train/summary.py <folder of runs> benchmarks/results/iql_reflex.json docs/iql_reflex_seeds.png

Called by iql_reflex.sh, whose --exp-name says which arm a run belongs to. Intervals of 95 % are Student's t over seeds:
with three seeds 2 degrees of freedom, so a half-width of 2.48 standard deviations. They speak of seeds, not of players
or levels: all runs are scored on the same held-out sessions.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t

ARMS = {"awr": "AWR, inverse dynamics 0.2", "bc": "plain BC, inverse dynamics 0.2", "no_inv_dyn": "AWR, weight 0"}
DIFFERENCES = {"AWR - plain BC": ("awr", "bc"), "inverse dynamics 0.2 - 0": ("awr", "no_inv_dyn")}
METRICS = {  # metric -> its baselines that have a figure for it
    "eval/key_ap": ("random",),
    "eval/key_f1": ("random", "repeat_last", "always_on", "majority"),
    "eval/onset_f1": ("random", "repeat_last"),
    "eval/release_f1": ("random", "repeat_last"),
    "eval/change_f1": ("random", "repeat_last", "always_on"),
    "eval/change_accuracy": ("random", "repeat_last", "always_on"),
    "eval/key_ece": (),
    "eval/chatter": ("player",),
    "eval/inv_dyn_f1": ("always_on", "majority"),
    "eval/value_rank_correlation": (),
}
DIFFER = ("seed", "exp_name", "use_awr", "inv_dyn_weight")  # all other arguments of the runs have to be the same


def load_runs(folder: Path) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> arguments, provenance and evaluation of a run. Stops where runs are missing or do not compare."""
    found = {}
    for path in sorted(folder.glob("*/eval.json")):
        run = json.loads(path.read_text())
        run["args"] = json.loads(path.with_name("args.json").read_text())
        run["provenance"] = json.loads(path.with_name("provenance.json").read_text())
        key = run["args"]["exp_name"], run["args"]["seed"]
        if key in found:
            raise SystemExit(f"{folder} holds two runs of {key[0]} with seed {key[1]}. Remove one.")
        found[key] = run
    seeds = sorted({seed for _, seed in found})
    missing = [f"{arm} with seed {seed}" for arm in ARMS for seed in seeds if (arm, seed) not in found]
    if missing or len(seeds) < 2:
        raise SystemExit(
            f"{folder} has the seeds {seeds}, two or more are needed; finished runs are missing: {missing}"
        )

    def common(run: dict) -> dict:
        same = {name: value for name, value in run["args"].items() if name not in DIFFER}
        return same | {"dataset_fingerprint": run["provenance"]["dataset_fingerprint"]}

    first = common(next(iter(found.values())))
    for (arm, seed), run in found.items():
        different = [name for name, value in common(run).items() if value != first[name]]
        if different:
            raise SystemExit(f"{folder}: the run of {arm} with seed {seed} differs from the first in {different}")
    return found


def interval(values: list[float]) -> dict:
    """Mean and half-width of Student's 95 % interval over seeds."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return {"mean": float(np.mean(values)), "half_width_95": float(half), "per_seed": [float(v) for v in values]}


def summarise(runs: dict[tuple[str, int], dict]) -> dict:
    """Per metric: every arm, every paired difference, and the baselines."""
    seeds, keys = sorted({seed for _, seed in runs}), next(iter(runs.values()))["keys"]
    figures = {key: dict(run["metrics"]) for key, run in runs.items()}  # (arm, seed) -> metric -> value
    for key, run in runs.items():
        figures[key] |= {f"average precision of {name}": run["per_key"][name]["ap"] for name in keys}
    base_rate = {f"average precision of {name}": run["per_key"][name]["rate"] for run in runs.values() for name in keys}
    rows = {}
    for metric in [*METRICS, *base_rate]:
        of = {arm: [figures[arm, seed].get(metric) for seed in seeds] for arm in ARMS}
        of = {arm: values for arm, values in of.items() if None not in values}  # no head, no figure
        pairs = {name: (a, b) for name, (a, b) in DIFFERENCES.items() if a in of and b in of}
        rows[metric] = {
            "arms": {arm: interval(values) for arm, values in of.items()},
            "differences": {name: interval(list(np.subtract(of[a], of[b]))) for name, (a, b) in pairs.items()},
            "baselines": {
                name: float(np.mean([figures["awr", seed][f"{metric}_{name}"] for seed in seeds]))
                for name in METRICS.get(metric, ())
            },
        }
        if metric in base_rate:
            rows[metric]["baselines"]["base rate"] = base_rate[metric]
    return {"seeds": seeds, "metrics": rows}


def markdown(summary: dict) -> str:
    def cell(row: dict | None, sign: str = "") -> str:
        return f"{row['mean']:{sign}.3f} ± {row['half_width_95']:.3f}" if row else ""

    heads = ["held-out figure", *ARMS.values(), *DIFFERENCES, "baselines"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for metric, row in summary["metrics"].items():
        baselines = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in row["baselines"].items())
        cells = [cell(row["arms"].get(arm)) for arm in ARMS]
        cells += [cell(row["differences"].get(name), "+") for name in DIFFERENCES]
        name = f"`{metric}`" if "/" in metric else metric
        lines.append(f"| {' | '.join([name, *cells, baselines])} |")
    return "\n".join(lines)


def plot(summary: dict, path: Path):
    """One panel per metric: a line per seed across the arms, baselines dashed."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 5).flat, METRICS, strict=True):
        row = summary["metrics"][metric]
        for s, seed in enumerate(summary["seeds"]):
            values = [row["arms"][arm]["per_seed"][s] if arm in row["arms"] else np.nan for arm in ARMS]
            axes.plot(range(len(ARMS)), values, "o-", color=f"C{s}", label=f"seed {seed}")
        for name, value in row["baselines"].items():
            axes.axhline(value, color="grey", linestyle="--", linewidth=0.8)
            axes.text(
                len(ARMS) - 0.65, value, name.replace("_", " "), fontsize=7, color="grey", ha="right", va="bottom"
            )
        axes.set(title=metric.removeprefix("eval/"), xticks=range(len(ARMS)), xticklabels=["AWR", "BC", "no inv. dyn."])
        axes.set_xlim(-0.4, len(ARMS) - 0.6)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(folder: Path, results: Path, picture: Path):
    runs = load_runs(folder)
    summary, first = summarise(runs), runs["awr", min(seed for _, seed in runs)]
    facts = {name: first["provenance"][name] for name in ("commit", "dirty", "torch", "cpu_capability", "threads")}
    facts |= {"command": "benchmarks/train/iql_reflex.sh", "sessions": first["sessions"]}
    facts["args"] = {name: value for name, value in first["args"].items() if name not in (*DIFFER, "run_root")}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(facts | summary, indent=1) + "\n")
    plot(summary, picture)
    print(markdown(summary))
    n = len(summary["seeds"])
    print(f"\n± is Student's 95 % interval over {n} seeds ({n - 1} degrees of freedom)")
    print(f"{results}  {picture}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
