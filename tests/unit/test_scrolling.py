"""Camera steps of made-up pictures whose motion is known, progress.parquet, its rewards, comparison with the truth."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from common.sessions import EPISODES, PROGRESS, RETURNS, TRUTH, load_session, read_table, write_table
from precompute_labels import Args, main
from session_labels import scrolling
from session_labels.scrolling import (
    LOST,
    Curve,
    background_share,
    best_path,
    camera_steps,
    compare_progress,
    count_votes,
    draw_progress,
    progress_of,
    progress_report,
    progress_rewards,
    spread,
    support,
    true_curves,
)
from tests.synthetic import write_session

H, W = 240, 320
WIDE = 2400


def texture(rng, height, width, cell=4):
    """Blots of about `cell` pixels, uint8 (height, width, 3)."""
    small = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))


def found(pictures):
    """Steps (N, 2) dy, dx, confidence (N,) and share of `pictures` (N, H, W, 3), handed over in chunks of 7."""
    frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    chunks = ((range(i, min(i + 7, len(frames))), frames[i : i + 7]) for i in range(0, len(frames), 7))
    return camera_steps(count_votes(chunks, tqdm(disable=True)))


def walk(n, rng):
    """Camera x (n,) that speeds up to 30 pixels a frame, slows down, stands and turns round."""
    speed = np.interp(np.linspace(0, 7, n), range(8), [0, 0, 25, 30, 5, 0, -20, -28]).round().astype(int)
    return 300 + np.cumsum(speed + (speed != 0) * rng.integers(-2, 3, n))


def test_known_shifts_are_found_exactly():
    rng = np.random.default_rng(0)
    world = texture(rng, 300, WIDE)
    x = walk(80, rng)
    y = 20 + 4 * rng.integers(0, 3, 80)
    steps, confidence, _ = found([world[b : b + H, a : a + W] for b, a in zip(y, x, strict=True)])
    assert np.diff(x).max() >= 30 and np.diff(x).min() <= -25 and (np.diff(x) % 2).any() and np.diff(y).any()
    np.testing.assert_array_equal(steps[1:, 1].round(), np.diff(x))
    np.testing.assert_array_equal(steps[1:, 0], np.diff(y))
    assert steps[0].tolist() == [0, 0] and confidence[0] == 0
    assert confidence[1:].min() > 0.9


def test_background_at_half_speed_does_not_win():
    rng = np.random.default_rng(1)
    behind, level = texture(rng, H, WIDE), texture(rng, H, WIDE)
    x, pictures = walk(120, rng), []
    for a in x:
        picture = behind[:, a // 2 : a // 2 + W].copy()
        picture[160:] = level[160:, a : a + W]  # a third of the picture
        pictures.append(picture)
    steps, _, share = found(pictures)
    slow = (np.diff(x) != 0) & (np.abs(np.diff(x)) < 8)  # the two are then too near to each other in one frame
    assert share == 0.5 and 0 < slow.mean() < 0.25
    np.testing.assert_allclose(steps[1:, 1][~slow], np.diff(x)[~slow], atol=1)
    assert (np.abs(steps[1:, 1] - np.diff(x))[slow] <= np.abs(np.diff(x))[slow] / 2 + 0.5).all()


def test_without_a_background_to_be_seen_the_level_keeps_its_speed():
    """A cave after the open: the level's step is not taken for a background's."""
    rng = np.random.default_rng(8)
    behind, level = texture(rng, H, WIDE), texture(rng, H, WIDE)
    x = 100 + np.cumsum(np.repeat([0, 20, 24, 18, 14, 22], 16))
    pictures = []
    for i, a in enumerate(x):
        picture = behind[:, a // 2 : a // 2 + W].copy()
        top = 160 if i < 40 else 0
        picture[top:] = level[top:, a : a + W]
        pictures.append(picture)
    steps, _, share = found(pictures)
    assert share == 0.5
    np.testing.assert_allclose(np.delete(steps, [0, 40], 0)[:, 1], np.delete(np.diff(x), 39), atol=1)


def test_tiles_that_repeat_are_told_by_the_background():
    """The ground alone says 30 pixels to the right as well as 2 to the left; it is seen in two bands of six."""
    rng = np.random.default_rng(2)
    behind, tile = texture(rng, H, WIDE), texture(rng, 80, 32)
    ground = np.tile(tile, (1, 2 * WIDE // 32, 1))
    x, pictures = walk(110, rng), []
    for a in x:
        picture = behind[:, a * 35 // 100 : a * 35 // 100 + W].copy()
        picture[160:] = ground[:, a : a + W]
        pictures.append(picture)
    steps, _, share = found(pictures)
    assert share == 0.35
    np.testing.assert_allclose(steps[1:, 1], np.diff(x), atol=6)  # a wrong tile were 32 off
    assert compare_progress(np.cumsum(steps[:, 1]), x) > 0.999


def test_what_belongs_to_the_screen_and_what_runs_about_does_not_win():
    rng = np.random.default_rng(3)
    world, hud, sprite = texture(rng, H, WIDE), texture(rng, 32, W), texture(rng, 40, 30)
    x, pictures = walk(100, rng), []
    for i, a in enumerate(x):
        picture = world[:, a : a + W].copy()
        picture[:32] = hud
        left = 20 + 5 * i % (W - 60)
        picture[120:160, left : left + 30] = sprite
        picture[60:100, 140:170] = sprite  # the player, always in the middle
        pictures.append(picture)
    steps, _, _ = found(pictures)
    np.testing.assert_allclose(steps[1:, 1], np.diff(x), atol=1)


def test_a_cut_and_black_pictures_end_the_sum():
    rng = np.random.default_rng(4)
    one, other = texture(rng, H, WIDE), texture(rng, H, WIDE)
    pictures = [one[:, 8 * i : 8 * i + W] for i in range(30)]
    pictures += [np.zeros((H, W, 3), np.uint8)] * 3
    pictures += [one[:, 8 * i : 8 * i + W] for i in range(20)]  # the level again, frames 33 to 52
    pictures += [other[:, 8 * i : 8 * i + W] for i in range(20)]  # a cut, frame 53
    steps, confidence, _ = found(pictures)
    assert np.flatnonzero(confidence < LOST).tolist() == [0, 30, 31, 32, 33, 53]
    assert not steps[confidence < LOST].any()
    progress = progress_of(steps[:, 1], confidence, 32.0)
    np.testing.assert_allclose(progress[[29, 52, 72]], [29 / 4, 19 / 4, 19 / 4], atol=0.1)
    assert progress[[0, 30, 31, 32, 33, 53]].tolist() == [0] * 6


def test_pictures_of_one_colour_give_no_step():
    steps, confidence, share = found([np.full((H, W, 3), 90, np.uint8)] * 5)
    assert not steps.any() and not confidence.any() and share is None


def test_too_small_pictures_are_explained():
    with pytest.raises(ValueError, match="48x40 is too small to see it scroll, expected 64x96 or more"):
        found([np.zeros((40, 48, 3), np.uint8)] * 2)


def test_small_pictures_are_measured_too():
    world = texture(np.random.default_rng(9), 96, WIDE)
    steps, confidence, _ = found([world[:, 6 * i : 6 * i + 128] for i in range(20)] + [world[:, 2000:2128]])
    np.testing.assert_allclose(steps[1:20, 1], 6, atol=0.5)
    assert confidence[1:20].min() > 0.9 and confidence[20] < LOST


def test_best_path_is_the_best_of_all_paths():
    rng = np.random.default_rng(5)
    for _ in range(20):
        score = rng.random((5, 4)) * 0.4
        paths = np.stack(np.meshgrid(*[range(4)] * 5, indexing="ij"), -1).reshape(-1, 5)
        turns = np.minimum(scrolling.TURN * np.abs(np.diff(paths)), scrolling.TURN_AT_MOST).sum(1)
        total = score[np.arange(5), paths].sum(1) - turns
        assert best_path(score).tolist() == paths[total.argmax()].tolist()


def test_of_two_steps_alike_the_one_nearer_to_those_before_and_after_is_taken():
    score = np.zeros((5, 41))
    score[[0, 1, 3, 4], 35] = 2
    score[2, [35, 19]] = 1, 1.5  # a tile further to the left is seen a little better
    assert best_path(score).tolist() == [35] * 5
    score[2, 19] = 5
    assert best_path(score).tolist() == [35, 35, 19, 35, 35]


def test_bands_that_stand_still_count_less():
    bands = np.zeros((1, 41))
    bands[0, [20, 30]] = 4, 1  # four bands without motion, one with
    assert support(bands, None).argmax() == 30
    assert support(bands, None)[0, [20, 30]].tolist() == [4 * scrolling.STILL, 1]


def test_no_background_is_no_share():
    assert background_share(np.zeros((50, 41))) is None
    rng = np.random.default_rng(6)
    steps = rng.integers(-20, 21, 400)
    bands = 5 * np.eye(41)[steps + 20]
    assert background_share(bands) is None
    bands[np.arange(400), np.rint(steps * 0.25).astype(int) + 20] += 1
    assert background_share(bands) == 0.25


def test_steps_over_several_frames_are_shared_among_them():
    values = np.array([0.0, 3.0, 6.0])  # of frames 0, 3, 6
    assert spread(values, 3, 9).tolist() == [0, 3, 3, 3, 6, 6, 6, 6, 6]
    assert spread(values, 1, 3).tolist() == [0, 3, 6]


# --- rewards ---


def test_rewards_lie_on_the_frame_before_the_step_and_end_with_the_episode():
    steps = np.array([9.0, 0.5, -0.25, 1.0, 7.0, 7.0])  # into frames 0 to 5
    assert progress_rewards(steps, 0, 3).tolist() == [0.5, -0.25, 1.0, 0.0]
    assert progress_rewards(steps, 3, 3).tolist() == [0.0]


@pytest.fixture
def dataset(tmp_path):
    """A session of 60 frames that scrolls by 8 pixels a frame, from frame 40 on back by 4."""
    rng = np.random.default_rng(7)
    world = texture(rng, H, WIDE)
    x = np.cumsum(np.where(np.arange(60) < 40, 8, -4)) - 8
    pictures = np.stack([world[:, a : a + W] for a in x])
    write_session(tmp_path / "run_a", 60, pictures=pictures, keys={"KEY_RIGHT": np.ones(60, bool)}, labels=False)
    times = load_session(tmp_path / "run_a").timestamps
    truth = {"timestamp": times, "what": ["pos"] * 60, "data": [f"{100 + a}.0 353.2 0.0 0.0" for a in x]}
    write_table(tmp_path / "run_a" / "truth.parquet", truth, TRUTH)
    return tmp_path


def label(dataset, **changes):
    options = {"detect_events": False, "device": "cpu", "progress_reward": 0.01, "overwrite": True} | changes
    return main(Args(data_dir=dataset, **options))


def test_rewards_of_a_session(dataset):
    label(dataset, survival_bonus=0.001, gamma=0.9)
    rows = read_table(dataset / "run_a" / "progress.parquet", PROGRESS).to_pydict()
    assert rows["frame_idx"] == list(range(60))
    np.testing.assert_allclose(rows["dx"], [0] + [8] * 39 + [-4] * 20, atol=0.5)
    np.testing.assert_allclose(rows["dy"], 0)
    assert rows["progress"][39] == pytest.approx(39 * 8 / 32, abs=0.2)
    assert rows["progress"][59] == pytest.approx((39 * 8 - 20 * 4) / 32, abs=0.3)
    returns = read_table(dataset / "run_a" / "returns.parquet", RETURNS)
    reward = returns["reward"].to_numpy()
    np.testing.assert_allclose(reward[:-1], 0.001 + 0.01 * np.array(rows["dx"][1:]) / 32, atol=1e-12)
    assert reward[-1] == 0
    expected = sum(0.9 ** (k - 50) * reward[k] for k in range(50, 60))
    assert returns["return"][50].as_py() == pytest.approx(expected)
    assert pq.read_schema(dataset / "run_a" / "returns.parquet").metadata[b"progress_reward"] == b"0.01"

    label(dataset, survival_bonus=0.001, progress_reward=0.0)
    assert set(read_table(dataset / "run_a" / "returns.parquet", RETURNS)["reward"].to_pylist()) == {0.001, 0.0}


def test_nothing_is_measured_unless_asked_for(dataset):
    label(dataset, progress_reward=0.0, truth="truth.parquet")
    assert not (dataset / "run_a" / "progress.parquet").exists() and not list(dataset.glob("*/progress.png"))


def test_labels_that_say_nothing_of_progress_have_none(dataset, capsys):
    label(dataset, progress_reward=0.0)
    path = dataset / "run_a" / "returns.parquet"
    table = pq.read_table(path)
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"progress_reward"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    label(dataset, overwrite=False, progress_reward=0.0)
    assert "run_a: has labels, kept" in capsys.readouterr().out
    label(dataset, overwrite=False, truth="truth.parquet")
    assert "run_a: has labels (made with progress_reward 0.0, not 0.01), kept" in capsys.readouterr().out
    rows = pq.read_table(dataset / "label_report" / "report.parquet").to_pylist()
    assert {row["value"] for row in rows if row["metric"] == "mean_abs_difference"} == {0.0}


def test_scrolling_is_measured_once(dataset, monkeypatch):
    measured, measure = [], scrolling.count_votes
    monkeypatch.setattr(scrolling, "count_votes", lambda *a: measured.append(1) or measure(*a))
    path = dataset / "run_a" / "progress.parquet"

    def times(**changes):
        measured.clear()
        label(dataset, **changes)
        return len(measured)

    assert times() == 1
    before = path.read_bytes()
    assert times(progress_reward=-0.5) == 0 and path.read_bytes() == before
    assert times(rescan=True) == 1
    assert times(sprite_scales=("1.25",)) == 1
    assert times() == 1
    path.write_bytes(before[:200])
    assert times() == 1 and read_table(path, PROGRESS).equals(read_table(path, PROGRESS)) and times() == 0
    metadata = {"recording_frames": 60, "recording_bytes": 1, "sprite_width": 32.0}
    write_table(path, read_table(path, PROGRESS), PROGRESS, metadata)
    assert times() == 1, "it belonged to another recording"
    assert not list(path.parent.glob(".*"))


def test_a_larger_recording_has_larger_sprites(dataset):
    label(dataset, sprite_scales=("2",))
    assert read_table(dataset / "run_a" / "progress.parquet", PROGRESS)["progress"][39].as_py() == pytest.approx(
        39 * 8 / 64, abs=0.1
    )


def test_failed_measuring_fails_the_session_and_leaves_nothing(dataset, tmp_path):
    shutil.rmtree(dataset / "run_a")
    write_session(tmp_path / "run_b", 30, labels=False)  # 64 x 48
    with pytest.raises(SystemExit, match="(?s)run_b: a picture of 64x48 is too small.*Leave --progress-reward at 0"):
        label(tmp_path)
    names = {path.name for path in (tmp_path / "run_b").iterdir()}
    assert names == {"recording.mp4", "frames.parquet", "inputs.parquet"}


# --- truth ---


def test_comparison_with_the_truth_is_one_line_and_a_picture(dataset, capsys):
    label(dataset, truth="truth.parquet")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("progress from scrolling")]
    assert len(lines) == 1 and "all frames 1.0000; per episode median 1.0000, lowest 1.0000 of 1;" in lines[0]
    assert Image.open(dataset / "label_report" / "progress.png").size[0] > 800


def test_true_returns_have_the_same_progress(dataset):
    """Also where labels are kept that were made with a progress reward; there are no events to be wrong about."""
    for changes in ({}, {"progress_reward": 0.0, "overwrite": False}):
        label(dataset, truth="truth.parquet", **changes)
        rows = pq.read_table(dataset / "label_report" / "report.parquet").to_pylist()
        figures = {
            row["metric"]: row["value"] for row in rows if row["session"] == "run_a" and row["event"] == "RETURN"
        }
        assert figures["frames"] == 60 and figures["mean_abs_difference"] == 0
        assert figures["rank_correlation"] == pytest.approx(1)


def test_a_truth_without_positions_is_said(dataset, capsys):
    write_table(dataset / "run_a" / "truth.parquet", {"timestamp": [5], "what": ["start"], "data": [""]}, TRUTH)
    label(dataset, truth="truth.parquet")
    out = capsys.readouterr().out
    assert "run_a: no positions in truth.parquet, or no progress.parquet: none compared" in out
    assert "progress from scrolling" not in out


def test_curves_leave_out_the_life_before_and_the_ends_of_the_level(tmp_path):
    """21 frames at 10 fps; the episode begins in frame 2, the player starts anew in frame 4, at 3 sprite widths."""
    times, folder = 1000 + 100 * np.arange(21), tmp_path
    x = np.where(np.arange(21) < 4, 3000, 96 + 16 * (np.arange(21) - 4))
    truth = [(t, "pos", f"{a} 0.0 0 0") for t, a in zip(times, x, strict=True)] + [(times[4] - 10, "start", "")]
    truth = dict(zip(TRUTH.names, map(list, zip(*sorted(truth), strict=True)), strict=True))
    write_table(folder / "truth.parquet", truth, TRUTH)
    (folder / "recording.mp4").write_bytes(b"12345")
    metadata = {"recording_frames": 21, "recording_bytes": 5, "sprite_width": 32.0}
    columns = {name: [1.0] * 21 for name in PROGRESS.names} | {"frame_idx": range(21), "dx": np.arange(21.0)}
    write_table(folder / "progress.parquet", columns, PROGRESS, metadata)

    def episodes(*rows):
        rows = [
            dict(zip(EPISODES.names, (i, *row, 0.0, row[1] - row[0] + 1), strict=True)) for i, row in enumerate(rows)
        ]
        write_table(folder / "episodes.parquet", {k: [row[k] for row in rows] for k in EPISODES.names}, EPISODES)

    episodes((2, 20, "DEATH"), (0, 3, "DEATH"))
    (curve,) = true_curves(
        folder / "truth.parquet", times, width=384
    )  # 12 sprite widths; the other episode is shorter than 1 s
    np.testing.assert_allclose(curve.true_x, np.arange(17) / 2)
    np.testing.assert_allclose(curve.seconds, np.arange(17) / 10)
    np.testing.assert_allclose(curve.progress, (np.cumsum(np.arange(4, 21)) - 4) / 32)
    assert np.flatnonzero(curve.free).tolist() == list(range(10, 17))  # 1 s on; half the screen is passed by then
    episodes((2, 20, "WIN"))
    (curve,) = true_curves(folder / "truth.parquet", times, width=128)
    assert np.flatnonzero(curve.free).tolist() == [10, 11]  # the last two sprite widths are left out
    (folder / "recording.mp4").write_bytes(b"123456")
    assert true_curves(folder / "truth.parquet", times, width=128) == []


def test_correlation_with_the_true_x():
    assert compare_progress(np.array([0.0, 1, 2]), np.array([5.0, 7, 9])) == pytest.approx(1)
    assert compare_progress(np.array([0.0, 1, 0]), np.array([1.0, 0, 1])) == pytest.approx(-1)
    assert compare_progress(np.array([0.0, 1, 0, 1]), np.array([0.0, 1, 1, 0])) == pytest.approx(0)
    assert np.isnan(compare_progress(np.zeros(3), np.arange(3.0)))
    assert np.isnan(compare_progress(np.zeros(0), np.zeros(0)))


def test_report_names_the_lowest(tmp_path):
    t, every = np.arange(4.0), np.ones(4, bool)
    curves = [Curve("a", t, t, t, every), Curve("b", t, np.array([0.0, 1, 0, 1]), t, every & (t > 1))]
    lowest = compare_progress(curves[1].progress, t)
    line = progress_report(curves)
    assert f"per episode median {(1 + lowest) / 2:.4f}, lowest {lowest:.4f} of 2" in line
    assert "level's ends median 1.0000, lowest 1.0000 of 2" in line
    draw_progress(curves * 9, tmp_path / "report" / "progress.png")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["progress.png"]
