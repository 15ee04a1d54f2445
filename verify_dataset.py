"""Check recorded sessions against the contract in docs/data.md, repair what is safe to repair, look at what is learnt.

Every table and every picture is read once. A finding is one line: how bad, where, what was found, and the command that
mends it. The lag from a key to the picture that shows it is measured, as keys and pictures that are out of step teach
nothing. Page: docs/verify_dataset.md

    python verify_dataset.py sample_dataset

In: a folder of sessions, or one session. Out: findings, with exit status 1 if one is an error, and debug_stack.png, the
pictures at t-2, t-1 and t under the keys held at t. Without --repair nothing else is written.
"""

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from scipy.ndimage import median_filter
from scipy.stats import rankdata
from tqdm import tqdm

from common import sessions
from common.sessions import KEY_CODES, MARKER_KEYS, find_sessions, key_names, key_table, load_session, read_table
from common.video import VideoReader, iter_frames
from session_labels.files import install_labels
from session_labels.intents import are_outdated

RECORDED = {"frames": sessions.FRAMES, "inputs": sessions.INPUTS, "truth": sessions.TRUTH}
LABELS = {"events": sessions.EVENTS, "episodes": sessions.EPISODES, "returns": sessions.RETURNS}
PER_FRAME = {"progress": sessions.PROGRESS, "intent": sessions.INTENT}  # where they were asked for
INSTALLED_SPRITES = Path("/usr/share/games/supertux2/images")  # Debian's package supertux-data
RATE_TOLERANCE = 0.05  # of the nominal frame rate
GAP_S, STILL_S = 1.0, 3.0  # longest interval between frames, longest time the picture may stay black or the same
MARGIN_MS = 1000  # keys this far outside the video's time are no error: the listener starts first and ends last
LAGS = np.arange(-200, 601)  # ms from key to picture that are tried

REPAIR = "python verify_dataset.py --repair {folder}"
LABEL = "python precompute_labels.py --overwrite --data-dir {folder}{sprites}"
RELABEL = {
    "progress": "rm {folder}/progress.parquet, and label again with the --progress-reward of the other sessions",
    "intent": "python precompute_labels.py --labeler keys --data-dir {folder}{sprites}",
}
REMOVE = "mkdir -p removed && mv {folder} removed/"
NONE = "not needed"


@dataclass
class Args:
    dataset: tyro.conf.Positional[Path] = Path("dataset")
    """folder of sessions (run_*), or one session"""
    data_dir: Path | None = None
    """the same, spelt as in the other scripts"""
    repair: bool = False
    """mend what can be mended without loss; a file that is replaced stays beside it as <file>.bak"""
    json: bool = False
    """print one JSON object in place of lines"""
    output: Path | None = Path("debug_stack.png")
    """picture of three frames and the keys held; None draws nothing"""
    session: str = ""
    """name of the session to draw; empty takes a random one"""
    frame: int = -1
    """frame t to draw, 2 or more; -1 takes a random one at which keys are held and the picture moves"""
    seed: int = 1
    """seed of the random session and frame"""


@dataclass
class Finding:
    severity: Literal["error", "warning"]
    file: str
    found: str
    mend: str  # a command where there is one
    session: str = ""


# --- Checks: generators of findings. N frames of a session, E key presses, L lags ---


def read(folder: Path, name: str) -> tuple[pa.Table | None, list[Finding]]:
    """A table of the contract, None where it cannot be read."""
    path, journal = folder / f"{name}.parquet", folder / f"{name}.jsonl"
    schema = (RECORDED | LABELS | PER_FRAME)[name]
    try:
        table = read_table(path, schema)
    except (ValueError, OSError) as error:
        file = journal if journal.exists() and not path.exists() else path
        return None, [Finding("error", file.name, str(error), REMOVE if name in RECORDED else RELABEL.get(name, LABEL))]
    mend = REPAIR if name in RECORDED else RELABEL.get(name, LABEL)
    findings = [Finding("warning", path.name, found, mend) for found in other_types(path, schema)]
    if journal.exists():
        found = "is left beside the parquet file" if path.exists() else "is the older form, or of a killed recorder"
        findings.append(Finding("warning", journal.name, found, REPAIR))
    return table, findings


def stored(folder: Path, name: str) -> list[Path]:
    return [path for suffix in (".parquet", ".jsonl") if (path := folder / f"{name}{suffix}").exists()]


def other_types(path: Path, schema: pa.Schema) -> list[str]:
    """Columns of a parquet file that are stored in another type than the contract's, though readers can convert it."""
    types = {field.name: field.type for field in pq.read_schema(path)} if path.exists() else {}
    wrong = [field for field in schema if types.get(field.name, field.type) != field.type]
    return [f"column {f.name!r} is {types[f.name]}, the contract says {f.type}" for f in wrong]


def metadata_of(table: pa.Table) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}


def check_frames(frames: pa.Table, n_video: int) -> Iterator[Finding]:
    """Order and number of rows against the `n_video` frames that decode (0: unknown)."""
    indices, times, N = frames["frame_idx"].to_numpy(), frames["timestamp"].to_numpy(), len(frames)
    file = "frames.parquet"
    if N == 0:
        yield Finding("error", file, "has no rows", REMOVE)
        return
    if (indices != np.arange(N)).any():
        row = int(np.flatnonzero(indices != np.arange(N))[0])
        mend = REPAIR if (np.sort(indices) == np.arange(N)).all() else REMOVE
        yield Finding("error", file, f"frame_idx is not 0, 1, 2, ...: {indices[row]} in row {row}", mend)
    else:
        for name, wrong in (("repeat", np.diff(times) == 0), ("go back", np.diff(times) < 0)):
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0]) + 1
                found = f"{wrong.sum()} timestamps {name}, first in row {row}: {times[row]} after {times[row - 1]} ms"
                yield Finding("error", file, found, REMOVE)
    if N > n_video > 0:
        yield Finding("error", file, f"has {N} rows, recording.mp4 {n_video} frames that decode", REPAIR)
    if n_video > N:
        yield Finding("warning", "recording.mp4", f"has {n_video} frames, the last {n_video - N} without a row", NONE)


def check_rate(session: sessions.Session) -> Iterator[Finding]:
    """Real against nominal rate, gaps, pictures that were written twice."""
    steps, N, fps = np.diff(session.timestamps), session.n_frames, session.fps
    file, mend = "frames.parquet", "record with less running beside it, or at a lower --fps"
    rate = 1000 / steps.mean() if N > 1 else fps
    if abs(rate / fps - 1) > RATE_TOLERANCE:
        severity = "warning" if 0.5 < rate / fps < 2 else "error"
        yield Finding(severity, file, f"real rate {rate:.2f} frames a second, nominal {fps:g}", mend)
    gaps = np.flatnonzero(steps > GAP_S * 1000)
    if len(gaps):
        longest = f"the longest {steps.max() / 1000:.1f} s after frame {steps.argmax()}"
        yield Finding("warning", file, f"{len(gaps)} gaps above {GAP_S:g} s, {longest}", mend)
    if session.repeated.mean() > 0.05:
        yield Finding("warning", file, f"{session.repeated.sum()} of {N} pictures are marked repeated", mend)


def check_inputs(inputs: pa.Table, times: np.ndarray | None, size: tuple[int, int] | None) -> Iterator[Finding]:
    """Names, states, order, keys left down, rows outside the video's `times` (N,) or its `size` (width, height)."""
    file, rows = "inputs.parquet", sorted(inputs.to_pylist(), key=lambda row: row["timestamp"])
    if (np.diff(inputs["timestamp"].to_numpy()) < 0).any():
        yield Finding("warning", file, "rows are not in the order of their time; readers sort them", REPAIR)
    keys = [row for row in rows if row["event_type"] == "key"]
    mouse = [row for row in rows if row["event_type"] == "mouse"]
    placed = [row for row in mouse if row["x"] is not None and row["y"] is not None]
    if not keys:
        yield Finding("warning", file, "holds no key event", "check that the recorder hears the keyboard")
    for name in sorted({row["key_name"] for row in keys} - {None, *KEY_CODES, *(f"Key({key})" for key in KEY_CODES)}):
        yield Finding(
            "warning", file, f"{name!r} is no key name of the contract", "leave it out: --keys of the trainer"
        )
    held, lost = held_keys(rows)
    for name in sorted(held):
        yield Finding("warning", file, f"{name} is never released", REPAIR)
    counts = [
        (len(rows) - len(keys) - len(mouse), "rows are neither key nor mouse", NONE + ": readers skip them"),
        (sum(r["key_name"] is None for r in keys), "key rows have no key name", NONE + ": readers skip them"),
        (sum(r["state"] not in ("down", "up", "repeat") for r in keys), "states are unknown", NONE + ": skipped"),
        (lost, "times a key goes down that is down already: its release was lost", REMOVE),
        (len(mouse) - len(placed), "mouse rows have no x or y", NONE + ": readers skip them"),
    ]
    if size:
        outside = sum(not (0 <= r["x"] < size[0] and 0 <= r["y"] < size[1]) for r in placed)
        counts.append((outside, f"mouse rows lie outside the picture, {size[0]}x{size[1]}", "record with --window"))
    if times is not None:
        early = sum(row["timestamp"] < times[0] - MARGIN_MS for row in keys)
        late = sum(row["timestamp"] > times[-1] + MARGIN_MS for row in keys)
        if keys and early + late == len(keys):
            yield Finding("error", file, f"all {len(keys)} key rows lie outside the video's time", REMOVE)
        else:
            counts.append((early, "key rows lie more than 1 s before the first frame", NONE))
            counts.append((late, "key rows lie more than 1 s after the last frame", NONE))
    yield from (Finding("warning", file, f"{n} {text}", mend) for n, text, mend in counts if n)


def held_keys(rows: list[dict]) -> tuple[dict[str, dict], int]:
    """Keys that are down after the last of `rows`, each with its last row, and how often a release is missing."""
    held, lost = {}, 0
    for row in rows:
        if row["event_type"] == "key" and row["key_name"] is not None:
            if row["state"] == "up":
                held.pop(row["key_name"], None)
            elif row["state"] in ("down", "repeat"):
                lost += row["state"] == "down" and row["key_name"] in held
                held[row["key_name"]] = row
    return held, lost


def check_labels(folder: Path, n_frames: int) -> Iterator[Finding]:
    """All three label files or none, of this recording, and in step with each other."""
    there = [name for name in LABELS if (folder / f"{name}.parquet").exists()]
    missing = [f"{name}.parquet" for name in LABELS if name not in there]
    if not there:
        return
    if missing:
        yield Finding("error", f"{there[0]}.parquet", f"is there, {' and '.join(missing)} not", LABEL)
        return
    tables = {}
    for name in LABELS:
        tables[name], findings = read(folder, name)
        yield from findings
    if any(table is None for table in tables.values()):
        return
    made_with = [metadata_of(table) for table in tables.values()]
    recording = {"recording_frames": n_frames, "recording_bytes": (folder / "recording.mp4").stat().st_size}
    for key, value in recording.items():
        if made_with[2].get(key, str(value)) != str(value):
            found = f"was made for a recording with {key} {made_with[2][key]}, this one has {value}"
            yield Finding("error", "returns.parquet", found, LABEL)
            return
    if made_with[0] != made_with[2] or made_with[1] != made_with[2]:
        yield Finding("error", "returns.parquet", "is of another run than events.parquet or episodes.parquet", LABEL)
        return
    for name, found in label_problems(*tables.values(), n_frames, made_with[2].get("gamma")):
        yield Finding("error", f"{name}.parquet", found, LABEL)


def check_per_frame(folder: Path, n_frames: int) -> Iterator[Finding]:
    """Progress and intents, where they are: of this recording, a row for each frame, only intents that there are."""
    for name in PER_FRAME:
        if not (folder / f"{name}.parquet").exists():
            continue
        table, findings = read(folder, name)
        yield from findings
        if table is None:
            continue
        size, of = (folder / "recording.mp4").stat().st_size, metadata_of(table).get("recording_bytes")
        if of not in (None, str(size)):
            found = f"was made for a recording with recording_bytes {of}, this one has {size}"
            yield Finding("error", f"{name}.parquet", found, RELABEL[name])
        elif not np.array_equal(table["frame_idx"].to_numpy(), np.arange(n_frames)):
            found = f"has {len(table):,} rows, expected one for each frame, 0 to {n_frames - 1}, in order"
            yield Finding("error", f"{name}.parquet", found, RELABEL[name])
        elif "cuts" in metadata_of(table) and (folder / "episodes.parquet").exists() and are_outdated(folder):
            found = "was made for other episodes than episodes.parquet has"
            yield Finding("error", f"{name}.parquet", found, RELABEL[name])
        elif name == "intent" and (unknown := set(table["intent"].to_pylist()) - set(sessions.INTENT_NAMES)):
            found = f"has {', '.join(map(repr, sorted(unknown)))}, expected {', '.join(sessions.INTENT_NAMES)}"
            yield Finding("error", f"{name}.parquet", found, RELABEL[name])


def label_problems(
    events: pa.Table, episodes: pa.Table, returns: pa.Table, n_frames: int, gamma: str | None
) -> Iterator[tuple[str, str]]:
    """What is out of step, as (table, found). `gamma`: discount per frame, None where it is not known."""
    ends = {(row["frame_idx"], row["event"]) for row in events.to_pylist()}
    for frame, event in sorted(ends):
        if not 0 <= frame < n_frames or event not in ("DEATH", "WIN", "ATTACK"):
            yield "events", f"{event!r} at frame {frame} of {n_frames}, expected DEATH, WIN or ATTACK inside"
    inside, previous = [np.zeros(0, np.int64)], -1
    for row in episodes.to_pylist():
        first, last, outcome, name = (
            row["start_frame"],
            row["end_frame"],
            row["outcome"],
            f"episode {row['episode_id']}",
        )
        if not previous < first <= last < n_frames:
            yield "episodes", f"{name} is frames {first} to {last} of {n_frames}, the one before ends at {previous}"
            return
        if row["length"] != last - first + 1:
            yield "episodes", f"{name} has length {row['length']}, its frames are {first} to {last}"
        if outcome != "INCOMPLETE" and (last, outcome) not in ends:
            yield "episodes", f"{name} ends with {outcome} at frame {last}, events.parquet has none there"
        inside.append(np.arange(first, last + 1))
        previous = last
    inside = np.concatenate(inside)
    if not np.array_equal(returns["frame_idx"].to_numpy(), inside):
        yield "returns", f"has {len(returns)} rows, which are not the {len(inside)} frames of the episodes"
    elif gamma is not None and returns["reward"].null_count == 0:
        G, reward = returns["return"].to_numpy(), returns["reward"].to_numpy()
        last = np.isin(inside, episodes["end_frame"].to_numpy())
        with np.errstate(invalid="ignore"):
            off = np.abs(G - reward - np.where(last, 0, float(gamma) * np.append(G[1:], 0)))
            wrong = ~(off <= 1e-4 * (1 + np.abs(G)))  # also where one is not finite
        if wrong.any():
            first = f"first at frame {inside[wrong][0]}"
            yield "returns", f"{wrong.sum()} returns are not reward + {float(gamma):g} times the next one, {first}"


def watch(reader: VideoReader, bar: tqdm) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Decode once, forwards. Yields `black` (n,) bool and `change` (n,): by how many grey levels the liveliest 1 % of
    the picture's 300 blocks differ from those of the frame before."""
    step = max(1, reader.width // 160)
    last = None
    for indices, frames in iter_frames(reader):
        grey = frames[:, :, ::step, ::step].float().mean(1)  # (n, h, w)
        before = torch.cat([grey[:1] if last is None else last, grey[:-1]])
        blocks = F.adaptive_avg_pool2d((grey - before).abs()[:, None], (15, 20)).flatten(1)  # (n, 300)
        yield (grey.mean((1, 2)) <= 5) & (grey.std((1, 2)) <= 3), blocks.topk(3).values.mean(1)
        last = grey[-1:]
        bar.update(len(indices))


def check_pictures(black: np.ndarray, change: np.ndarray, fps: float) -> Iterator[Finding]:
    """Black or frozen stretches of the video; `black` (N,) bool, `change` (N,)."""
    calm = median_filter(change, 5) < 0.5  # a keyframe changes a still picture by some grey levels
    for text, still in (("black", black), ("the same picture", calm & ~black)):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], still[1:], [False]]).astype(np.int8)))
        lengths = edges[1::2] - edges[::2]
        if len(lengths) and lengths.max() > STILL_S * fps:
            first, length = edges[::2][lengths.argmax()] + 1, lengths.max()
            severity = "error" if length == len(still) - 1 else "warning"
            found = f"{length} of {len(still)} frames, from {first} on ({length / fps:.0f} s), are {text}"
            yield Finding(severity, "recording.mp4", found, "unless the game was paused, see what the recorder grabs")


# --- ALGO LOGIC: the lag from a key to the picture that shows it ---


def onset_changes(times: np.ndarray, change: np.ndarray, presses: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """For each press (E,) and lag (L,), in ms: how much livelier the first picture at or after press + lag is than the
    one before it, (E, L), in ranks -1..1. `times` (N,) in ms and `change` (N,) of the frames."""
    livelier = np.diff(rankdata(change) / len(change), prepend=0)  # (N,)
    shown = np.searchsorted(times, presses[:, None] + lags)  # (E, L) first frame that can show it
    return livelier[shown[(shown.min(1) >= 2) & (shown.max(1) < len(times))]]


def estimate_lag(onsets: np.ndarray, lags: np.ndarray, min_presses: int = 20, level: float = 0.01) -> dict | None:
    """From `onsets` (E, L): the lags at which pictures become livelier, by the average over presses.

    Returns `low_ms` and `high_ms`, the lags around the best one whose average is not lower by more than 1.64 standard
    errors of the paired difference, and their middle `lag_ms`. None where no lag stands out: fewer than `min_presses`,
    or as good a best average in more than `level` of the cases in which the presses get random signs.
    """
    if len(onsets) < min_presses:
        return None
    mean = onsets.mean(0)  # (L,)
    best = int(mean.argmax())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (1000, len(onsets)))
    if ((signs @ onsets / len(onsets)).max(1) >= mean[best]).mean() > level:
        return None
    worse = onsets[:, [best]] - onsets  # (E, L)
    bad = np.flatnonzero(worse.mean(0) > 1.64 * worse.std(0) / len(onsets) ** 0.5)
    low, high = lags[max(bad[bad < best], default=-1) + 1], lags[min(bad[bad > best], default=len(lags)) - 1]
    return {"lag_ms": float(low + high) / 2, "low_ms": float(low), "high_ms": float(high)}


def shown_after(times: np.ndarray, presses: np.ndarray, lag_ms: float) -> np.ndarray:
    """For each press (E,) the time to the first picture at or after press + lag, in ms; those after the end are out."""
    shown = np.searchsorted(times, presses + lag_ms)
    return times[shown[shown < len(times)]] - presses[shown < len(times)]


def lag_line(lag: dict | None) -> str:
    """The estimate for reading."""
    if lag is None:
        return "not to be seen: too few key presses, or none that moves the picture"
    line = f"{lag['lag_ms']:.0f} ms from key to picture, between {lag['low_ms']:.0f} and {lag['high_ms']:.0f} ms"
    return f"{line}; shown {lag['shown_ms']:.0f} ms after the key in the median"


# --- Repair: only what loses nothing ---


def leftovers(folder: Path) -> list[Path]:
    """Files of a program that was killed while it wrote; what they were to replace is still there."""
    stale = [] if any(folder.glob("*.jsonl")) else [folder / "session.json"]
    paths = [folder / ".labels.tmp", folder / ".session.json.tmp", *stale, *folder.glob(".*.parquet.tmp")]
    return [path for path in paths if path.exists()]


def set_aside(path: Path, copy: bool = False) -> str:
    """Rename (or copy) a file to the first free of <file>.bak, <file>.bak2, ...; returns that name."""
    backup = next(b for n in ["", *range(2, 1000)] if not (b := path.with_name(f"{path.name}.bak{n}")).exists())
    shutil.copy2(path, backup) if copy else os.replace(path, backup)
    return backup.name


def mend_tables(tables: dict[str, pa.Table], n_video: int) -> tuple[dict[str, pa.Table], list[str]]:
    """Rows in order, none beyond the `n_video` frames that decode, a release for every key that is left down."""
    mended, notes = dict(tables), []
    for name, table in tables.items():
        by = table["frame_idx" if name == "frames" else "timestamp"].to_numpy()
        if name != "frames" or (np.sort(by) == np.arange(len(by))).all():
            mended[name] = table.take(pa.array(np.argsort(by, kind="stable")))
    frames = mended.get("frames", [])
    if len(frames) == 0 or mended["frames"] is tables["frames"]:
        return mended, notes
    end = frames["timestamp"][min(n_video, len(frames)) - 1].as_py()  # ms, the last picture
    if len(frames) > n_video:
        mended["frames"] = frames.slice(0, n_video)
        for name in mended.keys() - {"frames"}:
            mended[name] = mended[name].filter(pc.less_equal(mended[name]["timestamp"], end + MARGIN_MS))
        lost = [f"{len(tables[n]) - len(table)} of {n}.parquet's {len(tables[n])}" for n, table in mended.items()]
        notes.append(f"rows after the last picture dropped: {', '.join(lost)}")
    if "inputs" in mended:
        rows = mended["inputs"].to_pylist()
        held, _ = held_keys(rows)
        after = max([end + MARGIN_MS, *(row["timestamp"] for row in rows)])  # changes the keys of no frame
        if held:
            rows += [row | {"timestamp": after, "state": "up"} for row in held.values()]
            mended["inputs"] = pa.Table.from_pylist(rows, mended["inputs"].schema)
            notes.append(f"{', '.join(sorted(held))} released after the last frame")
    return mended, notes


def cut_to_boxes(video: Path) -> list[str]:
    """Mend an mp4 that a full disk cut off inside a box's head, which FFmpeg does not open: keep the whole boxes."""
    data, end = video.read_bytes(), 0
    while 8 <= (size := int.from_bytes(data[end : end + 4], "big")) <= len(data) - end:
        end += size
    if not 0 < end < len(data):
        return []
    temporary = video.with_name(".recording.tmp.mp4")
    temporary.write_bytes(data[:end])
    try:
        VideoReader(temporary)
    except ValueError:
        temporary.unlink()
        return []
    kept = set_aside(video, copy=True)
    os.replace(temporary, video)
    return [f"{video.name} cut off after its last whole part, {len(data) - end} bytes; {kept} is the old one"]


def repair(folder: Path, findings: list[Finding]) -> list[str]:
    """Mend a session; returns what was done. Tables that cannot be read stay as they are."""
    tables = {name: table for name in RECORDED if (table := read(folder, name)[0]) is not None}
    video, cut = folder / "recording.mp4", []
    try:
        if any(f.file == video.name and "cannot be opened" in f.found for f in findings):
            cut = cut_to_boxes(video)
        mended, notes = mend_tables(tables, VideoReader(video).n_frames)
    except (ValueError, OSError):
        return cut
    notes = cut + notes
    for name, table in mended.items():
        path, journal = folder / f"{name}.parquet", folder / f"{name}.jsonl"
        if not path.exists() or other_types(path, RECORDED[name]) or not table.equals(tables[name]):
            origin = set_aside(path, copy=True) if path.exists() else journal.name
            sessions.write_table(path, table, RECORDED[name], metadata_of(table))
            notes.append(f"{path.name} written from {origin}")
        if journal.exists():
            notes.append(f"{journal.name} kept as {set_aside(journal)}")
    if cut or any(f.severity == "error" and f.file.removesuffix(".parquet") in LABELS for f in findings):
        kept = [set_aside(path) for name in LABELS if (path := folder / f"{name}.parquet").exists()]
        if kept:
            notes.append(f"{', '.join(kept)}: labels set aside; {fill(LABEL, folder)}")
    for path in leftovers(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        notes.append(f"{path.name} removed")
    return notes


# --- One session, all sessions ---


def verify(folder: Path, bar: tqdm) -> tuple[list[Finding], dict | None]:
    """All checks of one session. Where it can be read also `session`, `change` (N,) and `presses` (E,) in ms."""
    findings, n_video, size, facts = [], 0, None, None
    try:
        reader = VideoReader(folder / "recording.mp4")
        n_video, size = reader.n_frames, (reader.width, reader.height)
    except (ValueError, OSError) as error:
        findings.append(Finding("error", "recording.mp4", str(error), REMOVE))
    for path in leftovers(folder):
        findings.append(Finding("warning", path.name, "is left of a program that was killed", REPAIR))
    tables = {}
    for name in ("frames", "inputs", *(["truth"] if stored(folder, "truth") else [])):
        tables[name], problems = read(folder, name)
        findings += problems
    if tables["frames"] is not None:
        findings += check_frames(tables["frames"], n_video)
    try:
        session = load_session(folder)
        findings += check_rate(session)
    except (ValueError, OSError) as error:
        session = None
        if not any(finding.severity == "error" for finding in findings):
            findings.append(Finding("error", "frames.parquet", str(error), REMOVE))
    if tables["inputs"] is not None:
        findings += check_inputs(tables["inputs"], session.timestamps if session else None, size)
    if session and n_video:
        named = session.metadata.get("resolution", f"{size[0]}x{size[1]}")
        if named not in [f"{size[0] + x}x{size[1] + y}" for x in (0, 1) for y in (0, 1)]:  # odd ones lose a line
            found = f"is {size[0]}x{size[1]}, the metadata says {named}: the pointer does not fit the picture"
            findings.append(Finding("warning", "recording.mp4", found, REMOVE))
        findings += check_labels(folder, min(session.n_frames, n_video))
        findings += check_per_frame(folder, min(session.n_frames, n_video))
        bar.reset(n_video)
        bar.set_description(folder.name)
        chunks = []
        try:
            chunks.extend(watch(reader, bar))
        except ValueError as error:
            findings.append(Finding("error", "recording.mp4", str(error), REMOVE))
        if chunks:
            black, change = (torch.cat(parts).numpy()[: session.n_frames] for parts in zip(*chunks, strict=True))
            findings += check_pictures(black, change, session.fps)
            presses = [
                row["timestamp"]
                for row in session.inputs.to_pylist()
                if row["state"] == "down" and row["key_name"] not in (None, *MARKER_KEYS)
            ]
            facts = {"session": session, "change": change, "presses": np.array(presses, np.int64)}
    for finding in findings:
        finding.session, finding.mend = folder.name, fill(finding.mend, folder)
    return findings, facts


def fill(mend: str, folder: Path) -> str:
    """A mend as a command for this session."""
    beside = folder.parent / "sprites"
    sprites = f" --sprites {shlex.quote(str(beside))}" if beside.is_dir() and not INSTALLED_SPRITES.is_dir() else ""
    return mend.replace("{folder}", shlex.quote(str(folder))).replace("{sprites}", sprites)


def check_folder(data_dir: Path) -> Iterator[Finding]:
    """Folders below `data_dir` that cannot be read or are sessions without a video, and sprites that are missing."""
    for folder in sorted(path for path in data_dir.iterdir() if path.is_dir()):
        if not os.access(folder, os.R_OK | os.X_OK):
            yield Finding("error", "", "the folder cannot be read", fill("chmod u+rwx {folder}", folder), folder.name)
        elif not (folder / "recording.mp4").exists():
            parts = [path.name for name in RECORDED | LABELS for path in stored(folder, name)]
            if parts:
                found = f"is missing beside {', '.join(parts)}"
                yield Finding("error", "recording.mp4", found, fill(REMOVE, folder), folder.name)
    unlabelled = [path for path in data_dir.glob("*/recording.mp4") if not (path.parent / "returns.parquet").exists()]
    sprites = "creatures/tux/small/gameover-*.png"
    if unlabelled and not any(any(place.glob(sprites)) for place in (INSTALLED_SPRITES, data_dir / "sprites")):
        found = f"{sprites} is neither there nor in {INSTALLED_SPRITES}: {len(unlabelled)} sessions cannot be labelled"
        yield Finding("warning", "sprites", found, "apt-get install supertux-data", data_dir.name)


def choose_frame(found: dict[str, dict], name: str, frame: int, seed: int) -> tuple[str, int, list[str]] | None:
    """Session, frame and the keys held in it: as asked for, else random among those with keys held and motion."""
    rng = np.random.default_rng(seed)
    for chosen in rng.permutation([n for n in sorted(found) if n == name or not name]).tolist():
        session, change = found[chosen]["session"], found[chosen]["change"]
        keys = key_names(session)
        state = key_table(session, keys)[0][: len(change)]  # (N, K)
        lively = change > np.median(change)
        good = lively & np.roll(lively, 1) & state.any(1) if frame < 0 else np.arange(len(change)) == frame
        if good[2:].any():
            t = 2 + int(rng.choice(np.flatnonzero(good[2:])))
            return chosen, t, [key for key, down in zip(keys, state[t], strict=True) if down]
    return None


def draw_stack(path: Path, video: Path, frame: int, keys: list[str]):
    """The three frames that a policy sees at `frame`, as recorded, under the keys held then."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    pictures = VideoReader(video).read(frame - 2, frame + 1).permute(0, 2, 3, 1).numpy()  # (3, H, W, 3)
    for axis, picture, title in zip(figure.subplots(1, 3), pictures, ("t-2", "t-1", "t"), strict=True):
        axis.imshow(picture)
        axis.set_title(title)
        axis.axis("off")
    held = " + ".join(key.removeprefix("KEY_") for key in keys) or "no key"
    figure.suptitle(f"{video.parent.name}, frame {frame}: {held}")
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=100)
    os.replace(temporary, path)


def main(args: Args) -> dict:
    """Check every session, and repair where asked for. Ends with status 1 if a finding is an error."""
    data_dir, started, findings = args.data_dir or args.dataset, time.monotonic(), []
    data_dir = data_dir if data_dir.name else data_dir.resolve()  # "." has no name
    if args.output:
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--output {args.output}: {error.filename} cannot be made ({error.strerror})") from None
        if not os.access(args.output.parent, os.W_OK):
            raise SystemExit(f"{args.output.parent} cannot be written to. Name another --output, None draws nothing.")
    try:
        if data_dir.is_dir() and not (data_dir / "recording.mp4").exists():
            findings += check_folder(data_dir)
        folders = find_sessions(data_dir)
    except (ValueError, OSError) as error:
        if not findings:
            raise SystemExit(str(error)) from None
        folders = sorted(path.parent for path in data_dir.glob("*/recording.mp4"))
    torch.set_num_threads(1)  # the pictures are small after decoding
    journals = {path: path.stat().st_size for folder in folders for path in folder.glob("*.jsonl")}

    # check, repair, check again
    found, repairs = {}, []
    for folder in folders:
        with tqdm(unit="frame", leave=False) as bar:
            problems, facts = verify(folder, bar)
            if args.repair and (folder / ".labels.tmp" / "returns.parquet").exists():
                install_labels(folder)  # they are whole: a run was killed as it put them in place
                repairs.append(f"{folder.name}: labels put in place from .labels.tmp")
                problems, facts = verify(folder, bar)
            if args.repair and problems:
                time.sleep(max(0.0, started + 1.5 - time.monotonic()))  # a recorder writes a row in this time
                growing = [path.name for path in folder.glob("*.jsonl") if path.stat().st_size != journals.get(path)]
                notes = [f"nothing: {growing[0]} is being recorded"] if growing else repair(folder, problems)
                repairs += [f"{folder.name}: {note}" for note in notes]
                if notes:
                    problems, facts = verify(folder, bar)
        findings += problems
        if facts:
            found[folder.name] = facts | {"times": facts["session"].timestamps[: len(facts["change"])]}

    # lag, per session and of all together
    onsets = {name: onset_changes(f["times"], f["change"], f["presses"], LAGS) for name, f in found.items()}
    lags = {}
    for group, names in ({name: [name] for name in found} | ({"all": list(found)} if found else {})).items():
        lags[group] = lag = estimate_lag(np.concatenate([onsets[name] for name in names]), LAGS)
        if lag:
            delays = [shown_after(found[name]["times"], found[name]["presses"], lag["lag_ms"]) for name in names]
            lag["shown_ms"] = float(np.median(np.concatenate(delays)))
            if group != "all" and (lag["low_ms"] > 250 or lag["high_ms"] < -50):
                line = "keys and pictures are out of step: lag " + lag_line(lag)
                findings.append(Finding("warning", "inputs.parquet", line, "see docs/verify_dataset.md", group))

    # draw
    drawn = choose_frame(found, args.session, args.frame, args.seed) if args.output else None
    if drawn:
        draw_stack(args.output, found[drawn[0]]["session"].video, *drawn[1:])

    # report
    errors = sum(finding.severity == "error" for finding in findings)
    result = {"sessions": [path.name for path in folders], "findings": [asdict(finding) for finding in findings]}
    drawn = dict(zip(("session", "frame", "keys"), drawn, strict=True)) if drawn else None
    result |= {"repairs": repairs, "lag": lags, "drawn": drawn}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for note in repairs:
            print(f"repair   {note}")
        for f in findings:
            print(f"{f.severity:8} {f.session}/{f.file}: {f.found.removesuffix('.')}. Mend: {f.mend}")
        for name, lag in lags.items():
            print(f"lag      {name}: {lag_line(lag)}")
        if args.output:
            where = f"{drawn['session']}, frame {drawn['frame']}, {' + '.join(drawn['keys'])}" if drawn else ""
            print(f"drawn    {args.output}: " + (where or "nothing, no such frame with a key held and motion"))
        print(f"{len(folders)} sessions: {errors} errors, {len(findings) - errors} warnings")
    if errors:
        raise SystemExit(1)
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
