"""Does a policy press the same keys on the screen's own frames as on the recording of the same moments?

The real game is played by a scripted demonstrator through the recorder's own loop, which also keeps every raw frame it
hands to the encoder. The exported policy then sees both, with the rule that playing uses; torch, on the pixels that
training would have made of the recording, is the third.

    python benchmarks/raw_against_decoded.py --checkpoint runs/<run>

In: a run of iql_reflex.py and the installed game. Out: benchmarks/results/raw_against_decoded.json and one line.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import export_reflex  # noqa: E402
import play_reflex  # noqa: E402
import record_session  # noqa: E402
from common import runs  # noqa: E402
from common.video import ForwardReader, VideoReader, VideoWriter  # noqa: E402


@dataclass
class Args:
    checkpoint: Path
    """run folder of the policy, or a checkpoint in it"""
    demonstrator: Literal["skilled", "sloppy"] = "sloppy"
    """who plays"""
    seconds: float = 60.0
    """longest play of a level, above 0; a win ends it earlier"""
    seeds: tuple[int, ...] = (45, 46, 47)
    """of the levels and the demonstrator, one play each; the sample's sessions have others"""
    output: Path = ROOT / "benchmarks/results/raw_against_decoded.json"
    """the figures"""


def play(args: Args, seed: int, folder: Path) -> tuple[Path, np.ndarray]:
    """Record a session into `folder`. Returns it, and the raw frames (N, H, W, 3) that were handed to the encoder."""
    raw, shapes = open(folder / "raw", "wb"), []

    class KeepingWriter(VideoWriter):
        def add(self, picture, time_ns=None):
            raw.write(np.ascontiguousarray(picture))
            shapes.append(picture.shape)
            super().add(picture, time_ns)

    record_session.VideoWriter = KeepingWriter
    settings = dict(demonstrator=args.demonstrator, seed=seed, seconds=args.seconds)
    record_session.main(record_session.Args(output=folder, name="session", **settings))
    raw.close()
    return folder / "session", np.memmap(folder / "raw", np.uint8, "r", shape=(len(shapes), *shapes[0]))


def exported(model: Path, pictures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (N, K), keys held (N, K) and ms (N,) of the exported policy over `pictures`, one at a time."""
    policy = play_reflex.Policy(model)
    rule, rows = policy.decision_rule(play_reflex.Args(model=model)), []
    for picture in pictures:
        started = time.perf_counter()
        probability, _ = policy(picture)
        rule.step(probability)
        rows.append((probability, rule.active, 1000 * (time.perf_counter() - started)))
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


@torch.no_grad()
def in_training(args: Args, video: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same of torch, on the frames that training would have read."""
    path, script = export_reflex.find_files(export_reflex.Args(checkpoint=args.checkpoint))
    module = export_reflex.load_script(script)
    network, checkpoint = export_reflex.load_policy(module, script, path, export_reflex.Args())
    N, T = VideoReader(video).n_frames, module.CONTEXT
    frames = ForwardReader(video, checkpoint["image_size"]).read(0, N)  # (N, 3, S, S)
    rows = (torch.arange(N)[:, None] + torch.arange(1 - T, 1)).clamp(min=0)  # (N, T)
    stacks = [frames[some].flatten(1, 2) for some in rows.split(64)]
    probability = torch.cat([network(some)[0].sigmoid() for some in stacks]).numpy()  # (N, K)
    rule, held = play_reflex.DecisionRule(np.array(checkpoint["thresholds"])), []
    for row in probability:
        rule.step(row)
        held.append(rule.active)
    return probability, np.stack(held)


def compare(one: list, other: list, keys: list[str]) -> dict:
    """Of two policies' [probabilities, keys held, ...], (N, K) each."""
    distance, same = np.abs(one[0] - other[0]), one[1] == other[1]
    return {
        "frames_with_all_keys_equal": float(same.all(1).mean()),
        "keys_equal": {key: float(same[:, k].mean()) for k, key in enumerate(keys)},
        "probability_difference_mean": float(distance.mean()),
        "probability_difference_p99": float(np.percentile(distance, 99)),
        "probability_difference_max": float(distance.max()),
    }


def main(args: Args) -> dict:
    on_raw, on_decoded, in_torch, pixels, videos = [], [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "reflex.onnx"
        manifest = export_reflex.main(export_reflex.Args(checkpoint=args.checkpoint, output=model))
        keys, checkpoint = manifest["outputs"]["keys_logits"]["keys"], manifest["checkpoint"]
        for seed in args.seeds:
            folder = Path(name) / str(seed)
            folder.mkdir()
            session, raw = play(args, seed, folder)
            video = VideoReader(session / "recording.mp4")
            assert video.n_frames == len(raw), f"{video.n_frames} frames were recorded of {len(raw)}"
            on_raw.append(exported(model, raw))
            on_decoded.append(exported(model, play_reflex.read_pictures(video, np.arange(video.n_frames))))
            in_torch.append(in_training(args, session / "recording.mp4"))
            decoded = video.read(0, len(raw), 20).permute(0, 2, 3, 1).numpy()  # every 20th
            pixels += [np.abs(a - b.astype(int)).mean() for a, b in zip(raw[::20], decoded, strict=True)]
            videos.append(session / "recording.mp4")
            frame_size = f"{raw.shape[2]}x{raw.shape[1]}"
            del raw
            (folder / "raw").unlink()
        facts = runs.write_provenance(Path(name), videos)

    changes = np.concatenate([(held[1:] != held[:-1]).any(1) for _, held, _ in on_raw])
    on_raw, on_decoded, in_torch = (
        [np.concatenate(column) for column in zip(*parts, strict=True)] for parts in (on_raw, on_decoded, in_torch)
    )
    result = {
        "command": f"python benchmarks/raw_against_decoded.py --checkpoint runs/{checkpoint['run']} "
        f"--demonstrator {args.demonstrator} --seconds {args.seconds:g} --seeds {' '.join(map(str, args.seeds))}",
        "frames": len(on_raw[0]),
        "frame_size": frame_size,
        "frames_that_change_keys": float(changes.mean()),
        "raw_against_decoded": compare(on_raw, on_decoded, keys),
        "exported_against_torch_on_decoded": compare(on_decoded, in_torch, keys),
        "pixel_difference_mean": float(np.mean(pixels)),
        "ms_per_decision_on_raw": {"p50": float(np.median(on_raw[2])), "p95": float(np.percentile(on_raw[2], 95))},
        "checkpoint": checkpoint,
        "script": manifest["script"],
        "parity_at_export": manifest["parity"],
    } | {name: facts[name] for name in ("commit", "dirty", "python", "torch", "cpu_capability")}
    mine, theirs = result["raw_against_decoded"], result["exported_against_torch_on_decoded"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(args.output, result)
    print(
        f"{result['frames']:,} frames, keys change on {result['frames_that_change_keys']:.1%}. Raw against decoded: "
        f"all keys equal on {mine['frames_with_all_keys_equal']:.1%}, probabilities off by "
        f"{mine['probability_difference_mean']:.4f}, at most {mine['probability_difference_max']:.3f}. "
        f"Exported against torch on decoded: all keys equal on {theirs['frames_with_all_keys_equal']:.2%}"
    )
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
