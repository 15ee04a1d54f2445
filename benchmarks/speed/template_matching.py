"""Find SuperTux's sprites in recordings: `common.template_matching.find` beside OpenCV's masked matchTemplate.

    python -m benchmarks.speed.template_matching

Two sets of sprites: the two of a death, and all six that precompute_labels.py looks for. `find` is given some
frames of real sessions at once, as they come from the video; OpenCV takes them one by one. Labelling a session
from its video is compared with decoding it alone, at stride 1 and at the largest stride that finds the same events.
What `find` reports is compared with the float64 maps at full size, on frames around the events of the sessions. Writes
results/template_matching_deaths.json, template_matching.json and labelling.json.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import precompute_labels
from benchmarks.speed.paired import report, run_in_turn
from common.sessions import TRUTH, load_session, read_table
from common.template_matching import Bank, find, make_finder, score_maps
from common.video import VideoReader, grey, iter_frames
from session_labels.truth import TOLERANCE_S


@dataclass
class Args:
    data_dir: Path = Path("sample_dataset")
    """folder of sessions, all of one size"""
    rounds: int = 24
    """of each comparison"""
    frames: int = 8
    """that are searched in a round"""
    detections: int = 500
    """of the float64 maps, with which `find` is compared"""
    labelled: int = 2
    """sessions that are labelled and decoded, a round each"""
    seed: int = 1
    """chooses the frames"""


def read_frames(files: list[Path], count: int, rng) -> torch.Tensor:
    """Frames from anywhere in the recordings, grey: (count, H, W) float32."""
    readers = [VideoReader(file) for file in files]
    picks = [(readers[i % len(readers)], rng.random()) for i in range(count)]
    return grey(torch.cat([reader.read(i, i + 1) for reader, at in picks for i in [int(at * reader.n_frames)]]))


def part_of(bank: Bank, wanted: list[int]) -> Bank:
    """Some templates of a bank."""
    masks = [bank.masks[bank.mask_of[t]] for t in wanted]
    return Bank([bank.names[t] for t in wanted], [bank.templates[t] for t in wanted], masks, list(range(len(wanted))))


def opencv_search(bank: Bank):
    """A search for all templates of `bank` in one frame (H, W)."""
    import cv2

    pairs = [(t.numpy() * 100, bank.masks[m].numpy()) for t, m in zip(bank.templates, bank.mask_of, strict=True)]

    def search(frame: np.ndarray):
        for template, mask in pairs:
            cv2.minMaxLoc(cv2.matchTemplate(frame, template, cv2.TM_CCOEFF_NORMED, mask=mask))

    return search


def agreement(sessions: list[Path], sprites, count: int) -> dict:
    """How many of the places that score a sprite's threshold in the float64 maps `find` reports, and what it reports
    beside them; from frames around the true events, until `count` places are there."""
    found = missed = beside = frames = 0
    worst = 0.0
    for folder in sessions:
        session, reader = load_session(folder), VideoReader(folder / "recording.mp4")
        truth = read_table(folder / "truth.parquet", TRUTH).to_pylist()
        moments = [row["timestamp"] for row in truth if row["what"] in ("death", "squish")]
        first = np.searchsorted(session.timestamps, moments)
        wanted = sorted({i for f in first for i in range(f, f + 20) if i < reader.n_frames})
        for i in tqdm(wanted, desc=folder.name):
            frame = grey(reader.read(i, i + 1))
            (hits,) = find(frame, sprites.finder)
            frames += 1
            for t, scores in enumerate(score_maps(frame, sprites.finder.bank)):
                h, w = sprites.finder.bank.templates[t].shape
                places = [(scores[0, y, x].item(), t, y, x) for y, x in (scores[0] >= 0.85).nonzero().tolist()]
                places = precompute_labels.distinct(places, h / 2, w / 2)
                mine = [hit for hit in hits if hit[1] == t and hit[0] >= 0.85]
                found += len(places)
                beside += max(0, len(mine) - len(places))
                for score, _, y, x in places:
                    here = [hit[0] for hit in mine if abs(hit[2] - y) < h / 2 and abs(hit[3] - x) < w / 2]
                    missed += not here
                    worst = max([worst, *(score - other for other in here)])
            if found >= count:
                break
        if found >= count:
            break
    recall = 1 - missed / found if found else float("nan")
    facts = {"frames": frames, "detections_at_full_size": found, "recall": recall, "beside": beside}
    return facts | {"score_lower_by_at_most": worst}


def same_events(folder: Path, sprites, strides) -> tuple[set[int], dict]:
    """Those of `strides` that find the events of stride 1, each within precompute_labels.py's tolerance; the
    numbers of deaths and squished enemies."""
    session, reader = load_session(folder), VideoReader(folder / "recording.mp4")
    times = session.timestamps[: reader.n_frames]
    with tqdm(total=len(times), desc=folder.name) as bar:
        all_found = precompute_labels.find_detections(reader, sprites, len(times), 1, bar)

    def events(stride: int) -> dict:
        seen, options = [d for d in all_found if d.frame % stride == 0], precompute_labels.Args(event_stride=stride)
        found = {}
        for name in sprites.rules:
            found[name] = [f for f, _ in precompute_labels.sprite_events(options, name, seen, sprites, times)]
        return found

    def equal(a: dict, b: dict) -> bool:
        if any(len(a[name]) != len(b[name]) for name in a):
            return False
        late = {name: np.abs(times[a[name]] - times[b[name]]).max(initial=0) for name in a}  # ms
        return all(late[name] <= 1000 * TOLERANCE_S[name] for name in a)

    first = events(1)
    return {s for s in strides if equal(first, events(s))}, {name: len(those) for name, those in first.items()}


def main(args: Args):
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    files = sorted(args.data_dir.glob("*/recording.mp4"))
    if not files:
        raise SystemExit(f"{args.data_dir} holds no */recording.mp4, expected sessions. Name a folder: --data-dir DIR")
    sprites = precompute_labels.load_all_sprites(precompute_labels.Args(data_dir=args.data_dir))
    bank = sprites.finder.bank
    count = args.frames * (args.rounds + 1)  # one round more to warm up
    rounds = read_frames(files, count, np.random.default_rng(args.seed)).split(args.frames)
    folders = [file.parent for file in files]
    more = {"frames": list(rounds[0].shape), "agreement": agreement(folders, sprites, args.detections)}
    deaths = [t for t, event in enumerate(sprites.events) if event == "DEATH"]
    for name, wanted, least in (
        ("template_matching_deaths", deaths, 25),
        ("template_matching", list(range(len(bank.names))), 12),
    ):
        part = part_of(bank, wanted)
        coarse, full = (make_finder(part, [0.75] * len(wanted), factors) for factors in ((4, 2), ()))
        search = opencv_search(part)
        ways = {
            "OpenCV, masked": lambda n, search=search: [search(frame.numpy()) for frame in rounds[n]],
            "find": lambda n, coarse=coarse: find(rounds[n], coarse),
            "find at full size alone": lambda n, full=full: find(rounds[n], full),
        }
        looks = {look.factor: [part.names[t] for t in look.wanted] for look in coarse.looks}
        targets = [("find", "OpenCV, masked", least), ("find at full size alone", "OpenCV, masked", 4.5)]
        report(name, run_in_turn(ways, args.rounds), args.frames, "frames", targets, more | {"first_look": looks})

    sessions = folders[: args.labelled]
    strides = {folder: same_events(folder, sprites, (1, 2, 3, 4, 5)) for folder in sessions}
    stride = max(set.intersection(*(same for same, _ in strides.values())))

    def decode(n):
        for _ in iter_frames(VideoReader(sessions[n % len(sessions)] / "recording.mp4")):
            pass

    def label(n, stride=1):
        reader = VideoReader(sessions[n % len(sessions)] / "recording.mp4")
        bar = tqdm(total=reader.n_frames, disable=True)
        precompute_labels.find_detections(reader, sprites, reader.n_frames, stride, bar)

    ways = {"decode": decode, "label": label, f"label, stride {stride}": lambda n: label(n, stride)}
    n_frames = np.mean([VideoReader(folder / "recording.mp4").n_frames for folder in sessions])
    targets = [("label", "decode", 0.12), (f"label, stride {stride}", "decode", 0.35)]
    more = {"events": {folder.name: facts for folder, (_, facts) in strides.items()}}
    report("labelling", run_in_turn(ways, 3 * len(sessions)), float(n_frames), "frames", targets, more)


if __name__ == "__main__":
    main(tyro.cli(Args))
