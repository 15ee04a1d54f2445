"""Masked zero-mean normalised cross-correlation (ZNCC) of sprites with video frames, by real FFT.

For a template T with a binary mask M of n pixels, T' = M (T - mean of T under M), and the frame I around a position:

    score = sum(I T') / (|T'| sqrt(n) deviation),   deviation^2 = sum(M I^2) / n - (sum(M I) / n)^2

Three correlations with the frame, each a product of spectra. The FFT is as large as the frame, or a little larger where
that is faster: positions where the template lies fully inside the frame never wrap around, and only these are returned.
Facts: masked matching separates the death sprite (0.92 or more against 0.75 or less at half scale), unmasked does not.

`find` goes from coarse to fine: a template is searched in frames of a quarter or half of the size, as far as it stays
recognisable, and only places that look like it are compared again, closer, in float64 at full size.

The variance is a small difference of large sums: in float32 the score is wrong by some hundredths near one grey
level of deviation. `score_maps` therefore takes float64, and `find` leaves to float32 what that cannot spoil: which
positions are in question.
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

FIND_VERSION = 1  # raise it with a change of what `find` gives: recordings are searched again
FLAT = 1.0  # deviation under the mask, in grey levels, below which the score is 0 by definition
VARIANCE_ERROR = 0.1  # of float32, in squared grey levels; at most 0.05 on frames made to be difficult
SCORE_ERROR = 1e-3  # of float32 with the right variance; at most 1e-4 there
FRAMES_AT_ONCE = 32  # that `find` makes smaller, and a GPU searches, at once
FACTORS = (4, 2)  # by which frames are made smaller for the first look, powers of two
RECOGNISABLE = 0.6  # score of a small template with itself, at the worst of places, from which a first look is worth it
NEAR = 0.95  # times that score: from there on a closer look decides
CELLS = 24  # opaque pixels that a small template has at least
SHARED = 0.8  # of their opaque pixels that templates have in common at least to be looked for with one mask
AROUND = 2  # pixels around a place of a smaller frame that a closer look compares
CACHED_PIXELS = 2**18  # of frames that are looked at together on a CPU: more leave its cache
WINDOW_PIXELS = 4 * 2**20  # that it compares at once

# glibc hands freed memory back and fetches it again page by page, for every frame: a third of the time of a search at
# full size. Once a block of this size was freed, it keeps smaller ones (mallopt(3), M_MMAP_THRESHOLD).
torch.empty(31 * 2**20, dtype=torch.uint8)


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
            raise ValueError(f"{name}: no pixel has an alpha high enough, so nothing can match. Leave this file out.")
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


def load_sprites(paths: list[Path] | Path | str, scale: float = 0.5, mirror: bool = False, alpha: float = 0.5) -> Bank:
    """A bank from RGBA png files, or from all png files of a folder. Grey is BT.601.

    `scale`: size of a sprite in the searched frames; 0.5, for frames of half the recorded size, costs a quarter of 1
    and still separates deaths. `mirror` adds each sprite looking the other way. Pixels more opaque than `alpha` count.
    """
    if isinstance(paths, (str, Path)):
        folder, paths = Path(paths), sorted(Path(paths).glob("*.png"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no png file, expected sprites. Name the folder that has them.")
    names, greys, masks = [], [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                image = image.convert("RGBA")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} is no picture that can be read ({error}). Put a whole png file there") from None
        w, h = math.ceil(image.width * scale), math.ceil(image.height * scale)
        exact = (0, 0, w / scale, h / scale)  # what is scaled to w, h: the image, and less than a pixel beside it
        canvas = Image.new("RGBA", (math.ceil(exact[2]), math.ceil(exact[3])))
        canvas.paste(image)
        rgba = np.asarray(canvas.resize((w, h), Image.BILINEAR, exact))  # (h, w, 4), antialiased like the frames
        grey, mask = rgba[..., :3] @ np.array([0.299, 0.587, 0.114]), rgba[..., 3] > 255 * alpha  # (h, w) each
        names, greys, masks = names + [str(path)], greys + [grey], masks + [mask]
        if mirror:
            names, greys, masks = names + [f"{path} mirrored"], greys + [grey[:, ::-1]], masks + [mask[:, ::-1]]
    return make_bank(names, greys, masks)


def join(*banks: Bank) -> Bank:
    """All templates of `banks` as one bank."""
    joined = Bank([], [], [], [])
    for bank in banks:
        joined.mask_of += [len(joined.masks) + m for m in bank.mask_of]
        joined.masks += bank.masks
        joined.names += bank.names
        joined.templates += bank.templates
    return joined


def check_sizes(bank: Bank, H: int, W: int):
    """Raise ValueError naming a template that is larger than a frame of (H, W)."""
    for name, (h, w) in zip(bank.names, (template.shape for template in bank.templates), strict=True):
        if h > H or w > W:
            raise ValueError(f"{name} is {w}x{h} pixels, larger than the {W}x{H} frame. Use a smaller scale.")


def centre(frames: torch.Tensor) -> torch.Tensor:
    """`frames` (N, H, W) less the mean of each: no score depends on it, but rounding does."""
    return frames - frames.mean((1, 2), keepdim=True)


def _spectrum(pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """As `torch.fft.rfft2(pictures, s=size)`; on a CPU with columns in one piece, which the inverse needs first."""
    return torch.fft.fft(torch.fft.rfft(pictures, n=size[1], dim=-1), n=size[0], dim=-2)


def _correlations(
    image: torch.Tensor, bank: Bank, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each template and a centred `image` (N, H, W): sum(I T') / sqrt(n), float32, deviation^2 and sum(M I) / n,
    both `dtype`, (N, H-h+1, W-w+1) each."""
    H, W = image.shape[-2:]
    check_sizes(bank, H, W)
    size = next_fast_len(H, real=True), next_fast_len(W, real=True)  # 599x797 takes five times as long as 600x800
    key = (*size, image.device, dtype)
    if key not in bank.spectra:
        templates = [t / bank.masks[m].sum().sqrt() for t, m in zip(bank.templates, bank.mask_of, strict=True)]
        masks = [mask.to(dtype) / mask.sum() for mask in bank.masks]
        bank.spectra[key] = [
            [_spectrum(picture.to(image.device), size).conj_physical() for picture in pictures]
            for pictures in (templates, masks)
        ]
    template_spectra, mask_spectra = bank.spectra[key]
    image = image.to(dtype)
    spectrum, spectrum_of_square = _spectrum(image, size), _spectrum(image.square(), size)
    spectrum32 = spectrum.to(torch.complex64)  # (N, size[0], size[1] // 2 + 1)
    statistics = {}  # per mask
    for t, m in enumerate(bank.mask_of):
        h, w = bank.templates[t].shape

        def correlate(frame_spectrum, other_spectrum, h=h, w=w):
            columns = torch.fft.ifft(frame_spectrum * other_spectrum, dim=1)[:, : H - h + 1]
            return torch.fft.irfft(columns, n=size[1], dim=2)[:, :, : W - w + 1]

        if m not in statistics:
            mean = correlate(spectrum, mask_spectra[m])
            statistics[m] = correlate(spectrum_of_square, mask_spectra[m]).addcmul_(mean, mean, value=-1), mean
        yield correlate(spectrum32, template_spectra[t]), *statistics[m]


def score_maps(frames: torch.Tensor, bank: Bank) -> Iterator[torch.Tensor]:
    """The scores of `frames` (N, H, W) float32 0..255 at every position: T maps (N, H-h+1, W-w+1) float32 in [-1, 1].

    Row y, column x of a map is the template's top left corner. Raises ValueError where a template exceeds the frame.
    """
    for correlation, variance, _ in _correlations(centre(frames), bank, torch.float64):
        scale = F.threshold(variance, FLAT**2, math.inf).float().rsqrt_()  # 0 where flat
        yield (correlation * scale).clamp_(-1, 1)


@dataclass
class Look:
    """The first look for W templates of a bank in frames made smaller by `factor`."""

    factor: int
    wanted: list[int] = field(default_factory=list)  # W indices into that bank
    bank: Bank = field(default_factory=lambda: Bank([], [], [], []))  # the templates made smaller
    near: list[float] = field(default_factory=list)  # W scores from which a closer look decides
    beside: list[torch.Tensor] = field(default_factory=list)  # W times (R, 2) y, x: opaque, but not in a shared mask


@dataclass
class Finder:
    """T templates ready to be found from coarse to fine."""

    bank: Bank
    looks: list[Look]
    stacks: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # by factor: templates and masks (T, h, w)
    # float64, filled up with 0 to the largest, and their sizes (T, 2)
    near: dict[int, torch.Tensor]  # by factor: (T,) scores from which a closer look decides; at 1, what counts


def shrink(template: torch.Tensor, mask: torch.Tensor, factor: int, rim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A template and its mask (h, w) made smaller by `factor`, of the cells whose pixels are all opaque, and `rim` or
    more pixels inside: a small sprite is mostly rim, and cells that are half background resemble anything."""
    if min(mask.shape) < factor:
        return torch.zeros(1, 1), torch.zeros(1, 1)
    inside = 1 - F.max_pool2d(F.pad(1 - mask[None], (rim,) * 4, value=1), 2 * rim + 1, 1)
    inside = F.avg_pool2d(inside, factor)[0] == 1
    cells = F.avg_pool2d(template[None], factor)[0]
    cells = torch.where(inside, cells - (cells[inside].mean() if inside.any() else 0), 0)
    return cells / cells.norm().clamp(min=1e-12), inside.float()


def worst_self_score(
    template: torch.Tensor, mask: torch.Tensor, small: torch.Tensor, cells: torch.Tensor, factor: int
) -> float:
    """The score of `small` with its mask `cells` where a frame made smaller by `factor` shows `template` with its
    `mask`: at the best position, for the worst place of the template between cells, on a dark, an even and a light
    ground."""
    if cells.sum() < CELLS:
        return 0.0
    template = template * (50 / template[mask > 0].std())  # grey levels, as FLAT
    scenes = []
    for ground in (-150.0, 0.0, 150.0):
        picture = torch.where(mask > 0, template, ground)[None]
        for y in range(factor):
            for x in range(factor):
                sides = (factor + x, 2 * factor - x, factor + y, 2 * factor - y)
                scenes.append(F.avg_pool2d(F.pad(picture, sides, value=ground), factor))
    scores = next(score_maps(torch.cat(scenes), Bank(["small"], [small], [cells], [0])))  # (3 factor^2, ., .)
    return scores.flatten(1).amax(1).min().item()


def shrink_alike(those: list[tuple], mask: torch.Tensor, factor: int) -> tuple[list[tuple], list[float]]:
    """Templates and masks `those` made smaller, all with the pixels of `mask`, and what they score themselves at worst;
    without their rim, if they are more like themselves without."""
    ways = []
    for rim in (0, 1):
        small = [shrink(template, mask, factor, rim) for template, _ in those]
        pairs = zip(those, small, strict=True)
        ways.append((small, [worst_self_score(*large, *pair, factor) for large, pair in pairs]))
    return max(ways, key=lambda way: min(way[1]))


def share_masks(masks: list[torch.Tensor]) -> list[list[int]]:
    """Which of T `masks` (h, w) are nearly the same: groups of indices."""
    groups: list[list[int]] = []
    for t, mask in enumerate(masks):
        for group in groups:
            alike = [masks[k] for k in group] + [mask]
            if mask.shape == alike[0].shape:
                shared = torch.stack(alike).prod(0).sum()
                if all(shared >= SHARED * other.sum() for other in alike):
                    group.append(t)
                    break
        else:
            groups.append([t])
    return groups


def make_finder(bank: Bank, least: np.ndarray | list[float], factors: tuple[int, ...] = FACTORS) -> Finder:
    """How to find the T templates of `bank` wherever they score `least` (T,) or more. Each is first looked for in
    frames made smaller by the first of `factors` in which it stays recognisable, else at full size."""
    full = [(template, bank.masks[m]) for template, m in zip(bank.templates, bank.mask_of, strict=True)]
    pairs, near = {1: full}, {1: torch.as_tensor(least, dtype=torch.float32)}
    for factor in factors:
        alone = [shrink_alike([pair], pair[1], factor) for pair in full]
        pairs[factor] = [small[0] for small, _ in alone]
        near[factor] = torch.minimum(NEAR * torch.tensor([score[0] for _, score in alone]), near[1])
    looks = {factor: Look(factor) for factor in (*factors, 1)}
    for group in share_masks([mask for _, mask in full]):
        shared = torch.stack([full[t][1] for t in group]).prod(0)
        for factor in factors:
            small, scores = shrink_alike([full[t] for t in group], shared, factor)
            if min(scores) >= RECOGNISABLE:
                near_here = [min(NEAR * score, near[1][t].item()) for t, score in zip(group, scores, strict=True)]
                look, those = looks[factor], [(*pair, score) for pair, score in zip(small, near_here, strict=True)]
                beside = [torch.zeros(0, 2, dtype=torch.int64)] * len(group)
                break
        else:
            # summed over pixels, a frame varies less under a part of a mask, so that no place is missed
            look, those = looks[1], [(full[t][0], shared, near[1][t].item() - SCORE_ERROR) for t in group]
            beside = [(full[t][1] > shared).nonzero() for t in group]
        look.beside += beside
        for t, (template, mask, score) in zip(group, those, strict=True):
            m = next((m for m, known in enumerate(look.bank.masks) if torch.equal(mask, known)), len(look.bank.masks))
            look.bank.masks += [mask] if m == len(look.bank.masks) else []
            look.bank.names.append(bank.names[t])
            look.bank.templates.append(template)
            look.bank.mask_of.append(m)
            look.wanted.append(t)
            look.near.append(score)
    stacks = {}
    for factor, those in pairs.items():
        h, w = (max(template.shape[i] for template, _ in those) for i in (0, 1))
        filled = [[F.pad(p, (0, w - p.shape[1], 0, h - p.shape[0])).double() for p in pair] for pair in those]
        templates, masks = (torch.stack(part) for part in zip(*filled, strict=True))
        stacks[factor] = templates, masks, torch.tensor([template.shape for template, _ in those])
    return Finder(bank, [look for look in looks.values() if look.wanted], stacks, near)


def first_look(frames: torch.Tensor, look: Look) -> torch.Tensor:
    """Where `frames` (N, H, W) of the look's size may show one of its templates: (K, 4) int64 of frame, template of the
    bank, y, x."""
    at_once = max(1, CACHED_PIXELS // frames[:1].numel()) if frames.device.type == "cpu" else len(frames)
    if len(frames) > at_once:
        parts = [first_look(some, look) for some in frames.split(at_once)]
        for n, part in enumerate(parts):
            part[:, 0] += n * at_once
        return torch.cat(parts)
    (H, W), deviations, places = frames.shape[1:], {}, []  # per mask; per template
    image = centre(frames)
    maps = _correlations(image, look.bank, torch.float32)
    for i, (correlation, variance, mean) in enumerate(maps):
        m = look.bank.mask_of[i]
        if m not in deviations:
            deviations[m] = (variance - VARIANCE_ERROR).clamp_(min=FLAT**2).sqrt_()
        above = torch.sub(correlation, deviations[m], alpha=look.near[i])
        n, y = (above.amax(2) >= 0).nonzero().unbind(1)  # few rows: a search of all positions takes longer
        row, x = (above[n, y] >= 0).nonzero().unbind(1)
        n, y = n[row], y[row]
        r, count = look.beside[i].to(frames.device), look.bank.masks[m].sum()  # (R, 2), ()
        if 0 < len(n) * len(r) <= WINDOW_PIXELS:  # the deviation under the template's own mask; more go on as they are
            first = (n * H + y) * W + x
            pixels = image.take(first[:, None] + r[:, 0] * W + r[:, 1])  # (K, R)
            spread = pixels.square().mean(1) - pixels.mean(1).square()  # (K,)
            apart = pixels.mean(1) - mean[n, y, x]
            whole = variance[n, y, x] + len(r) * (spread / count + apart.square() / (count + len(r)))
            near = correlation[n, y, x] >= look.near[i] * (whole - VARIANCE_ERROR).clamp_(min=FLAT**2).sqrt_()
            n, y, x = n[near], y[near], x[near]
        places.append(torch.stack([n, torch.full_like(n, look.wanted[i]), y, x], 1))
    return torch.cat(places)


def closer_look(
    frames: torch.Tensor, places: torch.Tensor, stack: tuple, around: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best positions of `frames` (N, H, W) float32 within `around` pixels of `places` (K, 4), which are frame,
    template, y, x; `stack` as in a Finder. Scores (K,) float64, -1 where all would lie outside, and the positions."""
    templates, masks, sizes = (part.to(frames.device) for part in stack)
    if not len(places):
        return places.new_zeros(0, dtype=torch.float64), places
    (H, W), side = frames.shape[1:], 2 * around + 1
    h, w = sizes[places[:, 1]].amax(0).tolist()
    at_once = max(1, WINDOW_PIXELS // (side**2 * h * w))
    if len(places) > at_once:
        parts = [closer_look(frames, part, stack, around) for part in places.split(at_once)]
        return torch.cat([scores for scores, _ in parts]), torch.cat([best for _, best in parts])
    n, t, y, x = places.T
    steps = torch.arange(-around, around + 1, device=frames.device)
    rows = (y[:, None] + torch.arange(-around, h + around, device=frames.device)).clamp_(0, H - 1)
    columns = (x[:, None] + torch.arange(-around, w + around, device=frames.device)).clamp_(0, W - 1)
    crops = frames[n[:, None, None], rows[:, :, None], columns[:, None]].double()  # (K, h + 2 around, w + 2 around)
    crops = crops - crops.mean((1, 2), keepdim=True)
    template, mask = templates[t, :h, :w], masks[t, :h, :w]  # (K, h, w) each
    count = mask.sum((1, 2))[:, None]  # (K, 1)

    def correlate(pixels, weights):  # (K, side^2)
        if around == 0:
            return (pixels * weights).sum((1, 2))[:, None]  # many times as fast as conv2d
        return F.conv2d(pixels[None], weights[:, None], groups=len(places))[0].flatten(1)

    mean = correlate(crops, mask) / count
    correlation, variance = correlate(crops, template), correlate(crops.square(), mask) / count - mean.square()
    score = correlation / (count * variance.clamp(min=FLAT**2)).sqrt()
    score = torch.where(variance > FLAT**2, score, 0.0).clamp(-1, 1)
    top, left = (y[:, None] + steps)[:, :, None], (x[:, None] + steps)[:, None]  # (K, side, 1), (K, 1, side)
    last = (torch.tensor([H, W], device=frames.device) - sizes[t])[:, :, None, None]  # (K, 2, 1, 1)
    inside = (top >= 0) & (top <= last[:, 0]) & (left >= 0) & (left <= last[:, 1])
    score, best = torch.where(inside.flatten(1), score, -1.0).max(1)
    return score, torch.stack([n, t, y + steps[best // side], x + steps[best % side]], 1)


def halve(frames: torch.Tensor) -> torch.Tensor:
    """Means of 2x2 pixels of `frames` (N, H, W), whose last row or column stands for a missing one."""
    odd = frames.shape[2] % 2, frames.shape[1] % 2
    if any(odd):
        frames = F.pad(frames[:, None], (0, odd[0], 0, odd[1]), mode="replicate")[:, 0]
    rows = frames[:, 0::2] + frames[:, 1::2]  # three times as fast as avg_pool2d
    return (rows[:, :, 0::2] + rows[:, :, 1::2]).mul_(0.25)


def distinct(hits: list[tuple], height: float, width: float) -> list[tuple]:
    """Of `hits` (score, template, y, x) that are closer than `height` and `width`, the best; best first."""
    kept: list[tuple] = []
    for hit in sorted(hits, reverse=True):
        if all(abs(hit[2] - k[2]) >= height or abs(hit[3] - k[3]) >= width for k in kept):
            kept.append(hit)
    return kept


def find(frames: torch.Tensor, finder: Finder) -> list[list[tuple[float, int, int, int]]]:
    """Where each of `frames` (N, H, W) float32 0..255 shows the finder's templates: N lists of (score, template, y, x),
    y, x the top left corner; of one template's places that overlap by more than a half the best. Best first."""
    check_sizes(finder.bank, *frames.shape[1:])
    hits: list[list] = [[] for _ in frames]
    for i in range(0, len(frames), FRAMES_AT_ONCE):
        sizes, last = {1: frames[i : i + FRAMES_AT_ONCE]}, 1
        for factor in sorted(finder.stacks)[1:]:
            sizes[factor] = sizes[last]
            while last < factor:
                sizes[factor], last = halve(sizes[factor]), 2 * last
        for look in finder.looks:
            places, coarse = first_look(sizes[look.factor], look), look.factor
            for factor in sorted((f for f in finder.stacks if f < coarse), reverse=True) or [1]:
                places[:, 2:] *= coarse // factor
                around = AROUND if factor < coarse else 0
                scores, places = closer_look(sizes[factor], places.unique(dim=0), finder.stacks[factor], around)
                near = scores >= finder.near[factor].to(scores)[places[:, 1]]
                scores, places, coarse = scores[near], places[near], factor
            for score, (n, *hit) in zip(scores.float().tolist(), places.tolist(), strict=True):
                hits[i + n].append((score, *hit))
    for n, those in enumerate(hits):
        best = []
        for t in {hit[1] for hit in those}:
            h, w = finder.bank.templates[t].shape
            best += distinct([hit for hit in those if hit[1] == t], h / 2, w / 2)
        hits[n] = sorted(best, reverse=True)
    return hits
