"""Environments as the collector and the trainer use them: an expert beside the game, infos that fit through a pipe."""

import json
import multiprocessing
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np

from pokemon_env import EMERALD_ROM, experts

NO_ACTION = -2  # of a step that is not to happen; -1 is an expert without an answer


class PackedInfo(gym.Wrapper):
    """An environment whose info a vector environment can carry. `json`: the info as a string; `expert_action`: what the
    expert says to the observation of the same call, -1 for nothing; `expert_error`: why, "" where all is well;
    `success`: the terminal milestone is reached.

    `reset(options={"ask": False})` leaves the expert alone for an episode. `expert` is a `Driver` of
    pokemon_env/experts.py, an expert, what `make_expert` takes, or None. A step with NO_ACTION, or after the end of an
    episode, gives the last answer again, so that an environment with nothing left to play costs no time.
    """

    def __init__(self, env: gym.Env, expert=None):
        super().__init__(env)
        meanings = getattr(env.unwrapped, "get_action_meanings", lambda: None)()
        self.action_names = list(meanings or map(str, range(int(env.action_space.n))))
        self.env_id = ""  # make_env's
        if expert is not None and not isinstance(expert, experts.Driver):
            expert = experts.Driver(expert, meanings and list(meanings), int(env.action_space.n))
        self.expert, self.asking, self.over, self.answer = expert, True, False, None

    @property
    def rom_sha1(self) -> str:
        """Of the game's ROM, "" where there is none."""
        return getattr(self.env.unwrapped, "rom_sha1", "")

    @property
    def has_goal(self) -> bool:
        """Whether an episode can succeed: there is a terminal milestone."""
        return getattr(self.env.unwrapped, "terminal_milestone", None) is not None

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        options = dict(options or {})
        self.over, self.asking = False, options.pop("ask", True) and self.expert is not None
        obs, info = self.env.reset(seed=seed, options=options or None)
        if self.asking:
            self.expert.reset(info, seed)
        packed = self.pack(obs, info, None)
        self.answer = obs, 0.0, False, False, packed
        return obs, packed

    def step(self, action):
        if self.over or action == NO_ACTION:
            return self.answer
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.over = bool(terminated or truncated)
        self.asking &= not self.over
        self.answer = obs, float(reward), bool(terminated), bool(truncated), self.pack(obs, info, int(action))
        return self.answer

    def pack(self, obs: np.ndarray, info: dict, taken: int | None) -> dict:
        action, error = self.expert.action(obs, info, taken) if self.asking else (-1, "")
        terminal = getattr(self.env.unwrapped, "terminal_milestone", None)
        completed = info.get("milestones", {}).get("completed", ())
        return {
            "json": json.dumps(info, separators=(",", ":"), default=str),
            "expert_action": action,
            "expert_error": error,
            "success": terminal in completed,
        }


def make_env(
    env_id: str | None = None,
    rom_path: str | Path = EMERALD_ROM,
    core: str | Path | None = None,
    init_state: str | Path | None = None,
    max_steps: int | None = None,
    expert=None,
    **options,
) -> PackedInfo:
    """The environment of `env_id`, any with RGB pictures and discrete actions, or of `rom_path`: Emerald, or, where
    that is its default and missing, the quest. `max_steps` None or 0: its own limit. Raises FileNotFoundError or
    ValueError."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the script decides
    env_id, chosen = choose_env(env_id, rom_path, core, init_state, max_steps)
    if env_id.startswith("ALE/"):
        import ale_py  # noqa: F401  registers its games
    env = gym.make(env_id, disable_env_checker=True, **chosen | options)
    pictures, actions = env.observation_space, env.action_space
    if not (isinstance(pictures, gym.spaces.Box) and pictures.dtype == np.uint8 and pictures.shape[2:] == (3,)):
        raise ValueError(f"{env_id} shows {pictures}, expected RGB pictures: a Box (height, width, 3) of uint8")
    if not (isinstance(actions, gym.spaces.Discrete) and actions.start == 0):
        raise ValueError(f"{env_id} takes {actions}, expected Discrete(n) from 0")
    env = PackedInfo(env, expert)
    env.env_id = env_id
    return env


def choose_env(env_id, rom_path, core, init_state, max_steps) -> tuple[str, dict]:
    """The id and the arguments of `gym.make`."""
    rom_path, is_default = Path(rom_path), Path(rom_path) == EMERALD_ROM
    options = {"core": core, "init_state": init_state, "max_steps": max_steps}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items() if value}
    if env_id and not env_id.startswith("pokemon_env:"):
        given = [name for name in ("core", "init_state") if name in options] + ["rom_path"] * (not is_default)
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for PokemonEnv, --env-id is {env_id}")
        return env_id, {"max_episode_steps": max_steps} if max_steps else {}
    if env_id == "pokemon_env:Quest-v0" and not is_default:
        raise ValueError(f"--env-id {env_id} brings its own ROM, --rom-path is {rom_path}. Leave one of them out")
    if env_id == "pokemon_env:Quest-v0" or (not env_id and is_default and not rom_path.is_file()):
        return "pokemon_env:Quest-v0", options
    if not rom_path.is_file():
        raise FileNotFoundError(f"--rom-path {rom_path} is missing. Name your ROM, or leave it out to play the quest")
    return env_id or "pokemon_env:Emerald-v0", options | {"rom_path": str(rom_path)}
