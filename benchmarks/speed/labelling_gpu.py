"""Labelling on a GPU: decoding beside the CPU's, the search of frames in its memory, and both together.

    python -m benchmarks.speed.labelling_gpu

The search takes ten templates at full size, the six of precompute_labels.py and four of these a quarter larger. Its
share of the bound is the bytes that its transforms, products and scores have to read and write at least, by its time,
against what copying a large tensor moves in the same time. The clock is the wall's, with one synchronisation a round.
Writes results/cuda_decode.json, cuda_search.json and cuda_labelling.json.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import precompute_labels
from benchmarks.speed.paired import report, run_in_turn
from benchmarks.speed.template_matching import part_of
from common.template_matching import Finder, find, make_finder
from common.video import VideoReader, grey, iter_frames

TEMPLATES = 10


@dataclass
class Args:
    data_dir: Path = Path("sample_dataset")
    """folder of sessions, all of one size"""
    device: str = "cuda"
    """cuda[:n]; cpu to try the script"""
    sessions: int = 2
    """that are decoded and labelled, a round each"""
    frames: int = 512
    """that lie in memory and are searched in a round"""
    rounds: int = 7
    """of each comparison"""


def pixels_apart(file: Path, device: torch.device) -> dict[str, float]:
    """Grey levels between what the CPU and the device decode."""
    reader, levels = VideoReader(file, device), []
    for indices, frames in iter_frames(VideoReader(file), stride=10):
        mine = reader.read(indices.start, indices[-1] + 1, 10).cpu()
        levels.append((mine.int() - frames).abs().flatten())
    levels = torch.cat(levels).float()
    return {
        "mean": levels.mean().item(),
        "share_above_2": (levels > 2).float().mean().item(),
        "most": levels.max().item(),
    }


def least_bytes(finder: Finder, height: int, width: int) -> float:
    """What a search at full size reads and writes for one frame: each transform a plane twice in and out, each product
    three planes, each score the correlation and the deviation in, each deviation two planes in and one out."""
    (look,) = finder.looks
    n_templates, n_masks = len(look.wanted), len(look.bank.masks)
    inverse = n_templates + 2 * n_masks
    planes = 4 * (2 + inverse) + 3 * inverse + 2 * n_templates + 3 * n_masks
    return planes * 4.0 * height * width


def main(args: Args):
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device. --device cpu tries the script without one")
    torch.set_num_threads(1)
    files = sorted(args.data_dir.glob("*/recording.mp4"))[: args.sessions]
    if not files:
        raise SystemExit(f"{args.data_dir} holds no */recording.mp4, expected sessions. Name a folder: --data-dir DIR")
    if fallback := VideoReader(files[0], device).fallback:
        raise SystemExit(f"{device} does not decode {files[0]}: {fallback}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sprites = precompute_labels.load_all_sprites(precompute_labels.Args(data_dir=args.data_dir))

    def wall() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    # Decoding
    def decode(on) -> None:
        for file in files:
            for _ in iter_frames(VideoReader(file, on)):
                pass

    def label() -> None:
        for file in files:
            reader = VideoReader(file, device)
            bar = tqdm(total=reader.n_frames, disable=True)
            precompute_labels.find_detections(reader, sprites, reader.n_frames, 1, bar)

    n_frames = sum(VideoReader(file).n_frames for file in files)
    ways = {"decode on the CPU": lambda _: decode("cpu"), "decode on the device": lambda _: decode(device)}
    more = {"device": name, "clock": "wall", "grey_levels_from_the_cpu": pixels_apart(files[0], device)}
    report(f"{device.type}_decode", run_in_turn(ways, args.rounds, clock=wall), n_frames, "frames", [], more)

    # Search
    larger = precompute_labels.load_all_sprites(precompute_labels.Args(data_dir=args.data_dir), (1.0, 1.25))
    ten = part_of(larger.finder.bank, list(range(len(larger.names)))[:TEMPLATES])
    finder = make_finder(ten, [0.75] * len(ten.names), ())
    reader = VideoReader(files[0], device)
    frames = torch.cat([grey(frames) for _, frames in iter_frames(reader, stop=args.frames)])  # (N, H, W)
    large = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    ways = {"copy": lambda _: large.clone(), "find at full size": lambda _: find(frames, finder)}
    seconds = run_in_turn(ways, args.rounds, clock=wall)
    rate, copied = (sorted(seconds[way])[args.rounds // 2] for way in ("find at full size", "copy"))
    rate, bandwidth = len(frames) / rate, 2 * 4 * large.numel() / copied
    more = {"device": name, "clock": "wall", "templates": ten.names, "frames_per_second": rate, "aim": 5000}
    more |= {"bytes_per_second_of_a_copy": bandwidth}
    more |= {"share_of_the_bound": rate * least_bytes(finder, *frames.shape[1:]) / bandwidth}
    report(f"{device.type}_search", seconds, len(frames), "frames", [], more)

    # Labelling
    ways = {"decode on the device": lambda _: decode(device), "label": lambda _: label()}
    targets = [("label", "decode on the device", 0.8)]
    more = {"device": name, "clock": "wall"}
    report(f"{device.type}_labelling", run_in_turn(ways, args.rounds, clock=wall), n_frames, "frames", targets, more)


if __name__ == "__main__":
    main(tyro.cli(Args))
