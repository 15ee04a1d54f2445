"""Naive references: the formulas as plain loops in float64, slow and easy to check by eye. Tests compare with them."""

import math

import numpy as np


def masked_zncc(frame: np.ndarray, grey: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masked zero-mean NCC of a template (h, w) with a frame (H, W), both in grey levels.

    Returns the score and the local standard deviation under the mask in grey levels, both (H-h+1, W-w+1) float64. The
    score is 0 where the deviation is 0.
    """
    (H, W), (h, w) = frame.shape, grey.shape
    template = grey[mask].astype(np.float64)
    template = template - template.mean()
    score, deviation = np.zeros((H - h + 1, W - w + 1)), np.zeros((H - h + 1, W - w + 1))
    for y in range(H - h + 1):
        for x in range(W - w + 1):
            local = frame[y : y + h, x : x + w][mask].astype(np.float64)
            local = local - local.mean()
            deviation[y, x] = math.sqrt((local**2).mean())
            if deviation[y, x] > 0:
                score[y, x] = (local * template).sum() / math.sqrt((local**2).sum() * (template**2).sum())
    return score, deviation


def discounted_returns(rewards: list[float], gamma: float) -> list[float]:
    """G_t = sum over k >= t of gamma^(k - t) r_k, term by term."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def specified_returns(length: int, reward: float, gamma: float, attacks=(), attack_reward=0.0, survival_bonus=0.0):
    """The specification's closed form for an episode of `length` frames: terminal reward at the last frame, an attack
    counts for the frames strictly before it, survival for every frame that is followed by another."""
    last, returns = length - 1, []
    for t in range(length):
        value = gamma ** (last - t) * reward
        value += sum(gamma ** (k - t) * attack_reward for k in attacks if k > t)
        value += sum(gamma**j * survival_bonus for j in range(last - t))
        returns.append(value)
    return returns
