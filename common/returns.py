"""Discounted returns of an episode, in time proportional to its frames; deaths from a health bar that disappears."""

import numpy as np
from scipy.signal import lfilter


def discounted_returns(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_{t+1}, with G after the last frame 0: a reward counts in full at its own frame.

    `rewards` (T,) -> returns (T,) float64. `gamma` per frame, in [0, 1].

    The specification's closed form, for an episode from frame 0 to frame T - 1 with terminal reward R,

        G_t = gamma^(T-1-t) R + sum over attacks k > t of gamma^(k-t) a + s (1 - gamma^(T-1-t)) / (1 - gamma),

    is this recursion when R lies on the last frame, the survival bonus s on every frame but the last, and gamma a on
    the frame before each attack: an attack counts strictly before its frame, so it may not lie on the frame itself.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}, expected 0 to 1")
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards have the shape {rewards.shape}, expected (T,)")
    if len(rewards) == 0:
        return rewards
    return lfilter([1.0], [1.0, -gamma], rewards[::-1])[::-1].copy()


def gamma_from_half_life(half_life: float, fps: float | None = None) -> float:
    """The gamma per frame that halves a reward in `half_life` frames, or seconds where `fps` is given."""
    frames = half_life if fps is None else half_life * fps
    if not frames > 0:
        raise ValueError(f"the half-life is {frames} frames, expected more than 0")
    return 0.5 ** (1 / frames)


def death_events(present: np.ndarray, k: int = 3, m: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Deaths in a run of consecutive frames, each once: the first frame of `m` or more without the health bar, after
    `k` or more with it. A bar that is hidden for a few frames is no death, nor is one that was never there.

    `present` (T,) bool -> indices of deaths, and of frames of which nobody knows, both int64: the bar went, and the run
    ends before `m` frames are over. Call it once per run, never across a gap.
    """
    present = np.asarray(present)
    if present.ndim != 1 or present.dtype != bool or k < 1 or m < 1:
        raise ValueError(f"present is {present.dtype} of shape {present.shape}, expected bool (T,); k {k}, m {m}: 1 up")
    edges = np.flatnonzero(np.diff(np.r_[~present[:1], present, ~present[-1:]].astype(np.int8)))  # of equal stretches
    lengths = np.diff(edges)
    after = np.arange(1, len(lengths))  # stretches with one before them
    gone = after[~present[edges[after]] & (lengths[after - 1] >= k)]
    deaths, last = gone[lengths[gone] >= m], len(lengths) - 1
    return edges[deaths], edges[gone[(lengths[gone] < m) & (gone == last)]]
