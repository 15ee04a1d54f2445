"""The tables of docs/agent_finetune.md from the runs of agent.sh, with what has to hold.

    python benchmarks/train/agent_summary.py <output folder of agent.sh> <results.json>

`packed` is trained on the frames of the documented command, `imagine` dreams on from it, `sample` is trained on
sample_packed alone; what other names dream on from `packed` are ablations. Each is evaluated on the held-out episodes
of its own data; all play the same seeds. Intervals are of 95 %, over resampled games, or contexts of dreams. Writes
docs/agent_finetune_open_loop.png, too, where the results go into the tree.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import runs  # noqa: E402
from retro_env.play import interval  # noqa: E402

SHOWN = {  # what is shown beside its floor
    "foreground of encoded frames, dB": ("psnr_foreground", "psnr_foreground_mean_frame"),
    "policy, nats": ("policy_nll", "policy_nll_markov"),
    "accuracy where the action changes": ("change_accuracy_not_last", "change_accuracy_markov"),
    "AUC of gains": ("reward_auc", None),
    "AUC of losses": ("reward_auc_loss", None),
    "AUC of the end": ("cont_auc", None),
}
ABLATIONS = ("lambda", "horizon", "beta", "noise", "sign")
WAYS = {"greedy": "likeliest", "sampled": "drawn"}


def load_run(folder: Path, name: str) -> dict:
    """Evaluation and provenance of a run, and the games of the run that plays, if there is one."""
    paths = sorted((folder / "runs").glob(f"*__{name}__*/eval.json"))
    if len(paths) != 1:
        raise SystemExit(f"{folder}/runs holds {len(paths)} finished runs of {name}, expected those of agent.sh")
    run = json.loads(paths[0].read_text()) | {"folder": paths[0].parent}
    ends = [path.stat().st_mtime for path in paths[0].parent.glob("*.pt")]
    run["minutes"] = (max(ends) - paths[0].with_name("args.json").stat().st_mtime) / 60  # of training
    run["provenance"] = json.loads(paths[0].with_name("provenance.json").read_text())
    run["provenance"]["command"] = [part.replace(str(folder), "build/agent") for part in run["provenance"]["command"]]
    games = sorted((folder / "runs").glob(f"*__{name}_play__*/eval.json"))
    if not games:
        return run
    again = json.loads(games[-1].read_text())
    play, dreams = again["play"], {"dreams": again["dreams"]} if "dreams" in again else {}  # of one horizon and noise
    scores = {player: [game["score"] for game in mine] for player, mine in play.pop("games").items()}
    return run | dreams | {"play": play | {"scores": scores}}


def agent_holds(run: dict) -> dict[str, bool]:
    """The bars of the first three phases, by what they say."""
    metrics = {key.removeprefix("eval/"): value for key, value in run["metrics"].items()}
    table = run["open_loop"]
    at, held = {h: i for i, h in enumerate(table["horizons"])}, {}
    for h in (2, 4, 8):
        ahead = min(table["latent_mse_one_step"][at[h]], table["latent_mse_mean_of_4"][at[h]])
        held[f"latents {h} ahead below hold-last"] = ahead < table["latent_mse_hold_last"][at[h]]
    for h in (4, 8):
        front = "psnr_foreground_one_step", "psnr_foreground_hold_last"
        held[f"foreground {h} ahead above hold-last"] = table[front[0]][at[h]] > table[front[1]][at[h]]
    ratio = metrics["action_shuffle_ratio"]
    held |= {"shuffled actions 1.05 times the error": ratio >= 1.05, "and 1.1 times": ratio >= 1.1}
    held["policy below P(a | last a)"] = metrics["policy_nll"] < metrics["policy_nll_markov"]
    changes = "changes above P(a | a is not the last)"
    held[changes] = metrics["change_accuracy_not_last"] > metrics["change_accuracy_markov"]
    held["AUC of gains above 0.9"] = metrics["reward_auc"] > 0.9
    held["trained within 20 minutes"] = run["minutes"] <= 20
    return held | beats_random(run["play"]["score"])


def beats_random(score: dict) -> dict[str, bool]:
    return {
        f"{word} actions beat random, intervals apart": score[way][1] > score["random"][2] for way, word in WAYS.items()
    }


def imagine_holds(run: dict) -> dict[str, bool]:
    """The bars of the imagination."""
    held = {"dreams pay more than those of the prior": run["dreams"]["gain"][1] > 0}
    held |= {"KL below 1 nat": run["dreams"]["kl"] < 1, "within 10 minutes more": run["minutes"] <= 10}
    for way, word in WAYS.items():
        low, before = run["play"]["minus_bc"][way][1], run["play"]["score"][f"bc_{way}"][0]
        held[f"{word} actions above -10 % of BC"] = low > -0.1 * before
        held[f"and above BC ({word})"] = low > 0
    return held


def add_differences(play: dict, scores: dict):
    """What is missing in `play` of an ablation: its differences to the policy before, in `scores` on the same seeds."""
    for way in WAYS:
        play["minus_bc"][way] = interval(np.array(play["scores"][way]) - scores[f"bc_{way}"])


def print_agent(run: dict):
    print("| | | floor |\n|---|---|---|")
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


def print_play(play: dict):
    print("\n| player | score | 95 % |\n|---|---|---|")
    for player, (mean, low, high) in play["score"].items():
        print(f"| {player} | {mean:.0f} | {low:.0f} to {high:.0f} |")
    for way, (mean, low, high) in play["minus_bc"].items():
        print(f"| {way} - bc_{way} | {mean:+.0f} | {low:+.0f} to {high:+.0f} |")


def main(folder: Path, results: Path):
    seconds = dict(line.split(": ") for line in (folder / "seconds.txt").read_text().splitlines())
    seconds = {name: int(spent.split()[0]) for name, spent in seconds.items()}
    names = ("packed", "sample", "imagine", *ABLATIONS)  # those that ran
    found = {name: load_run(folder, name) for name in names if list((folder / "runs").glob(f"*__{name}__*/eval.json"))}
    bars = {"packed": agent_holds, "imagine": imagine_holds, "sample": lambda run: beats_random(run["play"]["score"])}
    for name in (name for name in found if name in bars):
        run = found[name]
        run["holds"] = bars[name](run)
        print(f"\n**{name}**, {run['minutes']:.1f} minutes of training\n")
        if name != "imagine":
            print_agent(run)
        print_play(run["play"])
        print()
        for bar, holds in run["holds"].items():
            print(f"{bar}: {'holds' if holds else 'MISSED'}")
    dreamt = [name for name in found if "dreams" in found[name]]
    if dreamt:
        print("\n| dreams | gain in return | KL | likeliest - BC | drawn - BC |\n|---|---|---|---|---|")
    for name in dreamt:
        if name in ABLATIONS and "imagine" in found:
            add_differences(found[name]["play"], found["imagine"]["play"]["scores"])
        dreams, minus = found[name]["dreams"], found[name]["play"]["minus_bc"]
        cells = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in [dreams["gain"]]]
        cells += [f"{dreams['kl']:.2f}"]
        cells += [f"{mean:+.0f} ({low:+.0f} to {high:+.0f})" for mean, low, high in minus.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    if "packed" in found and ROOT in results.resolve().parents:
        picture = Image.open(found["packed"]["folder"] / "open_loop.png").convert("RGB").quantize(64)
        picture.save(ROOT / "docs" / "agent_finetune_open_loop.png", optimize=True)
    for run in found.values():
        del run["folder"]
    results.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(results, {"seconds": seconds} | found)
    print(f"\nwritten: {results}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
