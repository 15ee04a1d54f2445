"""What is near Tux on the screen: enemies, squished enemies, coins.

Tux is found first, by pictures of him, and the rest only in a window around him. Where he is not found, nothing is
near.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.template_matching import Finder, find, join, load_sprites, make_finder
from common.video import VideoReader, grey, iter_frames

NEAR = 96.0  # pixels as drawn between the centres of Tux and of what is near him
WINDOW = 144.0  # from his centre to the window's edge: what is near fits in with its whole sprite
POSES = "stand-0 jump-0 skid-0 walk-0 walk-2 walk-4 walk-6"
TUX = [f"creatures/tux/{size}/{pose}.png" for size in ("small", "big") for pose in POSES.split()]
AROUND = {  # walking enemies with their whole animation: half of its pictures finds half as many of them
    "SQUISHED": ["creatures/snowball/squished-left.png", "creatures/snowball/mrs-squished-left.png"],
    "ENEMY": [f"creatures/snowball/{kind}-{i}.png" for kind in ("snowball", "smartball") for i in range(8)],
    "COIN": [f"objects/coin/coin-{i}.png" for i in (0, 2, 14)],
}
ALL = [*TUX, *(path for paths in AROUND.values() for path in paths)]


@dataclass
class Eyes:
    """Sprites of one size, ready to be found."""

    tux: Finder
    around: Finder
    signs: list[str]  # of the templates of `around`, names in AROUND
    scale: float


def open_eyes(folder: Path, scale: float, threshold: float) -> Eyes:
    """The sprites of `folder`, `scale` times as large as drawn, to be found from a score of `threshold` on."""
    tux = load_sprites([folder / path for path in TUX], scale, mirror=True)
    banks = [load_sprites([folder / path for path in paths], scale, mirror=True) for paths in AROUND.values()]
    signs = [sign for sign, bank in zip(AROUND, banks, strict=True) for _ in bank.names]
    around = join(*banks)
    finders = [make_finder(bank, [threshold] * len(bank.names)) for bank in (tux, around)]
    return Eyes(*finders, signs, scale)


def centre(hit: tuple, finder: Finder) -> np.ndarray:
    """y, x of the middle of a (score, template, y, x)."""
    return np.array(hit[2:]) + np.array(finder.bank.templates[hit[1]].shape) / 2


def look_around(frames: torch.Tensor, eyes: Eyes) -> list[set[str]]:
    """What is near Tux in each of `frames` (N, H, W) float32 0..255: names in AROUND."""
    size = np.minimum(round(2 * WINDOW * eyes.scale), frames.shape[1:])
    near: list[set[str]] = [set() for _ in frames]
    for frame, hits, found in zip(frames, find(frames, eyes.tux), near, strict=True):
        if not hits:
            continue
        tux = centre(hits[0], eyes.tux)
        y, x = np.clip(tux - size / 2, 0, np.array(frame.shape) - size).astype(int)  # of the window's corner
        for hit in find(frame[None, y : y + size[0], x : x + size[1]], eyes.around)[0]:
            if np.hypot(*(centre(hit, eyes.around) + (y, x) - tux)) <= NEAR * eyes.scale:
                found.add(eyes.signs[hit[1]])
    return near


def find_surroundings(reader: VideoReader, eyes: Eyes, n_frames: int, stride: int, name: str) -> dict:
    """What is near Tux in frames 0, stride, 2 stride, ... of a video, each for itself and the frames up to the next:
    name in AROUND -> (n_frames,) bool."""
    near = {sign: np.zeros(n_frames, bool) for sign in AROUND}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a frame is too little to share
    try:
        with tqdm(total=n_frames, desc=f"{name}: surroundings", unit="frame") as bar:
            for indices, frames in iter_frames(reader, stop=n_frames, stride=stride):
                for i, signs in zip(indices, look_around(grey(frames), eyes), strict=True):
                    for sign in signs:
                        near[sign][i : i + stride] = True
                bar.update(min(len(indices) * stride, n_frames - bar.n))
    finally:
        torch.set_num_threads(threads)
    return near
