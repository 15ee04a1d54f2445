"""Small recorded sessions whose keys can be seen in the picture, so that a test can tell learning from luck."""

from pathlib import Path

import numpy as np

from common.sessions import EPISODES, EVENTS, RETURNS, WIN_KEY, SessionWriter, write_table
from common.video import VideoWriter

FPS = 10
START_NS = 1_000_000_000


def write_session(
    folder: Path,
    n_frames: int = 120,
    seed: int = 0,
    outcome: str = "DEATH",
    keys: dict[str, np.ndarray] | None = None,
    pictures: np.ndarray | None = None,
    gamma: float = 0.99,
    labels: bool = True,
) -> Path:
    """A session of `n_frames` pictures, 64 x 48, in which a white block drifts in from the right. The player holds
    RIGHT while there is none near, SPACE from two frames after it came near. One episode from first frame to last."""
    rng = np.random.default_rng(seed)
    if pictures is None:
        block = (60 - 4 * np.arange(n_frames) + rng.integers(60)) % 60  # left edge in pixels
        pictures = np.full((n_frames, 48, 64, 3), 40, np.uint8) + rng.integers(0, 8, (n_frames, 48, 64, 3), np.uint8)
        for i, x in enumerate(block):
            pictures[i, 30:40, x : x + 6] = 250
        near = np.roll(block < 24, 2)
        keys = keys or {"KEY_SPACE": near, "KEY_RIGHT": ~near}
    folder.mkdir(parents=True)
    H, W = pictures.shape[1:3]
    step = int(1e9 / FPS)
    with (
        VideoWriter(folder / "recording.mp4", FPS, W, H, crf=18) as video,
        SessionWriter(folder, FPS, W, H, [*keys, WIN_KEY], {"source": "synthetic"}) as session,
    ):
        for i in range(n_frames):
            for name, down in keys.items():
                before = bool(down[i - 1]) if i else False
                if bool(down[i]) != before:
                    session.key(START_NS + i * step - 1_000_000, name, "down" if down[i] else "up", "script")
            session.frame(START_NS + i * step)
            video.add(pictures[i], i * step)
    if labels:
        reward = {"DEATH": -1.0, "WIN": 1.0, "INCOMPLETE": 0.0}[outcome]
        last, made_with = n_frames - 1, {"gamma": gamma}
        events = {"frame_idx": [last], "event": [outcome], "confidence": [1.0]}
        write_table(folder / "events.parquet", events, EVENTS, made_with)
        row = {"episode_id": [0], "start_frame": [0], "end_frame": [last], "outcome": [outcome], "reward": [reward]}
        write_table(folder / "episodes.parquet", row | {"length": [n_frames]}, EPISODES, made_with)
        frames = np.arange(n_frames)
        returns = {
            "frame_idx": frames,
            "return": reward * gamma ** (last - frames),
            "reward": np.where(frames == last, reward, 0.0),
        }
        write_table(folder / "returns.parquet", returns, RETURNS, made_with)
    return folder
