"""Masked zero-mean normalised cross-correlation (ZNCC) of sprites with video frames, by real FFT.

For a template T with a binary mask M of n pixels, T' = M (T - mean of T under M), and the frame I around a position:

    score = sum(I T') / (|T'| sqrt(n) deviation),   deviation^2 = sum(M I^2) / n - (sum(M I) / n)^2

Three correlations with the frame, each a product of spectra. The FFT is as large as the frame: positions where the
template lies fully inside the frame never wrap around, and only these are returned. Facts: masked matching separates
the death sprite (0.92 or more against 0.75 or less at half scale), unmasked matching does not.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FLAT = 1.0  # deviation under the mask, in grey levels, below which the score is 0 by definition
FRAMES_AT_ONCE = {"cpu": 1, "cuda": 32}  # one frame stays in a CPU's cache; a GPU wants more work at once


@dataclass
class Bank:
    """T templates ready to match; `spectra` keeps their transforms per frame size and device."""

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


def score_maps(frames: torch.Tensor, bank: Bank) -> Iterator[torch.Tensor]:
    """The scores of `frames` (N, H, W) float32 0..255 at every position: T maps (N, H-h+1, W-w+1) float32 in [-1, 1].

    Row y, column x of a map is the template's top left corner. Raises ValueError where a template exceeds the frame.
    """
    H, W = frames.shape[-2:]
    for name, template in zip(bank.names, bank.templates, strict=True):
        h, w = template.shape
        if h > H or w > W:
            raise ValueError(f"{name} is {w}x{h} pixels, larger than the {W}x{H} frame. Use a smaller scale.")
    if (H, W, frames.device) not in bank.spectra:
        bank.spectra[H, W, frames.device] = (
            [torch.fft.rfft2(t.to(frames.device), s=(H, W)).conj_physical() for t in bank.templates],
            [torch.fft.rfft2(m.to(frames.device).double(), s=(H, W)).conj_physical() for m in bank.masks],
        )
    template_spectra, mask_spectra = bank.spectra[H, W, frames.device]

    def correlate(frame_spectrum, other_spectrum):
        return torch.fft.irfft2(frame_spectrum * other_spectrum, s=(H, W))[:, : H - h + 1, : W - w + 1]

    # A variance is a small difference of large sums: in float32 it is off by half near one grey level, so float64.
    image = frames.double()
    spectrum, spectrum_of_square = torch.fft.rfft2(image), torch.fft.rfft2(image.square())  # (N, H, W // 2 + 1)
    spectrum32 = spectrum.to(torch.complex64)
    scales = {}  # per mask 1 / (sqrt(n) deviation), 0 where flat
    for template, template_spectrum, m in zip(bank.templates, template_spectra, bank.mask_of, strict=True):
        h, w = template.shape
        if m not in scales:
            n = float(bank.masks[m].sum())
            mean = correlate(spectrum, mask_spectra[m]) / n
            variance = correlate(spectrum_of_square, mask_spectra[m]) / n - mean * mean
            scales[m] = torch.where(variance > FLAT**2, (variance * n).rsqrt(), 0).float()
        yield (correlate(spectrum32, template_spectrum) * scales[m]).clamp_(-1, 1)


def match(frames: torch.Tensor, bank: Bank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best position of every template in every frame of `frames` (N, H, W) float32 0..255.

    Returns score (N, T) float32 in [-1, 1], y (N, T) and x (N, T) int64 of the template's top left corner.
    """
    N, T = len(frames), len(bank.names)
    score = torch.zeros(N, T, device=frames.device)
    y, x = (torch.zeros(N, T, dtype=torch.int64, device=frames.device) for _ in range(2))
    step = FRAMES_AT_ONCE.get(frames.device.type, 1)
    for i in range(0, N, step):
        for t, scores in enumerate(score_maps(frames[i : i + step], bank)):
            score[i : i + step, t], best = scores.flatten(1).max(dim=1)
            y[i : i + step, t], x[i : i + step, t] = best // scores.shape[2], best % scores.shape[2]
    return score, y, x
