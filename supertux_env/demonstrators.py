"""Scripted players that see what a person sees: `skilled` and `sloppy`.

Their keys can be learnt from pixels because they are a function of what is on the screen. Once per recorded frame
`Eyes.look` finds Tux and the enemies in the picture; Tux's position and speed come from the level's truth, the terrain
from the columns inside the window. `decide` turns that view into held keys, and `Demonstrator` hands a decision out
only `reaction_frames` later, as a person would.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps

from common.template_matching import load_sprites, score_maps
from supertux_env.launch import DATA_DIR
from supertux_env.levels import TILE, Terrain

RIGHT, LEFT, JUMP, ACTION = KEYS = ("KEY_RIGHT", "KEY_LEFT", "KEY_SPACE", "KEY_LEFTCTRL")
GRAVITY = 1000.0  # pixels per second squared, measured, as are the speeds below
STEP = 0.015  # seconds
WALK = 80.0  # an enemy's speed
TOP_SPEED = 320.0

WALKERS = {  # picture files and the place of the 32x32 hit box in them, looking left; mirrored they look right
    "snowball": ([f"snowball/snowball-{i}.png" for i in range(8)], 5, 8),
    "smartball": ([f"snowball/smartball-{i}.png" for i in range(8)], 5, 12),
    "iceblock": ([f"mr_iceblock/iceblock-{i}.png" for i in range(0, 8, 2)], 5, 8),
    "bomb": ([f"mr_bomb/bomb{i}.png" for i in range(1, 9, 2)], 5, 8),
}
POSES = ["stand-0", "jump-0", "skid-0", "kick-0", *(f"walk-{i}" for i in range(8))]
CANVAS, CANVAS_LEFT, CANVAS_TOP = 48, 8, 12  # a square around a walker's hit box, and where the hit box lies in it
TUX_SCORE, ENEMY_SCORE = 0.84, 0.84
SUITS = {"small": (32, 8, 16), "big": (64, 16, 14), "fire": (64, 16, 14)}  # height, hit box in the sprite: left, top


@dataclass
class Enemy:
    kind: str
    x: float  # pixels from the middle of Tux to its middle, to the right
    y: float  # pixels from Tux's feet to its feet, downwards
    vx: float  # pixels per second, by the way it looks


@dataclass
class View:
    """What one frame shows. Lengths in pixels, speeds in pixels per second, y downwards."""

    x: float  # of Tux's left edge, in the level
    feet: float  # of Tux's lower edge, in the level
    vx: float
    vy: float
    suit: str  # small | big | fire
    on_ground: bool
    enemies: list[Enemy]
    right_edge: float  # last visible pixel column, in the level


class Eyes:
    """Finds Tux and the enemies in frames (H, W, 3) by masked template matching at half size."""

    def __init__(self, terrain: Terrain):
        self.terrain = terrain
        creatures = DATA_DIR / "images/creatures"
        self.tux = {
            suit: load_sprites([creatures / f"tux/{suit}/{pose}.png" for pose in POSES], 0.5, True) for suit in SUITS
        }
        self.walkers = _walkers()
        self.suit = "small"
        self.tux_xy = (0.0, 0.0)  # his hit box on the screen, pixels
        self.camera: tuple[float, float] | None = None  # place of the screen's top left corner in the level

    def look(self, frame: np.ndarray, position: tuple[float, float, float, float]) -> View:
        """A view of `frame`, uint8 (H, W, 3), taken when Tux was at `position` (x, y, vx, vy)."""
        x, y, vx, vy = position
        x, y = x + vx * STEP, y + vy * STEP  # the level prints where Tux was before the step that is drawn
        grey = _half_grey(frame)  # (H/2, W/2)
        self._find_camera(grey, x, y)
        height = SUITS[self.suit][0]
        feet = y + height
        camera_x, camera_y = self.camera
        enemies = self._find_enemies(grey, x, feet)
        return View(
            x, feet, vx, vy, self.suit, self._stands(x, feet, vy), enemies, camera_x + frame.shape[1]
        )

    def _find_camera(self, grey: np.ndarray, x: float, y: float):
        """Where the camera is, from where Tux is drawn: around his last place on the screen, at first everywhere."""
        H, W = grey.shape
        y0, y1, x0, x1 = 0, H, 0, W
        if self.camera is not None:
            left, top = int(self.tux_xy[0]) // 2, int(y - self.camera[1]) // 2
            y0, x0 = int(np.clip(top - 20, 0, H - 72)), int(np.clip(left - 28, 0, W - 72))
            y1, x1 = y0 + 72, x0 + 72
        best = (-1.0, "small", 0, 0)
        for suit in sorted(SUITS, key=lambda suit: suit != self.suit):  # the last one first
            for scores in score_maps(torch.from_numpy(grey[y0:y1, x0:x1].copy())[None], self.tux[suit]):
                index, width = int(scores.argmax()), scores.shape[2]
                score = float(scores.view(-1)[index])
                if score > best[0]:
                    best = (score, suit, y0 + index // width, x0 + index % width)
            if best[0] > TUX_SCORE:
                break
        if best[0] > TUX_SCORE or self.camera is None:
            self.suit = best[1]
            _, left, top = SUITS[self.suit]
            self.tux_xy = (2 * best[3] + left, 2 * best[2] + top)
        limits = TILE * np.array(self.terrain.solid.shape[::-1]) - (2 * W, 2 * H)  # the camera stays inside the level
        camera_x, camera_y = np.clip((x - self.tux_xy[0], y - self.tux_xy[1]), 0, limits)
        self.camera = (float(camera_x), float(camera_y))

    def _find_enemies(self, grey: np.ndarray, x: float, feet: float) -> list[Enemy]:
        """Walkers on the screen that stand on a surface up to four tiles above or below Tux's feet."""
        kinds, templates, masks = self.walkers
        camera_x, camera_y = self.camera
        rows, columns = self.terrain.solid.shape
        surface = self.terrain.solid & ~np.vstack([np.zeros((1, columns), bool), self.terrain.solid[:-1]])
        lefts = np.arange(grey.shape[1] - CANVAS // 2 + 1)  # of the search window, in half pixels
        under = np.clip((camera_x + 2 * lefts + CANVAS / 2) // TILE, 0, columns - 1).astype(int)
        found = []
        for row in range(max(1, round(feet / TILE) - 4), min(rows, round(feet / TILE) + 5)):
            top = round((row * TILE - 32 - CANVAS_TOP - camera_y) / 2)
            places = lefts[surface[row, under]]
            for y in (top - 1, top, top + 1):
                if len(places) == 0 or y < 0 or y + CANVAS // 2 > len(grey):
                    continue
                strip = np.lib.stride_tricks.sliding_window_view(grey[y : y + CANVAS // 2], CANVAS // 2, axis=1)
                windows = strip[:, places].transpose(1, 0, 2).reshape(len(places), -1)  # (P, pixels)
                scores = _masked_scores(windows, templates, masks)  # (P, T)
                for p, t in np.argwhere(scores > ENEMY_SCORE):
                    left = camera_x + 2 * places[p] + CANVAS_LEFT
                    found.append((scores[p, t], kinds[t], left - x, row * TILE - feet))
        enemies = []
        for _, (kind, facing), dx, dy in sorted(found, reverse=True, key=lambda f: f[0]):
            if all(abs(dx - e.x) > 20 or dy != e.y for e in enemies):
                enemies.append(Enemy(kind, dx, dy, facing * WALK))
        return sorted(enemies, key=lambda e: e.x)

    def _stands(self, x: float, feet: float, vy: float) -> bool:
        row, columns = round(feet / TILE), {int(x // TILE), int((x + 31) // TILE)}
        solid = self.terrain.solid
        return abs(vy) < 1 and 0 < row < len(solid) and any(solid[row, c] for c in columns if 0 <= c < solid.shape[1])


def _half_grey(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (H/2, W/2), BT.601, each pixel the mean of four."""
    frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2].astype(np.uint16)
    sums = frame[::2, ::2] + frame[::2, 1::2] + frame[1::2, ::2] + frame[1::2, 1::2]
    return sums.astype(np.float32) @ np.array([0.299 / 4, 0.587 / 4, 0.114 / 4], np.float32)


def _walkers() -> tuple[list[tuple[str, int]], torch.Tensor, torch.Tensor]:
    """T templates on a canvas around the hit box: (kind, facing) each, zero-mean unit-norm greys (T, pixels) and masks.

    Halved twice, on even and on odd columns: half a pixel of misfit costs a tenth of the score.
    """
    kinds, templates, masks = [], [], []
    for kind, (paths, left, top) in WALKERS.items():
        for path in paths:
            with Image.open(DATA_DIR / "images/creatures" / path) as image:
                sprite = image.convert("RGBA")
            for facing, odd in ((-1, 0), (-1, 1), (1, 0), (1, 1)):
                canvas = Image.new("RGBA", (CANVAS, CANVAS))
                canvas.paste(sprite, (CANVAS_LEFT - left, CANVAS_TOP - top))
                if facing == 1:  # mirrored about the middle of the hit box, which is the canvas's middle
                    canvas = ImageOps.mirror(canvas)
                canvas = ImageChops.offset(canvas, odd, 0)
                rgba = np.asarray(canvas, np.float32).reshape(CANVAS // 2, 2, CANVAS // 2, 2, 4)
                alpha = rgba[..., 3:] / 255
                weight = alpha.sum((1, 3))
                grey = (rgba[..., :3] * alpha).sum((1, 3)) / np.maximum(weight, 1e-3) @ (0.299, 0.587, 0.114)
                mask = weight[..., 0] > 3.5  # all four pixels are opaque
                centred = np.where(mask, grey - grey[mask].mean(), 0)
                kinds.append((kind, facing))
                templates.append(centred.ravel() / np.linalg.norm(centred))
                masks.append(mask.ravel())
    return kinds, *(torch.from_numpy(np.array(a, np.float32)) for a in (templates, masks))


def _masked_scores(windows: np.ndarray, templates: torch.Tensor, masks: torch.Tensor) -> np.ndarray:
    """Masked zero-mean correlation of windows (P, pixels) with templates (T, pixels): (P, T) in -1..1."""
    windows = torch.from_numpy(windows / 255 - 0.5)
    n = masks.sum(1)
    mean = windows @ masks.T / n
    deviation = (windows**2 @ masks.T - n * mean**2).clamp_min(1e-4).sqrt()
    return (windows @ templates.T / deviation).numpy()


@dataclass(frozen=True)
class Skill:
    """How well a demonstrator plays."""

    reaction_frames: int  # from seeing to acting
    foresight_s: float  # how far ahead of the picture it thinks; less than its reaction time and it acts late
    pit_margin: float  # pixels between its front and the edge when it jumps
    enemy_margin: float  # pixels between the middles when it jumps
    careful: bool  # slows down before an enemy, shoots, and steers in the air
    random: float  # fraction of decisions replaced by a random one


SKILLS = {
    "skilled": Skill(reaction_frames=2, foresight_s=0.2, pit_margin=48, enemy_margin=130, careful=True, random=0.02),
    "sloppy": Skill(reaction_frames=3, foresight_s=0.1, pit_margin=52, enemy_margin=170, careful=False, random=0.04),
}
RANDOM_ACTS = (set(), {RIGHT}, {LEFT}, {RIGHT, JUMP})


def decide(view: View, terrain: Terrain, skill: Skill) -> set[str]:
    """The keys to hold, as a function of what is visible."""
    if view.on_ground:
        return _on_ground(view, terrain, skill)
    return _in_air(view, terrain, skill)


def _on_ground(view: View, terrain: Terrain, skill: Skill) -> set[str]:
    front = view.x + TILE + view.vx * skill.foresight_s
    pit, wall = _obstacles(view, terrain)
    if pit - front < skill.pit_margin or wall - front < 70:
        return {RIGHT, JUMP}
    threat = _threat(view, min(pit, wall), skill)
    if threat is None:
        return {RIGHT}
    distance = threat.x + (threat.vx - view.vx) * skill.foresight_s
    shoots = view.suit == "fire" and (threat.kind == "smartball" or not skill.careful)
    if shoots and 40 < distance < 300:
        return {ACTION} | ({RIGHT} if distance > 200 else set())
    if distance < 40 and skill.careful:
        return {LEFT, JUMP}
    if distance < skill.enemy_margin:
        return {RIGHT, JUMP}
    if distance < skill.enemy_margin + 100 and skill.careful:
        return {LEFT} if view.vx > 120 else set()
    return {RIGHT}


def _in_air(view: View, terrain: Terrain, skill: Skill) -> set[str]:
    rising = view.vy < -100
    pit, wall = _obstacles(view, terrain)
    keys = {RIGHT}
    if rising and (wall - view.x - TILE < 100 or _lands_in_pit(view, terrain)):
        return {RIGHT, JUMP}
    if not skill.careful:
        return keys
    misses = []  # how far past an enemy's middle Tux comes down, in pixels
    for enemy in view.enemies:
        drop = enemy.y - 26  # to its head
        if drop > 0 and enemy.x > -40:
            fall_s = (-view.vy + np.sqrt(view.vy**2 + 2 * GRAVITY * drop)) / GRAVITY
            misses.append((view.vx - enemy.vx) * fall_s - enemy.x)
    miss = min(misses, key=abs, default=None)
    if miss is None or not -220 < miss < 160 or _lands_in_pit(view, terrain):
        return keys
    if -80 < miss < -20 and view.vx < 250:
        return keys  # it can still reach the enemy
    return {LEFT} if miss > 20 or miss < -20 else set()  # else rather come down well before it


def _obstacles(view: View, terrain: Terrain) -> tuple[float, float]:
    """Where the next pit and the next wall begin, pixels in the level; infinity where none is visible."""
    solid, row = terrain.solid, round(view.feet / TILE)
    rows, columns = solid.shape
    body = slice(max(0, row - (1 if view.suit == "small" else 2)), max(0, row))
    pit = wall = np.inf
    for column in range(int((view.x + TILE - 1) // TILE), min(columns, int(view.right_edge // TILE) + 1)):
        if pit == np.inf and not solid[max(0, row - 3) :, column].any():
            pit = column * TILE
        if column * TILE >= view.x + TILE - 2 and solid[body, column].any():
            wall = column * TILE
            break
    return pit, wall


def _lands_in_pit(view: View, terrain: Terrain) -> bool:
    """Whether Tux, let go now, comes down where no ground is."""
    solid = terrain.solid
    column = int(view.x // TILE)
    below = solid[:, np.clip([column, column + 1], 0, solid.shape[1] - 1)].any(1)
    row = int(np.argmax(below)) if below.any() else len(solid)
    drop = max(0.0, row * TILE - view.feet) if below.any() else 64.0
    fall_s = (-view.vy + np.sqrt(view.vy**2 + 2 * GRAVITY * drop)) / GRAVITY
    left = view.x + view.vx * fall_s
    landing = np.clip([int(left // TILE), int((left + TILE - 1) // TILE)], 0, solid.shape[1] - 1)
    return not solid[:, landing].any()


def _threat(view: View, flat_until: float, skill: Skill) -> Enemy | None:
    """The nearest enemy ahead on the stretch Tux stands on."""
    ahead = [e for e in view.enemies if abs(e.y) < 20 and -10 < e.x and view.x + e.x < flat_until]
    return ahead[0] if ahead else None


class Demonstrator:
    """Turns frames into held keys. `decisions` and `random_acts` count what it decided."""

    def __init__(self, name: str, terrain: Terrain, seed: int):
        if name not in SKILLS:
            raise ValueError(f"demonstrator {name!r} is not known, expected one of {sorted(SKILLS)}")
        self.skill, self.terrain, self.eyes = SKILLS[name], terrain, Eyes(terrain)
        self.rng = np.random.default_rng(seed)
        self.waiting: deque[set[str]] = deque([set()] * self.skill.reaction_frames)
        self.jumps_in_vain = 0
        self.decisions = self.random_acts = 0

    def act(self, frame: np.ndarray, position: tuple[float, float, float, float] | None) -> set[str]:
        """The keys to hold from now on, decided `reaction_frames` ago. `position` is None while Tux is dead or won."""
        if position is None:
            self.eyes.camera = None  # a restart moves it
        self.waiting.append(set() if position is None else self._decide(frame, position))
        return self.waiting.popleft()

    def _decide(self, frame: np.ndarray, position: tuple[float, float, float, float]) -> set[str]:
        view = self.eyes.look(frame, position)
        keys = decide(view, self.terrain, self.skill)
        # a key that was already held when Tux landed does not jump: let go of it once
        self.jumps_in_vain = self.jumps_in_vain + 1 if JUMP in keys and view.on_ground else 0
        if self.jumps_in_vain > 5:
            keys, self.jumps_in_vain = keys - {JUMP}, 0
        self.decisions += 1
        if self.rng.random() < self.skill.random:
            self.random_acts += 1
            keys = RANDOM_ACTS[self.rng.integers(len(RANDOM_ACTS))]
        return set(keys)
