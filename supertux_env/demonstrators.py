"""Scripted players that see what a person sees: `skilled` and `sloppy`.

Their keys can be learnt from pixels because they are a function of what is on the screen. Once per recorded frame
`Eyes.look` finds Tux and the enemies in the picture; Tux's position and speed come from the level's truth, the terrain
from the columns inside the window. `choose` is a short list of rules, and `Demonstrator` hands a decision out only
`reaction_frames` later, as a person would.
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
GRAVITY = 1000.0  # pixels per second squared, measured
STEP = 0.015  # seconds
BRAKE = 1000.0  # pixels per second squared; the true 650 would have him turn round, keys are up to 0.1 s late
JUMP_S = 0.95  # from the ground to an enemy's head, with the key held
WALK = 80.0  # an enemy's speed in pixels per second

WALKERS = [  # pictures of the walks, looking left, and the place of the 32x32 hit box in them
    ([f"snowball/snowball-{i}.png" for i in range(8)], 5, 8),
    ([f"snowball/smartball-{i}.png" for i in range(8)], 5, 12),
    ([f"mr_iceblock/iceblock-{i}.png" for i in range(0, 8, 2)], 5, 8),
    ([f"mr_bomb/bomb{i}.png" for i in range(1, 9, 2)], 5, 10),
]
POSES = ["stand-0", "jump-0", "skid-0", "kick-0", *(f"walk-{i}" for i in range(8))]
CANVAS, CANVAS_LEFT, CANVAS_TOP = 48, 8, 12  # a square around a walker's hit box, and where the hit box lies in it
TUX_SCORE, ENEMY_SCORE = 0.84, 0.79
SUITS = {"small": (32, 8, 16), "big": (64, 16, 14), "fire": (64, 16, 14)}  # height, hit box in the sprite: left, top


@dataclass
class Enemy:
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
        self.seen = False  # he was found in the last picture
        self.camera: tuple[float, float] | None = None  # place of the screen's top left corner in the level

    def look(self, frame: np.ndarray, position: tuple[float, float, float, float]) -> View:
        """A view of `frame`, uint8 (H, W, 3) of the window, taken when Tux was at `position` (x, y, vx, vy)."""
        frame = as_drawn(frame)
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
        """Where the camera is, from where Tux is drawn: around his last place on the screen; at first, and after a
        picture in which he was not found, everywhere."""
        H, W = grey.shape
        if self.camera is not None and y + SUITS[self.suit][0] > TILE * len(self.terrain.solid):
            self.seen = False  # he falls out of the level: to look everywhere would cost half a second of frames
            return
        y0, y1, x0, x1 = 0, H, 0, W
        if self.camera is not None and self.seen:
            left, top = int(self.tux_xy[0]) // 2, int(y - self.camera[1]) // 2
            y0, x0 = int(np.clip(top - 20, 0, H - 72)), int(np.clip(left - 28, 0, W - 72))
            y1, x1 = y0 + 72, x0 + 72
        best = (-1.0, "small", 0, 0)
        window = torch.from_numpy(grey[y0:y1, x0:x1].copy())[None]  # (1, h, w)
        groups = [("small",), ("big", "fire")]  # big and fire differ by the hat alone: match both
        for suits in sorted(groups, key=lambda suits: self.suit not in suits):
            for suit, scores in ((name, scores) for name in suits for scores in score_maps(window, self.tux[name])):
                index, width = int(scores.argmax()), scores.shape[2]
                score = float(scores.view(-1)[index])
                if score > best[0]:
                    best = (score, suit, y0 + index // width, x0 + index % width)
            if best[0] > TUX_SCORE:
                break
        self.seen = best[0] > TUX_SCORE
        if self.seen or self.camera is None:
            self.suit = best[1]
            _, left, top = SUITS[self.suit]
            self.tux_xy = (2 * best[3] + left, 2 * best[2] + top)
        limits = TILE * np.array(self.terrain.solid.shape[::-1]) - (2 * W, 2 * H)  # the camera stays inside the level
        limits = np.where(limits < 0, limits / 2, limits)  # one smaller than the screen lies in its middle
        camera_x, camera_y = np.clip((x - self.tux_xy[0], y - self.tux_xy[1]), np.minimum(0, limits), limits)
        self.camera = (float(camera_x), float(camera_y))

    def _find_enemies(self, grey: np.ndarray, x: float, feet: float) -> list[Enemy]:
        """Walkers on the screen that stand on a surface up to four tiles above or below Tux's feet."""
        facings, templates, masks = self.walkers
        camera_x, camera_y = self.camera
        rows, columns = self.terrain.solid.shape
        surface = self.terrain.solid & ~np.vstack([np.zeros((1, columns), bool), self.terrain.solid[:-1]])
        lefts = np.arange(grey.shape[1] - CANVAS // 2 + 1)  # of the search window, in half pixels
        under = np.clip((camera_x + 2 * lefts + CANVAS / 2) // TILE, 0, columns - 1).astype(int)
        found = []
        for row in range(max(1, round(feet / TILE) - 4), min(rows, round(feet / TILE) + 5)):
            top = round((row * TILE - 32 - CANVAS_TOP - camera_y) / 2)
            places = lefts[surface[row, under]]
            slack = int(rows * TILE > 2 * len(grey))  # half pixels, where the camera moves up and down
            for y in range(top - slack, top + slack + 1):
                if len(places) == 0 or y < 0 or y + CANVAS // 2 > len(grey):
                    continue
                strip = np.lib.stride_tricks.sliding_window_view(grey[y : y + CANVAS // 2], CANVAS // 2, axis=1)
                windows = strip[:, places].transpose(1, 0, 2).reshape(len(places), -1)  # (P, pixels)
                scores = _masked_scores(windows, templates, masks)  # (P, T)
                for p, t in np.argwhere(scores > ENEMY_SCORE):
                    left = camera_x + 2 * places[p] + CANVAS_LEFT
                    found.append((scores[p, t], left - x, row * TILE - feet, facings[t] * WALK))
        enemies = []
        for _, dx, dy, vx in sorted(found, reverse=True):  # of what overlaps, the best
            if all(abs(dx - e.x) > 20 or dy != e.y for e in enemies):
                enemies.append(Enemy(dx, dy, vx))
        return sorted(enemies, key=lambda e: e.x)

    def _stands(self, x: float, feet: float, vy: float) -> bool:
        row, columns = round(feet / TILE), {int(x // TILE), int((x + 31) // TILE)}
        solid = self.terrain.solid
        return abs(vy) < 1 and 0 < row < len(solid) and any(solid[row, c] for c in columns if 0 <= c < solid.shape[1])


def as_drawn(frame: np.ndarray) -> np.ndarray:
    """The game draws 640x480 to 1368x800 pixels and scales them to smaller or larger windows: uint8 (H, W, 3) of any
    window -> the size as drawn."""
    H, W = frame.shape[:2]
    scale = max(W / 1368, H / 800, min(1.0, W / 640, H / 480))
    if scale == 1:
        return frame
    return np.asarray(Image.fromarray(frame).resize((round(W / scale), round(H / scale)), Image.Resampling.BILINEAR))


def _half_grey(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (H/2, W/2), BT.601, each pixel the mean of four."""
    frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2].astype(np.uint16)
    sums = frame[::2, ::2] + frame[::2, 1::2] + frame[1::2, ::2] + frame[1::2, 1::2]
    return sums.astype(np.float32) @ np.array([0.299 / 4, 0.587 / 4, 0.114 / 4], np.float32)


def _walkers() -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """T templates on a canvas around the hit box: the way each looks (1 right, -1 left), zero-mean unit-norm greys
    (T, pixels) and masks (T, pixels).

    Halved twice, on even and on odd columns: half a pixel of misfit costs a tenth of the score.
    """
    facings, templates, masks = [], [], []
    for paths, left, top in WALKERS:
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
                facings.append(facing)
                templates.append(centred.ravel() / np.linalg.norm(centred))
                masks.append(mask.ravel())
    return facings, *(torch.from_numpy(np.array(a, np.float32)) for a in (templates, masks))


def _masked_scores(windows: np.ndarray, templates: torch.Tensor, masks: torch.Tensor) -> np.ndarray:
    """Masked zero-mean correlation of windows (P, pixels) with templates (T, pixels): (P, T) in -1..1."""
    windows = torch.from_numpy(windows / 255 - 0.5)
    n = masks.sum(1)
    mean = windows @ masks.T / n
    deviation = (windows**2 @ masks.T - n * mean**2).clamp_min(1e-4).sqrt()
    return (windows @ templates.T / deviation).numpy()


@dataclass(frozen=True)
class Skill:
    """How well a demonstrator plays: both follow the same rules, the sloppy one misjudges its own delay."""

    reaction_frames: int  # from seeing to acting
    foresight_s: float  # the delay it allows for; the true one, until a key shows on the screen, is 0.27 s
    random: float  # fraction of decisions replaced by a random one


SKILLS = {"skilled": Skill(2, 0.27, 0.02), "sloppy": Skill(2, 0.08, 0.03)}
RANDOM_ACTS = (set(), {RIGHT}, {LEFT}, {RIGHT, JUMP})
FAR = 1e9


def choose(view: View, terrain: Terrain, skill: Skill) -> set[str]:
    """The keys to hold: the first rule that fits what is on the screen. Distances in pixels, from Tux's front."""
    solid, delay = terrain.solid, skill.foresight_s
    rows, columns = solid.shape
    row = min(rows - 1, int(view.feet + 2) // TILE)  # of what is under his feet
    last = min(columns, int(view.right_edge) // TILE)  # what lies beyond cannot be seen

    def ahead(x: float, there) -> float:
        """Distance from x to the first visible column to its right where `there(column)`."""
        return next((c * TILE - x for c in range(max(0, int(x) // TILE), last) if there(c)), FAR)

    def is_pit(column: int) -> bool:
        return not solid[row:, column].any()

    x = view.x + view.vx * delay  # where he will be when the keys go down
    pit = ahead(x + TILE, is_pit)
    wall = ahead(x + TILE, lambda column: solid[max(0, row - 1), column])
    near = [e for e in view.enemies if abs(e.y) < 60 and e.x > -20]
    enemy = min(near, key=lambda e: e.x, default=Enemy(FAR, 0.0, -WALK))
    gap = enemy.x - TILE  # as it is seen, now

    if view.suit == "fire" and 30 < gap < 400:
        return {ACTION, RIGHT} if gap > 200 else {ACTION}
    if view.on_ground:
        if pit < min(50, gap) or wall < min(64, gap):
            return {RIGHT, JUMP}
        if enemy.vx > 0:  # it walks away: run after it
            return {RIGHT, JUMP} if gap < max(40, (JUMP_S + delay) * (view.vx - WALK) - TILE) else {RIGHT}
        if gap < 55 + (WALK + 1.3 * max(0, view.vx - 100)) * delay:
            return {JUMP}  # straight up: it walks to where he comes down; over it, where he is too fast to stop
        if gap < min(200 + (WALK + view.vx) * delay, pit, wall):
            return {LEFT} if view.vx > BRAKE * delay else set()  # stop, then let it come
        return {RIGHT}
    below = solid[row:, max(0, int(x + TILE / 2) // TILE)]
    if not below.any() or (view.vy < 0 and (pit < min(96, gap) or wall < min(110, gap))):
        return {RIGHT, JUMP} if view.vy < 0 else {RIGHT}

    # in the air over ground: steer by the place where he will come down
    drop = max(0.0, (row + int(np.flatnonzero(below)[0])) * TILE - view.feet)
    fall_s = (-view.vy + np.sqrt(view.vy**2 + 2 * GRAVITY * drop)) / GRAVITY
    landing = view.x + view.vx * fall_s
    for e in view.enemies:
        miss = view.x + e.x + e.vx * fall_s - landing  # from Tux to the enemy, then
        if e.y > -60 and -160 < miss < 110:
            if view.vy < 0:
                return {JUMP}
            return {LEFT} if abs(miss) > 40 else set()  # back onto it, or back off from it
    return {LEFT} if ahead(landing + TILE, is_pit) < 90 else {RIGHT}


class Demonstrator:
    """Turns frames into held keys. `decisions` and `random_acts` count what it decided."""

    def __init__(self, name: str, terrain: Terrain, seed: int):
        if name not in SKILLS:
            raise ValueError(f"demonstrator {name!r} is not known, expected one of {sorted(SKILLS)}")
        self.skill, self.terrain, self.eyes = SKILLS[name], terrain, Eyes(terrain)
        self.rng = np.random.default_rng(seed)
        self.pending: deque[set[str]] = deque([set()] * self.skill.reaction_frames)
        self.jumps_in_vain = 0
        self.decisions = self.random_acts = 0

    def due(self) -> set[str]:
        """The keys to hold from this frame on, decided `reaction_frames` ago. Call it before `decide`."""
        return self.pending[0]

    def decide(self, frame: np.ndarray, position: tuple[float, float, float, float] | None):
        """Decide on `frame`, uint8 (H, W, 3), with Tux at `position`; None while he is dead or has won."""
        keys: set[str] = set()
        if position is None:
            self.eyes.camera = None  # a restart moves it
        else:
            view = self.eyes.look(frame, position)
            keys = choose(view, self.terrain, self.skill)
            # a key that was already held when Tux landed does not jump: let go of it once
            self.jumps_in_vain = self.jumps_in_vain + 1 if JUMP in keys and view.on_ground else 0
            if self.jumps_in_vain > 5:
                keys, self.jumps_in_vain = keys - {JUMP}, 0
            self.decisions += 1
            if self.rng.random() < self.skill.random:
                self.random_acts += 1
                keys = RANDOM_ACTS[self.rng.integers(len(RANDOM_ACTS))]
        self.pending.popleft()
        self.pending.append(keys)
