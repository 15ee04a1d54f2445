"""Intents: what the player is about to do, from the keys of the next moments and maybe from what is near him.

A weak label in the strong sense: it is made of the very keys that a policy learns to predict, and looks ahead of them.
As a goal at play it says what to do next; as an input while keys are scored it would give the answer away.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.sessions import EPISODES, INTENT, INTENT_NAMES, Session, key_table, read_table, write_table
from session_labels.files import metadata_of

FIRE = "KEY_LEFTCTRL KEY_RIGHTCTRL KEY_LEFTALT KEY_RIGHTALT KEY_X KEY_C"
Rules = list[tuple[str, str]]  # intents and their signs, the first that shows decides; none is WAIT
RULES: dict[str, Rules] = {  # of every labeler; of keys, where the game's file has none
    "keys": [
        ("LOOT", "KEY_E KEY_ENTER"),
        ("LEAP", "KEY_SPACE"),
        ("CLIMB", "KEY_UP"),
        ("ATTACK", FIRE),
        ("EVADE", "KEY_DOWN"),
        ("RUN", "KEY_LEFT KEY_RIGHT"),
    ],
    "supertux": [  # signs that are no keys are those of surroundings.py
        ("ATTACK", FIRE),
        ("LEAP", "KEY_SPACE"),
        ("CLIMB", "KEY_UP"),
        ("ATTACK", "SQUISHED"),
        ("EVADE", "ENEMY KEY_DOWN"),
        ("LOOT", "COIN"),
        ("RUN", "KEY_LEFT KEY_RIGHT"),
        ("LOOT", "KEY_E KEY_ENTER"),
    ],
}


def signs_of(rules: Rules) -> list[str]:
    """All signs that the rules name, each once."""
    return list(dict.fromkeys(sign for _, signs in rules for sign in signs.split()))


def look_ahead(shown: np.ndarray, horizon: int, cuts: Sequence[int]) -> np.ndarray:
    """Which of S signs show in frames [i, i + horizon], up to the last frame of i's stretch: a new one begins at each
    of `cuts`. (N, S) bool -> (N, S) bool"""
    stretch = np.searchsorted(np.sort(cuts), np.arange(len(shown)), side="right")  # (N,)
    ahead = shown.copy()
    for step in range(1, min(horizon, len(shown) - 1) + 1):
        ahead[:-step] |= shown[step:] & (stretch[step:] == stretch[:-step])[:, None]
    return ahead


def choose_intents(ahead: np.ndarray, rules: Rules) -> np.ndarray:
    """The intent of each frame, its number in INTENT_NAMES (N,). `ahead` (N, S) has a column for each of `signs_of`."""
    column = {sign: s for s, sign in enumerate(signs_of(rules))}
    intents = np.full(len(ahead), INTENT_NAMES.index("WAIT"))
    for intent, signs in reversed(rules):
        intents[ahead[:, [column[sign] for sign in signs.split()]].any(axis=1)] = INTENT_NAMES.index(intent)
    return intents


def find_cuts(folder: Path) -> list[int]:
    """The frames at which a session's episodes begin, and those that follow them."""
    episodes = read_table(folder / "episodes.parquet", EPISODES).to_pylist()
    return sorted({frame for e in episodes for frame in (e["start_frame"], e["end_frame"] + 1)})


def are_outdated(folder: Path) -> bool:
    """Whether a session has intents that were made for other episodes than it has now."""
    path = folder / "intent.parquet"
    return path.exists() and metadata_of(path, INTENT).get("cuts") != json.dumps(find_cuts(folder))


def label_intents(
    session: Session,
    labeler: str,
    horizon_s: float,
    recording: dict,
    near: dict[str, np.ndarray] | None = None,
    rules: Rules | None = None,
) -> np.ndarray:
    """Write intent.parquet of a session that has episodes: what is done after an end says nothing of the time before
    it. `recording` tells which recording it is and how it was searched, `near` (N,) bool each which signs that are no
    keys show, `rules` those of the game's file. Returns the intents, numbers in INTENT_NAMES (N,)."""
    n, horizon = int(recording["recording_frames"]), round(horizon_s * session.fps)
    cuts, rules = find_cuts(session.folder), rules or RULES[labeler]
    shown = key_table(session, signs_of(rules))[1][:n]  # (n, S), down at any moment up to the next frame
    for sign, seen in (near or {}).items():
        shown[:, signs_of(rules).index(sign)] = seen
    intents = choose_intents(look_ahead(shown, horizon, cuts), rules)
    columns = {"frame_idx": np.arange(n), "intent": np.array(INTENT_NAMES)[intents].tolist()}
    made_with = {"labeler": labeler, "intent_horizon_s": horizon_s, "fps": session.fps, "cuts": json.dumps(cuts)}
    made_with["rules"] = json.dumps(rules)
    rows = columns | {"timestamp": session.timestamps[:n]}
    write_table(session.folder / "intent.parquet", rows, INTENT, recording | made_with)
    return intents
