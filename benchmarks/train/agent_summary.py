"""The tables of docs/agent_finetune.md from the runs of agent.sh, with what has to hold.

    python benchmarks/train/agent_summary.py <output folder of agent.sh> <results.json>

`packed` is trained on the frames of the documented command, `sample` on sample_packed alone; each is evaluated on the
held-out episodes of its own data, and plays the same seeds. Intervals are of 95 %, over resampled games.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import runs  # noqa: E402

SHOWN = {  # what is shown beside its floor
    "foreground of encoded frames, dB": ("psnr_foreground", "psnr_foreground_mean_frame"),
    "policy, nats": ("policy_nll", "policy_nll_markov"),
    "accuracy where the action changes": ("change_accuracy_not_last", "change_accuracy_markov"),
    "AUC of gains": ("reward_auc", None),
    "AUC of losses": ("reward_auc_loss", None),
    "AUC of the end": ("cont_auc", None),
}


def load_run(folder: Path, name: str) -> dict:
    """Evaluation and provenance of the training run, and the games of the run that plays."""
    found, provenance = {}, {}
    for part in (name, f"{name}_play"):
        paths = sorted((folder / "runs").glob(f"*__{part}__*/eval.json"))
        if len(paths) != 1:
            raise SystemExit(f"{folder}/runs holds {len(paths)} finished runs of {part}, expected those of agent.sh")
        found[part] = json.loads(paths[0].read_text())
        provenance[part] = json.loads(paths[0].with_name("provenance.json").read_text())
    return found[name] | {"play": found[f"{name}_play"]["play"], "provenance": provenance[name]}


def what_holds(name: str, run: dict, minutes: float) -> dict[str, bool]:
    """The bars, by what they say."""
    metrics = {key.removeprefix("eval/"): value for key, value in run["metrics"].items()}
    score = run["play"]["score"]
    ways = {"greedy": "likeliest", "sampled": "drawn"}
    held = {
        f"{word} actions beat random, intervals apart": score[way][1] > score["random"][2] for way, word in ways.items()
    }
    if name == "sample":
        return held
    table = run["open_loop"]
    at = {h: i for i, h in enumerate(table["horizons"])}
    for h in (2, 4, 8):
        ahead = min(table["latent_mse_one_step"][at[h]], table["latent_mse_mean_of_4"][at[h]])
        held[f"latents {h} ahead below hold-last"] = ahead < table["latent_mse_hold_last"][at[h]]
    for h in (4, 8):
        front = "psnr_foreground_one_step", "psnr_foreground_hold_last"
        held[f"foreground {h} ahead above hold-last"] = table[front[0]][at[h]] > table[front[1]][at[h]]
    ratio = metrics["action_shuffle_ratio"]
    held |= {"shuffled actions 1.05 times the error": ratio >= 1.05, "and 1.1 times": ratio >= 1.1}
    held["policy below P(a | last a)"] = metrics["policy_nll"] < metrics["policy_nll_markov"]
    held["changes above P(a | a is not the last)"] = (
        metrics["change_accuracy_not_last"] > metrics["change_accuracy_markov"]
    )
    held["AUC of gains above 0.9"] = metrics["reward_auc"] > 0.9
    held["trained within 20 minutes"] = minutes <= 20
    return held


def main(folder: Path, results: Path):
    seconds = dict(line.split(": ") for line in (folder / "seconds.txt").read_text().splitlines())
    seconds = {name: int(spent.split()[0]) for name, spent in seconds.items()}
    found = {"seconds": seconds}
    for name in ("packed", "sample"):
        run = load_run(folder, name)
        held = what_holds(name, run, seconds[name] / 60)
        play = {key: value for key, value in run["play"].items() if key != "games"}
        games = {player: [game["score"] for game in mine] for player, mine in run["play"]["games"].items()}
        found[name] = {key: run[key] for key in ("metrics", "open_loop", "agent", "provenance")}
        found[name] |= {"play": play | {"scores": games}, "holds": held}
        print(f"\n**{name}**, {seconds[name] / 60:.1f} minutes of training\n\n| | | floor |\n|---|---|---|")
        for what, (key, floor) in SHOWN.items():
            beside = run["metrics"][f"eval/{floor}"] if floor else 0.5
            print(f"| {what} | {run['metrics'][f'eval/{key}']:.3f} | {beside:.3f} |")
        table = run["open_loop"]
        print("\n| frames ahead |" + "".join(f" {h} |" for h in table["horizons"]))
        print("|---|" + "---|" * len(table["horizons"]))
        for way, row in table.items():
            if isinstance(row, list) and way != "horizons":
                digits = 3 if "mse" in way else 1
                print(f"| {way.replace('_', ' ')} |" + "".join(f" {x:.{digits}f} |" for x in row))
        print("\n| player | score | 95 % |\n|---|---|---|")
        for player, (mean, low, high) in run["play"]["score"].items():
            print(f"| {player} | {mean:.0f} | {low:.0f} to {high:.0f} |")
        print()
        for bar, holds in held.items():
            print(f"{bar}: {'holds' if holds else 'MISSED'}")
    results.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(results, found)
    print(f"\nwritten: {results}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
