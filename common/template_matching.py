"""Masked zero-mean normalised cross-correlation (ZNCC) of sprites with video frames, by real FFT.

For a template T with a binary mask M of n pixels, T' = M (T - mean of T under M), and the frame I around a position:

    score = sum(I T') / (|T'| sqrt(n) deviation),   deviation^2 = sum(M I^2) / n - (sum(M I) / n)^2

Three correlations with the frame, each a product of spectra. The FFT is as large as the frame, or a little larger where
that is faster: positions where the template lies fully inside the frame never wrap around, and only these are returned.
Facts: masked matching separates the death sprite (0.92 or more against 0.75 or less at half scale), unmasked does not.

The variance is a small difference of large sums: in float32 the score is wrong by some hundredths near one grey
level of deviation. `score_maps` therefore takes float64. `match` needs the best position only: it finds the positions
that float32 cannot rule out, on most frames a handful, and computes these from their pixels in float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.fft import next_fast_len

FLAT = 1.0  # deviation under the mask, in grey levels, below which the score is 0 by definition
VARIANCE_ERROR = 0.1  # of float32, in squared grey levels; at most 0.03 on frames made to be difficult
SCORE_ERROR = 1e-3  # of float32 with the right variance; at most 1e-4 there
MAX_CANDIDATES = 128  # positions; more, as on a flat frame, cost less as a float64 map
FRAMES_AT_ONCE = 32  # on a GPU; on a CPU one by one, which stays in its cache


@dataclass
class Bank:
    """T templates ready to match; `spectra` keeps their transforms per frame size, device and precision."""

    names: list[str]
    templates: list[torch.Tensor]  # T x (h, w) float32, zero mean and unit norm under the mask, 0 outside
    masks: list[torch.Tensor]  # the different masks, each (h, w) float32 of 0 and 1
    mask_of: list[int]  # T indices into `masks`: templates with equal masks share two of three correlations
    spectra: dict = field(default_factory=dict)


def make_bank(names: list[str], greys: list[np.ndarray], masks: list[np.ndarray]) -> Bank:
    """A bank from T `greys` (h, w) in 0..255 and T `masks` (h, w) bool. Raises ValueError naming a useless template."""
    bank = Bank(list(names), [], [], [])
    for name, grey, mask in zip(names, greys, masks, strict=True):
        if not mask.any():
            raise ValueError(f"{name}: no pixel has an alpha above 0.5, so nothing can match. Leave this file out.")
        opaque = grey[mask].astype(np.float64)  # (n,)
        if opaque.std() < 1:
            raise ValueError(
                f"{name}: the standard deviation of its {opaque.size} opaque pixels is {opaque.std():.2f} grey levels, "
                "expected 1 or more: a flat picture matches nothing. Leave this file out."
            )
        template = np.zeros(mask.shape, np.float32)
        template[mask] = (opaque - opaque.mean()) / (opaque.std() * math.sqrt(opaque.size))
        mask = torch.from_numpy(mask.astype(np.float32))
        m = next((m for m, known in enumerate(bank.masks) if torch.equal(mask, known)), len(bank.masks))
        if m == len(bank.masks):
            bank.masks.append(mask)
        bank.templates.append(torch.from_numpy(template))
        bank.mask_of.append(m)
    return bank


def load_sprites(paths: list[Path] | Path | str, scale: float = 0.5, mirror: bool = False) -> Bank:
    """A bank from RGBA png files, or from all png files of a folder. Grey is BT.601.

    `scale`: size of a sprite in the searched frames; 0.5, for frames of half the recorded size, costs a quarter of 1
    and still separates deaths. `mirror` adds each sprite looking the other way.
    """
    if isinstance(paths, (str, Path)):
        folder, paths = Path(paths), sorted(Path(paths).glob("*.png"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no png file, expected sprites. Name the folder that has them.")
    names, greys, masks = [], [], []
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGBA")
        w, h = math.ceil(image.width * scale), math.ceil(image.height * scale)
        canvas = Image.new("RGBA", (round(w / scale), round(h / scale)))  # so that an odd size is scaled exactly, too
        canvas.paste(image)
        rgba = np.asarray(canvas.resize((w, h), Image.BILINEAR))  # (h, w, 4), antialiased like the frames
        grey, mask = rgba[..., :3] @ np.array([0.299, 0.587, 0.114]), rgba[..., 3] > 127  # (h, w) each
        names, greys, masks = names + [str(path)], greys + [grey], masks + [mask]
        if mirror:
            names, greys, masks = names + [f"{path} mirrored"], greys + [grey[:, ::-1]], masks + [mask[:, ::-1]]
    return make_bank(names, greys, masks)


def _correlations(
    frames: torch.Tensor, bank: Bank, wanted: list[int] | range, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each `wanted` template sum(I T') / sqrt(n), float32, and deviation^2, `dtype`: (N, H-h+1, W-w+1) each."""
    H, W = frames.shape[-2:]
    for name, template in zip(bank.names, bank.templates, strict=True):
        h, w = template.shape
        if h > H or w > W:
            raise ValueError(f"{name} is {w}x{h} pixels, larger than the {W}x{H} frame. Use a smaller scale.")
    size = next_fast_len(H, real=True), next_fast_len(W, real=True)  # 599x797 takes five times as long as 600x800
    key = (*size, frames.device, dtype)
    if key not in bank.spectra:
        templates = [t / bank.masks[m].sum().sqrt() for t, m in zip(bank.templates, bank.mask_of, strict=True)]
        masks = [mask.to(dtype) / mask.sum() for mask in bank.masks]
        bank.spectra[key] = [
            [torch.fft.rfft2(picture.to(frames.device), s=size).conj_physical() for picture in pictures]
            for pictures in (templates, masks)
        ]
    template_spectra, mask_spectra = bank.spectra[key]
    image = (frames - frames.mean((1, 2), keepdim=True)).to(dtype)  # no result depends on the level, but rounding does
    spectrum, spectrum_of_square = torch.fft.rfft2(image, s=size), torch.fft.rfft2(image.square(), s=size)
    spectrum32 = spectrum.to(torch.complex64)  # (N, size[0], size[1] // 2 + 1)
    variances = {}  # per mask
    for t in wanted:
        m, (h, w) = bank.mask_of[t], bank.templates[t].shape

        def correlate(frame_spectrum, other_spectrum, h=h, w=w):
            columns = torch.fft.ifft(frame_spectrum * other_spectrum, dim=1)[:, : H - h + 1]
            return torch.fft.irfft(columns, n=size[1], dim=2)[:, :, : W - w + 1]

        if m not in variances:
            mean = correlate(spectrum, mask_spectra[m])
            variances[m] = correlate(spectrum_of_square, mask_spectra[m]) - mean.square_()
        yield correlate(spectrum32, template_spectra[t]), variances[m]


def _scores(correlation: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    scale = F.threshold(variance, FLAT**2, math.inf).float().rsqrt_()  # 0 where flat
    return (correlation * scale).clamp_(-1, 1)


def score_maps(frames: torch.Tensor, bank: Bank) -> Iterator[torch.Tensor]:
    """The scores of `frames` (N, H, W) float32 0..255 at every position: T maps (N, H-h+1, W-w+1) float32 in [-1, 1].

    Row y, column x of a map is the template's top left corner. Raises ValueError where a template exceeds the frame.
    """
    for correlation, variance in _correlations(frames, bank, range(len(bank.names)), torch.float64):
        yield _scores(correlation, variance)


def exact_score(frame: np.ndarray, template: np.ndarray, mask: np.ndarray, y: int, x: int) -> float:
    """The score at one position of `frame` (H, W) in float64. `template`, `mask` (h, w) as in a Bank, `mask` bool."""
    h, w = template.shape
    pixels = frame[y : y + h, x : x + w][mask].astype(np.float64)  # (n,)
    pixels -= pixels.mean()
    norm = math.sqrt(pixels @ pixels)  # sqrt(n) deviation
    return pixels @ template[mask] / norm if norm > FLAT * math.sqrt(len(pixels)) else 0.0


def _best_of_few(frame: np.ndarray, template: np.ndarray, mask: np.ndarray, correlation, variance):
    """Score, y and x of the best position, from float32 maps (H-h+1, W-w+1); None where too many are in question."""
    variance = F.threshold(variance, FLAT**2 - VARIANCE_ERROR, math.inf).sub_(VARIANCE_ERROR).clamp_(min=FLAT**2)
    upper = (correlation + SCORE_ERROR).mul_(variance.rsqrt_())  # no positive score is higher than this
    per_row = upper.amax(1)  # (H-h+1,)
    y = int(per_row.argmax())
    least = exact_score(frame, template, mask, y, int(upper[y].argmax()))  # the best score is not lower than this
    rows = (per_row >= least).nonzero().flatten()
    candidates = [(y, x) for y in rows.tolist() for x in (upper[y] >= least).nonzero().flatten().tolist()]
    if least <= 0 or len(candidates) > MAX_CANDIDATES:
        return None
    scores = [exact_score(frame, template, mask, y, x) for y, x in candidates]
    best = int(np.argmax(scores))  # the first of equals
    return scores[best], *candidates[best]


def match(frames: torch.Tensor, bank: Bank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best position of every template in every frame of `frames` (N, H, W) float32 0..255, the first of equals.

    Returns score (N, T) float32 in [-1, 1], y (N, T) and x (N, T) int64 of the template's top left corner.
    """
    N, T = len(frames), len(bank.names)
    score = torch.zeros(N, T, device=frames.device)
    y, x = (torch.zeros(N, T, dtype=torch.int64, device=frames.device) for _ in range(2))
    on_cpu = frames.device.type == "cpu"
    step = 1 if on_cpu else FRAMES_AT_ONCE
    templates = [(bank.templates[t].numpy(), bank.masks[m].numpy() > 0) for t, m in enumerate(bank.mask_of)]
    for i in range(0, N, step):
        undecided = list(range(T))
        if on_cpu:
            maps = _correlations(frames[i : i + 1], bank, range(T), torch.float32)
            for t, (correlation, variance) in enumerate(maps):
                best = _best_of_few(frames[i].numpy(), *templates[t], correlation[0], variance[0])
                if best is not None:
                    score[i, t], y[i, t], x[i, t] = best
                    undecided.remove(t)
        if undecided:
            maps = _correlations(frames[i : i + step], bank, undecided, torch.float64)
            for t, (correlation, variance) in zip(undecided, maps, strict=True):
                scores = _scores(correlation, variance)
                score[i : i + step, t], best = scores.flatten(1).max(dim=1)
                y[i : i + step, t], x[i : i + step, t] = best // scores.shape[2], best % scores.shape[2]
    return score.clamp_(-1, 1), y, x
