"""How well events that were found agree with those that the game reported, and what their errors do to the returns.

precompute_labels.py hands over a `Compared` per session; the page is docs/precompute_labels.md, "Agreement with the
game". Nothing here searches a video: curves over thresholds come from what detections.parquet has kept.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from scipy.stats import binomtest, spearmanr

from common.sessions import EPISODES, EVENTS, RETURNS, TRUTH, read_table, write_table

TRUE_NAMES = {"DEATH": "death", "ATTACK": "squish", "WIN": "win"}  # what truth.parquet calls them
TOLERANCE_S = {"DEATH": 0.5, "ATTACK": 0.3, "WIN": 0.5}  # an event this close to a true one has found it
CAUSES = ("DEATH by falling", "DEATH otherwise")  # known of true deaths only, so they have no precision
ROWS = ("DEATH", *CAUSES, "ATTACK", "WIN")
SEARCHED = ("DEATH", "ATTACK")  # found by a score, so there is a threshold to vary
NOTABLE = 0.05  # a return so far off is drawn in red
PIT = 16  # pixels; who dies so far below the deepest place on which Tux stood fell into a pit

REPORT = pa.schema(
    [
        ("session", pa.string()),  # all, or the name of one
        ("event", pa.string()),  # one of ROWS, or RETURN
        ("size", pa.string()),  # of the recording, such as 640x480, or all
        ("metric", pa.string()),
        ("value", pa.float64()),  # null where it has none
        ("low", pa.float64()),  # Wilson's 95 % interval of precision and recall, else null
        ("high", pa.float64()),
    ]
)
CURVES = pa.schema(
    [("event", pa.string()), ("threshold", pa.float64())]
    + [(name, pa.int64()) for name in ("true", "found", "hits")]
    + [(f"{name}{end}", pa.float64()) for name in ("precision", "recall") for end in ("", "_low", "_high")]
    + [("f1", pa.float64())]
)


@dataclass
class Thresholds:
    """What a session's detections of T sprites tell of other thresholds than the chosen ones."""

    events: list[str]  # T, of SEARCHED
    chosen: np.ndarray  # (T,)
    kept: list[float]  # T, the lowest that they can tell of
    find_at: Callable[[str, float], list[int]]  # event, threshold -> frames


@dataclass
class Compared:
    """A labelled session beside what the game reported of it. N frames."""

    name: str
    size: str  # such as 640x480
    times: np.ndarray  # (N,) ms
    found: dict[str, list[int]]  # frames, by event
    true: dict[str, np.ndarray]  # ms, by event
    fell: np.ndarray | None  # (true deaths,) bool, None where the truth does not tell
    labels: tuple[list[dict], dict]  # rows of EPISODES and columns of RETURNS, of what was found
    true_labels: tuple[list[dict], dict]  # of what is true
    thresholds: Thresholds | None  # None without detections


# What the game reported -----------------------------------------------------------------------------------------------
def check_name(name: str, folders: list[Path]):
    """Raise ValueError unless `name` is that of a parquet file, and a session has it."""
    if Path(name).name != name or Path(name).suffix != ".parquet":
        raise ValueError(f"--truth {name}: expected the name of a file in each session, such as truth.parquet")
    if not any(is_there(folder / name) for folder in folders):
        raise ValueError(
            f"--truth {name}: none of {len(folders)} sessions has this file. Recordings of scripted players have "
            "truth.parquet; leave the flag out to label others"
        )


def is_there(path: Path) -> bool:
    """Whether a session has that file, or its older form."""
    return path.exists() or path.with_suffix(".jsonl").exists()


def read_truth(path: Path, times: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """What happened within frame `times` (N,): ms by event, and which deaths were falls (None where nothing tells)."""
    rows = [row for row in read_table(path, TRUTH).to_pylist() if times[0] <= row["timestamp"] <= times[-1]]
    rows.sort(key=lambda row: row["timestamp"])
    true = {
        event: np.array([row["timestamp"] for row in rows if row["what"] == name], np.int64)
        for event, name in TRUE_NAMES.items()
    }
    return true, falls(rows)


def falls(rows: list[dict]) -> np.ndarray | None:
    """Which deaths (D,) lie deeper than all ground that Tux stood on; None where the truth has no places.

    The game gives no cause. Its rows tell places: pos is x, y, vx, vy and death is x, y, with y downwards.
    """
    try:
        places, deaths = (
            np.array([row["data"].split() for row in rows if row["what"] == what], float).reshape(-1, n)
            for what, n in (("pos", 4), ("death", 2))
        )
    except (ValueError, AttributeError):  # other words, or none
        return None
    ground = places[places[:, 3] == 0, 1]
    complete = len(deaths) == sum(row["what"] == "death" for row in rows)
    return deaths[:, 1] > ground.max() + PIT if complete and len(ground) else None


def true_frames(true: dict[str, np.ndarray], times: np.ndarray) -> list[tuple[int, str]]:
    """True events as (frame, event), on the frames where they should be found: the first that can show a death or a
    squished enemy, the last before a win."""
    events = []
    for event, moments in true.items():
        frames = np.searchsorted(times, moments, "right") - 1 if event == "WIN" else np.searchsorted(times, moments)
        events += [(int(frame), event) for frame in frames]
    return sorted(events)


def compare(
    name: str,
    size: str,
    path: Path,
    times: np.ndarray,
    label: Callable[[list[tuple[int, str]], np.ndarray], tuple[list[dict], dict]],
    thresholds: Thresholds | None,
) -> Compared:
    """The labels beside the file of truth `path`; `label` makes episodes and returns from events and `times`."""
    true, fell = read_truth(path, times)
    events = read_table(path.with_name("events.parquet"), EVENTS).to_pylist()
    found = {event: [row["frame_idx"] for row in events if row["event"] == event] for event in TRUE_NAMES}
    returns = read_table(path.with_name("returns.parquet"), RETURNS).to_pydict()
    labels = read_table(path.with_name("episodes.parquet"), EPISODES).to_pylist(), returns
    return Compared(name, size, times, found, true, fell, labels, label(true_frames(true, times), times), thresholds)


# Figures --------------------------------------------------------------------------------------------------------------
def match(found: np.ndarray, true: np.ndarray, tolerance_s: float) -> list[tuple[int, int]]:
    """Pairs (i, j) of `found` and `true` times (ms, ascending), one to one, in order, within `tolerance_s`."""
    pairs, i, j = [], 0, 0
    while i < len(found) and j < len(true):
        offset = int(found[i] - true[j])
        if abs(offset) <= tolerance_s * 1000:
            pairs.append((i, j))
        i, j = i + (offset <= tolerance_s * 1000), j + (offset >= -tolerance_s * 1000)
    return pairs


def compare_with_truth(found: np.ndarray, true: np.ndarray, tolerance_s: float) -> dict:
    """Counts of `found` and `true` times (ms) and of those that match; offsets are found - true."""
    found, true = np.sort(found), np.sort(true)
    offsets = [int(found[i] - true[j]) for i, j in match(found, true, tolerance_s)]
    return {"truth": len(true), "found": len(found), "hits": len(offsets), "offsets_ms": offsets}


def compare_events(session: Compared) -> dict[str, dict]:
    """`compare_with_truth` of each event, and of the deaths by cause where it is known; found are then those alone."""
    results = {}
    for event, frames in session.found.items():
        found, true = np.sort(session.times[frames]), session.true[event]
        results[event] = compare_with_truth(found, true, TOLERANCE_S[event])
        if event == "DEATH" and session.fell is not None:
            pairs = match(found, true, TOLERANCE_S[event])
            for cause, those in zip(CAUSES, (session.fell, ~session.fell), strict=True):
                offsets = [int(found[i] - true[j]) for i, j in pairs if those[j]]
                counts = {"truth": int(those.sum()), "found": len(offsets), "hits": len(offsets)}
                results[cause] = counts | {"offsets_ms": offsets}
    return results


def add_up(parts: list[dict]) -> dict:
    """Several results of `compare_with_truth` as one."""
    total = {"truth": 0, "found": 0, "hits": 0, "offsets_ms": []}
    return {key: sum((part[key] for part in parts), start) for key, start in total.items()}


def rate(hits: int, n: int) -> tuple:
    """`hits` of `n` with Wilson's 95 % interval, None three times of nothing."""
    if n == 0:
        return None, None, None
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return hits / n, interval.low, interval.high


def scores(event: str, part: dict) -> dict[str, tuple]:
    """Metrics of a result of `compare_with_truth`, each as (value, low, high). Errors are absolute, the bias is the
    mean of found - true."""
    true, found, hits, errors = part["truth"], part["found"], part["hits"], np.abs(part["offsets_ms"])
    metrics = {"true": true, "found": found, "hits": hits}
    if event not in CAUSES:
        metrics |= {"precision": rate(hits, found), "f1": 2 * hits / (true + found) if true + found else None}
    metrics["recall"] = rate(hits, true)
    if hits:
        metrics |= {
            "error_median_ms": np.median(errors),
            "error_p95_ms": np.percentile(errors, 95),
            "error_max_ms": errors.max(),
            "error_bias_ms": np.mean(part["offsets_ms"]),
        }
    return {name: value if isinstance(value, tuple) else (value, None, None) for name, value in metrics.items()}


def of_sprites(sessions: list[Compared], event: str, what: str) -> set[float]:
    """The chosen or kept thresholds, as `what` says, of all sprites of an event in those `sessions` that have any."""
    known = [session.thresholds for session in sessions if session.thresholds is not None]
    return {
        float(x) for those in known for its, x in zip(those.events, getattr(those, what), strict=True) if its == event
    }


def threshold_curve(sessions: list[Compared], event: str) -> list[dict]:
    """Rows of CURVES: what would be found from the lowest score that all sessions have kept, up to 1."""
    sessions = [session for session in sessions if session.thresholds is not None]
    if not of_sprites(sessions, event, "kept"):
        return []
    least = max(of_sprites(sessions, event, "kept"))
    grid = {least} | {k / 100 for k in range(math.ceil(least * 100), 101)} | of_sprites(sessions, event, "chosen")
    rows = []
    for threshold in sorted(x for x in grid if x >= least):
        parts = []
        for session in sessions:
            found = session.times[session.thresholds.find_at(event, threshold)]
            parts.append(compare_with_truth(found, session.true[event], TOLERANCE_S[event]))
        metrics = scores(event, add_up(parts))
        row = {"event": event, "threshold": threshold, "f1": metrics["f1"][0]}
        row |= {name: metrics[name][0] for name in ("true", "found", "hits")}
        for name in ("precision", "recall"):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), metrics[name], strict=True))
        rows.append(row)
    return rows


def returns_of_both(session: Compared) -> np.ndarray:
    """Returns (2, n) of the n frames that are in an episode by what was found and by what is true."""
    found, true = session.labels[1], session.true_labels[1]
    _, i, j = np.intersect1d(found["frame_idx"], true["frame_idx"], return_indices=True)
    return np.stack([np.asarray(found["return"])[i], np.asarray(true["return"])[j]])


def membership(episodes: list[dict], n_frames: int) -> np.ndarray:
    """The outcome of the episode of each frame (N,), empty for those in none."""
    outcomes = np.full(n_frames, "", "U10")
    for episode in episodes:
        outcomes[episode["start_frame"] : episode["end_frame"] + 1] = episode["outcome"]
    return outcomes


def return_scores(sessions: list[Compared]) -> dict[str, float | None]:
    """What the errors of events do to the returns of all frames of `sessions`."""
    found, true = np.concatenate([returns_of_both(session) for session in sessions], axis=1)
    differs = np.concatenate(
        [np.not_equal(*(membership(e, len(s.times)) for e, _ in (s.labels, s.true_labels))) for s in sessions]
    )
    varied = len(found) > 1 and np.ptp(found) > 0 and np.ptp(true) > 0  # ranks exist
    return {
        "frames": len(found),
        "rank_correlation": float(spearmanr(found, true).statistic) if varied else None,
        "membership_differs": float(differs.mean()),
        "mean_abs_difference": float(np.abs(found - true).mean()) if len(found) else None,
    }


# Tables, files and the picture ----------------------------------------------------------------------------------------
def by_size(totals: dict[tuple[str, str], dict]) -> list[tuple[str, str, dict]]:
    """Event, size and result of each row of the table: the sizes of an event, then all of them added up."""
    rows = []
    for event in ROWS:
        parts = {size: part for (name, size), part in totals.items() if name == event}
        if parts:
            rows += [(event, size, part) for size, part in parts.items()]
            rows.append((event, "all", add_up(list(parts.values()))))
    return rows


def truth_table(totals: dict[tuple[str, str], dict]) -> str:
    """The comparison as a markdown table; `totals` by event and size of the recordings, all sizes added up as well."""
    head = "event | recorded at | true | found | missed | false | precision (95 %) | recall (95 %) | F1"
    lines = [f"| {head} | error: median, 95 %, largest, bias |", "|---" * 10 + "|"]
    for event, size, part in by_size(totals):
        metrics, known = scores(event, part), event not in CAUSES
        true, found, hits = part["truth"], part["found"], part["hits"]
        cells = [event, size, true, found, true - hits, found - hits if known else "-"]
        for name in ("precision", "recall"):
            value, low, high = metrics.get(name, (None, None, None))
            cells.append("-" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})")
        f1 = metrics.get("f1", (None,))[0]
        cells.append("-" if f1 is None else f"{f1:.3f}")
        errors = [metrics[f"error_{name}_ms"][0] for name in ("median", "p95", "max", "bias")] if hits else []
        cells.append("{:.0f}, {:.0f}, {:.0f}, {:+.0f} ms".format(*errors) if errors else "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def return_table(rows: dict[str, dict]) -> str:
    """`return_scores` by session as a markdown table."""
    lines = ["| session | frames | rank correlation | in another episode | mean difference |", "|---" * 5 + "|"]
    for name, row in rows.items():
        rank, difference = (
            "-" if row[key] is None else f"{row[key]:.4f}" for key in ("rank_correlation", "mean_abs_difference")
        )
        lines.append(f"| {name} | {row['frames']} | {rank} | {row['membership_differs']:.1%} | {difference} |")
    return "\n".join(lines)


def best_thresholds(curve: list[dict]) -> str:
    """Where the F1 of a curve is highest, in words."""
    best = max((row["f1"] or 0.0 for row in curve), default=0.0)
    if best == 0:
        return ""
    at = [row["threshold"] for row in curve if row["f1"] == best]
    return f"{curve[0]['event']}: the best F1 is {best:.3f}, at thresholds of {min(at):g} to {max(at):g}"


def draw(path: Path, sessions: list[Compared], totals: dict, curves: dict[str, list[dict]], rank: float | None):
    """Curves over thresholds, errors in time, and the returns as labelled over those by the truth, `rank` the
    correlation of their ranks."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    for place, event in zip(axes[0], SEARCHED, strict=False):
        draw_curve(place, event, curves[event], sorted(of_sprites(sessions, event, "chosen")))
    draw_returns(axes[0, 2], sessions, rank)
    for place, event in zip(axes[1], TRUE_NAMES, strict=True):
        draw_errors(place, event, {name: part for name, size, part in by_size(totals) if size == "all"})
    for place in axes.flat:
        place.grid(alpha=0.3)
        place.set_axisbelow(True)
        place.spines[["top", "right"]].set_visible(False)
        place.title.set_size(11)
    frames = sum(len(session.times) for session in sessions)
    figure.suptitle(f"Labels beside what the game reported: {len(sessions)} sessions, {frames:,} frames")
    figure.savefig(path, dpi=110, format="png")


def draw_curve(axes, event: str, curve: list[dict], chosen: list[float]):
    axes.set(title=f"{event}: no detections to vary the threshold on", xlabel="threshold", ylim=(-0.02, 1.04))
    if not curve:
        return
    x = [row["threshold"] for row in curve]
    columns = {name: np.array([row[name] for row in curve], float) for name in CURVES.names[2:]}  # None is NaN
    for threshold in chosen:
        axes.axvline(threshold, color="tab:red", linewidth=1.5, linestyle=":", label=f"chosen: {threshold:g}")
    axes.plot(x, columns["f1"], color="0.75", linewidth=6, label="F1")
    for name, colour, style in (("precision", "tab:blue", "-"), ("recall", "tab:orange", "--")):
        axes.plot(x, columns[name], color=colour, linestyle=style, linewidth=2, label=name)
        axes.fill_between(x, columns[f"{name}_low"], columns[f"{name}_high"], color=colour, alpha=0.15, linewidth=0)
    at = [f"{row['f1']:.3f}" for row in curve if row["threshold"] in chosen and row["f1"] is not None]
    title = f"{event}: F1 {', '.join(at) or 'unknown'} at the chosen threshold, {curve[0]['true']} true"
    axes.set(title=title, xlim=(x[0] - 0.005, x[-1] + 0.005))
    axes.legend(loc="lower center", fontsize="small")


def draw_returns(axes, sessions: list[Compared], rank: float | None):
    found, true = np.concatenate([returns_of_both(session) for session in sessions], axis=1)
    words = "no ranks" if rank is None else f"rank correlation {rank:.4f}"
    axes.set(
        title=f"Returns: {words}, {len(found):,} frames", xlabel="return by the truth", ylabel="return as labelled"
    )
    axes.axline((0, 0), slope=1, color="0.75", linewidth=6, zorder=0, label="equal")
    if len(found):
        off = np.abs(found - true) > NOTABLE
        axes.scatter(true[~off], found[~off], s=6, color="tab:blue", label=f"within {NOTABLE}: {(~off).mean():.1%}")
        axes.scatter(true[off], found[off], s=10, color="tab:red", label=f"farther off: {off.mean():.1%}")
        axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="upper left", fontsize="small")


def draw_errors(axes, event: str, parts: dict[str, dict]):
    together = parts[event]["offsets_ms"]
    axes.set(title=f"{event}: none matched", xlabel="found - true, ms", ylabel="events")
    if not together:
        return
    names = [name for name in CAUSES if event == "DEATH" and name in parts] or [event]
    bins = np.arange(10 * (min(together) // 10), max(together) + 20, 10)
    offsets, colours = [parts[name]["offsets_ms"] for name in names], ["tab:purple", "tab:blue"][-len(names) :]
    axes.hist(offsets, bins, stacked=True, color=colours, label=names, edgecolor="white")
    axes.axvline(0, color="black", linewidth=1)
    axes.axvline(np.mean(together), color="tab:red", linestyle=":", label=f"bias: {np.mean(together):+.0f} ms")
    errors = np.abs(together)
    words = f"median {np.median(errors):.0f} ms, 95 % within {np.percentile(errors, 95):.0f} ms"
    axes.set(title=f"{event}: {len(together)} matched, {words}", ylim=(0, 1.3 * axes.get_ylim()[1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper left", fontsize="small")


def write_report(folder: Path, sessions: list[Compared]) -> dict[tuple[str, str], dict]:
    """Print the comparison and write report.png, report.parquet and curves.parquet into `folder`, in place of those of
    an earlier run. Returns the results of `compare_with_truth` by event and size."""
    parts: dict[tuple[str, str], list[dict]] = {}
    for session in sessions:
        for event, result in compare_events(session).items():
            parts.setdefault((event, session.size), []).append(result)
            if event not in CAUSES and result["truth"] + result["found"] > 2 * result["hits"]:
                wrong = f"{result['truth'] - result['hits']} missed, {result['found'] - result['hits']} false"
                print(f"{session.name}: {event} disagrees with the truth: {wrong}")
    totals = {key: add_up(those) for key, those in parts.items()}
    curves = {event: threshold_curve(sessions, event) for event in SEARCHED}
    returns = {session.name: return_scores([session]) for session in sessions} | {"all": return_scores(sessions)}

    rows = [
        ("all", event, size, metric, *value)
        for event, size, part in by_size(totals)
        for metric, value in scores(event, part).items()
    ]
    sizes = {session.name: session.size for session in sessions} | {"all": "all"}
    rows += [
        (name, "RETURN", sizes[name], metric, value, None, None)
        for name, metrics in returns.items()
        for metric, value in metrics.items()
    ]
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        report = {name: [row[column] for row in rows] for column, name in enumerate(REPORT.names)}
        write_table(temporary / "report.parquet", report, REPORT)
        curve = {name: [row[name] for rows in curves.values() for row in rows] for name in CURVES.names}
        write_table(temporary / "curves.parquet", curve, CURVES)
        draw(temporary / "report.png", sessions, totals, curves, returns["all"]["rank_correlation"])
        folder.mkdir(exist_ok=True)
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    if without := sum(session.thresholds is None for session in sessions):
        print(f"{without} of {len(sessions)} sessions have no detections of their labels: the curves leave them out")
    print(truth_table(totals))
    print(*[words for curve in curves.values() if (words := best_thresholds(curve))], sep="\n")
    print(return_table(returns))
    print(f"{folder}: report.png, report.parquet, curves.parquet")
    return totals
