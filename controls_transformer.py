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
from motion_controls.metrics import baseline_outputs, control_metrics, optimize_thresholds, outputs_of
from motion_controls.metrics import combined_score as combined_score  # for those who import this script
from motion_controls.sessions import (
    ACTION_COLUMNS,
    BINARY_COLUMNS,
    CLICKS,
    CONTROL_DIM,
    CONTROLS,
    CURRENT_SLOT,
    CURSOR,
    FRAME_DIM,
    HEAD_COLUMNS,
    HEADS,
    HOTBAR_COLUMNS,
    INV_COLUMNS,
    LOOK,
    LOOK_DEADZONE,
    POSITIONS,
    PULSES,
    SCREEN_OPEN,
    SLOTS,
    STATE_DIM,
    find_sessions,
    load_session,
    repeated_share,
)


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
    """augmentation: chance, per session and epoch, to swap left and right; windows with an open screen are left out"""
    noise: float = 0.0
    """augmentation: standard deviation of the noise on landmarks; metres, such as 0.005"""
    time_warp: float = 0.0
    """augmentation: play the session up to this share faster or slower; 0..0.5"""
    hand_dropout: float = 0.0
    """augmentation: chance, per hand and second, to lose it for that second"""

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
    engine: Literal["auto", "onnx", "torch"] = "auto"
    """what computes the network for `replay`; auto: ONNX Runtime on the CPU where `model` holds the file"""


# Axes: B batch, T = 30 frames of a window, N rows of a session, R rows of all sessions, C controls, D features
WINDOW, HISTORY = 30, 5  # frames
STAGE_COLUMNS = ((0, 1, 2, 3, 4, 5, 6, 9, 10), (7, 8, 11, 12), (13, *range(14, 28)))  # what each stage adds
FEATURES = FRAME_DIM + POSITIONS + STATE_DIM  # 531, of one frame
INPUT_DIM = FEATURES + HISTORY * CONTROL_DIM  # 671
SPLIT_GAP = WINDOW + HISTORY  # rows between training and validation of one session: no window sees both
ARRAYS = ("frames", "controls", "game_state")  # of a session
MODEL_FILES = "control_* training_log.json"


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
            if len(chosen) + len(of_type[g]) <= wanted:
                chosen += of_type[g]
        val += chosen or (min(of_type, key=len) if len(of_type) > 1 else [])
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
    """All sessions end to end, on the device, normalised, with WINDOW empty rows before each: the row of a session's
    frame i is `starts[session] + i`. Windows are gathered from these arrays and never stored. Features are kept in
    half precision, within 0.05 % of their value: less memory, and a batch is gathered sooner."""

    def __init__(self, paths: list[Path], lengths: list[int], scale: Scale, fps: float = 30.0, device="cpu"):
        self.paths, self.lengths, self.fps = paths, lengths, fps
        self.scale = Scale(scale.mean.to(device), scale.std.to(device), scale.clip)
        self.starts = (np.cumsum([0, *lengths[:-1]]) + WINDOW * np.arange(1, len(lengths) + 1)).tolist()
        R = self.starts[-1] + lengths[-1]
        self.features = torch.zeros((R, FEATURES), dtype=torch.half, device=device)  # frames, velocity, state
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
        frames, column = torch.from_numpy(session["frames"]), 0
        for part in (frames, velocity(frames), state):
            columns = slice(column, column + part.shape[1])
            scale = Scale(self.scale.mean[columns], self.scale.std[columns], self.scale.clip)
            self.features[rows, columns] = normalise(part.to(scale.mean.device), scale).half()
            column = columns.stop


def check_sessions(paths: list[Path], skip_bad: bool) -> tuple[list[dict], list[str]]:
    """Reads each session once. Returns of those that can be used path, frames (how many), fps, session_type, person
    and repeated, and what is wrong with the others. Raises ValueError or OSError for a bad one, unless `skip_bad`, and
    where none can be used, or their frame rates differ."""
    sessions, problems = [], []
    for path in tqdm(paths, desc="sessions", leave=False):
        try:
            session = load_session(path)
        except (ValueError, OSError) as error:
            if not skip_bad:
                raise
            problems.append(str(error))
            continue
        facts = {name: session[name] for name in ("path", "fps", "session_type", "person")}
        sessions.append(facts | {"frames": len(session["frames"]), "repeated": repeated_share(session)})
    if not sessions:
        raise ValueError(f"none of {len(paths)} sessions can be used, such as {problems[0]}")
    slow, fast = (choose(sessions, key=lambda session: session["fps"]) for choose in (min, max))
    if fast["fps"] > 1.25 * slow["fps"]:
        raise ValueError(
            f"{slow['path']} has {slow['fps']:.3g} frames a second, {fast['path']} has {fast['fps']:.3g}: windows and "
            "velocities would differ. Train on one rate only"
        )
    return sessions, problems


def lay_out(sessions: list[dict], scale: Scale, device) -> Recordings:
    """The sessions of `check_sessions` as `Recordings`. Read one after the other: memory never holds them twice."""
    fps = float(np.median([session["fps"] for session in sessions]))
    lengths = [session["frames"] for session in sessions]
    data = Recordings([session["path"] for session in sessions], lengths, scale, fps, device)
    for i, path in enumerate(tqdm(data.paths, desc="features", leave=False)):
        data.put(i, load_session(path))
    return data


def velocity(frames):
    """First difference per frame of the columns in metres: (N, 260) -> (N, 225), the first row 0."""
    return torch.cat([torch.zeros((1, POSITIONS)), frames[:, :POSITIONS].diff(dim=0)])


def gather_windows(data: Recordings, rows, history_form: str = "tiled", history_dropout: float = 0.0):
    """The windows that end in `rows` (B,): x (B, 30, 671), real (B, 30) bool, and of their last frames controls (B, 28)
    and whether a screen is open (B,). What lies before the start of a session is padding, on the left: only real rows
    of x count. The next call with as many rows overwrites x."""
    B, device = len(rows), rows.device
    if B not in data.buffers:
        half = torch.empty((B, WINDOW, FEATURES), dtype=torch.half, device=device)
        data.buffers[B] = torch.empty((B, WINDOW, INPUT_DIM), device=device), half
    x, half = data.buffers[B]
    torch.index_select(data.windows, 0, rows - (WINDOW - 1), out=half)
    x[..., :FEATURES] = half
    back = torch.arange(-WINDOW + 1, 1, device=device)
    ends = rows.unsqueeze(1) if history_form == "tiled" else rows.unsqueeze(1) + back  # (B, 1 or 30)
    begins = (ends.flatten() - HISTORY).clamp(min=0)  # less than 0 for padding only
    history = data.histories.index_select(0, begins)  # oldest first, 0 before the start of a session
    history = history.view(*ends.shape, HISTORY, CONTROL_DIM)
    if history_dropout:  # before normalising, so that a dropped entry equals the start of a session
        # drawn for each frame of the recording, so that one is gone wherever it stands in the window
        kept = torch.rand((B, ends.shape[1] + HISTORY - 1), device=device) > history_dropout
        history *= kept.unfold(1, HISTORY, 1).unsqueeze(3)
    history = history.flatten(2)  # (B, 1 or 30, 140)
    mean, std, clip = data.scale
    x[..., FEATURES:] = normalise(history, Scale(mean[FEATURES:], std[FEATURES:], clip))
    real = data.position[rows].unsqueeze(1) + back >= 0
    return x, real, data.controls[rows], data.mode[rows, 0] > 0


def feature_scale(paths: list[Path], frames: dict[int, tuple[int, int]], clip: float) -> Scale:
    """Mean and standard deviation of the 671 features over the windows that end in {session: (first, end)}; a column
    that does not change has 1. Read from the files, in float64."""
    total, squares = torch.zeros((2, INPUT_DIM), dtype=torch.float64)
    for i, (first, end) in tqdm(frames.items(), desc="statistics", leave=False):
        session = {name: torch.from_numpy(array) for name, array in load_session(paths[i]).items() if name in ARRAYS}
        moving, controls = velocity(session["frames"]), F.pad(session["controls"], (0, 0, HISTORY, 0))
        histories = controls.unfold(0, HISTORY, 1).transpose(1, 2).flatten(1)  # (N + 1, 140)
        for rows in torch.arange(first, end).split(4096):
            parts = (session["frames"][rows], moving[rows], session["game_state"][rows], histories[rows])
            x = torch.cat(parts, 1).double()
            total, squares = total + x.sum(0), squares + x.square().sum(0)
    n = sum(end - first for first, end in frames.values())
    mean = total / n
    std = (squares / n - mean.square()).clamp(min=0).sqrt()
    std[std < 1e-6] = 1
    return Scale(mean.float(), std.float(), clip)


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
    """Play from frame `first` on at another speed. A pulse that falls between two frames is kept, a slot change is one
    frame long, and a hand that appears or vanishes does so at once."""
    N = len(frames)
    at = first + speed * np.arange(N)
    at = at[at <= N - 1]  # (M,)
    below = np.floor(at).astype(int)
    share = (at - below)[:, None].astype(np.float32)
    nearest, above = np.round(at).astype(int), np.minimum(below + 1, N - 1)
    last = np.maximum(nearest, np.r_[nearest[1:], nearest[-1] + 1] - 1).clip(max=N - 1)
    binary, kept = list(BINARY_COLUMNS), controls[nearest]
    kept[:, binary] = np.maximum(kept[:, binary], controls[last][:, binary])
    kept[1:, SLOTS] *= (nearest[1:] != nearest[:-1])[:, None]
    mixed = (1 - share) * frames[below] + share * frames[above]
    mixed[:, POSITIONS:] = frames[nearest, POSITIONS:]  # whether hands are there, and visibility
    for hand, columns in enumerate((slice(99, 162), slice(162, 225))):
        came = frames[below, POSITIONS + hand] != frames[above, POSITIONS + hand]
        mixed[came, columns] = frames[nearest[came], columns]
    return mixed, kept, game_state[nearest]


def augment_session(session: dict, settings: dict, rng) -> tuple[dict, np.ndarray]:
    """A session of at most as many frames (M), and which of them (M,) end a window to train on: where the sides are
    swapped, none with an open screen. `settings`: time_warp, mirror, noise, hand_dropout."""
    arrays = tuple(session[name] for name in ARRAYS)
    if settings["time_warp"]:
        speed = 1 + rng.uniform(-1, 1) * settings["time_warp"]
        first = int(rng.integers(1 + len(arrays[0]) - min(len(arrays[0]), int(speed * len(arrays[0])))))
        arrays = warp(*arrays, speed, first)
    usable = np.ones(len(arrays[0]), bool)
    if rng.random() < settings["mirror"]:
        screens = np.cumsum(np.r_[np.zeros(WINDOW, int), arrays[2][:, SCREEN_OPEN] > 0])
        free = screens[WINDOW:] == screens[:-WINDOW]  # none in the window
        if free.any():
            arrays, usable = mirror(*arrays), free
    frames = arrays[0].astype(np.float32)  # a copy
    if settings["noise"]:
        noise = settings["noise"] * rng.standard_normal((len(frames), POSITIONS), np.float32)
        frames[:, :POSITIONS] += noise * (frames[:, :POSITIONS] != 0)  # what was not seen stays 0
    for hand, columns in enumerate((slice(99, 162), slice(162, 225))):
        lost = np.repeat(rng.random(len(frames) // WINDOW + 1) < settings["hand_dropout"], WINDOW)[: len(frames)]
        frames[lost, columns] = frames[lost, 225 + hand] = 0
    return dict(zip(ARRAYS, (frames, *arrays[1:]), strict=True)), usable


def augment_recordings(data: Recordings, frames: dict, settings: dict, seed: int, epoch: int) -> torch.Tensor:
    """Write the sessions of {session: (first, end)} anew, as this epoch sees them; returns the rows to train on. Read
    from the files again, so that memory holds nothing twice."""
    rows = []
    for i, (first, end) in frames.items():
        session = load_session(data.paths[i])
        part = {name: session[name][first:end] for name in ARRAYS}
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
    gameplay, a hotbar change, an open screen; where it differs from that with gameplay, also that of the actions."""
    own = torch.as_tensor(fractions.get("action", fractions["gameplay"]))
    action = torch.where(own > 0, losses["action"] / own.clamp(min=1e-8), 0.0)
    means = {"action": action, "look": losses["look"] / 2, "cursor": losses["cursor"] / 2, "inv": losses["inv"] / 3}
    return losses | means


def combined_loss(losses: dict, fractions: dict, weights: dict, norm: str = "seed"):
    """The sum that is minimised, of six scalar losses. norm seed: with the specified multipliers, the share of the
    frames with gameplay (again, for the actions), a hotbar change, an open screen. masked-mean: of plain means."""
    if norm == "masked-mean":
        return sum(weights[name] * loss for name, loss in masked_means(losses, fractions).items())
    g, h, s = fractions["gameplay"], fractions["hotbar"], fractions["screen"]
    share = {"action": fractions.get("action", g), "look": g, "hotbar": h, "cursor": s, "inv": s, "idle": 1.0}
    return sum(weights[name] * loss * share[name] for name, loss in losses.items())


def effective_weights(fractions: dict, weights: dict, norm: str) -> dict:
    """What each head's plain mean is multiplied with in `combined_loss`."""
    g, h, s = fractions["gameplay"], fractions["hotbar"], fractions["screen"]
    if norm == "masked-mean":
        return dict(weights)
    share = {
        "action": fractions.get("action", g) ** 2,
        "look": 2 * g,
        "hotbar": h,
        "cursor": 2 * s,
        "inv": 3 * s,
        "idle": 1.0,
    }
    return {name: weight * share[name] for name, weight in weights.items()}


def pos_weights(targets, mask, cap: float = 50.0):
    """Weight of a control's positives: rows under the mask / (2 * positives), at most `cap`. (N, C), (N,) -> (C,)"""
    targets = targets[mask].float()
    return (len(targets) / (2 * targets.sum(0).clamp(min=1))).clamp(max=cap)


def class_weights(data: Recordings, rows) -> tuple:
    """`pos_weights` of the actions (12,) and clicks (3,), each over the frames of its mode among the rows (N,)."""
    screen, controls = data.mode[rows, 0] > 0, data.controls[rows]
    actions, clicks = controls[:, list(ACTION_COLUMNS)], controls[:, CLICKS]
    return pos_weights(actions, ~screen), pos_weights(clicks, screen)


def hotbar_target(controls):
    """Index of the slot that is switched to, -1 where none is. (B, 28) -> (B,) long"""
    slots = controls[:, SLOTS]
    return torch.where((slots > 0.5).any(1), slots.argmax(1), -1)


def head_losses(out: dict, controls, screen, class_weight, inventory_always: bool, actions=None) -> tuple[dict, dict]:
    """The six losses of the network's outputs, and the shares of gameplay, hotbar-change and screen frames.

    controls (B, 28), screen (B,) bool, class_weight: of the actions (12,) and clicks (3,). `actions`: which of
    the twelve actions count, None for all."""
    gameplay, slots = ~screen, hotbar_target(controls)
    logits, targets = out["action_logits"], torch.cat([controls[:, :9], controls[:, 11:14]], 1)  # (B, 12)
    action_weight, inv_weight = class_weight
    if actions is not None:
        logits, targets, action_weight = logits[:, actions], targets[:, actions], action_weight[actions]
    losses = {
        "action": action_loss(logits, targets, gameplay, action_weight),
        "look": look_loss(out["look"], controls[:, LOOK], gameplay),
        "hotbar": hotbar_loss(out["hotbar_logits"], slots),
        "cursor": cursor_loss(out["cursor"], controls[:, CURSOR], screen),
        "inv": inv_loss(out["inv_click_logits"], controls[:, CLICKS], screen, inv_weight),
        "idle": idle_loss(logits, targets, gameplay),
    }
    shares = {"gameplay": gameplay.float().mean(), "hotbar": (slots >= 0).float().mean()}
    shares |= {"screen": screen.float().mean()}
    if inventory_always and (actions is None or 11 in actions):  # open_inventory on the other frames too
        closing = action_loss(logits[:, -1:], targets[:, -1:], screen, action_weight[-1:])
        losses["action"] = losses["action"] + closing / logits.shape[1]
        shares["action"] = shares["gameplay"] + shares["screen"] / logits.shape[1]
    return losses, shares


def loss_weights(args: Args, columns: set | None = None) -> dict[str, float]:
    """The weight of each loss, 0 for heads without any of `columns`, those of a curriculum's stage."""
    weights = {"action": args.w_action, "look": args.w_look, "hotbar": args.w_hotbar}
    weights |= {"cursor": args.w_cursor, "inv": args.w_inv, "idle": args.w_idle}
    off = [name for name, own in HEAD_COLUMNS.items() if columns is not None and not columns & set(own)]
    return weights | dict.fromkeys(off, 0.0)


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
    options.intra_op_num_threads = 1  # more would spin between two frames, on the cores that the tracker needs
    try:
        session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise ValueError(
            f"{path} does not load: {str(error).splitlines()[0]}. Train again, or --engine torch"
        ) from None
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
        try:
            config = json.loads(config_file.read_text())
        except ValueError as error:
            raise ValueError(f"{config_file} is no JSON ({error}). Train again, or name another --model") from None
        if engine == "auto":
            engine = "onnx" if onnx_file.is_file() and str(device) == "cpu" else "torch"
        if engine == "onnx":
            if not onnx_file.is_file():
                raise FileNotFoundError(f"{onnx_file} is missing. Use --engine torch, or train with --export-onnx")
            return cls(config, onnx_engine(onnx_file))
        return cls(config, torch_engine(load_network(folder / "control_policy.pt"), torch.device(device)))

    def reset(self):
        """Release everything and forget the past."""
        self._release()
        self.fired.fill(-np.inf)
        self.slot_fired = self.time = self.state_time = -np.inf
        self.pause, self.screen = 0, None  # frames left without any control; whether a screen is open

    def _release(self):
        """Everything up, and the window begins anew. Cooldowns and the game's state stay."""
        for array in (self.ring, self.past, self.mask, self.controls, self.level, self.look):
            array.fill(0)
        self.frames = 0  # in the window

    def step(self, frame, state, timestamp: float) -> np.ndarray:
        """The controls (28,) for a frame (260,) and a state (46,) at `timestamp` in seconds.

        A state of None means that the game has sent nothing new: the last one holds for 0.5 s. A frame of None means
        that nobody is seen. In both cases, after a gap as long as that, and on any error everything is released."""
        try:
            if not self.time <= timestamp < np.inf:
                raise ValueError(f"timestamp {timestamp}: expected a number not below the last one, {self.time}")
            if frame is None or timestamp - self.time > self.post["state_timeout_s"]:
                self._release()
            self.time = timestamp
            if state is not None:
                _check_numbers("state", state, self.state)
                self.state[:], self.state_time = state, timestamp
            if timestamp - self.state_time > self.post["state_timeout_s"]:
                self._release()
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


def make_config(args: Args, scale: Scale, fps: float, thresholds, training: dict) -> dict:
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
        "fps": fps,
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


def free_run_rows(policy: ControlPolicy, data: Recordings, rows: np.ndarray) -> dict[str, dict]:
    """The same for rows (N,) of the recordings, in order: every frame between them is played, those are returned. The
    network's outputs, and in the same form the controls given out, where a pulse is one frame long."""
    players = {"free_running": [], "given_out": []}
    for i, start in enumerate(data.starts):
        own = rows[(rows >= start) & (rows < start + data.lengths[i])] - start
        if len(own):
            outputs, controls, _ = free_run(policy, load_session(data.paths[i]), own[0])
            for player, x in (("free_running", outputs), ("given_out", outputs_of(controls))):
                players[player].append({name: array[own - own[0]] for name, array in x.items()})
    return {
        player: {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}
        for player, parts in players.items()
    }


def evaluate(
    network, data: Recordings, rows, class_weight, args: Args, bf16: bool, players: tuple = (), thresholds=None
) -> tuple[dict[str, dict], dict]:
    """Metrics of the teacher-forced network, of `players` (no_history, free_running) and of the baselines on rows (N,),
    at `thresholds` (15,), None for 0.5; and the teacher-forced outputs."""
    controls, numbers = data.controls[rows], rows.cpu().numpy()
    before = data.controls[rows - 1].cpu().numpy()  # zeros where a session begins
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
        config = make_config(args, data.scale, data.fps, thresholds, {})
        policy = ControlPolicy(config, torch_engine(RawPolicy(network, data.scale), rows.device))
        outputs |= free_run_rows(policy, data, numbers)
    metrics = {
        player: control_metrics(x, *truth, thresholds[:12], thresholds[12:], begins, data.fps)
        for player, x in (outputs | baseline_outputs(truth[0], before)).items()
    }
    losses, shares = head_losses(out, controls, data.mode[rows, 0] > 0, class_weight, args.open_inventory_always)
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
    used = ("replay", "model", "engine", "device", "exp_name", "seed", "run_root")
    for name, value in vars(Args()).items():
        if getattr(args, name) != value and name not in used:
            raise SystemExit(
                f"--{name.replace('_', '-')} is for training. With --replay it changes nothing: leave it out"
            )
    try:
        if not Path(args.replay).is_file():
            raise FileNotFoundError(f"{args.replay} is missing. --replay takes a session_*.npz")
        session = load_session(args.replay)
        device = "cpu" if args.device == "auto" else str(runs.pick_device(args.device))
        policy = ControlPolicy.load(args.model, device, args.engine)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    outputs, controls, seconds = free_run(policy, session)
    true, begins = session["controls"], np.arange(len(seconds)) == 0
    before = np.concatenate([np.zeros_like(true[:1]), true[:-1]])
    rest = session["game_state"], policy.thresholds[:12], policy.thresholds[12:], begins, session["fps"]
    players = {"free_running": outputs, "given_out": outputs_of(controls)} | baseline_outputs(true, before)
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
        "feature_clip": (1e-3, 1000),
        "mirror": (0, 1),
        "noise": (0, 1),
        "time_warp": (0, 0.5),
        "hand_dropout": (0, 1),
        "dropout": (0, 0.99),
        "epochs": (1, np.inf),
        "batch_size": (1, np.inf),
        "learning_rate": (0, 1e3),
        "weight_decay": (0, 1e3),
        "dim_feedforward": (1, np.inf),
        "gradient_clip": (1e-9, np.inf),
        "warmup_epochs": (0, np.inf),
        "early_stop_patience": (0, np.inf),
        "curriculum_share": (0, 1),
        "num_layers": (1, 100),
        "log_every": (1, np.inf),
        "save_every": (1, np.inf),
    }
    limits |= {name: (0, 1e6) for name in vars(args) if name.startswith("w_")}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(args, name)}: expected {low} to {high}")
    if args.nhead < 1 or args.d_model < 1 or args.d_model % args.nhead:
        raise ValueError(f"--d-model {args.d_model} is no multiple of --nhead {args.nhead}")
    if not args.curriculum and (args.curriculum_epochs, args.curriculum_share) != ((20, 20), 0.5):
        raise ValueError("--curriculum-epochs and --curriculum-share are for --curriculum, which is off")
    if args.curriculum and not (min(args.curriculum_epochs) >= 1 and sum(args.curriculum_epochs) < args.epochs):
        raise ValueError(
            f"--curriculum-epochs {args.curriculum_epochs}: expected at least 1 each, and together less than --epochs "
            f"{args.epochs}, as the third stage trains the heads that are left"
        )


def check_finite(totals, epoch: int):
    """Stop before anything is saved that cannot learn any more."""
    if not totals[0].isfinite():
        raise SystemExit(f"the loss was not finite in epoch {epoch + 1}. Lower --learning-rate, and begin anew")


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


def write_policy(run_dir: Path, args: Args, best: dict, config: dict, log: list) -> float:
    """The policy's files, in the run folder and as copies in `model_dir`: control_policy.pt, training_log.json, perhaps
    control_policy.onnx, and last the control_config.json that `ControlPolicy.load` looks for. Returns the largest
    difference between ONNX and torch. Raises ValueError, with all files in the run folder, where by now `model_dir` is
    another run's."""
    names = ("model", "network", "feature_mean", "feature_std", "feature_clip", "epoch", "score", "script", "run_dir")
    model_dir, off = Path(args.model_dir), 0.0
    runs.save_checkpoint(run_dir / "control_policy.pt", {name: best[name] for name in names})
    runs.write_json(run_dir / "training_log.json", log)
    files = ["control_policy.pt", "training_log.json", "control_config.json"]
    if args.export_onnx:
        off = export_onnx(run_dir / "control_policy.onnx", load_network(run_dir / "control_policy.pt"))
        files.insert(0, "control_policy.onnx")
    runs.write_json(run_dir / "control_config.json", config)
    runs.check_checkpoint_dir(args, MODEL_FILES, __file__, "model_dir")
    runs.open_checkpoint_dir(args, MODEL_FILES, __file__, run_dir, "model_dir")
    for name in files:
        shutil.copy(run_dir / name, model_dir / f".{name}.tmp")
        os.replace(model_dir / f".{name}.tmp", model_dir / name)
    return off


def check_and_split(args: Args, paths: list[Path]) -> tuple[list[dict], dict, dict, dict]:
    """The sessions that can be used, which frames of which of them to train and to validate on, {session: (first, end)}
    twice, and what split.json says."""
    sessions, problems = check_sessions(paths, args.skip_bad_sessions)
    sides = split_sessions(sessions, args.val_fraction, args.seed)
    lengths = [session["frames"] for session in sessions]
    train_frames, val_frames = split_frames(lengths, *sides, args.val_fraction)
    n_train, n_val = (sum(end - first for first, end in frames.values()) for frames in (train_frames, val_frames))
    if n_train < args.stride * args.batch_size or not n_val:
        raise ValueError(
            f"{args.recordings_dir} gives {n_train} frames to train on and {n_val} to validate on, too few for "
            f"--batch-size {args.batch_size} and --stride {args.stride}"
        )
    names = [session["path"].name for session in sessions]
    split = {"train": {names[i]: span for i, span in train_frames.items()}}
    split |= {"val": {names[i]: span for i, span in val_frames.items()}, "left_out": problems}
    for fact in ("person", "session_type", "repeated"):
        split[fact] = {name: session[fact] for name, session in zip(names, sessions, strict=True)}
    return sessions, train_frames, val_frames, split


def open_run(args: Args, paths: list[Path], split: dict, start_update: int, **facts):
    """The run folder and what writes TensorBoard's events."""
    if args.resume:
        run_dir = Path(args.resume)
    else:
        run_dir = runs.make_run_dir(args, __file__, Path(args.recordings_dir).resolve().name)
        runs.write_provenance(run_dir, paths, **facts)
        runs.write_json(run_dir / "split.json", split)
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
    for player, names in EVAL_NAMES.items():
        for metric, name in names.items():
            if metric in metrics.get(player, {}):
                writer.add_scalar(name, metrics[player][metric], update)


def finish(network, data: Recordings, rows, class_weight, args: Args, bf16: bool, run_dir: Path, best: dict, log: list):
    """The best network on all validation rows, its tuned thresholds, eval.json and the policy's files. Returns the
    metrics; those of `teacher_forced` are at 0.5, all others at the tuned thresholds, which saw the same rows."""
    metrics, outputs = evaluate(network, data, rows, class_weight, args, bf16)
    thresholds, n_positive = tune_thresholds(outputs, data, rows)
    players = ("no_history", "free_running")
    tuned, _ = evaluate(network, data, rows, class_weight, args, bf16, players, thresholds)
    metrics |= {"tuned": tuned.pop("teacher_forced")} | tuned
    runs.write_json(run_dir / "eval.json", {"metrics": metrics, "threshold_positives": n_positive})
    training = {"epochs_trained": len(log), "best_epoch": best["epoch"], "best_combined_score": best["score"]}
    training |= {"loss_norm": args.loss_norm, "selection": args.selection, "per_head_metrics": metrics["tuned"]}
    config = make_config(args, data.scale, data.fps, thresholds, training | {"threshold_positives": n_positive})
    try:
        off = write_policy(run_dir, args, best, config, log)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{error}\nthe policy is in {run_dir}") from None
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
        sessions, train_frames, val_frames, split = check_and_split(args, paths)
        scale = feature_scale([session["path"] for session in sessions], train_frames, args.feature_clip)
        data = lay_out(sessions, scale, device)
        Path(args.model_dir).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    update = checkpoint["update"] if checkpoint else 0
    bf16 = args.precision == "bf16"
    if args.precision == "auto":
        bf16 = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    run_dir, writer = open_run(args, paths, split, update, device=str(device), bf16=bf16)

    # network, optimiser
    train_rows, val_rows = data.rows(train_frames), data.rows(val_frames)
    class_weight = class_weights(data, train_rows)
    runs.seed_everything(args.seed, args.torch_deterministic)
    sizes = {"d_model": args.d_model, "nhead": args.nhead, "num_layers": args.num_layers}
    sizes |= {"dim_feedforward": args.dim_feedforward, "dropout": args.dropout, "learnable_decay": args.learnable_decay}
    network = ControlTransformer(**sizes).to(device)
    forward = torch.compile(network) if args.compile else network
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    per_epoch = len(train_rows) // args.stride // args.batch_size
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

    resume_command = f"python {Path(__file__).name} --resume {run_dir}"
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
                try:
                    rows = augment_recordings(data, train_frames, augmentation, args.seed, epoch)
                except (ValueError, OSError) as error:
                    raise SystemExit(f"{error}\nThen go on with: {resume_command}") from None
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
                losses, shares = head_losses(out, controls, screen, class_weight, args.open_inventory_always, actions)
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
                    check_finite(totals, epoch)
                    save(run_dir / "last.pt")
                if stop_signal:
                    break
            trained += time.time() - begun
            if update % per_epoch:  # stopped within the epoch
                break

            # evaluate
            check_finite(totals, epoch)
            metrics, _ = evaluate(network, data, val_rows[:: args.val_stride], class_weight, args, bf16, players)
            write_metrics(writer, metrics, update)
            by = metrics[chosen if players else "teacher_forced"]
            score = by["score_present" if chosen == "present" else "score"]
            better = score > best_score  # never where it is NaN
            means = dict(zip(TRAIN_NAMES, (totals / per_epoch).tolist(), strict=True))
            entry = {"epoch": epoch + 1, "lr": lr, "stage": stage + 1, "score": score, "better": better}
            entry["train"] = {name.removeprefix("train/"): mean for name, mean in means.items()}
            log.append(entry | {"val": metrics["teacher_forced"]} | {f"val_{p}": metrics[p] for p in players})
            tqdm.write(table_row(log[-1]))

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
        print(f"stopped after update {update} and saved. Go on with: {resume_command}")
        raise SystemExit(130)

    best = runs.load_checkpoint(run_dir / "best.pt", device)
    network.load_state_dict(best["model"])
    metrics = finish(network, data, val_rows, class_weight, args, bf16, run_dir, best, log)
    write_metrics(writer, {name: metrics[name] for name in ("tuned", "no_history", "free_running")}, best["update"])
    writer.close()
    for problem in split["left_out"]:
        print(f"left out  {problem}")
    print(f"curves tensorboard --logdir {args.run_root}")
    return {"metrics": metrics, "run_dir": str(run_dir), "update": update}


if __name__ == "__main__":
    main(tyro.cli(Args, args=runs.cli_words(Args, env_prefix="CONTROLS_")))
