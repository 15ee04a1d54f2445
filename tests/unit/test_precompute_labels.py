"""Events, episodes, rewards and label files: hand-worked cases, and whole sessions with a made-up sprite."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import precompute_labels
from common.returns import discounted_returns
from common.sessions import (
    DETECTIONS,
    EPISODES,
    EVENTS,
    INPUTS,
    RETURNS,
    TRUTH,
    WIN_KEY,
    load_session,
    read_table,
    write_table,
)
from common.template_matching import load_sprites, score_maps
from common.video import VideoReader, grey, resize
from precompute_labels import (
    Args,
    Sighting,
    episode_rewards,
    find_episodes,
    group_events,
    main,
    sprite_groups,
    win_events,
)
from session_labels.files import scan_metadata, write_labels
from session_labels.game import load_game
from session_labels.workers import side_by_side
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
@pytest.mark.parametrize("attacks", [(), (0,), (1, 12, 12, 29)])
def test_returns_of_an_episode_are_the_specified_ones(outcome, bonus, attacks):
    reward = OUTCOMES.get(outcome, 0.0)
    episode = {"start_frame": 100, "end_frame": 129, "length": 30, "reward": reward}
    rewards = episode_rewards(episode, [40, *(100 + k for k in attacks), 130], bonus, 0.1, 0.97)
    expected = specified_returns(30, reward, 0.97, attacks, 0.1, bonus)
    np.testing.assert_allclose(discounted_returns(rewards, 0.97), expected, rtol=1e-12, atol=1e-15)


def made_events(event, seen, times, min_gap_s=2.5, min_sightings=1, of_frames=1, **changes):
    rule = load_game(Args.game).rules[event]
    rule.min_gap_s, rule.min_sightings, rule.of_frames = min_gap_s, min_sightings, of_frames
    return group_events(rule, sprite_groups(Args(**changes), rule, seen, times), times)


# --- deaths ---


def deaths(scores, fps=10, min_gap_s=2.5, threshold=0.85):
    seen = [Sighting(i, "DEATH", 0, score, 0, 0) for i, score in enumerate(scores) if score >= threshold]
    return made_events("DEATH", seen, times_at(fps, len(scores)), min_gap_s)


def test_death_is_the_first_sighting_with_the_peak_as_confidence():
    assert deaths([0.5, 0.84, 0.85, 0.97, 0.9, 0.6, 0.5]) == [(2, 0.97)]


def test_flicker_within_the_gap_is_one_death_and_later_ones_count():
    scores = np.full(100, 0.5)
    scores[[10, 11, 13, 14, 16]] = 0.9, 0.92, 0.91, 0.99, 0.9  # flickers
    scores[60:75] = 0.95
    assert deaths(scores) == [(10, 0.99), (60, 0.95)]
    assert [frame for frame, _ in deaths(scores, min_gap_s=0.05)] == [10, 13, 16, 60]


def test_death_gap_is_seconds():
    scores = np.array([0.9] + [0.1] * 19 + [0.9] + [0.1] * 9)  # 20 frames apart
    assert len(deaths(scores)) == 1  # 2.0 s
    assert len(deaths(scores, fps=5)) == 2  # 4.0 s


def test_picture_that_stays_is_one_death():
    assert len(deaths(np.full(200, 0.9))) == 1
    assert deaths(np.full(200, 0.84)) == []
    seen = [Sighting(i, "DEATH", i // 5 % 2, 0.9, 0, 0) for i in range(0, 200, 5)]  # every fifth frame was looked at
    assert len(made_events("DEATH", seen, times_at(10, 200), min_gap_s=0.3, event_stride=5)) == 1


# --- squished enemies ---


def squished(enemies, camera, hidden=(), fps=10, stride=1):
    """What is seen of `enemies` (frame, x in the level, sprite), each there for 2 s, 640 pixels at a time.

    `camera` (N,) is the left edge of the screen, `hidden` holds (enemy, first frame, last frame)."""
    seen = []
    for i in range(0, len(camera), stride):
        places = []
        for e, (start, x, sprite) in enumerate(enemies):
            on_screen = start <= i < start + 2 * fps and 0 <= x - camera[i] < 640
            if on_screen and not any(e == h and a <= i <= b for h, a, b in hidden) and (x, sprite) not in places:
                places.append((x, sprite))  # two on one place look like one
        seen += [Sighting(i, "ATTACK", sprite, 0.9, 400.0, float(x - camera[i])) for x, sprite in places]
    return [frame for frame, _ in made_events("ATTACK", seen, times_at(fps, len(camera)))]


SWING = np.cumsum([0, *np.repeat([20, 32, 0, -32, -16, 30], 10)])  # turns round by up to 46 pixels per frame


def test_one_enemy_is_one_event_however_the_camera_moves():
    for start in range(0, 40, 3):
        x = SWING[start] + 300
        assert squished([(start, x, 0)], SWING) == [start]
        assert squished([(start, x, 0)], SWING, hidden=[(0, start + 4, start + 10)]) == [start]  # Tux stands before it
        assert squished([(start, x, 0)], SWING, stride=2) == [start + start % 2]


def test_two_enemies_close_together_are_two():
    for dx in (-64, -34, 34, 64):
        for later in (0, 1, 3):
            for start in (0, 8, 18, 29):
                for second in (0, 2):
                    enemies = [(start, SWING[start] + 420, 0), (start + later, SWING[start] + 420 + dx, second)]
                    assert squished(enemies, SWING) == [start, start + later], (dx, later, start)


def test_enemy_that_is_hidden_while_another_is_seen_keeps_its_place():
    enemies = [(5, SWING[5] + 300, 0), (9, SWING[9] + 380, 0)]
    assert squished(enemies, SWING, hidden=[(0, 9, 15)]) == [5, 9]


def test_two_enemies_on_one_place_are_two():
    camera = np.arange(80) * 3
    assert squished([(10, 300, 0), (22, 300, 0)], camera) == pytest.approx([10, 22], abs=1)


def test_a_second_enemy_after_the_first_is_gone_is_a_second_event():
    camera = np.zeros(90, int)
    assert squished([(10, 300, 0), (40, 300, 0), (63, 310, 0)], camera) == [10, 40, 63]
    assert squished([(10, 300, 0)], np.zeros(200, int), fps=30, stride=3) == [12]
    assert made_events("ATTACK", [], times_at(10, 5)) == []


def test_confidence_of_an_attack_is_its_peak():
    seen = [Sighting(i, "ATTACK", 0, score, 0, 0) for i, score in ((3, 0.9), (4, 0.97), (5, 0.88))]
    assert made_events("ATTACK", seen, times_at(10, 9)) == [(3, 0.97)]


# --- what is seen too seldom ---


def test_what_does_not_stay_is_no_death_and_hides_none():
    """A cloud flashes shortly before Tux dies, elsewhere: alone it would take the death with it."""
    cloud = [Sighting(i, "DEATH", 0, 0.9, 10.0, 400.0) for i in (20, 35)]
    tux = [Sighting(i, "DEATH", 0, 0.95, 300.0 - 12 * i, 100.0) for i in (30, 31, 33, 34, 36, 37)]  # flickers, flies up
    seen = sorted(cloud + tux, key=lambda s: s.frame)
    assert made_events("DEATH", seen, times_at(10, 90)) == [(20, 0.95)]
    assert made_events("DEATH", seen, times_at(10, 90), min_sightings=2, of_frames=3) == [(30, 0.95)]
    assert made_events("DEATH", seen, times_at(10, 90), min_sightings=3, of_frames=3) == []
    assert made_events("DEATH", seen, times_at(10, 90), min_sightings=3, of_frames=4) == [(30, 0.95)]


def test_what_jumps_about_is_no_thing_that_stays():
    seen = [Sighting(i, "DEATH", 0, 0.9, 200.0, 600.0 * (i % 2)) for i in range(20, 30)]
    assert made_events("DEATH", seen, times_at(10, 90), min_sightings=2, of_frames=2) == []
    assert made_events("DEATH", seen[::2], times_at(10, 90), min_sightings=2, of_frames=3) == [(20, 0.9)]


def test_squished_enemy_that_is_seen_once_is_none():
    camera = np.arange(80) * 3
    seen = [Sighting(i, "ATTACK", 0, 0.9, 400.0, float(300 - camera[i])) for i in range(10, 30)]
    flash = [Sighting(15, "ATTACK", 0, 0.9, 100.0, 500.0)]
    both = sorted(seen + flash, key=lambda s: s.frame)
    frames = [f for f, _ in made_events("ATTACK", both, times_at(10, 80))]
    assert frames == [10, 15]
    strict = {"min_sightings": 3, "of_frames": 5}
    assert [f for f, _ in made_events("ATTACK", both, times_at(10, 80), **strict)] == [10]
    late = [Sighting(i, "ATTACK", 0, 0.9, 400.0, 100.0) for i in (78, 79)]
    assert len(made_events("ATTACK", late, times_at(10, 80), **strict)) == 1, "the recording ends there"
    assert made_events("ATTACK", late[:1], times_at(10, 80), **strict) == []
    apart = [s for s in seen if s.frame % 4 == 0]  # frames 12, 16, ... were looked at
    assert len(made_events("ATTACK", apart, times_at(10, 80), **strict, event_stride=4)) == 1


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


# --- whole sessions ---

N, DEATHS, FRAME_SIZE = 120, (30, 80), (96, 128)  # frames at 10 fps, frames where the sprite appears, height and width


def write_squish_sprites(sprites, rng):
    """Two made-up squished enemies, 33x13 RGBA; returns the first."""
    (sprites / "creatures" / "snowball").mkdir(parents=True)
    for name in ("squished-left", "mrs-squished-left"):
        picture = Image.fromarray(rng.integers(0, 256, (4, 9, 3), dtype=np.uint8)).resize((33, 13), Image.BICUBIC)
        alpha = np.full((13, 33), 255, np.uint8)
        alpha[:4, :6] = alpha[:4, -6:] = 0
        Image.fromarray(np.dstack([picture, alpha]), "RGBA").save(sprites / "creatures" / "snowball" / f"{name}.png")
    return np.asarray(Image.open(sprites / "creatures" / "snowball" / "squished-left.png"))


@pytest.fixture
def dataset(tmp_path):
    """Two sessions: one with deaths at 3.0 s and 8.0 s and a win pressed at 11.5 s, one with two squished enemies, at
    4.0 s and 4.7 s, the second looking the other way, while the camera moves."""
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
    enemy = write_squish_sprites(tmp_path / "sprites", rng)
    background = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((160, 96)))
    for name, death_frames in (("run_a", DEATHS), ("run_b", ())):
        pictures = np.stack([background[:, i % 32 : i % 32 + 128] for i in range(N)])
        for death in death_frames:
            for i in range(death, death + 12):
                pictures[i, 20 + i - death :, 50:][:31, :40][mask] = sprite[mask]
        for start, x, picture in [(40, 90, enemy), (47, 52, enemy[:, ::-1])] if name == "run_b" else []:
            for i in range(start, start + 20):
                left = x - 3 * (i - 40)
                cut = max(0, -left)
                mask_, place = picture[:, cut:, 3] > 127, pictures[i, 70:83, max(0, left) : left + 33]
                place[mask_] = picture[:, cut:, :3][mask_]
        keys = {"KEY_RIGHT": np.arange(N) % 20 < 10, WIN_KEY: (np.arange(N) == 115) & bool(death_frames)}
        write_session(tmp_path / name, N, pictures=pictures, keys=keys, labels=False)
    frames = load_session(tmp_path / "run_a").timestamps
    moments = [frames[0] - 5000, frames[30] - 40, frames[80] - 40, frames[115], frames[-1] + 5000]
    truth = {"timestamp": moments, "what": ["death", "death", "death", "win", "death"]}  # two were not recorded
    write_table(tmp_path / "run_a" / "truth.parquet", truth | {"data": [""] * 5}, TRUTH)
    squishes = {"timestamp": [frames[40] - 40, frames[47] - 60], "what": ["squish"] * 2, "data": [""] * 2}
    write_table(tmp_path / "run_b" / "truth.parquet", squishes, TRUTH)
    return tmp_path


def arguments(dataset, **changes):
    return Args(
        **{"data_dir": dataset, "sprites": dataset / "sprites", "device": "cpu", "sprite_scales": ("1",)} | changes
    )


def test_labels_of_a_session(dataset, capsys):
    result = main(arguments(dataset, truth="truth.parquet", survival_bonus=0.001))
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

    events = read_table(dataset / "run_b" / "events.parquet", EVENTS).to_pydict()
    assert events["event"] == ["ATTACK", "ATTACK"] and events["frame_idx"] == [40, 47]
    assert read_table(dataset / "run_b" / "episodes.parquet", EPISODES)["outcome"].to_pylist() == ["INCOMPLETE"]
    returns = read_table(dataset / "run_b" / "returns.parquet", RETURNS).to_pydict()
    expected = specified_returns(N, 0, 0.99, (40, 47), 0.1, 0.001)
    np.testing.assert_allclose(returns["return"], expected)
    assert returns["reward"][46] == pytest.approx(0.001 + 0.099) and returns["reward"][47] == 0.001

    assert result["sessions"]["run_a"]["DEATH"] == 2 and result["sessions"]["run_b"]["DEATH"] == 0
    assert result["truth"]["DEATH", "128x96"] == {"truth": 2, "found": 2, "hits": 2, "offsets_ms": [40, 40]}
    assert result["truth"]["ATTACK", "128x96"]["offsets_ms"] == [40, 60]
    assert result["truth"]["WIN", "128x96"]["hits"] == 1
    out = capsys.readouterr().out
    assert (
        "| DEATH | all | 2 | 2 | 0 | 0 | 1.000 (0.342 to 1.000) | 1.000 (0.342 to 1.000) | 1.000 | 40, 40, 40, +40 ms"
        in out
    )
    assert out.splitlines()[-1] == "2 sessions: 2 labelled, 0 kept, 0 failed; DEATH 2, ATTACK 2, WIN 1"
    assert not list(dataset.glob("run_*/.*"))  # nothing temporary left


def test_what_only_looks_like_a_death_at_half_size_is_none(dataset):
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
    Image.fromarray(np.dstack([sprite[::-1], np.full((32, 40), 255, np.uint8)]), "RGBA").save(folder / "gameover-1.png")
    write_squish_sprites(dataset / "detail", rng)
    pictures = np.full((60, 96, 128, 3), 128, np.uint8)
    pictures[10:20, 20:52, 30:70] = decoy
    pictures[40:50, 63:95, 87:127] = sprite  # an odd place beside the border
    keys = {"KEY_RIGHT": np.ones(60, bool)}
    write_session(dataset / "few" / "run_c", 60, pictures=pictures, keys=keys, labels=False)
    main(arguments(dataset / "few", sprites=dataset / "detail", sprite_threshold=0.8))
    events = read_table(dataset / "few" / "run_c" / "events.parquet", EVENTS).to_pydict()
    assert events["frame_idx"] == [40]

    halved = grey(resize(torch.from_numpy(pictures[10].transpose(2, 0, 1))[None], 48, 64))
    (scores,) = score_maps(halved, load_sprites([folder / "gameover-0.png"], 0.5))
    assert scores.max() > 0.8, "half size alone would be deceived"


def test_metadata_tells_how_labels_were_made(dataset):
    main(arguments(dataset, half_life_s=2.0))
    for name in ("events", "episodes", "returns"):
        metadata = pq.read_schema(dataset / "run_a" / f"{name}.parquet").metadata
        assert float(metadata[b"gamma"]) == pytest.approx(0.5 ** (1 / 20))
        assert metadata[b"sprite_threshold"] == b"0.85" and metadata[b"schema_version"] == b"1"
        assert float(metadata[b"fps"]) == 10 and metadata[b"recording_frames"] == b"120"
        assert int(metadata[b"recording_bytes"]) == (dataset / "run_a" / "recording.mp4").stat().st_size


def test_other_thresholds_need_no_second_search(dataset, monkeypatch):
    """What was found is used again, unless it may lack something, or was found otherwise."""
    searched = []
    search = precompute_labels.find_detections
    monkeypatch.setattr(precompute_labels, "find_detections", lambda *a: searched.append(a) or search(*a))

    def label(**changes):
        searched.clear()
        result = main(arguments(dataset, overwrite=True, **changes))
        return result["sessions"]["run_a"]["DEATH"], len(searched)

    assert label() == (2, 2)
    rows = read_table(dataset / "run_a" / "detections.parquet", DETECTIONS).to_pylist()
    first = next(row for row in rows if row["event"] == "DEATH")
    assert first["frame_idx"] == 30 and (first["y"], first["x"]) == (20, 50) and first["score"] > 0.9
    assert first["sprite"] == "creatures/tux/small/gameover-0.png"
    assert label(death_threshold=0.9999) == (0, 0)
    assert label(sprite_threshold=0.8) == (2, 0)
    assert label(sprite_threshold=0.7) == (2, 2), "more than was kept"
    assert label() == (2, 0)
    assert label(rescan=True) == (2, 2)
    assert label(event_stride=2) == (2, 2)
    enemy = dataset / "sprites" / "creatures" / "snowball" / "squished-left.png"
    Image.open(enemy).rotate(180).save(enemy)
    assert label(event_stride=2) == (2, 2)


def sure_places(folder):
    """Frame, sprite, y, x and score of what scores the threshold."""
    rows = read_table(folder / "detections.parquet", DETECTIONS).to_pylist()
    return {(d["frame_idx"], d["sprite"], d["y"], d["x"]): d["score"] for d in rows if d["score"] >= 0.85}


def test_search_of_a_region_finds_what_lies_in_it(dataset, capsys):
    """The sprite of run_a falls from 20 to 31 at x 50, 31x40 pixels. An odd region that it leaves at half the way."""
    main(arguments(dataset))
    whole, labels = sure_places(dataset / "run_a"), tables(dataset)
    _, y, _, h = roi = (43, 17, 61, 41)
    main(arguments(dataset, overwrite=True, roi=roi))
    assert "run_a: detections.parquet was made with other roi; searched again" in capsys.readouterr().out
    found = sure_places(dataset / "run_a")
    bottom = y + h - 31
    inside = {place: score for place, score in whole.items() if place[2] <= bottom}
    assert 0 < len(inside) < len(whole)
    assert {place: found[place] for place in inside} == pytest.approx(inside, abs=1e-5)
    assert {place[2:] for place in found.keys() - inside} == {(bottom, 50)}  # it is a pixel or two further down
    events = read_table(dataset / "run_a" / "events.parquet", EVENTS).to_pydict()
    assert events["event"] == ["DEATH", "DEATH", "WIN"]
    assert len(read_table(dataset / "run_b" / "events.parquet", EVENTS)) == 0
    metadata = pq.read_schema(dataset / "run_a" / "detections.parquet").metadata
    assert metadata[b"roi"] == b"(43, 17, 61, 41)"
    report, _ = compared(dataset)  # kept, with the settings of the labels
    assert report["all", "ATTACK", "128x96", "recall"][0] == 0
    main(arguments(dataset, overwrite=True))
    assert all(table.equals(labels[path]) for path, table in tables(dataset).items())


def test_size_of_sprites_is_looked_for_in_the_region(dataset):
    main(arguments(dataset, roi=(40, 10, 70, 60), sprite_scales=("auto",)))
    assert read_table(dataset / "run_a" / "events.parquet", EVENTS)["event"].to_pylist() == ["DEATH", "DEATH", "WIN"]
    with pytest.raises(SystemExit, match="--roi 0 0 9 9 is smaller than"):  # at every size that is tried
        main(arguments(dataset, roi=(0, 0, 9, 9), sprite_scales=("auto",), overwrite=True))


@pytest.mark.parametrize(
    "roi, why",
    [
        ((-1, 0, 60, 60), "--roi -1 0 60 60: expected X and Y of 0 or more"),
        ((0, 0, 60, 0), "--roi 0 0 60 0: .* W and H of 1 or more"),
        ((70, 0, 59, 60), "(?s)run_a: --roi 70 0 59 60 reaches beyond the picture of 128x96. Name X Y W H inside it"),
        ((0, 0, 60, 30), "(?s)--roi 0 0 60 30 is smaller than .*gameover-0.png of 40x31 pixels. Name a larger region"),
    ],
)
def test_region_that_cannot_be_searched(dataset, roi, why):
    with pytest.raises(SystemExit, match=why):
        main(arguments(dataset, roi=roi))
    assert not list(dataset.glob("run_*/returns.parquet"))


def test_detections_of_an_older_search_are_searched_again(dataset, monkeypatch, capsys):
    path = dataset / "run_a" / "detections.parquet"
    main(arguments(dataset))
    metadata = {key.decode(): value.decode() for key, value in pq.read_schema(path).metadata.items()}
    assert metadata.pop("search_version") == "1"
    write_table(path, pq.read_table(path), DETECTIONS, metadata)  # as before there were versions
    before = path.stat().st_mtime_ns
    main(arguments(dataset, overwrite=True))
    assert path.stat().st_mtime_ns == before and "searched again" not in capsys.readouterr().out
    monkeypatch.setattr("session_labels.files.FIND_VERSION", 2)
    main(arguments(dataset, overwrite=True))
    said = capsys.readouterr().out
    assert "run_a: detections.parquet was made with other search_version; searched again" in said
    assert pq.read_schema(path).metadata[b"search_version"] == b"2"


@pytest.mark.parametrize("scale", [0.94, 1.25])
def test_sprites_of_another_size_are_found(dataset, tmp_path, scale, capsys):
    """A recording scaled as a whole: auto finds how large its sprites are, also after a search at another size."""
    folder = dataset / "scaled" / "run_a"
    reader = VideoReader(dataset / "run_a" / "recording.mp4")
    height, width = (2 * round(scale * side / 2) for side in FRAME_SIZE)
    pictures = resize(reader.read(0, N), height, width).permute(0, 2, 3, 1).numpy()
    write_session(folder, N, pictures=pictures, keys={"KEY_RIGHT": np.ones(N, bool)}, labels=False)

    def label(**changes):
        options = {"sprites": dataset / "sprites", "overwrite": True, "sprite_scales": ("auto",)} | changes
        return main(arguments(dataset / "scaled", **options))["sessions"]["run_a"]["DEATH"]

    assert label() == 2
    found = re.search(r"run_a: sprites are ([\d.]+) times as large as drawn", capsys.readouterr().out)[1]
    assert float(found) == pytest.approx(scale, rel=0.04)  # the sprite is smooth
    metadata = pq.read_schema(folder / "detections.parquet").metadata
    assert json.loads(metadata[b"scales"]) == [float(found)]
    assert label(rescan=True) == 2 and label(sprite_scales=("1", found)) == 2
    assert label(sprite_scales=("0.5",)) == 0 and label() == 2
    (folder / "detections.parquet").write_bytes(b"PAR1 cut off")
    assert label() == 2


def tables(dataset):
    names = ("detections", "events", "episodes", "returns")
    return {path: pq.read_table(path) for name in names for path in sorted(dataset.glob(f"run_*/{name}.parquet"))}


def test_several_workers_find_what_one_finds(dataset, monkeypatch, capsys):
    main(arguments(dataset))
    alone = tables(dataset)
    assert len(alone) == 8
    for path in alone:
        path.unlink()
    monkeypatch.setattr(precompute_labels, "find_detections", None)  # here, not in the processes
    main(arguments(dataset, num_workers=2))
    assert all(table.equals(alone[path]) for path, table in tables(dataset).items()) and len(tables(dataset)) == 8
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 sessions: 2 labelled, 0 kept, 0 failed")


def test_bars_can_be_switched_off(dataset, capsys):
    """tests/conftest.py sets TQDM_DISABLE."""
    main(arguments(dataset, sprite_scales=("auto",), progress_reward=0.1))
    assert capsys.readouterr().err == ""


def test_doubtful_events_end_no_episode_and_bring_no_reward(dataset):
    main(arguments(dataset))
    events = read_table(dataset / "run_b" / "events.parquet", EVENTS)
    least = {
        name: read_table(dataset / name / "events.parquet", EVENTS)["confidence"].to_pylist()
        for name in ("run_a", "run_b")
    }
    bar = float(np.nextafter(max(least["run_b"] + least["run_a"][:2]), 2))
    main(arguments(dataset, overwrite=True, min_event_confidence=bar))
    assert read_table(dataset / "run_b" / "events.parquet", EVENTS).equals(events)
    assert set(read_table(dataset / "run_b" / "returns.parquet", RETURNS)["reward"].to_pylist()) == {0.0}
    episodes = read_table(dataset / "run_a" / "episodes.parquet", EPISODES)
    assert bounds(episodes.to_pylist()) == [(0, 114, "WIN", 1, 115)]


def search_or_die(args, device, folder):
    """Stands in for `search` in a process of its own: that of run_a is killed half-way."""
    if folder.name == "run_a":
        write_table(folder / "detections.parquet", {name: [] for name in DETECTIONS.names}, DETECTIONS)
        (folder / "detections.parquet").rename(folder / ".detections.parquet.tmp")
        os.kill(os.getpid(), 9)
    return precompute_labels.search(args, device, folder)


def test_a_killed_worker_costs_its_own_session_only(dataset, monkeypatch, capsys):
    shutil.copytree(dataset / "run_a", dataset / "run_0")
    (dataset / "run_0" / "recording.mp4").write_bytes(b"no video")
    monkeypatch.setattr(precompute_labels, "search", search_or_die)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(dataset, num_workers=2))
    message = str(stopped.value)
    assert message.startswith("2 of 3 sessions failed") and "cannot be opened as a video" in message
    assert "run_a: the process that searched its video was ended by signal 9. Try --num-workers 1" in message
    assert message.endswith("3 sessions: 1 labelled, 0 kept, 2 failed; DEATH 0, ATTACK 2, WIN 0")
    assert {path.parent.name for path in tables(dataset)} == {"run_b"}
    monkeypatch.undo()
    (dataset / "run_0" / "recording.mp4").unlink()
    assert main(arguments(dataset, num_workers=2))["sessions"]["run_a"]["DEATH"] == 2


@pytest.mark.slow
def test_ray_tasks_find_what_one_process_finds(dataset, monkeypatch, capsys):
    """A worker that dies, as one that cannot read its session, costs this session only."""
    pytest.importorskip("ray", reason="needs the extra cluster: pip install -e '.[cluster]'")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # its 15 starves them on a busy machine
    main(arguments(dataset))
    alone = tables(dataset)
    for path in alone:
        path.unlink()
    shutil.copytree(dataset / "run_a", dataset / "run_0")
    (dataset / "run_0" / "recording.mp4").write_bytes(b"no video")
    with monkeypatch.context() as patch:
        patch.setattr(precompute_labels, "search", search_or_die)
        with pytest.raises(SystemExit) as stopped:
            main(arguments(dataset, ray_address="local"))
    message = str(stopped.value)
    assert message.startswith("2 of 3 sessions failed") and "cannot be opened as a video" in message
    assert "run_a: the Ray task that searched its video failed: The worker died unexpectedly" in message
    assert message.endswith("3 sessions: 1 labelled, 0 kept, 2 failed; DEATH 0, ATTACK 2, WIN 0")
    assert {path.parent.name for path in tables(dataset)} == {"run_b"}
    shutil.rmtree(dataset / "run_0")
    monkeypatch.setattr(precompute_labels, "find_detections", None)  # here, not in the tasks
    monkeypatch.chdir(dataset)
    assert main(arguments(Path("."), sprites=Path("sprites"), ray_address="local"))["sessions"].keys() == {
        "run_a",
        "run_b",
    }
    assert all(table.equals(alone[path]) for path, table in tables(dataset).items()) and len(tables(dataset)) == 8
    assert not list(dataset.glob("run_*/.*"))


def test_ray_that_is_missing_or_does_not_answer(dataset, monkeypatch):
    with pytest.raises(SystemExit, match="^--num-workers 2: leave it out"):
        main(arguments(dataset, ray_address="local", num_workers=2))
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"^ray does not import .*'\.\[cluster\]'$"):
        patch.setitem(sys.modules, "ray", None)
        main(arguments(dataset, ray_address="auto"))
    pytest.importorskip("ray", reason="needs the extra cluster: pip install -e '.[cluster]'")
    with pytest.raises(SystemExit, match="^--ray-address auto: no cluster answers .*Could not find any running Ray"):
        main(arguments(dataset, ray_address="auto"))
    assert not list(dataset.glob("run_*/*s.parquet.tmp"))


def test_stride_finds_the_same_deaths_within_the_stride(dataset):
    main(arguments(dataset, event_stride=4))
    events = read_table(dataset / "run_a" / "events.parquet", EVENTS).to_pydict()
    assert events["frame_idx"][:2] == [32, 80]


def test_labels_are_kept_unless_overwritten(dataset, capsys):
    main(arguments(dataset))
    before = (dataset / "run_a" / "returns.parquet").read_bytes()
    main(arguments(dataset, gamma=0.5, truth="truth.parquet"))
    assert (dataset / "run_a" / "returns.parquet").read_bytes() == before
    assert "run_a: has labels (made with gamma 0.99, not 0.5), kept; --overwrite" in capsys.readouterr().out
    main(arguments(dataset, gamma=0.5, overwrite=True))
    assert "run_a: its labels were made with gamma 0.99, not 0.5; they are made again" in capsys.readouterr().out
    assert read_table(dataset / "run_a" / "returns.parquet", RETURNS)["return"][29].as_py() == -0.5
    main(arguments(dataset, gamma=0.5, overwrite=True))
    assert "its labels were made with" not in capsys.readouterr().out


def test_labels_of_which_a_table_is_missing_are_made_again(dataset):
    main(arguments(dataset))
    labels = {path: table for path, table in tables(dataset).items() if "run_a" in str(path)}
    (dataset / "run_a" / "events.parquet").unlink()
    main(arguments(dataset))
    assert all(table.equals(labels[path]) for path, table in tables(dataset).items() if path in labels)
    assert (dataset / "run_a" / "events.parquet").exists()


def test_detections_of_sprites_that_told_something_else_are_not_used(dataset):
    """The same pictures under another name, or of another event."""
    sprites = precompute_labels.load_all_sprites(arguments(dataset))
    recording = dict.fromkeys(("recording_frames", "recording_bytes", "event_stride", "roi"), "1")
    made = scan_metadata(sprites, recording)
    assert made == scan_metadata(replace(sprites), recording)
    assert made != scan_metadata(replace(sprites, events=sprites.events[::-1]), recording)
    assert made != scan_metadata(replace(sprites, names=[f"other/{name}" for name in sprites.names]), recording)


def test_labels_of_another_recording_are_an_error(dataset):
    main(arguments(dataset))
    (dataset / "run_a" / "recording.mp4").write_bytes((dataset / "run_b" / "recording.mp4").read_bytes())
    with pytest.raises(SystemExit, match="(?s)1 of 2.*recording_bytes.*--overwrite"):
        main(arguments(dataset))
    main(arguments(dataset, overwrite=True))
    assert read_table(dataset / "run_a" / "events.parquet", EVENTS)["event"].to_pylist() == ["ATTACK", "ATTACK", "WIN"]


def test_a_full_disk_costs_the_sessions_that_do_not_fit(dataset, monkeypatch):
    write = pq.write_table

    def full(table, path, *args, **options):
        write(table, path, *args, **options)
        if path.name == ".returns.parquet.tmp" and "run_a" in str(path):
            raise OSError(28, "No space left on device")  # after a part was written

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(SystemExit, match="(?s)1 of 2 sessions failed:.*run_a: .*No space left.*1 labelled, 0 kept"):
        main(arguments(dataset))
    found = {path.name for path in (dataset / "run_a").iterdir()}
    assert "detections.parquet" in found and not found & {"events.parquet", "episodes.parquet", "returns.parquet"}
    assert not list(dataset.glob("*/.*"))
    assert (dataset / "run_b" / "returns.parquet").exists()
    monkeypatch.undo()
    assert main(arguments(dataset))["sessions"].keys() == {"run_a", "run_b"}
    assert not list(dataset.glob("*/.*"))


def test_unreadable_session_does_not_stop_the_others(dataset, capsys):
    (dataset / "run_a" / "recording.mp4").write_bytes(b"no video")
    with pytest.raises(
        SystemExit,
        match="(?s)1 of 2 sessions failed:.*run_a.*recording.mp4.*\n2 sessions: 1 labelled, 0 kept, 1 failed; DEATH 0",
    ) as error:
        main(arguments(dataset))
    assert isinstance(error.value.code, str)  # printed to stderr, exit status 1
    assert (dataset / "run_b" / "returns.parquet").exists()
    assert not (dataset / "run_a" / "events.parquet").exists()
    said = capsys.readouterr().out.splitlines()
    head = said.index("| session | frames | in episodes | episodes | DEATH | ATTACK | WIN | least sure event |")
    assert said[head + 2] == "| run_a | failed |" and said[head + 3].startswith("| run_b | ")
    assert said[head + 3].count("|") == said[head].count("|")


def test_fewer_rows_than_video_frames_uses_the_rows(dataset, capsys):
    path = dataset / "run_a" / "frames.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 70), path)
    main(arguments(dataset))
    assert "70 rows, 120 video frames; the first 70 are labelled" in capsys.readouterr().out
    assert read_table(dataset / "run_a" / "episodes.parquet", EPISODES)["end_frame"].to_pylist() == [30, 69]


STOP_AT_WRITE = """
import os, signal, sys
import precompute_labels as script
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in a shell's background begin with it ignored
how, sprites, *sessions = sys.argv[1:]
real, calls = os.replace, []
def label(data_dir, write):
    def stop(source, target):
        calls.append(target)
        if len(calls) == write:
            os.kill(os.getpid(), getattr(signal, how))
        real(source, target)
    os.replace = stop
    data_dir, sprites_ = script.Path(data_dir), script.Path(sprites)
    options = {"device": "cpu", "overwrite": True, "gamma": 0.5, "sprite_scales": ("1",)}
    script.main(script.Args(data_dir, sprites=sprites_, **options))
if len(sessions) == 1:
    label(sessions[0], 2)
for write, session in enumerate(sessions, 1):
    child = os.fork() or label(session, write)
    assert os.waitpid(child, 0)[1] == getattr(signal, how)
"""


def killed_run(dataset, how, *data_dirs):
    """A label run with gamma 0.5, ended by a signal before its second file is put in place; of several folders a run
    each, the n-th ended before its n-th file is."""
    command = [sys.executable, "-c", STOP_AT_WRITE, how, str(dataset / "sprites"), *map(str, data_dirs)]
    return subprocess.run(command, cwd=Path(precompute_labels.__file__).parent, capture_output=True, text=True)


def test_killed_label_run_leaves_a_session_labelled_or_as_before(dataset, capsys):
    """SIGKILL before each of the six renames of a run: three write the new tables, three put them in place."""
    names = [f"{name}.parquet" for name in ("events", "episodes", "returns")]
    folder = dataset / "run_b"

    def labels(folder):
        return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}

    main(arguments(folder, gamma=0.5, sprites=dataset / "sprites"))
    new = labels(folder)
    main(arguments(folder, gamma=0.9, sprites=dataset / "sprites", overwrite=True))
    old = labels(folder)
    copies = [shutil.copytree(folder, dataset / f"copy_{write}" / "run_b") for write in range(1, 7)]
    result = killed_run(dataset, "SIGKILL", *copies)
    assert result.returncode == 0, result.stderr
    for write, copy in enumerate(copies, 1):
        assert (copy / ".labels.tmp").exists()
        if write <= 3:
            assert labels(copy) == old
        else:
            assert "returns.parquet" not in labels(copy)  # no labels, as far as training is concerned
        main(arguments(copy, gamma=0.5, sprites=dataset / "sprites"))  # without --overwrite
        assert labels(copy) == (old if write <= 3 else new)
        assert not list(copy.glob(".*"))
        assert "1 kept" in capsys.readouterr().out.splitlines()[-1]


def test_ctrl_c_ends_with_130_and_a_summary(dataset):
    main(arguments(dataset, gamma=0.9))
    before = {p.name: p.read_bytes() for p in (dataset / "run_a").glob("*.parquet")}
    result = killed_run(dataset, "SIGINT", dataset)
    assert result.returncode == 130, result.stderr
    assert result.stdout.splitlines()[-1].startswith("2 sessions: 0 labelled, 0 kept, 0 failed; DEATH 0")
    assert "stopped by Ctrl-C" in result.stdout
    assert {p.name: p.read_bytes() for p in (dataset / "run_a").glob("*.parquet")} == before
    main(arguments(dataset, gamma=0.9))  # keeps them
    assert not list(dataset.glob("run_*/.*"))


def clean_up_late(folder):
    """Work of a process that holds a temporary file until it ends."""
    try:
        (folder / ".work.tmp").touch()
        time.sleep(60)
    finally:
        (folder / ".work.tmp").unlink()


def test_ctrl_c_lets_workers_clean_up(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()

    def press_ctrl_c():
        wait_until(lambda: len(list(tmp_path.glob("*/.work.tmp"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press_ctrl_c).start()
        with pytest.raises(KeyboardInterrupt):
            side_by_side(clean_up_late, folders, 2, "work")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.glob("*/*")) and not multiprocessing.active_children()


def wait_until(what):
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("to, when", [("group", "workers start"), ("parent", "they search")])
def test_ctrl_c_ends_workers(dataset, to, when):
    """A terminal sends SIGINT to the whole process group, `kill -INT` to the main process only."""
    main(arguments(dataset / "run_a", sprites=dataset / "sprites"))
    before = {path.name: path.read_bytes() for path in (dataset / "run_a").glob("*.parquet")}
    for name in "cdef":
        shutil.copytree(dataset / "run_b", dataset / f"run_{name}")
    words = ["--data-dir", dataset, "--sprites", dataset / "sprites", "--sprite-scales", "1", "--num-workers", "2"]
    process = subprocess.Popen(
        [sys.executable, precompute_labels.__file__, *map(str, words), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if when == "workers start":
        wait_until(lambda: len(children.read_text().split()) == 3)  # two, and what tracks their resources
        time.sleep(0.5)  # they import
    else:
        wait_until(lambda: len(list(dataset.glob("run_*/detections.parquet"))) == 2)
    (os.killpg if to == "group" else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out.splitlines()[-1].startswith("6 sessions: none labelled; stopped by Ctrl-C")
    assert "Traceback" not in err and "leaked" not in err
    wait_until(lambda: not group_lives(process.pid))
    assert not list(dataset.glob("run_*/.*"))
    assert {path.name: path.read_bytes() for path in (dataset / "run_a").glob("*.parquet")} == before
    searched = {path: path.stat().st_mtime_ns for path in dataset.glob("run_*/detections.parquet")}
    assert len(searched) < 6
    assert len(main(arguments(dataset))["sessions"]) == 6
    assert {path: path.stat().st_mtime_ns for path in searched} == searched


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


def test_a_win_key_far_outside_the_video_is_no_win(dataset):
    path, times = dataset / "run_b" / "inputs.parquet", load_session(dataset / "run_b").timestamps
    table = read_table(path, INPUTS)
    for press, win in ((times[0] - 1100, []), (times[-1] + 1100, []), (times[-1] + 900, [len(times) - 1])):
        row = {"timestamp": press, "event_type": "key", "key_name": WIN_KEY, "state": "down"}
        rows = [*table.to_pylist(), dict.fromkeys(INPUTS.names) | row]
        write_table(path, {name: [r[name] for r in rows] for name in INPUTS.names}, INPUTS)
        main(arguments(dataset, overwrite=True, detect_events=False))
        assert read_table(dataset / "run_b" / "events.parquet", EVENTS)["frame_idx"].to_pylist() == win


def test_missing_sprites_and_bad_flags_are_explained(dataset, tmp_path):
    def fails(match, **changes):
        with pytest.raises(SystemExit, match=match):
            main(arguments(dataset, **changes))

    fails("no sprites.*gameover-0.png.*supertux-data.*--sprites", sprites=tmp_path / "nothing")
    fails("event-stride is 0", event_stride=0)
    fails("num-workers is 0", num_workers=0)
    fails("min-event-confidence is 85", min_event_confidence=85.0)
    fails("--sprite-scales 1 big: expected auto, or numbers", sprite_scales=("1", "big"))
    fails("--sprite-scales 9: expected auto, or numbers", sprite_scales=("9",))
    fails("--gamma 1.5 .*expected a gamma of 0 to 1", gamma=1.5)
    fails("--death-reward is nan, expected a finite number", death_reward=float("nan"))
    fails("--survival-bonus is inf, expected a finite number", survival_bonus=float("inf"))
    fails("--win-key-window-s is -1, expected 0 or more seconds", win_key_window_s=-1)
    fails("--intent-horizon-s is inf, expected 0 or more seconds", intent_horizon_s=float("inf"))
    fails("--win-key-min-presses is 0, expected 1 or more", win_key_min_presses=0)
    fails("--event-free '': expected sessions", event_free=("",))
    fails("--half-life-s 0.*half-life above 0", half_life_s=0)
    fails("--device foo: expected", device="foo")
    fails("KEY_BACKSLSH is no evdev key name", win_key="KEY_BACKSLSH")
    fails(r"threshold of squished-left is 85.0, expected a score", attack_threshold=85.0)
    fails("--template-thresholds gameover=0.9: expected NAME=SCORE.*gameover-0", template_thresholds=("gameover=0.9",))
    fails("--template-thresholds gameover-0: expected NAME=SCORE", template_thresholds=("gameover-0",))
    fails("--template-thresholds gameover-0=high: expected NAME=SCORE", template_thresholds=("gameover-0=high",))
    with pytest.raises(SystemExit, match="is not a folder"):
        main(arguments(dataset / "absent", sprites=dataset / "sprites"))
    (dataset / "sprites" / "creatures" / "snowball" / "squished-left.png").unlink()
    fails("squished-left.png", sprites=dataset / "sprites")


def test_sprites_beside_the_data_are_used_where_the_game_is_missing(dataset, monkeypatch):
    game = dataset / "game.toml"
    game.write_text(Args.game.read_text().replace("/usr/share/games/supertux2/images", "not_installed"))
    main(arguments(dataset, sprites=None, game=game))
    assert len(read_table(dataset / "run_a" / "events.parquet", EVENTS)) == 3
    monkeypatch.chdir(dataset / "run_a")
    for one_session in (dataset / "run_a", Path(".")):
        result = main(arguments(one_session, sprites=None, overwrite=True, game=game))
        assert result["sessions"]["run_a"]["DEATH"] == 2


def test_thresholds_hold_for_all_for_one_event_and_for_one_sprite(dataset):
    def found(**changes):
        result = main(arguments(dataset, overwrite=True, **changes))
        return [sum(s[event] for s in result["sessions"].values()) for event in ("DEATH", "ATTACK", "WIN")]

    assert found() == [2, 2, 1]
    assert found(sprite_threshold=0.9999) == [0, 0, 1]
    assert found(death_threshold=0.9999) == [0, 2, 1]
    assert found(attack_threshold=0.9999) == [2, 0, 1]
    assert found(sprite_threshold=0.9999, attack_threshold=0.85) == [0, 2, 1]
    assert found(template_thresholds=("gameover-0=0.9999", "mrs-squished-left=0.9999")) == [0, 2, 1]
    assert found(death_threshold=0.9999, template_thresholds=("gameover-0=0.8",)) == [2, 2, 1]
    assert found(detect_events=False) == [0, 0, 1]


def test_flags_have_both_spellings_and_the_environment(dataset):
    words = ["--data_dir", str(dataset), "--sprites", str(dataset / "sprites"), "--attack_threshold", "0.9999"]
    words += ["--overwrite", "true", "--device", "cpu", "--template_thresholds", "gameover-0=0.8", "gameover-1=0.9"]
    command = [sys.executable, precompute_labels.__file__, *words]
    environment = os.environ | {"REFLEX_TRAIN_DEATH_THRESHOLD": "0.9999"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "2 sessions: 2 labelled, 0 kept, 0 failed; DEATH 2, ATTACK 0, WIN 1"


# --- comparison with the truth ---


def compared(dataset, **changes):
    """Labels with --truth; report.parquet as a dict, and rows of curves.parquet."""
    main(arguments(dataset, **{"truth": "truth.parquet"} | changes))
    rows = pq.read_table(dataset / "label_report" / "report.parquet").to_pylist()
    report = {(r["session"], r["event"], r["size"], r["metric"]): (r["value"], r["low"], r["high"]) for r in rows}
    return report, pq.read_table(dataset / "label_report" / "curves.parquet").to_pylist()


def test_report_of_the_truth(dataset, monkeypatch):
    """Deaths and squishes are labelled on the frame that the truth gives, the win one frame before it."""
    report, curves = compared(dataset)
    assert report["all", "DEATH", "all", "recall"] == pytest.approx((1.0, 0.3424, 1.0), abs=1e-4)
    assert report["all", "ATTACK", "128x96", "error_median_ms"] == (50, None, None)
    assert report["all", "WIN", "128x96", "error_bias_ms"] == (-100, None, None)
    assert not any(event.startswith("DEATH ") for _, event, _, _ in report)  # this truth tells no places

    assert report["run_a", "RETURN", "128x96", "frames"][0] == 31 + 21 + 5
    assert report["run_a", "RETURN", "128x96", "membership_differs"][0] == pytest.approx(1 / 120)
    off = sum(0.99**k - 0.99 ** (k + 1) for k in range(5)) / 57
    assert report["run_a", "RETURN", "128x96", "mean_abs_difference"][0] == pytest.approx(off)
    assert report["run_b", "RETURN", "128x96", "mean_abs_difference"][0] == 0
    assert report["run_b", "RETURN", "128x96", "rank_correlation"][0] == pytest.approx(1)
    assert report["all", "RETURN", "all", "membership_differs"][0] == pytest.approx(1 / 240)

    deaths = [row for row in curves if row["event"] == "DEATH"]
    assert [row["threshold"] for row in deaths] == [k / 100 for k in range(75, 101)]
    chosen = next(row for row in deaths if row["threshold"] == 0.85)
    assert (chosen["found"], chosen["hits"], chosen["f1"]) == (2, 2, 1.0)
    assert (deaths[-1]["found"], deaths[-1]["recall"], deaths[-1]["precision"]) == (0, 0.0, None)
    assert {row["event"] for row in curves} == {"DEATH", "ATTACK"}
    picture = np.asarray(Image.open(dataset / "label_report" / "report.png").convert("L"))
    assert min(picture.shape) > 500 and picture.std() > 10

    monkeypatch.setattr(precompute_labels, "find_detections", None)  # no second search
    assert compared(dataset) == (report, curves)


def test_next_report_replaces_the_last(dataset):
    first, curves = compared(dataset)
    (dataset / ".label_report.tmp").mkdir()  # of a run that was killed
    second, same = compared(dataset, overwrite=True, death_threshold=0.9999)
    assert first["all", "DEATH", "all", "recall"][0] == 1 and second["all", "DEATH", "all", "recall"][0] == 0
    assert "error_median_ms" not in {metric for _, event, _, metric in second if event == "DEATH"}
    assert [row for row in same if row["threshold"] != 0.9999] == curves, "curves are of the detections"
    assert 0.9999 in {row["threshold"] for row in same if row["event"] == "DEATH"}
    names = {path.name for path in (dataset / "label_report").iterdir()}
    assert names == {"report.png", "report.parquet", "curves.parquet"} and not list(dataset.glob(".*"))


def test_report_that_cannot_be_written_leaves_the_last(dataset, monkeypatch):
    compared(dataset)
    before = {path.name: path.read_bytes() for path in (dataset / "label_report").iterdir()}

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(SystemExit, match="the labels are written, .* is not: .*No space left"):
        compared(dataset, overwrite=True, death_threshold=0.9999)
    monkeypatch.setattr("session_labels.review.write_page", full)
    with pytest.raises(SystemExit, match="the labels are written, .* is not: .*No space left"):
        main(arguments(dataset, review=5))
    assert {path.name: path.read_bytes() for path in (dataset / "label_report").iterdir()} == before
    assert not list(dataset.glob(".*")) and len(read_table(dataset / "run_a" / "events.parquet", EVENTS)) == 1


def test_returns_are_compared_with_the_settings_of_the_labels(dataset):
    main(arguments(dataset, gamma=0.5, respawn_gap_s=1.0, attack_reward=0.3))
    report, _ = compared(dataset)  # kept
    assert report["run_b", "RETURN", "128x96", "mean_abs_difference"][0] == 0
    assert report["run_a", "RETURN", "128x96", "frames"][0] == 31 + 41 + 25


def test_recording_without_truth_is_labelled_and_said_so(dataset, capsys):
    (dataset / "run_b" / "truth.parquet").unlink()
    result = main(arguments(dataset, truth="truth.parquet"))
    assert result["truth"]["DEATH", "128x96"]["truth"] == 2 and result["sessions"]["run_b"]["ATTACK"] == 2
    assert "run_b: no truth.parquet, not compared" in capsys.readouterr().out
    report, _ = compared(dataset)
    assert {session for session, *_ in report} == {"all", "run_a"}


def test_unreadable_truth_fails_its_session_only(dataset, capsys):
    (dataset / "run_b" / "truth.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(SystemExit, match="(?s)1 of 2 sessions failed:.*run_b/truth.parquet is not a readable parquet"):
        main(arguments(dataset, truth="truth.parquet"))
    assert (dataset / "run_b" / "returns.parquet").exists()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| run_b |")]
    assert told == ["| run_b | failed |"]
    rows = pq.read_table(dataset / "label_report" / "report.parquet").to_pylist()
    assert {row["session"] for row in rows} == {"all", "run_a"}


def test_empty_truth_makes_all_that_was_found_false(dataset, capsys):
    for name in ("run_a", "run_b"):
        write_table(dataset / name / "truth.parquet", {name: [] for name in TRUTH.names}, TRUTH)
    report, curves = compared(dataset)
    assert report["all", "DEATH", "all", "precision"][:2] == (0.0, 0.0)
    assert report["all", "DEATH", "all", "recall"] == (None, None, None)
    assert report["all", "DEATH", "all", "f1"][0] == 0
    assert report["run_a", "RETURN", "128x96", "rank_correlation"][0] is None, "true returns are all 0"
    assert all(row["recall"] is None for row in curves)
    assert "run_a: DEATH disagrees with the truth: 0 missed, 2 false" in capsys.readouterr().out


def test_truth_of_the_older_form_and_under_another_name(dataset):
    expected = compared(dataset)
    for name in ("run_a", "run_b"):
        rows = read_table(dataset / name / "truth.parquet", TRUTH).to_pylist()
        (dataset / name / "game.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (dataset / name / "truth.parquet").unlink()
    assert compared(dataset, truth="game.parquet") == expected


def test_labels_without_detections_have_no_curves(dataset, capsys):
    main(arguments(dataset))
    (dataset / "run_a" / "detections.parquet").unlink()
    report, curves = compared(dataset)
    assert report["all", "DEATH", "all", "recall"][0] == 1
    assert {row["true"] for row in curves if row["event"] == "DEATH"} == {0}  # of run_b alone
    assert "1 of 2 sessions have no detections of their labels: the curves leave them out" in capsys.readouterr().out
    report, curves = compared(dataset, overwrite=True, detect_events=False)
    assert curves == [] and report["all", "DEATH", "all", "recall"][0] == 0


@pytest.mark.parametrize("name", ["true", "truth", "truth.jsonl", "", "run_a/truth.parquet", "other.parquet"])
def test_name_of_no_truth_file_is_refused_before_the_work(dataset, name):
    why = (
        "none of 2 sessions has this file.*truth.parquet" if name == "other.parquet" else "expected the name of a file"
    )
    with pytest.raises(SystemExit, match=f"^--truth {name}: {why}"):
        main(arguments(dataset, truth=name))
    assert not (dataset / "run_a" / "returns.parquet").exists()
