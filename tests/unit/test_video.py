"""Video: what is written comes back, by number, resized alike, cut off or not. Runs with either backend."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import video
from common.video import ForwardReader, VideoReader, VideoWriter, grey, iter_frames, resize

REPOSITORY = Path(__file__).parents[2]


def picture(i: int, height=48, width=64) -> np.ndarray:
    """A picture whose left column of blocks spells the number i in binary, so that decoding can be checked exactly."""
    image = np.full((height, width, 3), 60, np.uint8)
    for bit in range(6):
        image[bit * 8 : bit * 8 + 8, :32] = 230 if i >> bit & 1 else 20
    return image


def number(frame: torch.Tensor) -> int:
    return sum(int(frame[0, bit * 8 + 4, 16] > 128) << bit for bit in range(6))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "recording.mp4"
    with VideoWriter(path, 10, 64, 48, crf=18) as writer:
        for i in range(60):
            writer.add(picture(i), i * 100_000_000 + (i % 3) * 7_000_000)  # uneven times, as in a real recording
    return path


def test_every_frame_comes_back_under_its_number(path):
    reader = VideoReader(path)
    assert (reader.n_frames, reader.height, reader.width) == (60, 48, 64)
    assert [number(frame) for _, frames in iter_frames(path) for frame in frames] == list(range(60))


def test_reading_by_range_backwards_and_with_stride(path):
    reader = VideoReader(path)
    for start, stop, stride in [(40, 43, 1), (3, 6, 1), (59, 60, 1), (0, 60, 7), (10, 12, 5), (30, 60, 10), (0, 1, 1)]:
        frames = reader.read(start, stop, stride)
        assert frames.dtype == torch.uint8 and frames.shape[1:] == (3, 48, 64)
        assert [number(frame) for frame in frames] == list(range(start, stop, stride))
    with pytest.raises(IndexError, match="it has 60"):
        reader.read(50, 61)


def test_chunks_cover_every_frame_once(path, monkeypatch):
    monkeypatch.setattr(video, "CHUNK_BYTES", 7 * 3 * 48 * 64)
    numbers = [
        i for indices, frames in iter_frames(path, 5, 50, stride=2) for i in indices if len(indices) == len(frames)
    ]
    assert numbers == list(range(5, 50, 2))
    decoded = [number(frame) for _, frames in iter_frames(path, 5, 50, stride=2) for frame in frames]
    assert decoded == numbers


def test_forward_reader_equals_reading_afresh(path):
    reader = ForwardReader(path, 32)
    for start, stop in [(0, 10), (8, 18), (16, 20), (30, 40), (38, 39), (2, 5)]:
        assert torch.equal(reader.read(start, stop), resize(VideoReader(path).read(start, stop), 32, 32))


def test_a_cut_file_gives_the_frames_it_has(path, tmp_path):
    data, counts = path.read_bytes(), []
    pictures = [match.end() for match in re.finditer(b"mdat", data)]  # a fragment's head is written in one piece
    for part in (0.35, 0.6, 0.9):
        cut = tmp_path / f"{part}.mp4"
        cut.write_bytes(data[: pictures[int(len(pictures) * part)] + 40])
        reader = VideoReader(cut)
        counts.append(reader.n_frames)
        assert [number(f) for _, frames in iter_frames(reader) for f in frames] == list(range(reader.n_frames))
    assert 0 < counts[0] < counts[1] < counts[2] < 60


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 4096])
def test_what_is_no_video_is_named(tmp_path, content):
    (tmp_path / "recording.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="recording.mp4 .* cannot be opened"):
        VideoReader(tmp_path / "recording.mp4")
    with pytest.raises(FileNotFoundError, match="is missing"):
        VideoReader(tmp_path / "none.mp4")


def fixed_point_bilinear(line: list[int], size: int) -> list[int]:
    """One line of pixels, antialiased: a triangle as wide as two output pixels, weights of 16 bits, rounded half up."""
    scale = len(line) / size
    support = max(scale, 1.0)
    weights = []
    for i in range(size):
        centre = (i + 0.5) * scale
        near = range(max(0, int(centre - support + 0.5)), min(len(line), int(centre + support + 0.5)))
        row = {j: max(0.0, 1 - abs((j + 0.5 - centre) / support)) for j in near}
        weights.append({j: weight / sum(row.values()) for j, weight in row.items()})
    largest, bits = max(max(row.values()) for row in weights), 0
    while int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    sums = [sum(line[j] * int(0.5 + weight * 2**bits) for j, weight in row.items()) for row in weights]
    return [min(255, (s + 2 ** (bits - 1)) >> bits) for s in sums]


@pytest.mark.parametrize("size", [(20, 30), (24, 32), (7, 64), (48, 9), (60, 90)])
def test_resize_equals_integer_arithmetic_bit_for_bit(size):
    """Width first, then height, written out; the frames in both memory formats."""
    frame = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)
    wide = np.array([fixed_point_bilinear(line, size[1]) for line in frame.tolist()])
    expected = np.array([fixed_point_bilinear(line, size[0]) for line in wide.T.tolist()]).T
    frames = torch.from_numpy(frame).expand(2, 3, 48, 64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        resized = resize(frames.contiguous(memory_format=memory_format), *size)
        assert resized.shape == (2, 3, *size) and resized.dtype == torch.uint8 and resized.is_contiguous()
        assert (resized.numpy() == expected).all()


def test_resize_is_the_antialiased_one_and_does_not_depend_on_the_batch(path):
    frames = VideoReader(path).read(0, 8)
    whole = resize(frames, 20, 30)
    expected = F.interpolate(frames.float(), (20, 30), mode="bilinear", antialias=True)
    assert (whole - expected).abs().max() <= 1.01
    assert torch.equal(whole[3:4], resize(frames[3:4], 20, 30))
    assert torch.equal(resize(frames, 48, 64), frames)


def test_a_device_that_cannot_decode_gets_what_the_cpu_decodes(path):
    """`meta` stands for one that no decoder knows: its tensors have shapes alone."""
    reader = VideoReader(path, "meta")
    assert re.search("no decoder for meta|PyAV", reader.fallback)
    assert reader.n_frames == 60 and VideoReader(path).fallback == ""
    ((_, frames),) = iter_frames(reader, size=24)
    assert frames.device.type == "meta" and frames.shape == (60, 3, 24, 24) and frames.dtype == torch.uint8


@pytest.mark.skipif(video.video_backend() != "torchcodec", reason="PyAV has no GPU decoder")
@pytest.mark.parametrize("why", ["", "NVCUVID not available"])
def test_a_decoder_that_falls_back_silently_is_not_used(path, why, monkeypatch):
    """torchcodec on a GPU that cannot decode the file, in the place of a GPU: `cpu_fallback` tells."""
    decoders = importlib.import_module("torchcodec.decoders")
    real, made = decoders.VideoDecoder, []

    def on_a_gpu(source, device, **options):
        decoder = real(source, **options)
        if torch.device(device).type == "cuda":
            made.append(decoder)
            monkeypatch.setattr(real, "cpu_fallback", why)
        return decoder

    monkeypatch.setattr(decoders, "VideoDecoder", on_a_gpu)
    reader = VideoReader(path, "cuda")
    assert len(made) == 1 and reader.fallback == why
    assert (reader._source.decoder is made[0]) == (why == "")


@pytest.mark.gpu
@pytest.mark.parametrize("session", ["heldout_1", "heldout_2"])
def test_the_gpu_decodes_to_nearly_the_same_pixels(session):
    """Real sessions. torchcodec compares its own two decoders with a tolerance of two levels."""
    file = REPOSITORY / "sample_dataset" / session / "recording.mp4"
    reader, on_cpu = VideoReader(file, "cuda"), VideoReader(file)
    if reader.fallback:
        pytest.skip(reader.fallback)
    assert reader.n_frames == on_cpu.n_frames
    for indices, expected in iter_frames(on_cpu, stride=10):
        frames = reader.read(indices.start, indices[-1] + 1, 10)
        assert frames.device.type == "cuda"
        levels = (frames.cpu().int() - expected).abs().float()
        assert levels.mean() < 0.5 and (levels <= 2).float().mean() > 0.99


@pytest.mark.gpu
def test_resize_on_the_gpu_is_one_level_from_the_cpu(path):
    frames = VideoReader(path).read(0, 8)
    difference = (resize(frames.cuda(), 20, 30).cpu().int() - resize(frames, 20, 30)).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.02


def test_grey_is_bt601():
    frames = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    assert grey(frames[..., None, None]).flatten().tolist() == pytest.approx([76.245, 149.685, 29.07, 255], abs=1e-3)


def test_odd_sizes_lose_a_row_and_a_column(tmp_path):
    with VideoWriter(tmp_path / "odd.mp4", 10, 65, 49) as writer:
        for i in range(12):
            writer.add(picture(i, 49, 65))
    reader = VideoReader(tmp_path / "odd.mp4")
    assert (reader.n_frames, reader.height, reader.width) == (12, 48, 64)
