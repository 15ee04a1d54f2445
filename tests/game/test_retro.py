"""Games of stable-retro on the real emulator: the environment, the players, a packing of a few games."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import closing
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import pack_episodes
from pack_episodes import Args, main
from retro_env.airstriker import make_player, move_to_hits, see
from retro_env.game import RetroGame, make_game
from retro_env.play import Crowd, check_game, compare_players

EMULATOR = True  # tests/conftest.py: what these tests need
GAME = "retro:Airstriker-Genesis-v0"
ROOT = Path(__file__).parents[2]
Played = namedtuple("Played", "frames actions infos terminated")


@pytest.fixture
def make():
    """Games, closed after the test: a process holds one emulator."""
    made = []

    def build(**options) -> RetroGame:
        made.append(make_game(GAME, **options))
        return made[-1]

    yield build
    for game in made:
        game.close()


def play(game: RetroGame, player, seed: int) -> Played:
    frame, info = game.reset(seed=seed)
    player.reset(seed)
    played = Played([frame], [], [info], [])
    over = False
    while not over:
        played.actions.append(player.act(frame))
        frame, reward, terminated, truncated, info = game.step(played.actions[-1])
        assert reward == info["score_gain"]
        played.frames.append(frame)
        played.infos.append(info)
        played.terminated.append(terminated)
        over = terminated or truncated
    return played


def test_gymnasium_finds_nothing_wrong(make):
    check_env(make(max_steps=40), skip_render_check=True)


def test_a_seed_makes_the_game_and_another_seed_another(make):
    game = make(max_steps=60)
    one, again, other = (play(game, make_player("sticky"), seed) for seed in (3, 3, 4))
    assert np.array_equal(one.frames, again.frames) and one.infos == again.infos
    assert not np.array_equal(one.frames[0], other.frames[0])  # another number of idle steps


def test_what_is_done_is_what_info_says(make):
    game = make(sticky=0.3, max_steps=200)
    played = play(game, make_player("random"), 0)
    done = [info["action"] for info in played.infos]
    repeated = [d == before and d != a for before, d, a in zip(done[:-1], done[1:], played.actions, strict=True)]
    same = [d == a for d, a in zip(done[1:], played.actions, strict=True)]
    assert 0.2 < np.mean(repeated) < 0.4 and all(r or s for r, s in zip(repeated, same, strict=True))
    game.close()
    played = play(make(sticky=0.0, max_steps=30), make_player("random"), 0)
    assert [info["action"] for info in played.infos[1:]] == played.actions


def test_left_and_right_move_the_ship_and_a_press_fires(make):
    game = make(sticky=0.0)
    frame, _ = game.reset(seed=0)
    places = [see(frame)[0]]
    for action in [2 * 3] * 3 + [2 * 4] * 3 + [2 * 1] * 2:  # left, right, up
        frame, *_ = game.step(action)
        places.append(see(frame)[0])
    moved = np.diff(places).tolist()  # 15 pixels, less where the game slows down
    assert all(-15 <= d <= -5 for d in moved[:3]) and all(5 <= d <= 15 for d in moved[3:6]) and moved[6:] == [0, 0]
    red = [(game.step(action)[0][100:178] == (232, 0, 0)).all(-1).any() for action in (0, 0, 1)]
    assert red == [False, False, True]


def test_four_lives_are_lost_and_the_last_ends_the_game(make):
    played = play(make(), make_player("sticky"), 1)
    lost = [info["life_lost"] for info in played.infos[1:]]
    lives = [info["lives"] for info in played.infos]
    assert sum(lost) == 4 and lost[-1] and played.terminated[-1] and not any(played.terminated[:-1])
    assert [lives[t + 1] - lives[t] for t in np.flatnonzero(lost)] == [-1, -1, -1, 0]
    assert played.infos[-1]["score"] == sum(info["score_gain"] for info in played.infos)
    assert see(played.frames[-1])[0] is None
    ship = np.array([see(frame)[0] is not None for frame in played.frames])
    late = np.flatnonzero([False, *lost]) - np.flatnonzero(move_to_hits(np.array([False, *lost]), ship))
    assert all(25 < steps < 30 for steps in late[:-1]) and late[-1] in (3, 4)


def test_the_shooter_beats_random_play(make):
    game = make(max_steps=1000)
    for seed in (1, 2):
        random, shooter = (play(game, make_player(name), seed) for name in ("random", "shooter"))
        scores = [played.infos[-1]["score"] for played in (random, shooter)]
        lost = [sum(info["life_lost"] for info in played.infos) for played in (random, shooter)]
        assert scores[1] > 1.3 * scores[0] > 0 and lost[1] <= lost[0], (seed, scores, lost)


def test_one_game_a_process_and_ids_that_exist(make):
    game = make()
    with pytest.raises(RuntimeError, match="can hold only one"):
        make()
    with pytest.raises(RuntimeError, match="reset"):
        game.step(0)
    game.reset(seed=0)
    with pytest.raises(ValueError, match="action is 18, expected 0 to 17"):
        game.step(18)
    for env_id, error, match in (
        ("Airstriker-Genesis-v0", ValueError, "Airstriker-Genesis-v0: expected retro:GAME"),
        ("retro:NoSuchGame-v0", FileNotFoundError, "NoSuchGame-v0 is no game of stable-retro"),
        ("retro:SonicTheHedgehog-Genesis-v0", FileNotFoundError, "has no ROM here"),
    ):
        with pytest.raises(error, match=match):
            make_game(env_id)


def load(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_a_packing_holds_the_games_that_were_played(tmp_path):
    options = {"env_id": GAME, "frames": 300, "heldout_episodes": 1, "max_steps": 120}
    meta = main(Args(**options, output=tmp_path / "one", num_workers=1))
    assert meta["fps"] == 20 and meta["n_movement"] == 9 and sorted(meta["episodes"])[-1] == "heldout_0001"
    assert sum(facts["frames"] for name, facts in meta["episodes"].items() if name[0] == "e") >= 300
    for name, facts in meta["episodes"].items():
        rows = load(tmp_path / "one" / f"{name}.npz")
        with closing(make_game(GAME, max_steps=120)) as game:
            played = play(game, make_player(facts["player"]), facts["seed"])
        done = np.array([info["action"] for info in played.infos])
        assert len(rows["frames"]) == len(done) == facts["frames"] and rows["cont"].all()
        assert (2 * rows["movement"] + rows["keys"][:, 0])[1:].tolist() == done[1:].tolist()
        gains = [0.01 * info["score_gain"] for info in played.infos]
        lost = np.array([info.get("life_lost", False) for info in played.infos])
        hit = move_to_hits(lost, np.array([see(frame)[0] is not None for frame in played.frames]))
        np.testing.assert_allclose(rows["reward"], gains - hit, rtol=1e-6)
        small = [pack_episodes.to_square(frame, 64) for frame in played.frames]
        assert np.array_equal(rows["frames"], small)

    assert main(Args(**options, output=tmp_path / "two", num_workers=2)) == meta
    for name in meta["episodes"]:
        one, two = (load(tmp_path / folder / f"{name}.npz") for folder in ("one", "two"))
        assert all(np.array_equal(one[column], two[column]) for column in one)


def test_ctrl_c_ends_the_workers_and_keeps_whole_games(tmp_path):
    command = [sys.executable, "pack_episodes.py", "--env-id", GAME, "--output", str(tmp_path / "packed")]
    command += ["--max-steps", "40", "--heldout-episodes", "0", "--players", "sticky=1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob(".packed.tmp/*.npz"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
    said, _ = process.communicate(timeout=60)  # ends when no worker holds stdout any more
    assert process.returncode == 130 and "what is whole is kept" in said
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    meta = json.loads((tmp_path / "packed" / "meta.json").read_text())
    assert meta["episodes"]
    for name, facts in meta["episodes"].items():
        assert len(load(tmp_path / "packed" / f"{name}.npz")["reward"]) == facts["frames"] == 41


def test_a_game_is_checked_before_anything_is_trained():
    meta = {"n_movement": 9, "keys": ["B"], "source": {"env_id": "retro:Airstriker-Genesis-v0"}}
    check_game("retro:Airstriker-Genesis-v0", meta)
    with pytest.raises(ValueError, match="--env-id retro:Other-v0: the packed episodes are of retro:Airstriker"):
        check_game("retro:Other-v0", meta)
    with pytest.raises(ValueError, match="takes 18 actions, the packed episodes have 9: 9 movements and the keys"):
        check_game("retro:Airstriker-Genesis-v0", meta | {"keys": []})
    with pytest.raises(FileNotFoundError, match="Nothing-v0 is no game"):
        check_game("retro:Nothing-v0", {"n_movement": 9, "keys": ["B"]})


def test_players_meet_on_the_same_seeds_and_the_best_and_the_median_game_are_filmed(tmp_path):
    meta = {"n_movement": 9, "keys": ["B"], "source": {"players": {"shooter:1": 1.0}, "sticky": 0.05}}
    agents = {
        name: Crowd([partial(make_player, player)]) for name, player in (("greedy", "sticky"), ("bc_greedy", "random"))
    }
    found = compare_players(GAME, meta, agents, [3, 4, 5], 2, 60, tmp_path)
    assert list(found["score"]) == ["random", "mix", "greedy", "bc_greedy"]
    games = {name: [game["score"] for game in played] for name, played in found["games"].items()}
    assert games["random"] == games["bc_greedy"] and all(len(scores) == 3 for scores in games.values())
    assert found["minus_bc"]["greedy"][0] == pytest.approx(np.mean(games["greedy"]) - np.mean(games["random"]))
    steps = {game["score"]: game["steps"] for game in found["games"]["greedy"]}
    for name, score in (("best", max(games["greedy"])), ("median", sorted(games["greedy"])[1])):
        with av.open(str(tmp_path / f"{name}.mp4")) as film:
            assert sum(1 for _ in film.decode(video=0)) == steps[score]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.mp4", "median.mp4"]

    alone = compare_players(GAME, meta, {"greedy": agents["greedy"]}, [3, 4, 5], 2, 60, tmp_path, baselines=False)
    assert alone["games"] == {"greedy": found["games"]["greedy"]}
    assert alone["minus_bc"] == alone["minus_random"] == {}
