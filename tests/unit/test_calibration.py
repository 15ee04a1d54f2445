"""--event-free: thresholds from footage in which nothing happens."""

import shutil
import tomllib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.sessions import TRUTH, load_session, write_table
from session_labels.calibration import Footage, Peak, choose_thresholds, find_footage
from tests.synthetic import write_session
from tests.unit.test_game import hopper, label  # noqa: F401


@pytest.fixture
def quiet(hopper, tmp_path):  # noqa: F811
    """Footage of the same game in which nobody dies or wins: its flag hangs there all the time, and in frames 10 to 19
    a cloud looks a little like a bursting rabbit."""
    rng = np.random.default_rng(1)
    pictures = np.full((30, 96, 128, 3), 90, np.uint8) + rng.integers(0, 30, (96, 128, 3), np.uint8)
    flag, boom = (
        np.asarray(Image.open(hopper / "pictures" / f"{name}.png")).astype(float) for name in ("flag", "boom")
    )
    other = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((30, 24), Image.BICUBIC))
    pictures[:, 60:84, 90:120] = flag
    pictures[10:20, 10:34, 40:70] = 0.65 * boom + 0.35 * other
    write_session(tmp_path / "run_quiet", 30, pictures=pictures, keys={"KEY_RIGHT": np.ones(30, bool)}, labels=False)
    yield tmp_path / "run_quiet"
    (hopper / "data" / "thresholds.toml").unlink(missing_ok=True)


def test_what_fires_in_ordinary_play_is_dropped_what_comes_near_is_raised(hopper, quiet, capsys):  # noqa: F811
    assert [e["event"] for e in label(hopper)] == ["DEATH", "ATTACK", "ATTACK", "WIN"]
    capsys.readouterr()
    assert [e["event"] for e in label(hopper, event_free=(str(quiet),))] == ["DEATH", "ATTACK", "ATTACK"]
    found = tomllib.loads((hopper / "data" / "thresholds.toml").read_text())["template_thresholds"]
    assert found.keys() == {"boom", "flag"} and found["flag"] == 1 and 0.87 < found["boom"] <= 0.97
    said = capsys.readouterr().out
    assert f"boom: threshold {found['boom']:g}, raised from 0.85: scores 0." in said and "in run_quiet, frame 1" in said
    assert "flag: threshold 1, dropped: scores " in said and "which leaves no room for events" in said
    assert "wreck: threshold 0.85, stays: scores less than 0.75" in said
    assert "thresholds.toml: from 30 frames without an event" in said

    assert len(label(hopper)) == 3, "it counts from now on"
    metadata = pq.read_schema(hopper / "data" / "run_1" / "events.parquet").metadata
    assert metadata[b"template_thresholds"].decode() == f"('boom={found['boom']:g}', 'flag=1')"
    assert len(label(hopper, template_thresholds=("flag=0.85",))) == 4, "a flag beats it"
    label(hopper, event_free=(f"{quiet}:0-4",))  # before the cloud; the file of the last time does not count
    assert "boom" not in (hopper / "data" / "thresholds.toml").read_text()
    (hopper / "data" / "thresholds.toml").unlink()
    assert len(label(hopper)) == 4


def test_thresholds_lie_a_margin_above_what_is_no_event():
    thresholds = dict.fromkeys(("unseen", "low", "near", "above", "high", "strict"), 0.85) | {"strict": 0.96}
    peaks = {"low": 0.82, "near": 0.8212, "above": 0.93, "high": 0.9405, "strict": 0.93}
    chosen = choose_thresholds(thresholds, {name: Peak(score, "in run_1, frame 7") for name, score in peaks.items()})
    assert {name: score for name, (score, _) in chosen.items()} == {"near": 0.852, "above": 0.96, "high": 1.0}
    assert chosen["near"][1] == "raised from 0.85: scores 0.821 in run_1, frame 7"
    assert chosen["high"][1] == "dropped: scores 0.941 in run_1, frame 7, which leaves no room for events"


def test_frames_away_from_true_events_are_free_of_them(hopper, tmp_path):  # noqa: F811
    session = load_session(hopper / "data" / "run_1")
    times = session.timestamps
    shutil.copytree(session.folder, tmp_path / "run_1")
    rows = {"timestamp": times[[20, 60]] - 40, "what": ["death", "pos"], "data": ["", ""]}
    write_table(tmp_path / "run_1" / "truth.parquet", rows, TRUTH)
    (footage,) = find_footage(("truth",), tmp_path, "truth.parquet")
    free = np.flatnonzero(footage.frames(times))  # 0.5 s before to 5 s after the death at 1.96 s
    assert free.tolist() == [*range(15), *range(70, 100)]
    assert np.flatnonzero(Footage(session.folder, 3, 5).frames(times)).tolist() == [3, 4, 5]
    assert Footage(session.folder).frames(times).all()


def test_footage_that_cannot_be_is_explained(hopper, tmp_path):  # noqa: F811
    def fails(match, *words, **changes):
        with pytest.raises(SystemExit, match=match):
            label(hopper, event_free=words, **changes)

    fails("--event-free run_9: neither .*run_9 nor run_9 is a folder", "run_9")
    fails("--event-free run_1:90-100: .*run_1 has frames 0 to 99", "run_1:90-100")
    fails("--event-free run_1:9-8: .*run_1 has frames 0 to 99", "run_1:9-8")
    fails("data:0-9: .*data is no session", f"{hopper / 'data'}:0-9")
    fails("--event-free truth: name the file", "truth")
    fails("--no-detect-events looks for no sprites", "run_1", detect_events=False)
    path = hopper / "data" / "thresholds.toml"
    for text in ("boom = 0.9", "template_thresholds = 0.9", "[template"):
        path.write_text(text)
        with pytest.raises(
            SystemExit, match="thresholds.toml is no TOML file with a table .* --event-free, or take it"
        ):
            label(hopper)
    for row in ("bang = 0.9", "boom = 'high'", "boom = 85", "boom = true"):
        path.write_text(f"[template_thresholds]\n{row}")
        with pytest.raises(
            SystemExit, match=f"thresholds.toml: {row[:4]} = .*, expected a score.* boom, flag, wreck. Make"
        ):
            label(hopper)
    path.unlink()
