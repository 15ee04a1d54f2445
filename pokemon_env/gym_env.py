"""PokemonEnv: a GBA game as a Gymnasium environment. Pixels in, one of ten buttons out.

    env = PokemonEnv()  # your own Emerald-GBAdvance/rom.gba where it is, else the quest that ships
    obs, info = env.reset(seed=1)
    obs, reward, terminated, truncated, info = env.step(ACTIONS.index("UP"))

Page: docs/pokemon_env.md
"""

import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from pokemon_env import EMERALD_ROM, QUEST_ROM
from pokemon_env.emulator import BUTTONS, HEIGHT, WIDTH, open_emulator
from pokemon_env.memory import Reader, Snapshot
from pokemon_env.milestones import MILESTONES, QUEST_MILESTONES, Tracker, distance_to

ACTIONS = BUTTONS
EMERALD_SHA1 = "f3ae088181bf583e55daf962a92bb46f4f1d07b7"
EMERALD_CODE, QUEST_CODE = b"BPEE", b"QEST"  # at 0xAC in the ROM
BOOT_FRAMES = 20  # the quest reads no key before
FPS = 59.7275  # of the console


class PokemonEnv(gym.Env):
    """One step holds a button for `hold_frames` and then nothing for `release_frames` frames.

    Observation: uint8 (160, 240, 3) RGB. Actions: the ten buttons of `ACTIONS`; there is none that does nothing.
    Reward: `step_penalty` + `milestone_reward` per milestone completed in this step + `location_reward` for a map that
    this episode had not seen + `distance_weight` times the cells by which the exit towards the next milestone came
    nearer + `exploration_weight` for a new cell. Terminated by `terminal_milestone`, truncated after `max_steps`.

    rom_path: a ROM; None takes Emerald-GBAdvance/rom.gba where it exists, else the quest that ships
    base_fps: frames a second in a window; without one the game runs as fast as it can
    render_mode: None, "rgb_array" or "human", which opens a window. headless=False opens it in any mode
    enable_milestones: without them no milestone is rewarded and nothing terminates an episode
    record_video: an mp4 of each episode in `video_dir`, `video_fps` pictures per second of the game, with the button
        written below when `overlay_actions`. With auto_save_video=False only save_video() keeps it
    randomize_release_frames: draw the released frames of each step from `release_frames_range`, both ends included
    start_wait: idle frames between power-on (or the state) and the first observation, drawn from this range
    init_state: a file of save_state() that episodes start from; None is power-on
    core: a libretro core's file for libretro.py; None is stable-retro's
    max_steps: None has no limit
    terminal_milestone: None has none

    Raises FileNotFoundError for a missing ROM, state or core, ValueError for a ROM of another game, a state that does
    not fit and arguments out of range, RuntimeError where the process already has an emulator.
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 60}

    def __init__(
        self,
        rom_path: str | Path | None = None,
        base_fps: float = 120,
        render_mode: str | None = None,
        headless: bool = True,
        enable_milestones: bool = True,
        record_video: bool = False,
        video_fps: float = 30,
        auto_save_video: bool = True,
        overlay_actions: bool = True,
        video_dir: str | Path = "videos",
        hold_frames: int = 12,
        release_frames: int = 48,
        randomize_release_frames: bool = False,
        release_frames_range: tuple[int, int] = (45, 54),
        start_wait: tuple[int, int] = (0, 1023),
        init_state: str | Path | None = None,
        core: str | Path | None = None,
        max_steps: int | None = 10_000,
        step_penalty: float = -0.001,
        milestone_reward: float = 1.0,
        location_reward: float = 0.1,
        distance_weight: float = 0.0,
        exploration_weight: float = 0.0,
        terminal_milestone: str | None = "FIRST_GYM_COMPLETE",
    ):
        self.emulator = self.window = self.video = None  # close() works on what the constructor left
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}, expected None, 'human' or 'rgb_array'")
        for name, value in dict(base_fps=base_fps, video_fps=video_fps, max_steps=max_steps or 1).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")
        for name, value in dict(hold_frames=hold_frames, release_frames=release_frames).items():
            if value < 0 or hold_frames + release_frames < 1:
                raise ValueError(f"{name} is {value}, expected 0 or more, and one frame a step at least")
        for name, (low, high) in dict(release_frames_range=release_frames_range, start_wait=start_wait).items():
            if not 0 <= low <= high:
                raise ValueError(f"{name} is ({low}, {high}), expected 0 <= low <= high")
        self.render_mode, self.base_fps, self.show = render_mode, base_fps, render_mode == "human" or not headless
        self.record_video, self.video_fps, self.auto_save_video = record_video, video_fps, auto_save_video
        self.overlay_actions, self.video_dir = overlay_actions, Path(video_dir)
        self.hold_frames, self.release_frames = hold_frames, release_frames
        self.release_range = tuple(release_frames_range) if randomize_release_frames else None
        self.start_wait, self.max_steps = tuple(start_wait), max_steps
        self.step_penalty, self.milestone_reward = step_penalty, milestone_reward
        self.location_reward, self.distance_weight = location_reward, distance_weight
        self.exploration_weight = exploration_weight

        self.rom_path = choose_rom(rom_path)
        rom = self.rom_path.read_bytes()
        self.game, self.rom_sha1 = identify_rom(rom, self.rom_path), hashlib.sha1(rom).hexdigest()
        milestones = QUEST_MILESTONES if self.game == "quest" else MILESTONES
        if terminal_milestone is not None and terminal_milestone not in [m.id for m in milestones]:
            names = ", ".join(m.id for m in milestones)
            raise ValueError(f"terminal_milestone is {terminal_milestone!r}, expected None or one of {names}")
        self.terminal_milestone = terminal_milestone
        self.tracker = Tracker(milestones if enable_milestones else ())

        self.observation_space = gym.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self.reader = Reader(rom, quest=self.game == "quest")
        self.emulator = open_emulator(self.rom_path, core)
        self.start_state = None  # power-on
        self.snapshot, self.obs, self.episode, self.needs_reset = Snapshot(), None, 0, True
        if init_state is not None:
            try:
                self.load_state(init_state)
            except (OSError, ValueError):
                self.close()
                raise
            self.start_state = self.emulator.state()

    # episodes ---------------------------------------------------------------------------------------------------------
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode from power-on, from `init_state`, or from `options={"load_state": path}`."""
        super().reset(seed=seed)
        unknown = set(options or {}) - {"load_state"}
        if unknown:
            raise ValueError(f"reset options hold {', '.join(sorted(unknown))}, expected load_state or nothing")
        self.needs_reset = True  # until all of it went well
        self.end_video()
        self.emulator.reset()
        self.total_frames, self.step_count, self.episode_reward, self.action = 0, 0, 0.0, None
        if options and options.get("load_state") is not None:
            self.load_state(options["load_state"])
        elif self.start_state is not None:
            self.emulator.load_state(self.start_state)
        self.emulator.run((), int(self.np_random.integers(self.start_wait[0], self.start_wait[1], endpoint=True)))
        self.look()
        if self.game == "quest" and not self.snapshot.started:
            self.leave_title()
        self.tracker.reset(self.snapshot)
        self.places, self.cells = {self.snapshot.map}, {(self.snapshot.map, self.snapshot.x, self.snapshot.y)}
        self.potential = self.get_potential()
        self.episode, self.needs_reset = self.episode + 1, False
        if self.record_video:
            self.begin_video()
        if self.show:
            self.draw()
        return self.obs, self.get_info()

    def leave_title(self):
        """Press START on the quest's title screen; return when the controls are free."""
        self.emulator.run((), BOOT_FRAMES)
        for _ in range(10):
            self.emulator.run(("START",), 4)
            for _ in range(15):
                self.emulator.run((), 4)
                self.look()
                if self.snapshot.free:
                    return
        raise RuntimeError(f"{self.rom_path}: the title screen did not go away. Is it the quest? Build it again.")

    def step(self, action: int):
        if self.needs_reset:
            raise RuntimeError("reset() comes before the first step()")
        if not 0 <= action < len(ACTIONS):
            raise ValueError(f"the action is {action!r}, expected 0 to {len(ACTIONS) - 1}")
        self.action, low_high = int(action), self.release_range
        release = self.release_frames if low_high is None else int(self.np_random.integers(*low_high, endpoint=True))
        self.play((ACTIONS[self.action],), self.hold_frames)
        self.play((), release)
        self.total_frames += self.hold_frames + release
        self.step_count += 1
        self.look()
        new = self.tracker.update(self.snapshot)  # before the reward of the same step
        reward = self.get_reward(len(new))
        self.episode_reward += reward
        terminated = bool(self.tracker.milestones) and self.terminal_milestone in self.tracker.completed
        truncated = self.max_steps is not None and self.step_count >= self.max_steps
        return self.obs, reward, terminated, truncated, self.get_info()

    def get_reward(self, n_new: int) -> float:
        reward, game = self.step_penalty + self.milestone_reward * n_new, self.snapshot
        if game.started and game.map not in self.places:
            self.places.add(game.map)
            reward += self.location_reward
        if self.exploration_weight and game.started and (game.map, game.x, game.y) not in self.cells:
            self.cells.add((game.map, game.x, game.y))
            reward += self.exploration_weight
        if self.distance_weight:
            before, self.potential = self.potential, self.get_potential()
            reward += self.distance_weight * (self.potential - before)
        return float(reward)

    def get_potential(self) -> float:
        """Minus the cells to the exit towards the next milestone, 0 where that is not known. Only its differences are
        paid, so that no way round in a circle earns anything."""
        after = self.tracker.next if self.distance_weight else None
        return -float(distance_to(after and after.target, self.snapshot) or 0)

    def look(self):
        self.obs, self.snapshot = self.emulator.screen(), self.reader.read(*self.emulator.memory())

    def get_info(self) -> dict[str, Any]:
        return {
            "step_count": self.step_count,
            "total_frames": self.total_frames,
            "episode_reward": self.episode_reward,
            "prev_action": self.action,
            "game": self.game,
            **self.snapshot.info(),
            "milestones": self.tracker.info(),
        }

    @property
    def success(self) -> bool:
        """The terminal milestone is reached."""
        return self.terminal_milestone in self.tracker.completed

    def get_action_meanings(self) -> list[str]:
        return list(ACTIONS)

    # pictures ---------------------------------------------------------------------------------------------------------
    def play(self, buttons: tuple[str, ...], frames: int):
        """Run `frames` frames, and stop where a window or a video wants one."""
        if not (self.show or self.video):
            return self.emulator.run(buttons, frames)
        every = max(1, round(self.base_fps / 60))  # a window gets 60 pictures a second at most
        chunk = 1 if self.video else every
        for i in range(0, frames, chunk):
            n = min(chunk, frames - i)
            self.emulator.run(buttons, n)
            if self.video:
                self.video.add(self.emulator.screen, ACTIONS[self.action])
            if self.show:
                if (i + n) % every == 0 or i + n == frames:
                    self.draw()
                self.window.wait(n / self.base_fps)

    def draw(self):
        if self.window is None:
            self.window = Window(f"{self.game}: PokemonEnv")
        self.window.draw(self.emulator.screen())

    def render(self) -> np.ndarray | None:
        """The last picture in mode "rgb_array"; in "human" each step draws its own."""
        return self.obs.copy() if self.render_mode == "rgb_array" and self.obs is not None else None

    def begin_video(self):
        name = time.strftime("%Y%m%d_%H%M%S") + f"_episode_{self.episode:04d}.mp4"
        self.video = Video(self.video_dir, name, self.video_fps, self.overlay_actions)

    def end_video(self):
        if self.video:
            self.save_video() if self.auto_save_video else self.video.drop()
        self.video = None

    def save_video(self, path: str | Path | None = None) -> Path | None:
        """End this episode's video and put it at `path`, or under its own name in `video_dir`. None where none runs."""
        video, self.video = self.video, None
        return video.save(path) if video else None

    # states -----------------------------------------------------------------------------------------------------------
    def state_bytes(self) -> bytes:
        """The emulator's state as its core writes it."""
        return self.emulator.state()

    def save_state(self, path: str | Path):
        """Write the emulator's state, and beside it `<name>.json` with the ROM's SHA-1 and the core."""
        path = Path(path)
        about = {"rom_sha1": self.rom_sha1, "core": self.emulator.name, "core_version": self.emulator.version}
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, data in (
            (path.with_name(path.name + ".json"), json.dumps(about).encode()),
            (path, self.state_bytes()),
        ):
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            temporary.write_bytes(data)
            os.replace(temporary, target)

    def load_state(self, path: str | Path):
        """Put the emulator into a saved state. Raises FileNotFoundError, or ValueError for a state of another ROM or of
        a core whose version does not match; the game then goes on from where it was."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. Write it with save_state(), or leave init_state out.")
        about = path.with_name(path.name + ".json")
        if about.is_file():
            found = json.loads(about.read_text()).get("rom_sha1")
            if found != self.rom_sha1:
                raise ValueError(
                    f"{about} says that {path.name} belongs to the ROM with SHA-1 {found}, expected {self.rom_sha1} of "
                    f"{self.rom_path}. Give that ROM, or make the state again with save_state()."
                )
        before = self.emulator.state()
        try:
            self.emulator.load_state(path.read_bytes(), str(path))
        except ValueError:
            self.emulator.load_state(before)
            raise
        self.look()

    def close(self):
        """End the video, close the window, free the emulator."""
        if self.video:
            self.end_video()
        if self.window:
            self.window.close()
        if self.emulator:
            self.emulator.close()
        self.window = self.emulator = None
        self.needs_reset = True


def choose_rom(rom_path: str | Path | None) -> Path:
    """The ROM to run. Raises FileNotFoundError."""
    if rom_path is None:
        rom_path = EMERALD_ROM if EMERALD_ROM.is_file() else QUEST_ROM
        print(f"PokemonEnv: {rom_path}", file=sys.stderr)
    rom_path = Path(rom_path)
    if not rom_path.is_file():
        mend = (
            "Build it with pokemon_env/quest/build.sh, or check it out again."
            if rom_path == QUEST_ROM
            else 'Put your own ROM there or name it; without one play the quest: gym.make("pokemon_env:Quest-v0").'
        )
        raise FileNotFoundError(f"{rom_path} is missing. {mend}")
    return rom_path


def identify_rom(rom: bytes, path: Path) -> str:
    """One of quest, emerald, or other: Emerald's game code with other contents, which is warned about. Raises
    ValueError for everything else."""
    code = rom[0xAC:0xB0]
    if code == QUEST_CODE:
        return "quest"
    if code != EMERALD_CODE:
        raise ValueError(
            f"{path} ({len(rom):,} bytes) has the game code {code.decode('ascii', 'replace')!r}, expected 'BPEE' "
            "(Pokemon Emerald, US) or 'QEST' (the quest). Give another ROM."
        )
    sha1 = hashlib.sha1(rom).hexdigest()
    if sha1 == EMERALD_SHA1:
        return "emerald"
    warnings.warn(
        f"{path} has SHA-1 {sha1}, expected {EMERALD_SHA1}: another version of Emerald, or changed. What is read from "
        "its memory may be wrong.",
        stacklevel=3,
    )
    return "other"


class Window:
    """A pygame window, three times the console's size. Keys stay in pygame's queue for whoever plays."""

    def __init__(self, title: str, scale: int = 3):
        import pygame

        self.pygame, self.size = pygame, (scale * WIDTH, scale * HEIGHT)
        pygame.display.init()
        self.surface = pygame.display.set_mode(self.size)
        pygame.display.set_caption(title)
        self.due = time.perf_counter()

    def draw(self, picture: np.ndarray):
        """Show a picture, uint8 (160, 240, 3). Raises KeyboardInterrupt once the window was closed."""
        frame = self.pygame.image.frombuffer(picture.tobytes(), (WIDTH, HEIGHT), "RGB")
        self.surface.blit(self.pygame.transform.scale(frame, self.size), (0, 0))
        self.pygame.display.flip()
        self.pygame.event.pump()
        if self.pygame.event.peek(self.pygame.QUIT):
            raise KeyboardInterrupt("the window was closed")

    def wait(self, seconds: float):
        """Return `seconds` after the last wait was due; after a longer pause, start counting anew."""
        now = time.perf_counter()
        self.due = max(self.due, now - 0.1) + seconds
        time.sleep(max(0.0, self.due - now))

    def close(self):
        self.pygame.display.quit()


class Video:
    """An episode as an mp4, written while it is played: flat memory. It has its name only when it is complete."""

    def __init__(self, folder: Path, name: str, fps: float, overlay: bool, scale: int = 2):
        from common.video import VideoWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.fps, self.overlay, self.scale = folder, name, fps, overlay, scale
        self.temporary = folder / f".{name}.{os.getpid()}.tmp"
        self.writer = VideoWriter(self.temporary, fps, scale * WIDTH, scale * HEIGHT + (26 if overlay else 0))
        self.frames = 0

    def add(self, screen, button: str):
        """Another frame of the game went by; `screen()` is called where a picture is due."""
        self.frames += 1
        while self.writer.count < int(self.frames * self.fps / FPS):
            picture = screen().repeat(self.scale, 0).repeat(self.scale, 1)
            self.writer.add(self.caption(picture, button) if self.overlay else picture)

    def caption(self, picture: np.ndarray, button: str) -> np.ndarray:
        from PIL import Image, ImageDraw

        canvas = Image.new("RGB", (picture.shape[1], picture.shape[0] + 26), "black")
        canvas.paste(Image.fromarray(picture))
        draw, width = ImageDraw.Draw(canvas), picture.shape[1] // len(ACTIONS)
        for i, name in enumerate(ACTIONS):
            box = (i * width + 1, picture.shape[0] + 3, (i + 1) * width - 2, picture.shape[0] + 23)
            draw.rectangle(box, "#3fb950" if name == button else "#21262d")
            draw.text((box[0] + 3, box[1] + 4), name, "black" if name == button else "#8b949e")
        return np.asarray(canvas)

    def save(self, path: str | Path | None = None) -> Path:
        """Complete the file. A name that is taken gets a number."""
        self.writer.close()
        target = Path(path) if path else self.folder / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        n = 2
        while path is None and target.exists():
            target, n = self.folder / f"{Path(self.name).stem}_{n}.mp4", n + 1
        os.replace(self.temporary, target)
        return target

    def drop(self):
        self.writer.close()
        self.temporary.unlink(missing_ok=True)
