"""Decode a recording to 224x224 RGB: `common.video.iter_frames` beside what decoding costs at all and beside OpenCV.

    python -m benchmarks.speed.decode

The sessions of --data-dir are joined to one file. `ffmpeg -f null` decodes and throws away, on one thread: the limit.
OpenCV reads and resizes with INTER_AREA, its only way to shrink without aliasing. Writes results/decode.json.
"""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from benchmarks.speed.paired import report, run_in_turn
from common import video
from common.video import VideoReader, iter_frames, resize

SIZE = 224


@dataclass
class Args:
    data_dir: Path = Path("sample_dataset")
    """folder of sessions with recording.mp4, all of one size"""
    sessions: int = 5
    """how many of them, in order of their names"""
    rounds: int = 7
    """how often each way decodes all frames"""


def float32_resize(frames: torch.Tensor) -> torch.Tensor:
    """What `resize` would cost in float32, rounded once."""
    resized = [
        F.interpolate(f.contiguous().float(), (SIZE, SIZE), mode="bilinear", antialias=True) for f in frames.split(1)
    ]
    return torch.cat(resized).round_().clamp_(0, 255).to(torch.uint8)


def two_steps(frames: torch.Tensor) -> torch.Tensor:
    """`resize` as a GPU and the exported graph do it: in float32, rounded half up after the width and the height."""
    for size in ((frames.shape[2], SIZE), (SIZE, SIZE)):
        frames = (F.interpolate(frames.float(), size, mode="bilinear", antialias=True) + 0.5).floor().clamp(0, 255)
    return frames.to(torch.uint8)


def difference(frames: torch.Tensor, other) -> dict[str, float]:
    """Of `resize` and `other`, in grey levels."""
    levels = (resize(frames, SIZE, SIZE).int() - other(frames)).abs()
    return {"share_of_pixels": (levels > 0).float().mean().item(), "most_levels": levels.max().item()}


def main(args: Args):
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    files = sorted(args.data_dir.glob("*/recording.mp4"))[: args.sessions]
    if not files:
        raise SystemExit(f"{args.data_dir} holds no */recording.mp4, expected sessions. Name a folder: --data-dir DIR")
    with tempfile.TemporaryDirectory() as folder:
        joined, parts = Path(folder) / "joined.mp4", Path(folder) / "parts.txt"
        parts.write_text("".join(f"file '{file.resolve()}'\n" for file in files))
        ffmpeg = ["ffmpeg", "-v", "error", "-f", "concat", "-safe", "0", "-i", str(parts), "-c", "copy", str(joined)]
        subprocess.run(ffmpeg, check=True)
        n_frames = VideoReader(joined).n_frames

        def null(_):
            command = ["ffmpeg", "-v", "quiet", "-threads", "1", "-i", str(joined), "-fps_mode", "passthrough"]
            subprocess.run([*command, "-f", "null", "-"], check=True)

        def ours(backend: str, size: int | None = SIZE, then=None):
            def way(_):
                os.environ["VIDEO_BACKEND"] = backend
                video.video_backend.cache_clear()
                count = 0
                for _, frames in iter_frames(joined, size=size):
                    count += len(frames if then is None else then(frames))
                assert count == n_frames, f"{backend} gave {count} of {n_frames} frames"

            return way

        def opencv(interpolation: int):
            def way(_):
                capture = cv2.VideoCapture(str(joined), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
                count = 0
                while True:
                    there, picture = capture.read()
                    if not there:
                        break
                    cv2.resize(picture, (SIZE, SIZE), interpolation=interpolation)
                    count += 1
                assert count == n_frames, f"OpenCV gave {count} of {n_frames} frames"

            return way

        ways = {
            "ffmpeg null": null,
            "iter_frames, torchcodec": ours("torchcodec"),
            "iter_frames, PyAV": ours("pyav"),
            "torchcodec, not resized": ours("torchcodec", None),
            "torchcodec, float32 resize": ours("torchcodec", None, float32_resize),
            "OpenCV INTER_AREA": opencv(cv2.INTER_AREA),
            "OpenCV INTER_LINEAR (aliased)": opencv(cv2.INTER_LINEAR),
        }
        seconds = run_in_turn(ways, args.rounds)
        frames = torch.cat([frames[::40] for _, frames in iter_frames(joined, stop=2000, stride=4)])
    targets = [
        ("iter_frames, torchcodec", "ffmpeg null", 0.5),
        ("iter_frames, torchcodec", "OpenCV INTER_AREA", 2.0),
    ]
    more = {
        "frames": n_frames,
        "resize_against_float32_in_two_steps": difference(frames, two_steps),
        "resize_against_float32_rounded_once": difference(frames, float32_resize),
    }
    report("decode", seconds, n_frames, "frames", targets, more)


if __name__ == "__main__":
    main(tyro.cli(Args))
