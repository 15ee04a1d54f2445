"""Packed episodes: what a row is, what breaks that, and many episodes laid end to end.

Row t holds frame t, the action that led into it and the reward collected on arriving. A run is a stretch of rows
without a gap in `frame_index`, or an end of the game, inside. The contract in full: docs/pack_episodes.md
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Axes: N rows of an episode, R rows of all episodes, U runs, A keys, Nz x Dz latents of a frame.
COLUMNS = ("frame_index", "movement", "keys", "reward", "cont", "act_valid", "rew_valid")
REPACK = "Pack it again with pack_episodes.py, or move it away"


@dataclass
class Rows:
    """Episodes laid end to end."""

    frames: np.ndarray | None  # (R, H, W, 3) uint8; None where the data are latents
    z: torch.Tensor | None  # (R, Nz, Dz) float16; None until a tokenizer has made them
    movement: torch.Tensor  # (R,) int64
    keys: torch.Tensor  # (R, A) float32
    reward: torch.Tensor  # (R,) float32, 0 where it is not valid
    cont: torch.Tensor  # (R,) float32, 0 where the game ended
    act_valid: torch.Tensor  # (R,) bool
    rew_valid: torch.Tensor  # (R,) bool
    runs: np.ndarray  # (U, 2) first row, row after the last
    episode: np.ndarray  # (R,) number of the episode
    task: torch.Tensor  # (R,) int64, whose play it is


def run_starts(frame_index: np.ndarray, cont: np.ndarray) -> np.ndarray:
    """(N,) bool, rows that begin a run."""
    return np.r_[True, (np.diff(frame_index.astype(np.int64)) > 1) | (cont[:-1] == 0)]


def check_rows(rows: dict[str, np.ndarray], pixels: str):
    """Raise ValueError for the arrays of an episode that break the contract; `pixels` is `frames` or `z`."""
    lengths = {name: len(rows[name]) for name in (pixels, *COLUMNS)}
    if not lengths[pixels] or len(set(lengths.values())) > 1:
        raise ValueError(f"the arrays have the lengths {lengths}, expected one length, 1 or more")
    index = rows["frame_index"].astype(np.int64)
    back = np.flatnonzero(np.diff(index) <= 0)
    if len(back):
        raise ValueError(f"row {back[0] + 1} has frame {index[back[0] + 1]} after frame {index[back[0]]}")
    known = {"reward": rows["rew_valid"].astype(bool)} | ({"z": np.ones(len(index), bool)} if pixels == "z" else {})
    for name, valid in known.items():
        finite = np.isfinite(rows[name].reshape(len(index), -1)).all(1)
        if not finite[valid].all():
            raise ValueError(f"{name} of frame {index[~finite & valid][0]} is not finite")


def load_meta(data_dir: Path) -> dict:
    """meta.json. Raises ValueError naming the file, what was found and the mend."""
    path = data_dir / "meta.json"
    try:
        meta = json.loads(path.read_text())
        missing = {"fps", "n_movement", "keys", "episodes", "action_index"} - set(meta)
        if missing or ("frame_shape" in meta) == ("z_shape" in meta) or not meta["episodes"]:
            raise KeyError(f"no {', '.join(sorted(missing)) or 'frame_shape or z_shape, or no episodes'}")
        if meta["action_index"] not in ("arrival", "departure"):
            raise KeyError(f"action_index {meta['action_index']}, expected arrival or departure")
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing. Make such a folder with pack_episodes.py, or name one: --data-dir"
        ) from None
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} cannot be used ({error}). {REPACK}") from None
    return meta


def load_episode(path: Path, meta: dict) -> dict[str, np.ndarray]:
    """The arrays of one .npz, actions by arrival. Raises ValueError naming the file, what was found and the mend."""
    pixels, shape = ("frames", meta["frame_shape"]) if "frame_shape" in meta else ("z", meta["z_shape"])
    try:
        with np.load(path) as file:
            rows = {column: file[column] for column in (pixels, *COLUMNS)}
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}. Expected {pixels}, {', '.join(COLUMNS)}. {REPACK}") from None
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(f"{path} is missing, cut off or damaged ({error}). {REPACK}") from None
    try:
        check_rows(rows, pixels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {REPACK}") from None
    if rows[pixels].shape[1:] != tuple(shape):
        found = f"{pixels} has the shape {rows[pixels].shape[1:]} in a row, meta.json says {tuple(shape)}"
        raise ValueError(f"{path}: {found}. {REPACK}")
    low, high, n_keys = rows["movement"].min(), rows["movement"].max(), len(meta["keys"])
    if low < 0 or high >= meta["n_movement"] or rows["keys"].shape[1:] != (n_keys,):
        found = f"movement {low} to {high}, keys {rows['keys'].shape}"
        raise ValueError(f"{path}: {found}, meta.json has {meta['n_movement']} movements and {n_keys} keys. {REPACK}")
    if meta["action_index"] == "departure":  # row t has the action that follows frame t
        for column in ("movement", "keys", "act_valid"):
            rows[column] = np.roll(rows[column], 1, 0)
        rows["act_valid"] = rows["act_valid"] & ~run_starts(rows["frame_index"], rows["cont"])
    return rows


def load_rows(data_dir: Path, names: list[str], meta: dict, tasks: dict[str, int] | None = None) -> Rows:
    """The episodes of these names, end to end; `tasks` by their names, None: 0. Raises ValueError as `load_episode`."""
    episodes = [load_episode(data_dir / f"{name}.npz", meta) for name in names]
    joined = {column: np.concatenate([rows[column] for rows in episodes]) for column in episodes[0]}
    starts = np.concatenate([run_starts(rows["frame_index"], rows["cont"]) for rows in episodes])
    first = np.flatnonzero(starts)
    episode = np.repeat(np.arange(len(names)), [len(rows["reward"]) for rows in episodes])
    return Rows(
        frames=joined.get("frames"),
        z=torch.tensor(joined["z"]) if "z" in joined else None,
        movement=torch.tensor(joined["movement"].astype(np.int64)),
        keys=torch.tensor(joined["keys"].astype(np.float32)),
        reward=torch.tensor(np.where(joined["rew_valid"], joined["reward"], 0).astype(np.float32)),
        cont=torch.tensor(joined["cont"].astype(np.float32)),
        act_valid=torch.tensor(joined["act_valid"].astype(bool)),
        rew_valid=torch.tensor(joined["rew_valid"].astype(bool)),
        runs=np.stack([first, np.r_[first[1:], len(starts)]], 1).astype(np.int64),
        episode=episode,
        task=torch.tensor([tasks[name] if tasks else 0 for name in names])[episode],
    )
