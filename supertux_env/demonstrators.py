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
DT = 0.025  # seconds, of an imagined step
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
TUX_SCORE, ENEMY_SCORE = 0.84, 0.79
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
        return View(x, feet, vx, vy, self.suit, self._stands(x, feet, vy), enemies, camera_x + frame.shape[1])

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
            for y in (
                (top,) if rows * TILE <= 2 * len(grey) else (top - 1, top, top + 1)
            ):  # a camera that moves up and down
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
                canvas.paste(sprite, (CANVAS_LEFT - left, CANVAS_TOP - top - 1))  # drawn one pixel higher
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
    foreseen_frames: int  # how much of that it allows for; less than its reaction and it acts late
    plans: tuple[str, ...]  # what it can think of, the first one is preferred
    horizon_s: float  # how far it thinks
    squish_worth: float  # pixels of progress it would give for a squish
    random: float  # fraction of decisions replaced by a random one


# A plan holds, frame by frame, R right, L left, J jump and right, j jump, K jump and left, _ nothing; the last one stays.
SKILLS = {
    "skilled": Skill(
        reaction_frames=2,
        foreseen_frames=2,
        plans=(
            *("R", "RRJJJR", "RRJJJJJJR", "JJJR", "JJJJJJR", "JJJ_", "JJJJJJ_", "JJJL", "JJJJJJL"),
            *("_", "__JJJR", "____JJJR", "jjj_", "L", "LLLJJJR", "LLL_", "KKKL"),
        ),
        horizon_s=1.1,
        squish_worth=600,
        random=0.02,
    ),
    "sloppy": Skill(
        reaction_frames=3,
        foreseen_frames=0,
        plans=("R", "JJJR", "JJJJJJR", "L"),
        horizon_s=0.5,
        squish_worth=0,
        random=0.04,
    ),
}
LETTERS = {"R": {RIGHT}, "L": {LEFT}, "J": {RIGHT, JUMP}, "j": {JUMP}, "K": {LEFT, JUMP}, "_": set()}
RANDOM_ACTS = (set(), {RIGHT}, {LEFT}, {RIGHT, JUMP})


def decide(
    view: View, terrain: Terrain, skill: Skill, holding: set[str], pending: list[set[str]], frame_s: float
) -> set[str]:
    """The keys to hold: the first ones of the best plan. `holding` are the keys that are down in this frame, `pending`
    the decisions that are still on their way."""
    if view.suit == "fire":
        targets = [e.x for e in view.enemies if abs(e.y) < 70 and 40 < e.x < 330]
        if targets:
            return {ACTION} | ({RIGHT} if targets[0] > 220 else set())
    foreseen = pending[: skill.foreseen_frames]
    scores = [
        imagine(view, terrain, holding, foreseen + [LETTERS[letter] for letter in plan], skill, frame_s)
        for plan in skill.plans
    ]
    best = max(range(len(scores)), key=lambda i: (round(scores[i]), -i))
    keys = LETTERS[skill.plans[best][0]]
    if view.vy > 0 and not view.on_ground and _fall_s(view, terrain) > skill.foreseen_frames * frame_s + 0.05:
        return keys - {JUMP}  # it would still be falling
    return keys


def _fall_s(view: View, terrain: Terrain) -> float:
    """Seconds until Tux comes down on what is below him now; the screen's height where there is nothing."""
    columns = terrain.solid[:, int(view.x) // TILE : int(view.x + TILE - 1) // TILE + 1].any(1)
    rows = np.flatnonzero(columns[int(view.feet) // TILE :])
    drop = (int(view.feet) // TILE + rows[0]) * TILE - view.feet if len(rows) else 480.0
    return (-view.vy + np.sqrt(view.vy**2 + 2 * GRAVITY * max(0.0, drop))) / GRAVITY


def imagine(
    view: View, terrain: Terrain, holding: set[str], keys: list[set[str]], skill: Skill, frame_s: float
) -> float:
    """Play `keys` out in the head, frame by frame. Returns pixels of progress, squishes counted in, or -1000 and less
    for a death. The speeds are the game's as measured on flat ground."""
    solid = terrain.solid
    rows, columns = solid.shape
    height = SUITS[view.suit][0]
    x, feet, vx, vy, on_ground = view.x, view.feet, view.vx, view.vy, view.on_ground
    enemies = [[e.x + view.x + TILE / 2, e.y + view.feet, e.vx] for e in view.enemies]
    held = boosted = JUMP in holding  # boosted: rising by a jump, which is cut short when the key is let go
    score, time_s = -4.0 * sum(JUMP in k for k in keys), 0.0
    end_s = skill.horizon_s + skill.foreseen_frames * frame_s

    def blocked(left: float, top_row: int, bottom_row: int) -> bool:
        c0, c1 = max(0, int(left) // TILE), min(columns - 1, int(left + TILE - 1) // TILE)
        return bool(solid[max(0, top_row) : max(0, bottom_row) + 1, c0 : c1 + 1].any())

    while time_s < end_s or (not on_ground and time_s < end_s + 1):
        now = keys[min(len(keys) - 1, int(time_s / frame_s))]
        time_s += DT
        # sideways: 100 at once, then 300 per second squared; 450 when let go, 600 against
        way = (RIGHT in now) - (LEFT in now)
        if way == 0:
            vx = 0.0 if abs(vx) < 100 else vx - np.sign(vx) * 450 * DT
        elif vx * way < -100:
            vx += way * 600 * DT
        else:
            vx = way * min(TOP_SPEED, max(100.0, abs(vx) if vx * way > 0 else 0.0) + 350 * DT)
        new_x = max(0.0, x + vx * DT)
        if blocked(new_x, int(feet - height + 4) // TILE, int(feet - 4) // TILE):
            vx = 0.0
        else:
            x = new_x
        # up and down
        jumping = JUMP in now
        if jumping and not held and on_ground:
            vy, on_ground, boosted = (-580.0 if abs(vx) > 230 else -520.0), False, True
        held = jumping
        if not on_ground or not blocked(x, int(feet) // TILE, int(feet) // TILE):
            on_ground = False
            vy += GRAVITY * DT * (3 if vy < 0 and boosted and not jumping else 1)
            new_feet = feet + vy * DT
            row = int(new_feet) // TILE
            if vy > 0 and row > int(feet - 1) // TILE and row < rows and blocked(x, row, row):
                new_feet, vy, on_ground = float(row * TILE), 0.0, True
            feet = new_feet
            if feet > rows * TILE:
                return -1000 + 100 * time_s
        # enemies
        for enemy in enemies:
            enemy[0] += enemy[2] * DT
            if abs(x + TILE / 2 - enemy[0]) < 31 and feet - height < enemy[1] and feet > enemy[1] - TILE:
                if vy > 0 and feet < enemy[1] - TILE + 18:
                    vy, boosted, score = (-520.0 if jumping else -300.0), False, score + skill.squish_worth
                    enemy[1] = np.inf
                else:
                    return -1000 + 100 * time_s
    return score + x - view.x


class Demonstrator:
    """Turns frames into held keys. `decisions` and `random_acts` count what it decided."""

    def __init__(self, name: str, terrain: Terrain, seed: int, fps: float = 10.0):
        if name not in SKILLS:
            raise ValueError(f"demonstrator {name!r} is not known, expected one of {sorted(SKILLS)}")
        self.skill, self.terrain, self.eyes, self.frame_s = SKILLS[name], terrain, Eyes(terrain), 1 / fps
        self.rng = np.random.default_rng(seed)
        self.holding: set[str] = set()
        self.pending: deque[set[str]] = deque([set()] * self.skill.reaction_frames)
        self.jumps_in_vain = 0
        self.decisions = self.random_acts = 0

    def act(self, frame: np.ndarray, position: tuple[float, float, float, float] | None) -> set[str]:
        """The keys to hold from now on, decided `reaction_frames` ago. `position` is None while Tux is dead or has won."""
        if position is None:
            self.eyes.camera = None  # a restart moves it
        self.pending.append(set() if position is None else self._decide(frame, position))
        self.holding = self.pending.popleft()
        return self.holding

    def _decide(self, frame: np.ndarray, position: tuple[float, float, float, float]) -> set[str]:
        view = self.eyes.look(frame, position)
        keys = decide(view, self.terrain, self.skill, self.holding, list(self.pending), self.frame_s)
        # a key that was already held when Tux landed does not jump: let go of it once
        self.jumps_in_vain = self.jumps_in_vain + 1 if JUMP in keys and view.on_ground else 0
        if self.jumps_in_vain > 5:
            keys, self.jumps_in_vain = keys - {JUMP}, 0
        self.decisions += 1
        if self.rng.random() < self.skill.random:
            self.random_acts += 1
            keys = RANDOM_ACTS[self.rng.integers(len(RANDOM_ACTS))]
        return set(keys)
