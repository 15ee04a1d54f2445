"""The tables of docs/controls_transformer.md from the runs of controls_transformer.sh, with what has to hold.

    python benchmarks/train/controls_transformer_summary.py <output folder of controls_transformer.sh> <results.json>

Players are those of eval.json: teacher_forced at the threshold 0.5; tuned, no_history, free_running, do_nothing and
repeat_last at the thresholds tuned on the validation sessions. `fresh` is the policy on sessions that played no part in
training, in choosing the epoch or in tuning thresholds. The best reachable score is that of the filter in
benchmarks/make_control_sessions.py, its thresholds tuned on the very sessions that score it.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.make_control_sessions import score_sessions  # noqa: E402
from controls_transformer import load_session  # noqa: E402
from motion_controls.metrics import baseline_outputs, control_metrics, outputs_of  # noqa: E402

SHOWN = {
    "score": "score",
    "avg_action_f1": "action F1",
    "look_mse": "look MSE",
    "hotbar_accuracy": "hotbar",
    "cursor_mse": "cursor MSE",
    "avg_inv_f1": "click F1",
    "idle_accuracy": "idle",
    "change_f1": "change F1",
    "event_f1": "event F1",
    "event_f1_in_time": "in time",
}
HEADS = {
    "avg_action_f1": 1,
    "look_mse": -1,
    "hotbar_accuracy": 1,
    "cursor_mse": -1,
    "avg_inv_f1": 1,
}  # 1: more is better
POLICY = ("free_running", "tuned", "no_history", "given_out")
BASELINES = ("repeat_last", "do_nothing", "always_on", "random")


def load_runs(folder: Path) -> dict[str, dict]:
    """Form of the loss -> arguments, provenance, split and evaluation of its run."""
    runs = {}
    for path in sorted(folder.glob("*/eval.json")):
        names = ("args", "provenance", "split")
        run = {name: json.loads(path.with_name(f"{name}.json").read_text()) for name in names}
        norm = run["args"]["loss_norm"]
        if norm in runs:
            raise SystemExit(f"{folder} holds two runs with --loss-norm {norm}. Remove one.")
        runs[norm] = run | {"metrics": json.loads(path.read_text())["metrics"]}
    if not runs:
        raise SystemExit(f"{folder} holds no finished run, expected those of controls_transformer.sh")
    first, *others = runs.values()
    differ = ("exp_name", "loss_norm", "model_dir")
    for run in others:
        for name, value in first["args"].items():
            if name not in differ and run["args"][name] != value:
                raise SystemExit(f"the runs in {folder} differ in {name}: {value} and {run['args'][name]}")
        if run["split"]["val"] != first["split"]["val"]:
            raise SystemExit(f"the runs in {folder} were validated on different sessions")
    return runs


def fresh_metrics(folder: Path, norm: str) -> dict[str, dict]:
    """The policy of --loss-norm `norm` and the baselines on the sessions of `folder`/fresh, from its replays."""
    thresholds = json.loads((folder / "models" / norm / "control_config.json").read_text())["thresholds"]
    thresholds = np.array(list(thresholds.values()))
    sessions, outputs = [], []
    for path in sorted((folder / "fresh").glob("session_*.npz")):
        replays = list((folder / "replays" / norm).glob(f"replay_{path.stem}__*/predictions.npz"))
        if len(replays) != 1:
            raise SystemExit(f"{folder}/replays/{norm} holds {len(replays)} replays of {path.stem}, expected one")
        sessions.append(load_session(path))
        with np.load(replays[0], allow_pickle=False) as file:
            outputs.append({name: file[name] for name in ("probs", "look", "hotbar", "cursor", "inv", "controls")})
    together = {name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]}
    given_out = outputs_of(together.pop("controls"))
    controls, state = (np.concatenate([session[name] for session in sessions]) for name in ("controls", "game_state"))
    begins = np.concatenate([np.arange(len(session["frames"])) == 0 for session in sessions])
    before = np.roll(controls, 1, axis=0) * ~begins[:, None]
    players = {"fresh": together, "given_out": given_out} | baseline_outputs(controls, before)
    metrics = {
        player: control_metrics(x, controls, state, thresholds[:12], thresholds[12:], begins)
        for player, x in players.items()
    }
    metrics["fresh"]["score_interval"] = score_interval(together, controls, state, thresholds)
    return metrics


def score_interval(outputs: dict, controls, state, thresholds, block: int = 150, times: int = 500) -> list[float]:
    """95 % interval of the score by drawing blocks of 5 seconds, (N, ...) arrays of rows that lie end to end."""
    blocks = np.arange(len(controls) // block * block).reshape(-1, block)
    rng, scores = np.random.default_rng(0), []
    for _ in range(times):
        rows = blocks[rng.integers(len(blocks), size=len(blocks))].ravel()
        drawn = {name: array[rows] for name, array in outputs.items()}
        everywhere = np.ones(len(rows), bool)  # no events: blocks do not follow each other
        rest = controls[rows], state[rows], thresholds[:12], thresholds[12:], everywhere
        scores.append(control_metrics(drawn, *rest)["score"])
    return np.percentile(scores, [2.5, 97.5]).tolist()


def demands(metrics: dict[str, dict], fresh: dict[str, dict], reachable: dict[str, dict]) -> dict[str, dict]:
    """What has to hold -> the figure, the limit and whether it holds. `metrics` of the players on the validation
    sessions, `fresh` of those of `fresh_metrics`, `reachable`: the best reachable ones on both."""
    tuned, free = metrics["tuned"], metrics["free_running"]
    rows = {"score lost by running free": (tuned["score"] - free["score"], 0.1, -1)}
    places = {"validation": (metrics, {"tuned": tuned, "free": free}), "fresh": (fresh, {"fresh": fresh["fresh"]})}
    for place, (beside, players) in places.items():
        nothing, last, best = beside["do_nothing"], beside["repeat_last"], reachable[place]
        rows[f"best reachable, {place}"] = (best["score"], 0.85, 1)
        rows[f"do nothing, {place}"] = (nothing["score"], 0.55, -1)
        for name, player in players.items():
            rows[f"idle accuracy, {name}"] = (player["idle_accuracy"], 0.95, 1)
            rows[f"score / best reachable, {name}"] = (player["score"] / best["score"], 0.9, 1)
            room = best["score"] - nothing["score"]
            rows[f"share of the room above doing nothing, {name}"] = (
                (player["score"] - nothing["score"]) / room,
                0.8,
                1,
            )
            for head, sign in HEADS.items():
                if nothing[head] == 0 and sign < 0:  # no such frame in these sessions
                    continue
                rows[f"{SHOWN[head]}, {name}, against doing nothing"] = (player[head], nothing[head], sign)
            for event in ("change_f1", "event_f1_in_time"):  # on both repeating the last gets 0, as it is always late
                rows[f"{SHOWN[event]}, {name}, against repeating the last"] = (player[event], last[event], 1)
            rows[f"event F1 / best reachable, {name}"] = (player["event_f1"] / best["event_f1"], 0.8, 1)
    checks = {}
    for name, (figure, limit, sign) in rows.items():
        better = sign * (figure - limit)
        holds = better > 0 if "against" in name else better >= 0
        checks[name] = {"figure": figure, "limit": limit, "holds": bool(holds)}
    return checks


def table(players: dict[str, dict]) -> list[str]:
    lines = [f"| player | {' | '.join(SHOWN.values())} |", "|---" * (1 + len(SHOWN)) + "|"]
    return lines + [f"| {name} | {' | '.join(f'{m[key]:.3f}' for key in SHOWN)} |" for name, m in players.items()]


def markdown(runs: dict[str, dict], reachable: dict[str, dict], best: str, checks: dict) -> str:
    norms = sorted(runs, key=lambda norm: norm != best)
    validation, fresh = {"best reachable": reachable["validation"]}, {"best reachable": reachable["fresh"]}
    for norm in norms:
        validation |= {f"{player}, {norm}": runs[norm]["metrics"][player] for player in POLICY}
        fresh |= {
            f"policy, {norm}": runs[norm]["fresh"]["fresh"],
            f"given out, {norm}": runs[norm]["fresh"]["given_out"],
        }
    validation |= {player: runs[best]["metrics"][player] for player in BASELINES}
    fresh |= {player: runs[best]["fresh"][player] for player in BASELINES}
    lines = ["fresh persons", "", *table(fresh), "", "validation sessions", "", *table(validation)]
    lines += ["", f"| has to hold, --loss-norm {best} | figure | limit | |", "|---|---|---|---|"]
    for name, row in checks.items():
        lines.append(f"| {name} | {row['figure']:.3f} | {row['limit']:.3f} | {'yes' if row['holds'] else 'no'} |")
    return "\n".join(lines)


def main(folder: Path, results: Path):
    runs = load_runs(folder / "runs")
    for norm, run in runs.items():
        run["fresh"] = fresh_metrics(folder, norm)
    best = max(runs, key=lambda norm: runs[norm]["metrics"]["free_running"]["score"])
    run = runs[best]
    heldout = tuple(sorted(run["split"]["val"]))
    reachable = {"validation": score_sessions(folder / "recordings", heldout)["best_reachable"]}
    reachable["fresh"] = score_sessions(folder / "fresh")["best_reachable"]
    checks = demands(run["metrics"], run["fresh"], reachable)
    facts = {name: run["provenance"][name] for name in ("commit", "dirty", "torch", "cpu_capability", "threads")}
    places = ("recordings_dir", "run_root", "model_dir", "model", "exp_name", "loss_norm")
    settings = {name: value for name, value in run["args"].items() if name not in places}
    facts |= {"command": "benchmarks/train/controls_transformer.sh", "args": settings, "validation": heldout}
    times = folder / "seconds.txt"
    if times.exists():
        facts["seconds"] = dict(line.rstrip(" s").split(": ") for line in times.read_text().splitlines())
    facts |= {"best_loss_norm": best, "demands": checks, "best_reachable": reachable}
    facts["runs"] = {norm: one["metrics"] for norm, one in runs.items()}
    facts["fresh"] = {norm: one["fresh"] for norm, one in runs.items()}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(facts, indent=1) + "\n")
    print(markdown(runs, reachable, best, checks))
    print(f"\n{results}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
