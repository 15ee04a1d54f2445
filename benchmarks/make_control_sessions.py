"""Recordings of simulated persons for controls_transformer.py, and the best score that can be reached on them.

    python benchmarks/make_control_sessions.py                      ten sessions of two minutes in recordings/
    python benchmarks/make_control_sessions.py --score recordings --heldout session_009 session_010

A person intends controls; the body follows after a delay, with the person's own proportions, amplitudes and habits; a
tracker sees the body with noise and sometimes loses a hand. Written are the keys of the v2 format, the name of the
person, and what a filter with the true parameters needs (`intent_*`). Everything follows from the seed. What the
persons do, and how the best score is found, is in docs/controls_transformer.md.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.signal import lfilter
from scipy.spatial.transform import Rotation

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from motion_controls.metrics import control_metrics, optimize_thresholds  # noqa: E402


@dataclass
class Args:
    output: Path = Path("recordings")
    """folder that receives session_001.npz and so on"""
    sessions: int = 10
    """how many, at least 1"""
    minutes: float = 2.0
    """length of each, at least 0.25"""
    seed: int = 1
    """of everything: persons, habits, what they do, noise"""
    persons: int = 10
    """how many people take turns, at least 1"""
    overwrite: bool = False
    """replace sessions that are in `output`; without it none may be there"""
    score: Path | None = None
    """write nothing; score the sessions of this folder instead"""
    heldout: tuple[str, ...] = ()
    """names of the sessions to score, such as session_009; empty means all"""
    results: Path | None = None
    """JSON file that also receives the scores"""


# Axes: N frames at 30 a second, S steps at 120 a second, D degrees of freedom of the body, 225 = 33 * 3 + 2 * 21 * 3
FPS, TICKS, STEPS = 30, 20, 120  # camera, game, simulation; a second
ACTIONS = (*range(9), 11, 12, 13)  # columns of the controls, see docs/controls_transformer.md
FORWARD, BACKWARD, LEFT, RIGHT, SPRINT, SNEAK, JUMP, ATTACK, USE, DROP, SWAP, OPEN = ACTIONS
LOOK, HOTBAR, CURSOR, CLICKS = slice(9, 11), slice(14, 23), slice(23, 25), slice(25, 28)
STRENGTH = 0.1  # deviation of how strongly a gesture is made, which is 1 on average
HELD = 4  # frames that the tracker goes on showing a lost hand
SWAY_KEPT = 0.9  # correlation of a person's sway from one frame to the next
JITTER_KEPT = 0.8  # the same for the slow part of the tracker's noise

# A limb is two directions, (outwards, down, towards the back) for upper and for lower part; the right side is mirrored.
REST = {
    "left_arm": ((0.25, 0.95, -0.1), (0.0, -0.3, -0.9)),
    "right_arm": ((0.25, 0.95, -0.1), (0.0, -0.3, -0.9)),
    "left_leg": ((0.1, 1.0, -0.05), (0.05, 1.0, 0.05)),
    "right_leg": ((0.1, 1.0, -0.05), (0.05, 1.0, 0.05)),
    "torso": (0.0, 0.0, 0.0),  # degrees: forwards, to the left, turned
    "head": (0.0, 0.0),  # degrees: down, to the right
}
MOVES = {  # degree of freedom -> the posture at 1
    "lean_front": {"torso": (13.0, 0.0, 0.0)},
    "lean_side": {"torso": (0.0, 11.0, 0.0)},
    "look_side": {"torso": (0.0, 0.0, 22.0), "head": (0.0, 20.0)},
    "look_down": {"head": (35.0, 0.0)},
    "crouch": {
        "left_leg": ((0.4, 0.5, -0.75), (0.0, 0.9, 0.4)),
        "right_leg": ((0.4, 0.5, -0.75), (0.0, 0.9, 0.4)),
    },
    "knee_left": {"left_leg": ((0.1, 0.5, -0.85), (0.0, 1.0, 0.1))},
    "knee_right": {"right_leg": ((0.1, 0.5, -0.85), (0.0, 1.0, 0.1))},
    "heels_up": {"left_leg": ((0.1, 1.0, 0.1), (0.05, 0.2, 1.0)), "right_leg": ((0.1, 1.0, 0.1), (0.05, 0.2, 1.0))},
    "punch": {"right_arm": ((0.1, 0.2, -1.0), (0.0, 0.0, -1.0))},
    "raise": {"right_arm": ((0.8, 0.4, -0.2), (0.1, -1.0, -0.2))},
    "throw": {"right_arm": ((0.9, 0.4, 0.0), (1.0, 0.0, 0.0))},
    "scratch": {"right_arm": ((0.7, -0.1, -0.3), (-0.6, -0.8, 0.1))},
    "cross": {"left_arm": ((-0.4, 0.1, -0.9), (-1.0, -0.2, -0.1))},
    "show_low": {"left_arm": ((0.3, 0.6, -0.6), (0.1, -1.0, -0.2))},
    "show_high": {"left_arm": ((0.7, -0.4, -0.4), (0.1, -1.0, -0.1))},
    "show_aside": {"left_arm": ((0.9, 0.4, 0.0), (1.0, 0.0, 0.0))},
    "arms_down": {"left_arm": ((0.2, 1.0, 0.0), (0.1, 1.0, 0.05)), "right_arm": ((0.2, 1.0, 0.0), (0.1, 1.0, 0.05))},
}
POINTING = ("point_x", "point_y")  # the right hand's place, which moves the cursor
FINGERS = tuple(f"{side}_{finger}" for side in "lr" for finger in ("thumb", "index", "middle", "ring", "little"))
FREEDOMS = (*MOVES, *POINTING, *FINGERS)
D = {name: d for d, name in enumerate(FREEDOMS)}
CURLED, STRETCHED = 0.6, -0.4  # of a finger, from its rest


def hand_shape(side: str, fingers: tuple[int, ...]) -> dict[str, float]:
    """The named side's hand with these fingers (0 thumb .. 4 little) stretched and the others curled."""
    return {f: STRETCHED if i in fingers else CURLED for i, f in enumerate(f for f in FINGERS if f[0] == side)}


GESTURES = {  # column of the controls -> what the body does for it
    FORWARD: {"lean_front": 1.0},
    BACKWARD: {"lean_front": -1.0},
    LEFT: {"lean_side": 1.0},
    RIGHT: {"lean_side": -1.0},
    SPRINT: {"knee_left": 0.5, "knee_right": 0.5},  # and in turns, see `simulate`
    SNEAK: {"crouch": 1.0},
    JUMP: {"heels_up": 1.0},
    ATTACK: {"punch": 1.0} | hand_shape("r", ()),
    USE: {"raise": 1.0} | hand_shape("r", ()),
    DROP: {"throw": 1.0} | hand_shape("r", (0, 1, 2, 3, 4)),
    SWAP: {"cross": 1.0},
    OPEN: {"arms_down": 1.0} | hand_shape("l", (0, 1, 2, 3, 4)) | hand_shape("r", (0, 1, 2, 3, 4)),
    25: {"r_thumb": CURLED, "r_index": CURLED},
    26: {"r_middle": CURLED, "r_ring": CURLED, "r_little": CURLED},
    27: hand_shape("l", ()),
}
PLACES, SHAPES = ("show_low", "show_high", "show_aside"), ((), (1, 2), (0, 1, 2, 3, 4))  # fist, two fingers, open hand
for _slot in range(9):
    GESTURES[14 + _slot] = {PLACES[_slot // 3]: 1.0} | hand_shape("l", SHAPES[_slot % 3])


# body -----------------------------------------------------------------------------------------------------------------
def body(build: dict[str, float], posture: dict) -> np.ndarray:
    """The 33 landmarks of a posture, (33, 3) metres from the middle of the hips: x to the person's left, y down, z away
    from the camera."""
    points, trunk = np.zeros((33, 3)), Rotation.from_euler("xzy", posture["torso"], degrees=True)
    neck, skull = np.array([0.0, -build["torso"], 0.0]), np.array([0.0, -build["torso"] - build["neck"], 0.0])
    for first, sign, side in ((0, 1, "left"), (1, -1, "right")):  # the left landmark of a pair comes first
        mirror = np.array([sign, 1.0, 1.0])
        upper, lower = (mirror * np.array(v) / np.linalg.norm(v) for v in posture[f"{side}_leg"])
        points[23 + first] = mirror * [build["hips"], 0.0, 0.0]
        points[25 + first] = points[23 + first] + upper * build["thigh"]
        points[27 + first] = points[25 + first] + lower * build["shin"]
        points[29 + first] = points[27 + first] + [0.0, 0.03, 0.05]
        points[31 + first] = points[27 + first] + [0.0, 0.05, -0.13]
        upper, lower = (trunk.apply(mirror * np.array(v) / np.linalg.norm(v)) for v in posture[f"{side}_arm"])
        points[11 + first] = trunk.apply(neck + mirror * [build["shoulders"], 0.0, 0.0])
        points[13 + first] = points[11 + first] + upper * build["upper_arm"]
        points[15 + first] = points[13 + first] + lower * build["forearm"]
        for landmark, offset in ((17, (0.03, -0.06, 0.0)), (19, (-0.01, -0.08, -0.01)), (21, (-0.03, -0.04, -0.02))):
            points[landmark + first] = points[15 + first] + mirror * offset
    face = trunk * Rotation.from_euler("xy", posture["head"], degrees=True)
    eyes = [(x, -0.035, -0.085) for x in (0.02, 0.032, 0.045)]
    left = np.array([*eyes, (0.075, 0.0, 0.0), (0.025, 0.045, -0.085)])  # three points of an eye, ear, mouth
    places = {0: (0.0, 0.0, -0.1)}
    places |= dict(zip((1, 2, 3, 7, 9), left, strict=True)) | dict(
        zip((4, 5, 6, 8, 10), left * [-1, 1, 1], strict=True)
    )
    for landmark, place in places.items():
        points[landmark] = trunk.apply(skull) + face.apply(place)
    return points


def hand(build: dict[str, float], sign: int, finger: int | None) -> np.ndarray:
    """The 21 keypoints of a stretched left (sign 1) or right (-1) hand from its wrist, (21, 3) metres, with one finger
    curled."""
    points = np.zeros((21, 3))
    for i, (across, base) in enumerate(((-0.035, 0.03), (-0.025, 0.09), (-0.005, 0.095), (0.015, 0.09), (0.035, 0.08))):
        angle, place = 0.0, np.array([across, -base, 0.0])
        points[1 + 4 * i] = place
        for joint, length in enumerate((0.042, 0.026, 0.02)):
            angle += 75.0 if i == finger else 5.0
            bend = Rotation.from_euler("x", angle, degrees=True).apply([across * 0.3, -1.0, 0.0])
            place = place + length * bend
            points[2 + 4 * i + joint] = place
    return points * build["hand"] * [sign, 1, 1]


@dataclass
class Person:
    """A body and its habits. Amplitudes are in `directions`, so a gesture is 1 for everyone."""

    name: str
    rest: np.ndarray  # (225,)
    directions: np.ndarray  # (D, 225), what one unit of each degree of freedom adds
    sway: np.ndarray  # (D,) standard deviation of what the body does unasked
    delay: float  # s from the intention to the first movement
    rise: float  # s, time constant of each of the two lags that smooth a movement
    cadence: float  # steps a second when sprinting
    pace: float  # 1 is average; scales the pauses
    push: float  # 1 is average; scales how long keys are down
    fondness: dict[str, float]  # share of each choice


def make_person(seed: int, index: int) -> Person:
    rng = np.random.default_rng((seed, 1, index))
    size = rng.uniform(0.94, 1.06)
    average = {"torso": 0.5, "neck": 0.2, "shoulders": 0.18, "hips": 0.1, "upper_arm": 0.28, "forearm": 0.25}
    average |= {"thigh": 0.42, "shin": 0.42}
    build = {part: length * size * rng.normal(1, 0.03) for part, length in average.items()}
    build["hand"] = size * rng.normal(1, 0.05)
    energy = rng.uniform(0.85, 1.15)

    def styled(posture: dict, spread: float) -> dict:
        """The same posture as this person has it; angles vary with the limbs' directions."""
        return {
            part: tuple(tuple(np.array(v) + rng.normal(0, spread, 3)) for v in value)
            if isinstance(value[0], tuple)
            else tuple(np.array(value) + rng.normal(0, 12 * spread, len(value)))
            for part, value in posture.items()
        }

    posture = styled(REST, 0.05)
    landmarks = body(build, posture)
    hands = {"l": (99, 1), "r": (162, -1)}  # first column, sign
    directions, rest = np.zeros((len(D), 225)), np.zeros(225)
    rest[:99] = landmarks.ravel()
    for move, change in MOVES.items():
        turned = {p: tuple(np.array(posture[p]) + v) for p, v in change.items() if p in ("torso", "head")}
        limbs = styled({p: v for p, v in change.items() if p not in turned}, 0.06)
        moved = body(build, posture | turned | limbs) - landmarks
        directions[D[move], :99] = energy * rng.normal(1, 0.1) * moved.ravel()
    for axis, name in enumerate(POINTING):  # the elbow goes half the way
        reach = np.zeros((33, 3))
        reach[[16, 18, 20, 22], axis] = 0.4 * (build["upper_arm"] + build["forearm"]) * energy
        reach[14] = reach[16] / 2
        directions[D[name], :99] = (reach * [-1, 1, 1]).ravel()  # the person's right is the camera's left
    for side, (column, sign) in hands.items():
        stretched = hand(build, sign, None)
        turn = Rotation.from_euler("xyz", rng.normal(0, 8, 3), degrees=True)
        rest[column : column + 63] = turn.apply(stretched).ravel()
        for i, finger in enumerate(f for f in FINGERS if f[0] == side):
            curl = turn.apply(hand(build, sign, i) - stretched).ravel()
            directions[D[finger], column : column + 63] = curl
            rest[column : column + 63] -= STRETCHED * curl
    choices = {
        "forward": 0.72,
        "left": 0.5,
        "sprint": 0.7,
        "attack": 0.45,
        "use": 0.28,
        "swap": 0.33,
        "left_click": 0.58,
    }
    return Person(
        name=f"person_{index + 1:02d}",
        rest=rest,
        directions=directions,
        sway=rng.uniform(0.04, 0.07) * rng.uniform(0.8, 1.2, len(D)),
        delay=rng.uniform(0.01, 0.04),
        rise=rng.uniform(0.03, 0.042),
        cadence=rng.uniform(2.0, 2.6),
        pace=rng.uniform(0.85, 1.15),
        push=rng.uniform(0.9, 1.1),
        fondness={name: share + rng.uniform(-0.06, 0.06) for name, share in choices.items()},
    )


# what a person wants --------------------------------------------------------------------------------------------------
@dataclass
class Wishes:
    """The intentions of a session, one row a step."""

    controls: np.ndarray  # (S, 28): keys 0 or 1, look -1..1, cursor 0..1; hotbar 1 while the fingers show it
    strength: np.ndarray  # (S, 28) how strongly the gesture is made, about 1
    slot: np.ndarray  # (S,) the slot that is selected, 0..8
    screen: np.ndarray  # (S,) bool
    fidget: np.ndarray  # (S,) scratching, which means nothing
    fight: np.ndarray  # (S,) bool, a hostile is near


def pauses_and_turns(rng, start: float, stop: float, turn, pause: tuple[float, float]):
    """(begin, end) of turns of `turn()` seconds with pauses between them, all inside start .. stop."""
    while True:
        start += rng.uniform(*pause)
        end = start + turn()
        if end > stop:
            return
        yield start, end
        start = end


def intend(rng, person: Person, seconds: float) -> Wishes:
    S, like = int(seconds * STEPS), person.fondness
    wishes = Wishes(
        controls=np.zeros((S, 28)),
        strength=np.ones((S, 28)),
        slot=np.zeros(S, int),
        screen=np.zeros(S, bool),
        fidget=np.zeros(S),
        fight=np.zeros(S, bool),
    )
    wishes.controls[:, CURSOR] = 0.5
    controls, slot = wishes.controls, rng.integers(9)

    def press(column: int, begin: float, end: float):
        rows = slice(int(begin * STEPS), int(end * STEPS))
        controls[rows, column] = 1
        wishes.strength[rows.start :, column] = rng.normal(1, STRENGTH)  # until the next time

    def tap() -> float:
        return rng.uniform(0.25, 0.33) * person.push

    def pause(low: float, high: float) -> tuple[float, float]:
        return low * person.pace, high * person.pace

    def play(start: float, stop: float):
        """One busy stretch: legs, right arm, left arm and head each go their own way."""
        nonlocal slot
        fight = rng.random() < 0.4
        wishes.fight[int(start * STEPS) : int(stop * STEPS)] = fight
        hops = list(pauses_and_turns(rng, start, stop, tap, pause(0.8, 2.4)))
        for begin, end in pauses_and_turns(rng, start, stop, lambda: rng.uniform(1.0, 3.2), pause(0.3, 0.9)):
            forward = rng.random() < like["forward"]
            press(FORWARD if forward else BACKWARD, begin, end)
            if forward and end - begin > 1.3 and rng.random() < like["sprint"]:
                press(SPRINT, begin + rng.uniform(0.1, 0.4), end)
        for begin, end in pauses_and_turns(rng, start, stop, lambda: rng.uniform(0.6, 1.6), pause(0.5, 1.3)):
            press(LEFT if rng.random() < like["left"] else RIGHT, begin, end)
        for begin, end in pauses_and_turns(rng, start, stop, lambda: rng.uniform(0.8, 1.8), pause(1.2, 3.0)):
            if not controls[int(begin * STEPS) : int(end * STEPS), SPRINT].any():
                press(SNEAK, begin, end)
                hops = [hop for hop in hops if hop[1] < begin - 0.2 or hop[0] > end + 0.2]
        for hop in hops:
            press(JUMP, *hop)
        share = np.array([like["attack"] + 0.2 * fight, like["use"], 1 - like["attack"] - like["use"]])
        kinds = rng.choice(3, 200, p=share / share.sum()).tolist()  # what the right arm does next comes last

        def strike() -> float:
            return rng.uniform(0.6, 1.5) if kinds[-1] == 1 else tap()

        for begin, end in pauses_and_turns(rng, start, stop, strike, pause(0.3, 0.9)):
            press((ATTACK, USE, DROP)[kinds.pop()], begin, end)
        for begin, end in pauses_and_turns(rng, start, stop, lambda: rng.uniform(0.4, 0.55), pause(0.4, 0.95)):
            if rng.random() < like["swap"]:
                press(SWAP, begin, begin + tap())
                continue
            slot = int(rng.choice([s for s in range(9) if s != slot]))
            press(14 + slot, begin, end)
            chosen = begin + rng.uniform(0.14, 0.22)  # fingers are shown first, then the slot changes
            wishes.slot[int(chosen * STEPS) :] = slot
        for begin, end in pauses_and_turns(rng, start, stop, lambda: rng.uniform(0.5, 1.4), pause(0.2, 0.8)):
            rows = np.arange(int(begin * STEPS), int(end * STEPS))
            bump = np.sin(np.pi * (rows - rows[0]) / len(rows)) ** 2
            angle, peak = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.2)
            controls[rows, 9], controls[rows, 10] = peak * np.cos(angle) * bump, 0.8 * peak * np.sin(angle) * bump

    def sort_inventory(start: float, stop: float):
        here, now = np.array([0.5, 0.5]), start + 0.25
        while True:
            move, rest = rng.uniform(0.3, 0.55), rng.uniform(0.42, 0.6)
            if now + move + rest > stop:
                break
            there = rng.uniform([0.12, 0.15], [0.88, 0.85])
            share = np.linspace(0, 1, int(move * STEPS))[:, None]
            rows = slice(int(now * STEPS), int(now * STEPS) + len(share))
            controls[rows, CURSOR] = here + (there - here) * share**3 * (10 - 15 * share + 6 * share**2)
            controls[rows.stop : int(stop * STEPS), CURSOR] = there
            begin = now + move + rng.uniform(0.05, 0.12)
            if rng.random() < 0.4:
                press(27, begin - rng.uniform(0.3, 0.4), begin + 0.4)
            press(25 if rng.random() < like["left_click"] else 26, begin, begin + tap())
            here, now = there, now + move + rest

    now = rng.uniform(1.0, 2.0)
    wishes.slot[:] = slot
    while now < seconds:
        busy = rng.uniform(5.0, 9.0)
        play(now, min(now + busy, seconds))
        now += busy + rng.uniform(2.5, 4.0) * person.pace  # an idle stretch
        if rng.random() < 0.75 and now + 8 < seconds:
            opened = now + tap()
            press(OPEN, now, opened)  # the screen comes and goes when the key is let go
            closing = opened + rng.uniform(3.0, 5.0)
            closed = closing + tap()
            wishes.screen[int(opened * STEPS) : int(closed * STEPS)] = True
            sort_inventory(opened, closing - 0.1)
            press(OPEN, closing, closed)
            now = closed + rng.uniform(0.4, 1.0)
    for begin, end in pauses_and_turns(rng, 0, seconds, lambda: rng.uniform(0.5, 1.1), (8.0, 16.0)):
        wishes.fidget[int(begin * STEPS) : int(end * STEPS)] = rng.normal(0.8, STRENGTH)
    controls[:, LOOK] = controls[:, LOOK].clip(-1, 1)
    return wishes


# what the camera sees and the game reports ----------------------------------------------------------------------------
def slow_noise(rng, shape: tuple[int, int], kept: float) -> np.ndarray:
    """Unit variance, correlation `kept` from row to row, along the first axis."""
    fresh = rng.normal(size=shape)
    fresh[1:] *= np.sqrt(1 - kept**2)
    return lfilter([1.0], [1.0, -kept], fresh, axis=0)


def move(rng, person: Person, wishes: Wishes) -> np.ndarray:
    """Degrees of freedom of the body at each step, (S, D), as the person makes them."""
    wanted = np.zeros((len(wishes.controls), len(D)))
    for column, gesture in GESTURES.items():
        for freedom, amount in gesture.items():
            wanted[:, D[freedom]] += amount * wishes.controls[:, column] * wishes.strength[:, column]
    phase = np.sin(2 * np.pi * person.cadence * np.arange(len(wanted)) / STEPS + rng.uniform(0, 2 * np.pi))
    run = 0.5 * phase * wishes.controls[:, SPRINT] * wishes.strength[:, SPRINT]
    wanted[:, D["knee_left"]] += run  # both knees together stay the same
    wanted[:, D["knee_right"]] -= run
    wanted[:, [D["look_side"], D["look_down"]]] = wishes.controls[:, LOOK]
    wanted[:, [D[name] for name in POINTING]] = (wishes.controls[:, CURSOR] * 2 - 1) * wishes.screen[:, None]
    wanted[:, D["scratch"]] += wishes.fidget
    late = int(round(person.delay * STEPS))
    wanted = np.concatenate([np.zeros((late, len(D))), wanted[: len(wanted) - late]])
    kept = np.exp(-1 / (person.rise * STEPS))
    for _ in range(2):
        wanted = lfilter([1 - kept], [1.0, -kept], wanted, axis=0)
    return wanted


def track(rng, points: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The 260 columns of a frame from the true points (N, 225): noise of that standard deviation (225,), half of its
    variance slow, visibility, lost hands."""
    N = len(points)
    seen = points + noise * np.sqrt(0.5) * (rng.normal(size=points.shape) + slow_noise(rng, points.shape, JITTER_KEPT))
    visibility = np.concatenate([rng.uniform(0.93, 0.99, 25), rng.uniform(0.6, 0.9, 8)])  # the legs are seen worse
    visibility = (visibility + 0.03 * slow_noise(rng, (N, 33), 0.95)).clip(0, 1)
    present = np.ones((N, 2))
    for side, columns in enumerate((slice(99, 162), slice(162, 225))):
        for begin, end in pauses_and_turns(rng, 0, N, lambda: int(rng.integers(3, 25)), (120, 500)):
            begin, end = int(begin), int(end)
            seen[begin:end, columns] = seen[begin - 1, columns]
            seen[begin + HELD : end, columns] = 0
            present[begin + HELD : end, side] = 0
    return np.concatenate([seen, present, visibility], axis=1).astype(np.float32)


def game_states(rng, wishes: Wishes, steps: np.ndarray) -> np.ndarray:
    """What the game reports at these steps, (N, 46). Nothing in it follows from a key that is held: the state of a
    recording would otherwise answer for the policy. Slot, item and screen are the player's."""
    N, state = len(steps), np.zeros((len(steps), 46))
    slot, fight, screen = wishes.slot[steps], wishes.fight[steps], wishes.screen[steps]
    items = rng.permutation([0, 1, 2, 3, 4, 4, 5, 6, 6])  # what lies in the nine slots, as columns
    state[np.arange(N), items[slot]] = 1
    state[:, rng.integers(7, 11)] = 1
    drift = slow_noise(rng, (N, 6), 0.99)
    state[:, 11:14] = (0.8 + 0.1 * drift[:, :3]).clip(0, 1)
    state[:, 14] = state[:, 24] = state[:, 37] = 1
    state[:, 28] = fight & (drift[:, 3] > 1.5)
    state[:, 29] = state[:, 31] = fight & (drift[:, 4] > 0)
    state[:, 30] = (state[:, 29] == 0) & (drift[:, 5] > 0)
    state[:, 32] = np.where(state[:, 29] + state[:, 30] > 0, (0.4 + 0.1 * drift[:, 5]).clip(0, 1), 1)
    state[:, 33] = np.where(fight, (0.15 + 0.05 * drift[:, 4]).clip(0, 1), 1)
    state[:, 34] = np.where(fight, (0.3 * drift[:, 3]).clip(-1, 1), 0)
    state[:, 35] = np.where(fight, 0.1, 0)
    state[:, 36] = (rng.random() + steps / STEPS / 1200) % 1
    state[:, 38] = np.where(screen, 0.33, 0)
    state[:, 44] = slot / 8
    return state.astype(np.float32)


def simulate(person: Person, seed: int, index: int, seconds: float) -> dict[str, np.ndarray]:
    """A session of the v2 format, `person`, and the truth: `intent_controls` (N, 28) at the moments of the frames,
    `intent_freedoms` (N, D), `intent_rest` (225,) and `intent_directions` (D, 225) as the camera sees them,
    `intent_noise` (225,) and `intent_sway` (D,) standard deviations, `intent_timing` (delay, rise) in seconds."""
    rng = np.random.default_rng((seed, 2, index))
    wishes = intend(rng, person, seconds)
    N = int(seconds * FPS)
    steps = np.arange(N) * STEPS // FPS
    camera = Rotation.from_euler("xy", rng.normal(0, (1.5, 2.5)), degrees=True)
    rest, directions = (camera.apply(v.reshape(-1, 3)).reshape(v.shape) for v in (person.rest, person.directions))
    freedoms = move(rng, person, wishes)[steps] + person.sway * slow_noise(rng, (N, len(D)), SWAY_KEPT)
    noise = np.repeat([0.006, 0.01, 0.003], [75, 24, 126])  # metres: body, legs, hands
    frames = track(rng, rest + freedoms @ directions, noise)

    per_tick, offset = STEPS // TICKS, rng.integers(STEPS // TICKS)
    ticks = ((steps - offset) // per_tick * per_tick + offset).clip(0)  # the game's newest tick at each frame
    before = (ticks - per_tick).clip(0)  # the state is from the tick before: a slot's change is not in it yet
    state = game_states(rng, wishes, before)
    controls, screen = wishes.controls[ticks], state[:, 38] > 0
    controls[:, HOTBAR] = 0
    changed = 1 + np.flatnonzero(np.diff(wishes.slot[ticks]))
    controls[changed, 14 + wishes.slot[ticks][changed]] = 1
    open_key = controls[:, OPEN].copy()
    controls[screen, :23], controls[~screen, 23:] = 0, 0
    controls[:, OPEN] = open_key
    times = 1.7e9 + 1000 * index + steps / STEPS + rng.uniform(0, 0.002, N)
    return {
        "frames": frames,
        "controls": controls.astype(np.float32),
        "game_state": state,
        "timestamps": times,
        "fps": np.float32((N - 1) / (times[-1] - times[0])),
        "version": np.int32(2),
        "session_type": np.array("mixed"),
        "person": np.array(person.name),
        "intent_controls": wishes.controls[steps].astype(np.float32),
        "intent_freedoms": freedoms.astype(np.float32),
        "intent_rest": rest,
        "intent_directions": directions,
        "intent_noise": noise,
        "intent_sway": person.sway,
        "intent_timing": np.array([person.delay, person.rise]),
    }


# the best that can be reached -----------------------------------------------------------------------------------------
def find_freedoms(session: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Most likely degrees of freedom (N, D) of each frame alone, their standard errors (D,), and which hands (N, 2) the
    tracker really saw: a frozen hand repeats itself exactly, noise never does."""
    frames, directions, noise = session["frames"].astype(float), session["intent_directions"], session["intent_noise"]
    seen = frames[:, 225:227] > 0
    for side, columns in enumerate((slice(99, 162), slice(162, 225))):
        seen[1:, side] &= (frames[1:, columns] != frames[:-1, columns]).any(1)
    pointing = [D[name] for name in POINTING]
    striking = [D[name] for name in ("punch", "raise", "throw", "scratch")]  # never while a screen is open
    screen = session["game_state"][:, 38] > 0
    found, error = np.zeros((len(frames), len(D))), np.zeros(len(D))
    for open_ in (False, True):
        for left in (False, True):
            for right in (False, True):
                rows = (screen == open_) & (seen == (left, right)).all(1)
                known = np.repeat([True, left, right], [99, 63, 63]) / noise**2  # (225,) precision
                prior = np.ones(len(D))  # of variance 1: a gesture is 1
                unused = striking if open_ else pointing  # these only sway
                prior[unused] = 1 / session["intent_sway"][unused] ** 2
                precision = np.diag(prior) + directions * known @ directions.T
                gain = np.linalg.solve(precision, directions * known)  # (D, 225)
                found[rows] = (frames[rows, :225] - session["intent_rest"]) @ gain.T
                if left and right:
                    error = np.maximum(error, np.sqrt(np.diag(np.linalg.inv(precision))) * (prior == 1))
    return found, error, seen


def response(session: dict, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (length,) of how far a movement has come j frames after its label came on. The label is late by
    what is left of the game's tick and of the camera's frame."""
    delay, rise = session["intent_timing"]
    late = (np.arange(0.5, 20)[:, None] / 20 / TICKS + np.arange(0.5, 20) / 20 / FPS).ravel()
    moved = (late[:, None] + np.arange(length) / FPS - delay).clip(0) / rise
    share = 1 - (1 + moved) * np.exp(-moved)
    return share.mean(0), share.var(0)


def length_hazards(label: np.ndarray, allowed: np.ndarray, length: int) -> np.ndarray:
    """Chance (2, length) that a time on (row 0) or off (row 1) ends after j frames, from all of them."""
    edges = np.flatnonzero(np.diff(np.r_[-1, np.where(allowed, label, -1), -1]))
    spans = [(label[a], b - a) for a, b in zip(edges[:-1], edges[1:], strict=True) if allowed[a]]
    j, hazards = np.arange(1, length + 1)[:, None], np.zeros((2, length))
    for row, value in enumerate((1, 0)):
        lengths = np.array([n for v, n in spans if v == value])
        hazards[row] = ((np.abs(lengths - j) <= 1).sum(1) / 3 + 0.02) / ((lengths >= j).sum(1) + 1)
    hazards[0, -1], hazards[1, -1] = 0.05, max(1, len(lengths)) / max(length, lengths.sum())
    return hazards.clip(1e-4, 0.9)


def chances_on(y, known, label, allowed, sway, error, session: dict) -> np.ndarray:
    """P(control on at frame t | frames up to t), (N, K), for K controls: each a forward filter over the states "on
    since j frames" and "off since j frames".

    y (N, K) is how far each gesture is made in the frames, `known` (N, K) where it can be seen, `allowed` (N, K) where
    the control can be on, `sway` and `error` (K,) the deviations of y. Of `label` (N, K) only the lengths are used.
    """
    N, K, J = *y.shape, 60
    hazards = np.stack([length_hazards(label[:, k], allowed[:, k], J) for k in range(K)], 1)  # (2, K, J)
    up, spread = response(session, J)
    mean = np.stack([up, 1 - up])[:, None]  # (2, 1, J)
    step = mean - SWAY_KEPT * np.stack([np.r_[0, up[:-1]], np.r_[1, 1 - up[:-1]]])[:, None]  # what is new in a frame
    sway, error = sway[None, :, None], error[None, :, None]
    variance = sway**2 * (1 - SWAY_KEPT**2) + error**2 * (1 + SWAY_KEPT**2) + spread + (STRENGTH * step) ** 2
    variance_alone = sway**2 + error**2 + spread + (STRENGTH * mean) ** 2  # with no frame before
    start = np.zeros((2, K, J))
    start[1, :, -1] = 1
    state, result = start, np.zeros((N, K))
    for t in range(N):
        new, stay = np.empty_like(state), state * (1 - hazards)
        new[:, :, 1:] = stay[:, :, :-1]
        new[:, :, -1] += stay[:, :, -1]
        new[:, :, 0] = (state - stay).sum(2)[::-1]  # an end of on is a beginning of off
        follows = known[t] & known[t - 1] if t else np.zeros(K, bool)
        expected, spread_here = (
            np.where(follows[:, None], step, mean),
            np.where(follows[:, None], variance, variance_alone),
        )
        value = (y[t] - SWAY_KEPT * np.where(follows, y[t - 1], 0))[:, None]
        likely = np.exp(-((value - expected) ** 2) / (2 * spread_here)) / np.sqrt(2 * np.pi * spread_here) + 1e-3
        new = np.where(known[t][:, None], new * likely, new)
        state = np.where(allowed[t][:, None], new / new.sum((0, 2), keepdims=True), start)
        result[t] = state[0].sum(1)
    return result


def best_linear(y: np.ndarray, target: np.ndarray, rows: np.ndarray, taps: int = 8) -> np.ndarray:
    """The causal filter of `taps` frames of y (N,) closest to `target` (N,) on `rows`, applied everywhere."""
    past = [np.concatenate([np.repeat(y[:1], k), y[: len(y) - k]]) for k in range(taps)]
    inputs = np.stack([*past, np.ones(len(y))], axis=1)  # (N, taps + 1)
    return inputs @ np.linalg.lstsq(inputs[rows], target[rows], rcond=None)[0]


def best_reachable(session: dict) -> dict[str, np.ndarray]:
    """Outputs of a filter that knows the person, in the form of `control_metrics`: probs (N, 12),
    look (N, 2), hotbar (N, 9), cursor (N, 2), inv (N, 3). It sees frames up to each row and the game's screen flag."""
    y, error, seen = find_freedoms(session)
    controls, screen = session["controls"].astype(float), session["game_state"][:, 38] > 0
    sway, columns = session["intent_sway"], [*ACTIONS, 25, 26, 27]
    weight = np.zeros((len(D), len(columns)))  # of each degree of freedom in the size of a gesture
    for k, column in enumerate(columns):
        gesture = GESTURES[column]
        if column in ACTIONS:  # the arm tells enough; fingers are lost too often
            gesture = {f: v for f, v in gesture.items() if f not in FINGERS}
        for freedom, amount in gesture.items():
            weight[D[freedom], k] = 1 / amount / len(gesture)
    size = (y @ weight).clip(-0.25, 2)
    known = np.repeat(np.stack([np.ones(len(y), bool), seen[:, 1], seen[:, 0]], 1), [12, 2, 1], axis=1)
    allowed = np.repeat(np.stack([~screen, screen], 1), [12, 3], axis=1)
    deviations = (np.sqrt((s**2) @ weight**2) for s in (sway, error))
    chances = chances_on(size, known, controls[:, columns], allowed, *deviations, session)
    guided = {9: "look_side", 10: "look_down", 23: "point_x", 24: "point_y"}
    guesses = {c: best_linear(y[:, D[f]], controls[:, c], ~screen if c < 23 else screen) for c, f in guided.items()}
    hotbar = hotbar_chances(y, seen[:, 0], sway, error)
    return {
        "probs": chances[:, :12],
        "look": np.stack([guesses[9], guesses[10]], 1).clip(-1, 1),
        "hotbar": hotbar,
        "cursor": np.stack([guesses[23], guesses[24]], 1).clip(0, 1),
        "inv": chances[:, 12:],
    }


def hotbar_chances(y: np.ndarray, seen: np.ndarray, sway: np.ndarray, error: np.ndarray) -> np.ndarray:
    """P(slot) (N, 9): which one the left arm and its fingers have shown in the last three frames, if any."""
    places, fingers = [D[place] for place in PLACES], [D[f] for f in FINGERS if f[0] == "l"]
    log = np.zeros((len(y), 10))  # the tenth: no slot is shown
    for slot in range(10):
        shape = np.zeros(len(D))
        for freedom, value in GESTURES[14 + slot].items() if slot < 9 else ():
            shape[D[freedom]] = value
        for columns, known in ((places, np.ones(len(y), bool)), (fingers, seen)):
            scale = np.sqrt(sway[columns] ** 2 + error[columns] ** 2 + (STRENGTH * shape[columns]) ** 2)
            distance = ((y[:, columns] - shape[columns]) / scale) ** 2 / 2
            log[:, slot] -= np.where(known, distance.sum(1), 0)
    log = log + sum(np.concatenate([np.zeros((k, 10)), log[:-k]]) for k in (1, 2))
    chance = np.exp(log - log.max(1, keepdims=True))
    return (chance / chance.sum(1, keepdims=True))[:, :9]


def do_nothing(N: int) -> dict[str, np.ndarray]:
    """All off, look 0, the cursor in the middle."""
    return {
        "probs": np.zeros((N, 12)),
        "look": np.zeros((N, 2)),
        "hotbar": np.zeros((N, 9)),
        "cursor": np.full((N, 2), 0.5),
        "inv": np.zeros((N, 3)),
    }


def tuned_metrics(outputs: dict[str, np.ndarray], sessions: list[dict]) -> dict[str, float]:
    """`control_metrics` of outputs over the sessions' rows laid end to end, at the thresholds that
    are best for them."""
    controls, state = (np.concatenate([session[key] for session in sessions]) for key in ("controls", "game_state"))
    screen, actions = state[:, 38] > 0, controls[:, ACTIONS]
    idle = ~screen & (actions == 0).all(1)
    thresholds = optimize_thresholds(outputs["probs"][~screen], actions[~screen], idle[~screen])
    no_idle = np.zeros(screen.sum(), bool)
    clicks = optimize_thresholds(outputs["inv"][screen], controls[screen, CLICKS], no_idle)
    begins = np.concatenate([np.arange(len(session["controls"])) == 0 for session in sessions])
    return control_metrics(outputs, controls, state, thresholds, clicks, begins, FPS)


def score_sessions(folder: Path, heldout: tuple[str, ...] = ()) -> dict[str, dict[str, float]]:
    """Metrics of `best_reachable` and `do_nothing` on the sessions of a folder named in `heldout`, or on all."""
    paths = [folder / f"{name.removesuffix('.npz')}.npz" for name in heldout] or sorted(folder.glob("session_*.npz"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no session_*.npz. Write some: python benchmarks/make_control_sessions.py --output {folder}"
        )
    sessions = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: --heldout takes names of sessions in {folder}")
        with np.load(path, allow_pickle=False) as file:
            session = {key: file[key] for key in file.files}
        if "intent_directions" not in session:
            raise ValueError(
                f"{path} has no intent_directions: the best score is known for simulated sessions only, those that "
                "python benchmarks/make_control_sessions.py writes"
            )
        sessions.append(session)
    outputs = [best_reachable(session) for session in sessions]
    together = {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}
    nothing = do_nothing(len(together["probs"]))
    return {
        "best_reachable": tuned_metrics(together, sessions),
        "do_nothing": tuned_metrics(nothing, sessions),
    }


def write_sessions(args: Args) -> list[Path]:
    old = sorted(args.output.glob("session_*.npz"))
    if old and not args.overwrite:
        raise FileExistsError(
            f"{args.output} holds {len(old)} sessions, such as {old[0].name}. Name another folder with --output, or "
            "replace them with --overwrite"
        )
    for path in old:
        path.unlink()
    args.output.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(args.sessions):
        person = make_person(args.seed, index % args.persons)
        session = simulate(person, args.seed, index, 60 * args.minutes)
        path, temporary = args.output / f"session_{index + 1:03d}.npz", args.output / ".session.tmp"
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **session)
        temporary.replace(path)
        paths.append(path)
        screen = session["game_state"][:, 38] > 0
        idle = ~screen & (session["controls"][:, ACTIONS] == 0).all(1)
        changes = int(session["controls"][:, HOTBAR].sum())
        print(
            f"{path}  {person.name}  {len(screen):,} frames, {idle.mean():.0%} idle, {screen.mean():.0%} with a screen "
            f"open, {changes} slot changes"
        )
    return paths


def main(args: Args) -> dict[str, dict[str, float]]:
    """The metrics of `score_sessions`, which are also printed."""
    if args.sessions < 1 or args.persons < 1 or args.minutes < 0.25:
        raise ValueError(
            f"--sessions {args.sessions}, --persons {args.persons} and --minutes {args.minutes}: expected at least "
            "1, 1 and 0.25"
        )
    folder = args.score or args.output
    if args.score is None:
        write_sessions(args)
    scores = score_sessions(folder, args.heldout)
    print(f"{'':20}{'best reachable':>16}{'do nothing':>16}")
    for name in ("score", "avg_action_f1", "look_mse", "hotbar_accuracy", "cursor_mse", "avg_inv_f1", "idle_accuracy"):
        print(f"{name:20}" + "".join(f"{metrics[name]:16.3f}" for metrics in scores.values()))
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


if __name__ == "__main__":
    main(tyro.cli(Args))
