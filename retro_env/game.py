"""Any game of stable-retro as a Gymnasium environment: the screen in, nine directions times fire out."""

import gymnasium as gym
import numpy as np

MOVEMENTS = ("stay", "up", "down", "left", "right", "up-left", "up-right", "down-left", "down-right")
DIRECTIONS = ("", "UP", "DOWN", "LEFT", "RIGHT", "UP LEFT", "UP RIGHT", "DOWN LEFT", "DOWN RIGHT")  # buttons of each
FIRE = ("B", "BUTTON")  # the first of these that the console has
FRAME_RATE = 60  # frames that an emulator runs in a second of the game
MAX_NOOPS = 60  # steps


class RetroGame(gym.Env):
    """One game. Observation: the screen, uint8 (H, W, 3) RGB. Action: 2 * movement + fire, movement in `MOVEMENTS`.

    A step is `frame_skip` frames with the buttons held; its reward is the score gained in them. `reset(seed=)` plays 0
    to MAX_NOOPS idle steps, as a game always starts alike. With chance `sticky` a step repeats the previous action.
    `info`: `action` really done, `score_gain`, `score` since the reset, `lives` (None where the game's RAM map has
    none), `life_lost`: `lives` fell, or the game is over. `max_steps` steps later an episode is truncated; None: never.
    Raises ImportError without stable-retro, FileNotFoundError for an unknown game, RuntimeError for a second one."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, game: str, frame_skip: int = 3, sticky: float = 0.05, max_steps: int | None = None):
        if frame_skip < 1 or not 0 <= sticky < 1:
            raise ValueError(f"frame_skip {frame_skip}, sticky {sticky}: expected 1 or more, and 0 to below 1")
        self.game, self.frame_skip, self.sticky, self.max_steps = game, frame_skip, sticky, max_steps
        self.render_mode, self.fps = "rgb_array", FRAME_RATE / frame_skip
        self.metadata = self.metadata | {"render_fps": self.fps}
        self.emulator = _start(game)
        buttons = self.emulator.buttons
        fire = next((button for button in FIRE if button in buttons), None)
        if fire is None:
            self.close()
            raise ValueError(f"{game}: the console has the buttons {buttons}, expected {' or '.join(FIRE)} to fire")
        self.masks = np.zeros((2 * len(MOVEMENTS), len(buttons)), np.int8)  # (18, buttons)
        for action in range(len(self.masks)):
            held = DIRECTIONS[action // 2].split() + [fire] * (action % 2)
            self.masks[action] = [button in held for button in buttons]
        self.action_space = gym.spaces.Discrete(len(self.masks))
        self.observation_space = gym.spaces.Box(0, 255, self.emulator.observation_space.shape, np.uint8)
        self.frame, self.over = None, True

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self._restart()
        for _ in range(int(self.np_random.integers(MAX_NOOPS + 1))):
            if self._run(0)[1]:  # a game that nobody plays may end
                self._restart()
        self.steps, self.score, self.previous, self.over = 0, 0.0, 0, False
        return self.frame.copy(), self._info(0, 0.0, False)

    def step(self, action):
        if self.over:
            raise RuntimeError(f"{self.game}: the episode is over or has not begun. Call reset() first")
        if not self.action_space.contains(action):
            raise ValueError(f"{self.game}: the action is {action!r}, expected 0 to {len(self.masks) - 1}")
        action = self.previous if self.np_random.random() < self.sticky else int(action)
        lives = self.lives
        gain, terminated = self._run(action)
        self.steps, self.score, self.previous = self.steps + 1, self.score + gain, action
        truncated = not terminated and self.steps == self.max_steps
        self.over = terminated or truncated
        life_lost = terminated or (lives is not None and self.lives < lives)
        return self.frame.copy(), gain, terminated, truncated, self._info(action, gain, life_lost)

    def _restart(self):
        self.frame, self.lives = self.emulator.reset()[0], None
        self._run(0)  # the RAM is known after a step

    def _run(self, action: int) -> tuple[float, bool]:
        """A step; the score gained in it, and whether the game is over."""
        gain, done = 0.0, False
        for _ in range(self.frame_skip):
            self.frame, reward, done, _, ram = self.emulator.step(self.masks[action])
            gain += float(reward)
            self.lives = int(ram["lives"]) if "lives" in ram else None
            if done:
                break
        return gain, bool(done)

    def _info(self, action: int, gain: float, life_lost: bool) -> dict:
        info = {"action": action, "score_gain": gain, "score": self.score}
        return info | {"lives": self.lives, "life_lost": bool(life_lost)}

    def get_action_meanings(self) -> list[str]:
        return [f"{movement}{'+fire' * fire}" for movement in MOVEMENTS for fire in (0, 1)]

    def render(self) -> np.ndarray:
        """The screen, uint8 (H, W, 3); black before the first reset."""
        return np.zeros(self.observation_space.shape, np.uint8) if self.frame is None else self.frame.copy()

    def close(self):
        """Let go of the emulator, so that this process can start another."""
        if self.emulator is not None:
            self.emulator.close()
        self.emulator = None


def make_game(env_id: str, **options) -> RetroGame:
    """The game of `env_id`, such as retro:Airstriker-Genesis-v0, with `options` of RetroGame. Raises as RetroGame does,
    and ValueError for another kind of id."""
    kind, colon, game = env_id.partition(":")
    if kind != "retro" or not game:
        raise ValueError(f"--env-id {env_id}: expected retro:GAME, such as retro:Airstriker-Genesis-v0")
    return RetroGame(game, **options)


def _start(game: str):
    """The stable-retro environment of `game`, without a window."""
    try:
        import stable_retro
    except ImportError as error:
        raise ImportError(f"{game} needs stable-retro ({error}). Install it: pip install -e '.[pokemon]'") from None
    try:
        return stable_retro.make(game, render_mode="rgb_array")  # the default mode opens a window
    except FileNotFoundError:
        known = game in stable_retro.data.list_games(stable_retro.data.Integrations.ALL)
        found = "has no ROM here. Import yours: python -m stable_retro.import FOLDER"
        found = found if known else "is no game of stable-retro, expected one such as Airstriker-Genesis-v0"
        raise FileNotFoundError(f"retro:{game}: {game} {found}") from None
    except RuntimeError as error:
        if "multiple emulator" not in str(error):
            raise
        raise RuntimeError(
            f"retro:{game}: this process already runs an emulator and can hold only one. close() the other one, or "
            "play in a process of its own"
        ) from None
