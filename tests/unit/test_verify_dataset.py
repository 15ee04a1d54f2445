"""verify_dataset.py: the lag from key to picture against known ones, the picture, and the command as it is called."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tqdm import tqdm

import verify_dataset
from common.sessions import (
    EPISODES,
    EVENTS,
    FRAMES,
    INTENT,
    PROGRESS,
    RETURNS,
    SessionWriter,
    find_sessions,
    key_table,
    load_session,
    write_table,
)
from common.video import VideoReader, VideoWriter
from tests.synthetic import START_NS, write_session
from verify_dataset import (
    Args,
    choose_frame,
    estimate_lag,
    label_problems,
    main,
    mend_tables,
    onset_changes,
    verify,
)

ROOT = Path(__file__).parents[2]
LAGS = np.arange(-200, 601)
BAR = tqdm(disable=True)


def estimate(lag_ms, seed=0, n_presses=120, locked=False, fps=10, noise=1.0):
    """A recording at `fps` with jitter, in which the picture is livelier from `lag_ms` after each press on for 300 ms;
    `locked` presses come 2 ms after a frame, others at any time."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.integers(900 // fps, 1100 // fps + 1, 12 * n_presses * fps // 10))
    presses = np.sort(
        rng.choice(times[20:-20], n_presses, replace=False) if locked else rng.uniform(*times[[20, -20]], n_presses)
    )
    presses = presses.astype(np.int64) + 2 * locked
    change = rng.gamma(2.0, noise, len(times))
    for press in presses:
        change[(times >= press + lag_ms) & (times < press + lag_ms + 300)] += 3
    return estimate_lag(onset_changes(times, change, presses, LAGS), LAGS)


@pytest.mark.parametrize("lag_ms", [0, 11, 60, 150, 330])
@pytest.mark.parametrize("seed", range(3))
def test_lag_is_found_to_a_third_of_a_frame_where_keys_come_at_any_time(lag_ms, seed):
    lag = estimate(lag_ms, seed)
    assert lag["low_ms"] <= lag_ms <= lag["high_ms"]
    assert abs(lag["lag_ms"] - lag_ms) <= 33 and lag["high_ms"] - lag["low_ms"] <= 100


def test_lag_is_known_to_a_frame_where_keys_keep_step_with_the_frames():
    lag = estimate(11, locked=True)
    assert lag["low_ms"] <= 11 <= lag["high_ms"] and 70 <= lag["high_ms"] - lag["low_ms"] <= 110


def test_keys_ahead_of_the_picture_are_found_too():
    lag = estimate(-80)
    assert lag["low_ms"] <= -80 <= lag["high_ms"] < 0


def test_more_frames_make_it_sharper():
    lag = estimate(50, fps=30)
    assert lag["low_ms"] <= 50 <= lag["high_ms"] and lag["high_ms"] - lag["low_ms"] <= 34


def test_nothing_is_claimed_without_an_effect_or_with_few_presses():
    rng = np.random.default_rng(0)
    claimed = 0
    for _ in range(100):
        times = np.arange(0, 60_000, 100)
        presses = rng.integers(2000, 58_000, 80)
        claimed += estimate_lag(onset_changes(times, rng.gamma(2.0, 1.0, 600), presses, LAGS), LAGS) is not None
    assert claimed <= 5, "one in a hundred is expected"
    assert estimate(50, n_presses=15) is None


def session_with_lag(folder, lag_ms, n=300):
    """Pictures in which a block moves for 300 ms, `lag_ms` after a key went down at any time."""
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True)
    presses = np.sort(rng.integers(1000, n * 100 - 1500, 60))
    x = 0
    with (
        VideoWriter(folder / "recording.mp4", 10, 64, 48, crf=18) as video,
        SessionWriter(folder, 10, 64, 48, ["KEY_SPACE"], {}) as session,
    ):
        for i in range(n):
            t = i * 100
            x = (x + 9 * bool(((t >= presses + lag_ms) & (t < presses + lag_ms + 300)).any())) % 56
            picture = np.full((48, 64, 3), 60, np.uint8)
            picture[20:28, x : x + 8] = 250
            video.add(picture, t * 1_000_000)
            session.frame(START_NS + t * 1_000_000)
        for press in presses:
            session.key(START_NS + int(press) * 1_000_000, "KEY_SPACE", "down")
            session.key(START_NS + int(press + 50) * 1_000_000, "KEY_SPACE", "up")
    return folder


@pytest.mark.parametrize("lag_ms", [40, 180, 400])
def test_lag_of_a_whole_session_and_the_warning(tmp_path, lag_ms):
    session_with_lag(tmp_path / "run_1", lag_ms)
    result = main(Args(dataset=tmp_path, output=None))
    lag = result["lag"]["run_1"]
    assert lag["low_ms"] <= lag_ms <= lag["high_ms"] and abs(lag["lag_ms"] - lag_ms) < 50
    assert lag_ms < lag["shown_ms"] < lag_ms + 100, "the next picture comes up to 100 ms later"
    warned = [f["found"] for f in result["findings"] if "out of step" in f["found"]]
    assert len(warned) == (lag_ms == 400)


def test_lag_of_real_recordings_agrees_with_what_the_game_said():
    """Velocity in truth.parquet is the game's own: after a jump key it changes before the next picture."""
    onsets, delays = [], []
    players = [
        f for f in find_sessions(ROOT / "sample_dataset") if load_session(f).metadata["demonstrator"] == "skilled"
    ]
    for folder in players[:2]:
        facts = verify(folder, BAR)[1]
        times = facts["session"].timestamps
        truth = [row for row in pq.read_table(folder / "truth.parquet").to_pylist() if row["what"] == "pos"]
        upward = np.array([float(row["data"].split()[3]) for row in truth])  # (N,) vy; negative is up
        rows = facts["session"].inputs.to_pylist()
        jumps = [r["timestamp"] for r in rows if r["key_name"] == "KEY_SPACE" and r["state"] == "down"]
        after = np.searchsorted(times, jumps)
        delays += [times[i] - t for i, t in zip(after, jumps, strict=True) if upward[i] < -300 <= upward[i - 1]]
        onsets.append(onset_changes(times, facts["change"], facts["presses"], LAGS))
        assert len(facts["change"]) == len(truth) == len(times)
    lag = estimate_lag(np.concatenate(onsets), LAGS)
    assert len(delays) >= 10 and lag["low_ms"] <= 30 and 50 <= lag["high_ms"] <= np.median(delays) <= 110


def test_the_picture_shows_a_frame_with_keys_held_and_motion(tmp_path):
    for name in ("run_1", "run_2"):
        write_session(tmp_path / name, 60, seed=int(name[-1]))
    args = Args(dataset=tmp_path, output=tmp_path / "stack.png", session="run_2", seed=4)
    drawn = main(args)["drawn"]
    session = load_session(tmp_path / "run_2")
    state = key_table(session, drawn["keys"])[0]
    assert drawn["session"] == "run_2" and drawn["keys"] and state[drawn["frame"]].all()
    pixels = np.asarray(Image.open(args.output).convert("RGB"))
    assert pixels.shape == (400, 1200, 3)
    frames = VideoReader(session.video).read(drawn["frame"] - 2, drawn["frame"] + 1)
    assert (frames[0] != frames[2]).float().mean() > 0.1, "it moves"
    found = {"run_2": verify(tmp_path / "run_2", BAR)[1]}
    assert choose_frame(found, "run_2", 7, 1)[:2] == ("run_2", 7)
    assert choose_frame(found, "run_2", 1, 1) is None and choose_frame(found, "run_2", 60, 1) is None
    assert choose_frame(found, "run_9", -1, 1) is None


def test_the_panels_are_the_frames_in_order(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, picture: shown.append(picture))
    folder = write_session(tmp_path / "run_1", 20)
    verify_dataset.draw_stack(tmp_path / "stack.png", folder / "recording.mp4", 9, ["KEY_SPACE"])
    expected = VideoReader(folder / "recording.mp4").read(7, 10).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(shown), expected)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call the command with these words in `tmp_path`: exit status and what it printed."""

    def call(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["verify_dataset.py", *map(str, words)])
        try:
            runpy.run_path(str(ROOT / "verify_dataset.py"), run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().out

    return call


def test_the_command_its_status_json_and_one_session(tmp_path, run):
    good = write_session(tmp_path / "data" / "run_1", 30, keys={"KEY_RIGHT": np.arange(30) > 3})
    write_session(tmp_path / "data" / "run_2", 30)
    (tmp_path / "data" / "run_2" / "frames.parquet").unlink()
    code, said = run("data", "--json")
    result = json.loads(said)
    assert code == 1 and result["sessions"] == ["run_1", "run_2"]
    wrong = [f for f in result["findings"] if f["severity"] == "error"]
    assert [(f["session"], f["file"]) for f in wrong] == [("run_2", "frames.parquet")]
    assert (tmp_path / "debug_stack.png").exists()
    code, said = run("--data-dir", good, "--output", "None")
    assert code == 0 and "1 sessions: 0 errors, 1 warnings" in said
    assert "warning  run_1/inputs.parquet: KEY_RIGHT is never released. Mend: python verify_dataset.py" in said
    assert run("data", "--nonsense")[0] == 2


@pytest.mark.parametrize(
    ("name", "rows", "metadata", "found"),
    [
        ("intent", range(30), {}, ""),
        ("progress", range(30), {}, ""),
        ("intent", range(29), {}, "has 29 rows, expected one for each frame, 0 to 29"),
        ("progress", range(1, 31), {}, "expected one for each frame"),
        ("intent", range(30), {"recording_bytes": "7"}, "recording_bytes 7, this one has"),
        ("intent", range(30), {"cuts": "[3]"}, "was made for other episodes than episodes.parquet has"),
        ("intent", range(30), {"word": "DANCE"}, "has 'DANCE', expected LOOT, EVADE"),
    ],
)
def test_intents_and_progress_are_of_every_frame_of_this_recording(tmp_path, name, rows, metadata, found):
    folder = write_session(tmp_path / "run_1", 30)
    n, word = len(rows), metadata.get("word", "RUN")
    columns = {"frame_idx": rows, "intent": [word] * n, "timestamp": range(n)}
    columns |= {"dx": [1.0] * n, "dy": [0.0] * n, "confidence": [1.0] * n, "progress": [0.5] * n}
    schema = {"intent": INTENT, "progress": PROGRESS}[name]
    write_table(folder / f"{name}.parquet", {c: columns[c] for c in schema.names}, schema, metadata)
    wrong = [f for f in verify(folder, BAR)[0] if f.file == f"{name}.parquet"]
    assert [f.severity for f in wrong] == ["error"] * bool(found) and all(found in f.found for f in wrong)
    mend = {"intent": "python precompute_labels.py --labeler keys --data-dir ", "progress": "rm "}[name]
    assert all(f.mend.startswith(mend) and str(folder) in f.mend for f in wrong)


def test_what_is_no_data_set_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (("file", "is not a folder"), ("none", "is not a folder"), ("empty", "holds no session")):
        with pytest.raises(SystemExit, match=message):
            main(Args(dataset=tmp_path / name, output=None))
    with pytest.raises(SystemExit, match="--output .*file/stack.png: .*cannot be made"):
        main(Args(dataset=tmp_path / "empty", output=tmp_path / "file" / "stack.png"))


def test_folders_without_a_video_or_unreadable(tmp_path, monkeypatch, capsys):
    for name in ("run_1", "run_2", "run_3"):
        write_session(tmp_path / name, 20)
    (tmp_path / "run_2" / "recording.mp4").unlink()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "run_3" and access(path, mode))
    with pytest.raises(SystemExit) as stopped:
        main(Args(dataset=tmp_path, output=None))
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and f"chmod u+rwx {tmp_path / 'run_3'}" in said
    assert "run_2/recording.mp4: is missing beside frames.parquet, inputs.parquet, events.parquet" in said
    assert "run_1/inputs.parquet" in said, "the others are checked all the same"
    with pytest.raises(PermissionError, match="run_3 cannot be read"):
        find_sessions(tmp_path)


def test_missing_sprites_concern_sessions_without_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify_dataset, "INSTALLED_SPRITES", tmp_path / "no game")

    def said():
        return [
            f["file"] for f in main(Args(dataset=tmp_path, output=None))["findings"] if f["file"] != "inputs.parquet"
        ]

    write_session(tmp_path / "run_1", 20)
    assert said() == []
    write_session(tmp_path / "run_2", 20, labels=False)
    assert said() == ["sprites"]
    beside = tmp_path / "sprites" / "creatures" / "tux" / "small"
    beside.mkdir(parents=True)
    Image.new("RGBA", (4, 4)).save(beside / "gameover-0.png")
    assert said() == []
    (tmp_path / "run_1" / "events.parquet").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(Args(dataset=tmp_path, output=None, json=True))
    errors = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["file"] != "inputs.parquet"]
    assert [f["file"] for f in errors] == ["episodes.parquet"]
    assert errors[0]["mend"].endswith(f"--data-dir {tmp_path / 'run_1'} --sprites {tmp_path / 'sprites'}")


def killed(folder, n=40):
    """A session whose journals are still there."""
    write_session(folder, n, labels=False)
    session = load_session(folder)
    (folder / "frames.parquet").unlink()
    (folder / "inputs.parquet").unlink()
    writer = SessionWriter(folder, 10, 64, 48, ["KEY_RIGHT"], {"game": "none"})
    for i in range(n):
        writer.frame(START_NS + i * 100_000_000)
    for row in session.inputs.to_pylist():
        writer._append("inputs", 0, **row)
    return writer


def test_repair_of_a_killed_recording(tmp_path, run, monkeypatch):
    killed(tmp_path / "run_1")
    keys = ["KEY_RIGHT", "KEY_SPACE"]
    before = load_session(tmp_path / "run_1")
    code, said = run("--repair", "run_1")
    assert code == 0 and "frames.parquet written from frames.jsonl" in said
    monkeypatch.chdir(tmp_path / "run_1")
    assert main(Args(dataset=Path("."), output=None))["findings"] == []
    after = load_session(tmp_path / "run_1")
    assert not [*(tmp_path / "run_1").glob("*.jsonl")] and after.fps == 10 and after.metadata["game"] == "none"
    for a, b in zip(key_table(before, keys), key_table(after, keys), strict=True):
        assert np.array_equal(a, b) and a.any(), "a release after the last frame changes no row"


def test_repair_puts_whole_labels_in_place(tmp_path):
    """What a run leaves that was killed between two of the three tables."""
    folder = tmp_path / "run_1"
    write_session(folder, 40)
    kept = {name: (folder / f"{name}.parquet").read_bytes() for name in ("events", "episodes", "returns")}
    (folder / ".labels.tmp").mkdir()
    for name in ("episodes", "returns"):
        (folder / f"{name}.parquet").rename(folder / ".labels.tmp" / f"{name}.parquet")
    result = main(Args(tmp_path, repair=True))
    assert result["repairs"][0] == "run_1: labels put in place from .labels.tmp"
    assert all((folder / f"{name}.parquet").read_bytes() == labels for name, labels in kept.items())


def test_a_recording_that_goes_on_is_left_alone(tmp_path, monkeypatch):
    writer = killed(tmp_path / "run_1")
    monkeypatch.setattr(verify_dataset.time, "sleep", lambda seconds: writer.frame(START_NS + 4_000_000_000))
    with pytest.raises(SystemExit):  # one row more than pictures
        main(Args(dataset=tmp_path, output=None, repair=True))
    assert sorted(p.name for p in (tmp_path / "run_1").iterdir()) == [
        "frames.jsonl",
        "inputs.jsonl",
        "recording.mp4",
        "session.json",
    ]


def test_an_interrupted_repair_loses_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    killed(tmp_path / "run_1")
    n_rows = {name: (tmp_path / "run_1" / f"{name}.jsonl").read_text() for name in ("frames", "inputs")}
    original = verify_dataset.sessions.write_table

    def stop(path, *rest):
        if path.name == "inputs.parquet":
            raise KeyboardInterrupt
        original(path, *rest)

    monkeypatch.setattr(verify_dataset.sessions, "write_table", stop)
    with pytest.raises(KeyboardInterrupt):
        main(Args(dataset=tmp_path, output=None, repair=True))
    folder = tmp_path / "run_1"
    assert (folder / "frames.jsonl.bak").read_text() == n_rows["frames"]
    assert (folder / "inputs.jsonl").read_text() == n_rows["inputs"] and load_session(folder).n_frames == 40
    monkeypatch.undo()
    assert main(Args(dataset=tmp_path, output=None, repair=True))["findings"] == []
    assert (folder / "inputs.jsonl.bak").read_text() == n_rows["inputs"]


def test_repairs_never_overwrite_an_older_backup(tmp_path):
    folder = write_session(tmp_path / "run_1", 20)
    (folder / "inputs.parquet.bak").write_text("older")
    original = (folder / "inputs.parquet").read_bytes()
    main(Args(dataset=folder, output=None, repair=True))  # the key that is held at the end
    assert (folder / "inputs.parquet.bak").read_text() == "older"
    assert (folder / "inputs.parquet.bak2").read_bytes() == original


def test_rows_whose_numbers_make_no_sense_are_not_touched():
    frames = pa.table({"frame_idx": [0, 2, 2, 1], "timestamp": [0, 100, 200, 300], "repeated": [False] * 4})
    tables, notes = mend_tables({"frames": frames.cast(FRAMES)}, n_video=2)
    assert tables["frames"].equals(frames.cast(FRAMES)) and notes == []


def test_an_episode_that_begins_right_after_another_does_not_share_its_returns():
    rows = {"episode_id": [0, 1], "start_frame": [0, 3], "end_frame": [2, 4], "outcome": ["DEATH", "WIN"]}
    episodes = pa.table(rows | {"reward": [-1.0, 1.0], "length": [3, 2]}, EPISODES)
    events = pa.table({"frame_idx": [2, 4], "event": ["DEATH", "WIN"], "confidence": [0.9, 1.0]}, EVENTS)
    columns = {"frame_idx": [0, 1, 2, 3, 4], "return": [-0.25, -0.5, -1, 0.5, 1], "reward": [0.0, 0, -1, 0, 1]}
    assert list(label_problems(events, episodes, pa.table(columns, RETURNS), 5, "0.5")) == []
    columns["return"][2] = -0.75  # as if the second one went on from it
    problems = list(label_problems(events, episodes, pa.table(columns, RETURNS), 5, "0.5"))
    assert problems == [("returns", "2 returns are not reward + 0.5 times the next one, first at frame 1")]


def test_odd_sizes_are_no_finding(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (20, 49, 65, 3), np.uint8)
    write_session(tmp_path / "run_1", 20, pictures=pictures, keys={"KEY_RIGHT": np.zeros(20, bool)}, labels=False)
    session = load_session(tmp_path / "run_1")
    assert session.metadata["resolution"] == "65x49" and VideoReader(session.video).width == 64
    assert [f.found for f in verify(tmp_path / "run_1", BAR)[0]] == ["holds no key event"]
