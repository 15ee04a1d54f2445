"""Video files to tensors and back. Frames are uint8 RGB, (N, 3, H, W) as tensors, (H, W, 3) as single pictures.

Decoding is sequential, by torchcodec, or by PyAV (whose wheel carries its own FFmpeg) where torchcodec does not import
because FFmpeg's libraries are missing. Both give the same pixels; `VIDEO_BACKEND=torchcodec|pyav` decides by hand. A
GPU, by torchcodec alone, gives pixels some grey levels off. Random access costs a keyframe interval per jump, so read
forwards.
"""

import os
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

CHUNK_BYTES = 16 * 2**20  # above this, fresh memory is mapped and page-faulted for every chunk: half the speed


@cache
def video_backend() -> str:
    """`torchcodec`, or `pyav` where torchcodec cannot be imported."""
    wanted = os.environ.get("VIDEO_BACKEND", "")
    if wanted not in ("", "torchcodec", "pyav"):
        raise ValueError(f"VIDEO_BACKEND is {wanted!r}, expected torchcodec, pyav, or nothing at all")
    if wanted == "pyav":
        return "pyav"
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        if wanted == "torchcodec":
            raise ImportError(
                f"torchcodec does not import: {str(error).strip().splitlines()[0]}. It needs FFmpeg's libraries "
                "(apt-get install ffmpeg); without VIDEO_BACKEND set, PyAV decodes instead."
            ) from error
        return "pyav"
    return "torchcodec"


class VideoReader:
    """Frames of one file by number, on `device`. `n_frames` counts those that can be decoded: a file that was cut off
    has fewer than were recorded. Where `device` cannot decode, the CPU does, and `fallback` says why. Raises ValueError
    naming a file that is no video or has no frame."""

    def __init__(self, path: Path | str, device: torch.device | str = "cpu"):
        self.path, self.device = Path(path), torch.device(device)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing. Record the session again, or remove its folder.")
        try:
            self._source = (_TorchcodecSource if video_backend() == "torchcodec" else _PyAVSource)(self.path)
        except (RuntimeError, ValueError, av.FFmpegError) as error:
            raise ValueError(
                f"{self.path} ({self.path.stat().st_size:,} bytes) cannot be opened as a video: "
                f"{str(error).strip().splitlines()[0]}. It is cut off or of another kind; remove the session's folder."
            ) from None
        self.height, self.width, self.n_frames = self._source.height, self._source.width, self._source.n_frames
        while self.n_frames and not self._decodes(self.n_frames - 1):  # the last packets of a cut file
            self.n_frames -= 1
        if self.n_frames == 0:
            raise ValueError(f"{self.path} has no frame that can be decoded. Remove the session's folder.")
        self.fallback = "" if self.device.type == "cpu" else self._decode_on_device()

    def _decode_on_device(self) -> str:
        """Have the device decode from here on, or tell why it cannot. torchcodec itself falls back silently, and gets
        the colours of yuv444p wrong then (its issue 1414)."""
        if video_backend() != "torchcodec":
            return "PyAV decodes on the CPU alone"
        try:
            source = _TorchcodecSource(self.path, self.device)
        except (RuntimeError, ValueError) as error:  # a torchcodec without CUDA, or a device that no decoder knows
            return f"torchcodec has no decoder for {self.device}: {str(error).strip().splitlines()[0]}"
        if source.decoder.cpu_fallback:
            return str(source.decoder.cpu_fallback)
        self._source = source
        return ""

    def _decodes(self, index: int) -> bool:
        try:
            return len(self._source.read(index, index + 1, 1)) == 1
        except (RuntimeError, IndexError, av.FFmpegError):
            return False

    def read(self, start: int, stop: int, stride: int = 1) -> torch.Tensor:
        """Frames start, start + stride, ... below stop: uint8 (n, 3, H, W) on `device`."""
        if not 0 <= start < stop <= self.n_frames:
            raise IndexError(f"{self.path}: frames {start} to {stop} asked for, it has {self.n_frames}")
        try:
            return self._source.read(start, stop, stride).to(self.device)
        except (RuntimeError, av.FFmpegError) as error:
            raise ValueError(f"{self.path}: frames {start} to {stop} do not decode: {error}") from None


class _TorchcodecSource:
    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        from torchcodec.decoders import VideoDecoder

        self.decoder = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1, device=device)
        self.n_frames = len(self.decoder)
        self.height, self.width = self.decoder.metadata.height, self.decoder.metadata.width

    def read(self, start: int, stop: int, stride: int) -> torch.Tensor:
        return self.decoder.get_frames_in_range(start, stop, stride).data


class _PyAVSource:
    def __init__(self, path: Path):
        self.container = av.open(str(path))
        if not self.container.streams.video:
            raise ValueError("it has no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type, self.stream.thread_count = "NONE", 1  # as torchcodec: the caller decides on threads
        self.pts = sorted(packet.pts for packet in self.container.demux(self.stream) if packet.pts is not None)
        self.n_frames = len(self.pts)
        self.height, self.width = self.stream.height, self.stream.width
        self._seek(0)

    def _seek(self, index: int):
        self.container.seek(self.pts[index], stream=self.stream, backward=True)
        self.decoded = self.container.decode(self.stream)
        self.position = None  # of the next frame; known after the first one

    def read(self, start: int, stop: int, stride: int) -> torch.Tensor:
        if self.position is None or not self.position <= start < self.position + 64:
            self._seek(start)
        wanted, frames = set(self.pts[start:stop:stride]), []
        while self.position is None or self.position < stop:
            frame = next(self.decoded, None)
            if frame is None:
                raise RuntimeError(f"the video ends before frame {stop}")
            self.position = self.pts.index(frame.pts, self.position or 0) + 1
            if frame.pts in wanted:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
        return torch.stack(frames).permute(0, 3, 1, 2)  # (n, 3, H, W)


def iter_frames(
    path: Path | str, start: int = 0, stop: int | None = None, stride: int = 1, size: int | None = None
) -> Iterator[tuple[range, torch.Tensor]]:
    """Decode forwards in chunks: frame numbers (n) and pixels, uint8 (n, 3, H, W) on the reader's device, resized to
    `size` if given."""
    reader = path if isinstance(path, VideoReader) else VideoReader(path)
    stop = reader.n_frames if stop is None else min(stop, reader.n_frames)
    chunk = stride * max(1, CHUNK_BYTES // (3 * reader.height * reader.width))
    for first in range(start, stop, chunk):
        last = min(first + chunk, stop)
        frames = reader.read(first, last, stride)
        yield range(first, last, stride), frames if size is None else resize(frames, size, size)


class ForwardReader:
    """Resized frames of one file, read forwards; remembers those of the last call, as the next stack needs them."""

    def __init__(self, path: Path | str, size: int):
        self.path, self.size, self.reader = path, size, None
        self.first, self.frames = 0, torch.empty((0, 3, size, size), dtype=torch.uint8)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Frames [start, stop): uint8 (stop - start, 3, size, size)."""
        self.reader = self.reader or VideoReader(self.path)
        kept = self.frames[start - self.first :] if start >= self.first else self.frames[:0]
        fresh = [frames for _, frames in iter_frames(self.reader, start + len(kept), stop, size=self.size)]
        self.first, self.frames = start, torch.cat([kept, *fresh])[: stop - start]
        return self.frames


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The one resize of labels, training, evaluation and the exported graph: antialiased bilinear, rounded half up to
    whole grey levels twice, after the width and after the height. uint8 (N, 3, H, W) -> uint8 (N, 3, height, width).

    Only antialiased resizes agree with each other. On the CPU it is integer arithmetic (weights of 16 bits): the same
    bits for any batch and number of threads, and several times faster than float32. Elsewhere, and in the exported
    graph, float32 takes the same steps; up to 1 % of the pixels differ, by one level (benchmarks/speed/decode.py).
    """
    if frames.shape[-2:] == (height, width):
        return frames
    if frames.device.type == "cpu":
        return F.interpolate(frames, (height, width), mode="bilinear", antialias=True).contiguous()
    for size in ((frames.shape[2], width), (height, width)):
        resized = F.interpolate(frames.float(), size, mode="bilinear", antialias=True)
        frames = (resized + 0.5).clamp_(0, 255).to(torch.uint8)
    return frames


def grey(frames: torch.Tensor) -> torch.Tensor:
    """BT.601 luma: uint8 (N, 3, H, W) -> float32 (N, H, W) in 0..255."""
    luma = frames[:, 0].float().mul_(0.299)
    return luma.add_(frames[:, 1], alpha=0.587).add_(frames[:, 2], alpha=0.114)


class VideoWriter:
    """H.264 in a fragmented mp4: yuv420p, a keyframe every second, no B-frames.

    Fragments of 0.25 s and a lookahead of 0.3 s bound what a kill can lose to 0.8 s, or two pictures below 4 fps. Odd
    sizes lose their last row or column, as yuv420p needs even ones.
    """

    def __init__(self, path: Path | str, fps: float, width: int, height: int, crf: int = 27, preset: str = "fast"):
        options = {"crf": str(crf), "preset": preset, "g": str(max(1, round(fps))), "bf": "0"}
        options |= {"rc-lookahead": str(int(0.3 * fps))}
        fragments = {
            "movflags": "frag_keyframe+empty_moov+default_base_moof",
            "frag_duration": "250000",
        }  # microseconds
        self.container = av.open(str(path), "w", format="mp4", options=fragments | {"flush_packets": "1"})
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        self.stream.codec_context.thread_type = "SLICE"  # frame threads hold pictures back
        self.stream.codec_context.thread_count = 1 if width * height <= 2**20 else min(4, os.cpu_count() or 1)
        self.stream.codec_context.time_base = Fraction(1, 1000)
        self.fps, self.count, self.last_ms = fps, 0, -1

    def add(self, picture: np.ndarray, time_ns: int | None = None):
        """Append a picture, uint8 (H, W, 3) RGB, shown `time_ns` after the first one; None spaces evenly at `fps`."""
        height, width = self.stream.height, self.stream.width
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        time_ms = round(self.count * 1000 / self.fps) if time_ns is None else time_ns // 1_000_000
        self.last_ms = max(time_ms, self.last_ms + 1)
        frame.pts, frame.time_base = self.last_ms, Fraction(1, 1000)
        self.container.mux(self.stream.encode(frame))
        self.count += 1

    def close(self):
        self.container.mux(self.stream.encode(None))
        self.container.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_):
        self.close()


def draw_keys(picture: np.ndarray, keys: list[str], rows: dict[str, np.ndarray], note: str) -> np.ndarray:
    """The picture (H, W, 3) above a strip with one line of key caps per entry of `rows` (K,) bool, lit where down."""
    H, W = picture.shape[0], max(picture.shape[1], 60 + 90 * len(keys))
    canvas = Image.new("RGB", (W, H + 22 * len(rows) + 26), "black")
    canvas.paste(Image.fromarray(picture))
    draw, cap = ImageDraw.Draw(canvas), (W - 60) // len(keys)
    for line, (name, down) in enumerate(rows.items()):
        y = H + 4 + 22 * line
        draw.text((4, y + 3), name, "white")
        for k, key in enumerate(keys):
            x, lit = 58 + k * cap, "#3fb950" if line == 0 else "#58a6ff"
            draw.rectangle((x, y, x + cap - 4, y + 18), lit if down[k] else "#21262d", "#484f58")
            draw.text((x + 5, y + 3), key.removeprefix("KEY_"), "black" if down[k] else "#8b949e")
    draw.text((4, H + 6 + 22 * len(rows)), note, "white")
    return np.asarray(canvas)
