"""Players of Airstriker that see only the RGB screen, as a person does, and two that look at nothing.

The game: a ship at the bottom moves left and right, 15 pixels a step, and fires once per press. Formations of red
enemies and grey rocks come down, enemies fire green shots straight down; touching any of them costs a life.
All players: `reset(seed)`, then `act(frame) -> action` once a step, `frame` uint8 (224, 320, 3), action 0 to 17.
"""

from collections import deque
from collections.abc import Iterator
from itertools import count

import numpy as np
from scipy.ndimage import find_objects, label

STAY, LEFT, RIGHT = 0, 3, 4  # movements of retro_env.game.MOVEMENTS; up and down do nothing here
N_ACTIONS = 18
MIX = (  # PLAYER=SHARE of the games
    *("random=0.1", "sticky=0.1", "hesitant=0.3"),
    *("shooter:0=0.1", "shooter:0.3=0.1", "shooter:1=0.3"),
)
STATUS_ROWS = 24  # lives and score
SHIP_TOP, SHIP_HEIGHT, SHIP_WIDTH, SHIP_LEFT_MOST, SHIP_RIGHT_MOST, SHIP_SPEED = 182, 24, 22, 10, 285, 15
SHOT_SPEEDS, ENEMY_SPEEDS = (3, 15), (2, 6)  # pixels a step downwards; the game slows down where much is to draw
BULLET_SPEED = 15  # pixels a step upwards
FIRE_NEAR = 40  # pixels beside the line of an enemy from which it is fired at: better too often
MARGIN = 14  # pixels to keep clear of all that comes down: about a step, so that imitators who are a step off live


class RandomPlayer:
    """Every step another action, all 18 alike."""

    def reset(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def act(self, frame: np.ndarray) -> int:
        return int(self.rng.integers(N_ACTIONS))


class StickyPlayer(RandomPlayer):
    """Random actions, each held for 2 to 20 steps."""

    def reset(self, seed: int):
        super().reset(seed)
        self.left, self.action = 0, 0

    def act(self, frame: np.ndarray) -> int:
        if self.left == 0:
            self.left, self.action = int(self.rng.integers(2, 21)), super().act(frame)
        self.left -= 1
        return self.action


def blobs(mask: np.ndarray, least: int) -> list[tuple[int, int, int, int]]:
    """Connected patches of `mask` (H, W) with `least` pixels or more, as (top, left, bottom, right)."""
    labels, _ = label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    boxes = [(s[0].start, s[1].start, s[0].stop, s[1].stop) for s in find_objects(labels)]
    return [box for box, size in zip(boxes, sizes[1:], strict=True) if size >= least]


def find_ship(frame: np.ndarray) -> int | None:
    """The ship's left edge, None where there is no ship."""
    light = (frame[SHIP_TOP : SHIP_TOP + SHIP_HEIGHT, :, 0] == 200).sum(axis=0)  # (W,) it has 154 such pixels, a star 4
    inside = np.convolve(light, np.ones(SHIP_WIDTH, int), "valid")  # (W - 21,) in a window from x on
    return int(inside.argmax()) if inside.max() > 100 else None


def move_to_hits(lost: np.ndarray, ship: np.ndarray) -> np.ndarray:
    """Rows (N,) bool in which the game takes a life -> those in which the ship was hit: the first without a `ship`
    (N,) bool, up to 27 rows before, as "You died." comes first and the new ship may be there already."""
    moved = np.zeros_like(lost)
    for row in np.flatnonzero(lost):
        gone = row - next((back for back in range(min(3, row + 1)) if not ship[row - back]), 0)
        seen = np.flatnonzero(ship[:gone])
        moved[seen[-1] + 1 if len(seen) and not ship[gone] else row] = True
    return moved


def see(frame: np.ndarray) -> tuple[int | None, list, list, list]:
    """What the screen shows: the ship's left edge, None without a ship, and boxes of enemies, rocks and green shots."""
    ship, row = find_ship(frame), SHIP_TOP - STATUS_ROWS
    red_of, green_of, blue_of = (frame[STATUS_ROWS:, :, channel] for channel in range(3))  # the game has 12 colours
    red, grey = (red_of == 232) & (green_of == 0), (red_of == 136) & (blue_of == 136)
    if ship is not None:
        for mask in (red, grey):
            mask[row : row + SHIP_HEIGHT, ship : ship + SHIP_WIDTH] = False
    red[:, 1:-1] |= red[:, :-2] | red[:, 2:]  # joins the two wings of an enemy
    enemies = blobs(red, 80)
    for top, left, bottom, right in enemies:
        grey[max(0, top - 4) : bottom + 4, left:right] = False  # enemies have some grey too

    def shift(boxes):
        return [(top + STATUS_ROWS, left, bottom + STATUS_ROWS, right) for top, left, bottom, right in boxes]

    return ship, shift(enemies), shift(blobs(grey, 12)), shift(blobs((green_of >= 136) & (red_of == 0), 4))


class Shooter:
    """Keeps out of the way of what comes down, goes under enemies and fires at them, once for each.

    It reacts to the screen of 3 or 4 steps ago (150 to 200 ms), one of them for a whole game. `skill`, 0 to 1, decides
    how far it looks ahead, how well it aims, how long it sticks to a plan, and the share of random steps, 5 % to 0."""

    def __init__(self, skill: float = 1.0):
        if not 0 <= skill <= 1:
            raise ValueError(f"the shooter's skill is {skill}, expected 0 to 1")
        self.random_share = 0.05 * (1 - skill)
        self.look_ahead = 2 + round(5 * skill)  # steps
        self.aim_error = 14 * (1 - skill)  # pixels
        self.plan_steps = 1 + round(7 * (1 - skill))

    def reset(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.delay = int(self.rng.integers(3, 5))  # steps
        self.frames, self.moves = deque(maxlen=self.delay + 1), deque([0] * self.delay, maxlen=self.delay)
        self.bullets = []  # own, as [left edge of the ship, top in the screen it reacts to]
        self.goal, self.plan_left, self.fired = None, 0, False

    def act(self, frame: np.ndarray) -> int:
        self.frames.append(frame)
        self.bullets = [[x, y - BULLET_SPEED] for x, y in self.bullets if y > STATUS_ROWS]
        movement, fire = self.decide(*see(self.frames[0])) if len(self.frames) > self.delay else (STAY, False)
        if self.rng.random() < self.random_share:
            movement, fire = int(self.rng.integers(9)), bool(self.rng.integers(2))
        fire = fire and not self.fired  # a press counts once: let go in between
        self.fired = fire
        self.moves.append({LEFT: -SHIP_SPEED, RIGHT: SHIP_SPEED}.get(movement, 0))
        return 2 * movement + int(fire)

    def decide(self, ship: int | None, enemies: list, rocks: list, shots: list) -> tuple[int, bool]:
        """Movement and whether to fire, from what was seen `delay` steps ago."""
        if ship is None:
            self.goal, self.plan_left, self.bullets = None, 0, []
            return STAY, False
        x = ship
        for move in self.moves:  # a person knows what the own hand has done since
            x = min(max(x + move, SHIP_LEFT_MOST), SHIP_RIGHT_MOST)
        targets = self.still_standing(enemies)
        if self.plan_left == 0 or self.goal is None:
            self.goal, self.plan_left = self.choose(x, targets, enemies, rocks, shots), self.plan_steps
        self.plan_left -= 1
        movement = STAY if abs(self.goal - x) < 8 else LEFT if self.goal < x else RIGHT
        above = [(left + right - SHIP_WIDTH) / 2 for _, left, bottom, right in enemies if bottom < SHIP_TOP]
        fire = not self.fired and any(abs(place - x) < FIRE_NEAR for place in above)
        if fire:
            self.bullets.append([x, SHIP_TOP + BULLET_SPEED * self.delay])  # not on that screen yet
        return movement, fire

    def still_standing(self, enemies: list) -> list:
        """Enemies above the ship that no bullet of one's own is on the way to; a bullet takes the lowest before it."""
        targets = sorted((box for box in enemies if box[2] < SHIP_TOP), reverse=True)
        for x, y in self.bullets:
            hit = next((box for box in targets if hits(x, box) and box[0] < y), None)
            if hit:
                targets.remove(hit)
        return targets

    def choose(self, x: int, targets: list, enemies: list, rocks: list, shots: list) -> int:
        """The left edge to go to: least danger on the way and there, then nearest to the place to shoot from."""
        goals = x + SHIP_SPEED * np.arange(-19, 20)
        goals = goals[(goals >= SHIP_LEFT_MOST - 7) & (goals <= SHIP_RIGHT_MOST + 7)]  # (G,)
        steps = np.arange(1, self.look_ahead + 1)  # (S,)
        way = x + np.clip(goals[:, None] - x, -SHIP_SPEED * steps, SHIP_SPEED * steps)  # (G, S) left edges
        danger = np.zeros(len(goals))
        for boxes, (slow, fast) in ((enemies + rocks, ENEMY_SPEEDS), (shots, SHOT_SPEEDS)):
            for top, left, bottom, right in boxes:
                lowest, highest = bottom + fast * (self.delay + steps), top + slow * (self.delay + steps)  # (S,)
                here = (lowest > SHIP_TOP - MARGIN) & (highest < SHIP_TOP + SHIP_HEIGHT + MARGIN)
                beside = (way + SHIP_WIDTH + MARGIN > left) & (way - MARGIN < right)  # (G, S)
                danger += (here & beside) @ (0.9**steps)
        aim = self.rng.normal(0, self.aim_error) if self.aim_error else 0.0
        places = []
        for _, left, bottom, right in targets:
            place = (left + right - SHIP_WIDTH) / 2 + aim
            bottom += ENEMY_SPEEDS[1] * (self.delay + abs(place - x) / SHIP_SPEED)  # once we are there
            places += [place] if bottom < SHIP_TOP - 20 else []
        to = min(places, key=lambda place: abs(place - x)) if places else 148  # the middle, while nothing is there
        return int(goals[np.argmin(danger + np.abs(goals - to) / 1000 + np.abs(goals - x) / 10000)])


class Hesitant(Shooter):
    """A shooter that half of the time, for 15 to 45 steps on end, holds its fire, stays where it is, or both, whatever
    is above it. The others fire at all that they see and get out of the way of all that comes: a model of their games
    learns that enemies explode, not that shots do it, and that nothing hits a ship that stays."""

    def reset(self, seed: int):
        super().reset(seed)
        self.holds_fire = self.holds_still = False
        self.left = int(self.rng.integers(15, 46))

    def decide(self, ship: int | None, enemies: list, rocks: list, shots: list) -> tuple[int, bool]:
        self.left -= 1
        if self.left == 0:
            holds = self.holds_fire or self.holds_still
            way = 0 if holds else int(self.rng.integers(1, 4))
            self.holds_fire, self.holds_still = bool(way & 1), bool(way & 2)
            self.left = int(self.rng.integers(15, 46))
        self.fired |= self.holds_fire  # as if it had not let go yet
        movement, fire = super().decide(ship, enemies, rocks, shots)
        return STAY if self.holds_still else movement, fire


def hits(x: int, box: tuple) -> bool:
    """Whether the two bullets of a ship whose left edge is `x` hit an enemy; both fly straight up."""
    _, left, _, right = box
    return x + 7 > left and x + 3 < right or x + 19 > left and x + 15 < right


PLAYERS = {"random": RandomPlayer, "sticky": StickyPlayer, "hesitant": Hesitant, "shooter": Shooter}


def make_player(name: str):
    """One of PLAYERS or `shooter:SKILL`, SKILL 0 to 1. Raises ValueError for another name."""
    kind, _, skill = name.partition(":")
    if kind == "shooter":
        try:
            return Shooter(float(skill or 1))
        except ValueError:
            pass
    elif not skill and kind in PLAYERS:
        return PLAYERS[kind]()
    raise ValueError(f"the player {name!r}: expected {', '.join(PLAYERS)} or shooter:SKILL with a skill of 0 to 1")


def read_mix(mix: tuple[str, ...]) -> dict[str, float]:
    """PLAYER=SHARE words as a table. Raises ValueError for a word that is none, or where shares do not sum to 1."""
    shares = {}
    for word in mix:
        name, _, share = word.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"--players {word}: expected PLAYER=SHARE, such as shooter:0.6=0.25") from None
        make_player(name)
    if not all(share > 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"--players {' '.join(mix)}: expected shares above 0 that sum to 1")
    return shares


def spread(shares: dict[str, float]) -> Iterator[str]:
    """Who plays the first game, the second and so on without end: each the player who is furthest behind its share."""
    counts = dict.fromkeys(shares, 0)
    for n in count(1):
        behind = max(shares, key=lambda name: shares[name] * n - counts[name])
        counts[behind] += 1
        yield behind
