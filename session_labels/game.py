"""What to look for in recordings of a game: a TOML file that names its sprites, rules and keys, checked strictly.

The keys are explained in docs/precompute_labels.md, "A game of your own".
"""

import hashlib
import json
import math
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from common.sessions import INTENT_NAMES, KEY_CODES

# what a value may be: a test, and what is expected, in words
TEXT = (lambda x: isinstance(x, str) and x != "", "a text")
TEXTS = (lambda x: isinstance(x, list) and x and all(TEXT[0](word) for word in x), "a list of texts")
TABLE = (lambda x: isinstance(x, dict), "a table")
SWITCH = (lambda x: isinstance(x, bool), "true or false")
COUNT = (lambda x: type(x) is int and x >= 1, "a whole number, 1 or more")
SECONDS = (lambda x: type(x) in (int, float) and 0 <= x < math.inf, "a number, 0 or more")
POSITIVE = (lambda x: type(x) in (int, float) and 0 < x < math.inf, "a number above 0")
SCORE = (lambda x: type(x) in (int, float) and 0 < x <= 1, "a score above 0, at most 1")
SHARE = (lambda x: type(x) in (int, float) and 0 <= x < 1, "a number from 0 to below 1")
SIZES = (
    lambda x: x == ["auto"] or (isinstance(x, list) and x and all(POSITIVE[0](n) and 0.25 <= n <= 4 for n in x)),
    'a list of numbers from 0.25 to 4, or ["auto"]',
)
RULE = (lambda x: isinstance(x, str) and x in RULES, 'a rule: "first" or "track"')
KEY = (lambda x: isinstance(x, str) and x in KEY_CODES, "an evdev key name such as KEY_BACKSLASH (docs/data.md)")
KEYS = (lambda x: isinstance(x, list) and x and all(KEY[0](key) for key in x), 'a list of key names as ["KEY_W"]')

NEEDED = object()  # in place of a default
GAME = {  # key: what it may be, its default
    "name": (TEXT, NEEDED),
    "folders": (TEXTS, []),
    "missing": (TEXT, "Install the game"),
    "sprite_threshold": (SCORE, 0.85),
    "template_thresholds": (TABLE, {}),
    "sprite_scales": (SIZES, ["auto"]),
    "sprite_width": (POSITIVE, 32),
    "respawn_gap_s": (SECONDS, NEEDED),
    "DEATH": (TABLE, {}),
    "ATTACK": (TABLE, {}),
    "WIN": (TABLE, {}),
    "intents": (TABLE, {}),
}
SPRITES = {
    "sprites": (TEXTS, NEEDED),
    "mirror": (SWITCH, False),
    "alpha": (SHARE, 0.5),
    "min_sightings": (COUNT, 1),
    "of_frames": (COUNT, None),
    "rule": (RULE, NEEDED),
}
RULES = {
    "first": {"min_gap_s": (SECONDS, NEEDED)},
    "track": {"stays_s": (POSITIVE, NEEDED), "camera_speed": (POSITIVE, NEEDED)},
}
WIN_KEYS = {
    "key": (KEY, None),
    "key_min_presses": (COUNT, 1),
    "key_window_s": (SECONDS, 2.0),
    "key_cooldown_s": (SECONDS, 30.0),
}
INTENTS = {name: (KEYS, None) for name in INTENT_NAMES if name != "WAIT"}


@dataclass
class Rule:
    """The sprites that tell of an event, and how sightings of them become events."""

    event: str  # DEATH, ATTACK or WIN
    sprites: list[str]  # files below the folder of sprites
    mirror: bool  # also looked for facing the other way
    alpha: float  # pixels more opaque than this are compared
    min_sightings: int  # frames that show it, of the first so many that were looked at, or it is no event
    of_frames: int
    rule: str  # first: the first sighting is the event, track: each thing that is seen is one
    min_gap_s: float = 0.0  # first: sightings within this are the same event
    stays_s: float = 0.0  # track: how long a thing is seen, then it is gone
    camera_speed: float = 0.0  # track: pixels per second by which its speed may differ between two frames


@dataclass
class Game:
    """A game file."""

    name: str
    digest: str  # of what the file says; comments do not count
    folders: list[Path]  # where the sprites may be
    missing: str  # what to do where they are not
    sprite_threshold: float
    template_thresholds: dict[str, float]  # by file name of the sprite, without .png
    sprite_scales: tuple[str, ...]
    sprite_width: float  # pixels as drawn, the unit of progress
    respawn_gap_s: float
    rules: dict[str, Rule]  # by event
    win: dict  # as WIN_KEYS
    intents: list[tuple[str, str]]  # intents and their keys, the first that is down decides


def load_game(path: Path) -> Game:
    """Read a game file. Raises FileNotFoundError, or ValueError naming the file, the key, its value and the mend."""
    try:
        text = path.read_text()
        told = tomllib.loads(text)
    except OSError as error:
        raise FileNotFoundError(f"--game {path} cannot be read ({error.strerror}). Name a game's TOML file") from None
    except ValueError as error:  # no UTF-8, no TOML
        raise ValueError(f"{path} is no TOML file: {error}") from None
    game = checked(path, "", told, GAME)
    rules = {}
    for event in ("DEATH", "ATTACK", "WIN"):
        table, keys = game.pop(event), WIN_KEYS if event == "WIN" else {}
        if event in told and (event != "WIN" or "sprites" in table):
            keys = keys | SPRITES | RULES.get(str(table.get("rule")), {})
        table = checked(path, f"[{event}] ", table, keys)
        if event == "WIN":
            win = {key: table.pop(key) for key in WIN_KEYS}
        if table:
            table["of_frames"] = table["of_frames"] or table["min_sightings"]
            if table["of_frames"] < table["min_sightings"]:
                found = f"[{event}] of_frames is {table['of_frames']}"
                raise ValueError(f"{path}: {found}, expected min_sightings ({table['min_sightings']}) or more")
            rules[event] = Rule(event, **table)
    if not rules:
        raise ValueError(f"{path} names no sprites. Add a table [DEATH], [ATTACK] or [WIN] with sprites and a rule")
    stems = list(dict.fromkeys(Path(sprite).stem for rule in rules.values() for sprite in rule.sprites))
    single = dict.fromkeys(stems, (SCORE, None))
    single = checked(path, "[template_thresholds] ", game["template_thresholds"], single)
    game["template_thresholds"] = {stem: score for stem, score in single.items() if score is not None}
    game["sprite_scales"] = tuple(str(size) for size in game["sprite_scales"])  # as --sprite-scales
    checked(path, "[intents] ", game["intents"], INTENTS)
    game["intents"] = [(intent, " ".join(keys)) for intent, keys in game["intents"].items()]
    game["folders"] = [path.parent / folder for folder in game["folders"]]  # one that begins with / stays as it is
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return Game(digest=digest, rules=rules, win=win, **game)


def checked(path: Path, where: str, table: dict, keys: dict[str, tuple]) -> dict:
    """The values of a table, defaults where it has none; ValueError for a key or a value that cannot be."""
    for key in (key for key in keys if key in table):
        (holds, expected), _ = keys[key]
        if not holds(table[key]):
            raise ValueError(f"{path}: {where}{key} is {json.dumps(table[key], default=str)}, expected {expected}")
    for key in (key for key in table if key not in keys):
        near = get_close_matches(key, keys, 1)
        mend = f"did you mean {near[0]}?" if near else f"expected {', '.join(keys)}"
        raise ValueError(f"{path}: {where}{key} = {json.dumps(table[key], default=str)} is not known here, {mend}")
    for key, ((_, expected), default) in keys.items():
        if default is NEEDED and key not in table:
            raise ValueError(f"{path}: {where}{key} is missing, expected {expected}. Add it")
    return {key: table.get(key, default) for key, (_, default) in keys.items()}
