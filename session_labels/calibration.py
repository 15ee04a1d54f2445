"""Thresholds of single sprites from footage in which no event happens: what scores there is none.

precompute_labels.py --event-free finds them and writes thresholds.toml, which later runs read. The page is
docs/precompute_labels.md, "Thresholds from footage without events".
"""

import json
import math
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.sessions import TRUTH, find_sessions, read_table
from session_labels.sprites import Sighting, Sprites
from session_labels.truth import TRUE_NAMES, is_there

MARGIN = 0.03  # by which a threshold lies above all that scores without an event
HIGHEST = 0.97  # what an event's sprite scores in a good recording: a threshold above it would find none
BEFORE_S, AFTER_S = 0.5, 5.0  # around a true event, whose frames may show its sprite


@dataclass
class Footage:
    """Frames of a session in which no event happens."""

    folder: Path
    first: int = 0
    last: int | None = None  # the last of them; None: the session's
    truth: str | None = None  # file of true events, whose surroundings do not count

    def frames(self, times: np.ndarray) -> np.ndarray:
        """Which of the session's frames these are (N,) bool, by frame `times` (N,) in ms. Raises ValueError for frames
        that are not there."""
        frames = np.arange(len(times))
        chosen = (frames >= self.first) & (frames <= (frames[-1] if self.last is None else self.last))
        if self.truth is not None:
            for row in read_table(self.folder / self.truth, TRUTH).to_pylist():
                if row["what"] in TRUE_NAMES.values():
                    since = (times - row["timestamp"]) / 1000  # (N,) s
                    chosen &= (since < -BEFORE_S) | (since > AFTER_S)
        elif not chosen.any() or (self.last or 0) >= len(times):
            found = f"--event-free {self.folder.name}:{self.first}-{self.last}"
            raise ValueError(f"{found}: {self.folder} has frames 0 to {len(times) - 1}")
        return chosen


def find_footage(words: tuple[str, ...], data_dir: Path, truth: str | None) -> list[Footage]:
    """What --event-free names: sessions or folders of sessions, maybe some of their frames, or `truth`."""
    footage = []
    for word in words:
        if word == "truth":
            if truth is None:
                raise ValueError("--event-free truth: name the file of true events with --truth truth.parquet")
            sessions = [folder for folder in find_sessions(data_dir) if is_there(folder / truth)]
            footage += [Footage(folder, truth=truth) for folder in sessions]
            continue
        if not word:
            raise ValueError("--event-free '': expected sessions, folders of sessions, or truth")
        name, first, last = re.fullmatch(r"(.+?)(?::(\d+)-(\d+))?", word).groups()
        folder = next((f for f in (data_dir / name, Path(name)) if f.is_dir()), None)
        if folder is None:
            raise ValueError(f"--event-free {word}: neither {data_dir / name} nor {name} is a folder. Name a session")
        if first is None:
            footage += [Footage(session) for session in find_sessions(folder)]
        elif (folder / "recording.mp4").exists():
            footage.append(Footage(folder, int(first), int(last)))
        else:
            raise ValueError(f"--event-free {word}: {folder} is no session, so frames of it cannot be named")
    return footage


@dataclass
class Peak:
    """The highest score of a sprite where there was no event."""

    score: float
    where: str


def add_peaks(peaks: dict[str, Peak], session: str, detections: list[Sighting], sprites: Sprites, quiet: np.ndarray):
    """Raise the `peaks`, by file name of the sprite, to what `detections` in the `quiet` frames (N,) score."""
    for d in detections:
        name = stem(sprites.kinds[d.sprite])
        if quiet[d.frame] and (name not in peaks or d.score > peaks[name].score):
            peaks[name] = Peak(d.score, f"in {session}, frame {d.frame}")


def choose_thresholds(thresholds: dict[str, float], peaks: dict[str, Peak]) -> dict[str, tuple[float, str]]:
    """The threshold of each sprite that cannot keep the one it has, and why; 1 for a sprite that is dropped."""
    chosen = {}
    for name, peak in peaks.items():
        least = math.ceil(1000 * (peak.score + MARGIN) - 1e-6) / 1000
        reason = f"scores {peak.score:.3f} {peak.where}"
        if least > HIGHEST:
            chosen[name] = 1.0, f"dropped: {reason}, which leaves no room for events"
        elif least > thresholds[name]:
            chosen[name] = least, f"raised from {thresholds[name]:g}: {reason}"
    return chosen


def stem(kind: str) -> str:
    """The name by which --template-thresholds knows a sprite, mirrored or not."""
    return Path(kind.removesuffix(" mirrored")).stem


def thresholds_file(data_dir: Path) -> Path:
    """Where the found thresholds of a data folder are, also where `data_dir` is one session of it."""
    return (data_dir.parent if (data_dir / "recording.mp4").exists() else data_dir) / "thresholds.toml"


def write_thresholds(path: Path, chosen: dict[str, tuple[float, str]], heading: str):
    """Write what later runs read, in place of what was found before."""
    lines = [f"{json.dumps(name)} = {score:g}  # {reason}" for name, (score, reason) in sorted(chosen.items())]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("\n".join([f"# {heading}", "[template_thresholds]", *lines, ""]))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_thresholds(path: Path, names: set[str]) -> tuple[str, ...]:
    """NAME=SCORE of each sprite in thresholds.toml, none where there is none. Raises ValueError for what cannot be."""
    if not path.exists():
        return ()
    mend = "Make it again with --event-free, or take it away"
    try:
        table = dict(tomllib.loads(path.read_text())["template_thresholds"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no TOML file with a table [template_thresholds]. {mend}") from None
    for name, score in table.items():
        if name not in names or type(score) not in (int, float) or not 0 < score <= 1:
            found = f"{path}: {name} = {score!r}, expected a score above 0, at most 1"
            raise ValueError(f"{found}, of one of {', '.join(sorted(names))}. {mend}")
    return tuple(f"{name}={score:g}" for name, score in table.items())
