"""How far the player of a side-scroller came, told by how far the picture has scrolled.

The camera's step from one frame to the next is found by phase correlation (Kuglin & Hines 1975) of small frames, in
bands of rows that vote. Tiles of a level repeat, a background moves by a fixed share of the step, and what belongs to
the screen stands still: the steps are chosen for the recording as a whole, as pitch trackers do to avoid octave errors.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from common.sessions import EPISODES, PROGRESS, TRUTH, Session, read_table, write_table
from common.video import VideoReader, grey, iter_frames, resize
from session_labels.files import metadata_of, recording_of

SPRITE = 32  # pixels, the width of a sprite as drawn
CELL = (4, 2)  # the small frames have every fourth row of the recording, and half its width
BANDS = 6  # of rows, each votes on its own
RATE = 10  # frames a second that are looked at, up to twice as many: in less time a background parts too little
REACH = 1 / 6  # of the picture's width: the largest step, 107 pixels of 640
CHANCE = 4.0  # times 1 / sqrt(cells of a band): height of a peak from which its vote begins to count
CLEAR = 0.2  # height of a peak whose vote counts in full
STILL = 0.2  # what votes for no motion count: HUD, player and blocks that the codec skipped do not scroll
BEHIND = 1.15  # what votes for a background count: it is to be seen all over the picture, the level often is not
TURN, TURN_AT_MOST = 0.1, 1.5  # votes that it costs to change the step by one cell, and at most
SHARES = np.arange(0.1, 0.61, 0.05)  # of the camera's step by which a background may move
FAR = 8  # cells: smaller steps do not tell a background from the level
LINKED = 0.4  # bands more than at most shares that have to see a background
LOST = 0.15  # confidence below which a frame does not go on from the one before: a cut, a black picture

# N frames, D steps in x from -reach to reach, in cells


def spectra(frames: torch.Tensor) -> torch.Tensor:
    """Fourier transforms of the windowed bands of `frames` uint8 (N, 3, H, W): (N, BANDS, h, w / 2 + 1) complex."""
    height, width = frames.shape[2] // CELL[0], frames.shape[3] // CELL[1]
    if height < 4 * BANDS or width < 32:
        raise ValueError(
            f"a picture of {frames.shape[3]}x{frames.shape[2]} is too small to see it scroll, expected "
            f"{32 * CELL[1]}x{4 * BANDS * CELL[0]} or more. Leave --progress-reward at 0"
        )
    rows = frames[:, :, : height * CELL[0] : CELL[0]]
    small = grey(resize(rows, height, width))
    h, w = height // BANDS, width // 16 * 16  # lengths that transform fast
    bands = small[:, : BANDS * h, :w].reshape(-1, BANDS, h, w)
    window = torch.hann_window(h, periodic=False)[:, None] * torch.hann_window(w, periodic=False)
    return torch.fft.rfft2((bands - bands.mean((2, 3), keepdim=True)) * window.to(bands.device))


def correlate(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Phase correlation of two `spectra`, (N, BANDS, 2 h // 3 + 1, D), with no motion in its middle."""
    h, w = before.shape[2], 2 * (before.shape[3] - 1)
    rows, columns = (torch.arange(-n, n + 1, device=before.device) for n in (h // 3, int(w * REACH)))
    rows_back = torch.fft.ifft(torch.sgn(before * after.conj()), dim=2)[:, :, rows % h]  # only those that are wanted
    return torch.fft.irfft(rows_back, n=w, dim=3)[..., columns % w]


@dataclass
class Votes:
    """What the bands say of the step from the frame before, for each of N frames."""

    bands: np.ndarray  # (N, D) how many bands see the step, at any dy
    height: np.ndarray  # (N, D) of the bands' sum, at the best dy
    dy: np.ndarray  # (N, D) that dy, cells


def count_votes(chunks: Iterable[tuple[range, torch.Tensor]], bar: tqdm) -> Votes:
    """Votes of the frames of `iter_frames`; there is none of the first one."""
    parts, last = [], None
    for indices, frames in chunks:
        now = spectra(frames)
        last = torch.zeros_like(now[:1]) if last is None else last
        surface = correlate(torch.cat([last, now[:-1]]), now)
        chance = CHANCE / (now.shape[2] * 2 * (now.shape[3] - 1)) ** 0.5
        bands = ((surface.amax(2) - chance) / max(CLEAR - chance, chance)).clamp(0, 1).sum(1)
        height, row = surface.sum(1).max(1)
        parts.append([part.cpu().numpy() for part in (bands, height, (row - surface.shape[2] // 2).short())])
        last = now[-1:]
        bar.update(indices.stop - bar.n)
    return Votes(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def shares_of(share: float, n_steps: int) -> np.ndarray:
    """For each of D steps the index of the step that is `share` of it."""
    reach = n_steps // 2
    return np.rint(share * np.arange(-reach, reach + 1)).astype(int) + reach


def without_still(bands: np.ndarray) -> np.ndarray:
    """Votes (N, D) that count no motion as STILL says."""
    score, middle = bands.copy(), bands.shape[1] // 2
    score[:, middle - 1 : middle + 2] *= STILL
    return score


def background_share(bands: np.ndarray) -> float | None:
    """The share of the camera's step by which the background moves: where some of the `bands` (N, D) see a large step,
    many see its share. None where no share stands out."""
    d = bands.shape[1]
    far = np.abs(np.arange(d) - d // 2) >= FAR
    beside = np.pad(bands, ((0, 0), (1, 1)))
    peaks = ((bands >= 0.5) & (bands >= beside[:, :-2]) & (bands >= beside[:, 2:]))[:, far]
    moved = peaks.any(1)
    if not moved.any():
        return None
    score = without_still(bands)
    seen = [(peaks * score[:, shares_of(share, d)][:, far])[moved].max(1).mean() for share in SHARES]
    best = int(np.argmax(seen))
    return float(SHARES[best].round(2)) if seen[best] >= np.median(seen) + LINKED else None


def best_path(score: np.ndarray) -> np.ndarray:
    """The N steps, indices of D, with the highest sum of `score` (N, D) less what their changes cost (Viterbi 1967)."""
    n, d = score.shape
    cells = np.arange(d)
    cost = np.minimum(TURN * np.abs(cells[:, None] - cells), TURN_AT_MOST)
    total, came_from = score[0].astype(np.float64), np.zeros((n, d), np.int16)
    for i in range(1, n):
        ways = total[:, None] - cost  # (from, to)
        came_from[i] = ways.argmax(0)
        total = ways[came_from[i], cells] + score[i]
    path = np.zeros(n, int)
    path[-1] = total.argmax()
    for i in range(n - 1, 0, -1):
        path[i - 1] = came_from[i, path[i]]
    return path


def support(bands: np.ndarray, share: float | None) -> np.ndarray:
    """How far the bands (N, D) speak for each step (N, D): they see it, or the background's `share` of it."""
    score = without_still(bands)
    if share is None:
        return score
    behind = shares_of(share, bands.shape[1])
    both = score + BEHIND * np.minimum(score[:, behind], BANDS - 2)  # what all bands see is the level
    same = np.abs(behind - np.arange(len(behind))) <= 1  # one peak, not two
    both[:, same] = both[:, same].clip(max=BANDS)
    return both


def camera_steps(votes: Votes) -> tuple[np.ndarray, np.ndarray, float | None]:
    """How the camera moved into each frame, (N, 2) dy, dx in pixels of the recording, right and down above 0; the share
    of bands that moved so, or as the background (N,); and the background's share of the step.

    Where the bands show nothing of the frame before, the step is 0.
    """
    n, d = votes.bands.shape
    frames, middle = np.arange(n), d // 2
    share = background_share(votes.bands)
    path = best_path(support(votes.bands, share))
    agreed = votes.bands[frames, path]
    if share is not None:
        behind = shares_of(share, d)[path]
        agreed = agreed + np.where(np.abs(behind - path) > 1, votes.bands[frames, behind], 0)
    confidence = np.minimum(1, agreed / BANDS)

    # The peak, and its place between two cells (Foroosh, Zerubia & Berthod 2002)
    near = np.clip(path[:, None] + [-1, 0, 1], 0, d - 1)
    peak = near[frames, votes.height[frames[:, None], near].argmax(1)]
    left, centre, right = votes.height[frames[:, None], np.clip(peak[:, None] + [-1, 0, 1], 0, d - 1)].clip(1e-9).T
    fraction = np.where(right > left, right / (right + centre), -left / (left + centre))
    steps = np.stack([votes.dy[frames, peak], peak - middle + fraction], 1) * CELL
    steps[confidence < LOST] = 0
    return steps, confidence, share


def spread(values: np.ndarray, stride: int, n_frames: int) -> np.ndarray:
    """`values` (n, ...) of frames 0, stride, 2 stride, ... for every one of `n_frames`: each also stands for the frames
    before it that were not looked at, the last for those after it."""
    return values[np.minimum(-(-np.arange(n_frames) // stride), len(values) - 1)]


def progress_of(dx: np.ndarray, confidence: np.ndarray, sprite_width: float) -> np.ndarray:
    """Sprite widths that the camera is to the right of where it was at the last cut, (N,)."""
    way, frames = np.cumsum(dx), np.arange(len(dx))
    start = np.maximum.accumulate(np.where(confidence < LOST, frames, 0))
    return (way - way[start]) / sprite_width


def progress_rewards(steps: np.ndarray, start_frame: int, end_frame: int) -> np.ndarray:
    """What each of an episode's frames (length,) contributed: the step into the next one, of `steps` (N,) into each."""
    return np.append(steps[start_frame + 1 : end_frame + 1], 0.0)


# --- progress.parquet ---


def progress_steps(
    session: Session,
    reader: VideoReader,
    n_frames: int,
    sprite_width: float,
    rescan: bool = False,
    progress_bar: Callable[..., tqdm] = tqdm,
) -> np.ndarray:
    """The camera's step to the right into each of a session's first `n_frames` frames (N,), in sprite widths of
    `sprite_width` pixels: from its progress.parquet, else measured and written there."""
    path = session.folder / "progress.parquet"
    wanted = recording_of(session.folder, n_frames) | {"sprite_width": sprite_width}
    table = None if rescan else read_progress(path, wanted)
    if table is None:
        stride, threads = max(1, int(session.fps / RATE)), torch.get_num_threads()
        torch.set_num_threads(1)  # a frame is too little to share
        try:
            with progress_bar(total=n_frames, desc=f"{session.name}: scrolling", unit="frame") as bar:
                votes = count_votes(iter_frames(reader, stop=n_frames, stride=stride), bar)
        finally:
            torch.set_num_threads(threads)
        steps, confidence, share = camera_steps(votes)
        steps, confidence = spread(steps / stride, stride, n_frames), spread(confidence, stride, n_frames)
        columns = {"frame_idx": np.arange(n_frames), "dx": steps[:, 1], "dy": steps[:, 0], "confidence": confidence}
        columns["progress"] = progress_of(steps[:, 1], confidence, sprite_width)
        write_table(path, columns, PROGRESS, wanted | {"background_share": share})
        table = read_table(path, PROGRESS)
    return table["dx"].to_numpy() / sprite_width


def read_progress(path: Path, wanted: dict) -> pa.Table | None:
    """A progress.parquet, None where there is none that can be read, or one that was made from something else."""
    try:
        made = metadata_of(path, PROGRESS)
        return read_table(path, PROGRESS) if all(made.get(key) == str(x) for key, x in wanted.items()) else None
    except (ValueError, OSError):
        return None


# --- comparison with the truth ---


@dataclass
class Curve:
    """An episode's progress beside the true one, both in sprite widths from its first frame on."""

    name: str  # session and episode
    seconds: np.ndarray  # (length,)
    progress: np.ndarray
    true_x: np.ndarray
    free: np.ndarray  # bool: after the first second, and away from the level's ends, where the camera rests


def compare_progress(progress: np.ndarray, true_x: np.ndarray) -> float:
    """Pearson correlation of two (N,), nan where one does not change."""
    if len(progress) < 2 or np.ptp(progress) == 0 or np.ptp(true_x) == 0:
        return float("nan")
    return float(np.corrcoef(progress, true_x)[0, 1])


def true_positions(path: Path, times: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The player's true x at frame `times` (N,) in ms, in sprite widths from the level's left end, and which life it
    was, both (N,); None where the truth holds no positions."""
    rows = read_table(path, TRUTH).to_pylist()
    starts = [row["timestamp"] for row in rows if row["what"] == "start"]
    rows = [row for row in rows if row["what"] == "pos"]
    if not rows:
        return None
    reported = np.array([row["timestamp"] for row in rows])
    try:
        positions = [float(row["data"].split()[0]) / SPRITE for row in rows]
    except (AttributeError, ValueError, IndexError):
        raise ValueError(f"{path} has a row pos whose data does not begin with a number. Do without --truth") from None
    x = np.interp(times, reported, positions)
    last = np.maximum(0, np.searchsorted(reported, times, side="right") - 1)  # (N,) the last report
    return x, np.searchsorted(starts, reported[last], side="right")


def true_curves(path: Path, times: np.ndarray, width: int) -> list[Curve]:
    """The episodes of 1 s or more of a labelled session whose truth is in `path`; none where that holds no positions or
    progress was not measured. Frame `times` (N,) in ms, `width` of the picture: the camera rests while the player is in
    the first or last half screen of a level. What an episode shows of the life before it is left out."""
    folder, truth = path.parent, true_positions(path, times)
    table = read_progress(folder / "progress.parquet", recording_of(folder, len(times)))
    if truth is None or table is None:
        return []
    (x, life), sprite_width, curves = truth, float(table.schema.metadata[b"sprite_width"]), []
    way, half = np.cumsum(table["dx"].to_numpy()) / sprite_width, width / sprite_width / 2
    for episode in read_table(folder / "episodes.parquet", EPISODES).to_pylist():
        frames = np.arange(episode["start_frame"], episode["end_frame"] + 1)
        frames = frames[life[frames] == life[frames[-1]]]
        here, seconds = x[frames], (times[frames] - times[frames[0]]) / 1000
        free = (seconds >= 1) & (here > half)
        if episode["outcome"] == "WIN":  # at the level's right end
            free &= here < here[-1] - half
        if seconds[-1] >= 1:
            name = f"{folder.name}, episode {episode['episode_id']}"
            curves.append(Curve(name, seconds, way[frames] - way[frames[0]], here - here[0], free))
    return curves


def progress_report(curves: list[Curve]) -> str:
    """One line of how progress agrees with the true x."""
    whole = [compare_progress(c.progress, c.true_x) for c in curves]
    free = [compare_progress(c.progress[c.free], c.true_x[c.free]) for c in curves]
    together = [np.concatenate([getattr(c, name) for c in curves]) for name in ("progress", "true_x")]
    parts = [f"all frames {compare_progress(*together):.4f}"]
    for name, those in (("per episode", whole), ("without the first second and the level's ends", free)):
        those = [r for r in those if not np.isnan(r)]
        if those:
            parts.append(f"{name} median {np.median(those):.4f}, lowest {min(those):.4f} of {len(those)}")
    return f"progress from scrolling, correlation with the true x: {'; '.join(parts)}"


def draw_progress(curves: list[Curve], path: Path, most: int = 12):
    """Up to `most` episodes, from the worst to the best: their progress, and the true one, over time."""
    ranked = sorted(curves, key=lambda c: compare_progress(c.progress, c.true_x))
    chosen = [ranked[round(i)] for i in np.linspace(0, len(ranked) - 1, min(most, len(ranked)))]
    rows = -(-len(chosen) // 4)
    figure = Figure((14, 2.8 * rows), layout="constrained")
    for ax, curve in zip(figure.subplots(rows, 4, squeeze=False).flat, chosen, strict=False):
        ax.plot(curve.seconds, curve.true_x, label="true x of the player", color="#8b949e", linewidth=3)
        ax.plot(curve.seconds, curve.progress, label="scrolled", color="#d1242f", linewidth=1.2)
        ax.set_title(f"{curve.name}: r = {compare_progress(curve.progress, curve.true_x):.4f}", fontsize=10)
        ax.set(xlabel="seconds", ylabel="sprite widths")
    figure.axes[0].legend(fontsize=8)
    for ax in figure.axes[len(chosen) :]:
        ax.axis("off")
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        figure.savefig(temporary, dpi=90)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
