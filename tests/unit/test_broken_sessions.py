"""Broken sessions, one kind after the other: what verify_dataset.py finds and mends, what labels and training say of
them, and that no byte of a recording is lost by any of the three."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tqdm import tqdm

import iql_reflex
import precompute_labels
from common import sessions
from common.video import VideoWriter
from tests.synthetic import write_session
from verify_dataset import repair, verify

N = 40  # frames at 10 fps
JOURNALS = {"frames": sessions.FRAMES, "inputs": sessions.INPUTS}
LABELS = ("events", "episodes", "returns")
BAR = tqdm(disable=True)


@dataclass
class Kind:
    damage: Callable[[Path], None]
    severity: str
    file: str
    found: str  # by verify_dataset.py, a regular expression
    refused: str = ""  # by precompute_labels.py and iql_reflex.py, a regular expression; empty: they use the session
    mends: bool = False  # --repair leaves a session without errors
    labels_refused: str = ""  # by precompute_labels.py alone


def frames(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "frames.parquet", change)


def inputs(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "inputs.parquet", change)


def labels(name: str, change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / f"{name}.parquet", change)


def rewrite(path: Path, change: Callable[[dict], dict]):
    """Write a table again with some columns changed, their types as they come."""
    table = pq.read_table(path)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    changed = change(columns)
    arrays = {
        name: pa.array(values, table.schema.field(name).type if values is columns.get(name) else None)
        for name, values in changed.items()
    }
    pq.write_table(pa.table(arrays).replace_schema_metadata(table.schema.metadata), path)


def swap(values: list, a: int, b: int) -> list:
    values = list(values)
    values[a], values[b] = values[b], values[a]
    return values


def put(values: list, row: int, value) -> list:
    return [*values[:row], value, *values[row + 1 :]]


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def delete(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut_in_head(folder: Path):
    """As a full disk can: the last bytes of a fragment's head are missing, and FFmpeg opens no such file."""
    data = (folder / "recording.mp4").read_bytes()
    head = data.rindex(b"moof") - 4
    (folder / "recording.mp4").write_bytes(data[: head + int.from_bytes(data[head : head + 4], "big") - 4])


def cut_video(folder: Path):
    data = (folder / "recording.mp4").read_bytes()
    (folder / "recording.mp4").write_bytes(data[: len(data) * 6 // 10])


def video(pictures: np.ndarray) -> Callable[[Path], None]:
    def damage(folder: Path):
        (folder / "recording.mp4").unlink()
        with VideoWriter(folder / "recording.mp4", 10, pictures.shape[2], pictures.shape[1], 18) as writer:
            for i, picture in enumerate(pictures):
                writer.add(picture, i * 100_000_000)
        fingerprint(folder)

    return damage


def killed_recorder(folder: Path):
    """As the recorder leaves it: journals, half a last line, rows whose pictures were never written, a key held."""
    delete(*(f"{name}.parquet" for name in LABELS))(folder)
    for name, schema in JOURNALS.items():
        table = sessions.read_table(folder / f"{name}.parquet", schema)
        metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        (folder / "session.json").write_text(json.dumps(metadata))
        rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"timestamp": 17')
        (folder / f"{name}.parquet").unlink()
    cut_video(folder)


def bad_line(folder: Path):
    killed_recorder(folder)
    lines = (folder / "inputs.jsonl").read_text().splitlines()
    (folder / "inputs.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")


def killed_close(folder: Path):
    """Parquet is there, the journals are not gone yet."""
    (folder / "frames.jsonl").write_text("")
    (folder / "session.json").write_text("{}")


def killed_labels(folder: Path):
    (folder / ".labels.tmp").mkdir()
    shutil.move(folder / "returns.parquet", folder / ".labels.tmp")


def metadata(**changes: str) -> Callable[[Path], None]:
    def damage(folder: Path):
        table = pq.read_table(folder / "frames.parquet")
        new = table.schema.metadata | {k.encode(): v.encode() for k, v in changes.items()}
        pq.write_table(table.replace_schema_metadata(new), folder / "frames.parquet")

    return damage


def more_rows(c: dict) -> dict:
    last = c["timestamp"][-1]
    n = len(c["timestamp"])
    extra = {"frame_idx": [n, n + 1], "timestamp": [last + 100, last + 200], "repeated": [False, False]}
    return {name: values + extra[name] for name, values in c.items()}


def mouse(c: dict) -> dict:
    row = {name: None for name in c} | {"timestamp": c["timestamp"][0], "event_type": "mouse", "x": 9999, "y": 5}
    return {name: [row[name], *values] for name, values in c.items()}


STILL = np.random.default_rng(0).integers(0, 255, (1, 48, 64, 3), np.uint8).repeat(N, 0)
KINDS = {
    "truncated video": Kind(
        *(cut_video, "error", "frames.parquet", r"40 rows, recording.mp4 \d+ frames"),
        *("recording_bytes", True, "recording_bytes|_frames"),
    ),
    "video cut in a head": Kind(cut_in_head, "error", "recording.mp4", "cannot be opened", "recording.mp4", True),
    "garbage video": Kind(
        write("recording.mp4", bytes(range(256)) * 40), "error", "recording.mp4", "cannot be opened", "recording.mp4"
    ),
    "empty video": Kind(write("recording.mp4", b""), "error", "recording.mp4", "0 bytes", "recording.mp4"),
    "frames missing": Kind(delete("frames.parquet"), "error", "frames.parquet", "is missing", "frames.parquet is miss"),
    "inputs missing": Kind(delete("inputs.parquet"), "error", "inputs.parquet", "is missing", "inputs.parquet is miss"),
    "frames empty": Kind(write("frames.parquet", b""), "error", "frames.parquet", "not a readable", "frames.parquet"),
    "inputs garbage": Kind(
        write("inputs.parquet", b"PAR1x"), "error", "inputs.parquet", "not a readable", "inputs.par"
    ),
    "no rows": Kind(
        frames(lambda c: {k: v[:0] for k, v in c.items()}),
        "error",
        "frames.parquet",
        "no rows",
        "frames.parquet has no",
    ),
    "column missing": Kind(
        frames(lambda c: {"frame_idx": c["frame_idx"]}), "error", "frames.parquet", "lacks the column", "'timestamp'"
    ),
    "times are words": Kind(
        frames(lambda c: c | {"timestamp": ["noon"] * N}), "error", "frames.parquet", "is string", "is string"
    ),
    "times are floats": Kind(
        frames(lambda c: c | {"timestamp": [float(t) for t in c["timestamp"]]}),
        *("warning", "frames.parquet", "'timestamp' is double, the contract says int64", "", True),
    ),
    "time missing": Kind(
        frames(lambda c: c | {"timestamp": put(c["timestamp"], 7, None)}),
        *("error", "frames.parquet", "row 7 has no 'timestamp'", "row 7 has no 'timestamp'"),
    ),
    "rows swapped": Kind(
        frames(lambda c: {k: swap(v, 3, 9) for k, v in c.items()}),
        *("error", "frames.parquet", "frame_idx is not 0, 1, 2, ...: 9 in row 3", "frame_idx is not", True),
    ),
    "time repeats": Kind(
        frames(lambda c: c | {"timestamp": put(c["timestamp"], 5, c["timestamp"][4])}),
        *("error", "frames.parquet", "1 timestamps repeat, first in row 5", "row 5 does not come after"),
    ),
    "time goes back": Kind(
        frames(lambda c: c | {"timestamp": swap(c["timestamp"], 5, 6)}),
        *("error", "frames.parquet", "1 timestamps go back, first in row 6", "row 6 does not come after"),
    ),
    "seconds for ms": Kind(
        frames(lambda c: c | {"timestamp": [t * 1000 for t in c["timestamp"]]}),
        *("error", "frames.parquet", "real rate 0.01 frames a second, nominal 10"),
    ),
    "a gap": Kind(
        frames(lambda c: c | {"timestamp": c["timestamp"][:20] + [t + 3000 for t in c["timestamp"][20:]]}),
        *("warning", "frames.parquet", "1 gaps above 1 s, the longest 3.1 s after frame 19"),
    ),
    "more rows than frames": Kind(
        frames(more_rows), "error", "frames.parquet", "has 42 rows, recording.mp4 40 frames", "", True
    ),
    "fewer rows than frames": Kind(
        frames(lambda c: {k: v[:30] for k, v in c.items()}),
        *(
            "warning",
            "recording.mp4",
            "has 40 frames, the last 10 without a row",
            "labels frame 39|recording_frames",
            True,
        ),
    ),
    "odd rate": Kind(metadata(fps="fast"), "error", "frames.parquet", "fps 'fast'", "fps 'fast'"),
    "newer schema": Kind(metadata(schema_version="9"), "error", "frames.parquet", "schema version 9", "version 9"),
    "other size": Kind(
        metadata(resolution="1280x720"), "warning", "recording.mp4", "64x48, the metadata says 1280x720", "", True
    ),
    "inputs unsorted": Kind(
        inputs(lambda c: {k: swap(v, 0, 1) for k, v in c.items()}),
        *("warning", "inputs.parquet", "not in the order of their time", "", True),
    ),
    "key name null": Kind(
        inputs(lambda c: c | {"key_name": put(c["key_name"], 1, None)}),
        *("warning", "inputs.parquet", "1 key rows have no key name", "", True),
    ),
    "key unknown": Kind(
        inputs(lambda c: c | {"key_name": put(c["key_name"], 1, "BTN_LEFT")}),
        *("warning", "inputs.parquet", "'BTN_LEFT' is no key name", "", True),
    ),
    "state unknown": Kind(
        inputs(lambda c: c | {"state": put(c["state"], 1, "held")}),
        *("warning", "inputs.parquet", "1 states are unknown", "", True),
    ),
    "keys of another day": Kind(
        inputs(lambda c: c | {"timestamp": [t + 10**8 for t in c["timestamp"]]}),
        *("error", "inputs.parquet", "key rows lie outside the video's time"),
    ),
    "mouse outside": Kind(
        inputs(mouse), "warning", "inputs.parquet", "1 mouse rows lie outside the picture, 64x48", "", True
    ),
    "frozen": Kind(video(STILL), "error", "recording.mp4", "39 of 40 frames, from 1 on .4 s., are the same picture"),
    "black": Kind(video(STILL * 0), "error", "recording.mp4", "39 of 40 frames, from 1 on .4 s., are black"),
    "killed recorder": Kind(killed_recorder, "warning", "frames.jsonl", "of a killed recorder", "no labels", True),
    "bad journal line": Kind(bad_line, "error", "inputs.jsonl", "line 2 is no JSON object", "inputs.jsonl, line 2"),
    "killed close": Kind(killed_close, "warning", "frames.jsonl", "left beside the parquet", "", True),
    "labels of another recording": Kind(
        lambda folder: fingerprint(folder, recording_bytes="1"),
        *("error", "returns.parquet", "recording_bytes 1, this one has", "recording_bytes 1", True),
    ),
    "killed label run": Kind(
        killed_labels, "error", "events.parquet", "is there, returns.parquet not", "no labels", True
    ),
    "labels of two runs": Kind(
        lambda folder: fingerprint(folder, ("episodes",), death_reward="-2"),
        *("error", "returns.parquet", "of another run than", "", True),
    ),
    "event outside": Kind(
        labels("events", lambda c: c | {"frame_idx": [99]}), "error", "events.parquet", "'DEATH' at frame 99", "", True
    ),
    "episode outside": Kind(
        labels("episodes", lambda c: c | {"end_frame": [99]}), "error", "episodes.parquet", "frames 0 to 99", "", True
    ),
    "outcome without event": Kind(
        labels("episodes", lambda c: c | {"outcome": ["WIN"]}),
        *("error", "episodes.parquet", "ends with WIN at frame 39, events.parquet has none", "", True),
    ),
    "returns of other frames": Kind(
        labels("returns", lambda c: {k: v[:-1] for k, v in c.items()}),
        *("error", "returns.parquet", "39 rows, which are not the 40 frames", "", True),
    ),
    "a wrong return": Kind(
        labels("returns", lambda c: c | {"return": put(c["return"], 8, 5.0)}),
        *(
            "error",
            "returns.parquet",
            "2 returns are not reward .* 0.99 times the next one, first at frame 7",
            "",
            True,
        ),
    ),
}


def fingerprint(folder: Path, names: tuple[str, ...] = LABELS, **changes: str):
    """Labels as precompute_labels.py leaves them: with what they were made from."""
    made = {"recording_frames": str(N), "recording_bytes": str((folder / "recording.mp4").stat().st_size)}
    for name in names:
        table = pq.read_table(folder / f"{name}.parquet")
        pq.write_table(table.replace_schema_metadata(made | {"gamma": "0.99"} | changes), folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A labelled session beside the sprites that labels need."""
    data_dir = tmp_path_factory.mktemp("good")
    frame = np.arange(N)
    keys = {"KEY_RIGHT": (frame % 12 < 6) & (frame < N - 1), "KEY_SPACE": (frame % 7 == 3)}
    fingerprint(write_session(data_dir / "run_1", N, keys=keys))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)).convert("RGBA")
    for name in (
        "tux/small/gameover-0",
        "tux/small/gameover-1",
        "snowball/squished-left",
        "snowball/mrs-squished-left",
    ):
        path = data_dir / "sprites" / "creatures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return data_dir


@pytest.fixture
def data_dir(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "data"))


def contents(folder: Path) -> dict[str, str]:
    """File name -> hash, of everything below."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha1(path.read_bytes()).hexdigest() for path in files}


def found(folder: Path) -> list[tuple[str, str, str]]:
    return [(f.severity, f.file, f.found) for f in verify(folder, BAR)[0]]


def refusal(call: Callable) -> str:
    """What a script says when it stops; empty if it goes on."""
    try:
        call()
    except (ValueError, OSError, SystemExit) as error:
        return str(error)
    return ""


def test_the_good_session_has_no_finding(data_dir):
    assert found(data_dir / "run_1") == []
    assert len(KINDS) >= 12


@pytest.mark.parametrize("name", KINDS)
def test_verify_finds_it_and_touches_nothing(name, data_dir):
    folder, kind = data_dir / "run_1", KINDS[name]
    kind.damage(folder)
    before = contents(folder)
    findings = verify(folder, BAR)[0]
    match = [
        f for f in findings if (f.severity, f.file) == (kind.severity, kind.file) and re.search(kind.found, f.found)
    ]
    assert match, findings
    assert all(f.mend and f.session == "run_1" for f in findings)
    assert contents(folder) == before


@pytest.mark.parametrize("name", KINDS)
def test_labels_and_training_refuse_it_or_use_what_is_right(name, data_dir, capsys):
    folder, kind = data_dir / "run_1", KINDS[name]
    kind.damage(folder)
    before = contents(folder)
    args = precompute_labels.Args(data_dir=data_dir, sprites=data_dir / "sprites", device="cpu")
    unlabelled = kind.refused == "no labels"  # labels can be made, training has to wait for them
    said = refusal(lambda: iql_reflex.load_recording(folder, ["KEY_RIGHT", "KEY_SPACE"], 2))
    assert re.search("precompute_labels.py" if unlabelled else kind.refused or "^$", said), said
    said = refusal(lambda: precompute_labels.main(args))
    wanted = kind.labels_refused or (kind.refused if not unlabelled else "") or "^$"
    assert re.search(wanted, said), said
    after = contents(folder)
    gone = {file for file in before if after.get(file) != before[file]}
    assert not {file for file in gone if not (unlabelled and re.search("events|episodes|returns", file))}


@pytest.mark.parametrize("name", KINDS)
def test_repair_mends_what_is_safe_and_loses_nothing(name, data_dir):
    folder, kind = data_dir / "run_1", KINDS[name]
    kind.damage(folder)
    before = contents(folder)
    findings = verify(folder, BAR)[0]
    notes = repair(folder, findings)
    errors = [finding for finding in found(folder) if finding[0] == "error"]
    assert (not errors) == (kind.mends or not [f for f in findings if f.severity == "error"]), errors
    after = contents(folder)
    lost = {file for file, digest in before.items() if digest not in after.values()}
    assert all(file.startswith((".labels.tmp", "session.json")) for file in lost)
    assert bool(notes) == (after != before)
    assert repair(folder, verify(folder, BAR)[0]) == [], "a second repair finds nothing to do"
