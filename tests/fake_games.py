"""Small games in NumPy for tests of collector and experts: `gym.make("tests.fake_games:Corridor-v0")`."""

import gymnasium as gym
import numpy as np

NAMES = ["LEFT", "RIGHT", "UP", "DOWN"]


class Corridor(gym.Env):
    """RIGHT walks, LEFT goes back, the rest does nothing; a corridor of `length` cells, the start drawn by the seed.
    A picture shows nothing but the cell and a count of the steps."""

    metadata = {"render_modes": []}

    def __init__(self, length: int = 12, shape=(8, 6, 3), crash_at: int | None = None, named: bool = True):
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.Discrete(len(NAMES))
        self.length, self.crash_at, self.terminal_milestone, self.render_mode = length, crash_at, "END", None
        if named:
            self.get_action_meanings = lambda: list(NAMES)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = int(self.np_random.integers(3)), 0
        return self.picture(), self.info()

    def step(self, action):
        self.x, self.steps = max(0, self.x + {0: -1, 1: 1}.get(int(action), 0)), self.steps + 1
        if self.steps == self.crash_at:
            raise RuntimeError("the game fell over")
        return self.picture(), 0.5 * self.x, self.x >= self.length, False, self.info()

    def picture(self):
        picture = np.full(self.observation_space.shape, self.x, np.uint8)
        picture[..., 1] = self.steps % 256
        return picture

    def info(self):
        done = [name for name, at in (("START", 0), ("HALF", self.length // 2), ("END", self.length)) if self.x >= at]
        return {"x": self.x, "steps": self.steps, "milestones": {"completed": done}, "odd": np.int64(self.steps)}


GAME = "tests.fake_games:Corridor"
gym.register("Corridor-v0", entry_point=GAME, max_episode_steps=200)
gym.register("Crash-v0", entry_point=GAME, kwargs={"crash_at": 20, "length": 100})
gym.register("Grey-v0", entry_point=GAME, kwargs={"shape": (8, 6, 1)})
gym.register("Nameless-v0", entry_point=GAME, kwargs={"named": False})
gym.register("Wide-v0", entry_point=GAME, kwargs={"shape": (32, 48, 3)})
