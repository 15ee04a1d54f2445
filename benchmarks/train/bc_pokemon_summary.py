"""The tables of docs/bc_pokemon.md from the eval.json files of bc_pokemon.sh; --exp-name says which arm a run is.

    python benchmarks/train/bc_pokemon_summary.py <folder of runs> <results.json> <picture.png>

Rates have Wilson's intervals, returns bootstrap ones, as the runs computed them. Differences are paired: the same
training and evaluation seed under both arms; the bootstrap draws training seeds and evaluation seeds.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

DIFFERENCES = {"dagger - few_labels": ("dagger", "few_labels"), "noisy_hybrid - noisy_bc": ("noisy_hybrid", "noisy_bc")}
SAME = ("total_training_steps", "label_budget", "batch_size", "learning_rate", "obs_height", "obs_width")


def load_runs(folder: Path) -> dict[str, dict[int, dict]]:
    """arm -> training seed -> arguments and evaluation."""
    arms = {}
    for path in sorted(folder.glob("*/eval.json")):
        args = json.loads(path.with_name("args.json").read_text())
        provenance = json.loads(path.with_name("provenance.json").read_text())
        run = json.loads(path.read_text()) | {"args": args, "provenance": provenance}
        if args["seed"] in arms.setdefault(args["exp_name"], {}):
            raise SystemExit(f"{folder} holds two runs of {args['exp_name']} with seed {args['seed']}. Remove one.")
        arms[args["exp_name"]][args["seed"]] = run
    if "quick" not in arms:
        raise SystemExit(f"{folder} holds no finished run named quick, expected those of bc_pokemon.sh")
    return arms


def paired(arms: dict, one: str, other: str, value: str) -> dict:
    """Mean difference over training and evaluation seeds, and its bootstrap interval of 95 %."""
    seeds = sorted(set(arms[one]) & set(arms[other]))
    for name in SAME:
        for seed in seeds:
            first, second = (arms[arm][seed]["args"][name] for arm in (one, other))
            if first != second:
                raise SystemExit(f"{one} and {other} differ in {name}: {first} and {second}")

    def results(arm: str) -> np.ndarray:  # (training seeds, evaluation seeds)
        return np.array([[float(e[value]) for e in arms[arm][seed]["episodes"]["policy"]] for seed in seeds])

    difference, rng = results(one) - results(other), np.random.default_rng(0)
    S, N = difference.shape
    draws = [difference[rng.integers(S, size=S)][:, rng.integers(N, size=N)].mean() for _ in range(10_000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    row = {"mean": float(difference.mean()), "low": float(low), "high": float(high)}
    return row | {"training_seeds": seeds, "episodes": N}


def cell(values: list[float]) -> str:
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def markdown(arms: dict, differences: dict) -> str:
    quick = next(iter(arms["quick"].values()))
    lines = ["| player of the quick run | success, 95 % | return, 95 % | length |", "|---|---|---|---|"]
    for name, summary in quick["summaries"].items():
        lines.append(
            f"| {name} | {cell(summary['success'])} | {cell(summary['return'])} | {summary['length'][0]:.0f} |"
        )
    lines += ["", "| arm, seed | accuracy | success, 95 % | return, 95 % |", "|---|---|---|---|"]
    for arm, runs in arms.items():
        for seed, run in sorted(runs.items()):
            cells = [f"{run['metrics'].get('eval/accuracy', float('nan')):.3f}"]
            cells += [cell(run["summaries"]["policy"][key]) for key in ("success", "return")]
            lines.append(f"| {arm}, {seed} | {' | '.join(cells)} |")
    lines += ["", "| paired difference | success, 95 % | return, 95 % |", "|---|---|---|"]
    for name, row in differences.items():
        cells = [f"{d['mean']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})" for d in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(arms: dict, path: Path):
    """How far everyone of the quick run gets, and the success of every arm."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    far, rates = figure.subplots(1, 2, width_ratios=[2, 1])
    summaries = next(iter(arms["quick"].values()))["summaries"]
    reached = list(dict.fromkeys(m for name in ("expert", *summaries) for m in summaries[name]["milestones"]))
    for name, summary in summaries.items():
        far.plot([summary["milestones"].get(m, [0.0])[0] for m in reached], "o-", markersize=3, label=name)
    labels = [milestone.replace("_", " ").lower() for milestone in reached]
    far.set_xticks(range(len(reached)), labels, rotation=55, ha="right", fontsize=7)
    far.set(title="share of episodes that reach a milestone", ylim=(-0.02, 1.02))
    far.legend(fontsize=8)
    names = [f"{arm}, {seed}" for arm, runs in arms.items() for seed in sorted(runs)]
    rows = [runs[seed]["summaries"]["policy"]["success"] for runs in arms.values() for seed in sorted(runs)]
    mean, low, high = np.array(rows).T
    rates.barh(names, mean, xerr=[mean - low, high - mean], capsize=3)
    rates.invert_yaxis()
    rates.set(title="success by argmax, 95 %", xlim=(0, 1.02))
    figure.savefig(path, dpi=100)


def main(folder: Path, results: Path, picture: Path):
    arms = load_runs(folder)
    differences = {
        name: {value: paired(arms, *pair, value) for value in ("success", "return")}
        for name, pair in DIFFERENCES.items()
        if all(arm in arms for arm in pair)
    }
    quick = next(iter(arms["quick"].values()))
    facts = {name: quick["provenance"][name] for name in ("commit", "dirty", "torch", "cpu_capability", "threads")}
    places = ("expert_data_dir", "run_root", "model_dir", "cache_dir")
    settings = {name: value for name, value in quick["args"].items() if name not in places}
    facts |= {"command": "benchmarks/train/bc_pokemon.sh", "args": settings}
    facts["runs"] = {
        f"{arm}, {seed}": {
            "commit": run["provenance"]["commit"],
            "dirty": run["provenance"]["dirty"],
            "metrics": run["metrics"],
            "summaries": run["summaries"],
        }
        for arm, runs in arms.items()
        for seed, run in sorted(runs.items())
    }
    times = folder.parent / "seconds.txt"
    if times.exists():  # of the arms, two at a time but for the first
        facts["seconds"] = dict(line.rstrip(" s").split(": ") for line in times.read_text().splitlines())
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(facts | {"differences": differences}, indent=1) + "\n")
    plot(arms, picture)
    print(markdown(arms, differences))
    print(f"\n{results}  {picture}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
