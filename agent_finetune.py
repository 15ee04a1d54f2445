"""A world model of a game, and an agent inside it: recorded play to a policy that acts from what the model sees.

Learns from packed episodes (frames, actions, rewards) in three phases, after Dreamer 4 (Hafner et al. 2025, arXiv
2509.24527). tokenizer: frames to a few latents (masked autoencoder). dynamics: the next latents from the past and the
actions (shortcut forcing). agent: an agent token in the same network reads out rewards and actions (reward and policy
heads, behavioural cloning). Page, with the time convention drawn: docs/agent_finetune.md

    python agent_finetune.py --data-dir sample_packed --env-id retro:Airstriker-Genesis-v0

In: a folder of pack_episodes.py. Out: runs/<task>__agent_finetune__<seed>__<time>/ with tokenizer.pt, dynamics.pt,
agent.pt, model.safetensors, eval.json, pictures, films and TensorBoard events."""

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import runs
from common.returns import death_events  # noqa: F401  the rule by which pack_episodes.py finds deaths
from common.video import VideoWriter, resize


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

    data_dir: str = "packed"
    """folder of pack_episodes.py: meta.json and an .npz per episode"""
    heldout: str = "heldout*"
    """name or pattern of the episodes that are only evaluated on; if none matches, the last by name"""

    phase: Literal["tokenizer", "dynamics", "agent", "eval", "all"] = "all"
    """the last phase; those it builds on are trained first, unless their checkpoints are given. eval trains nothing and
    needs --agent-checkpoint; all is agent and eval"""
    tokenizer_checkpoint: str | None = None
    """tokenizer.pt of another run; None trains one"""
    dynamics_checkpoint: str | None = None
    """dynamics.pt of another run, made with that tokenizer; None trains one"""
    agent_checkpoint: str | None = None
    """agent.pt of another run, for --phase eval"""
    preset: Literal["cpu", "gpu-s", "gpu-m"] = "cpu"
    """sizes of the networks, batches and trainings; see PRESETS"""
    tokenizer_steps: int = 0
    """updates of the tokenizer; 0 means the preset's"""
    dynamics_steps: int = 0
    """updates of the dynamics; 0 means the preset's"""
    agent_steps: int = 0
    """updates of the agent; 0 means the preset's"""
    batch_size: int = 0
    """windows of the short length per update; 0 means the preset's"""

    lr: float = 1e-3
    """learning rate of AdamW, of what is new in a phase"""
    trunk_lr_scale: float = 0.1
    """times `lr` for the dynamics in the agent phase; above 0"""
    trunk: Literal["finetune", "freeze"] = "finetune"
    """freeze: the agent phase trains the agent token and the heads only"""
    weight_decay: float = 0.01
    """of AdamW; none on norms, biases, embeddings"""
    warmup_steps: int = 100
    """updates in which the learning rate rises from 0, in each phase"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm; 0 means never"""
    activation_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them: less memory, a third more time"""
    compile_model: bool = False
    """torch.compile the blocks"""

    latents: Literal["grid", "free"] = "grid"
    """grid: each latent begins with the mean of its cell's patches; free: with a learnt vector alone"""
    mask_ratio: float = 0.9
    """each image hides patches with a chance drawn from 0 to this, while the tokenizer trains; 0..1"""
    foreground_weight: float = 3.0
    """weight of pixels that differ from the mean frame in the tokenizer's loss; 1 means none"""

    bootstrap_ratio: float = 0.25
    """share of a batch that learns steps larger than the smallest, from two of half the size"""
    bootstrap_from: float = 0.2
    """share of the dynamics phase after which that begins; 0..1"""
    independent_frame_ratio: float = 0.3
    """chance that a window's frames are unrelated images to the dynamics, which teaches it first frames; 0..1"""
    long_every: int = 10
    """every so many updates take long windows; 0 means never"""

    mtp: int = 8
    """rows ahead that each head predicts (multi-token prediction)"""
    reward_range: float = 5.0
    """largest reward a bin stands for, in symlog units; the data can only widen it"""
    value_range: float = 9.0
    """the same for values"""
    reward_mixture: bool = True
    """half of a batch from windows with a reward, which alone train the policy, the other half alone the dynamics"""
    agent_signal: float = 0.5
    """frames noisier than this signal level train no head; 0 (pure noise) .. 1"""

    env_id: str | None = None
    """the game to play at the end, such as retro:Airstriker-Genesis-v0; None: none"""
    play_episodes: int = 20
    """games of each player, on the same seeds"""
    play_seed: int = 1_000_000
    """the first of the seeds"""
    max_steps: int = 1000
    """steps until a game is cut off"""
    num_envs: int = 10
    """games that are played side by side, each in a process"""
    sampling_steps: int = 0
    """denoising steps of a predicted frame; 0 means the preset's"""
    log_every: int = 10
    """updates between two rows of TensorBoard scalars"""
    save_every: int = 200
    """updates between two saves of last.pt"""


# Axes: B batch, T frames of a window, S slots (tokens of a frame), D width, P patches, N x Z latents of a frame, A
# keys, M movements, L rows ahead, R rows of all episodes laid end to end, E games side by side. Row t holds frame t
# and the action, reward and end that came with it (arrival): the policy at row t chooses the action of row t + 1.
PRESETS = {
    "cpu": {
        "tokenizer": {"size": 64, "patch": 8, "dim": 64, "layers": 2, "heads": 2, "n_latents": 16, "latent_dim": 16},
        "tokenizer_time": {"time_every": 2, "clip": 2},  # frames that the tokenizer sees at once
        "pack": 2,  # latents that make one token of the dynamics
        "dynamics": {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "registers": 4},
        "dynamics_time": {"time_every": 2, "k_max": 8, "context": 16},  # finest step 1 / k_max; frames attended to
        "lengths": (8, 24),
        "batches": {"tokenizer": 16, "dynamics": 16, "agent": 16},
        "steps": {"tokenizer": 2000, "dynamics": 1500, "agent": 800},
    },
    "gpu-s": {
        "tokenizer": {"size": 128, "patch": 8, "dim": 256, "layers": 8, "heads": 8, "n_latents": 64, "latent_dim": 16},
        "tokenizer_time": {"time_every": 4, "clip": 4},
        "pack": 2,
        "dynamics": {"dim": 512, "layers": 12, "heads": 8, "kv_heads": 4, "registers": 8},
        "dynamics_time": {"time_every": 4, "k_max": 64, "context": 192},
        "lengths": (64, 256),
        "batches": {"tokenizer": 64, "dynamics": 32, "agent": 32},
        "steps": {"tokenizer": 20_000, "dynamics": 40_000, "agent": 10_000},
    },
    "gpu-m": {
        "tokenizer": {
            "size": 256,
            "patch": 16,
            "dim": 512,
            "layers": 8,
            "heads": 8,
            "n_latents": 256,
            "latent_dim": 16,
        },
        "tokenizer_time": {"time_every": 4, "clip": 4},
        "pack": 2,
        "dynamics": {"dim": 768, "layers": 18, "heads": 12, "kv_heads": 4, "registers": 8},
        "dynamics_time": {"time_every": 4, "k_max": 64, "context": 192},
        "lengths": (64, 256),
        "batches": {"tokenizer": 64, "dynamics": 16, "agent": 16},
        "steps": {"tokenizer": 100_000, "dynamics": 100_000, "agent": 20_000},
    },
}
PHASES = ("tokenizer", "dynamics", "agent")
COLUMNS = ("frame_index", "movement", "keys", "reward", "cont", "act_valid", "rew_valid")
REPACK = "Pack it again with pack_episodes.py, or move it away"
FOREGROUND = 0.1  # a pixel is foreground where a channel is so far from the mean frame, of 1
N_BINS = 255
HORIZONS = (1, 2, 4, 8, 16)  # frames ahead that the dynamics is scored at
START = 8  # real frames before an open-loop prediction


# data: which rows, which windows --------------------------------------------------------------------------------------
@dataclass
class Rows:
    """Episodes laid end to end. A run is a stretch of one without a gap, or an end of the game, inside."""

    frames: np.ndarray | None  # (R, H, W, 3) uint8; None where the data are latents
    z: torch.Tensor | None  # (R, N, Z) float16; None until the tokenizer has made them
    movement: torch.Tensor  # (R,) int64
    keys: torch.Tensor  # (R, A) float32
    reward: torch.Tensor  # (R,) float32
    cont: torch.Tensor  # (R,) float32, 0 where the game ended
    act_valid: torch.Tensor  # (R,) bool
    rew_valid: torch.Tensor  # (R,) bool
    runs: np.ndarray  # (U, 2) first row, row after the last


def load_meta(data_dir: Path) -> dict:
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


def load_rows(data_dir: Path, names: list[str], meta: dict) -> Rows:
    """The episodes of these names. Raises ValueError naming the file, what was found and the mend."""
    pixels, shape = ("frames", meta["frame_shape"]) if "frame_shape" in meta else ("z", meta["z_shape"])
    parts, starts, n_rows = [], [], 0
    for name in names:
        path = data_dir / f"{name}.npz"
        try:
            with np.load(path) as file:
                part = {column: file[column] for column in (pixels, *COLUMNS)}
        except KeyError as error:
            raise ValueError(f"{path}: {error.args[0]}. Expected {pixels}, {', '.join(COLUMNS)}. {REPACK}") from None
        except Exception as error:  # a damaged file raises many kinds
            raise ValueError(f"{path} is missing, cut off or damaged ({error}). {REPACK}") from None
        try:
            check_episode(part, pixels, tuple(shape), meta)
        except ValueError as error:
            raise ValueError(f"{path}: {error}. {REPACK}") from None
        jump = np.diff(part["frame_index"].astype(np.int64)) > 1
        cuts = np.r_[0, np.flatnonzero(jump | (part["cont"][:-1] == 0)) + 1]
        if meta["action_index"] == "departure":  # row t has the action that follows frame t
            for column in ("movement", "keys", "act_valid"):
                part[column] = np.roll(part[column], 1, 0)
            part["act_valid"][cuts] = False
        parts.append(part)
        starts += list(n_rows + cuts)
        n_rows += len(part["reward"])
    joined = {column: np.concatenate([part[column] for part in parts]) for column in (pixels, *COLUMNS)}
    runs_ = np.stack([np.array(starts), np.r_[starts[1:], n_rows]], 1).astype(np.int64)
    return Rows(
        frames=joined.get("frames"),
        z=torch.tensor(joined["z"]) if pixels == "z" else None,
        movement=torch.tensor(joined["movement"].astype(np.int64)),
        keys=torch.tensor(joined["keys"].astype(np.float32)),
        reward=torch.tensor(np.where(joined["rew_valid"], joined["reward"], 0).astype(np.float32)),
        cont=torch.tensor(joined["cont"].astype(np.float32)),
        act_valid=torch.tensor(joined["act_valid"].astype(bool)),
        rew_valid=torch.tensor(joined["rew_valid"].astype(bool)),
        runs=runs_,
    )


def check_episode(part: dict[str, np.ndarray], pixels: str, shape: tuple, meta: dict):
    """Raise ValueError where the arrays of an episode are not what meta.json says."""
    n, index, movement = len(part[pixels]), part["frame_index"], part["movement"]
    other = {column: len(part[column]) for column in COLUMNS if len(part[column]) != n}
    if n == 0 or other:
        raise ValueError(f"{pixels} has {n} rows, {other or 'which is too few'}: expected as many of each, 1 or more")
    if part[pixels].shape[1:] != shape:
        raise ValueError(f"{pixels} has the shape {part[pixels].shape[1:]} in a row, meta.json says {shape}")
    if part["keys"].shape != (n, len(meta["keys"])) or movement.min() < 0 or movement.max() >= meta["n_movement"]:
        found = f"movement {movement.min()} to {movement.max()}, keys {part['keys'].shape}"
        raise ValueError(f"{found}, meta.json has {meta['n_movement']} movements and {len(meta['keys'])} keys")
    back = np.flatnonzero(np.diff(index.astype(np.int64)) <= 0)
    if len(back):
        raise ValueError(
            f"frame_index does not increase: {index[back[0]]}, then {index[back[0] + 1]}, at row {back[0]}"
        )
    bad = np.flatnonzero(~np.isfinite(part["reward"]) & part["rew_valid"].astype(bool))
    if len(bad):
        raise ValueError(f"the reward of row {bad[0]} is {part['reward'][bad[0]]}, expected a number")
    if pixels == "z" and not np.isfinite(part["z"]).all():
        raise ValueError("z holds values that are not numbers")


def choose_windows(rows: Rows, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of `length` rows at half their length from each other, and one at the end of each run: (W, 2) first row
    and end of the run; and which of them hold a reward (W,) bool. A run that is shorter makes one window."""
    windows = []
    for first, stop in rows.runs[np.diff(rows.runs)[:, 0] >= 2]:
        last = max(first, stop - length)
        windows += [(start, stop) for start in (*range(first, last, max(1, length // 2)), last)]
    windows = np.array(windows, np.int64).reshape(-1, 2)
    event = np.r_[0, np.cumsum((rows.rew_valid & (rows.reward != 0)).numpy())]
    return windows, event[np.minimum(windows[:, 0] + length, windows[:, 1])] > event[windows[:, 0]]


class WindowSampler:
    """Half of each batch from a shuffled pass over all windows, none twice before all were seen; the other half, with
    replacement, from those that hold a reward. Draws are a function of the seed and of `state`."""

    def __init__(self, n_windows: int, relevant: np.ndarray, seed: int):
        self.n, self.relevant, self.seed = n_windows, relevant, seed
        self.state = {"epoch": 0, "position": 0, "batches": 0}

    def draw(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,) windows, and which of them are of the uniform half (n,) bool."""
        n_uniform = n if len(self.relevant) == 0 else n - n // 2
        uniform = []
        while len(uniform) < n_uniform:
            order = np.random.default_rng((self.seed, 0, self.state["epoch"])).permutation(self.n)
            taken = order[self.state["position"] :][: n_uniform - len(uniform)]
            uniform += list(taken)
            self.state["position"] += len(taken)
            if self.state["position"] == self.n:
                self.state["epoch"], self.state["position"] = self.state["epoch"] + 1, 0
        rng = np.random.default_rng((self.seed, 1, self.state["batches"]))
        self.state["batches"] += 1
        relevant = rng.choice(self.relevant, n - n_uniform) if n > n_uniform else np.zeros(0, np.int64)
        return np.r_[np.array(uniform), relevant].astype(np.int64), np.arange(n) < n_uniform


def gather(rows: Rows, windows: np.ndarray, length: int, ahead: int, device) -> dict[str, torch.Tensor]:
    """(B, 2) windows -> z (B, T, N, Z), and of T + `ahead` rows movement, keys, reward, cont, act_valid, rew_valid, and
    inside (the row is of the same run). Where the run ends its last row repeats, not inside and not valid. A window is
    moved back as far as its run allows, so that as few rows as possible are empty."""
    first, stop = torch.tensor(windows).T  # (B,), (B,)
    run_start = torch.tensor(rows.runs[np.searchsorted(rows.runs[:, 0], windows[:, 0], "right") - 1, 0])
    first = torch.maximum(torch.minimum(first, stop - length), run_start)
    index = first[:, None] + torch.arange(length + ahead)  # (B, T + ahead)
    inside = index < stop[:, None]
    index = torch.minimum(index, stop[:, None] - 1)
    batch = {name: getattr(rows, name)[index] for name in ("movement", "keys", "reward", "cont")}
    batch |= {name: getattr(rows, name)[index] & inside for name in ("act_valid", "rew_valid")} | {"inside": inside}
    batch["z"] = rows.z[index[:, :length]].float()
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


# ALGO LOGIC: network --------------------------------------------------------------------------------------------------
def rope(x: torch.Tensor, first: int) -> torch.Tensor:
    """Rotary positions (Su et al. 2021) first, first + 1, ... of (..., T, H)."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = (first + torch.arange(x.shape[-2], device=x.device))[:, None] * frequency  # (T, H / 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Block(nn.Module):
    """Attention over the slots of a frame, or of each slot over its own past, then a SwiGLU; norms before them, and on
    queries and keys. `kv_heads` heads of keys and values serve `heads` of queries (grouped-query attention)."""

    def __init__(self, dim: int, heads: int, kv_heads: int, over_time: bool):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.over_time = heads, kv_heads, dim // heads, over_time
        self.norm, self.ff_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        self.out = nn.Linear(dim, dim, bias=False)
        hidden = 64 * math.ceil(dim * 8 / 3 / 64)
        self.ff_in, self.ff_out = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x, mask, first: int = 0, past=None):
        """x (B, T, S, D); mask (S, S), or over time (T, K), (B, T, K), None for all; True may be seen. `past`: keys
        and values (B * S, heads, K - T, H) of the frames before `first`. Returns x, keys and values."""
        B, T, S, D = x.shape
        y = self.norm(x)
        y = y.transpose(1, 2).reshape(B * S, T, D) if self.over_time else y.reshape(B * T, S, D)
        heads = self.qkv(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (rows, heads, length, H)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.over_time:
            q, k = rope(q, first), rope(k, first)
            if past is not None:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            if mask is not None and mask.dim() == 3:
                mask = mask[:, None].expand(B, S, *mask.shape[1:]).reshape(B * S, 1, *mask.shape[1:])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        y = self.out(y.transpose(1, 2).flatten(2))
        y = y.reshape(B, S, T, D).transpose(1, 2) if self.over_time else y.reshape(B, T, S, D)
        x = x + y
        gate, value = self.ff_in(self.ff_norm(x)).chunk(2, -1)
        return x + self.ff_out(F.silu(gate) * value), (k, v)


class Trunk(nn.Module):
    """Blocks over (B, T, S, D): every `time_every`-th over time, causal, `context` frames far; the others over the
    slots, where `allowed` (S, S) says which query sees which key."""

    def __init__(self, dim, layers, heads, kv_heads, time_every, context, allowed: torch.Tensor):
        super().__init__()
        over_time = [time_every > 0 and i % time_every == time_every - 1 for i in range(layers)]
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads, time) for time in over_time)
        self.norm, self.context, self.recompute = nn.RMSNorm(dim), context, False
        self.register_buffer("allowed", allowed, persistent=False)

    def time_mask(self, T: int, past: int, independent: torch.Tensor | None) -> torch.Tensor | None:
        """(T, past + T), or with `independent` (B,) bool, whose frames see themselves only, (B, T, past + T)."""
        if T == 1 and independent is None:
            return None  # `past` is never longer than the context
        age = torch.arange(past, past + T, device=self.allowed.device)[:, None]
        age = age - torch.arange(past + T, device=self.allowed.device)
        mask = (age >= 0) & (age < self.context)
        return mask if independent is None else torch.where(independent[:, None, None], age == 0, mask)

    def forward(self, x, independent=None, cache: dict | None = None):
        """`cache` of the frames before, {} for none, None where none is wanted. Returns x and the new cache."""
        first, past = (cache or {}).get("first", 0), (cache or {}).get("past", [None] * len(self.blocks))
        known = next((p[0].shape[2] for p in past if p is not None), 0)
        mask, new = self.time_mask(x.shape[1], known, independent), []
        for block, before in zip(self.blocks, past, strict=True):
            args = (x, mask if block.over_time else self.allowed, first, before)
            if self.recompute and self.training and torch.is_grad_enabled():
                x, seen = recompute(block, *args, use_reentrant=False)
            else:
                x, seen = block(*args)
            keep = block.over_time and cache is not None
            new.append(tuple(a[:, :, -(self.context - 1) :] for a in seen) if keep and self.context > 1 else None)
        return self.norm(x), None if cache is None else {"first": first + x.shape[1], "past": new}


class Tokenizer(nn.Module):
    """Masked autoencoder: frames to `n_latents` x `latent_dim` numbers in -1..1, and back. Frames are read, and
    written, as what differs from the mean frame."""

    def __init__(self, size, patch, dim, layers, heads, n_latents, latent_dim, time_every, clip, grid: bool):
        super().__init__()
        side, cells = size // patch, math.isqrt(n_latents)
        if grid and (cells * cells != n_latents or side % cells):
            raise ValueError(f"{n_latents} latents are no grid over {side} x {side} patches. Take --latents free")
        self.patch, self.side, self.cells, self.grid = patch, side, cells, grid
        P, N = side * side, n_latents
        is_latent = torch.arange(P + N) >= P
        self.embed = nn.Linear(3 * patch * patch, dim)
        self.hidden_patch = nn.Parameter(0.02 * torch.randn(dim))
        self.patch_position = nn.Parameter(0.02 * torch.randn(P, dim))
        self.latent_start = nn.Parameter(0.02 * torch.randn(N, dim))
        self.to_latent, self.from_latent = nn.Linear(dim, latent_dim), nn.Linear(latent_dim, dim)
        self.query_position = nn.Parameter(0.02 * torch.randn(P, dim))
        self.latent_position = nn.Parameter(0.02 * torch.randn(N, dim))
        self.to_pixels = nn.Linear(dim, 3 * patch * patch)
        nn.init.zeros_(self.to_pixels.weight)
        nn.init.zeros_(self.to_pixels.bias)
        # latents see everything, patches only patches; on the way back patches see everything, latents only latents
        encoder_mask, decoder_mask = is_latent[:, None] | ~is_latent, ~is_latent[:, None] | is_latent
        self.encoder = Trunk(dim, layers, heads, heads, time_every, clip, encoder_mask)
        self.decoder = Trunk(dim, layers, heads, heads, time_every, clip, decoder_mask)
        self.register_buffer("mean_frame", torch.zeros(3, size, size))

    def patches(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, T, P, 3 * patch^2)"""
        B, T, p, side = *frames.shape[:2], self.patch, self.side
        return frames.reshape(B, T, 3, side, p, side, p).permute(0, 1, 3, 5, 2, 4, 6).reshape(B, T, side * side, -1)

    def encode(self, frames: torch.Tensor, hidden: torch.Tensor | None = None, cache: dict | None = None):
        """frames (B, T, 3, H, W) in 0..1, `hidden` (B, T, P) bool -> z (B, T, N, Z) and the cache."""
        x = self.embed(self.patches(frames - self.mean_frame))  # (B, T, P, D)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.hidden_patch.to(x.dtype), x)
        latents = self.latent_start.expand(*x.shape[:2], -1, -1)
        if self.grid:
            c, k = self.cells, self.side // self.cells
            latents = latents + x.unflatten(2, (c, k, c, k)).mean((3, 5)).flatten(2, 3)
        x, cache = self.encoder(torch.cat([x + self.patch_position, latents], 2), cache=cache)
        return torch.tanh(self.to_latent(x[:, :, self.side**2 :])), cache

    def decode(self, z: torch.Tensor, cache: dict | None = None):
        """z (B, T, N, Z) -> frames (B, T, 3, H, W), about 0..1, and the cache."""
        latents, c, k, p = self.from_latent(z), self.cells, self.side // self.cells, self.patch
        queries = self.query_position.expand(*z.shape[:2], -1, -1)
        if self.grid:
            near = latents.unflatten(2, (c, c)).repeat_interleave(k, 2).repeat_interleave(k, 3)
            queries = queries + near.flatten(2, 3)
        x, cache = self.decoder(torch.cat([queries, latents + self.latent_position], 2), cache=cache)
        x = self.to_pixels(x[:, :, : self.side**2])  # (B, T, P, 3 * patch^2)
        x = x.unflatten(2, (self.side, self.side)).unflatten(-1, (3, p, p)).permute(0, 1, 4, 2, 5, 3, 6)
        return self.mean_frame + x.flatten(5, 6).flatten(3, 4), cache


class Dynamics(nn.Module):
    """Clean latents from noisy ones, the past and the actions. Slots of a frame: latents, registers, the action, the
    noise level with the step size, and last the agent, who sees all and whom nobody sees."""

    def __init__(
        self,
        n_tokens,
        token_dim,
        bounded,
        n_movement,
        n_keys,
        dim,
        layers,
        heads,
        kv_heads,
        registers,
        time_every,
        k_max,
        context,
    ):
        super().__init__()
        self.n_tokens, self.k_max, self.bounded = n_tokens, k_max, bounded  # bounded: z lies in -1..1
        S = n_tokens + registers + 3
        is_agent = torch.arange(S) == S - 1
        self.z_in, self.z_out = nn.Linear(token_dim, dim), nn.Linear(dim, token_dim)
        self.slots = nn.Parameter(
            0.02 * torch.randn(S - 1, dim)
        )  # also the registers, and the action that is not known
        self.movement, self.keys = nn.Embedding(n_movement, dim), nn.Embedding(max(1, n_keys), dim)
        self.signal, self.step = nn.Embedding(k_max, dim // 2), nn.Embedding(k_max.bit_length(), dim - dim // 2)
        self.agent, self.task = nn.Parameter(0.02 * torch.randn(dim)), nn.Embedding(1, dim)
        for table in (self.movement, self.keys, self.signal, self.step, self.task):
            nn.init.normal_(table.weight, std=0.02)
        self.trunk = Trunk(dim, layers, heads, kv_heads, time_every, context, ~is_agent | is_agent[:, None])

    def forward(self, z, signal, step, actions: dict, independent=None, cache: dict | None = None):
        """z (B, T, N, Z) noisy; signal (B, T) in 0..k_max - 1, of k_max; step (B, T), of the size 2^step / k_max;
        actions movement (B, T), keys (B, T, A), act_valid (B, T); independent (B,) bool, whose frames are unrelated
        images. Returns clean z (B, T, N, Z), what the agent reads (B, T, D), and the cache."""
        known = actions["act_valid"] if independent is None else actions["act_valid"] & ~independent[:, None]
        action = self.movement(actions["movement"]) + actions["keys"] @ self.keys.weight[: actions["keys"].shape[-1]]
        action = torch.where(known[..., None], action, 0.0)  # (B, T, D)
        level = torch.cat([self.signal(signal), self.step(step)], -1)
        registers = torch.zeros(*level.shape[:2], len(self.slots) - self.n_tokens - 2, level.shape[-1], device=z.device)
        world = torch.cat([self.z_in(z), registers, action[:, :, None], level[:, :, None]], 2) + self.slots
        agent = (self.agent + self.task.weight[0]).expand(*level.shape[:2], 1, -1)
        x, cache = self.trunk(torch.cat([world, agent], 2), independent, cache)
        return self.z_out(x[:, :, : self.n_tokens]), x[:, :, -1], cache

    def agent_parameters(self) -> list[nn.Parameter]:
        """What the dynamics' own losses never reach."""
        return [self.agent, self.task.weight]


class Head(nn.Module):
    """Two hidden layers, and one output layer that is zero at first: `ahead` x `n_out` logits."""

    def __init__(self, dim: int, ahead: int, n_out: int):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(dim, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU())
        self.out, self.n_out = nn.Linear(256, ahead * n_out), n_out
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(h)).float().unflatten(-1, (-1, self.n_out))  # (..., ahead, n_out)


class Heads(nn.Module):
    """What the agent token says. Logits n of the policy are of row t + 1 + n, those of the reward of row t + n."""

    def __init__(self, dim: int, ahead: int, n_movement: int, n_keys: int, reward_limit: float, value_limit: float):
        super().__init__()
        self.n_movement = n_movement
        self.reward, self.policy = Head(dim, ahead, N_BINS), Head(dim, ahead, n_movement + n_keys)
        self.cont, self.value = Head(dim, 1, 1), Head(dim, 1, N_BINS)  # the value is learnt in imagination
        self.register_buffer("reward_bins", symexp_bins(N_BINS, reward_limit).float(), persistent=False)
        self.register_buffer("value_bins", symexp_bins(N_BINS, value_limit).float(), persistent=False)


# losses and targets ---------------------------------------------------------------------------------------------------
def symlog(x: torch.Tensor) -> torch.Tensor:
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: torch.Tensor) -> torch.Tensor:
    return torch.sign(x) * torch.expm1(torch.abs(x))


def symexp_bins(n: int = N_BINS, limit: float = 5.0) -> torch.Tensor:
    """(n,) float64 values that bins stand for: symexp of equal distances in -limit..limit, symmetric; n is odd."""
    positive = symexp(torch.linspace(0, limit, n // 2 + 1, dtype=torch.float64))
    return torch.cat([-positive[1:].flip(0), positive])


def twohot_neighbours(x: torch.Tensor, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (...) -> the lower of the two bins beside it, and the weight of the upper one; outside, the last bin's."""
    x = x.to(bins.dtype).clamp(bins[0], bins[-1])
    low = (torch.searchsorted(bins, x.contiguous(), right=True) - 1).clamp(0, len(bins) - 2)
    return low, (x - bins[low]) / (bins[low + 1] - bins[low])


def twohot_encode(x: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """x (...) -> (..., n) weights of the two bins beside it, whose mean is x."""
    low, upper = twohot_neighbours(x, bins)
    weights = torch.zeros(*x.shape, len(bins), dtype=bins.dtype, device=x.device)
    return weights.scatter(-1, low[..., None], (1 - upper)[..., None]).scatter(-1, low[..., None] + 1, upper[..., None])


def twohot_decode(logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """logits (..., n) -> mean (...) of what the bins stand for. Mirrored bins first: equal ones give exactly 0."""
    p = logits.double().softmax(-1) if bins.dtype == torch.float64 else logits.float().softmax(-1)
    middle = len(bins) // 2
    return ((p - p.flip(-1))[..., middle + 1 :] * bins[middle + 1 :]).sum(-1)


def twohot_nll(logits: torch.Tensor, targets: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (...) of logits (..., n) with targets (...). Two bins are picked: a product with all weights would
    make 0 * -inf of a bin that logits rule out."""
    low, upper = twohot_neighbours(targets, bins)
    log_p = logits.float().log_softmax(-1)
    upper = upper.to(log_p.dtype)
    pick = log_p.gather(-1, torch.stack([low, low + 1], -1))  # (..., 2)
    weight = torch.stack([1 - upper, upper], -1)
    return -(torch.where(weight > 0, pick, 0.0) * weight).sum(-1)


def twohot_loss(logits: torch.Tensor, targets: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Mean of `twohot_nll`."""
    return twohot_nll(logits, targets, bins).mean()


def mtp_pairs(predict: torch.Tensor, target: torch.Tensor, ahead: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows learn what is `first` + n rows ahead, n = 0 .. ahead - 1: 1 for actions, 0 for rewards (arrival).

    predict (B, T) rows that may learn; target (B, T + ahead, or fewer) rows to learn from, of the same run. Returns
    the target rows (T, ahead), clamped to the last, and which pairs count (B, T, ahead).
    """
    row = torch.arange(predict.shape[1], device=predict.device)[:, None] + first
    row = row + torch.arange(ahead, device=predict.device)
    exists, row = row < target.shape[1], row.clamp(max=target.shape[1] - 1)
    return row, predict[..., None] & target[:, row] & exists


def mtp_mean(nll: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Of (B, T, L) the mean over the pairs that count, per distance; summed over the distances (Eq. 9). One without a
    pair adds nothing."""
    n = counts.sum((0, 1))
    return (torch.where(counts, nll, 0.0).sum((0, 1)) / n.clamp(min=1)).sum()


def action_nll(logits: torch.Tensor, movement: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """-log p (...) of an action: movement (...) one of M, each of the keys (..., A) by itself. logits (..., M + A)."""
    n_movement = logits.shape[-1] - keys.shape[-1]
    moving = -logits[..., :n_movement].log_softmax(-1).gather(-1, movement[..., None])[..., 0]
    return moving + F.binary_cross_entropy_with_logits(logits[..., n_movement:], keys, reduction="none").sum(-1)


def agent_losses(
    heads: Heads, h: torch.Tensor, batch: dict, policy_rows: torch.Tensor, reward_rows: torch.Tensor
) -> dict:
    """Scalars `policy`, `reward`, `cont` of h (B, T, D) and labels of T + L rows; which rows learn, (B, T) bool."""
    logits = heads.policy(h)  # (B, T, L, M + A)
    row, counts = mtp_pairs(policy_rows, batch["act_valid"], logits.shape[2], first=1)
    policy = mtp_mean(action_nll(logits, batch["movement"][:, row], batch["keys"][:, row]), counts)
    logits = heads.reward(h)  # (B, T, L, N_BINS)
    row, counts = mtp_pairs(reward_rows, batch["rew_valid"], logits.shape[2], first=0)
    reward = mtp_mean(twohot_nll(logits, batch["reward"][:, row], heads.reward_bins), counts)
    alive = batch["cont"][:, : h.shape[1], None]
    ends = F.binary_cross_entropy_with_logits(heads.cont(h)[..., 0], alive, reduction="none")
    return {"policy": policy, "reward": reward, "cont": mtp_mean(ends, reward_rows[..., None])}


def noisy(z: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, k_max: int) -> torch.Tensor:
    """z (B, T, N, Z) at the signal levels (B, T), of k_max: 0 is the noise."""
    level = (signal / k_max)[..., None, None]
    return (1 - level) * noise + level * z


def draw_levels(bootstrap: torch.Tensor, T: int, k_max: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal level and step size of each frame, both (B, T), on the grid that sampling walks along: step 0, the
    smallest, for all but the rows of `bootstrap` (B,) bool, which draw from the larger ones."""
    larger = torch.randint(1, k_max.bit_length(), (len(bootstrap), T), device=bootstrap.device)
    step = torch.where(bootstrap[:, None], larger, 0)
    signal = (torch.rand(step.shape, device=step.device) * (k_max >> step)).long() << step
    return signal, step


def bootstrap_target(forward, z_noisy, signal, step, k_max: int) -> torch.Tensor:
    """Where two steps of half the size lead (Eq. 7 without its division): z_noisy + (1 - tau) (b' + b'') / 2. `forward`
    (z, signal, step) -> clean z. All steps are above 0."""
    tau, d = (signal / k_max)[..., None, None], (2.0**step / k_max)[..., None, None]
    velocity = (forward(z_noisy, signal, step - 1) - z_noisy) / (1 - tau)
    half_way = z_noisy + velocity * d / 2
    later = (forward(half_way, signal + 2 ** (step - 1), step - 1) - half_way) / (1 - tau - d / 2)
    return z_noisy + (1 - tau) * (velocity + later) / 2


def shortcut_losses(z_pred, z, target, signal, step, counts, k_max: int) -> dict[str, torch.Tensor]:
    """Scalar `dynamics` (Eq. 7): frames of the smallest steps should be z, those of larger ones `target`, all of them
    (B, T, N, Z); frames near the noise count less (ramp, Eq. 8). `counts` (B, T) bool, the frames that learn. `flow`
    and `bootstrap` are the two kinds by themselves, to look at.

    One sum: normalised apart, the second takes over, as it is 0 for a network that always says the same."""
    ramp = (0.9 * signal / k_max + 0.1) * counts
    goal = torch.where((step == 0)[..., None, None], z, target)
    error = ramp * (z_pred.float() - goal).square().mean((2, 3))
    small = step == 0
    return {
        "dynamics": error.sum() / counts.sum().clamp(min=1),
        "flow": ((error * small).sum() / (counts & small).sum().clamp(min=1)).detach(),
        "bootstrap": ((error * ~small).sum() / (counts & ~small).sum().clamp(min=1)).detach(),
    }


def lambda_returns(rewards, values, continues, gamma: float, lam: float) -> torch.Tensor:
    """TD(lambda) returns (..., H + 1), the last being the bootstrap: rewards and continues (..., H) of arriving at the
    states 1 .. H, values (..., H + 1) of the states 0 .. H."""
    returns = [values[..., -1]]
    for i in reversed(range(rewards.shape[-1])):
        ahead = (1 - lam) * values[..., i + 1] + lam * returns[-1]
        returns.append(rewards[..., i] + gamma * continues[..., i] * ahead)
    return torch.stack(returns[::-1], -1)


def pmpo_loss(log_probs: torch.Tensor, advantages: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """Eq. 11 before its KL term: only the sign of an advantage counts, 0 as positive; an empty set adds nothing."""
    good = advantages >= 0
    mean_good = (log_probs * good).sum() / good.sum().clamp(min=1)
    mean_bad = (log_probs * ~good).sum() / (~good).sum().clamp(min=1)
    return (1 - alpha) * mean_bad - alpha * mean_good


class RunningRMS(nn.Module):
    """Divides a scalar loss by the root of its running mean square (debiased), so that terms weigh alike. A loss that
    is not finite leaves the mean alone."""

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_square", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        square = loss.detach().float() ** 2
        if self.training and torch.isfinite(square):
            self.mean_square.mul_(self.decay).add_((1 - self.decay) * square)
            self.count += 1
        debiased = self.mean_square / (1 - self.decay ** self.count.clamp(min=1))
        return loss / (debiased.sqrt().to(loss.dtype) + 1e-8)


def amp_config(device: str | torch.device, bf16_supported: bool) -> tuple[torch.dtype | None, bool]:
    """Autocast type (None: none) and whether gradients need a scaler."""
    if torch.device(device).type != "cuda":
        return None, False
    return (torch.bfloat16, False) if bf16_supported else (torch.float16, True)


def parameters_of(items: list) -> list[nn.Parameter]:
    """Of modules and parameters, each once."""
    lists = ([item] if isinstance(item, nn.Parameter) else list(item.parameters()) for item in items)
    return list(dict.fromkeys(p for parameters in lists for p in parameters))


def parameter_groups(old: list, new: list, lr: float, scale: float, decay: float) -> list[dict]:
    """AdamW groups of modules and parameters: `new` ones learn at `lr`, others at `scale` times that; only weights of
    linear layers decay. Frozen parameters are in none."""
    modules = [module for item in [*old, *new] if isinstance(item, nn.Module) for module in item.modules()]
    linear = {module.weight for module in modules if isinstance(module, nn.Linear)}
    fresh, groups = set(parameters_of(new)), {}
    for p in parameters_of([*old, *new]):
        if p.requires_grad:
            key = (lr if p in fresh else lr * scale, decay if p in linear else 0.0)
            groups.setdefault(key, []).append(p)
    return [{"params": ps, "lr": rate, "base_lr": rate, "weight_decay": wd} for (rate, wd), ps in groups.items()]


# reading, imagining, playing ------------------------------------------------------------------------------------------
ACTION = ("movement", "keys", "act_valid")


def as_pictures(frames: np.ndarray, device) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float (..., 3, H, W) in 0..1."""
    return torch.tensor(frames, device=device).movedim(-1, -3).float() / 255


def encode_rows(tokenizer: Tokenizer, rows: Rows, pack: int, device) -> torch.Tensor:
    """z (R, N / pack, Z * pack) float16 of all frames, run by run."""
    tokenizer.eval()
    z, progress = [], tqdm(total=len(rows.frames), desc="encode", unit="frame", leave=False)
    with torch.no_grad():
        for first, stop in rows.runs:
            cache = {}
            for start in range(first, stop, 64):
                part = as_pictures(rows.frames[start : min(stop, start + 64)], device)
                latents, cache = tokenizer.encode(part[None], cache=cache)
                z.append(latents[0].reshape(len(part), latents.shape[2] // pack, -1).half().cpu())
                progress.update(len(part))
    progress.close()
    return torch.cat(z)


def decode_latents(tokenizer: Tokenizer, z: torch.Tensor) -> torch.Tensor:
    """z (B, T, N, Z) of the dynamics -> frames (B, T, 3, H, W) in 0..1."""
    return tokenizer.decode(z.reshape(*z.shape[:2], -1, tokenizer.from_latent.in_features))[0].clamp(0, 1)


def look(dynamics: Dynamics, z: torch.Tensor, actions: dict, cache: dict, generator=None):
    """Take real or finished frames z (B, T, N, Z) into the cache at the highest signal level that was trained, with the
    noise that belongs to it. Returns what the agent reads (B, T, D) and the cache."""
    level = torch.full(z.shape[:2], dynamics.k_max - 1, device=z.device)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    _, h, cache = dynamics(noisy(z, noise, level, dynamics.k_max), level, torch.zeros_like(level), actions, cache=cache)
    return h, cache


def predict_frame(dynamics: Dynamics, actions: dict, cache: dict, n_steps: int, shape: tuple, generator=None):
    """z (B, 1, N, Z) of the next frame, `n_steps` Euler steps away from noise; actions of one row. The cache stays."""
    z = torch.randn(shape, generator=generator).to(actions["movement"].device)
    step = torch.full(shape[:2], (dynamics.k_max // n_steps).bit_length() - 1, device=z.device)
    for i in range(n_steps):
        level = torch.full(shape[:2], i * dynamics.k_max // n_steps, device=z.device)
        clean, _, _ = dynamics(z, level, step, actions, cache=cache)
        z = z + (clean - z) / (n_steps - i)  # (clean - z) / (1 - tau) * d
    return z.clamp(-1, 1) if dynamics.bounded else z


def open_loop(
    dynamics: Dynamics, z: torch.Tensor, actions: dict, n_context: int, n_steps: int, generator
) -> torch.Tensor:
    """What follows the first C = `n_context` frames of z (B, T, N, Z), by the actions of all rows: (B, T - C, N, Z)."""

    def part(first: int, stop: int) -> dict:
        return {name: actions[name][:, first:stop] for name in ACTION}

    _, cache = look(dynamics, z[:, :n_context], part(0, n_context), {}, generator)
    frames, shape = [], (len(z), 1, *z.shape[2:])
    for t in range(n_context, z.shape[1]):
        frames.append(predict_frame(dynamics, part(t, t + 1), cache, n_steps, shape, generator))
        _, cache = look(dynamics, frames[-1], part(t, t + 1), cache, generator)
    return torch.cat(frames, 1)


class AgentPlayer:
    """The agent at play, one frame at a time, in E games at once. An action is movement * 2^A + the keys as bits."""

    def __init__(self, networks: "Networks", pack: int, sample: bool, device):
        self.tokenizer, self.dynamics, self.heads = (m.eval() for m in networks.modules.values())
        self.size, self.pack, self.sample, self.device = networks.sizes["tokenizer"]["size"], pack, sample, device
        self.bits = torch.arange(networks.sizes["heads"]["n_keys"])

    def reset(self, seeds: list[int]):
        """Begin a game for each seed."""
        self.seen, self.known, self.generator = {}, {}, torch.Generator().manual_seed(seeds[0])
        self.took(np.zeros(len(seeds), np.int64))
        self.last["act_valid"] = torch.zeros(len(seeds), 1, dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def act(self, screens: np.ndarray) -> np.ndarray:
        """uint8 (E, H, W, 3) -> actions (E,)"""
        frames = resize(torch.tensor(screens, device=self.device).movedim(-1, 1), self.size, self.size)
        z, self.seen = self.tokenizer.encode(frames[:, None].float() / 255, cache=self.seen)
        z = z.reshape(len(z), 1, z.shape[2] // self.pack, -1).half().float()  # as in the packed data
        h, self.known = look(self.dynamics, z, self.last, self.known, self.generator)
        logits = self.heads.policy(h)[:, 0, 0].cpu()  # (E, M + A), of the next row
        moving, p = logits[:, : self.heads.n_movement], logits[:, self.heads.n_movement :].sigmoid()
        if self.sample:
            movement = torch.multinomial(moving.softmax(-1), 1, generator=self.generator)[:, 0]
            keys = torch.rand(p.shape, generator=self.generator) < p
        else:
            movement, keys = moving.argmax(-1), p > 0.5
        return ((movement << len(self.bits)) + (keys.long() << self.bits).sum(-1)).numpy()

    def took(self, actions: np.ndarray):
        """What was really done (E,) leads to the next frame."""
        actions = torch.tensor(actions).long()
        self.last = {
            "movement": (actions >> len(self.bits))[:, None].to(self.device),
            "keys": ((actions[:, None] >> self.bits) & 1).float()[:, None].to(self.device),
            "act_valid": torch.ones(len(actions), 1, dtype=torch.bool, device=self.device),
        }


# evaluation: held-out episodes, and the game itself -------------------------------------------------------------------
def psnr(error: torch.Tensor, weight: torch.Tensor | float = 1.0) -> float:
    """Decibels of squared errors in 0..1, of those that `weight` counts."""
    weight = torch.as_tensor(weight, dtype=error.dtype).expand_as(error)
    return float(-10 * torch.log10((error * weight).sum() / weight.sum().clamp(min=1) + 1e-12))


def foreground(frames: torch.Tensor, mean_frame: torch.Tensor) -> torch.Tensor:
    """Which pixels (..., 1, H, W) differ from the mean frame; frames (..., 3, H, W)."""
    return ((frames - mean_frame).abs().amax(-3, keepdim=True) > FOREGROUND).float()


@torch.no_grad()
def evaluate_tokenizer(tokenizer: Tokenizer, rows: Rows, device) -> dict[str, float]:
    """Quality of the frames after encoding and decoding, beside the mean frame's."""
    tokenizer.eval()
    errors = {"all": [], "front": [], "mean": [], "mean_front": []}
    for first, stop in rows.runs:
        seen, shown = {}, {}
        for start in range(first, stop, 64):
            real = as_pictures(rows.frames[start : min(stop, start + 64)], device)[None]
            z, seen = tokenizer.encode(real, cache=seen)
            made, shown = tokenizer.decode(z, cache=shown)
            front = foreground(real, tokenizer.mean_frame)
            for name, picture in (("", made.clamp(0, 1)), ("mean", tokenizer.mean_frame)):
                error = (picture - real).square()
                errors[name or "all"].append([float(error.sum()), error.numel()])
                errors[f"{name}_front".strip("_")].append([float((error * front).sum()), 3 * float(front.sum())])
    mse = {name: np.divide(*np.sum(parts, 0)) for name, parts in errors.items()}
    decibels = {name: float(-10 * np.log10(error + 1e-12)) for name, error in mse.items()}
    return {
        "eval/psnr": decibels["all"],
        "eval/psnr_mean_frame": decibels["mean"],
        "eval/psnr_foreground": decibels["front"],
        "eval/psnr_foreground_mean_frame": decibels["mean_front"],
    }


def open_loop_windows(rows: Rows) -> np.ndarray:
    """(W, 2) first row and end of the run, of every eighth window that an open-loop prediction can be scored on."""
    length = START + max(HORIZONS)
    windows = [(start, stop) for first, stop in rows.runs for start in range(first, stop - length + 1, 8)]
    if len(windows) < 2:
        raise ValueError(
            f"the held-out episodes have no two windows of {length} frames. Hold longer ones out: --heldout"
        )
    return np.array(windows)


@torch.no_grad()
def evaluate_dynamics(
    dynamics: Dynamics, tokenizer: Tokenizer | None, rows: Rows, n_steps: int, device, limit: int = 64
):
    """Open-loop predictions on windows of held-out runs, beside holding the last frame, and with the actions of another
    window. Returns metrics at 8 frames ahead, a table per horizon, and pictures of one window."""
    dynamics.eval()
    length, starts = START + max(HORIZONS), open_loop_windows(rows)
    chosen = starts[np.linspace(0, len(starts) - 1, min(limit, len(starts))).astype(int)]
    batch = gather(rows, chosen, length, 0, device)
    z = batch["z"]
    other = {name: torch.cat([batch[name][:, :START], batch[name].roll(1, 0)[:, START:]], 1) for name in ACTION}

    def predict(actions: dict, steps: int, seed: int) -> torch.Tensor:
        return open_loop(dynamics, z, actions, START, steps, torch.Generator().manual_seed(seed))

    one_step = predict(batch, 1, 0)
    ways = {
        "one_step": one_step,
        "sample": predict(batch, n_steps, 0),
        "shuffled": predict(other, 1, 0),
        "hold_last": z[:, START - 1 : START].expand_as(one_step),
    }
    ways["mean_of_4"] = torch.stack([ways["sample"], *(predict(batch, n_steps, seed) for seed in (1, 2, 3))]).mean(0)
    at = [h - 1 for h in HORIZONS]
    table = {
        f"latent_mse_{way}": (made - z[:, START:]).square().mean((0, 2, 3))[at].tolist() for way, made in ways.items()
    }
    metrics = {
        "eval/latent_mse": table["latent_mse_one_step"][3],
        "eval/latent_mse_sample": table["latent_mse_sample"][3],
        "eval/latent_mse_hold_last": table["latent_mse_hold_last"][3],
        "eval/action_shuffle_ratio": table["latent_mse_shuffled"][3] / table["latent_mse_one_step"][3],
    }
    pictures = None
    if tokenizer is not None:
        index = torch.tensor(chosen[:, :1]) + torch.arange(length)
        real = as_pictures(rows.frames[index], device)  # (W, T, 3, H, W)
        front = foreground(real, tokenizer.mean_frame)[:, START:].expand(-1, -1, 3, -1, -1)
        context = z[:, :START]
        made = {
            way: decode_latents(tokenizer, torch.cat([context, ways[way]], 1))[:, START:]
            for way in ("one_step", "sample")
        }
        made["hold_last"] = real[:, START - 1 : START].expand_as(front)  # the picture itself, not what the latents keep
        made["ceiling"] = decode_latents(tokenizer, z)[:, START:]
        for way, frames in made.items():
            error = (frames - real[:, START:]).square()
            table[f"psnr_{way}"] = [psnr(error[:, t]) for t in at]
            table[f"psnr_foreground_{way}"] = [psnr(error[:, t], front[:, t]) for t in at]
        metrics |= {
            "eval/predicted_psnr_foreground": table["psnr_foreground_one_step"][3],
            "eval/predicted_psnr_foreground_hold_last": table["psnr_foreground_hold_last"][3],
            "eval/predicted_psnr_foreground_ceiling": table["psnr_foreground_ceiling"][3],
        }
        w = int(front.sum((1, 2, 3, 4)).argmax())  # where most is to be seen
        pictures = {"real": real[w, START:], "predicted": made["sample"][w], "one step": made["one_step"][w]}
    return metrics, {"horizons": list(HORIZONS), **table}, pictures


def action_code(movement: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One number (R,) for an action, movement (R,) and keys (R, A)."""
    return movement + 1000 * (keys.astype(np.int64) @ (1 << np.arange(keys.shape[1], dtype=np.int64)))


def pairs_of_actions(rows: Rows) -> np.ndarray:
    """(P,) rows that have an action and, before it in the same run, another."""
    known = rows.act_valid.numpy().copy()
    known[rows.runs[:, 0]] = False
    return np.flatnonzero(known & np.r_[False, rows.act_valid.numpy()[:-1]])


def action_baselines(train: Rows, held: Rows, n_movement: int) -> dict[str, float]:
    """What counting the training actions, each alone and after the last one, predicts of the held-out ones: negative
    log-likelihoods, and where the action changes the accuracy of the best guess that is not the last one."""
    now, then = pairs_of_actions(held), pairs_of_actions(train)
    columns = [(held.movement.numpy(), train.movement.numpy(), n_movement)]
    columns += [(h.long().numpy(), t.long().numpy(), 2) for h, t in zip(held.keys.T, train.keys.T, strict=True)]
    marginal = markov = 0.0
    for of_held, of_train, n in columns:
        counts = np.ones((n, n))
        np.add.at(counts, (of_train[then - 1], of_train[then]), 1)
        given_last, alone = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
        marginal -= np.log(alone[of_held[now]]).mean()
        markov -= np.log(given_last[of_held[now - 1], of_held[now]]).mean()
    codes = {name: action_code(r.movement.numpy(), r.keys.numpy()) for name, r in (("held", held), ("train", train))}
    before, after = codes["train"][then - 1], codes["train"][then]
    guess = {}
    for last in np.unique(codes["held"][now - 1]):
        follows = after[(before == last) & (after != last)]
        follows = follows if len(follows) else after[after != last]
        guess[last] = (
            np.unique_counts(follows).values[np.unique_counts(follows).counts.argmax()] if len(follows) else -1
        )
    last, true = codes["held"][now - 1], codes["held"][now]
    changed = last != true
    hit = np.array([guess[code] for code in last]) == true
    return {
        "eval/policy_nll_marginal": float(marginal),
        "eval/policy_nll_markov": float(markov),
        "eval/action_accuracy_repeat_last": float((~changed).mean()),
        "eval/change_accuracy_markov": float(hit[changed].mean()) if changed.any() else float("nan"),
    }


@torch.no_grad()
def evaluate_agent(dynamics: Dynamics, heads: Heads, train: Rows, held: Rows, key_names: list[str], device):
    """Policy and reward head on whole held-out runs, beside what counting predicts. Returns metrics and a table."""
    dynamics.eval(), heads.eval()
    generator, h, M = torch.Generator().manual_seed(0), [], heads.n_movement
    for first, stop in held.runs:
        cache = {}
        for start in range(first, stop, 64):
            part = slice(start, min(stop, start + 64))
            actions = {name: getattr(held, name)[part][None].to(device) for name in ACTION}
            read, cache = look(dynamics, held.z[part][None].float().to(device), actions, cache, generator)
            h.append(read[0])
    h = torch.cat(h)
    now = pairs_of_actions(held)
    logits = heads.policy(h)[:, 0].cpu()[now - 1]  # row t chooses the action of t + 1
    movement, keys = held.movement[now], held.keys[now]
    p_keys = logits[:, M:].sigmoid()
    guess = {"greedy": (logits[:, :M].argmax(-1), p_keys > 0.5)}
    guess["sampled"] = (
        torch.multinomial(logits[:, :M].softmax(-1), 1, generator=generator)[:, 0],
        torch.rand(p_keys.shape, generator=generator) < p_keys,
    )
    last, true = (action_code(held.movement[i].numpy(), held.keys[i].numpy()) for i in (now - 1, now))
    changed = last != true
    hits = {way: action_code(m.numpy(), k.numpy()) == true for way, (m, k) in guess.items()}
    metrics = {
        "eval/policy_nll": float(action_nll(logits, movement, keys).mean()),
        "eval/action_accuracy": float(hits["greedy"].mean()),
        "eval/action_accuracy_sampled": float(hits["sampled"].mean()),
        "eval/change_accuracy": float(hits["greedy"][changed].mean()),
        "eval/change_accuracy_sampled": float(hits["sampled"][changed].mean()),
    }
    codes, log_p = joint_log_probs(logits, M)
    other = torch.where(torch.tensor(codes)[None] == torch.tensor(last)[:, None], -torch.inf, log_p)
    metrics["eval/change_accuracy_not_last"] = float((codes[other.argmax(-1).numpy()] == true)[changed].mean())
    metrics |= action_baselines(train, held, M)
    per_key = {}
    for a, name in enumerate(key_names):
        on, said = keys[:, a] > 0.5, p_keys[:, a] > 0.5
        hit = float((on & said).sum())
        precision, recall = hit / max(1.0, float(said.sum())), hit / max(1.0, float(on.sum()))
        per_key[name] = {
            "rate": float(on.float().mean()),
            "predicted_rate": float(said.float().mean()),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / max(1e-9, precision + recall),
        }

    predicted = twohot_decode(heads.reward(h), heads.reward_bins).cpu()  # (R, L)
    run_of = np.searchsorted(held.runs[:, 0], np.arange(len(h)), "right") - 1
    ahead, valid, reward = [], held.rew_valid.numpy(), held.reward.numpy()
    for n in range(predicted.shape[1]):
        t = np.arange(len(h) - n)
        t = t[(run_of[t] == run_of[t + n]) & valid[t + n]]
        ahead.append(
            {"gain": auc(reward[t + n] > 0, predicted[t, n]), "loss": auc(reward[t + n] < 0, -predicted[t, n])}
        )
    events = valid & (reward != 0)
    metrics |= {
        "eval/reward_auc": ahead[0]["gain"],
        "eval/reward_auc_loss": ahead[0]["loss"],
        "eval/reward_mean": float(predicted[valid, 0].mean()),
        "eval/reward_mean_true": float(reward[valid].mean()),
        "eval/reward_clamped": float((np.abs(reward) > float(heads.reward_bins[-1])).mean()),
    }
    table = {
        "per_key": per_key,
        "reward_auc_ahead": ahead,
        "change_frames": int(changed.sum()),
        "events": int(events.sum()),
    }
    table["reward_on_events"] = {
        "true": reward[events].tolist(),
        "predicted": predicted[events, 0].tolist(),
        "elsewhere": float(predicted[valid & ~events, 0].mean()),
    }
    return metrics, table


def joint_log_probs(logits: torch.Tensor, n_movement: int) -> tuple[np.ndarray, torch.Tensor]:
    """All actions as codes (J,) and their log-probabilities (R, J) of logits (R, M + A); the first 6 keys vary."""
    n_keys = logits.shape[-1] - n_movement
    sets = (np.arange(1 << min(6, n_keys))[:, None] >> np.arange(n_keys)) & 1  # (2^A, A)
    movement, keys = np.repeat(np.arange(n_movement), len(sets)), np.tile(sets, (n_movement, 1))
    pressed = torch.tensor(keys, dtype=logits.dtype)
    log_p = logits[:, :n_movement].log_softmax(-1)[:, movement]
    on, off = F.logsigmoid(logits[:, n_movement:]), F.logsigmoid(-logits[:, n_movement:])
    return action_code(movement, keys), log_p + on @ pressed.T + off @ (1 - pressed).T


def auc(event: np.ndarray, score: torch.Tensor) -> float:
    """Area under the ROC curve, NaN where all or none are events."""
    return float(roc_auc_score(event, score)) if 0 < event.sum() < len(event) else float("nan")


def evaluate_play(args: Args, meta: dict, agents: dict[str, AgentPlayer]) -> dict:
    """Scores of the agents, of random play and of the recorded mix, over the same seeds, with 95 % intervals."""
    from retro_env.airstriker import make_player, spread
    from retro_env.play import Crowd, interval, make_envs, play_games

    seeds = list(range(args.play_seed, args.play_seed + args.play_episodes))
    envs = make_envs(args.env_id, min(args.num_envs, len(seeds)), args.max_steps)
    try:
        n_actions = meta["n_movement"] << len(meta["keys"])
        if envs.single_action_space.n != n_actions:
            raise ValueError(
                f"{args.env_id} takes {envs.single_action_space.n} actions, {args.data_dir}/meta.json has {n_actions}: "
                f"{meta['n_movement']} movements and the keys {', '.join(meta['keys'])}. Name the game that was packed"
            )
        names = {"random": ["random"] * len(seeds)}
        if isinstance(meta.get("source"), dict) and meta["source"].get("players"):
            names["mix"] = list(islice(spread(meta["source"]["players"]), len(seeds)))
        players = {way: Crowd([partial(make_player, name) for name in mine]) for way, mine in names.items()} | agents
        played = {name: play_games(envs, player, seeds, name) for name, player in players.items()}
    finally:
        envs.close()
    scores = {name: np.array([game["score"] for game in games]) for name, (games, _) in played.items()}
    ahead = {name: interval(score - scores["random"]) for name, score in scores.items() if name != "random"}
    return {
        "env_id": args.env_id,
        "score": {name: interval(score) for name, score in scores.items()},
        "minus_random": ahead,
        "decisions_per_second": {name: played[name][1] for name in agents},
        "games": {name: games for name, (games, _) in played.items()},
    }


def draw_open_loop(run_dir: Path, table: dict, pictures: dict | None, fps: float):
    """open_loop.png: error over the horizon, and real and predicted frames where there are any; open_loop.mp4."""
    figure = Figure(figsize=(10, 4 if pictures is None else 7), layout="constrained")
    rows = figure.subplots(1 if pictures is None else 2, 1, squeeze=False)[:, 0]
    for way in ("one_step", "sample", "mean_of_4", "shuffled", "hold_last"):
        rows[0].plot(table["horizons"], table[f"latent_mse_{way}"], "o-", markersize=3, label=way.replace("_", " "))
    rows[0].set(xlabel="frames ahead", ylabel="squared error of the latents", ylim=(0, None))
    rows[0].legend(fontsize="small")
    if pictures is not None:
        strips = {
            name: frames[[h - 1 for h in HORIZONS]].movedim(1, -1).cpu().numpy() for name, frames in pictures.items()
        }
        rows[1].imshow(np.concatenate([np.concatenate(list(strip), 1) for strip in strips.values()]), aspect="auto")
        size = len(strips["real"][0])
        rows[1].set_yticks([size * (i + 0.5) for i in range(len(strips))], list(strips))
        rows[1].set_xticks([size * (i + 0.5) for i in range(len(HORIZONS))], [f"{h} ahead" for h in HORIZONS])
        side_by_side = torch.cat([frames for frames in pictures.values()], -1)  # (T, 3, H, 3 * W)
        film = (side_by_side.movedim(1, -1) * 255).byte().cpu().numpy().repeat(4, 1).repeat(4, 2)
        video = VideoWriter(run_dir / "open_loop.mp4", fps, film.shape[2], film.shape[1], crf=20)
        for picture in film:
            video.add(picture)
        video.close()
    figure.savefig(run_dir / "open_loop.png", dpi=110)


def report(metrics: dict, tables: dict):
    """For the terminal."""
    if "open_loop" in tables:
        table = tables["open_loop"]
        print(f"\n{'frames ahead':<34}" + "".join(f"{h:>9}" for h in table["horizons"]))
        for name, row in table.items():
            if name != "horizons":
                print(f"{name:<34}" + "".join(f"{x:>9.4f}" if "mse" in name else f"{x:>9.1f}" for x in row))
    print()
    for name, metric in metrics.items():
        print(f"{name.removeprefix('eval/'):<40}{metric:>9.4f}")


# main -----------------------------------------------------------------------------------------------------------------
def draw_clips(windows: np.ndarray, length: int, clip: int) -> np.ndarray:
    """(B, clip) rows, anywhere inside each window (B, 2) of `length`; a run that is shorter repeats its last."""
    stop = np.minimum(windows[:, 0] + length, windows[:, 1])
    places = np.maximum(stop - windows[:, 0] - clip + 1, 1)
    first = windows[:, 0] + (torch.rand(len(windows)).numpy() * places).astype(np.int64)
    return np.minimum(first[:, None] + np.arange(clip), stop[:, None] - 1)


def tokenizer_terms(tokenizer: Tokenizer, rows: Rows, clips: np.ndarray, args: Args, device) -> dict:
    """Scalar `recon` on clips, rows (B, T), with patches hidden; each image draws how many."""
    frames = as_pictures(rows.frames[clips], device)  # (B, T, 3, H, W)
    share = args.mask_ratio * torch.rand(*frames.shape[:2], 1, device=device)
    hidden = torch.rand(*frames.shape[:2], tokenizer.side**2, device=device) < share
    made, _ = tokenizer.decode(tokenizer.encode(frames, hidden)[0])
    weight = 1 + (args.foreground_weight - 1) * foreground(frames, tokenizer.mean_frame)
    return {"recon": (weight * (made.float() - frames).square()).mean()}


def world_terms(
    dynamics: Dynamics, heads: Heads | None, batch: dict, uniform: torch.Tensor, bootstrap: bool, args: Args
) -> dict:
    """Those of `shortcut_losses` for the uniform windows (B,), and with `heads` those of `agent_losses`. The other
    windows show every frame as it is shown at play; they alone train the policy."""
    z, k_max = batch["z"], dynamics.k_max
    B, T = z.shape[:2]
    larger = torch.arange(B, device=z.device) < round(args.bootstrap_ratio * int(uniform.sum())) * bootstrap
    independent = uniform & (torch.rand(B, device=z.device) < args.independent_frame_ratio)
    signal, step = draw_levels(larger, T, k_max)
    signal = torch.where(uniform[:, None], signal, k_max - 1)
    noise = torch.randn_like(z)
    z_noisy, actions = noisy(z, noise, signal, k_max), {name: batch[name][:, :T] for name in ACTION}
    z_pred, h, _ = dynamics(z_noisy, signal, step, actions, independent)
    inside, target = batch["inside"][:, :T], z
    if larger.any():
        rows = torch.nonzero(larger)[:, 0]
        some = {name: action[rows] for name, action in actions.items()}

        def teacher(z, signal, step):
            return dynamics(z, signal, step, some, independent[rows])[0].float()

        with torch.no_grad():
            x = bootstrap_target(teacher, z_noisy[rows], signal[rows], step[rows], k_max)
        target = z.index_copy(0, rows, x)
    terms = shortcut_losses(z_pred, z, target, signal, step, inside & uniform[:, None], k_max)
    if heads is not None:
        reads = inside & ~independent[:, None] & (signal >= args.agent_signal * k_max)
        imitates = reads if uniform.all() else reads & ~uniform[:, None]
        terms |= agent_losses(heads, h, batch, imitates, reads)
    return terms


def check_args(args: Args, meta: dict):
    """Raise ValueError for values that cannot be meant."""
    shares = ("mask_ratio", "bootstrap_ratio", "bootstrap_from", "independent_frame_ratio", "agent_signal")
    wrong = [name for name in shares if not 0 <= getattr(args, name) <= 1]
    if wrong:
        raise ValueError(f"--{wrong[0].replace('_', '-')} {getattr(args, wrong[0])}: expected 0 to 1")
    least = {
        "mtp": 1,
        "play_episodes": 1,
        "num_envs": 1,
        "max_steps": 1,
        "log_every": 1,
        "save_every": 1,
        "batch_size": 0,
    }
    least |= {"tokenizer_steps": 0, "dynamics_steps": 0, "agent_steps": 0, "warmup_steps": 0, "long_every": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {low} or more")
    if args.trunk_lr_scale <= 0 or args.sampling_steps < 0 or args.sampling_steps & (args.sampling_steps - 1):
        found = f"--trunk-lr-scale {args.trunk_lr_scale:g} --sampling-steps {args.sampling_steps}"
        raise ValueError(f"{found}: expected above 0, and 0 or a power of two")
    if args.phase == "eval" and not args.agent_checkpoint:
        raise ValueError("--phase eval trains nothing. Name the agent: --agent-checkpoint runs/<run>/agent.pt")
    if args.agent_checkpoint and args.phase != "eval":
        raise ValueError(f"--agent-checkpoint {args.agent_checkpoint} is for --phase eval, not {args.phase}")
    if args.env_id and args.phase in ("tokenizer", "dynamics"):
        raise ValueError(f"--env-id {args.env_id}: nobody plays after --phase {args.phase}. Leave it out")
    if "z_shape" in meta and (args.phase == "tokenizer" or args.tokenizer_checkpoint or args.env_id):
        raise ValueError(
            f"{args.data_dir} holds latents, no frames: leave out --phase tokenizer, --tokenizer-checkpoint, --env-id"
        )


def fingerprint_of(module: nn.Module) -> str:
    """SHA-256 over the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def action_spec(meta: dict) -> dict:
    return {"n_movement": meta["n_movement"], "keys": list(meta["keys"]), "fps": meta["fps"]}


BUILD = {"tokenizer": Tokenizer, "dynamics": Dynamics, "heads": Heads}
TERMS = {  # what each phase minimises, and where TensorBoard has it
    "tokenizer": {"recon": "train/recon_loss"},
    "dynamics": {"dynamics": "train/dynamics_loss"},
    "agent": {
        "dynamics": "train/dynamics_loss",
        "policy": "train/policy_loss",
        "reward": "train/reward_loss",
        "cont": "train/cont_loss",
    },
}


PARTS = {"flow": "train/flow_loss", "bootstrap": "train/bootstrap_loss"}  # of the dynamics' loss


def network_sizes(phase: str, args: Args, preset: dict, meta: dict, rows: Rows, limits: dict) -> dict[str, dict]:
    """What builds the network that the phase begins with."""
    if phase == "tokenizer":
        return {"tokenizer": preset["tokenizer"] | preset["tokenizer_time"] | {"grid": args.latents == "grid"}}
    n_movement, n_keys = meta["n_movement"], len(meta["keys"])
    if phase == "dynamics":
        z = {"n_tokens": rows.z.shape[1], "token_dim": rows.z.shape[2], "bounded": bool(rows.z.abs().max() <= 1)}
        return {
            "dynamics": preset["dynamics"] | preset["dynamics_time"] | z | {"n_movement": n_movement, "n_keys": n_keys}
        }
    heads = {"ahead": args.mtp, "reward_limit": limits["reward"], "value_limit": limits["value"]}
    return {"heads": heads | {"n_movement": n_movement, "n_keys": n_keys}}


def bin_limits(args: Args, reward: torch.Tensor) -> dict[str, float]:
    """Largest bins in symlog units, as wide as the rewards need; prints what the rewards use of them."""
    limit = max(args.reward_range, float(symlog(reward.abs().max())))
    bins = symexp_bins(N_BINS, limit)
    low, _ = twohot_neighbours(reward[reward != 0], bins)
    least = reward[reward != 0].abs().min() if len(low) else torch.tensor(torch.inf)
    print(
        f"rewards {reward.min():g} to {reward.max():g}, {len(low):,} not 0, in {len(low.unique())} of {N_BINS} bins of "
        f"-{bins[-1]:g} to {bins[-1]:g}, none clamped"
    )
    if least < bins[N_BINS // 2 + 1] / 4:
        print(
            f"the least reward, {least:g}, is less than a quarter of a bin from 0: scale it up, or lower --reward-range"
        )
    return {"reward": limit, "value": max(args.value_range, limit)}


class Networks:
    """The networks by name, and what made them."""

    def __init__(self):
        self.sizes, self.modules, self.pack = {}, {}, 0  # pack: latents that make a token of the dynamics

    def add(self, name: str, device, **sizes):
        self.sizes[name], self.modules[name] = sizes, BUILD[name](**sizes).to(device)

    def state(self) -> dict:
        return {
            "sizes": dict(self.sizes),
            "models": {name: module.state_dict() for name, module in self.modules.items()},
            "fingerprints": {name: fingerprint_of(module) for name, module in self.modules.items()},
        }

    def load(self, state: dict, names, device):
        """Strictly: every tensor of every network."""
        self.pack = state["pack"]
        for name in names:
            self.add(name, device, **state["sizes"][name])
            self.modules[name].load_state_dict(state["models"][name])


def load_given(args: Args, meta: dict, networks: Networks, device) -> list[str]:
    """Load what the checkpoint flags name. Returns the phases that are done by it. Raises ValueError for checkpoints
    that do not belong together, or not to the data."""
    needs = {
        "tokenizer": ("tokenizer",),
        "dynamics": ("tokenizer", "dynamics"),
        "agent": ("tokenizer", "dynamics", "heads"),
    }
    done, states = [], {}
    given = {"tokenizer": args.tokenizer_checkpoint, "dynamics": args.dynamics_checkpoint}
    for phase, path in (given | {"agent": args.agent_checkpoint}).items():
        if path:
            states[phase] = (path, runs.load_checkpoint(Path(path)))
    for phase, (path, state) in states.items():
        names = [name for name in needs[phase] if name != "tokenizer" or "frame_shape" in meta]
        missing = [name for name in names if name not in state.get("models", {})]
        if missing:
            raise ValueError(f"{path} holds no {missing[0]}. Name the {phase}.pt of a run of {Path(__file__).name}")
        if phase != "tokenizer" and state["action_spec"] != action_spec(meta):
            raise ValueError(
                f"{path} was trained on the actions {state['action_spec']}, {args.data_dir} has {action_spec(meta)}"
            )
        first_path, first = next(iter(states.values()))
        if state["fingerprints"].get("tokenizer") != first["fingerprints"].get("tokenizer"):
            raise ValueError(f"{path} was trained with another tokenizer than {first_path}. Name that of its run")
        networks.load(state, names, device)
        done = list(PHASES[: PHASES.index(phase) + 1])
    if "tokenizer" in networks.sizes and list(meta["frame_shape"][:2]) != [networks.sizes["tokenizer"]["size"]] * 2:
        size = networks.sizes["tokenizer"]["size"]
        raise ValueError(
            f"the tokenizer takes {size} x {size} pixels, {args.data_dir} has {meta['frame_shape']}. Pack it with "
            f"pack_episodes.py --frame-size {size}"
        )
    return done


def main(args: Args) -> dict:
    checkpoint = None
    try:
        if args.resume:
            args = runs.resume_args(args, may_change=("device", "env_id", "play_episodes", "num_envs"))
            checkpoint = runs.load_checkpoint(Path(args.resume) / "last.pt")
            torch.set_num_threads(checkpoint["threads"])  # another number sums in another order
        device = runs.pick_device(args.device)
        preset, data_dir = PRESETS[args.preset], Path(args.data_dir)
        meta = load_meta(data_dir)
        check_args(args, meta)
        names = sorted(meta["episodes"])
        held_names = [name for name in names if fnmatch(name, args.heldout)] or names[-1:]
        train_names = [name for name in names if name not in held_names]
        if not train_names:
            raise ValueError(
                f"{data_dir}: all its episodes ({len(names)}) are held out by --heldout {args.heldout}. Pack more"
            )
        rows, held = load_rows(data_dir, train_names, meta), load_rows(data_dir, held_names, meta)
        data_files = [data_dir / "meta.json", *(data_dir / f"{name}.npz" for name in names)]
        networks = Networks()
        done = load_given(args, meta, networks, device)
        if checkpoint:
            runs.check_fingerprint(Path(args.resume), data_files)
            networks.load(checkpoint, checkpoint["models"], device)
        size = preset["tokenizer"]["size"]
        if "frame_shape" in meta and not networks.modules and list(meta["frame_shape"][:2]) != [size, size]:
            raise ValueError(
                f"{data_dir} has frames of {meta['frame_shape']}, --preset {args.preset} takes {size} x {size}. Pack "
                f"it with pack_episodes.py --frame-size {size}"
            )
        T, T_long = preset["lengths"]
        windows, relevant = choose_windows(rows, T)
        if args.phase != "tokenizer":
            open_loop_windows(held)  # fail now, not after the training
        if not len(windows):
            raise ValueError(f"{data_dir}: no run of two frames to train on. {REPACK}")
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    last = {"tokenizer": 0, "dynamics": 1, "agent": 2, "all": 2, "eval": -1}[args.phase]
    phases = [p for p in PHASES[: last + 1] if p not in done and (p != "tokenizer" or "frame_shape" in meta)]

    # run folder
    if checkpoint:
        run_dir = Path(args.resume)
    else:
        run_dir = runs.make_run_dir(args, __file__, data_dir.resolve().name)
        runs.write_provenance(run_dir, data_files, device=str(device))
        runs.write_json(run_dir / "split.json", {"train": train_names, "heldout": held_names})
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, sync_tensorboard=True)
    given = {"tokenizer": args.tokenizer_steps, "dynamics": args.dynamics_steps, "agent": args.agent_steps}
    updates = {phase: steps or preset["steps"][phase] for phase, steps in given.items()}
    before = {p: sum(updates[q] for q in phases[:i]) for i, p in enumerate(phases)}  # TensorBoard goes on counting
    start = before[checkpoint["phase"]] + checkpoint["step"] if checkpoint else 0
    writer = SummaryWriter(str(run_dir), purge_step=start + 1 if checkpoint else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    print(
        f"{run_dir}: {len(rows.reward):,} training rows of {len(train_names)} episodes, {len(held.reward):,} held out "
        f"({', '.join(held_names)})"
    )
    print(
        f"{len(windows):,} windows of {T} rows, {int(relevant.sum()):,} with a reward; on {device}: "
        f"{', '.join(phases) or 'evaluation'}"
    )
    limits = bin_limits(args, rows.reward)

    dtype, scaled = amp_config(device, device.type == "cuda" and torch.cuda.is_bf16_supported())
    pack = networks.pack or preset["pack"]
    for phase in phases:
        if checkpoint and PHASES.index(phase) < PHASES.index(checkpoint["phase"]):
            continue
        # networks and optimiser of the phase
        resumed = checkpoint if checkpoint and checkpoint["phase"] == phase else None
        runs.seed_everything(args.seed + PHASES.index(phase), args.torch_deterministic)
        if phase != "tokenizer" and rows.z is None:
            rows.z = encode_rows(networks.modules["tokenizer"], rows, pack, device)
        for name, sizes in network_sizes(phase, args, preset, meta, rows, limits).items():
            if name not in networks.modules:
                networks.add(
                    name, device, **sizes | ({"dim": networks.sizes["dynamics"]["dim"]} if name == "heads" else {})
                )
        tokenizer, dynamics, heads = (networks.modules.get(name) for name in ("tokenizer", "dynamics", "heads"))
        if phase == "tokenizer" and not resumed:
            tokenizer.mean_frame.copy_(as_pictures(rows.frames.mean(0, dtype=np.float32), device))
        trained = {"tokenizer": tokenizer, "dynamics": dynamics, "agent": dynamics}[phase]
        trained.train().requires_grad_(True)
        old, new = [], [trained]
        if phase == "agent":
            old, new = [dynamics], [heads.reward, heads.policy, heads.cont, *dynamics.agent_parameters()]
            dynamics.requires_grad_(args.trunk == "finetune")
            for parameter in dynamics.agent_parameters():
                parameter.requires_grad_(True)
        for module in trained.modules():
            if isinstance(module, Trunk):
                module.recompute = args.activation_checkpointing
                if args.compile_model:
                    for block in module.blocks:
                        block.compile()
        groups = parameter_groups(old, new, args.lr, args.trunk_lr_scale, args.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        rms = nn.ModuleDict({name: RunningRMS() for name in TERMS[phase]}).to(device)
        mixture = np.flatnonzero(relevant) if phase == "agent" and args.reward_mixture else np.zeros(0, np.int64)
        sampler = WindowSampler(len(windows), mixture, args.seed + PHASES.index(phase))
        step = 0
        if resumed:
            optimizer.load_state_dict(resumed["optimizer"])
            scaler.load_state_dict(resumed["scaler"])
            rms.load_state_dict(resumed["rms"])
            sampler.state, step = resumed["sampler"], resumed["step"]
            runs.set_rng_state(resumed["rng"])

        def save(path: Path, phase=phase, **training):
            runs.save_checkpoint(
                path,
                networks.state()
                | {"phase": phase, "pack": pack, "action_spec": action_spec(meta), "action_index": "arrival"}
                | {"reward": meta.get("reward"), "source": meta.get("source"), "args": dict(vars(args))}
                | {"script": Path(__file__).name, "run_dir": str(run_dir.resolve())}
                | training,
            )

        def save_last(step: int, save=save, optimizer=optimizer, scaler=scaler, rms=rms, sampler=sampler):
            writer.flush()  # a run that is killed goes on from here, its curves too
            save(
                run_dir / "last.pt",
                step=step,
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                rms=rms.state_dict(),
                sampler=dict(sampler.state),
                rng=runs.rng_state(),
                threads=torch.get_num_threads(),
            )

        B, n_steps = args.batch_size or preset["batches"][phase], updates[phase]
        progress = tqdm(total=n_steps, initial=step, desc=phase, unit="update")
        started, first_step, frames_seen = time.time(), step, 0
        with runs.StopSignal() as stop_signal:
            if not resumed:
                save_last(0)
            while step < n_steps and not stop_signal:
                # fetch
                length = T_long if args.long_every and phase != "tokenizer" and (step + 1) % args.long_every == 0 else T
                chosen, uniform = sampler.draw(max(2, B * T // length))
                uniform = torch.tensor(uniform, device=device)

                # forward and loss
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    if phase == "tokenizer":
                        clip = preset["tokenizer_time"]["clip"]
                        terms = tokenizer_terms(tokenizer, rows, draw_clips(windows[chosen], T, clip), args, device)
                        frames_seen += clip * len(chosen)
                    else:
                        batch = gather(rows, windows[chosen], length, args.mtp, device)
                        bootstrap = phase == "agent" or step >= args.bootstrap_from * n_steps
                        terms = world_terms(dynamics, heads, batch, uniform, bootstrap, args)
                        frames_seen += length * len(chosen)
                loss = sum(rms[name](terms[name]) for name in TERMS[phase])

                # step
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * min(1.0, (step + 1) / max(1, args.warmup_steps))
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                scaler.step(optimizer)
                scaler.update()
                step += 1
                progress.update()

                # log
                if step % args.log_every == 0 or step == n_steps:
                    elapsed = time.time() - started
                    scalars = {
                        metric: terms[name].item() for name, metric in (TERMS[phase] | PARTS).items() if name in terms
                    }
                    scalars |= {
                        "train/loss": loss.item(),
                        "train/grad_norm": norm.item(),
                        "charts/learning_rate": optimizer.param_groups[-1]["lr"],
                        "charts/SPS": frames_seen / elapsed,
                        "charts/frames_seen": frames_seen,
                        "charts/epoch": sampler.state["epoch"] + sampler.state["position"] / sampler.n,
                        "time/step_ms": 1000 * elapsed / (step - first_step),
                    }
                    for name, scalar in scalars.items():
                        writer.add_scalar(name, scalar, before[phase] + step)
                    progress.set_postfix({name: f"{term.item():.3f}" for name, term in terms.items()})

                # save
                if step % args.save_every == 0 or stop_signal:
                    save_last(step)
        progress.close()
        if step == n_steps:
            save_last(step)
            save(run_dir / f"{phase}.pt")
        if stop_signal and (step < n_steps or phase != phases[-1]):
            writer.close()
            print(
                f"stopped after update {step} of the {phase} and saved. Go on with: "
                f"python {Path(__file__).name} --resume {run_dir}"
            )
            raise SystemExit(130)

    # evaluation on whole held-out episodes, and in the game
    tokenizer, dynamics, heads = (networks.modules.get(name) for name in ("tokenizer", "dynamics", "heads"))
    metrics, tables = {}, {"heldout": held_names}
    if tokenizer is not None:
        metrics |= evaluate_tokenizer(tokenizer, held, device)
        for part in (rows, held):
            part.z = encode_rows(tokenizer, part, pack, device) if part.z is None else part.z
    if dynamics is not None:
        n_steps = min(args.sampling_steps or 4, dynamics.k_max)
        found, tables["open_loop"], pictures = evaluate_dynamics(dynamics, tokenizer, held, n_steps, device)
        metrics |= found
        draw_open_loop(run_dir, tables["open_loop"], pictures, meta["fps"])
    if heads is not None:
        found, tables["agent"] = evaluate_agent(dynamics, heads, rows, held, meta["keys"], device)
        metrics |= found
        save_file(
            {
                f"{name}.{key}": x.contiguous()
                for name, module in networks.modules.items()
                for key, x in module.state_dict().items()
            },
            run_dir / "model.safetensors",
        )
        runs.write_json(
            run_dir / "config.json", {"sizes": networks.sizes, "pack": pack, "action_spec": action_spec(meta)}
        )
    for name, metric in metrics.items():
        writer.add_scalar(name, metric, sum(updates[p] for p in phases))
    report(metrics, tables)
    runs.write_json(run_dir / "eval.json", {"metrics": metrics} | tables)
    if heads is not None and args.env_id:
        agents = {way: AgentPlayer(networks, pack, way == "sampled", device) for way in ("greedy", "sampled")}
        try:
            tables["play"] = evaluate_play(args, meta, agents)
        except (ValueError, OSError, ImportError, RuntimeError, gym.error.Error) as error:
            writer.close()
            raise SystemExit(f"{error}. The agent is in {run_dir}/agent.pt, --phase eval plays it") from None
        for name, (mean, low, high) in tables["play"]["score"].items():
            print(f"score {name:<10}{mean:>8.1f} ({low:.1f} to {high:.1f})")
        metrics |= {
            "eval/score": tables["play"]["score"]["sampled"][0],
            "eval/score_random": tables["play"]["score"]["random"][0],
        }
        runs.write_json(run_dir / "eval.json", {"metrics": metrics} | tables)
    writer.close()
    print(f"\nfiles  {run_dir}")
    return metrics | {"run_dir": str(run_dir)}


if __name__ == "__main__":
    main(tyro.cli(Args))
