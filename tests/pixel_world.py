"""A world of pixels that needs no emulator: a walker in a corridor with a door that A opens. `gym.make` finds it as
`tests.pixel_world:PixelWorld-v0`, experts are `tests/pixel_world.py:good` and the like."""

from functools import partial

import gymnasium as gym
import numpy as np

from pokemon_env.wrappers import make_env

A, LEFT, RIGHT = 0, 1, 2
LENGTH, DOOR = 8, 4
NAME = "tests.pixel_world:PixelWorld-v0"


class PixelWorld(gym.Env):
    """Observation uint8 (16, 32, 3): the walker's column in red, the closed door in green. Reward 1 per milestone:
    START at once, DOOR_OPEN, END. The seed picks the first cell."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, max_steps: int = 40, render_mode: str | None = None, goal: bool = True):
        self.terminal_milestone = "END" if goal else None
        self.observation_space = gym.spaces.Box(0, 255, (16, 4 * LENGTH, 3), np.uint8)
        self.action_space, self.max_steps, self.render_mode = gym.spaces.Discrete(3), max_steps, render_mode

    def get_action_meanings(self) -> list[str]:
        return ["A", "LEFT", "RIGHT"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.open, self.steps = int(self.np_random.integers(DOOR)), False, 0
        return self.render(), self.info()

    def info(self) -> dict:
        completed = ["START"] + ["DOOR_OPEN"] * self.open + ["END"] * (self.x == LENGTH - 1)
        return {"x": self.x, "open": self.open, "milestones": {"completed": completed, "total": 3, "next": None}}

    def render(self) -> np.ndarray:
        picture = np.zeros(self.observation_space.shape, np.uint8)
        picture[:, 4 * self.x : 4 * self.x + 4, 0] = 255
        if not self.open:
            picture[:, 4 * DOOR : 4 * DOOR + 4, 1] = 255
        return picture

    def step(self, action):
        before, self.steps = len(self.info()["milestones"]["completed"]), self.steps + 1
        if action == A and self.x == DOOR - 1:
            self.open = True
        step = {LEFT: -1, RIGHT: 1}.get(int(action), 0)
        if 0 <= self.x + step < LENGTH and (self.open or self.x + step != DOOR):
            self.x += step
        info = self.info()
        reward = len(info["milestones"]["completed"]) - before - 0.01
        return self.render(), reward, self.x == LENGTH - 1, self.steps >= self.max_steps, info


class Good:
    def reset(self, info):
        pass

    def get_action(self, obs, info):
        return A if info["x"] == DOOR - 1 and not info["open"] else "RIGHT"


class Raises(Good):
    def get_action(self, obs, info):
        if info["x"] == DOOR - 1:
            raise RuntimeError("no idea")
        return super().get_action(obs, info)


def good():
    return Good()


def raises():
    return Raises()


def vector(n: int, expert: str, **options) -> gym.vector.VectorEnv:
    """`n` worlds side by side with the expert of this name here, forked, as spawned ones take long to start."""
    make = partial(make_env, NAME, expert=f"tests/pixel_world.py:{expert}", **options)
    return gym.vector.AsyncVectorEnv([make] * n, context="fork", autoreset_mode=gym.vector.AutoresetMode.DISABLED)


if "PixelWorld-v0" not in gym.registry:  # an expert is loaded by path, as another module
    gym.register("PixelWorld-v0", "tests.pixel_world:PixelWorld")
