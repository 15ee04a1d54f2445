"""Sprites that are looked for in recordings, where they are seen, and how large a recording shows them."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.template_matching import Finder, find
from common.video import VideoReader, grey, iter_frames
from session_labels.game import Rule

KEPT = 0.1  # below the threshold: what scores this is in detections.parquet, to choose another threshold by
SCALES = tuple(round(0.5 * 1.05**k, 2) for k in range(29))  # 0.5 to 1.96: sizes of sprites that are tried
CLEAR = 0.95  # score that a sprite of the right size has somewhere; 4 % larger or smaller it has less
Roi = tuple[int, int, int, int]  # region of interest: left, top, width, height in pixels of the recording
SMALL = 0.8  # sprites of less are looked for as drawn, in enlarged frames
SAMPLE, SURE = 60, 16  # frames in which the size is looked for, and looked at again


@dataclass
class Sprites:
    """The T sprites of all events, ready to be found."""

    finder: Finder
    names: list[str]  # T, such as squished-left and squished-left mirrored, and x1.4 for sizes other than 1
    kinds: list[str]  # T, the names without a size
    events: list[str]  # T
    scales: list[float]  # T
    thresholds: np.ndarray  # (T,) scores
    folder: Path  # of their pictures
    rules: dict[str, Rule]  # by event


@dataclass
class Sighting:
    """A sprite seen in a frame, its top left corner in pixels."""

    frame: int
    event: str
    sprite: int  # which of the T
    score: float
    y: float
    x: float
    recorded: "Sighting | None" = field(default=None, repr=False)  # the detection, where y and x are in drawn pixels


def kept_from(thresholds: np.ndarray) -> np.ndarray:
    """The scores from which places are kept."""
    return np.maximum(0.01, thresholds - KEPT).round(6)


def read_scales(words: tuple[str, ...]) -> tuple[float, ...]:
    """The numbers of --sprite-scales, none for auto. Raises ValueError for what is no size."""
    if words == ("auto",):
        return ()
    if not all(re.fullmatch(r"\d*\.?\d+", word) and 0.25 <= float(word) <= 4 for word in words):
        raise ValueError(f"--sprite-scales {' '.join(words)}: expected auto, or numbers from 0.25 to 4")
    return tuple(dict.fromkeys(float(word) for word in words))


def crop(frames: torch.Tensor, roi: Roi | None) -> torch.Tensor:
    """Of `frames` (..., H, W) the region of interest."""
    if roi is None:
        return frames
    x, y, w, h = roi
    return frames[..., y : y + h, x : x + w]


def check_roi(roi: Roi | None, reader: VideoReader):
    """Raise ValueError where a region reaches beyond the picture."""
    if roi is not None and (roi[0] + roi[2] > reader.width or roi[1] + roi[3] > reader.height):
        given, size = " ".join(map(str, roi)), f"{reader.width}x{reader.height}"
        raise ValueError(f"--roi {given} reaches beyond the picture of {size}. Name X Y W H inside it")


def check_room(roi: Roi | None, sprites: Sprites):
    """Raise ValueError where a sprite does not fit into the region."""
    for name, (h, w) in zip(sprites.names, (template.shape for template in sprites.finder.bank.templates), strict=True):
        if roi is not None and (w > roi[2] or h > roi[3]):
            given = " ".join(map(str, roi))
            raise ValueError(f"--roi {given} is smaller than {name} of {w}x{h} pixels. Name a larger region")


def find_scale(
    load: Callable[[tuple[float, ...]], Sprites],
    threshold: float,
    reader: VideoReader,
    n_frames: int,
    bar: Callable = iter,
    roi: Roi | None = None,
) -> float | None:
    """The size at which the recording shows the sprites: at which they score the most above `threshold` in a sample of
    its frames, None if they reach it in less than two of them. 1 is tried first, then SCALES, then what lies around
    the best of these, in the frames that it was seen in. `load` makes the sprites at some sizes."""
    stride = max(1, n_frames // SAMPLE)
    frames = torch.cat(
        [grey(crop(frames, roi)).byte() for _, frames in iter_frames(reader, stop=n_frames, stride=stride)]
    )  # (n, H, W)
    drawn = load((1.0,)).finder

    def search(parts: Iterable[torch.Tensor], finder: Finder) -> list[float]:
        shapes, scores = [template.shape for template in finder.bank.templates], []
        for part in parts:
            fits = all(h <= part.shape[1] and w <= part.shape[2] for h, w in shapes)
            scores += [hits[0][0] if hits else 0.0 for hits in (find(part, finder) if fits else [[]] * len(part))]
        return scores

    def best_scores(scale: float, frames: torch.Tensor) -> list[float]:  # of each frame
        return search((part.float() for part in frames.split(8)), load((scale,)).finder)

    def best_scores_enlarged(scale: float) -> list[float]:  # the same, faster for sprites too small for coarse to fine
        size = [round(side / scale) for side in frames.shape[1:]]
        parts = (part[:, None].float() for part in frames.split(8))
        return search((F.interpolate(part, size, mode="bilinear", antialias=True)[:, 0] for part in parts), drawn)

    def excess(scores: list[float]) -> float:  # of frames that show a sprite; what scores less is some background
        return sum(max(0.0, score - threshold) for score in scores)

    best = {1.0: best_scores(1.0, frames)}
    if max(best[1.0]) >= CLEAR:
        return 1.0
    best |= {
        scale: best_scores_enlarged(scale) if scale < SMALL else best_scores(scale, frames) for scale in bar(SCALES)
    }
    scale = max(best, key=lambda scale: (excess(best[scale]), sum(sorted(best[scale])[-2:])))
    clearest = frames[np.argsort(best[scale])[-SURE:]]
    around = [round(scale * (1 + k / 200), 3) for k in range(-7, 8)]  # 0.5 % apart
    fine = {at: best_scores(at, clearest) for at in around}
    scale = max(fine, key=lambda scale: excess(fine[scale]))
    if sum(score >= threshold for score in fine[scale]) < 2:  # one may be chance
        return 1.0 if max(best[1.0]) >= threshold else None
    return scale
