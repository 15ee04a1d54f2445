"""Session files: schema, alignment of keys and frames, the older form, the crash journal, broken files."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import sessions
from common.sessions import EVENTS, FRAMES, INPUTS, SessionWriter, find_sessions, key_table, load_session, read_table
from tests.reference import naive_key_table

KEYS = ["KEY_LEFT", "KEY_RIGHT", "KEY_SPACE"]
MS = 1_000_000


def write(folder, events, n_frames=20, step_ms=100, close=True):
    """Frames every `step_ms` from 0 on; events (ms, key, state)."""
    folder.mkdir(exist_ok=True)
    writer = SessionWriter(folder, 1000 / step_ms, 64, 48, KEYS, {"game": "none"})
    for i in range(n_frames):
        writer.frame(i * step_ms * MS)
    for time_ms, key, state in events:
        writer.key(time_ms * MS, key, state)
    if close:
        writer.close()
    return folder


def test_key_codes_are_evdevs():
    assert len(sessions.KEY_CODES) == 99
    known = {"KEY_ESC": 1, "KEY_LEFTCTRL": 29, "KEY_BACKSLASH": 43, "KEY_SPACE": 57, "KEY_F12": 88, "KEY_RIGHT": 106}
    assert known.items() <= sessions.KEY_CODES.items()


def test_tap_between_two_frames_survives_in_any_only(tmp_path):
    session = load_session(write(tmp_path / "run", [(310, "KEY_SPACE", "down"), (340, "KEY_SPACE", "up")]))
    state, any_down = key_table(session, ["KEY_SPACE"])
    assert not state.any()
    assert np.flatnonzero(any_down).tolist() == [3]


def test_a_key_down_at_the_frame_belongs_to_it(tmp_path):
    session = load_session(write(tmp_path / "run", [(300, "KEY_RIGHT", "down"), (500, "KEY_RIGHT", "up")]))
    state, any_down = key_table(session, ["KEY_RIGHT"])
    assert np.flatnonzero(state).tolist() == [3, 4]
    assert np.flatnonzero(any_down).tolist() == [3, 4]


def test_key_table_equals_the_naive_one(tmp_path):
    rng = np.random.default_rng(0)
    for trial in range(20):
        times = np.sort(rng.integers(-200, 2200, 60)).tolist()
        events = [(t, KEYS[rng.integers(3)], ["down", "up", "repeat"][rng.integers(3)]) for t in times]
        session = load_session(write(tmp_path / f"run_{trial}", events))
        state, any_down = key_table(session, KEYS)
        naive_state, naive_any = naive_key_table(session, KEYS)
        np.testing.assert_array_equal(state, naive_state)
        np.testing.assert_array_equal(any_down, naive_any)


def test_unsorted_inputs_are_sorted(tmp_path):
    folder = write(tmp_path / "run", [(500, "KEY_RIGHT", "down"), (900, "KEY_RIGHT", "up")])
    table = pq.read_table(folder / "inputs.parquet")
    pq.write_table(table.take([1, 0]), folder / "inputs.parquet")
    assert np.flatnonzero(key_table(load_session(folder), ["KEY_RIGHT"])[0]).tolist() == [5, 6, 7, 8]


def test_metadata_and_types_also_without_rows(tmp_path):
    folder = write(tmp_path / "run", [])
    for name, schema in (("frames", FRAMES), ("inputs", INPUTS)):
        stored = pq.read_schema(folder / f"{name}.parquet")
        assert stored.remove_metadata().equals(schema)
        assert {b"schema_version", b"fps", b"resolution", b"keys", b"clock_offset_ns"} <= stored.metadata.keys()
    assert json.loads(load_session(folder).metadata["keys"]) == KEYS
    sessions.write_table(folder / "events.parquet", {"frame_idx": [], "event": [], "confidence": []}, EVENTS)
    assert read_table(folder / "events.parquet", EVENTS).schema.remove_metadata().equals(EVENTS)


def test_a_killed_recording_reads_as_the_older_form(tmp_path):
    events = [(300, "KEY_RIGHT", "down"), (500, "KEY_RIGHT", "up")]
    closed, killed = write(tmp_path / "closed", events), write(tmp_path / "killed", events, close=False)
    with open(killed / "inputs.jsonl", "a") as journal:
        journal.write('{"timestamp": 17')  # half a line
    assert not (killed / "frames.parquet").exists() and not (closed / "frames.jsonl").exists()
    np.testing.assert_array_equal(*(key_table(load_session(folder), KEYS)[0] for folder in (closed, killed)))
    assert load_session(killed).fps == 10.0


def test_metadata_is_there_from_the_start_and_may_change_until_the_end(tmp_path):
    writer = SessionWriter(tmp_path, 12.5, 64, 48, KEYS, {"game": "none"})
    writer.metadata["dropped"] = 3
    for i in range(4):
        writer.frame(i * 100 * MS)
    killed = load_session(tmp_path)
    assert killed.fps == 12.5 and killed.metadata["game"] == "none" and json.loads(killed.metadata["keys"]) == KEYS
    writer.close()
    closed = load_session(tmp_path)
    assert closed.metadata == killed.metadata | {"dropped": "3"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frames.parquet", "inputs.parquet"]
    (tmp_path / "session.json").write_text("[")
    (tmp_path / "inputs.parquet").rename(tmp_path / "inputs.jsonl")
    with pytest.raises(ValueError, match="inputs.jsonl"):
        load_session(tmp_path)


@pytest.mark.parametrize("file", ["frames.parquet", "inputs.parquet", "truth.parquet"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_while_closing_loses_nothing(tmp_path, monkeypatch, file, error):
    writer = SessionWriter(tmp_path, 10, 64, 48, KEYS, {})
    for i in range(5):
        writer.frame(i * 100 * MS)
        writer.truth(i * 100 * MS, "pos", str(i))
    writer.key(250 * MS, "KEY_RIGHT", "down")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(source, target):
        if str(target).endswith(file):
            raise error
        replace(source, target)

    replace = sessions.os.replace
    monkeypatch.setattr(sessions.os, "replace", fail)
    with pytest.raises(type(error)):
        writer.close()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.items() <= after.items() and not any("tmp" in name for name in after)
    assert load_session(tmp_path).n_frames == 5
    monkeypatch.undo()
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frames.parquet", "inputs.parquet", "truth.parquet"]
    session = load_session(tmp_path)
    assert session.n_frames == 5 and session.inputs["key_name"].to_pylist() == ["KEY_RIGHT"]
    writer.close()
    assert load_session(tmp_path).n_frames == 5


def test_a_second_recording_does_not_overwrite_the_journals_of_a_killed_one(tmp_path):
    killed = write(tmp_path / "run", [], close=False)
    before = (killed / "frames.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="frames.jsonl"):
        write(killed, [])
    assert (killed / "frames.jsonl").read_bytes() == before


def test_the_oldest_spelling_and_missing_columns_are_read(tmp_path):
    (tmp_path / "frames.jsonl").write_text("".join(f'{{"frame_idx": {i}, "timestamp": {i * 100}}}\n' for i in range(5)))
    row = {"timestamp": 200, "event_type": "key", "key_code": 17, "key_name": "Key(KEY_W)", "state": "down"}
    (tmp_path / "inputs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"key_name": None}) + "\n")
    session = load_session(tmp_path)
    assert sessions.key_names(session) == ["KEY_W"]
    assert key_table(session, ["KEY_W"])[0].ravel().tolist() == [False, False, True, True, True]


def test_mouse_rows(tmp_path):
    tmp_path.joinpath("run").mkdir()
    with SessionWriter(tmp_path / "run", 10, 64, 48, [], {}) as writer:
        for i in range(4):
            writer.frame(i * 100 * MS)
        writer.mouse(150 * MS, 7, 9)
    xy, known = sessions.mouse_table(load_session(tmp_path / "run"))
    assert known.tolist() == [False, False, True, True] and xy[2].tolist() == [7, 9]
    path = tmp_path / "run" / "inputs.parquet"
    row = pq.read_table(path).to_pylist()[0]
    without = row | {"timestamp": row["timestamp"] + 100, "x": None}
    pq.write_table(pa.Table.from_pylist([row, without], INPUTS), path)
    xy, known = sessions.mouse_table(load_session(tmp_path / "run"))
    assert known.tolist() == [False, False, True, True] and xy[3].tolist() == [7, 9], "a row without a place is skipped"


def test_errors_name_the_file_and_the_row(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_sessions(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="record_session.py"):
        find_sessions(tmp_path)
    folder = write(tmp_path / "run", [])
    good = pq.read_table(folder / "frames.parquet")

    def broken(match, columns=None, schema=None, data=None):
        path = folder / "frames.parquet"
        if data is not None:
            path.write_bytes(data)
        else:
            pq.write_table(pa.table(columns, schema=schema), path)
        with pytest.raises(ValueError, match=match):
            load_session(folder)

    columns = {name: good[name].to_pylist() for name in good.column_names}
    broken("has no rows", {name: [] for name in columns}, FRAMES)
    broken("in row 3 does not come after", columns | {"timestamp": [*range(3), 2, *range(4, 20)]}, FRAMES)
    broken("frame_idx is not", columns | {"frame_idx": [5] * 20}, FRAMES)
    broken("column 'timestamp' is string", columns | {"timestamp": ["noon"] * 20})
    broken("lacks the column 'timestamp'", {"frame_idx": columns["frame_idx"]})
    broken("not a readable parquet", data=b"PAR1 not really")
    broken("not a readable parquet", data=b"")
    broken("row 4 has no 'timestamp'", columns | {"timestamp": [*range(4), None, *range(5, 20)]}, FRAMES)
    for rate in ("fast", "0", "-10", "nan"):
        broken(f"has fps '{rate}'", columns, FRAMES.with_metadata({"fps": rate}))
    newer = FRAMES.with_metadata({"schema_version": "2"})
    broken("schema version 2", columns, newer)


def test_errors_of_the_older_form_name_the_line_or_the_value(tmp_path):
    folder = write(tmp_path / "run", [(300, "KEY_RIGHT", "down")], close=False)
    path = folder / "frames.jsonl"
    lines = path.read_text().splitlines()
    for damaged, match in (
        ([*lines[:3], "{half", *lines[3:]], "frames.jsonl, line 4 is no JSON object"),
        ([*lines[:3], "[1, 2]", *lines[3:]], "frames.jsonl, line 4 is no JSON object"),
        ([lines[0].replace(": 0", ': "zero"'), *lines[1:]], "frames.jsonl has a value of another type"),
        ([lines[0].replace("timestamp", "time"), *lines[1:]], "row 0 has no 'timestamp'"),
        ([*lines, "\ufffd\x00"], None),  # only the last line may be broken
    ):
        path.write_text("\n".join(damaged) + "\n")
        if match:
            with pytest.raises(ValueError, match=match):
                load_session(folder)
        else:
            assert load_session(folder).n_frames == 20


def test_write_leaves_no_half_file(tmp_path):
    path = tmp_path / "events.parquet"
    sessions.write_table(path, {"frame_idx": [1], "event": ["WIN"], "confidence": [1.0]}, EVENTS)
    before = path.read_bytes()
    with pytest.raises(pa.ArrowException):
        sessions.write_table(path, {"frame_idx": ["x"], "event": ["WIN"], "confidence": [1.0]}, EVENTS)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["events.parquet"]
