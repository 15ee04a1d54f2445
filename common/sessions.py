"""Session files: what a recorded session holds, read and written in one place. The contract is docs/data.md, schema v1.

A session is a folder: `recording.mp4`, `frames.parquet`, `inputs.parquet`, after labelling `detections.parquet`,
`events.parquet`, `episodes.parquet`, `returns.parquet`, maybe `progress.parquet` and `intent.parquet`,
`overrides.parquet` once a person has judged some of it, and `truth.parquet` where the game could be asked. The older
form holds the same fields as one JSON object a line (`frames.jsonl`, ...) and metadata in `session.json`; every reader
here takes both.
"""

import json
import os
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
WIN_KEY = "KEY_BACKSLASH"  # pressed by the player when a level is won; a marker, never an action
MARKER_KEYS = (WIN_KEY, "KEY_ESC", "KEY_SYSRQ", *(f"KEY_F{i}" for i in range(1, 13)))  # of the person, not of the game

FRAMES = pa.schema([("frame_idx", pa.int64()), ("timestamp", pa.int64()), ("repeated", pa.bool_())])
INPUTS = pa.schema(
    [
        ("timestamp", pa.int64()),  # ms since the Unix epoch
        ("event_type", pa.string()),  # key | mouse
        ("key_code", pa.int32()),  # evdev code, null for the mouse
        ("key_name", pa.string()),  # evdev name, null for the mouse
        ("state", pa.string()),  # down | up | repeat, null for the mouse
        ("x", pa.int32()),  # pixels in the recorded picture, null for keys
        ("y", pa.int32()),
        ("source", pa.string()),  # human | policy | script
    ]
)
DETECTIONS = pa.schema(
    [
        ("frame_idx", pa.int64()),
        ("event", pa.string()),
        ("sprite", pa.string()),
        ("score", pa.float64()),
        ("y", pa.int64()),  # of its top left corner, pixels
        ("x", pa.int64()),
    ]
)
OVERRIDES = pa.schema(
    [
        ("frame_idx", pa.int64()),
        ("event", pa.string()),
        ("sprite", pa.string()),
        ("y", pa.int64()),
        ("x", pa.int64()),
        ("accept", pa.bool_()),  # whether a person says that it is one
    ]
)
EVENTS = pa.schema([("frame_idx", pa.int64()), ("event", pa.string()), ("confidence", pa.float64())])
EPISODES = pa.schema(
    [
        ("episode_id", pa.int64()),
        ("start_frame", pa.int64()),
        ("end_frame", pa.int64()),  # inclusive
        ("outcome", pa.string()),  # DEATH | WIN | INCOMPLETE
        ("reward", pa.float64()),  # at the end frame
        ("length", pa.int64()),
    ]
)
PROGRESS = pa.schema(
    [
        ("frame_idx", pa.int64()),
        ("dx", pa.float64()),  # how the camera moved into this frame, pixels to the right
        ("dy", pa.float64()),  # down
        ("confidence", pa.float64()),
        ("progress", pa.float64()),  # sprite widths to the right since the last cut
    ]
)
INTENT_NAMES = ("LOOT", "EVADE", "ATTACK", "CLIMB", "LEAP", "RUN", "WAIT")  # this is their order in a goal vector
INTENT = pa.schema([("frame_idx", pa.int64()), ("intent", pa.string()), ("timestamp", pa.int64())])
RETURNS = pa.schema([("frame_idx", pa.int64()), ("return", pa.float64()), ("reward", pa.float64())])
TRUTH = pa.schema([("timestamp", pa.int64()), ("what", pa.string()), ("data", pa.string())])

_NAMED = {  # evdev codes of the 99 keys of a plain keyboard, in the order of their codes
    1: "ESC 1 2 3 4 5 6 7 8 9 0 MINUS EQUAL BACKSPACE TAB Q W E R T Y U I O P LEFTBRACE RIGHTBRACE ENTER LEFTCTRL A S "
    "D F G H J K L SEMICOLON APOSTROPHE GRAVE LEFTSHIFT BACKSLASH Z X C V B N M COMMA DOT SLASH RIGHTSHIFT KPASTERISK "
    "LEFTALT SPACE CAPSLOCK F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 NUMLOCK SCROLLLOCK KP7 KP8 KP9 KPMINUS KP4 KP5 KP6 KPPLUS "
    "KP1 KP2 KP3 KP0 KPDOT",
    87: "F11 F12",
    97: "RIGHTCTRL KPSLASH SYSRQ RIGHTALT",
    102: "HOME UP PAGEUP LEFT RIGHT END DOWN PAGEDOWN INSERT DELETE",
}
KEY_CODES = {f"KEY_{name}": code for first, names in _NAMED.items() for code, name in enumerate(names.split(), first)}


@dataclass
class Session:
    """A session's tables in memory. Frame i of `recording.mp4` was taken at `timestamps[i]`."""

    folder: Path
    fps: float  # nominal; the real times are the timestamps
    timestamps: np.ndarray  # (N,) int64, ms since the Unix epoch, strictly increasing
    repeated: np.ndarray  # (N,) bool, the grabber had nothing new and the last frame was written again
    inputs: pa.Table  # INPUTS, sorted by timestamp
    metadata: dict[str, str]  # schema_version, fps, resolution, keys, clock_offset_ns and what the recorder added

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def video(self) -> Path:
        return self.folder / "recording.mp4"

    @property
    def n_frames(self) -> int:
        return len(self.timestamps)


def find_sessions(data_dir: Path | str) -> list[Path]:
    """Folders under `data_dir` that hold a `recording.mp4`, sorted by name; `data_dir` itself may be one session."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir} is not a folder. Name the folder that holds your run_* sessions.")
    if (data_dir / "recording.mp4").exists():
        return [data_dir]
    for path in data_dir.iterdir():
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):  # glob would pass over it
            raise PermissionError(f"{path} cannot be read. Make it readable, or take it away: chmod u+rx {path}")
    folders = sorted(path.parent for path in data_dir.glob("*/recording.mp4"))
    if not folders:
        raise FileNotFoundError(
            f"{data_dir} holds no session (expected {data_dir}/run_*/recording.mp4). "
            "Record one with: python record_session.py --output " + str(data_dir)
        )
    return folders


def load_session(folder: Path | str) -> Session:
    """Read and check a session's frames and inputs. Raises ValueError naming the file and the row that is wrong."""
    folder = Path(folder)
    frames, inputs = read_table(folder / "frames.parquet", FRAMES), read_table(folder / "inputs.parquet", INPUTS)
    metadata = {k.decode(): v.decode() for k, v in (frames.schema.metadata or {}).items()}
    if int(metadata.get("schema_version", SCHEMA_VERSION)) > SCHEMA_VERSION:
        raise ValueError(
            f"{folder}/frames.parquet has schema version {metadata['schema_version']}, this code reads up to "
            f"{SCHEMA_VERSION}. Update the code: git pull"
        )
    timestamps = frames["timestamp"].to_numpy()
    if len(timestamps) == 0:
        raise ValueError(f"{folder}/frames.parquet has no rows. Delete the session and record it again.")
    if (frames["frame_idx"].to_numpy() != np.arange(len(timestamps))).any():
        raise ValueError(f"{folder}/frames.parquet: frame_idx is not 0, 1, 2, ... Record the session again.")
    backwards = np.flatnonzero(np.diff(timestamps) <= 0)
    if len(backwards):
        row = int(backwards[0]) + 1
        raise ValueError(
            f"{folder}/frames.parquet: timestamp {timestamps[row]} ms in row {row} does not come after "
            f"{timestamps[row - 1]} ms in row {row - 1}. Record the session again."
        )
    times = inputs["timestamp"].to_numpy()
    if (np.diff(times) < 0).any():
        inputs = inputs.take(pa.array(np.argsort(times, kind="stable")))
    if "fps" in metadata:
        fps = float(metadata["fps"]) if re.fullmatch(r"\d+(\.\d*)?", metadata["fps"]) else 0.0
        if fps == 0:
            raise ValueError(f"{folder}: the frames' metadata has fps {metadata['fps']!r}, expected a rate above 0")
    else:  # the oldest form has no metadata
        fps = round(1000.0 / float(np.median(np.diff(timestamps))), 2) if len(timestamps) > 1 else 10.0
    repeated = np.array([bool(x) for x in frames["repeated"].to_pylist()])
    return Session(folder, fps, timestamps, repeated, inputs, metadata)


def key_table(session: Session, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Which keys were down, per frame. Row i belongs to frame i, taken at t_i.

    Returns `state` (N, K) bool, down at t_i, and `any` (N, K) bool, down at any moment of [t_i, t_{i+1}), so that a tap
    between two frames survives. A `repeat` of a key whose `down` was lost counts as down.
    """
    column = {key: k for k, key in enumerate(keys)}
    inputs = session.inputs
    rows = [
        (time_ms, column[_key_name(name)], state != "up")
        for time_ms, kind, name, state in zip(
            *(inputs[c].to_pylist() for c in ("timestamp", "event_type", "key_name", "state")), strict=True
        )
        if kind == "key" and _key_name(name) in column and state in ("down", "up", "repeat")
    ]
    N, K = session.n_frames, len(keys)
    state, any_down = np.zeros((N, K), bool), np.zeros((N, K), bool)
    down = np.zeros(K, bool)
    row = 0
    for i, t_i in enumerate(session.timestamps):
        while row < len(rows) and rows[row][0] <= t_i:
            down[rows[row][1]] = rows[row][2]
            row += 1
        state[i] = any_down[i] = down
        t_next = session.timestamps[i + 1] if i + 1 < N else t_i + 1000 / session.fps
        ahead = row
        while ahead < len(rows) and rows[ahead][0] < t_next:
            any_down[i, rows[ahead][1]] |= rows[ahead][2]
            ahead += 1
    return state, any_down


def mouse_table(session: Session) -> tuple[np.ndarray, np.ndarray]:
    """Last known pointer position per frame: `xy` (N, 2) float32 in pixels and `known` (N,) bool."""
    N = session.n_frames
    mouse = session.inputs.filter(pc.equal(session.inputs["event_type"], "mouse"))
    mouse = mouse.filter(pc.and_(pc.is_valid(mouse["x"]), pc.is_valid(mouse["y"])))
    if len(mouse) == 0:
        return np.zeros((N, 2), np.float32), np.zeros(N, bool)
    last = np.searchsorted(mouse["timestamp"].to_numpy(), session.timestamps, side="right") - 1  # (N,)
    xy = np.stack([mouse["x"].to_numpy(), mouse["y"].to_numpy()], axis=1).astype(np.float32)
    return xy[np.maximum(last, 0)], last >= 0


def key_names(session: Session) -> list[str]:
    """The keys that were pressed in this session, sorted by name, marker keys left out."""
    names = {_key_name(n) for n in session.inputs["key_name"].unique().to_pylist() if n is not None}
    return sorted(names - set(MARKER_KEYS))


def _key_name(name: str | None) -> str | None:
    """`Key(KEY_W)`, as the oldest recordings spell it, is `KEY_W`."""
    return name[4:-1] if name is not None and name.startswith("Key(") else name


def read_table(path: Path | str, schema: pa.Schema) -> pa.Table:
    """Read a parquet file, or its `.jsonl` sibling, as `schema`; columns the older form lacks come back as nulls."""
    path = Path(path)
    older = path.with_suffix(".jsonl")
    if not path.exists() and older.exists():
        table = _read_journal(older, schema)
    elif not path.exists():
        raise FileNotFoundError(f"{path} is missing. {_mend(path)}")
    else:
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable parquet file ({error}). {_mend(path)}") from None
    missing = [f.name for f in schema if f.name not in table.column_names and f.name not in _LATER_COLUMNS]
    if missing and len(table):
        raise ValueError(f"{path} lacks the column {missing[0]!r}; it has {table.column_names}. See docs/data.md")
    metadata = table.schema.metadata
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        try:
            columns.append(table[field.name].cast(field.type))
        except pa.ArrowException:
            found = table.schema.field(field.name).type
            raise ValueError(
                f"{path}: column {field.name!r} is {found}, expected {field.type}. See docs/data.md"
            ) from None
        if columns[-1].null_count and field.name not in _NULLABLE:
            row = columns[-1].is_null().index(True).as_py()
            raise ValueError(f"{path}: row {row} has no {field.name!r}. See docs/data.md")
    return pa.table(columns, schema=schema.with_metadata(metadata))


def _read_journal(path: Path, schema: pa.Schema) -> pa.Table:
    """Read the older form, one JSON object a line."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({name: row.get(name) for name in schema.names})
        except (json.JSONDecodeError, AttributeError) as error:
            if number < len(lines):  # a killed recorder leaves at most half a last line
                raise ValueError(f"{path}, line {number} is no JSON object ({error}): {line[:60]!r}") from None
    try:
        return pa.Table.from_pylist(rows, schema.with_metadata(_journal_metadata(path.parent / "session.json")))
    except pa.ArrowException as error:
        raise ValueError(f"{path} has a value of another type ({error}). See docs/data.md") from None


def _journal_metadata(path: Path) -> dict[str, str]:
    """What `session.json` says, as parquet would hold it; nothing where there is none."""
    try:
        return {k: str(v) for k, v in json.loads(path.read_text()).items()} if path.exists() else {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}). Delete it: the timestamps give the rate.") from None


_LATER_COLUMNS = {"repeated", "source", "reward", "x", "y"}  # schema v1 added them, older recordings do well without
_NULLABLE = _LATER_COLUMNS | {"key_code", "key_name", "state", "data"}
_LABEL = "Make it with: python precompute_labels.py --data-dir {data_dir}"
_ASK = "Take it away, and ask again with: python precompute_labels.py --review 60"
_INTENT = "Make it with: python precompute_labels.py --labeler keys --data-dir {data_dir}"
_MEND = {"overrides": _ASK, "intent": _INTENT} | dict.fromkeys(("progress", "events", "episodes", "returns"), _LABEL)


def _mend(path: Path) -> str:
    """What to do about a table that is missing, or cannot be read."""
    return _MEND.get(path.stem, "Record the session again.").format(data_dir=shlex.quote(str(path.parent.parent)))


def write_table(path: Path | str, rows: dict[str, list] | pa.Table, schema: pa.Schema, metadata: dict | None = None):
    """Write parquet through a temporary name, with explicit types also when there are no rows."""
    path = Path(path)
    metadata = {"schema_version": SCHEMA_VERSION} | (metadata or {})
    schema = schema.with_metadata({k: str(v) for k, v in metadata.items()})
    table = rows.cast(schema) if isinstance(rows, pa.Table) else pa.Table.from_pydict(rows, schema)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class SessionWriter:
    """Writes a session's tables while it is recorded. Times are CLOCK_MONOTONIC nanoseconds.

    Rows go to `.jsonl` journals at once, `metadata` to `session.json`; `close` turns these into parquet with `metadata`
    as it is by then. A killed recorder leaves the older form of a session, which can be read as it is.
    """

    def __init__(self, folder: Path, fps: float, width: int, height: int, keys: list[str], metadata: dict[str, str]):
        self.folder = Path(folder)
        self.clock_offset_ns = time.time_ns() - time.monotonic_ns()  # one per session
        self.metadata = {"fps": fps, "resolution": f"{width}x{height}", "keys": json.dumps(keys)}
        self.metadata |= {"schema_version": SCHEMA_VERSION, "clock_offset_ns": self.clock_offset_ns} | metadata
        self.n_frames = 0
        self.journals = {name: open(self.folder / f"{name}.jsonl", "x", buffering=1) for name in ("frames", "inputs")}
        temporary = self.folder / ".session.json.tmp"
        temporary.write_text(json.dumps({k: str(v) for k, v in self.metadata.items()}, indent=1))
        os.replace(temporary, self.folder / "session.json")

    def frame(self, monotonic_ns: int, repeated: bool = False):
        self._append("frames", monotonic_ns, frame_idx=self.n_frames, repeated=repeated)
        self.n_frames += 1

    def key(self, monotonic_ns: int, name: str, state: str, source: str = "human"):
        code = KEY_CODES.get(name)
        self._append("inputs", monotonic_ns, event_type="key", key_code=code, key_name=name, state=state, source=source)

    def mouse(self, monotonic_ns: int, x: int, y: int, source: str = "human"):
        self._append("inputs", monotonic_ns, event_type="mouse", x=x, y=y, source=source)

    def truth(self, monotonic_ns: int, what: str, data: str = ""):
        if "truth" not in self.journals:
            self.journals["truth"] = open(self.folder / "truth.jsonl", "x", buffering=1)
        self._append("truth", monotonic_ns, what=what, data=data)

    def _append(self, name: str, monotonic_ns: int, **row):
        row["timestamp"] = (monotonic_ns + self.clock_offset_ns) // 1_000_000
        self.journals[name].write(json.dumps(row) + "\n")

    def close(self):
        """Replace the journals by parquet, rows in the order of their time. They go when all parquet is there: an error
        (a full disk) or an interruption loses nothing, and calling again goes on."""
        schemas = {"frames": FRAMES, "inputs": INPUTS, "truth": TRUTH}
        for journal in self.journals.values():
            journal.close()
        paths = {name: self.folder / f"{name}.jsonl" for name in self.journals}
        for name, path in paths.items():
            if path.exists():
                table = _read_journal(path, schemas[name])
                table = table.take(pa.array(np.argsort(table["timestamp"].to_numpy(), kind="stable")))
                write_table(path.with_suffix(".parquet"), table, schemas[name], self.metadata)
        for path in [*paths.values(), self.folder / "session.json"]:
            path.unlink(missing_ok=True)

    def __enter__(self) -> "SessionWriter":
        return self

    def __exit__(self, *_):
        self.close()
