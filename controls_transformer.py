"""A five-head transformer from a player's pose and the game's state to 28 game controls, learnt from recordings.

Learns from the session_*.npz files of a motion-control recorder: 30 frames of body and hand landmarks, the state of the
game and the last five controls in; actions, look, hotbar slot, cursor and clicks out. It is behavioural cloning with
one masked loss per head; the encoder is that of Vaswani et al. 2017, post-norm. Page: docs/controls_transformer.md

    python benchmarks/make_control_sessions.py --output recordings
    python controls_transformer.py --recordings-dir recordings

In: a folder of sessions. Out: runs/<task>__controls_transformer__<seed>__<time>/ with last.pt, best.pt, eval.json and
TensorBoard events, and models/ with control_policy.pt, control_policy.onnx, control_config.json, training_log.json."""

import json
import logging
import math
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import runs


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of this experiment"""
    seed: int = 1
    """seed of every random choice"""
    torch_deterministic: bool = True
    """use deterministic cuDNN kernels"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes the first of CUDA, MPS, CPU that is there"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb)"""
    wandb_project_name: str = "learn-from-recordings"
    """the wandb project"""
    wandb_entity: str | None = None
    """the wandb team; None means your own account"""
    run_root: str = "runs"
    """folder that receives the run folder"""
    resume: str | None = None
    """run folder to go on with; its own arguments hold, apart from those that the script's page names"""

    recordings_dir: str = "recordings"
    """folder of session_*.npz"""
    skip_bad_sessions: bool = False
    """leave out sessions that cannot be used, and list them, instead of stopping"""
    val_fraction: float = 0.2
    """share of the sessions that is held out for validation; above 0, below 1"""
    stride: int = 1
    """train on every so many frames; which ones changes from epoch to epoch"""
    val_stride: int = 1
    """validate on every so many frames after an epoch; above 1 there are no events. The final evaluation takes all"""
    history_form: Literal["tiled", "per-frame"] = "tiled"
    """tiled: the last five controls beside every frame of the window. per-frame: the five before that frame"""
    action_history_dropout: float = 0.3
    """share of the history's entries that is zeroed while training; 1 means that the policy never has a history"""
    feature_clip: float = 10.0
    """limit of the normalised features, in standard deviations: keeps columns harmless that hardly ever change"""
    mirror: float = 0.0
    """augmentation: chance to swap left and right; windows with an open screen stay as they are"""
    noise: float = 0.0
    """augmentation: standard deviation of the noise on landmarks; metres, such as 0.005"""
    time_warp: float = 0.0
    """augmentation: play the window up to this share faster or slower; 0..0.5"""
    hand_dropout: float = 0.0
    """augmentation: chance, per hand, to lose it for the whole window"""

    d_model: int = 256
    """width of the encoder"""
    nhead: int = 8
    """attention heads; divides `d_model`"""
    num_layers: int = 6
    """layers of the encoder"""
    dim_feedforward: int = 512
    """width inside a layer's feed-forward part"""
    dropout: float = 0.3
    """dropout in the encoder and in the heads; 0..1"""
    learnable_decay: bool = False
    """learn how fast the pooling forgets older frames, instead of exp(-2) over the window"""

    epochs: int = 200
    """passes over the training windows, at most"""
    batch_size: int = 64
    """windows per update"""
    learning_rate: float = 5e-4
    """highest learning rate of AdamW, reached after the warm-up"""
    warmup_epochs: int = 5
    """epochs in which the learning rate rises from 0; after them it falls to 1e-6 on a cosine"""
    weight_decay: float = 1e-4
    """weight decay of AdamW"""
    gradient_clip: float = 1.0
    """limit of the gradient's norm"""
    early_stop_patience: int = 30
    """epochs without a better `selection` score until training stops; 0 means never"""
    selection: Literal["score", "score_present", "score_no_history", "score_free_running"] = "score"
    """score that picks best.pt: the specified one, the same over the heads that the data show, with empty history, or
    with the policy's own outputs as history, which costs a pass over the validation frames one by one"""
    loss_norm: Literal["seed", "masked-mean"] = "seed"
    """seed: each head's loss times the share of its frames, as specified. masked-mean: plain means over its frames"""
    w_action: float = 1.0
    """weight of the action loss"""
    w_look: float = 0.5
    """weight of the look loss"""
    w_hotbar: float = 0.3
    """weight of the hotbar loss"""
    w_cursor: float = 0.5
    """weight of the cursor loss"""
    w_inv: float = 0.3
    """weight of the loss of the inventory's clicks"""
    w_idle: float = 0.3
    """weight of the penalty on actions while the player does nothing"""
    open_inventory_always: bool = False
    """train and use open_inventory while a screen is open too, so that the policy can close it"""
    curriculum: bool = False
    """three stages: movement and look; combat; inventory and hotbar"""
    curriculum_epochs: tuple[int, int] = (20, 20)
    """epochs of the first two stages, at most; the rest is the third's"""
    curriculum_share: float = 0.5
    """share of a stage's windows drawn from those that end in one of its controls; 0..1"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast or not; auto takes it on CUDA, and on CPUs with AMX, elsewhere it is slower"""
    compile: bool = False
    """torch.compile the network"""

    log_every: int = 20
    """updates between two rows of TensorBoard scalars"""
    save_every: int = 200
    """updates between two saves of last.pt; it is also saved after each epoch and on Ctrl-C or SIGTERM"""
    model_dir: str = "models"
    """folder that receives copies of the policy's files"""
    overwrite: bool = False
    """replace another run's files in `model_dir`"""
    export_onnx: bool = True
    """write control_policy.onnx, after comparing it with torch"""
    replay: str | None = None
    """a session file: run the policy in `model` on it, its own outputs as history, instead of training"""
    model: str = "models"
    """folder of the policy for `replay`: a `model_dir` or a run folder"""
    engine: Literal["onnx", "torch"] = "onnx"
    """what computes the network for `replay`"""


# Axes: B batch, T = 30 frames of a window, N rows of a session, R rows of all sessions, C controls, D features
CONTROLS = (
    "move_forward move_backward strafe_left strafe_right sprint sneak jump attack use_item look_yaw look_pitch "
    "drop_item swap_offhand open_inventory hotbar_slot_1 hotbar_slot_2 hotbar_slot_3 hotbar_slot_4 hotbar_slot_5 "
    "hotbar_slot_6 hotbar_slot_7 hotbar_slot_8 hotbar_slot_9 cursor_x cursor_y inv_left_click inv_right_click "
    "inv_shift_held"
).split()
ACTION_COLUMNS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13)
LOOK_COLUMNS = (9, 10)
HOTBAR_COLUMNS = tuple(range(14, 23))
CURSOR_COLUMNS = (23, 24)
INV_COLUMNS = (25, 26, 27)
BINARY_COLUMNS = tuple(c for c in range(28) if c not in LOOK_COLUMNS + CURSOR_COLUMNS)
PULSES = ("jump", "attack", "drop_item", "swap_offhand", "open_inventory", "inv_left_click", "inv_right_click")
STAGE_COLUMNS = ((0, 1, 2, 3, 4, 5, 6, 9, 10), (7, 8, 11, 12), (13, *range(14, 28)))  # what each stage adds
HEAD_COLUMNS = {"action": ACTION_COLUMNS, "look": LOOK_COLUMNS, "hotbar": HOTBAR_COLUMNS}
HEAD_COLUMNS |= {"cursor": CURSOR_COLUMNS, "inv": INV_COLUMNS}
HEADS = {name: len(columns) for name, columns in HEAD_COLUMNS.items()}  # outputs of each head
LOOK, SLOTS, CURSOR, CLICKS = slice(9, 11), slice(14, 23), slice(23, 25), slice(25, 28)
WINDOW, HISTORY = 30, 5  # frames
FRAME_DIM, STATE_DIM, CONTROL_DIM, POSITIONS = 260, 46, 28, 225  # POSITIONS: columns that are metres
FEATURES = FRAME_DIM + POSITIONS + STATE_DIM  # 531, of one frame
INPUT_DIM = FEATURES + HISTORY * CONTROL_DIM  # 671
SCREEN_OPEN, CURRENT_SLOT = 38, 44  # columns of the game's state
LOOK_DEADZONE = 0.08
SPLIT_GAP = WINDOW + HISTORY  # rows between training and validation of one session: no window sees both
MODEL_FILES = "control_*"
MEND = "Record it again, or leave it out with --skip-bad-sessions"
SIMULATE = "python benchmarks/make_control_sessions.py --output recordings"


# data: session files --------------------------------------------------------------------------------------------------
V1_CONTROLS = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # the new column of each of the ten
V1_STATE = {
    **{0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 6: 5, 7: 11, 8: 12, 9: 14, 10: 15, 11: 20, 12: 21, 13: 26, 14: 25, 15: 22},
    **{16: 24, 17: 29, 18: 30, 19: 23, 20: 7, 21: 16, 22: 27, 23: 19},
}  # old column: new one; the old 4, can_block, has none
V1_NO_STATE = (5, 11, 12, 14)  # 1 where a session has no state: empty hand, full health and hunger, on the ground
SHAPES = {
    1: {
        "pose_world": (33, 3),
        "left_hand_3d": (21, 3),
        "right_hand_3d": (21, 3),
        "left_hand_present": (),
        "right_hand_present": (),
        "pose_visibility": (33,),
        "controls": (10,),
        "timestamps": (),
    },
    2: {"frames": (FRAME_DIM,), "controls": (CONTROL_DIM,), "game_state": (STATE_DIM,), "timestamps": ()},
}


def find_sessions(folder: Path | str) -> list[Path]:
    """The session_*.npz in `folder`, by name. Raises FileNotFoundError where there is none."""
    paths = sorted(Path(folder).glob("session_*.npz"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no session_*.npz. Record some, name their folder with --recordings-dir, or make simulated "
            f"ones: {SIMULATE}"
        )
    return paths


def load_session(path: Path | str) -> dict:
    """A session: frames (N, 260), controls (N, 28), game_state (N, 46) float32, timestamps (N,) float64 in seconds, and
    path, fps, version, session_type, person ("" where not known). Version 1 is mapped to the columns of version 2. No
    pickle is opened. Raises ValueError where anything in it cannot be right."""
    path = Path(path)
    try:
        raw, version = _read_arrays(path)
        _check_shapes(raw, version)
        session = _from_v1(raw) if version == 1 else {name: raw[name] for name in SHAPES[2]}
        session = {name: np.asarray(session[name], np.float32) for name in ("frames", "controls", "game_state")}
        session["timestamps"] = np.asarray(raw["timestamps"], np.float64)
        _check_values(session, "as version 2: " if version == 1 else "")
        session |= {"fps": _fps(raw, session["timestamps"]), "version": version}
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}. {MEND}") from None
    return session | {"path": path} | {name: str(raw.get(name, "")) for name in ("session_type", "person")}


def _read_arrays(path: Path) -> tuple[dict, int]:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            version = int(file["version"]) if "version" in file else 1
            names = [*SHAPES.get(version, ()), "game_state", "fps", "session_type", "person"]
            raw = {name: file[name] for name in names if name in file}
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # the readers of zip and npy raise many kinds for damaged bytes
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from None
    if version not in SHAPES:
        raise ValueError(f"version {version}, expected 1 or 2, as only those hold the pose")
    return raw, version


def _check_shapes(raw: dict, version: int):
    N = raw["timestamps"].size if "timestamps" in raw else 0
    for name, shape in SHAPES[version].items():
        if name not in raw:
            raise ValueError(f"there is no {name}, which version {version} has")
        if raw[name].shape != (N, *shape) or raw[name].dtype.kind not in "fiub":
            found = f"{name} is {raw[name].dtype} {raw[name].shape}"
            raise ValueError(f"{found}, expected numbers of shape {(N, *shape)} for {N} timestamps")
    if version == 1 and "game_state" in raw and raw["game_state"].shape not in ((N, 16), (N, 24)):
        raise ValueError(f"game_state is {raw['game_state'].shape}, expected {(N, 16)} or {(N, 24)} in version 1")
    if N < 2:
        raise ValueError(f"{N} frames, expected at least 2")


def _from_v1(raw: dict) -> dict:
    N = len(raw["timestamps"])
    controls, state = np.zeros((N, CONTROL_DIM), np.float32), np.zeros((N, STATE_DIM), np.float32)
    controls[:, V1_CONTROLS] = raw["controls"]
    if "game_state" in raw:
        for old, new in list(V1_STATE.items())[: 15 if raw["game_state"].shape[1] == 16 else None]:
            state[:, new] = raw["game_state"][:, old] * (0.5 if old == 15 else 1)  # fall distance: / 10, now / 20
    else:
        state[:, V1_NO_STATE] = 1
    parts = [raw[name].reshape(N, -1) for name in list(SHAPES[1])[:6]]
    return {"frames": np.concatenate(parts, 1), "controls": controls, "game_state": state}


def _check_values(session: dict, form: str):
    frames, controls, times = session["frames"], session["controls"], session["timestamps"]
    limits = [("frames", frames[:, :POSITIONS], -10, 10, 0), ("frames", frames[:, POSITIONS:], 0, 1, POSITIONS)]
    signed = np.isin(np.arange(CONTROL_DIM), LOOK_COLUMNS)
    limits += [("controls", controls, np.where(signed, -1, 0), 1, 0), ("game_state", session["game_state"], -1, 1, 0)]
    for name, values, low, high, first in limits:
        wrong = ~((values >= low - 1e-3) & (values <= high + 1e-3))  # also where NaN
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            low = int(np.broadcast_to(low, values.shape[1])[column])
            raise ValueError(
                f"{form}{name} row {row}, column {first + column} is {values[row, column]}, expected {low} to {high}"
            )
    finite = np.isfinite(times)
    backwards = np.flatnonzero(~(np.diff(times) >= 0) | ~finite[1:] | ~finite[:-1])
    if len(backwards):
        row = backwards[0] + 1
        raise ValueError(f"timestamps row {row} is {times[row]} after {times[row - 1]}, expected seconds that rise")


def _fps(raw: dict, times: np.ndarray) -> float:
    if "fps" in raw:
        if raw["fps"].size != 1 or raw["fps"].dtype.kind not in "fiu" or not 0 < float(raw["fps"].item()) < np.inf:
            raise ValueError(f"fps is {raw['fps']}, expected one positive number")
        return float(raw["fps"].item())
    return float((len(times) - 1) / (times[-1] - times[0])) if times[-1] > times[0] else 30.0


def repeated_share(session: dict) -> float:
    """Share of the frames with a look in which game state and controls are the previous frame's to the bit: rows that
    a recorder read twice from a slower game clock, a third of them at 30 frames and 20 ticks per second."""
    controls, state = session["controls"], session["game_state"]
    looking = (controls[1:, list(LOOK_COLUMNS)] != 0).any(1)
    same = (controls[1:] == controls[:-1]).all(1) & (state[1:] == state[:-1]).all(1)
    return float((same & looking).sum() / max(1, looking.sum()))


def count_frames(path: Path) -> int:
    """Frames in a session, without reading more than its timestamps; 0 where they cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["timestamps"].size
    except Exception:  # load_session will say what is wrong
        return 0


# data: split, rows, windows -------------------------------------------------------------------------------------------
def split_sessions(sessions: list[dict], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the sessions to train on and to validate on, about `fraction` of each session_type. A person's
    sessions stay together, where there are two persons or more. A type with a single group, and a single session,
    goes into training."""
    persons = [session.get("person", "") for session in sessions]
    together = len(set(persons)) > 1
    groups = {}  # person or session -> its sessions
    for i, person in enumerate(persons):
        groups.setdefault(person if person and together else i, []).append(i)
    types = {}
    for members in groups.values():
        types.setdefault(sessions[members[0]].get("session_type", ""), []).append(members)
    rng, val = np.random.default_rng(seed), []
    for _, of_type in sorted(types.items()):
        wanted = max(1, round(fraction * sum(len(members) for members in of_type)))
        chosen = []
        for g in rng.permutation(len(of_type))[:-1]:  # one group at least is left to train on
            if not chosen or len(chosen) + len(of_type[g]) <= wanted:
                chosen += of_type[g]
        val += chosen
    if not val and len(groups) > 1:  # every type has a single group
        val = list(groups.values())[rng.integers(len(groups))]
    return [i for i in range(len(sessions)) if i not in val], sorted(val)


def split_frames(lengths: list[int], train: list[int], val: list[int], fraction: float) -> tuple[dict, dict]:
    """Which frames of which sessions to train on and to validate on, {session: (first, end)} twice. Where no session is
    left for validation, the last `fraction` of each is, SPLIT_GAP frames after those to train on."""
    if val:
        return {i: (0, lengths[i]) for i in train}, {i: (0, lengths[i]) for i in val}
    cuts = {i: int(lengths[i] * (1 - fraction)) for i in train}
    rest = {i: (cut + SPLIT_GAP, lengths[i]) for i, cut in cuts.items() if cut + SPLIT_GAP < lengths[i]}
    return {i: (0, cut) for i, cut in cuts.items()}, rest


class Scale(NamedTuple):
    """What the features are normalised with. Part of the policy."""

    mean: torch.Tensor  # (671,)
    std: torch.Tensor  # (671,)
    clip: float  # limit afterwards, in standard deviations


def normalise(x, scale: Scale):
    """Features (..., 671), or the first or last columns of them with those of the scale -> the same."""
    return ((x - scale.mean) / scale.std).clamp(-scale.clip, scale.clip)


class Recordings:
    """All sessions end to end, on the device, with WINDOW empty rows before each: row r of a session's frame i is
    `starts[session] + i`. Windows are gathered from these arrays and never stored."""

    def __init__(self, paths: list[Path], lengths: list[int], device="cpu"):
        self.paths, self.lengths, self.fps, self.scale = paths, lengths, 30.0, None
        self.starts = (np.cumsum([0, *lengths[:-1]]) + WINDOW * np.arange(1, len(lengths) + 1)).tolist()
        R = self.starts[-1] + lengths[-1]
        self.features = torch.zeros((R, FEATURES), device=device)  # frames, velocity, state: raw until `normalise`
        self.controls = torch.zeros((R, CONTROL_DIM), device=device)
        self.mode = torch.zeros((R, 2), device=device)  # of the state: open screen, current slot, as recorded
        self.position = torch.full((R,), -1, dtype=torch.int32, device=device)  # frame number in its session
        # row by row the window and the history that begin there, as views: both lie side by side in memory
        self.windows = self.features.as_strided((R - WINDOW + 1, WINDOW, FEATURES), (FEATURES, FEATURES, 1))
        self.histories = self.controls.as_strided((R - HISTORY + 1, HISTORY * CONTROL_DIM), (CONTROL_DIM, 1))
        self.buffers = {}  # of each batch size, reused: fresh memory for every batch would cost as much as filling it

    def rows(self, frames: dict[int, tuple[int, int]]) -> torch.Tensor:
        """The rows of {session: (first, end)}."""
        parts = [np.arange(self.starts[i] + first, self.starts[i] + end) for i, (first, end) in frames.items()]
        return torch.from_numpy(np.concatenate(parts)).to(self.controls.device)

    def put(self, i: int, session: dict):
        """Write session i, or its beginning."""
        N = len(session["frames"])
        rows = slice(self.starts[i], self.starts[i] + N)
        state = torch.from_numpy(session["game_state"])
        self.controls[rows] = torch.from_numpy(session["controls"])
        self.mode[rows] = state[:, [SCREEN_OPEN, CURRENT_SLOT]].to(self.mode.device)
        self.position[rows] = torch.arange(N, dtype=torch.int32)
        features = self.features[rows]
        features[:, :FRAME_DIM] = torch.from_numpy(session["frames"])
        features[:, FRAME_DIM:-STATE_DIM] = velocity(features)
        features[:, -STATE_DIM:] = state
        if self.scale:
            self._normalise(rows)

    def normalise(self, scale: Scale):
        """In place, once."""
        self.scale = scale
        for start, length in zip(self.starts, self.lengths, strict=True):
            self._normalise(slice(start, start + length))

    def _normalise(self, rows: slice):
        mean, std, clip = self.scale
        self.features[rows].sub_(mean[:FEATURES]).div_(std[:FEATURES]).clamp_(-clip, clip)


def load_recordings(paths: list[Path], skip_bad: bool, device) -> tuple[Recordings, dict[int, dict], list[str]]:
    """Reads one session after the other, so that memory never holds them twice. Returns them, {index: session without
    its arrays} and what is wrong with those left out. Raises ValueError for a bad one, unless `skip_bad`."""
    data = Recordings(paths, [count_frames(path) for path in paths], device)
    sessions, problems = {}, []
    for i, path in enumerate(tqdm(paths, desc="sessions", leave=False)):
        try:
            session = load_session(path)
        except ValueError as error:
            if not skip_bad:
                raise
            problems.append(str(error))
            continue
        data.put(i, session)
        names = ("path", "fps", "session_type", "person")
        sessions[i] = {name: session[name] for name in names} | {"repeated": repeated_share(session)}
    if not sessions:
        raise ValueError(f"none of {len(paths)} sessions can be used, such as {problems[0]}")
    data.fps = float(np.median([session["fps"] for session in sessions.values()]))
    return data, sessions, problems


def lay_out(sessions: list[dict], device="cpu") -> Recordings:
    """Loaded sessions as `Recordings`."""
    data = Recordings([s["path"] for s in sessions], [len(s["frames"]) for s in sessions], device)
    for i, session in enumerate(sessions):
        data.put(i, session)
    return data


def velocity(frames):
    """First difference per frame of the columns in metres: (N, 260) -> (N, 225), the first row 0."""
    join = torch.cat if isinstance(frames, torch.Tensor) else np.concatenate
    return join([frames[:1, :POSITIONS] * 0, frames[1:, :POSITIONS] - frames[:-1, :POSITIONS]])


def gather_windows(data: Recordings, rows, history_form: str = "tiled", history_dropout: float = 0.0):
    """The windows that end in `rows` (B,): x (B, 30, 671), real (B, 30) bool, and of their last frames controls (B, 28)
    and whether a screen is open (B,). What lies before the start of a session is padding, on the left: only real rows
    of x count. The next call with as many rows overwrites x."""
    B, device = len(rows), rows.device
    if B not in data.buffers:
        data.buffers[B] = torch.empty((B, WINDOW, INPUT_DIM), device=device)
    x = data.buffers[B]
    torch.index_select(data.windows, 0, rows - (WINDOW - 1), out=x[..., :FEATURES])
    back = torch.arange(-WINDOW + 1, 1, device=device)
    ends = rows.unsqueeze(1) if history_form == "tiled" else rows.unsqueeze(1) + back  # (B, 1 or 30)
    begins = (ends.flatten() - HISTORY).clamp(min=0)  # less than 0 for padding only
    history = data.histories.index_select(0, begins)  # oldest first, 0 before the start of a session
    history = history.view(*ends.shape, HISTORY, CONTROL_DIM)
    if history_dropout:  # before normalising, so that a dropped entry equals the start of a session
        history *= (torch.rand(history.shape[:3], device=device) > history_dropout).unsqueeze(3)
    history = history.flatten(2)  # (B, 1 or 30, 140)
    if data.scale:
        mean, std, clip = data.scale
        history = normalise(history, Scale(mean[FEATURES:], std[FEATURES:], clip))
    x[..., FEATURES:] = history
    real = data.position[rows].unsqueeze(1) + back >= 0
    return x, real, data.controls[rows], data.mode[rows, 0] > 0


def feature_scale(data: Recordings, rows, clip: float) -> Scale:
    """Mean and standard deviation of the 671 features over the windows that end in `rows` (N,); a column that does not
    change has 1."""
    total, squares = torch.zeros((2, INPUT_DIM), dtype=torch.float64)
    for part in rows.split(4096):
        x = torch.cat([data.features[part], data.histories[part - HISTORY]], 1).cpu().double()
        total, squares = total + x.sum(0), squares + x.square().sum(0)
    mean = total / len(rows)
    std = (squares / len(rows) - mean.square()).clamp(min=0).sqrt()
    std[std < 1e-6] = 1
    return Scale(mean.float().to(rows.device), std.float().to(rows.device), clip)


def epoch_rows(rows, n: int, args: Args, epoch: int, rich=None) -> torch.Tensor:
    """n of the `rows` (N,) in the order of an epoch: a pure function of seed and epoch, so that a resumed run sees the
    same windows. A share of them is drawn from `rich`, the rows of a curriculum's stage, where it is not None."""
    rng = np.random.default_rng((args.seed, epoch))
    order = np.resize(rng.permutation(rows.cpu().numpy()[epoch % args.stride :: args.stride]), n)
    if rich is not None and len(rich):
        drawn = rng.random(n) < args.curriculum_share
        order[drawn] = rng.choice(rich.cpu().numpy(), drawn.sum())
    return torch.from_numpy(order).to(rows.device)


# ALGO LOGIC: augmentations --------------------------------------------------------------------------------------------
def mirror(frames, controls, game_state):
    """Left for right: (N, 260), (N, 28), (N, 46) -> the same. Cursor and clicks stay as they are."""
    pose = np.arange(33)
    for left, right in [(1, 4), (2, 5), (3, 6), (7, 8), *((i, i + 1) for i in range(9, 33, 2))]:  # landmarks
        pose[[left, right]] = right, left
    hands = np.r_[np.arange(162, 225), np.arange(99, 162), 226, 225]  # and whether they are there
    frames = frames[:, np.r_[(3 * pose[:, None] + np.arange(3)).ravel(), hands, 227 + pose]]
    frames[:, :POSITIONS:3] *= -1  # x
    controls, game_state = controls.copy(), game_state.copy()
    controls[:, [2, 3]] = controls[:, [3, 2]]  # strafing
    controls[:, 9] *= -1  # yaw
    game_state[:, 34] *= -1  # the bearing of the nearest foe
    return frames, controls, game_state


def warp(frames, controls, game_state, speed: float, first: int):
    """Play from frame `first` on at another speed. A pulse that falls between two frames is kept."""
    N = len(frames)
    at = first + speed * np.arange(N)
    at = at[at <= N - 1]  # (M,)
    below = np.floor(at).astype(int)
    share = (at - below)[:, None].astype(np.float32)
    nearest, above = np.round(at).astype(int), np.minimum(below + 1, N - 1)
    last = np.maximum(nearest, np.r_[nearest[1:], nearest[-1] + 1] - 1).clip(max=N - 1)
    binary, kept = list(BINARY_COLUMNS), controls[nearest]
    kept[:, binary] = np.maximum(kept[:, binary], controls[last][:, binary])
    return (1 - share) * frames[below] + share * frames[above], kept, game_state[nearest]


def augment_session(session: dict, settings: dict, rng) -> tuple[dict, np.ndarray]:
    """A session of at most as many frames (M), and which of them (M,) end a window to train on: where the sides are
    swapped, none with an open screen. `settings`: time_warp, mirror, noise, hand_dropout."""
    names = ("frames", "controls", "game_state")
    arrays = tuple(session[name] for name in names)
    if settings["time_warp"]:
        speed = 1 + rng.uniform(-1, 1) * settings["time_warp"]
        first = int(rng.integers(1 + len(arrays[0]) - min(len(arrays[0]), int(speed * len(arrays[0])))))
        arrays = warp(*arrays, speed, first)
    usable = np.ones(len(arrays[0]), bool)
    if rng.random() < settings["mirror"]:
        screens = np.cumsum(np.r_[np.zeros(WINDOW, int), arrays[2][:, SCREEN_OPEN] > 0])
        usable = screens[WINDOW:] == screens[:-WINDOW]  # none in the window
        arrays = mirror(*arrays)
    frames = arrays[0].astype(np.float32)  # a copy
    if settings["noise"]:
        noise = settings["noise"] * rng.standard_normal((len(frames), POSITIONS), np.float32)
        frames[:, :POSITIONS] += noise * (frames[:, :POSITIONS] != 0)  # what was not seen stays 0
    for hand, columns in enumerate((slice(99, 162), slice(162, 225))):
        lost = np.repeat(rng.random(len(frames) // WINDOW + 1) < settings["hand_dropout"], WINDOW)[: len(frames)]
        frames[lost, columns] = frames[lost, 225 + hand] = 0
    return dict(zip(names, (frames, *arrays[1:]), strict=True)), usable


def augment_recordings(data: Recordings, frames: dict, settings: dict, seed: int, epoch: int) -> torch.Tensor:
    """Write the sessions of {session: (first, end)} anew, as this epoch sees them; returns the rows to train on. Read
    from the files again, so that memory holds nothing twice."""
    rows = []
    for i, (first, end) in frames.items():
        session = load_session(data.paths[i])
        part = {name: session[name][first:end] for name in ("frames", "controls", "game_state")}
        part, usable = augment_session(part, settings, np.random.default_rng((seed, epoch, i)))
        data.put(i, part)
        rows.append(data.starts[i] + np.flatnonzero(usable))
    return torch.from_numpy(np.concatenate(rows)).to(data.controls.device)


# ALGO LOGIC: network --------------------------------------------------------------------------------------------------
class ControlTransformer(nn.Module):
    """Windows of normalised features and which of their frames are real -> the outputs of the five heads.

    (B, T, 671), (B, T) bool, T <= 30, the newest frame last -> action_logits (B, 12), look (B, 2) in -1..1,
    hotbar_logits (B, 9), cursor (B, 2) in 0..1, inv_click_logits (B, 3)."""

    def __init__(
        self,
        d_model: int = 256,
        nhead: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 512,
        dropout: float = 0.3,
        learnable_decay: bool = False,
    ):
        super().__init__()
        self.project = nn.Linear(INPUT_DIM, d_model)
        self.positions = nn.Parameter(0.02 * torch.randn(1, WINDOW, d_model))
        self.dropout = nn.Dropout(dropout)
        # a list, as nn.TransformerEncoder would copy one layer: all would begin with the same weights
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, batch_first=True)
            for _ in range(num_layers)
        )
        decay = torch.tensor(-2.0)  # log weight of the window's oldest frame
        self.decay = nn.Parameter(decay) if learnable_decay else nn.Buffer(decay, persistent=False)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(d_model, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, n))
                for name, n in HEADS.items()
            }
        )

    def forward(self, x, mask):
        T = x.shape[1]
        x = self.dropout(self.project(x) + self.positions[:, -T:])  # (B, T, d)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        weights = torch.exp(self.decay * torch.linspace(1, 0, T, device=x.device)) * mask  # (B, T)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-8)
        pooled = (x * weights.unsqueeze(-1)).sum(1)  # (B, d)
        out = {name: head(pooled) for name, head in self.heads.items()}
        return {
            "action_logits": out["action"],
            "look": torch.tanh(out["look"]),
            "hotbar_logits": out["hotbar"],
            "cursor": torch.sigmoid(out["cursor"]),
            "inv_click_logits": out["inv"],
        }


# ALGO LOGIC: losses ---------------------------------------------------------------------------------------------------
def action_loss(logits, targets, gameplay_mask, pos_weights):
    """Weighted cross-entropy of the actions, 0 outside of gameplay, mean over all frames. (B, 12) twice, (B,) bool,
    (12,) -> scalar"""
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weights, reduction="none")
    return (loss * gameplay_mask.unsqueeze(1)).mean()


def look_loss(output, targets, gameplay_mask, deadzone: float = LOOK_DEADZONE):
    """Huber loss of yaw and pitch, summed over both, mean over gameplay frames with a look beyond the deadzone, 0 where
    there is none. (B, 2) twice, (B,) bool -> scalar"""
    active = gameplay_mask & (targets.abs() > deadzone).any(1)
    loss = F.smooth_l1_loss(output, targets, reduction="none") * active.unsqueeze(1)
    return loss.sum() / active.sum().clamp(min=1)


def hotbar_loss(logits, targets):
    """Cross-entropy of the slot, mean over the frames where it changed, 0 where none. (B, 9), (B,) long, -1 for no
    change -> scalar"""
    total = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def cursor_loss(output, targets, screen_mask):
    """Squared error of x and y, summed over both, mean over frames with an open screen. (B, 2) twice, (B,) bool ->
    scalar"""
    loss = F.mse_loss(output, targets, reduction="none") * screen_mask.unsqueeze(1)
    return loss.sum() / screen_mask.sum().clamp(min=1)


def inv_loss(logits, targets, screen_mask, pos_weights):
    """Weighted cross-entropy of the clicks, summed over the three, mean over frames with an open screen. (B, 3) twice,
    (B,) bool, (3,) -> scalar"""
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weights, reduction="none")
    return (loss * screen_mask.unsqueeze(1)).sum() / screen_mask.sum().clamp(min=1)


def idle_loss(logits, targets, gameplay_mask):
    """Mean probability of an action on the gameplay frames in which the player takes none, 0 where there is none.
    (B, 12) twice, (B,) bool -> scalar"""
    idle = gameplay_mask & (targets.sum(1) == 0)
    return (torch.sigmoid(logits) * idle.unsqueeze(1)).sum() / (idle.sum() * logits.shape[1]).clamp(min=1)


def masked_means(losses: dict, fractions: dict) -> dict:
    """The specified losses as plain means over a head's own frames and columns. `fractions`: share of the frames with
    gameplay, a hotbar change, an open screen."""
    gameplay = torch.as_tensor(fractions["gameplay"])
    action = torch.where(gameplay > 0, losses["action"] / gameplay.clamp(min=1e-8), 0.0)
    means = {"action": action, "look": losses["look"] / 2, "cursor": losses["cursor"] / 2, "inv": losses["inv"] / 3}
    return losses | means


def combined_loss(losses: dict, fractions: dict, weights: dict, norm: str = "seed"):
    """The sum that is minimised, of six scalar losses. norm seed: with the specified multipliers, the share of the
    frames with gameplay (again, for the actions), a hotbar change, an open screen. masked-mean: of plain means."""
    if norm == "masked-mean":
        return sum(weights[name] * loss for name, loss in masked_means(losses, fractions).items())
    g, h, s = fractions["gameplay"], fractions["hotbar"], fractions["screen"]
    share = {"action": g, "look": g, "hotbar": h, "cursor": s, "inv": s, "idle": 1.0}
    return sum(weights[name] * loss * share[name] for name, loss in losses.items())


def effective_weights(fractions: dict, weights: dict, norm: str) -> dict:
    """What each head's plain mean is multiplied with in `combined_loss`."""
    g, h, s = fractions["gameplay"], fractions["hotbar"], fractions["screen"]
    if norm == "masked-mean":
        return dict(weights)
    share = {"action": g * g, "look": 2 * g, "hotbar": h, "cursor": 2 * s, "inv": 3 * s, "idle": 1.0}
    return {name: weight * share[name] for name, weight in weights.items()}


def pos_weights(targets, mask, cap: float = 50.0):
    """Weight of a control's positives: rows under the mask / (2 * positives), at most `cap`. (N, C), (N,) -> (C,)"""
    targets = targets[mask].float()
    return (len(targets) / (2 * targets.sum(0).clamp(min=1))).clamp(max=cap)


def positive_weights(data: Recordings, rows) -> tuple:
    """Of the actions (12,), over the gameplay frames among the rows (N,), and of the clicks (3,), over the others."""
    screen, controls = data.mode[rows, 0] > 0, data.controls[rows]
    actions, clicks = controls[:, list(ACTION_COLUMNS)], controls[:, CLICKS]
    return pos_weights(actions, ~screen), pos_weights(clicks, screen)


def hotbar_target(controls):
    """Index of the slot that is switched to, -1 where none is. (B, 28) -> (B,) long"""
    slots = controls[:, SLOTS]
    return torch.where((slots > 0.5).any(1), slots.argmax(1), -1)


def head_losses(out: dict, controls, screen, positives, inventory_always: bool, actions=None) -> tuple[dict, dict]:
    """The six losses of the network's outputs, and the shares of gameplay, hotbar-change and screen frames.

    controls (B, 28), screen (B,) bool, positives: weights of the actions (12,) and clicks (3,). `actions`: which of
    the twelve actions count, None for all."""
    gameplay, slots = ~screen, hotbar_target(controls)
    logits, targets = out["action_logits"], torch.cat([controls[:, :9], controls[:, 11:14]], 1)  # (B, 12)
    action_positives, inv_positives = positives
    if actions is not None:
        logits, targets, action_positives = logits[:, actions], targets[:, actions], action_positives[actions]
    losses = {
        "action": action_loss(logits, targets, gameplay, action_positives),
        "look": look_loss(out["look"], controls[:, LOOK], gameplay),
        "hotbar": hotbar_loss(out["hotbar_logits"], slots),
        "cursor": cursor_loss(out["cursor"], controls[:, CURSOR], screen),
        "inv": inv_loss(out["inv_click_logits"], controls[:, CLICKS], screen, inv_positives),
        "idle": idle_loss(logits, targets, gameplay),
    }
    if inventory_always and (actions is None or 11 in actions):  # open_inventory on the other frames too
        closing = action_loss(logits[:, -1:], targets[:, -1:], screen, action_positives[-1:])
        losses["action"] = losses["action"] + closing / logits.shape[1]
    shares = {"gameplay": gameplay.float().mean(), "hotbar": (slots >= 0).float().mean()}
    return losses, shares | {"screen": screen.float().mean()}


def loss_weights(args: Args, columns: set | None = None) -> dict[str, float]:
    """The weight of each loss, 0 for heads without any of `columns`, those of a curriculum's stage."""
    weights = {"action": args.w_action, "look": args.w_look, "hotbar": args.w_hotbar}
    weights |= {"cursor": args.w_cursor, "inv": args.w_inv, "idle": args.w_idle}
    off = [name for name, own in HEAD_COLUMNS.items() if columns is not None and not columns & set(own)]
    return weights | dict.fromkeys(off, 0.0)


# metrics --------------------------------------------------------------------------------------------------------------
SCORE_WEIGHTS = {"action": 0.4, "look": 0.2, "hotbar": 0.1, "cursor": 0.1, "inv": 0.1, "idle": 0.1}
SCREEN_PIXELS = (1920, 1080)
NEAR = 3  # frames an event may be off


def combined_score(metrics: dict) -> float:
    """The specified score, 0..1, of avg_action_f1, look_mse, hotbar_accuracy, cursor_mse, avg_inv_f1, idle_accuracy."""
    return float(sum(SCORE_WEIGHTS[head] * part for head, part in _score_parts(metrics).items()))


def _score_parts(metrics: dict) -> dict:
    return {
        "action": metrics["avg_action_f1"],
        "look": max(0.0, 1 - metrics["look_mse"]),
        "hotbar": metrics["hotbar_accuracy"],
        "cursor": max(0.0, 1 - metrics["cursor_mse"]),
        "inv": metrics["avg_inv_f1"],
        "idle": metrics["idle_accuracy"],
    }


def f1_scores(predicted, true) -> np.ndarray:
    """F1 of each column, 0 where nothing is predicted and nothing true. (N, C) bool twice -> (C,)"""
    hits, wrong = (predicted & true).sum(0), (predicted != true).sum(0)
    return 2 * hits / np.maximum(2 * hits + wrong, 1)


def optimize_thresholds(probs, targets, idle_mask) -> np.ndarray:
    """Per control the threshold of 0.10, 0.15, ... 0.85 with the highest F1 - 0.5 * false positives per idle frame,
    the lowest of equals; 0.5 where none is above 0, as without positives. (N, C) twice, (N,) bool -> (C,)"""
    targets, idle = np.asarray(targets) > 0.5, np.asarray(idle_mask, bool)
    best, thresholds = np.zeros(targets.shape[1]), np.full(targets.shape[1], 0.5)
    for threshold in np.round(np.arange(0.1, 0.9, 0.05), 2):
        predicted = np.asarray(probs) > threshold
        score = f1_scores(predicted, targets) - 0.5 * (predicted[idle].mean(0) if idle.any() else 0)
        better = score > best
        best[better], thresholds[better] = score[better], threshold
    return thresholds


def outputs_of(controls) -> dict:
    """Controls (N, 28) in the form of the network's outputs, to score them as such."""
    names = {"action": "probs"}
    return {names.get(head, head): np.asarray(controls)[:, list(columns)] for head, columns in HEAD_COLUMNS.items()}


def baseline_outputs(controls, begins) -> dict[str, dict]:
    """What a policy puts out that does nothing, and one that repeats the recording's last row. (N, 28), (N,) bool"""
    nothing, before = np.zeros_like(controls), np.roll(controls, 1, axis=0)
    nothing[:, list(CURSOR_COLUMNS)] = 0.5
    before[begins] = nothing[begins]
    return {"do_nothing": outputs_of(nothing), "repeat_last": outputs_of(before)}


def onsets(down, begins) -> np.ndarray:
    """Frames on which a control goes down. (N, C) bool, (N,) bool: rows that begin a session -> (N, C) bool"""
    before = np.roll(down, 1, axis=0) & ~begins[:, None]
    return down & ~before


def event_f1(predicted, true, session, early: int = NEAR, late: int = NEAR) -> float:
    """F1 of events, each matched with at most one of the other side, in the same session, up to `early` frames before
    and `late` after it. (N,) bool twice, (N,) session of a row"""
    free, hits = list(np.flatnonzero(predicted)), 0
    for t in np.flatnonzero(true):
        near = [p for p in free if t - early <= p <= t + late and session[p] == session[t]]
        if near:
            hits += 1
            free.remove(near[0])
    return 2 * hits / max(1, int(predicted.sum() + true.sum()))


def control_metrics(
    outputs: dict, controls, game_state, thresholds=None, inv_thresholds=None, begins=None, fps: float = 30.0
) -> dict:
    """Every metric, as floats. `outputs`: probs (N, 12), look (N, 2), hotbar (N, 9) probabilities (a row of zeros names
    no slot), cursor (N, 2), inv (N, 3) probabilities. `begins` (N,) bool: rows before which time is interrupted; None
    is row 0 alone, and where all are, there are no events. Empty cases: F1, pixel error, drift 0; look and cursor MSE
    0; direction, hotbar and idle accuracy 1."""
    controls, state = np.asarray(controls), np.asarray(game_state)
    begins = np.arange(len(controls)) == 0 if begins is None else np.asarray(begins)
    screen = state[:, SCREEN_OPEN] > 0
    gameplay, true = ~screen, outputs_of(controls)
    action, action_true = outputs["probs"] > (0.5 if thresholds is None else thresholds), true["probs"] > 0.5
    inv, inv_true = outputs["inv"] > (0.5 if inv_thresholds is None else inv_thresholds), true["inv"] > 0.5
    looks = (np.abs(true["look"]) > LOOK_DEADZONE).any(1)
    active, still = gameplay & looks, gameplay & ~looks
    changed = (true["hotbar"] > 0.5).any(1)
    idle = gameplay & ~action_true.any(1)
    slot, slot_true = outputs["hotbar"].argmax(1), true["hotbar"].argmax(1)

    action_f1 = f1_scores(action[gameplay], action_true[gameplay])
    inv_f1 = f1_scores(inv[screen], inv_true[screen])
    look_error = (outputs["look"] - true["look"])[active]
    sign_known = true["look"][active] != 0  # the other axis may rest
    cursor_error = (outputs["cursor"] - true["cursor"])[screen]
    metrics = {
        "avg_action_f1": action_f1.mean(),
        "look_mse": np.square(look_error).mean() if active.any() else 0.0,
        "look_direction_accuracy": (np.sign(outputs["look"]) == np.sign(true["look"]))[active][sign_known].mean()
        if active.any()
        else 1.0,
        "hotbar_accuracy": ((slot == slot_true) & (outputs["hotbar"].max(1) > 0))[changed].mean()
        if changed.any()
        else 1.0,
        "cursor_mse": np.square(cursor_error).mean() if screen.any() else 0.0,
        "cursor_pixel_error": np.linalg.norm(cursor_error * SCREEN_PIXELS, axis=1).mean() if screen.any() else 0.0,
        "avg_inv_f1": inv_f1.mean(),
        "idle_accuracy": (~action[idle].any(1)).mean() if idle.any() else 1.0,
        "look_drift": np.abs(outputs["look"][still]).mean() if still.any() else 0.0,
    }
    names = [CONTROLS[c] for c in ACTION_COLUMNS + INV_COLUMNS]
    metrics |= {f"f1_{name}": f1 for name, f1 in zip(names, [*action_f1, *inv_f1], strict=True)}

    # over the heads and controls that the data show
    shown, inv_shown = action_true[gameplay].any(0), inv_true[screen].any(0)
    support = {"action": shown.any(), "look": active.any(), "hotbar": changed.any()}
    support |= {"cursor": screen.any(), "inv": inv_shown.any(), "idle": idle.any()}
    parts = _score_parts(metrics) | {"action": action_f1[shown].sum() / max(1, shown.sum())}
    parts["inv"] = inv_f1[inv_shown].sum() / max(1, inv_shown.sum())
    weight = sum(SCORE_WEIGHTS[head] for head in SCORE_WEIGHTS if support[head])
    present = sum(SCORE_WEIGHTS[head] * part for head, part in parts.items() if support[head])
    metrics |= {"score": combined_score(metrics), "score_present": present / max(weight, 1e-9)}
    if not begins.all():
        predicted = {"action": action, "inv": inv, "slot": slot, "sure": outputs["hotbar"].max(1) > 0.5}
        metrics |= _event_metrics(predicted, controls, state, begins, fps)
    return {name: float(metric) for name, metric in metrics.items()}


def _event_metrics(predicted: dict, controls, state, begins, fps: float) -> dict:
    """What only consecutive rows can tell: pulses as events, and the frames on which an action changes."""
    session, gameplay = np.cumsum(begins), state[:, SCREEN_OPEN] <= 0
    names = [CONTROLS[c] for c in ACTION_COLUMNS + INV_COLUMNS]
    where = np.stack([gameplay] * len(ACTION_COLUMNS) + [~gameplay] * len(INV_COLUMNS), 1)  # (N, 15)
    down = np.concatenate([predicted["action"], predicted["inv"]], 1) & where
    true = (controls[:, list(ACTION_COLUMNS + INV_COLUMNS)] > 0.5) & where
    down_onsets, true_onsets = onsets(down, begins), onsets(true, begins)
    pulses = [names.index(name) for name in PULSES]
    pairs = {i: (down_onsets[:, i], true_onsets[:, i], session) for i in pulses}
    metrics = {f"event_f1_{names[i]}": event_f1(*pair) for i, pair in pairs.items()}
    shown = [i for i in pulses if true_onsets[:, i].any()]
    metrics["event_f1"] = np.mean([metrics[f"event_f1_{names[i]}"] for i in shown]) if shown else 0.0
    metrics["event_f1_in_time"] = np.mean([event_f1(*pairs[i], late=0) for i in shown]) if shown else 0.0

    changes = true[:, :12] != np.roll(true[:, :12], 1, axis=0)
    changes &= (gameplay & np.roll(gameplay, 1) & ~begins)[:, None]
    pressed, should = down[:, :12][changes], true[:, :12][changes]
    metrics["change_f1"] = f1_scores(pressed[:, None], should[:, None])[0]
    metrics["change_accuracy"] = (pressed == should).mean() if changes.any() else 0.0

    slots = controls[:, list(HOTBAR_COLUMNS)] > 0.5
    near = np.convolve(slots.any(1), np.ones(2 * NEAR + 1), "same") > 0  # of a true change
    other = predicted["slot"] != np.round(8 * state[:, CURRENT_SLOT])
    fires = predicted["sure"] & other & gameplay & ~near
    metrics["false_hotbar_per_minute"] = onsets(fires[:, None], begins).sum() / max(gameplay.sum() / fps / 60, 1e-9)
    sure_true = predicted["sure"] & gameplay
    fired = {s: onsets((sure_true & (predicted["slot"] == s))[:, None], begins)[:, 0] for s in range(9)}
    used = [s for s in range(9) if slots[:, s].any()]
    metrics["event_f1_hotbar"] = np.mean([event_f1(fired[s], slots[:, s], session) for s in used]) if used else 0.0
    return metrics


# the policy as another program uses it --------------------------------------------------------------------------------
class RawPolicy(nn.Module):
    """Windows of raw features (B, T, 671) and which frames are real (B, T) -> action (B, 12), look (B, 2), hotbar
    (B, 9), cursor (B, 2), inv (B, 3), with probabilities for logits. What is exported."""

    def __init__(self, network: ControlTransformer, scale: Scale):
        super().__init__()
        self.network, self.clip = network, scale.clip
        self.mean, self.std = nn.Buffer(scale.mean), nn.Buffer(scale.std)

    def forward(self, x, mask):
        out = self.network(normalise(x, Scale(self.mean, self.std, self.clip)), mask)
        hotbar = out["hotbar_logits"].softmax(1)
        return out["action_logits"].sigmoid(), out["look"], hotbar, out["cursor"], out["inv_click_logits"].sigmoid()


def torch_engine(raw: RawPolicy, device):
    """A function of arrays x (1, 30, 671), mask (1, 30) -> the five outputs as arrays."""
    raw = raw.to(device).eval()

    @torch.inference_mode()
    def run(x, mask):
        return [out.cpu().numpy() for out in raw(torch.from_numpy(x).to(device), torch.from_numpy(mask).to(device))]

    return run


def onnx_engine(path: Path):
    """The same, computed by ONNX Runtime on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda x, mask: session.run(None, {"x": x, "mask": mask})


class ControlPolicy:
    """From a pose and the game's state, frame by frame, to controls. It keeps the window and its own past controls.

        policy = ControlPolicy.load(Path("models"))
        controls = policy.step(frame, state, time.monotonic())  # (28,), zeros release everything

    The network's outputs of the last step are in `outputs`: probs (12,), look (2,), hotbar (9,), cursor (2,), inv (3,).
    """

    def __init__(self, config: dict, engine):
        post = config["post_processing"]
        self.engine, self.post, self.deadzone = engine, post, config["look_deadzone"]
        self.look_alpha, self.per_frame = config["look_smoothing_alpha"], config["history_form"] == "per-frame"
        self.has_history = config["action_history_dropout"] < 1
        names = [CONTROLS[c] for c in ACTION_COLUMNS + INV_COLUMNS]
        self.thresholds = np.array([config["thresholds"][name] for name in names])
        self.pulse, self.columns = np.isin(names, post["pulses"]), np.array(ACTION_COLUMNS + INV_COLUMNS)
        self.gameplay_controls = np.arange(15) < 12
        self.screen_controls = ~self.gameplay_controls
        self.screen_controls[11] = config["open_inventory_always"]

        # rings written twice, so that the newest frames always lie side by side, oldest first
        self.ring = np.zeros((2 * WINDOW, FEATURES), np.float32)
        self.past = np.zeros((2 * (WINDOW + HISTORY), CONTROL_DIM), np.float32)
        self.histories = np.lib.stride_tricks.sliding_window_view(self.past, HISTORY, 0).swapaxes(1, 2)  # views
        self.x, self.mask = np.zeros((1, WINDOW, INPUT_DIM), np.float32), np.zeros((1, WINDOW), bool)
        self.x_history = self.x[0, :, FEATURES:].reshape(WINDOW, HISTORY, CONTROL_DIM)
        self.state, self.controls = np.zeros(STATE_DIM, np.float32), np.zeros(CONTROL_DIM, np.float32)
        self.outputs = {
            name: np.zeros(n, np.float32)
            for name, n in (("probs", 12), ("look", 2), ("hotbar", 9), ("cursor", 2), ("inv", 3))
        }
        self.probs, self.fired = np.zeros(15), np.zeros(15)  # of the twelve actions and three clicks
        self.level, self.before = np.zeros(15, bool), np.zeros(15, bool)
        self.look, self.cursor = np.zeros(2, np.float32), np.zeros(2, np.float32)
        self.reset()

    @classmethod
    def load(cls, folder: Path | str, device="cpu", engine: str = "auto") -> "ControlPolicy":
        """From a `model_dir` or a run folder. engine auto: ONNX Runtime where control_policy.onnx is there and `device`
        is the CPU, otherwise torch."""
        folder = Path(folder)
        config_file, onnx_file = folder / "control_config.json", folder / "control_policy.onnx"
        if not config_file.is_file():
            raise FileNotFoundError(f"{config_file} is missing. Train a policy, or name its folder with --model")
        config = json.loads(config_file.read_text())
        if engine == "auto":
            engine = "onnx" if onnx_file.is_file() and str(device) == "cpu" else "torch"
        if engine == "onnx":
            if not onnx_file.is_file():
                raise FileNotFoundError(f"{onnx_file} is missing. Use --engine torch, or train with --export-onnx")
            return cls(config, onnx_engine(onnx_file))
        return cls(config, torch_engine(load_network(folder / "control_policy.pt"), torch.device(device)))

    def reset(self):
        """Release everything and forget the past."""
        for array in (self.ring, self.past, self.mask, self.controls, self.level, self.look):
            array.fill(0)
        self.fired.fill(-np.inf)
        self.slot_fired = self.time = self.state_time = -np.inf
        self.frames = self.pause = 0  # frames in the window; frames left without any control
        self.screen = None

    def step(self, frame, state, timestamp: float) -> np.ndarray:
        """The controls (28,) for a frame (260,) and a state (46,) at `timestamp` in seconds.

        A state of None means that the game has sent nothing new: the last one holds for 0.5 s. A frame of None means
        that nobody is seen. In both cases, after a gap as long as that, and on any error everything is released."""
        try:
            if not self.time <= timestamp < np.inf:
                raise ValueError(f"timestamp {timestamp}: expected a number not below the last one, {self.time}")
            if frame is None or timestamp - self.time > self.post["state_timeout_s"]:
                self.reset()
            self.time = timestamp
            if state is not None:
                _check_numbers("state", state, self.state)
                self.state[:], self.state_time = state, timestamp
            if timestamp - self.state_time > self.post["state_timeout_s"]:
                self.reset()
            elif frame is not None:
                _check_numbers("frame", frame, self.ring[0, :FRAME_DIM])
                self._observe(frame)
                for (name, own), new in zip(self.outputs.items(), self.engine(self.x, self.mask), strict=True):
                    _check_numbers(f"output {name}", new[0], own)
                    own[:] = new[0]
                self._decide(timestamp)
        except Exception:
            self.reset()
            raise
        return self.controls.copy()

    def _observe(self, frame):
        """Append to the window."""
        i = self.frames % WINDOW
        row, before = self.ring[i], self.ring[(i - 1) % WINDOW]
        row[:FRAME_DIM], row[-STATE_DIM:] = frame, self.state
        row[FRAME_DIM:-STATE_DIM] = row[:POSITIONS] - before[:POSITIONS] if self.frames else 0
        self.ring[i + WINDOW] = row
        self.frames += 1
        self.x[0, :, :FEATURES] = self.ring[i + 1 : i + 1 + WINDOW]
        self.mask[0, -self.frames :] = True
        if self.has_history:  # up to the last step's controls
            last = (self.frames - 2) % (WINDOW + HISTORY) + WINDOW + 1
            self.x_history[:] = self.histories[last - WINDOW + 1 : last + 1] if self.per_frame else self.histories[last]

    def _decide(self, timestamp: float):
        """From `outputs` to `controls`. A pulse is given out once, and stands in the history as long as it is down."""
        out, post, controls = self.outputs, self.post, self.controls
        screen = bool(self.state[SCREEN_OPEN] > 0)
        if screen != self.screen:
            self.pause = 0 if self.screen is None else post["noop_frames"]
            self.screen, self.cursor[:] = screen, out["cursor"]
        acts = self.pause == 0
        self.pause -= not acts
        self.look += self.look_alpha * (out["look"] - self.look)
        self.look *= acts and not screen
        self.cursor += post["cursor_smoothing_alpha"] * (out["cursor"] - self.cursor)

        self.probs[:12], self.probs[12:], self.before[:] = out["probs"], out["inv"], self.level
        self.level[:] = self.probs > self.thresholds + np.where(self.before, -1, 1) * post["hysteresis"]
        self.level &= (self.screen_controls if screen else self.gameplay_controls) & acts
        controls[:] = 0
        controls[self.columns] = self.level
        if acts and screen:
            controls[CURSOR] = self.cursor
        elif acts:
            controls[LOOK] = np.where(np.abs(self.look) < self.deadzone, 0, self.look)
            slot, ready = out["hotbar"].argmax(), timestamp - self.slot_fired >= post["pulse_cooldown_s"]
            other = slot != round(8 * float(self.state[CURRENT_SLOT]))
            if other and ready and out["hotbar"][slot] > post["hotbar_min_confidence"]:
                controls[HOTBAR_COLUMNS[slot]], self.slot_fired = 1, timestamp
        i = (self.frames - 1) % (WINDOW + HISTORY)
        self.past[i] = self.past[i + WINDOW + HISTORY] = controls

        fires = self.level & ~self.before & (timestamp - self.fired >= post["pulse_cooldown_s"])
        self.fired[fires] = timestamp
        controls[self.columns] *= ~self.pulse | fires


def _check_numbers(name: str, values, like: np.ndarray):
    if np.shape(values) != like.shape or not np.isfinite(values).all():
        raise ValueError(f"{name} has the shape {np.shape(values)} or is not finite, expected {like.shape} numbers")


def load_network(path: Path) -> RawPolicy:
    """The network in a control_policy.pt, with what its features are normalised with."""
    saved = runs.load_checkpoint(path)
    network = ControlTransformer(**saved["network"])
    network.load_state_dict(saved["model"])
    return RawPolicy(network, Scale(saved["feature_mean"], saved["feature_std"], saved["feature_clip"])).eval()


def make_config(args: Args, scale: Scale, thresholds, training: dict) -> dict:
    """control_config.json: the specified keys, and what the policy needs beside them. thresholds (15,)"""
    names = [CONTROLS[c] for c in ACTION_COLUMNS + INV_COLUMNS]
    return {
        "version": 2,
        "input_dim": INPUT_DIM,
        "d_model": args.d_model,
        "nhead": args.nhead,
        "num_layers": args.num_layers,
        "dim_feedforward": args.dim_feedforward,
        "dropout": args.dropout,
        "max_seq_len": WINDOW,
        "num_action_controls": HEADS["action"],
        "num_look_controls": HEADS["look"],
        "num_hotbar_slots": HEADS["hotbar"],
        "num_cursor_controls": HEADS["cursor"],
        "num_inv_controls": HEADS["inv"],
        "control_names": list(CONTROLS),
        "thresholds": {name: float(t) for name, t in zip(names, thresholds, strict=True)},
        "look_deadzone": LOOK_DEADZONE,
        "look_smoothing_alpha": 0.35,
        "action_history_length": HISTORY,
        "action_history_dropout": args.action_history_dropout,
        "game_state_dim": STATE_DIM,
        "feature_mean": scale.mean.tolist(),
        "feature_std": scale.std.tolist(),
        "feature_clip": scale.clip,
        "history_form": args.history_form,
        "learnable_decay": args.learnable_decay,
        "open_inventory_always": args.open_inventory_always,
        "post_processing": {
            "hysteresis": 0.05,
            "pulses": list(PULSES),
            "pulse_cooldown_s": 0.3,
            "hotbar_min_confidence": 0.5,
            "cursor_smoothing_alpha": 0.5,
            "noop_frames": 3,
            "state_timeout_s": 0.5,
        },
        "training": training,
    }


def export_onnx(path: Path, raw: RawPolicy) -> float:
    """Write the network, normalisation included, as ONNX; returns the largest difference to torch on windows of noise,
    full and padded. Raises ValueError, and leaves no file, where that is above 1e-4."""
    import onnx
    import onnxruntime as ort

    generator = torch.Generator().manual_seed(0)
    x = raw.mean.cpu() + raw.std.cpu() * torch.randn((4, WINDOW, INPUT_DIM), generator=generator)
    mask = torch.arange(WINDOW) >= torch.tensor([0, 0, 10, 29]).unsqueeze(1)
    raw = raw.cpu().eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is missing
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator, which ONNX lacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            raw,
            (x, mask),
            input_names=["x", "mask"],
            output_names=list(HEADS),
            dynamic_shapes={"x": {0: "batch"}, "mask": {0: "batch"}},
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    torch.backends.mha.set_fastpath_enabled(fast_path)
    onnx.checker.check_model(program.model_proto)
    contents = program.model_proto.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(contents, options, ["CPUExecutionProvider"])
    worst = 0.0
    with torch.no_grad():
        for i in range(4):
            found = session.run(None, {"x": x[i : i + 1].numpy(), "mask": mask[i : i + 1].numpy()})
            true = raw(x[i : i + 1], mask[i : i + 1])
            worst = max(worst, *(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, true, strict=True)))
    if not worst <= 1e-4:
        raise ValueError(f"{path} was not written: its outputs differ from torch's by {worst:.2g}, expected 1e-4")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(contents)
    os.replace(temporary, path)
    return worst


# evaluation -----------------------------------------------------------------------------------------------------------
SHOWN = ("score", "avg_action_f1", "event_f1", "change_f1", "look_mse", "hotbar_accuracy", "cursor_mse", "avg_inv_f1")
SHOWN += ("idle_accuracy",)
EVAL_NAMES = {  # player -> metric -> its name in TensorBoard; the others are in eval.json
    "teacher_forced": {
        "loss": "eval/loss",
        "score": "eval/score",
        "score_present": "eval/score_present",
        "avg_action_f1": "eval/action_f1",
        "look_mse": "eval/look_mse",
        "look_direction_accuracy": "eval/look_direction_accuracy",
        "hotbar_accuracy": "eval/hotbar_accuracy",
        "cursor_mse": "eval/cursor_mse",
        "cursor_pixel_error": "eval/cursor_pixel_error",
        "avg_inv_f1": "eval/inv_f1",
        "idle_accuracy": "eval/idle_accuracy",
        "event_f1": "eval/event_f1",
        "change_f1": "eval/change_f1",
        "look_drift": "eval/look_drift",
        "false_hotbar_per_minute": "eval/false_hotbar_per_minute",
    },
    "tuned": {"score": "eval/score_tuned", "idle_accuracy": "eval/idle_accuracy_tuned"},
    "no_history": {"score": "eval/score_no_history", "event_f1": "eval/event_f1_no_history"},
    "free_running": {"score": "eval/score_free_running", "event_f1": "eval/event_f1_free_running"},
    "do_nothing": {"score": "eval/score_do_nothing", "event_f1": "eval/event_f1_do_nothing"},
    "repeat_last": {
        "score": "eval/score_repeat_last",
        "event_f1": "eval/event_f1_repeat_last",
        "change_f1": "eval/change_f1_repeat_last",
    },
}


@torch.no_grad()
def predict(network, data: Recordings, rows, args: Args, bf16: bool, history_dropout: float = 0.0) -> dict:
    """The network's outputs for rows (N,), with the recording's own controls as history."""
    network.eval()
    history_dropout = 1.0 if args.action_history_dropout == 1 else history_dropout  # as it was trained
    parts = []
    for batch in rows.split(args.batch_size):
        x, real, _, _ = gather_windows(data, batch, args.history_form, history_dropout)
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=bf16):
            parts.append(network(x, real))
    return {name: torch.cat([part[name].float() for part in parts]) for name in parts[0]}


def as_arrays(out: dict) -> dict[str, np.ndarray]:
    """The network's outputs as `control_metrics` takes them."""
    arrays = {"probs": out["action_logits"].sigmoid(), "look": out["look"], "hotbar": out["hotbar_logits"].softmax(1)}
    arrays |= {"cursor": out["cursor"], "inv": out["inv_click_logits"].sigmoid()}
    return {name: array.cpu().numpy() for name, array in arrays.items()}


def free_run(policy: ControlPolicy, session: dict, first: int = 0) -> tuple[dict, np.ndarray, np.ndarray]:
    """The policy on a session's frames from `first` on, with its own controls as history: the network's outputs, the
    controls (N, 28) given out, and the seconds (N,) of each step."""
    N = len(session["frames"]) - first
    outputs = {name: np.zeros((N, len(x)), np.float32) for name, x in policy.outputs.items()}
    controls, seconds = np.zeros((N, CONTROL_DIM), np.float32), np.zeros(N)
    policy.reset()
    for n in tqdm(range(N), desc="free running", leave=False):
        frame, state, timestamp = (session[name][first + n] for name in ("frames", "game_state", "timestamps"))
        started = time.perf_counter()
        controls[n] = policy.step(frame, state, timestamp)
        seconds[n] = time.perf_counter() - started
        for name, array in outputs.items():
            array[n] = policy.outputs[name]
    return outputs, controls, seconds


def free_run_rows(policy: ControlPolicy, data: Recordings, rows: np.ndarray) -> dict:
    """The same for rows (N,) of the recordings, in order: every frame between them is played, those are returned."""
    parts = []
    for i, start in enumerate(data.starts):
        own = rows[(rows >= start) & (rows < start + data.lengths[i])] - start
        if len(own):
            outputs, _, _ = free_run(policy, load_session(data.paths[i]), own[0])
            parts.append({name: array[own - own[0]] for name, array in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def evaluate(
    network, data: Recordings, rows, positives, args: Args, bf16: bool, players: tuple = (), thresholds=None
) -> tuple[dict[str, dict], dict]:
    """Metrics of the teacher-forced network, of `players` (no_history, free_running) and of the baselines on rows (N,),
    at `thresholds` (15,), None for 0.5; and the teacher-forced outputs."""
    controls, numbers = data.controls[rows], rows.cpu().numpy()
    begins = (data.position[rows] == 0).cpu().numpy() | np.r_[True, np.diff(numbers) != 1]
    state = np.zeros((len(rows), STATE_DIM), np.float32)
    state[:, [SCREEN_OPEN, CURRENT_SLOT]] = data.mode[rows].cpu().numpy()
    truth = controls.cpu().numpy(), state
    thresholds = np.full(15, 0.5) if thresholds is None else thresholds
    out = predict(network, data, rows, args, bf16)
    outputs = {"teacher_forced": as_arrays(out)}
    if "no_history" in players:
        outputs["no_history"] = as_arrays(predict(network, data, rows, args, bf16, history_dropout=1.0))
    if "free_running" in players:
        config = make_config(args, data.scale, thresholds, {})
        policy = ControlPolicy(config, torch_engine(RawPolicy(network, data.scale), rows.device))
        outputs["free_running"] = free_run_rows(policy, data, numbers)
    metrics = {
        player: control_metrics(x, *truth, thresholds[:12], thresholds[12:], begins, data.fps)
        for player, x in (outputs | baseline_outputs(truth[0], begins)).items()
    }
    losses, shares = head_losses(out, controls, data.mode[rows, 0] > 0, positives, args.open_inventory_always)
    loss = combined_loss(losses, shares, loss_weights(args), args.loss_norm)
    metrics["teacher_forced"] |= {"loss": float(loss)} | {f"loss_{name}": float(x) for name, x in losses.items()}
    return metrics, outputs["teacher_forced"]


def tune_thresholds(outputs: dict, data: Recordings, rows) -> tuple[np.ndarray, dict]:
    """Thresholds (15,) of actions and clicks on rows (N,), each on the frames where it counts, and how many positives
    of each control there were."""
    true = outputs_of(data.controls[rows].cpu().numpy())
    gameplay = data.mode[rows, 0].cpu().numpy() <= 0
    actions, clicks = true["probs"][gameplay] > 0.5, true["inv"][~gameplay] > 0.5
    thresholds = [optimize_thresholds(outputs["probs"][gameplay], actions, ~actions.any(1))]
    thresholds += [optimize_thresholds(outputs["inv"][~gameplay], clicks, np.zeros(len(clicks), bool))]
    positives = np.r_[actions.sum(0), clicks.sum(0)].tolist()
    names = [CONTROLS[c] for c in ACTION_COLUMNS + INV_COLUMNS]
    return np.concatenate(thresholds), dict(zip(names, positives, strict=True))


def report(metrics: dict[str, dict]):
    print("\n" + " " * 14 + "  ".join(f"{name:>15}" for name in SHOWN))
    for player, figures in metrics.items():
        print(f"{player:<14}" + "  ".join(f"{figures[name]:15.3f}" for name in SHOWN))


def replay(args: Args) -> dict:
    """A trained policy on a recording, its own controls as history: predictions.npz, metrics.json in a run folder."""
    try:
        session = load_session(args.replay)
        device = "cpu" if args.device == "auto" else str(runs.pick_device(args.device))
        policy = ControlPolicy.load(args.model, device, args.engine)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    outputs, controls, seconds = free_run(policy, session)
    true, begins = session["controls"], np.arange(len(seconds)) == 0
    rest = session["game_state"], policy.thresholds[:12], policy.thresholds[12:], begins, session["fps"]
    players = {"free_running": outputs} | baseline_outputs(true, begins)
    metrics = {player: control_metrics(x, true, *rest) for player, x in players.items()}
    steady = 1000 * seconds[min(WINDOW, len(seconds) - 1) :]  # the first steps warm up
    latency = {f"p{p}": float(np.percentile(steady, p)) for p in (50, 90, 99)} | {"max": float(steady.max())}
    run_dir = runs.make_run_dir(args, __file__, f"replay_{Path(args.replay).stem}")
    np.savez_compressed(run_dir / "predictions.npz", controls=controls, timestamps=session["timestamps"], **outputs)
    runs.write_json(run_dir / "metrics.json", {"session": args.replay, "metrics": metrics, "latency_ms": latency})
    report(metrics)
    print("latency of a step in ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in latency.items()))
    print(f"files  {run_dir}: predictions.npz, metrics.json")
    return {"metrics": metrics, "latency_ms": latency, "run_dir": str(run_dir)}


# main -----------------------------------------------------------------------------------------------------------------
TRAIN_NAMES = (
    ("train/loss", "train/loss_action", "train/loss_look", "train/loss_hotbar", "train/loss_cursor", "train/loss_inv")
    + ("train/loss_idle", "train/weight_action", "train/weight_look", "train/weight_hotbar", "train/weight_cursor")
    + ("train/weight_inv", "train/weight_idle", "train/grad_norm")
)


def check_args(args: Args):
    limits = {
        "val_fraction": (0.01, 0.99),
        "stride": (1, 1000),
        "val_stride": (1, 1000),
        "action_history_dropout": (0, 1),
        "feature_clip": (1e-3, np.inf),
        "mirror": (0, 1),
        "noise": (0, 1),
        "time_warp": (0, 0.5),
        "hand_dropout": (0, 1),
        "dropout": (0, 0.99),
        "epochs": (1, np.inf),
        "batch_size": (1, np.inf),
        "learning_rate": (0, np.inf),
        "gradient_clip": (1e-9, np.inf),
        "warmup_epochs": (0, np.inf),
        "early_stop_patience": (0, np.inf),
        "curriculum_share": (0, 1),
        "num_layers": (1, 100),
        "log_every": (1, np.inf),
        "save_every": (1, np.inf),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(args, name)}: expected {low} to {high}")
    if args.nhead < 1 or args.d_model < 1 or args.d_model % args.nhead:
        raise ValueError(f"--d-model {args.d_model} is no multiple of --nhead {args.nhead}")
    if not args.curriculum and (args.curriculum_epochs, args.curriculum_share) != ((20, 20), 0.5):
        raise ValueError("--curriculum-epochs and --curriculum-share are for --curriculum, which is off")


def learning_rate_at(update: int, per_epoch: int, args: Args) -> float:
    """Of an update, counted from 0: linear from 0 over the warm-up, then a cosine down to 1e-6."""
    epoch, lowest = (update + 1) / per_epoch, min(1e-6, args.learning_rate)
    if epoch <= args.warmup_epochs:
        return args.learning_rate * epoch / args.warmup_epochs
    done = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return lowest + (args.learning_rate - lowest) * (1 + math.cos(math.pi * done)) / 2


def open_stage(network: ControlTransformer, stage: int) -> set[int]:
    """The columns that a curriculum trains in its stage, counted from 0. Heads without any of them are frozen."""
    columns = {column for added in STAGE_COLUMNS[: stage + 1] for column in added}
    for name, own in HEAD_COLUMNS.items():
        network.heads[name].requires_grad_(bool(columns & set(own)))
    return columns


def rich_rows(data: Recordings, rows, stage: int):
    """Those of the rows (N,) in which a control of the stage is used."""
    return rows[(data.controls[rows][:, list(STAGE_COLUMNS[stage])].abs() > LOOK_DEADZONE).any(1)]


def table_row(row: dict) -> str:
    train, val = row["train"], row["val"]
    figures = [train["loss"], *(train[f"loss_{head}"] for head in HEADS), val["idle_accuracy"], val["loss"]]
    text = f"{row['epoch']:4d}  " + "  ".join(f"{x:5.3f}" for x in [*figures, val["avg_action_f1"], row["score"]])
    return text + f"  {row['lr']:.1e}".replace("e-0", "e-") + " *" * row["better"]


HEADER = "  Ep  TrLoss  Act    Look  Hbar   Curs   Inv    Idle   VlLoss  VlF1  Score    LR"


def write_policy(run_dir: Path, model_dir: Path, best: dict, config: dict, log: list, onnx: bool) -> float:
    """The policy's files, in the run folder and as copies in `model_dir`: control_policy.pt, training_log.json, perhaps
    control_policy.onnx, and last the control_config.json that `ControlPolicy.load` looks for. Returns the largest
    difference between ONNX and torch."""
    names = ("model", "network", "feature_mean", "feature_std", "feature_clip", "epoch", "score", "script", "run_dir")
    off, onnx_file = 0.0, run_dir / "control_policy.onnx"
    for folder in (run_dir, model_dir):
        runs.save_checkpoint(folder / "control_policy.pt", {name: best[name] for name in names})
        runs.write_json(folder / "training_log.json", log)
        if onnx and folder == run_dir:
            off = export_onnx(onnx_file, load_network(folder / "control_policy.pt"))
        elif onnx:
            shutil.copy(onnx_file, folder / f".{onnx_file.name}.tmp")
            os.replace(folder / f".{onnx_file.name}.tmp", folder / onnx_file.name)
        runs.write_json(folder / "control_config.json", config)
    return off


def load_and_split(args: Args, paths: list[Path], device) -> tuple[Recordings, dict, dict, dict]:
    """The recordings, which frames of which sessions to train and to validate on, {session: (first, end)} twice, and
    what split.json says."""
    data, sessions, problems = load_recordings(paths, args.skip_bad_sessions, device)
    sides = split_sessions(list(sessions.values()), args.val_fraction, args.seed)
    sides = ([list(sessions)[i] for i in side] for side in sides)
    train_frames, val_frames = split_frames(data.lengths, *sides, args.val_fraction)
    n_train, n_val = (sum(end - first for first, end in frames.values()) for frames in (train_frames, val_frames))
    if n_train < args.stride * args.batch_size or not n_val:
        raise ValueError(
            f"{args.recordings_dir} gives {n_train} frames to train on and {n_val} to validate on, too few for "
            f"--batch-size {args.batch_size} and --stride {args.stride}"
        )
    split = {"train": {paths[i].name: span for i, span in train_frames.items()}}
    split |= {"val": {paths[i].name: span for i, span in val_frames.items()}, "left_out": problems}
    for name in ("person", "session_type", "repeated"):
        split[name] = {session["path"].name: session[name] for session in sessions.values()}
    return data, train_frames, val_frames, split


def open_run(args: Args, paths: list[Path], split: dict, start_update: int, **facts):
    """The run folder and what writes TensorBoard's events."""
    if args.resume:
        run_dir = Path(args.resume)
    else:
        run_dir = runs.make_run_dir(args, __file__, Path(args.recordings_dir).resolve().name)
        runs.write_provenance(run_dir, paths, **facts)
        runs.write_json(run_dir / "split.json", split)
    runs.open_checkpoint_dir(args, MODEL_FILES, __file__, run_dir, "model_dir")
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, sync_tensorboard=True)
    writer = SummaryWriter(str(run_dir), purge_step=start_update + 1 if args.resume else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    counts = {side: sum(end - first for first, end in split[side].values()) for side in ("train", "val")}
    print(f"{run_dir}: {counts['train']:,} frames to train on, {counts['val']:,} to validate on")
    print(f"validation: {', '.join(split['val'])}")
    for name, share in split["repeated"].items():
        if share > 0.1:
            print(f"{name}: {share:.0%} of the rows with a look repeat the row before, as of a slower game clock")
    return run_dir, writer


def write_metrics(writer: SummaryWriter, metrics: dict[str, dict], update: int):
    for player, figures in metrics.items():
        for name, metric in figures.items():
            if name in EVAL_NAMES[player]:
                writer.add_scalar(EVAL_NAMES[player][name], metric, update)


def finish(network, data: Recordings, rows, positives, args: Args, bf16: bool, run_dir: Path, best: dict, log: list):
    """The best network on all validation rows, its tuned thresholds, eval.json and the policy's files. Returns the
    metrics; those of `teacher_forced` are at 0.5, all others at the tuned thresholds, which saw the same rows."""
    metrics, outputs = evaluate(network, data, rows, positives, args, bf16)
    thresholds, n_positive = tune_thresholds(outputs, data, rows)
    players = ("no_history", "free_running")
    tuned, _ = evaluate(network, data, rows, positives, args, bf16, players, thresholds)
    metrics |= {"tuned": tuned.pop("teacher_forced")} | tuned
    runs.write_json(run_dir / "eval.json", {"metrics": metrics, "threshold_positives": n_positive})
    training = {"epochs_trained": len(log), "best_epoch": best["epoch"], "best_combined_score": best["score"]}
    training |= {"loss_norm": args.loss_norm, "selection": args.selection, "per_head_metrics": metrics["tuned"]}
    config = make_config(args, data.scale, thresholds, training | {"threshold_positives": n_positive})
    try:
        off = write_policy(run_dir, Path(args.model_dir), best, config, log, args.export_onnx)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    report(metrics)
    unseen = [name for name, n in n_positive.items() if not n]
    print(f"threshold left at 0.5, as validation never shows them: {', '.join(unseen) or 'none'}")
    print(f"\nfiles  {run_dir}, {args.model_dir}: control_policy.pt, control_config.json, training_log.json")
    if args.export_onnx:
        print(f"       control_policy.onnx, within {off:.1e} of torch")
    return metrics


def main(args: Args) -> dict:
    if args.replay:
        return replay(args)
    checkpoint = None
    try:
        if args.resume:
            args = runs.resume_args(args, may_change=("device", "overwrite", "export_onnx"))
            checkpoint = runs.load_checkpoint(Path(args.resume) / "last.pt")
        device = runs.pick_device(args.device)
        check_args(args)
        runs.check_checkpoint_dir(args, MODEL_FILES, __file__, "model_dir")
        paths = find_sessions(args.recordings_dir)
        if checkpoint:
            runs.check_fingerprint(Path(args.resume), paths)
        data, train_frames, val_frames, split = load_and_split(args, paths, device)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    update = checkpoint["update"] if checkpoint else 0
    bf16 = args.precision == "bf16"
    if args.precision == "auto":
        bf16 = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    run_dir, writer = open_run(args, paths, split, update, device=str(device), bf16=bf16)

    # network, optimiser, statistics of the training windows
    runs.seed_everything(args.seed, args.torch_deterministic)
    sizes = {"d_model": args.d_model, "nhead": args.nhead, "num_layers": args.num_layers}
    sizes |= {"dim_feedforward": args.dim_feedforward, "dropout": args.dropout, "learnable_decay": args.learnable_decay}
    network = ControlTransformer(**sizes).to(device)
    forward = torch.compile(network) if args.compile else network
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    train_rows, val_rows = data.rows(train_frames), data.rows(val_frames)
    per_epoch = len(train_rows) // args.stride // args.batch_size
    positives = positive_weights(data, train_rows)
    data.normalise(feature_scale(data, train_rows, args.feature_clip))
    augmentation = {"time_warp": args.time_warp, "mirror": args.mirror, "noise": args.noise}
    augmentation["hand_dropout"] = args.hand_dropout
    score, best_score, bad_epochs, stage, stage_epoch, log = -np.inf, -np.inf, 0, 0, 0, []
    totals = torch.zeros(len(TRAIN_NAMES), device=device)  # over the updates of the epoch
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        best_score, bad_epochs, log = checkpoint["best_score"], checkpoint["bad_epochs"], json.loads(checkpoint["log"])
        stage, stage_epoch, totals = checkpoint["stage"], checkpoint["stage_epoch"], checkpoint["totals"].to(device)
        runs.set_rng_state(checkpoint["rng"])
        torch.set_num_threads(checkpoint["threads"])  # another number sums in another order
    columns = open_stage(network, stage) if args.curriculum else set(range(CONTROL_DIM))

    def save(path: Path):
        state = {
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "update": update,
            "epoch": update // per_epoch,
            "score": score,
            "best_score": best_score,
            "bad_epochs": bad_epochs,
            "stage": stage,
            "stage_epoch": stage_epoch,
            "totals": totals,
            "log": json.dumps(log),
            "rng": runs.rng_state(),
            "threads": torch.get_num_threads(),
            "network": sizes,  # ControlTransformer(**network), of the script beside this file or in the run folder
            "feature_mean": data.scale.mean,
            "feature_std": data.scale.std,
            "feature_clip": data.scale.clip,
            "script": Path(__file__).name,
            "run_dir": str(run_dir.resolve()),
        }
        runs.save_checkpoint(path, state)

    def impatient() -> bool:
        return 0 < args.early_stop_patience <= bad_epochs

    last_stage = len(STAGE_COLUMNS) - 1 if args.curriculum else 0
    chosen = args.selection.removeprefix("score_")  # a player of `evaluate`, but for score and score_present
    players = (chosen,) if chosen in ("no_history", "free_running") else ()
    total, started, waited, trained, start_update = args.epochs * per_epoch, time.time(), 0.0, 0.0, update
    progress = tqdm(total=total, initial=update, desc="updates", unit="update")
    tqdm.write(f"{HEADER}\n{'-' * len(HEADER)}")
    with runs.StopSignal() as stop_signal:
        while update < total and not (impatient() and stage == last_stage) and not stop_signal:
            begun = time.time()
            epoch, position = divmod(update, per_epoch)
            rows = train_rows
            if any(augmentation.values()):
                rows = augment_recordings(data, train_frames, augmentation, args.seed, epoch)
            rich = rich_rows(data, rows, stage) if args.curriculum else None
            order = epoch_rows(rows, per_epoch * args.batch_size, args, epoch, rich)
            actions = [i for i, column in enumerate(ACTION_COLUMNS) if column in columns] if args.curriculum else None
            weights = loss_weights(args, columns)
            network.train()
            for rows in order.view(per_epoch, -1)[position:]:
                # fetch
                fetching = time.time()
                x, real, controls, screen = gather_windows(data, rows, args.history_form, args.action_history_dropout)
                waited += time.time() - fetching

                # forward and loss
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    out = forward(x, real)
                out = {name: tensor.float() for name, tensor in out.items()}
                losses, shares = head_losses(out, controls, screen, positives, args.open_inventory_always, actions)
                loss = combined_loss(losses, shares, weights, args.loss_norm)

                # step
                lr = learning_rate_at(update, per_epoch, args)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(network.parameters(), args.gradient_clip)
                optimizer.step()
                update += 1
                progress.update()

                # log
                effective = effective_weights(shares, weights, args.loss_norm)
                figures = [loss, *losses.values(), *effective.values(), norm]  # as TRAIN_NAMES
                figures = torch.stack([torch.as_tensor(figure, device=device).detach() for figure in figures])
                totals += figures
                if update % args.log_every == 0:
                    done, elapsed = update - start_update, trained + time.time() - begun
                    scalars = dict(zip(TRAIN_NAMES, figures.tolist(), strict=True)) | {
                        "charts/learning_rate": lr,
                        "charts/SPS": done * args.batch_size / (time.time() - started),
                        "charts/frames_seen": update * args.batch_size,
                        "charts/epoch": update / per_epoch,
                        "charts/stage": stage + 1,
                        "time/data_wait_frac": waited / elapsed,
                        "time/step_ms": 1000 * (elapsed - waited) / done,
                    }
                    for name, scalar in scalars.items():
                        writer.add_scalar(name, scalar, update)
                    progress.set_postfix(loss=f"{scalars['train/loss']:.3f}", epoch=epoch + 1)

                # save, but not before an epoch's evaluation
                if (update % args.save_every == 0 or stop_signal) and update % per_epoch:
                    save(run_dir / "last.pt")
                if stop_signal:
                    break
            trained += time.time() - begun
            if update % per_epoch:  # stopped within the epoch
                break

            # evaluate
            metrics, _ = evaluate(network, data, val_rows[:: args.val_stride], positives, args, bf16, players)
            write_metrics(writer, metrics, update)
            by = metrics[chosen if players else "teacher_forced"]
            score = by["score_present" if chosen == "present" else "score"]
            better = score > best_score  # never where it is NaN
            means = dict(zip(TRAIN_NAMES, (totals / per_epoch).tolist(), strict=True))
            entry = {"epoch": epoch + 1, "lr": lr, "stage": stage + 1, "score": score, "better": better}
            entry["train"] = {name.removeprefix("train/"): mean for name, mean in means.items()}
            log.append(entry | {"val": metrics["teacher_forced"]} | {f"val_{p}": metrics[p] for p in players})
            tqdm.write(table_row(log[-1]))
            if not np.isfinite(means["train/loss"]):
                raise SystemExit(f"the loss was not finite in epoch {epoch + 1}. Lower --learning-rate")

            # save; the curriculum's next stage
            best_score, bad_epochs = (score, 0) if better else (best_score, bad_epochs + 1)
            stage_epoch += 1
            totals = torch.zeros_like(totals)
            if better:
                save(run_dir / "best.pt")
            if stage < last_stage and (impatient() or stage_epoch >= args.curriculum_epochs[stage]):
                stage, stage_epoch, best_score, bad_epochs = stage + 1, 0, -np.inf, 0
                columns = open_stage(network, stage)
                tqdm.write(f"stage {stage + 1}: " + ", ".join(CONTROLS[column] for column in STAGE_COLUMNS[stage]))
            runs.write_json(run_dir / "training_log.json", log)
            save(run_dir / "last.pt")
    progress.close()
    if stop_signal and update < total:
        writer.close()
        print(f"stopped after update {update} and saved. Go on with: python {Path(__file__).name} --resume {run_dir}")
        raise SystemExit(130)

    best = runs.load_checkpoint(run_dir / "best.pt", device)
    network.load_state_dict(best["model"])
    metrics = finish(network, data, val_rows, positives, args, bf16, run_dir, best, log)
    write_metrics(writer, metrics, update)
    writer.close()
    for problem in split["left_out"]:
        print(f"left out  {problem}")
    print(f"curves tensorboard --logdir {args.run_root}")
    return {"metrics": metrics, "run_dir": str(run_dir), "update": update}


if __name__ == "__main__":
    main(tyro.cli(Args, args=runs.cli_words(Args, env_prefix="CONTROLS_")))
