"""Events, episodes, rewards and label files: hand-worked cases, and whole sessions with a made-up sprite."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import precompute_labels
from common.returns import discounted_returns
from common.sessions import EPISODES, EVENTS, INPUTS, RETURNS, TRUTH, WIN_KEY, load_session, read_table, write_table
from precompute_labels import (
    Args,
    compare_with_truth,
    death_events,
    episode_rewards,
    find_episodes,
    main,
    win_events,
    write_labels,
)
from tests.reference import specified_returns
from tests.synthetic import write_session

OUTCOMES = {"DEATH": -1.0, "WIN": 1.0}


def times_at(fps, n):
    return (np.arange(n) * 1000 / fps).astype(np.int64)


def bounds(episodes):
    return [(e["start_frame"], e["end_frame"], e["outcome"], e["reward"], e["length"]) for e in episodes]


# --- episodes ---


def test_episodes_of_the_worked_example():
    """Facts 2.6: deaths at 100 and 110, wins at 120 and 300, 400 frames at 30 fps, a gap of 30 frames."""
    events = [(100, "DEATH"), (110, "DEATH"), (120, "WIN"), (300, "WIN")]
    episodes = find_episodes(events, times_at(30, 400), OUTCOMES, 1.0)
    assert bounds(episodes) == [
        (0, 100, "DEATH", -1, 101),
        (130, 300, "WIN", 1, 171),
        (330, 399, "INCOMPLETE", 0, 70),
    ]
    assert [e["episode_id"] for e in episodes] == [0, 1, 2]
    assert sum(e["length"] for e in episodes) == 342


def test_gap_is_seconds_whatever_the_frame_rate():
    for fps in (10, 30):
        episodes = find_episodes([(2 * fps, "DEATH")], times_at(fps, 10 * fps), OUTCOMES, 3.0)
        assert [(e["start_frame"], e["end_frame"]) for e in episodes] == [(0, 2 * fps), (5 * fps, 10 * fps - 1)]
    times = np.array([0, 100, 200, 2900, 3199, 3200, 3300])  # the recorder stalled
    assert bounds(find_episodes([(2, "DEATH")], times, OUTCOMES, 3.0))[1][:2] == (5, 6)


def test_no_events_is_one_incomplete_episode():
    assert bounds(find_episodes([], times_at(10, 7), OUTCOMES, 3.0)) == [(0, 6, "INCOMPLETE", 0, 7)]


def test_event_on_the_last_frame_leaves_nothing_incomplete():
    assert bounds(find_episodes([(6, "WIN")], times_at(10, 7), OUTCOMES, 3.0)) == [(0, 6, "WIN", 1, 7)]


def test_event_on_the_first_frame_is_an_episode_of_one_frame():
    episodes = find_episodes([(0, "DEATH")], times_at(10, 7), OUTCOMES, 0.6)
    assert bounds(episodes) == [(0, 0, "DEATH", -1, 1), (6, 6, "INCOMPLETE", 0, 1)]


def test_two_events_on_one_frame_end_one_episode():
    events = [(5, "WIN"), (5, "DEATH")]
    for gap in (0.0, 0.3):
        episodes = find_episodes(events, times_at(10, 20), OUTCOMES, gap)
        assert [e["outcome"] for e in episodes] == ["DEATH", "INCOMPLETE"]
        assert episodes[1]["start_frame"] == max(6, 5 + round(gap * 10))


def test_other_events_do_not_end_an_episode():
    assert len(find_episodes([(5, "ATTACK")], times_at(10, 20), OUTCOMES, 1.0)) == 1


@pytest.mark.parametrize("outcome", ["DEATH", "WIN", "INCOMPLETE"])
@pytest.mark.parametrize("bonus", [0.0, 0.02])
def test_returns_of_an_episode_are_the_specified_ones(outcome, bonus):
    reward = OUTCOMES.get(outcome, 0.0)
    rewards = episode_rewards({"length": 30, "reward": reward}, bonus)
    expected = specified_returns(30, reward, 0.97, survival_bonus=bonus)
    np.testing.assert_allclose(discounted_returns(rewards, 0.97), expected, rtol=1e-12)


# --- deaths ---


def test_death_is_the_crossing_with_the_peak_as_confidence():
    scores = np.array([0.5, 0.84, 0.85, 0.97, 0.9, 0.6, 0.5])
    assert death_events(scores, times_at(10, 7), 0.85, 2.5) == [(2, 0.97)]


def test_flicker_within_the_gap_is_one_death_and_later_ones_count():
    scores = np.full(100, 0.5)
    scores[[10, 11, 13, 14, 16]] = 0.9, 0.92, 0.91, 0.99, 0.9  # flickers
    scores[60:75] = 0.95
    assert death_events(scores, times_at(10, 100), 0.85, 2.5) == [(10, 0.99), (60, 0.95)]
    assert [row for row, _ in death_events(scores, times_at(10, 100), 0.85, 0.05)] == [10, 13, 16, 60]


def test_death_gap_is_seconds():
    scores = np.array([0.9] + [0.1] * 19 + [0.9] + [0.1] * 9)  # 20 frames apart
    assert len(death_events(scores, times_at(10, 30), 0.85, 2.5)) == 1  # 2.0 s
    assert len(death_events(scores, times_at(5, 30), 0.85, 2.5)) == 2  # 4.0 s


def test_picture_that_stays_is_one_death():
    assert len(death_events(np.full(200, 0.9), times_at(10, 200), 0.85, 2.5)) == 1
    assert death_events(np.full(200, 0.84), times_at(10, 200), 0.85, 2.5) == []


# --- wins ---


def wins(presses, fps=10, n=1000, min_presses=1, window_s=2.0, cooldown_s=30.0):
    return win_events(np.array(presses), times_at(fps, n), min_presses, window_s, cooldown_s)


def test_win_is_the_last_frame_at_or_before_the_press():
    assert wins([1000]) == [10]
    assert wins([1099]) == [10]
    assert wins([1100]) == [11]
    assert wins([-50]) == [0]
    assert wins([10**6]) == [999]
    assert wins([]) == []


def test_win_cooldown_counts_seconds_from_the_last_win():
    assert wins([1000, 30_999, 31_000]) == [10, 310]
    assert wins([1000, 31_000], fps=30) == [30, 930]


def test_press_in_the_cooldown_uses_up_nothing():
    assert wins([1000, 30_500, 31_100]) == [10, 311]


def test_win_needs_the_presses_within_the_window():
    assert wins([1000, 2500], min_presses=2) == [10]
    assert wins([1000, 3500], min_presses=2) == []
    assert wins([1000, 5000, 6000], min_presses=2) == [50]


# --- truth ---


def test_truth_is_matched_one_to_one():
    result = compare_with_truth(np.array([1000, 1200, 9000]), np.array([1100, 5000, 8600]), 0.5)
    assert (result["truth"], result["found"], result["hits"]) == (3, 3, 2)
    assert result["offsets_ms"] == [-100, 400]
    assert compare_with_truth(np.array([501]), np.array([0]), 0.5)["hits"] == 0
    assert compare_with_truth(np.array([500]), np.array([0]), 0.5)["hits"] == 1
    assert compare_with_truth(np.array([]), np.array([3]), 0.5)["hits"] == 0
    assert compare_with_truth(np.array([0, 1000]), np.array([1000]), 0.5)["offsets_ms"] == [0]
    assert compare_with_truth(np.array([1000]), np.array([0, 1000]), 0.5)["offsets_ms"] == [0]
    assert compare_with_truth(np.array([0, 600]), np.array([400, 500]), 0.5)["hits"] == 2


# --- whole sessions ---

N, DEATHS, FRAME_SIZE = 120, (30, 80), (96, 128)  # frames at 10 fps, frames where the sprite appears, height and width


@pytest.fixture
def dataset(tmp_path):
    """Two sessions: one with deaths at 3.0 s and 8.0 s and a win pressed at 11.5 s, one without anything."""
    rng = np.random.default_rng(0)
    sprite = np.asarray(
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((40, 31), Image.BICUBIC)
    )
    yy, xx = np.mgrid[-1:1:31j, -1:1:40j]
    mask = yy**2 + xx**2 < 1
    folder = tmp_path / "sprites" / "creatures" / "tux" / "small"
    folder.mkdir(parents=True)
    alpha = mask.astype(np.uint8) * 255
    Image.fromarray(np.dstack([sprite, alpha]), "RGBA").save(folder / "gameover-0.png")
    Image.fromarray(np.dstack([sprite[::-1, ::-1], alpha]), "RGBA").save(folder / "gameover-1.png")  # never shown
    background = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((160, 96)))
    for name, deaths in (("run_a", DEATHS), ("run_b", ())):
        pictures = np.stack([background[:, i % 32 : i % 32 + 128] for i in range(N)])
        for death in deaths:
            for i in range(death, death + 12):
                pictures[i, 20 + i - death :, 50:][:31, :40][mask] = sprite[mask]
        keys = {"KEY_RIGHT": np.arange(N) % 20 < 10, WIN_KEY: (np.arange(N) == 115) & bool(deaths)}
        write_session(tmp_path / name, N, pictures=pictures, keys=keys, labels=False)
    frames = load_session(tmp_path / "run_a").timestamps
    moments = [frames[0] - 5000, frames[30] - 40, frames[80] - 40, frames[115], frames[-1] + 5000]
    truth = {"timestamp": moments, "what": ["death", "death", "death", "win", "death"]}  # two were not recorded
    write_table(tmp_path / "run_a" / "truth.parquet", truth | {"data": [""] * 5}, TRUTH)
    write_table(tmp_path / "run_b" / "truth.parquet", {"timestamp": [], "what": [], "data": []}, TRUTH)
    return tmp_path


def arguments(dataset, **changes):
    return Args(**{"data_dir": dataset, "sprites": dataset / "sprites", "device": "cpu"} | changes)


def test_labels_of_a_session(dataset, capsys):
    result = main(arguments(dataset, truth=True, survival_bonus=0.001))
    events = read_table(dataset / "run_a" / "events.parquet", EVENTS).to_pydict()
    assert events["event"] == ["DEATH", "DEATH", "WIN"]
    assert events["frame_idx"] == [30, 80, 114]  # the marker goes down 1 ms before frame 115
    assert min(events["confidence"]) > 0.9
    episodes = read_table(dataset / "run_a" / "episodes.parquet", EPISODES).to_pylist()
    assert bounds(episodes) == [(0, 30, "DEATH", -1, 31), (60, 80, "DEATH", -1, 21), (110, 114, "WIN", 1, 5)]
    returns = read_table(dataset / "run_a" / "returns.parquet", RETURNS).to_pydict()
    assert returns["frame_idx"] == [*range(31), *range(60, 81), *range(110, 115)]
    expected = [x for e in episodes for x in specified_returns(e["length"], e["reward"], 0.99, survival_bonus=0.001)]
    np.testing.assert_allclose(returns["return"], expected)
    assert returns["reward"][30] == -1 and returns["reward"][29] == 0.001

    assert read_table(dataset / "run_b" / "events.parquet", EVENTS).num_rows == 0
    assert (
        pq.read_schema(dataset / "run_b" / "events.parquet").field("frame_idx").type == EVENTS.field("frame_idx").type
    )
    assert read_table(dataset / "run_b" / "episodes.parquet", EPISODES)["outcome"].to_pylist() == ["INCOMPLETE"]

    assert result["sessions"]["run_a"]["DEATH"] == 2 and result["sessions"]["run_b"]["DEATH"] == 0
    assert result["truth"]["DEATH"] == {"truth": 2, "found": 2, "hits": 2, "offsets_ms": [40, 40]}
    assert result["truth"]["WIN"]["hits"] == 1
    assert "total: DEATH truth 2 found 2 missed 0 false 0 precision 1.000 recall 1.000" in capsys.readouterr().out
    assert not list(dataset.glob("run_*/.*"))  # nothing temporary left


def test_what_only_looks_like_a_death_at_half_size_is_none(dataset, monkeypatch):
    """The sprite has fine detail; its halved picture drawn twice as large matches at half size only."""
    rng = np.random.default_rng(1)
    smooth = np.asarray(
        Image.fromarray(rng.integers(40, 216, (5, 6, 3), dtype=np.uint8)).resize((40, 32), Image.BICUBIC)
    )
    sprite = np.clip(smooth + rng.choice([-60, 60], (32, 40, 1)), 0, 255).astype(np.uint8)
    decoy = np.asarray(Image.fromarray(sprite).resize((20, 16), Image.BILINEAR).resize((40, 32), Image.NEAREST))
    folder = dataset / "detail" / "creatures" / "tux" / "small"
    folder.mkdir(parents=True)
    Image.fromarray(np.dstack([sprite, np.full((32, 40), 255, np.uint8)]), "RGBA").save(folder / "gameover-0.png")
    pictures = np.full((60, 96, 128, 3), 128, np.uint8)
    pictures[10:20, 20:52, 30:70] = decoy
    pictures[40:50, 63:95, 87:127] = sprite  # an odd place beside the border
    keys = {"KEY_RIGHT": np.ones(60, bool)}
    write_session(dataset / "few" / "run_c", 60, pictures=pictures, keys=keys, labels=False)
    main(arguments(dataset / "few", sprites=dataset / "detail", sprite_threshold=0.8))
    events = read_table(dataset / "few" / "run_c" / "events.parquet", EVENTS).to_pydict()
    assert events["frame_idx"] == [40]

    monkeypatch.setattr(precompute_labels, "NEAR", -9)  # half size alone is deceived
    main(arguments(dataset / "few", sprites=dataset / "detail", sprite_threshold=0.8, overwrite=True))
    events = read_table(dataset / "few" / "run_c" / "events.parquet", EVENTS).to_pydict()
    assert 10 in events["frame_idx"]


def test_metadata_tells_how_labels_were_made(dataset):
    main(arguments(dataset, half_life_s=2.0))
    for name in ("events", "episodes", "returns"):
        metadata = pq.read_schema(dataset / "run_a" / f"{name}.parquet").metadata
        assert float(metadata[b"gamma"]) == pytest.approx(0.5 ** (1 / 20))
        assert metadata[b"sprite_threshold"] == b"0.85" and metadata[b"schema_version"] == b"1"
        assert float(metadata[b"fps"]) == 10 and metadata[b"recording_frames"] == b"120"
        assert int(metadata[b"recording_bytes"]) == (dataset / "run_a" / "recording.mp4").stat().st_size


def test_stride_finds_the_same_deaths_within_the_stride(dataset):
    main(arguments(dataset, event_stride=4))
    events = read_table(dataset / "run_a" / "events.parquet", EVENTS).to_pydict()
    assert events["frame_idx"][:2] == [32, 80]


def test_labels_are_kept_unless_overwritten(dataset, capsys):
    main(arguments(dataset))
    before = (dataset / "run_a" / "returns.parquet").read_bytes()
    main(arguments(dataset, gamma=0.5, truth=True))
    assert (dataset / "run_a" / "returns.parquet").read_bytes() == before
    assert "run_a: has labels (made with gamma 0.99, not 0.5), kept; --overwrite" in capsys.readouterr().out
    main(arguments(dataset, gamma=0.5, overwrite=True))
    assert read_table(dataset / "run_a" / "returns.parquet", RETURNS)["return"][29].as_py() == -0.5


def test_labels_of_another_recording_are_an_error(dataset):
    main(arguments(dataset))
    (dataset / "run_a" / "recording.mp4").write_bytes((dataset / "run_b" / "recording.mp4").read_bytes())
    with pytest.raises(SystemExit, match="(?s)1 of 2.*recording_bytes.*--overwrite"):
        main(arguments(dataset))
    main(arguments(dataset, overwrite=True))
    assert read_table(dataset / "run_a" / "events.parquet", EVENTS)["event"].to_pylist() == ["WIN"]


def test_unreadable_session_does_not_stop_the_others(dataset):
    (dataset / "run_a" / "recording.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match="(?s)1 of 2 sessions were not labelled:.*run_a.*recording.mp4") as error:
        main(arguments(dataset))
    assert isinstance(error.value.code, str)  # printed to stderr, exit status 1
    assert (dataset / "run_b" / "returns.parquet").exists()
    assert not (dataset / "run_a" / "events.parquet").exists()


def test_fewer_rows_than_video_frames_uses_the_rows(dataset, capsys):
    path = dataset / "run_a" / "frames.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 70), path)
    main(arguments(dataset))
    assert "70 rows, 120 video frames; the first 70 are labelled" in capsys.readouterr().out
    assert read_table(dataset / "run_a" / "episodes.parquet", EPISODES)["end_frame"].to_pylist() == [30, 69]


def test_labels_are_written_all_or_none(dataset, monkeypatch):
    """A stop between two renames leaves a session without returns.parquet, which counts as not labelled."""
    main(arguments(dataset))
    rows = {"frame_idx": [1], "event": ["WIN"], "confidence": [1.0]}
    episodes = {name: [] for name in EPISODES.names}
    returns = {name: [] for name in RETURNS.names}

    real, calls = os.replace, []

    def stop_at_the_last(source, target):
        calls.append(target)
        if (
            ".labels.tmp" in str(source)
            and str(target).endswith("episodes.parquet")
            and "run_a/episodes" in str(target)
        ):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(precompute_labels.os, "replace", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        write_labels(dataset / "run_a", rows, episodes, returns, {})
    assert calls
    assert not (dataset / "run_a" / "returns.parquet").exists()
    monkeypatch.undo()
    main(arguments(dataset))  # labels again, without --overwrite
    assert len(read_table(dataset / "run_a" / "events.parquet", EVENTS)) == 3
    assert not (dataset / "run_a" / ".labels.tmp").exists()


def test_a_failure_while_writing_keeps_the_old_labels(dataset):
    main(arguments(dataset))
    before = {p.name: p.read_bytes() for p in (dataset / "run_a").glob("*.parquet")}
    with pytest.raises(Exception):  # noqa: B017, the rows do not fit the schema
        write_labels(dataset / "run_a", {"frame_idx": ["x"], "event": [1], "confidence": [None]}, {}, {}, {})
    assert {p.name: p.read_bytes() for p in (dataset / "run_a").glob("*.parquet")} == before


def test_repeats_of_a_held_marker_are_no_presses(dataset):
    path = dataset / "run_a" / "inputs.parquet"
    table = read_table(path, INPUTS)
    rows = table.to_pylist()
    marker = [r for r in rows if r["key_name"] == WIN_KEY]
    rows += [marker[0] | {"state": "repeat", "timestamp": marker[0]["timestamp"] - 9000 + 40 * i} for i in range(50)]
    write_table(path, {name: [r[name] for r in rows] for name in INPUTS.names}, INPUTS)
    main(arguments(dataset))
    events = read_table(dataset / "run_a" / "events.parquet", EVENTS).to_pydict()
    assert events["event"] == ["DEATH", "DEATH", "WIN"] and events["frame_idx"][2] == 114


def test_missing_sprites_and_bad_flags_are_explained(dataset, tmp_path):
    with pytest.raises(SystemExit, match="no death sprites.*supertux-data.*--sprites"):
        main(arguments(dataset, sprites=tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="event-stride is 0"):
        main(arguments(dataset, event_stride=0))
    with pytest.raises(SystemExit, match="KEY_BACKSLSH is no evdev key name"):
        main(arguments(dataset, win_key="KEY_BACKSLSH"))
    with pytest.raises(SystemExit, match="is not a folder"):
        main(arguments(dataset / "absent", sprites=dataset / "sprites"))


def test_sprites_beside_the_data_are_used_where_the_game_is_missing(dataset, monkeypatch):
    monkeypatch.setattr(precompute_labels, "INSTALLED_SPRITES", dataset / "not_installed")
    main(arguments(dataset, sprites=None))
    assert len(read_table(dataset / "run_a" / "events.parquet", EVENTS)) == 3
