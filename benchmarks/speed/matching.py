"""Find ten templates in 640x480 frames: `common.template_matching.match` beside OpenCV's masked matchTemplate.

    python -m benchmarks.speed.matching

Templates of 32 to 64 pixels, each with an ellipse of its own as the mask, are cut from other frames of the recordings
and get some noise: most are in the frame, some are not. One frame and all templates a round. The scores are compared
with the definition in float64, also where the frame is nearly flat. Writes results/matching.json.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.speed.paired import report, run_in_turn
from common.template_matching import make_bank, match, score_maps
from common.video import VideoReader, grey
from tests.reference import masked_zncc


@dataclass
class Args:
    data_dir: Path = Path("sample_dataset")
    """folder of sessions with recording.mp4, all of one size"""
    rounds: int = 24
    """frames that are searched"""
    seed: int = 1
    """chooses the frames and the templates"""


def read_frames(files: list[Path], count: int, rng) -> torch.Tensor:
    """Frames from anywhere in the recordings, grey: (count, H, W) float32."""
    readers = [VideoReader(file) for file in files]
    picks = [(readers[i % len(readers)], rng.random()) for i in range(count)]
    numbers = [(reader, int(where * reader.n_frames)) for reader, where in picks]
    return grey(torch.cat([reader.read(i, i + 1) for reader, i in numbers]))


def cut_templates(frames: np.ndarray, count: int, rng) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Greys (h, w) float64 and masks (h, w) bool, from where something is to be seen."""
    greys, masks = [], []
    while len(greys) < count:
        h, w = rng.integers(32, 65, 2)
        y, x = rng.integers(0, (frames.shape[1] - h, frames.shape[2] - w))
        patch = frames[rng.integers(len(frames)), y : y + h, x : x + w].astype(np.float64)
        yy, xx = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
        mask = yy**2 + xx**2 <= 1
        if patch[mask].std() > 10:
            greys.append(patch + rng.normal(0, 5, patch.shape))
            masks.append(mask)
    return greys, masks


def agreement(frames: torch.Tensor, bank, greys, masks, opencv_maps, rng) -> dict:
    """Largest differences: of score maps from the definition at chosen positions, a third of them nearly flat (1 to 2
    grey levels of deviation); of `match` from the maximum of these maps; of the maps from OpenCV's."""
    at_random, nearly_flat, best, opencv, not_finite = [], [], [], [], 0
    score, _, _ = match(frames, bank)
    for n, frame in enumerate(frames):
        for t, scores in enumerate(score_maps(frame[None], bank)):
            theirs = opencv_maps[t](frame.numpy())
            not_finite += int((~np.isfinite(theirs)).sum())
            best.append(abs(score[n, t].item() - scores.max().item()))
            h, w = masks[t].shape
            for number, (y, x) in enumerate(rng.integers(0, np.array(scores.shape[1:]), (60, 2))):
                right, deviation = masked_zncc(frame[y : y + h, x : x + w].numpy(), greys[t], masks[t])
                if 1 < deviation[0, 0] <= 2 or (deviation[0, 0] > 2 and number < 20):
                    error = abs(scores[0, y, x].item() - right[0, 0])
                    (nearly_flat if deviation[0, 0] <= 2 else at_random).append(error)
                    if np.isfinite(theirs[y, x]):
                        opencv.append(abs(scores[0, y, x].item() - theirs[y, x]))
    return {
        "max_difference_from_float64": {"positions": len(at_random), "difference": float(max(at_random))},
        "max_difference_from_float64_nearly_flat": {
            "positions": len(nearly_flat),
            "difference": float(max(nearly_flat, default=0)),
        },
        "max_difference_of_match_from_the_maps": max(best),
        "max_difference_from_opencv": {"positions": len(opencv), "difference": float(max(opencv))},
        "opencv_values_not_finite": not_finite,
    }


def main(args: Args):
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    files = sorted(args.data_dir.glob("*/recording.mp4"))
    if not files:
        raise SystemExit(f"{args.data_dir} holds no */recording.mp4, expected sessions. Name a folder: --data-dir DIR")
    rng = np.random.default_rng(args.seed)
    frames = read_frames(files, args.rounds + 1, rng)  # one more to warm up
    greys, masks = cut_templates(read_frames(files, 10, rng).numpy(), 10, rng)
    bank = make_bank([f"template {t}" for t in range(10)], greys, masks)

    def opencv_map(template, mask):
        template, mask = template.astype(np.float32), mask.astype(np.float32)
        return lambda frame: cv2.matchTemplate(frame, template, cv2.TM_CCOEFF_NORMED, mask=mask)

    opencv_maps = [opencv_map(*pair) for pair in zip(greys, masks, strict=True)]

    def opencv(number):
        for search in opencv_maps:
            cv2.minMaxLoc(search(frames[number].numpy()))

    def transforms(number):  # three products of spectra a template, without the products: what no FFT matcher can beat
        spectra = [torch.fft.rfft2(frames[number]) for _ in range(2)]
        for _ in range(3 * len(greys)):
            torch.fft.irfft2(spectra[0], s=frames.shape[1:])

    ways = {
        "OpenCV, masked": opencv,
        "match": lambda number: match(frames[number : number + 1], bank),
        "score_maps": lambda number: list(score_maps(frames[number : number + 1], bank)),
        "float32 transforms alone": transforms,
    }
    seconds = run_in_turn(ways, args.rounds)
    more = {"templates": len(greys), "frame": list(frames.shape[1:])}
    more |= agreement(frames[:4], bank, greys, masks, opencv_maps, rng)
    report("matching", seconds, 1, "frames", [("match", "OpenCV, masked", 3.5)], more)


if __name__ == "__main__":
    main(tyro.cli(Args))
