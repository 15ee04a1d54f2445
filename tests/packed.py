"""A packed game of a few lines: a square walks over a dark field by its actions and is paid for reaching the spot."""

import json
from pathlib import Path

import numpy as np

STEPS = ((0, 0), (0, -2), (0, 2), (-2, 0), (2, 0))  # stay, up, down, left, right


def play(length: int, seed: int, size: int = 64) -> dict[str, np.ndarray]:
    """The arrays of one episode. The player walks towards the spot, or idles; reaching it pays 1 and moves it."""
    rng = np.random.default_rng(seed)
    place, spot = rng.integers(8, size - 8, 2), rng.integers(8, size - 8, 2)
    frames, movement, keys, reward = [], [], [], []
    action, key, gain = 0, 0, 0.0
    for _ in range(length):
        frame = np.zeros((size, size, 3), np.uint8)
        frame[spot[1] - 3 : spot[1] + 3, spot[0] - 3 : spot[0] + 3] = (0, 160, 0)
        frame[place[1] - 4 : place[1] + 4, place[0] - 4 : place[0] + 4] = (255, 255 * key, 60)
        frames.append(frame)
        movement.append(action), keys.append([key]), reward.append(gain)
        away, gain = spot - place, 0.0
        across, along = (4 if away[0] > 0 else 3), (2 if away[1] > 0 else 1)
        action = 0 if rng.random() < 0.1 else across if abs(away[0]) > 1 else along
        key = int(abs(away).sum() < 20)
        place = np.clip(place + STEPS[action], 8, size - 8)
        if abs(spot - place).max() <= 2:
            spot, gain = rng.integers(8, size - 8, 2), 1.0
    known = np.arange(length) > 0
    return {
        "frames": np.stack(frames),
        "frame_index": np.arange(length, dtype=np.int32),
        "movement": np.array(movement, np.int16),
        "keys": np.array(keys, np.uint8),
        "reward": np.array(reward, np.float32),
        "cont": np.r_[np.ones(length - 1), 0].astype(np.uint8),
        "act_valid": known,
        "rew_valid": known.copy(),
    }


def write_packed(folder: Path, episodes: int = 3, length: int = 60, heldout: int = 1, **changes) -> Path:
    """A folder of pack_episodes.py. `changes` go into meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"episode_{i:04d}" for i in range(1, episodes + 1)] + [f"heldout_{i:04d}" for i in range(1, heldout + 1)]
    for seed, name in enumerate(names):
        np.savez_compressed(folder / f"{name}.npz", **play(length, seed))
    meta = {"schema": 1, "fps": 20, "n_movement": 5, "keys": ["B"], "action_index": "arrival"}
    meta |= {"frame_shape": [64, 64, 3], "episodes": {name: {"frames": length} for name in names}}
    (folder / "meta.json").write_text(json.dumps(meta | changes))
    return folder
