"""The three doors of pack_episodes.py against hand-worked rows; what is refused, what a stop leaves. No emulator."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import pack_episodes as pack
from common.returns import death_events
from common.sessions import EPISODES, RETURNS, load_session, write_table
from common.video import iter_frames
from pack_episodes import Args, arrivals, main, make_rows
from retro_env import airstriker
from retro_env.game import MOVEMENTS
from tests import reference
from tests.synthetic import write_session

STAY, LEFT, RIGHT = (MOVEMENTS.index(name) for name in ("stay", "left", "right"))


def load(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def fails(match: str, **options):
    with pytest.raises(SystemExit, match=match) as error:
        main(Args(**options))
    assert error.value.code != 0


# deaths ---------------------------------------------------------------------------------------------------------------
def stretches(*parts) -> np.ndarray:
    return np.concatenate([np.full(n, present, bool) for n, present in [(0, 1), *parts]])


@pytest.mark.parametrize(
    "present, deaths, unknown",
    [
        (stretches((20, 1), (40, 0)), [20], []),
        (stretches((20, 1), (1, 0), (30, 1)), [], []),
        (stretches((20, 1), (3, 0), (30, 1)), [], []),
        (stretches((20, 1), (4, 0), (30, 1)), [], []),
        (stretches((20, 1), (20, 0), (80, 1), (20, 0), (9, 1)), [20, 120], []),
        (stretches((2, 1), (30, 0), (3, 1), (30, 0)), [35], []),  # two frames are too few to have been alive
        (stretches((20, 1), (19, 0)), [], [20]),
        (stretches((20, 1), (19, 0), (1, 1)), [], []),
        (stretches((30, 0)), [], []),
        (stretches(), [], []),
    ],
)
def test_deaths_by_hand(present, deaths, unknown):
    found = death_events(present)
    assert [part.tolist() for part in found] == [deaths, unknown]


def test_deaths_equal_the_loop():
    rng = np.random.default_rng(0)
    for trial in range(300):
        present = stretches(*((rng.integers(1, 9), n % 2) for n in range(rng.integers(12))))
        k, m = int(rng.integers(1, 5)), int(rng.integers(1, 7))
        found = death_events(present, k, m)
        expected = reference.death_events(present.tolist(), k, m)
        assert [part.tolist() for part in found] == list(expected), (trial, k, m, present)


def test_deaths_refuse_what_is_no_presence():
    for present in (np.zeros((2, 2), bool), np.zeros(4)):
        with pytest.raises(ValueError, match="expected bool"):
            death_events(present)


# third door: latents and features -------------------------------------------------------------------------------------
LATENT_FRAMES = [*range(5, 100), *range(150, 250)]  # begins above 0, with a gap


def label(number: int) -> dict:
    names = ("ability_q", "ability_w", "ability_e", "ability_r", "summoner_d", "summoner_f", "item_used")
    row = dict.fromkeys(names, False) | {"frame_idx": number, "ability_w": number % 10 == 0, "item_used": number == 7}
    row |= {"movement_dx": 3.0, "movement_dy": 0.0, "movement_slice": number % 18, "gold_gained": number}
    return row | {"health_bar_x": 100, "health_bar_y": 50}


def write_video(folder: Path, name: str = "video", labels: dict | None = None, frames=LATENT_FRAMES, **header) -> dict:
    """Latents whose value names frame, channel and place; labels of frames 0 to 260, but 60 to 62."""
    N = len(frames)
    place = np.arange(256).reshape(16, 16)
    latents = np.asarray(frames)[:, None, None, None] + 0.25 * np.arange(2)[:, None, None] + place / 1024
    (folder / "latents").mkdir(parents=True, exist_ok=True)
    (folder / "features" / name).mkdir(parents=True)
    np.savez(folder / "latents" / f"{name}.npz", latents=latents.astype(np.float16), frame_indices=np.int32(frames))
    assert latents.shape == (N, 2, 16, 16)
    labels = labels or {n: label(n) for n in range(261) if n not in (60, 61, 62)}
    features = (
        {"video_id": name, "source_fps": 60.0, "output_fps": 20} | header | {"frames": list(labels.values())[::-1]}
    )
    (folder / "features" / name / "features.json").write_text(json.dumps(features))
    return {"latents_dir": folder / "latents", "features_dir": folder / "features", "output": folder / "packed"}


def test_rows_of_a_video_are_found_by_frame_number(tmp_path):
    labels = {n: label(n) for n in range(261) if n not in (60, 61, 62)}
    for n in [*range(80, 105), *range(170, 174), *range(245, 261)]:  # a death, a bar hidden, one of which nobody knows
        labels[n]["health_bar_x"] = None
    labels[30]["gold_gained"] = None
    labels[31] |= {"movement_dx": 0.4, "movement_dy": -0.9, "movement_slice": 0}
    labels[32] |= {"movement_slice": None}
    meta = main(Args(**write_video(tmp_path, labels=labels)))
    rows = load(tmp_path / "packed" / "video.npz")
    numbers = rows["frame_index"]
    assert numbers.tolist() == LATENT_FRAMES and meta["fps"] == 20 and meta["z_shape"] == [256, 2]

    expected = 0.01 * numbers
    expected[numbers == 30] = 0
    expected[numbers == 80] -= 10
    invalid = np.isin(numbers, [5, 150, 60, 61, 62, 245])
    assert (rows["rew_valid"] == ~invalid).all()
    np.testing.assert_allclose(rows["reward"], np.where(invalid, 0, expected), rtol=1e-6)
    assert (rows["reward"] < 0).sum() == 1

    no_action = np.isin(numbers, [5, 150, 60, 61, 62, 32])
    assert (rows["act_valid"] == ~no_action).all()
    movement = np.where(no_action | (numbers == 31), 0, 1 + numbers % 18)
    assert rows["movement"].tolist() == movement.tolist() and rows["movement"].dtype == np.int16
    pressed = [np.flatnonzero(rows["keys"][:, k]) for k in range(7)]
    assert numbers[pressed[1]].tolist() == [n for n in LATENT_FRAMES if n % 10 == 0 and n not in (60, 150)]
    assert numbers[pressed[6]].tolist() == [7] and not any(len(pressed[k]) for k in (0, 2, 3, 4, 5))
    assert rows["cont"].all() and meta["episodes"]["video"]["runs"] == 2 and meta["n_movement"] == 19


def test_token_16_y_plus_x_is_the_latent_at_y_x(tmp_path):
    main(Args(**write_video(tmp_path)))
    z, latents = load(tmp_path / "packed" / "video.npz")["z"], load(tmp_path / "latents" / "video.npz")["latents"]
    assert z.dtype == np.float16 and z.shape == (195, 256, 2)
    for y, x in ((0, 0), (0, 5), (3, 0), (15, 15)):
        assert (z[:, 16 * y + x] == latents[:, :, y, x]).all()


def test_a_bar_that_goes_with_a_gap_of_the_labels_is_no_death(tmp_path):
    labels = {n: label(n) for n in [*range(0, 100), *range(150, 261)]}
    for n in [*range(95, 100), *range(150, 180)]:
        labels[n]["health_bar_x"] = None
    main(Args(**write_video(tmp_path, labels=labels)))
    rows = load(tmp_path / "packed" / "video.npz")
    assert (rows["reward"] >= 0).all()
    assert rows["frame_index"][~rows["rew_valid"]].tolist() == [5, 95, 150]


def test_the_rate_is_what_was_kept_not_what_was_asked_for(tmp_path):
    assert main(Args(**write_video(tmp_path / "a", source_fps=59.94)))["fps"] == pytest.approx(29.97)
    write_video(tmp_path / "b", "one", source_fps=59.94)
    fails("one.*29.97.*20.00|20.00.*29.97", **write_video(tmp_path / "b", "two", source_fps=60.0))


def test_bad_latents_and_labels_are_refused_by_name(tmp_path):
    def bad(name, match, frames=LATENT_FRAMES, header=None, **changes):
        labels = {n: label(n) for n in range(261)}
        labels[40] |= changes
        fails(match, **write_video(tmp_path / name, labels=labels, frames=frames, **(header or {})))
        assert not (tmp_path / name / "packed").exists() and not (tmp_path / name / ".packed.tmp").exists()

    bad("gold", "features.json.*reward of frame 40 is not finite", gold_gained=float("nan"))
    bad("sector", "features.json has the sector 18, expected 0 to 17", movement_slice=18)
    bad("twice", "two labels for one frame_idx", frame_idx=41)
    bad("order", "frame 6 after frame 7", frames=[5, 7, 6])
    bad("rate", "output_fps", header={"output_fps": None})
    options = write_video(tmp_path / "none")
    (tmp_path / "none/features/video/features.json").unlink()
    fails("features.json is missing", **options)
    options = write_video(tmp_path / "cut")
    (tmp_path / "cut/latents/video.npz").write_bytes(b"PK")
    fails("video.npz has no latents", **options)
    fails("needs --features-dir", **options | {"features_dir": None})
    (tmp_path / "cut/latents/video.npz").unlink()
    fails("holds no <video>.npz", **options)


# second door: sessions ------------------------------------------------------------------------------------------------
def write_labels(folder: Path, episodes: list[tuple], rewards: dict[int, float]):
    """Episodes as (first, last, outcome), rewards by frame."""
    names = ("start_frame", "end_frame", "outcome")
    columns = {name: [episode[i] for episode in episodes] for i, name in enumerate(names)}
    n = len(episodes)
    columns |= {"episode_id": list(range(n)), "reward": [0.0] * n, "length": [1] * n}
    write_table(folder / "episodes.parquet", columns, EPISODES, {"death_reward": -1.0})
    frames = sorted(i for first, last, _ in episodes for i in range(first, last + 1))
    columns = {"frame_idx": frames, "return": [0.0] * len(frames), "reward": [rewards.get(i, 0.0) for i in frames]}
    write_table(folder / "returns.parquet", columns, RETURNS, {"death_reward": -1.0})


def session_of(folder: Path, n: int = 24) -> Path:
    """RIGHT down at frames 3 to 5, SPACE at 10, LEFT at 17 to 19; pictures as bright as their number. Keys change a
    millisecond before a frame, so `any` has them a frame earlier too."""
    frame = np.arange(n)
    keys = {
        "KEY_RIGHT": (frame >= 3) & (frame <= 5),
        "KEY_SPACE": frame == 10,
        "KEY_LEFT": (frame >= 17) & (frame <= 19),
    }
    pictures = np.broadcast_to((10 * frame)[:, None, None, None], (n, 48, 64, 3)).astype(np.uint8)
    return write_session(folder, n, keys=keys, pictures=pictures)


def test_rows_of_a_session_by_hand(tmp_path):
    folder = session_of(tmp_path / "data" / "run_1")
    write_labels(folder, [(0, 9, "DEATH"), (15, 23, "INCOMPLETE")], {4: 0.1, 9: -1.0, 20: 0.1, 23: 7.0})
    meta = main(Args(sessions=tmp_path / "data", output=tmp_path / "packed", frame_size=32))
    rows = load(tmp_path / "packed" / "run_1.npz")
    assert meta["keys"] == ["KEY_SPACE"] and meta["fps"] == 10 and meta["frame_shape"] == [32, 32, 3]
    kept = [*range(0, 11), *range(15, 24)]  # what ended at frame 9 arrives at 10
    assert rows["frame_index"].tolist() == kept
    by_frame = {name: dict(zip(kept, rows[name].tolist(), strict=True)) for name in rows if name != "frames"}
    assert {i: m for i, m in by_frame["movement"].items() if m != STAY} == dict.fromkeys((3, 4, 5, 6), RIGHT) | (
        dict.fromkeys((17, 18, 19, 20), LEFT)
    )
    assert [i for i, keys in by_frame["keys"].items() if keys[0]] == [10]  # and 11, which is in no episode
    assert {i: round(r, 6) for i, r in by_frame["reward"].items() if r} == {5: 0.1, 10: -1.0, 21: 0.1}
    assert [i for i, cont in by_frame["cont"].items() if not cont] == [10]
    for valid in ("act_valid", "rew_valid"):
        assert [i for i, ok in by_frame[valid].items() if not ok] == [0, 15]
    decoded = np.concatenate([part for _, part in iter_frames(folder / "recording.mp4", size=32)])
    assert (rows["frames"] == np.moveaxis(decoded, 1, -1)[kept]).all()
    assert abs(rows["frames"].mean((1, 2, 3)) - 10 * np.array(kept)).max() < 4


def test_an_episode_that_ends_with_the_recording_has_its_outcome_in_the_last_row(tmp_path):
    main(Args(sessions=session_of(tmp_path / "run_1"), output=tmp_path / "packed"))
    rows = load(tmp_path / "packed" / "run_1.npz")
    assert len(rows["reward"]) == 24 and rows["cont"].tolist() == [1] * 23 + [0]
    assert rows["reward"].tolist() == [0.0] * 23 + [-1.0]


def test_a_gap_in_time_begins_a_run(tmp_path):
    session = load_session(session_of(tmp_path / "run_1"))
    session.timestamps = session.timestamps + 150 * (np.arange(24) >= 12)  # frame 12 comes 250 ms after frame 11
    _, rows, _ = pack.pack_session(Args(max_gap=2.0), session, [])
    assert rows["frame_index"].tolist() == [*range(12), *range(13, 24)]
    assert np.flatnonzero(~rows["act_valid"]).tolist() == [0, 12]
    _, rows, _ = pack.pack_session(Args(max_gap=3.0), session, [])
    assert len(rows["reward"]) == 24


def test_arrivals_by_hand():
    def arrive(episodes, reward, gaps=()):
        linked = np.ones(len(reward) - 1, bool)
        linked[list(gaps)] = False
        rows = [dict(zip(("start_frame", "end_frame", "outcome"), row, strict=True)) for row in episodes]
        kept, arrived, cont = arrivals(rows, np.array(reward, float), linked)
        return np.flatnonzero(kept).tolist(), arrived[kept].tolist(), np.flatnonzero(cont == 0).tolist()

    two = [(0, 2, "WIN"), (3, 5, "DEATH")]  # without a pause: frame 3 shows the end of the first
    assert arrive(two, [1, 2, 3, 4, 5, 6, 7]) == ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 5, 6], [3, 6])
    assert arrive(two, [1, 2, 3, 4, 5, 6]) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 11], [3, 5])
    assert arrive([(0, 2, "WIN")], [1, 2, 3, 4], gaps=[2]) == ([0, 1, 2], [0, 1, 5], [2])
    assert arrive([(0, 4, "INCOMPLETE")], [1, 2, 3, 4, 5], gaps=[1]) == ([0, 1, 3, 4], [0, 1, 3, 4], [])
    assert arrive([(0, 9, "DEATH")], [1, 2, 3]) == ([0, 1, 2], [0, 1, 2], [])  # the video was cut off before


def test_arrows_make_a_movement_and_opposite_ones_cancel():
    cases = {"": "stay", "U": "up", "D": "down", "L": "left", "R": "right", "UL": "up-left", "UR": "up-right"}
    cases |= {"DL": "down-left", "DR": "down-right", "UD": "stay", "LR": "stay", "ULR": "up", "UDLR": "stay"}
    down = np.array([[key in held for key in "UDLR"] for held in cases])
    assert [MOVEMENTS[m] for m in pack.arrow_movement(down)] == list(cases.values())


def test_sessions_that_do_not_fit_are_refused(tmp_path):
    options = {"sessions": tmp_path / "data", "output": tmp_path / "packed"}
    session_of(tmp_path / "data" / "run_1")
    write_session(tmp_path / "data" / "run_2", 24, gamma=0.5)
    fails("run_2 has .*0.5.*run_1 has.*--overwrite", **options)
    write_session(tmp_path / "bare" / "run_1", 24, labels=False)
    fails("returns.parquet is missing.*precompute_labels.py", **options | {"sessions": tmp_path / "bare"})
    write_labels(tmp_path / "bare" / "run_1", [(0, 23, "DEATH")], {})
    table = pack.read_table(tmp_path / "bare" / "run_1" / "returns.parquet", RETURNS)
    write_table(tmp_path / "bare" / "run_1" / "returns.parquet", table, RETURNS, {"recording_bytes": 7})
    fails("made for a recording of 7 bytes", **options | {"sessions": tmp_path / "bare"})
    fails("is not a folder", **options | {"sessions": tmp_path / "none"})


# first door: games, with a game of our own ----------------------------------------------------------------------------
class Game:
    """Ends after 10 steps with a life lost, or is cut; 20 points in step 4. Action 5 is done whatever was asked for."""

    fps, frame_skip, crash_at, played = 20.0, 3, None, 0

    def __init__(self, env_id, sticky=0.05, max_steps=None):
        self.max_steps, self.t = max_steps, 0

    def picture(self):
        return np.full((48, 64, 3), 10 * self.t, np.uint8)

    def reset(self, seed):
        Game.played += 1
        return self.picture(), {}

    def step(self, action):
        self.t += 1
        if Game.played == Game.crash_at and self.t == 5:
            raise KeyboardInterrupt
        gain, over = 20.0 * (self.t == 4), self.t == 10
        info = {"action": 5, "score_gain": gain, "life_lost": over, "score": 20.0 * (self.t >= 4)}
        return self.picture(), gain, over, not over and self.t == self.max_steps, info

    def close(self):
        pass


@pytest.fixture
def game(monkeypatch):
    monkeypatch.setattr(pack, "make_game", Game)
    monkeypatch.setattr(Game, "crash_at", None)
    monkeypatch.setattr(Game, "played", 0)
    options = {"env_id": "retro:Fake-v0", "players": ("random=0.5", "sticky=0.5"), "num_workers": 1, "frame_size": 16}
    return options | {"frames": 30, "heldout_episodes": 1}


def test_rows_of_a_game_by_hand(tmp_path, game):
    meta = main(Args(**game, output=tmp_path))
    assert sorted(meta["episodes"]) == ["episode_0001", "episode_0002", "episode_0003", "heldout_0001"]
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    assert meta["action_index"] == "arrival" and meta["keys"] == ["B"] and meta["frame_shape"] == [16, 16, 3]
    rows = load(tmp_path / "episode_0001.npz")
    assert rows["frames"][:, 0, 0, 0].tolist() == [10 * t for t in range(11)]
    assert rows["movement"].tolist() == [0] + [2] * 10 and rows["keys"].tolist() == [[0]] + [[1]] * 10
    np.testing.assert_allclose(rows["reward"], [0, 0, 0, 0, 0.2, 0, 0, 0, 0, 0, -1], rtol=1e-6)
    assert rows["cont"].tolist() == [1] * 10 + [0] and rows["act_valid"].tolist() == [False] + [True] * 10
    dtypes = {"frame_index": "int32", "movement": "int16", "keys": "uint8", "reward": "float32", "cont": "uint8"}
    assert {name: rows[name].dtype.name for name in dtypes} == dtypes
    seeds = {facts["seed"] for facts in meta["episodes"].values()}
    assert len(seeds) == 4 and meta["episodes"]["episode_0001"]["score"] == 20
    assert main(Args(**game, output=tmp_path / "again"))["episodes"] == meta["episodes"]


def test_a_game_that_is_cut_goes_on(tmp_path, game):
    main(Args(**game, output=tmp_path, max_steps=6))
    rows = load(tmp_path / "episode_0001.npz")
    assert len(rows["cont"]) == 7 and rows["cont"].all() and (rows["reward"] >= 0).all()


def test_ctrl_c_keeps_what_is_whole(tmp_path, game, monkeypatch, capsys):
    monkeypatch.setattr(Game, "crash_at", 3)
    with pytest.raises(SystemExit) as error:
        main(Args(**game, output=tmp_path / "packed"))
    assert error.value.code == 130 and "what is whole is kept" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "packed").iterdir()) == [
        "episode_0001.npz",
        "heldout_0001.npz",
        "meta.json",
    ]
    meta = json.loads((tmp_path / "packed" / "meta.json").read_text())
    assert sorted(meta["episodes"]) == ["episode_0001", "heldout_0001"] and len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_before_a_game_is_whole_leaves_nothing(tmp_path, game, monkeypatch):
    monkeypatch.setattr(Game, "crash_at", 1)
    with pytest.raises(SystemExit) as error:
        main(Args(**game, output=tmp_path / "packed"))
    assert error.value.code == 130 and list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_packing_is_put_in_place_changes_nothing(tmp_path, game, monkeypatch):
    replace = pack.os.replace

    def interrupted(source, target):
        if Path(target).parent == tmp_path / "packed":
            os.kill(os.getpid(), signal.SIGINT)
        replace(source, target)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(pack.os, "replace", interrupted)
    meta = main(Args(**game, output=tmp_path / "packed"))
    names = sorted(path.stem for path in (tmp_path / "packed").glob("*.npz"))
    assert names == sorted(meta["episodes"]) and len(names) == 4
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_full_disk_leaves_the_old_packing(tmp_path, game, monkeypatch):
    main(Args(**game, output=tmp_path / "packed"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    def full(file, **rows):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.np, "savez_compressed", full)
    fails("No space left", **game, output=tmp_path / "packed", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_another_packing_is_replaced_only_when_asked(tmp_path, game):
    main(Args(**game, output=tmp_path))
    (tmp_path / "README.md").write_text("mine")
    fails("holds another packing.*--overwrite", **game, output=tmp_path)
    main(Args(**game | {"frames": 5, "heldout_episodes": 0}, output=tmp_path, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "episode_0001.npz", "meta.json"]
    (tmp_path / "meta.json").unlink()
    fails("holds other .npz files", **game, output=tmp_path, overwrite=True)
    (tmp_path / "meta.json").write_text("{}")
    fails("is not of a packing", **game, output=tmp_path, overwrite=True)


def test_flags_that_cannot_be_meant_are_refused(tmp_path, game):
    options = game | {"output": tmp_path / "packed"}
    fails("expected one of --env-id, --sessions and --latents-dir, 0 are given", output=tmp_path)
    fails("2 are given", **options | {"sessions": tmp_path})
    fails("--gold-scale does nothing beside --env-id", **options | {"gold_scale": 1.0})
    fails("--features-dir does nothing beside --env-id", **options | {"features_dir": tmp_path})
    fails("--frames does nothing beside --sessions", sessions=tmp_path, frames=7)
    fails("--frame-size does nothing beside --latents-dir", latents_dir=tmp_path, features_dir=tmp_path, frame_size=32)
    fails("--num-workers 0: expected 1 or more", **options | {"num_workers": 0})
    fails("--sticky 1.0", **options | {"sticky": 1.0})
    fails("--players random=0.5: expected shares", **options | {"players": ("random=0.5",)})
    fails("--players random: expected PLAYER=SHARE", **options | {"players": ("random",)})
    fails("'shooter:2'", **options | {"players": ("shooter:2=1",)})
    fails("play Airstriker only", **options | {"players": ("shooter=1",)})
    assert list(tmp_path.iterdir()) == []


# the contract ---------------------------------------------------------------------------------------------------------
def test_make_rows_empties_the_first_row_of_every_run():
    frames = np.zeros((6, 2, 2, 3), np.uint8)
    rows = make_rows(frames, [0, 1, 2, 5, 6, 7], [1] * 6, [[1]] * 6, [1.0] * 6, [1, 0, 1, 1, 1, 1])
    assert rows["act_valid"].tolist() == rows["rew_valid"].tolist() == [False, True, False, False, True, True]
    for name in ("movement", "keys", "reward"):
        assert rows[name].ravel().tolist() == [0, 1, 0, 0, 1, 1]


def test_make_rows_refuses_what_breaks_the_contract():
    def bad(match, frame_index=(0, 1), reward=(0, 0), n=2, kind=np.uint8):
        with pytest.raises(ValueError, match=match):
            make_rows(np.zeros((n, 4, 4), kind), frame_index, [0] * 2, np.zeros((2, 1)), reward)

    bad("lengths", n=3)
    bad("frame 1 after frame 1", frame_index=(1, 1))
    bad("reward of frame 1 is not finite", reward=(0, np.inf))
    with pytest.raises(ValueError, match="z of frame 4 is not finite"):
        make_rows(np.full((1, 4, 4), np.nan, np.float16), [4], [0], np.zeros((1, 1)), [0])


def test_the_sample_is_whole():
    folder = Path(__file__).parents[2] / "sample_packed"
    meta = json.loads((folder / "meta.json").read_text())
    names = sorted(path.stem for path in folder.glob("*.npz"))
    assert names == sorted(meta["episodes"]) and sum(name.startswith("heldout_") for name in names) == 2
    for name, facts in meta["episodes"].items():
        rows = load(folder / f"{name}.npz")
        assert rows["frames"].shape == (facts["frames"], 64, 64, 3)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000


# players --------------------------------------------------------------------------------------------------------------
def screen(ship=None, enemies=(), rocks=(), shots=()) -> np.ndarray:
    """A screen of Airstriker with boxes in the colours of its things; (top, left) of each."""
    picture = np.zeros((224, 320, 3), np.uint8)
    if ship is not None:
        picture[182:206, ship : ship + 22] = (200, 204, 200)
    for things, height, width, colour in (
        (enemies, 24, 22, (232, 0, 0)),
        (rocks, 10, 10, (136, 136, 136)),
        (shots, 6, 6, (0, 236, 0)),
    ):
        for top, left in things:
            picture[top : top + height, left : left + width] = colour
    return picture


@pytest.mark.parametrize(
    "lost, ship, moved",
    [
        ("0000001000", "1100000111", [2]),  # hit in row 2, counted as the next ship appears
        ("0000001000", "1100000011", [2]),  # as it has not appeared yet
        ("0000010001", "1110000110", [3, 9]),  # two lives, the last ends the game
        ("0001", "1111", [3]),  # nobody saw the ship go
        ("1000", "0000", [0]),  # nor was there ever one
    ],
)
def test_a_life_is_lost_where_the_ship_is_hit(lost, ship, moved):
    lost, ship = (np.array([c == "1" for c in row]) for row in (lost, ship))
    assert np.flatnonzero(airstriker.move_to_hits(lost, ship)).tolist() == moved


def test_the_shooter_sees_what_is_there():
    ship, enemies, rocks, shots = airstriker.see(screen(100, [(40, 50)], [(60, 200)], [(120, 55)]))
    assert ship == 100 and [box[0] for box in enemies] == [40] and rocks == [(60, 200, 70, 210)]
    assert shots == [(120, 55, 126, 61)] and airstriker.see(screen())[0] is None


def test_the_shooter_goes_under_an_enemy_fires_there_and_gets_out_of_the_way():
    def play(steps, ship, **things):
        player, actions, ships = airstriker.Shooter(1.0), [], [ship]
        player.reset(0)
        for _ in range(steps):
            actions.append(player.act(screen(ships[-1], **things)))
            ships.append(min(max(ships[-1] + {LEFT: -15, RIGHT: 15}.get(actions[-1] // 2, 0), 10), 285))
        return ships, actions

    ships, actions = play(40, 130, enemies=[(40, 220)])
    fired_from = [ship for ship, action in zip(ships, actions, strict=False) if action % 2]
    assert len(fired_from) >= 2 and all(abs(ship - 220) < 50 for ship in fired_from)
    assert not any(a % 2 and b % 2 for a, b in zip(actions, actions[1:], strict=False))  # held down it fires once
    assert set(actions[:3]) == {0}, "nothing is known before the reaction time"
    ships, _ = play(12, 130, shots=[(110, 138)])
    assert ships[-1] + 22 < 138 or ships[-1] > 144
    assert not any(action % 2 for action in play(8, 130)[1])


def test_the_hesitant_player_holds_its_fire_and_its_place_at_times():
    """An enemy that it can never stand under: it moves and fires all the time, but for what it holds."""
    player, actions = airstriker.Hesitant(), []
    player.reset(0)
    for step in range(1200):
        actions.append(player.act(screen(130, enemies=[(40, 160 if step % 2 else 100)])))
    moves, presses = np.array(actions) // 2 != 0, np.array(actions) % 2 > 0
    stretches = {"fire": longest(~presses), "still": longest(~moves)}
    assert all(15 <= length <= 50 for length in stretches.values()), stretches
    assert 0.25 < presses.mean() < 0.45 and 0.5 < moves.mean() < 0.9


def longest(held: np.ndarray) -> int:
    """Rows of the longest stretch of True."""
    edges = np.flatnonzero(np.diff(np.r_[0, held.astype(int), 0]))
    return int(np.diff(edges)[::2].max(initial=0))


def test_the_mix_is_close_to_its_shares_after_any_number_of_games():
    shares = airstriker.read_mix(airstriker.MIX)
    counts = dict.fromkeys(shares, 0)
    for n, name in zip(range(1, 101), airstriker.spread(shares), strict=False):
        counts[name] += 1
        assert all(abs(counts[player] - shares[player] * n) < 1.01 for player in shares)
