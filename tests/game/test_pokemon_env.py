"""PokemonEnv on the real emulator with the quest: reset, determinism, rewards, states, window, video, both backends."""

import hashlib
import json
import multiprocessing
import struct
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from pokemon_env import QUEST_ROM
from pokemon_env.gym_env import ACTIONS, PokemonEnv
from pokemon_env.memory import Snapshot

EMULATOR = True  # tests/conftest.py: what these tests need
ROOT = Path(__file__).parents[2]
STARTER = 0x860


@pytest.fixture
def make():
    """Environments of the quest, closed after the test: a process holds one emulator."""
    made = []

    def build(rom=QUEST_ROM, **options):
        made.append(PokemonEnv(rom, **options))
        return made[-1]

    yield build
    for env in made:
        env.close()


def bundled_core() -> str:
    stable_retro = pytest.importorskip("stable_retro")
    return str(next(Path(stable_retro.__file__).parent.glob("cores/mgba_libretro.*")))


def digest(core=None, seed=7, steps=40, import_torch=False) -> str:
    """Hash of all observations, rewards and infos of some steps; also run in another process."""
    if import_torch:
        import torch  # noqa: F401  must not stop the emulator
    env, seen, rng = PokemonEnv(QUEST_ROM, core=core, randomize_release_frames=True), hashlib.sha1(), np.random
    actions = rng.default_rng(0).integers(len(ACTIONS), size=steps)
    try:
        obs, info = env.reset(seed=seed)
        seen.update(obs.tobytes() + json.dumps(info).encode())
        for action in actions:
            obs, reward, *_, info = env.step(action)
            seen.update(obs.tobytes() + json.dumps([reward, info]).encode())
        return seen.hexdigest()
    finally:
        env.close()


def poke_flag(env, number):
    """Set a flag of the running game."""
    (block,) = struct.unpack_from("<I", env.emulator.memory()[1], 0x5D8C)
    address = block + 0x1270 + (number >> 3)
    ram = env.emulator.ram
    ram.assign(address, "|u1", ram.extract(address, "|u1") | 1 << (number & 7))


def script(env, *snapshots):
    """From here on the game is said to be in these moments, one per step."""
    moments = iter(snapshots)

    def look():
        env.obs, env.snapshot = env.emulator.screen(), next(moments)

    env.look = look


def moment(place=(0, 9), x=5, y=5, flags=(0x86F,)):
    return Snapshot(running=True, field=True, name="ANNA", map=place, x=x, y=y, flags=frozenset(flags))


# Gymnasium ------------------------------------------------------------------------------------------------------------
def test_check_env(make):
    env = make(start_wait=(0, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not having a spec.*")
        check_env(env)


def test_registered_ids(tmp_path, monkeypatch):
    env = gym.make("pokemon_env:Quest-v0", start_wait=(0, 0))
    try:
        obs, info = env.reset(seed=1)
        assert (obs.shape, obs.dtype, info["game"]) == ((160, 240, 3), np.uint8, "quest")
        assert env.unwrapped.max_steps == 1000 and env.unwrapped.release_range == (45, 54)
        assert env.action_space.n == 10 and env.unwrapped.get_action_meanings()[4:8] == ["UP", "DOWN", "LEFT", "RIGHT"]
    finally:
        env.close()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Emerald-GBAdvance/rom\.gba is missing.*Quest-v0"):
        gym.make("pokemon_env:Emerald-v0")


def test_two_workers_of_a_vector_environment():
    envs = gym.make_vec(
        "pokemon_env:Quest-v0", 2, vectorization_mode="async", vector_kwargs={"context": "spawn"}, start_wait=(0, 200)
    )
    try:
        obs, _ = envs.reset(seed=[3, 4])
        again, *_ = envs.step([4, 7])
        repeat, _ = envs.reset(seed=[3, 4])
        assert obs.shape == (2, 160, 240, 3)
        assert (obs == repeat).all() and (obs[0] != obs[1]).any() and (again != obs).any()
    finally:
        envs.close()


# one emulator, the same for everyone ----------------------------------------------------------------------------------
def test_same_seed_same_game_also_in_another_process():
    first = digest()
    assert digest() == first
    assert digest(seed=8) != first
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(digest, (None, 7, 40, True)) == first


def test_both_backends_play_the_same():
    pytest.importorskip("libretro")
    assert digest(core=bundled_core()) == digest()


def test_a_state_of_one_backend_in_the_other(make, tmp_path):
    pytest.importorskip("libretro")
    env = make(start_wait=(0, 50))
    env.reset(seed=2)
    play(env, [5, 6])
    env.save_state(tmp_path / "here.state")
    seen = play(env, [7, 4, 2])
    env.close()
    env = make(core=bundled_core(), init_state=tmp_path / "here.state", start_wait=(0, 0))
    env.reset(seed=3)
    assert play(env, [7, 4, 2]) == seen


def test_reset_is_power_on(make):
    env = make(start_wait=(0, 0))
    env.emulator.run((), 1)
    after = env.emulator.memory()
    env.emulator.reset()
    start = env.emulator.memory(), env.emulator.save_ram()
    env.reset(seed=1)
    for action in (4, 5, 0, 2):
        env.step(action)
    env.emulator.ram.assign(0x0E000123, "|u1", 77)  # as a game that saves
    assert env.emulator.memory() != start[0] and env.emulator.save_ram() != start[1]
    env.emulator.reset()
    assert (env.emulator.memory(), env.emulator.save_ram()) == start
    env.emulator.run((), 1)
    assert env.emulator.memory() == after


def test_one_emulator_a_process(make):
    env = make()
    with pytest.raises(RuntimeError, match=r"only one.*close\(\).*spawn"):
        make()
    env.reset(seed=1)  # the first one goes on
    env.close()
    env.close()
    dropped = PokemonEnv(QUEST_ROM)
    del dropped  # without close()
    make().reset(seed=1)


def test_steps_need_a_reset_and_an_action(make):
    env = make(start_wait=(0, 0))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(0)
    env.reset(seed=1)
    with pytest.raises(ValueError, match="10.*0 to 9"):
        env.step(10)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"render_mode": "ansi"}, "ansi.*human"),
        ({"base_fps": 0}, "base_fps is 0"),
        ({"max_steps": -5}, "max_steps is -5"),
        ({"hold_frames": 0, "release_frames": 0}, "one frame"),
        ({"release_frames_range": (54, 45)}, r"release_frames_range is \(54, 45\)"),
        ({"start_wait": (-1, 4)}, "start_wait"),
        ({"terminal_milestone": "ROUTE_103"}, "ROUTE_103.*ROUTE_101"),  # not in the quest
        ({"core": "nowhere.so"}, "nowhere.so is missing"),
        ({"init_state": "nowhere.state"}, "nowhere.state is missing"),
    ],
)
def test_wrong_arguments(options, words, make):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        PokemonEnv(QUEST_ROM, **options)
    make()  # nothing was left open


def test_a_core_that_is_none(tmp_path):
    pytest.importorskip("libretro")
    (tmp_path / "core.so").write_text("no library")
    with pytest.raises(ValueError, match=r"core\.so.*libretro core of mGBA"):
        PokemonEnv(QUEST_ROM, core=tmp_path / "core.so")


# steps, rewards, info -------------------------------------------------------------------------------------------------
def test_info(make):
    env = make(start_wait=(0, 300))
    _, first = env.reset(seed=5)
    _, _, _, _, second = env.step(5)
    assert first.keys() == second.keys()
    assert json.loads(json.dumps(second)) == second
    assert (first["step_count"], first["prev_action"], second["step_count"], second["prev_action"]) == (0, None, 1, 5)
    assert second["total_frames"] == 60 and second["episode_reward"] == pytest.approx(-0.001)
    assert first["player"]["map"] == [0, 9] and first["player"]["name"] and not first["locked"]
    rows, x, y = first["map"]["collision"], first["player"]["x"], first["player"]["y"]
    assert len(rows) == first["map"]["height"] and {len(row) for row in rows} == {first["map"]["width"]}
    assert rows[y][x] == "."
    assert first["milestones"]["completed"] == ["GAME_RUNNING", "PLAYER_NAME_SET", "LITTLEROOT_TOWN"]
    assert first["milestones"]["next"] == "ROUTE_101" and first["milestones"]["new"] == []


def test_walking_shows_in_memory_and_picture(make):
    """Ways of one button each: the position changes by a cell at most, and only where the grid is free."""
    env = make(start_wait=(0, 300))
    obs, info = env.reset(seed=5)
    moved = 0
    for action in [4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 4, 4]:
        before, (last, obs) = info, (obs, None)
        obs, _, _, _, info = env.step(action)
        there = info["player"]["x"], info["player"]["y"]
        step = there[0] - before["player"]["x"], there[1] - before["player"]["y"]
        assert step in [(0, 0), {4: (0, -1), 5: (0, 1), 6: (-1, 0), 7: (1, 0)}[action]]
        assert info["player"]["facing"] == {4: "north", 5: "south", 6: "west", 7: "east"}[action]
        if info["player"]["map"] == [0, 9]:
            assert info["map"]["collision"][there[1]][there[0]] == "."
        moved += step != (0, 0)
        assert step == (0, 0) or (obs != last).any()
    assert moved >= 4


def test_seeds_pick_starts(make):
    env = make()
    starts = set()
    for seed in range(60):
        _, info = env.reset(seed=seed)
        starts.add((info["player"]["x"], info["player"]["y"]))
    assert len(starts) >= 25


def test_a_milestone_is_paid_in_its_step(make):
    env = make(start_wait=(0, 0))
    env.reset(seed=1)
    assert env.step(5)[1] == pytest.approx(-0.001)
    poke_flag(env, STARTER)
    _, reward, terminated, _, info = env.step(1)
    assert reward == pytest.approx(1.0 - 0.001) and not terminated
    assert info["milestones"]["new"] == ["STARTER_CHOSEN"] and "STARTER_CHOSEN" in info["milestones"]["completed"]
    assert info["episode_reward"] == pytest.approx(1 - 0.002)
    _, reward, _, _, info = env.step(1)
    assert reward == pytest.approx(-0.001) and info["milestones"]["new"] == []
    _, info = env.reset(seed=1)
    assert "STARTER_CHOSEN" not in info["milestones"]["completed"]


def test_the_end_in_the_step_that_reaches_it(make):
    env = make(start_wait=(0, 0), terminal_milestone="STARTER_CHOSEN", milestone_reward=5.0, step_penalty=-0.5)
    env.reset(seed=1)
    assert not env.success
    poke_flag(env, STARTER)
    _, reward, terminated, truncated, _ = env.step(1)
    assert (reward, terminated, truncated, env.success) == (4.5, True, False, True)


def test_without_milestones(make):
    env = make(start_wait=(0, 0), enable_milestones=False)
    _, info = env.reset(seed=1)
    poke_flag(env, STARTER)
    _, reward, terminated, _, info = env.step(1)
    assert reward == pytest.approx(-0.001) and not terminated
    assert info["milestones"] == {"completed": [], "next": None, "total": 0, "new": []}


def test_locations_pay_once(make):
    env = make(start_wait=(0, 0), enable_milestones=False, step_penalty=0.0)
    script(env, moment(), *[moment(place) for place in ((0, 16), (0, 9), (0, 16), (1, 4), (0, 9))])
    env.reset(seed=1)
    assert [env.step(1)[1] for _ in range(5)] == pytest.approx([0.1, 0, 0, 0.1, 0])


def test_exploration_weight(make):
    env = make(start_wait=(0, 0), enable_milestones=False, step_penalty=0.0, exploration_weight=0.25)
    script(env, moment(), *[moment(x=x) for x in (6, 6, 5, 7, 6)])
    env.reset(seed=1)
    assert [env.step(1)[1] for _ in range(5)] == pytest.approx([0.25, 0, 0, 0.25, 0])


def test_distance_weight_pays_the_way_there_and_takes_it_back(make):
    env = make(start_wait=(0, 200), distance_weight=0.5, step_penalty=0.0)
    _, info = env.reset(seed=5)
    y = info["player"]["y"]
    for action in (5, 5, 4, 4, 7, 6, 4, 5):
        _, reward, _, _, info = env.step(action)
        assert reward == pytest.approx(0.5 * (y - info["player"]["y"]))  # the way to the route leads north
        y = info["player"]["y"]


def test_frames_and_steps(make):
    env = make(start_wait=(0, 0), randomize_release_frames=True, max_steps=25)
    env.reset(seed=1)
    frames, ends = [0], []
    for _ in range(25):
        _, _, terminated, truncated, info = env.step(1)
        frames.append(info["total_frames"])
        ends.append((terminated, truncated))
    steps = set(np.diff(frames).tolist())
    assert steps <= set(range(57, 67)) and len(steps) > 4
    assert ends == [(False, False)] * 24 + [(False, True)]
    env.close()
    env = make(start_wait=(0, 0), hold_frames=3, release_frames=4)
    env.reset(seed=1)
    assert env.step(1)[4]["total_frames"] == 7


# states ---------------------------------------------------------------------------------------------------------------
def play(env, actions):
    return [env.step(action)[0].tobytes() for action in actions]


def test_states_go_round(make, tmp_path):
    env, path, way = make(start_wait=(0, 100)), tmp_path / "here.state", [5, 6, 6, 4, 0, 1]
    env.reset(seed=2)
    play(env, [5, 5, 7])
    env.save_state(path)
    x, y = env.snapshot.x, env.snapshot.y
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here.state", "here.state.json"]
    assert json.loads((tmp_path / "here.state.json").read_text())["rom_sha1"] == env.rom_sha1
    first = play(env, way)
    env.load_state(path)
    assert play(env, way) == first
    env.close()

    env = make(start_wait=(0, 0), init_state=path)
    for options in (None, {"load_state": path}):
        _, info = env.reset(seed=9, options=options)
        assert (info["player"]["x"], info["player"]["y"]) == (x, y)
        assert play(env, way) == first


def test_states_that_do_not_fit(make, tmp_path):
    env, path = make(start_wait=(0, 0)), tmp_path / "here.state"
    env.reset(seed=2)
    env.save_state(path)
    good, here = path.read_bytes(), env.emulator.memory()
    about = tmp_path / "here.state.json"

    about.write_text(json.dumps({"rom_sha1": "0" * 40}))
    with pytest.raises(ValueError, match=r"here\.state\.json.*SHA-1 0000.*Give that ROM"):
        env.load_state(path)
    about.unlink()
    for bad, words in (
        (b"\x07\0\0\x01" + good[4:], "version 7.*version 2.*newer"),
        (good[:8] + b"\1\2\3\4" + good[12:], "CRC-32 04030201.*Give"),
        (good[:100_000], "100,000 bytes.*cut off"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"here\.state.*{words}"):
            env.reset(options={"load_state": path})
        with pytest.raises(RuntimeError, match="reset"):
            env.step(0)
        with pytest.raises(ValueError, match="here"):
            make_again(env, path)
        env = make(start_wait=(0, 0))
        env.reset(seed=2)
    with pytest.raises(FileNotFoundError, match="gone"):
        env.reset(options={"load_state": tmp_path / "gone.state"})
    with pytest.raises(ValueError, match="load_sate"):
        env.reset(options={"load_sate": path})
    env.reset(seed=2)
    assert env.emulator.memory() == here


def make_again(env, path):
    env.close()
    PokemonEnv(QUEST_ROM, init_state=path)


def test_a_state_that_the_core_ignores_is_noticed(make, tmp_path, monkeypatch):
    env = make(start_wait=(0, 0))
    env.reset(seed=2)
    env.save_state(tmp_path / "here.state")
    play(env, [5, 5])
    monkeypatch.setattr(env.emulator, "_set_state", lambda state: None)
    with pytest.raises(ValueError, match=r"here\.state.*its memory differs"):
        env.emulator.load_state((tmp_path / "here.state").read_bytes(), "here.state")


def test_another_games_rom(tmp_path, make):
    rom = bytearray(QUEST_ROM.read_bytes())
    rom[0xAC:0xB0] = b"ABCD"
    (tmp_path / "other.gba").write_bytes(rom)
    with pytest.raises(ValueError, match=r"other\.gba.*'ABCD'.*'BPEE'"):
        make(tmp_path / "other.gba")
    rom[0xAC:0xB0] = b"BPEE"
    (tmp_path / "changed.gba").write_bytes(rom)
    with pytest.warns(UserWarning, match=r"changed\.gba has SHA-1"):
        env = make(tmp_path / "changed.gba")
    assert env.game == "other" and env.tracker.milestones[2].id == "INTRO_CUTSCENE_COMPLETE"


# pictures -------------------------------------------------------------------------------------------------------------
def test_render(make):
    env = make(start_wait=(0, 0), render_mode="rgb_array")
    obs, _ = env.reset(seed=1)
    picture = env.render()
    assert (picture == obs).all() and picture is not obs
    assert set(np.unique(obs)) <= {(v << 3) | (v >> 2) for v in range(32)}
    assert obs.flags.writeable


@pytest.mark.parametrize("options", [{"render_mode": "human"}, {"headless": False}])
def test_window(make, monkeypatch, options):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = make(start_wait=(0, 0), base_fps=240, **options)
    obs, _ = env.reset(seed=1)
    shown = pygame.surfarray.array3d(env.window.surface).transpose(1, 0, 2)
    assert (shown[1::3, 1::3] == obs).all()
    waits = []
    monkeypatch.setattr(env.window, "wait", waits.append)
    obs, *_ = env.step(5)
    assert sum(waits) == pytest.approx(60 / 240) and len(waits) == 15
    shown = pygame.surfarray.array3d(env.window.surface).transpose(1, 0, 2)
    assert (shown[1::3, 1::3] == obs).all()
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    with pytest.raises(KeyboardInterrupt, match="window"):
        env.step(5)
    env.close()
    assert not pygame.display.get_init()


def test_window_and_video_change_nothing(make, monkeypatch, tmp_path):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    plain = make(start_wait=(0, 50))
    plain.reset(seed=4)
    seen = play(plain, [5, 6, 4])
    plain.close()
    env = make(start_wait=(0, 50), render_mode="human", base_fps=10_000, record_video=True, video_dir=tmp_path)
    env.reset(seed=4)
    assert play(env, [5, 6, 4]) == seen


def test_video(make, tmp_path):
    from common.video import VideoReader

    env = make(start_wait=(0, 0), record_video=True, video_fps=15, video_dir=tmp_path / "v")
    env.reset(seed=1)
    play(env, [5, 4, 0])
    assert [p.suffix for p in (tmp_path / "v").iterdir()] == [".tmp"]  # no name before it is complete
    env.reset(seed=2)
    play(env, [6])
    env.close()
    names = sorted(p.name for p in (tmp_path / "v").iterdir())
    assert [name[15:] for name in names] == ["_episode_0001.mp4", "_episode_0002.mp4"]
    video = VideoReader(tmp_path / "v" / names[0])
    assert video.n_frames == int(180 * 15 / 59.7275)
    assert (video.height, video.width) == (346, 480)
    pictures = video.read(0, video.n_frames).float().mean(1)
    lit = [[pictures[i, 326:340, 48 * k + 3 : 48 * k + 40].mean() for k in range(10)] for i in (2, 20, 40)]
    assert np.argmax(lit, axis=1).tolist() == [5, 4, 0]  # the button of each step
    obs = env.obs.repeat(2, 0).repeat(2, 1)
    last = VideoReader(tmp_path / "v" / names[1])
    final = last.read(last.n_frames - 1, last.n_frames)[0].permute(1, 2, 0).numpy()[:320]
    assert np.abs(final.astype(int) - obs).mean() < 25


def test_video_on_demand(make, tmp_path):
    env = make(start_wait=(0, 0), record_video=True, auto_save_video=False, overlay_actions=False, video_dir=tmp_path)
    env.reset(seed=1)
    play(env, [5])
    env.reset(seed=1)
    assert list(tmp_path.iterdir()) == []  # not asked for
    play(env, [5])
    saved = env.save_video(tmp_path / "mine.mp4")
    env.close()
    assert saved == tmp_path / "mine.mp4" and [p.name for p in tmp_path.iterdir()] == ["mine.mp4"]
    from common.video import VideoReader

    assert VideoReader(saved).height == 320
