"""A world model of a game, and an agent inside it: recorded play to a policy that acts from what the model sees.

Learns from packed episodes (frames, actions, rewards) in four phases, after Dreamer 4 (Hafner et al. 2025, arXiv
2509.24527). tokenizer: frames to a few latents (masked autoencoder). dynamics: the next latents from the past and the
actions (shortcut forcing). agent: an agent token in the same network reads out rewards and actions (reward and policy
heads, behavioural cloning). imagine: the policy improves inside the model (PMPO on dreams). Page:
docs/agent_finetune.md

    python agent_finetune.py --data-dir sample_packed --env-id retro:Airstriker-Genesis-v0

In: a folder of pack_episodes.py. Out: runs/<task>__agent_finetune__<seed>__<time>/ with tokenizer.pt, dynamics.pt,
agent.pt, imagine.pt, model.safetensors, eval.json, pictures, films and TensorBoard events."""

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import runs
from common.returns import death_events  # noqa: F401  the rule by which pack_episodes.py finds deaths
from common.video import resize
from packed_episodes.rows import Rows, load_meta, load_rows
from packed_episodes.scores import (
    Decibels,
    auc,
    draw_dreams,
    draw_open_loop,
    foreground,
    psnr,
    report,
    score_policy,
    score_reward,
)
from retro_env.play import check_game, compare_players, interval


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

    phase: Literal["tokenizer", "dynamics", "agent", "imagine", "eval", "all"] = "all"
    """the last phase; those it builds on are trained first, unless their checkpoints are given. eval trains nothing and
    needs --agent-checkpoint or --imagine-checkpoint; all is imagine"""
    tokenizer_checkpoint: str | None = None
    """tokenizer.pt of another run; None trains one"""
    dynamics_checkpoint: str | None = None
    """dynamics.pt of another run, made with that tokenizer; None trains one"""
    agent_checkpoint: str | None = None
    """agent.pt of another run; None trains one"""
    imagine_checkpoint: str | None = None
    """imagine.pt of another run, for --phase eval"""
    preset: Literal["cpu", "gpu-s", "gpu-m"] = "cpu"
    """sizes of the networks, batches and trainings; see PRESETS"""
    tokenizer_steps: int = 0
    """updates of the tokenizer; 0 means the preset's"""
    dynamics_steps: int = 0
    """updates of the dynamics; 0 means the preset's"""
    agent_steps: int = 0
    """updates of the agent; 0 means the preset's"""
    imagine_steps: int = 0
    """updates of the imagination, each from dreams of its own; 0 means the preset's"""
    batch_size: int = 0
    """windows of the short length, or dreams, per update; 0 means the preset's"""

    lr: float = 0.0
    """learning rate of AdamW, of what is new in a phase; 0 means the preset's"""
    trunk_lr_scale: float = 0.1
    """times `lr` for the dynamics in the agent phase; above 0"""
    policy_lr_scale: float = 0.3
    """times `lr` for the policy in imagination; above 0"""
    trunk: Literal["finetune", "freeze"] = "finetune"
    """freeze: the agent phase trains the agent token and the heads only"""
    weight_decay: float = 0.01
    """of AdamW; none on norms, biases, embeddings"""
    warmup_steps: int = 100
    """updates in which the learning rate rises from 0, in each phase, but no more than a fifth of them"""
    anneal_lr: bool = True
    """the learning rate falls to 0 along each phase"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm; 0 means never"""
    activation_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them: less memory, a third more time"""
    compile_model: bool = False
    """torch.compile the blocks"""

    latents: Literal["grid", "free"] = "grid"
    """grid: each latent begins with the mean of its cell's patches; free: with a learnt vector alone"""
    mask_ratio: float = 0.2
    """each image hides patches with a chance drawn from 0 to this, 0..1, the paper has 0.9"""
    foreground_weight: float = 5.0
    """weight of pixels that differ from the mean frame in the tokenizer's loss; 1 means none"""

    bootstrap_ratio: float = 0.25
    """share of a batch that learns steps larger than the smallest, from two of half the size"""
    bootstrap_from: float = 0.2
    """share of the dynamics phase after which that begins; 0..1"""
    independent_frame_ratio: float = 0.3
    """chance that a window's frames are unrelated images to the dynamics, which teaches it first frames; 0..1"""
    ramp: float = 0.3
    """how much less the dynamics learns from pure noise than from clean frames, 0..1; the paper has 0.9"""
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

    horizon: int = 4
    """actions of a dream, 1 or more: no longer than the dynamics keeps what is small in the picture"""
    gamma: float = 0.95
    """discount of a step, 0..1; the paper has 0.997"""
    lam: float = 0.95
    """lambda of the returns: 0 trusts the value one step ahead, 1 only the rewards and the last value"""
    alpha: float = 0.5
    """weight of actions that turned out well against those that did not, 0..1"""
    advantage_weights: bool = True
    """an action counts by how far its return is from the value; otherwise, as in the paper, all count alike"""
    beta: float = 1.0
    """weight of the distance (KL) to the policy of the agent phase"""
    context_noise: float = 0.0
    """noise in what a dream has seen, 0..1; 0 is the least that was trained, 1 / k_max, as at play"""
    gates: bool = True
    """stop before the imagination where dreams do not follow the actions, or bring rewards that the game does not"""

    tasks: Literal["player", "none"] = "player"
    """player: the agent is told whose play it is to imitate, the `player` of an episode; none: all are alike"""
    env_id: str | None = None
    """the game to play at the end, such as retro:Airstriker-Genesis-v0; None: none"""
    play_episodes: int = 40
    """games of each player, on the same seeds"""
    play_task: str | None = None
    """as which of the players the agent dreams and plays; None: as the one with the highest mean return in training,
    or as it has dreamed"""
    play_seed: int = 1_000_000
    """the first of the seeds"""
    baselines: bool = True
    """random play, the recorded mix and the policy before its imagination play, too"""
    max_steps: int = 1000
    """steps until a game is cut off"""
    num_envs: int = 10
    """games that are played side by side, each in a process"""
    sampling_steps: int = 0
    """denoising steps of a predicted frame in the evaluation; 0 means 4"""
    log_every: int = 10
    """updates between two rows of TensorBoard scalars"""
    save_every: int = 200
    """updates between two saves of last.pt"""


# Axes: B batch, T frames of a window, S slots (tokens of a frame), D width, P patches, N x Z latents of a frame, A
# keys, M movements, L rows ahead, R rows of all episodes laid end to end, E games side by side. Row t holds frame t
# and the action, reward and end that came with it (arrival): the policy at row t chooses the action of row t + 1.
PHASES = ("tokenizer", "dynamics", "agent", "imagine")


@dataclass
class Preset:
    """What --preset chooses; these are cpu's."""

    frame_size: int = 64
    patch: int = 8
    tokenizer_dim: int = 64
    tokenizer_layers: int = 2  # as many to encode as to decode
    tokenizer_heads: int = 2
    tokenizer_time_every: int = 2  # every so many layers one over time
    clip: int = 2  # frames that a layer of the tokenizer sees at once
    n_latents: int = 64
    latent_dim: int = 16
    pack: int = 8  # latents that make one token of the dynamics
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    registers: int = 4
    time_every: int = 2
    k_max: int = 8  # the finest step is 1 / k_max
    context: int = 16  # frames that a layer of the dynamics sees at once
    lengths: tuple[int, int] = (8, 24)  # rows of a short and of a long window
    batch_sizes: tuple[int, int, int, int] = (16, 16, 16, 192)  # by phase
    steps: tuple[int, int, int, int] = (1000, 2000, 3000, 60)
    lr: float = 3e-3


GPU_S = Preset(
    **{"frame_size": 128, "tokenizer_dim": 256, "tokenizer_layers": 8, "tokenizer_heads": 8, "tokenizer_time_every": 4},
    **{"clip": 4, "pack": 2, "dim": 512, "layers": 12, "heads": 8, "kv_heads": 4, "registers": 8},
    **{"time_every": 4, "k_max": 64, "context": 192, "lengths": (64, 256)},
    **{"batch_sizes": (64, 32, 32, 256), "steps": (20_000, 40_000, 10_000, 3_000), "lr": 3e-4},
)
GPU_M = replace(
    GPU_S,
    **{"frame_size": 256, "patch": 16, "tokenizer_dim": 512, "n_latents": 256, "dim": 768, "layers": 18, "heads": 12},
    **{"batch_sizes": (64, 16, 16, 128), "steps": (100_000, 100_000, 20_000, 5_000)},
)
PRESETS = {"cpu": Preset(), "gpu-s": GPU_S, "gpu-m": GPU_M}
N_BINS = 255
HORIZONS = (1, 2, 4, 8, 16)  # frames ahead that the dynamics is scored at
START = 8  # real frames before an open-loop prediction
VALUE_STEPS = 1500  # updates in which the value learns recorded returns
BLOCK = 100  # rows whose dreams are averaged before an interval is drawn: 5 seconds of a game at 20 Hz


# data: which rows a batch has -----------------------------------------------------------------------------------------
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
        self.order = (None, np.zeros(0, np.int64))  # an epoch, and its permutation

    def draw(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,) windows, and which of them are of the uniform half (n,) bool."""
        n_uniform = n if len(self.relevant) == 0 else n - n // 2
        chosen = np.zeros(0, np.int64)
        while len(chosen) < n_uniform:
            if self.order[0] != self.state["epoch"]:
                rng = np.random.default_rng((self.seed, 0, self.state["epoch"]))
                self.order = self.state["epoch"], rng.permutation(self.n)
            taken = self.order[1][self.state["position"] :][: n_uniform - len(chosen)]
            chosen = np.r_[chosen, taken]
            self.state["position"] += len(taken)
            if self.state["position"] == self.n:
                self.state["epoch"], self.state["position"] = self.state["epoch"] + 1, 0
        rng = np.random.default_rng((self.seed, 1, self.state["batches"]))
        self.state["batches"] += 1
        relevant = rng.choice(self.relevant, n - n_uniform) if n > n_uniform else np.zeros(0, np.int64)
        return np.r_[chosen, relevant], np.arange(n) < n_uniform


def choose_contexts(rows: Rows, length: int, task: int) -> np.ndarray:
    """(W, 2) of those windows the whole ones after whose `length` rows the game goes on: where a dream may begin. Of
    the player `task` alone, whom the agent has only seen in games of that player, if there are any."""
    windows, _ = choose_windows(rows, length)
    last = windows[:, 0] + length - 1
    windows = windows[(last < windows[:, 1]) & (rows.cont.numpy()[np.minimum(last, windows[:, 1] - 1)] > 0)]
    own = windows[rows.task.numpy()[windows[:, 0]] == task]
    return own if len(own) else windows


def draw_clips(windows: np.ndarray, length: int, clip: int) -> np.ndarray:
    """(B, clip) rows, anywhere inside each window (B, 2) of `length`; a run that is shorter repeats its last."""
    stop = np.minimum(windows[:, 0] + length, windows[:, 1])
    places = np.maximum(stop - windows[:, 0] - clip + 1, 1)
    first = windows[:, 0] + (torch.rand(len(windows)).numpy() * places).astype(np.int64)
    return np.minimum(first[:, None] + np.arange(clip), stop[:, None] - 1)


def lengthen(windows: np.ndarray, short: int, length: int) -> np.ndarray:
    """Windows (B, 2) of `short` rows, moved to begin where one of `length` rows may that holds them."""
    back = torch.randint(length - short + 1, (len(windows),)).numpy()
    return np.stack([windows[:, 0] - back, windows[:, 1]], 1)


def recorded_returns(rows: Rows, gamma: float) -> torch.Tensor:
    """Discounted sum (R,) of the rewards after each row, 0 after the end of the game; NaN where more than a tenth of
    the weights are those of rewards that nobody knows, as the run breaks off or they are not valid."""
    returns, unknown = torch.zeros(len(rows.reward)), torch.zeros(len(rows.reward))
    for first, stop in rows.runs:
        after, missing = 0.0, float(rows.cont[stop - 1])
        for i in reversed(range(first, stop)):
            returns[i], unknown[i] = after, missing
            after = float(rows.reward[i]) + gamma * after
            missing = gamma * missing if rows.rew_valid[i] else 1.0
    return torch.where(unknown > 0.1, math.nan, returns)


def gather(rows: Rows, windows: np.ndarray, length: int, ahead: int, device) -> dict[str, torch.Tensor]:
    """(B, 2) windows -> z (B, T, N, Z), and of T + `ahead` rows movement, keys, reward, cont, act_valid, rew_valid, and
    inside (the row is of the same run); task (B,). Where the run ends its last row repeats, not inside and not valid. A
    window that leaves its run is moved back in, as far as there is room."""
    first, stop = torch.tensor(windows).T  # (B,), (B,)
    run_start = torch.tensor(rows.runs[np.searchsorted(rows.runs[:, 1], windows[:, 1]), 0])
    first = torch.maximum(torch.minimum(first, stop - length), run_start)
    index = first[:, None] + torch.arange(length + ahead)  # (B, T + ahead)
    inside = index < stop[:, None]
    index = torch.minimum(index, stop[:, None] - 1)
    batch = {name: getattr(rows, name)[index] for name in ("movement", "keys", "reward", "cont")}
    batch |= {name: getattr(rows, name)[index] & inside for name in ("act_valid", "rew_valid")} | {"inside": inside}
    batch |= {"z": rows.z[index[:, :length]].float(), "task": rows.task[index[:, 0]]}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


# ALGO LOGIC: network --------------------------------------------------------------------------------------------------
def rotation(first: int, length: int, head_dim: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (T, H / 2) of the rotary positions (Su et al. 2021) first, first + 1, ..."""
    frequency = 10_000.0 ** (-torch.arange(head_dim // 2, device=device) / (head_dim // 2))
    angle = torch.arange(first, first + length, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rope(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(..., T, H) turned by a `rotation`."""
    (cos, sin), (a, b) = turn, x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def remember(past: list, k: torch.Tensor, v: torch.Tensor, first: int, context: int) -> list[torch.Tensor]:
    """Write keys and values (rows, heads, T, H) of the frames first, first + 1, ... into `past`, those of the last
    `context` frames (rows, heads, context, H): frame t into place t % context, which held one that is too far to be
    seen. Returns what the T frames may look at, in the order of time where T is above 1."""
    T = k.shape[2]
    if not past:
        past += [new.new_empty(*new.shape[:2], context, new.shape[3]) for new in (k, v)]
    if T == 1:
        for kept, new in zip(past, (k, v), strict=True):
            kept[:, :, first % context] = new[:, :, 0]
        return [kept[:, :, : first + 1] for kept in past]
    before = torch.arange(max(0, first - context + 1), first, device=k.device) % context
    seen = [torch.cat([kept[:, :, before], new], 2) for kept, new in zip(past, (k, v), strict=True)]
    places = torch.arange(first, first + T, device=k.device)[-context:] % context
    for kept, new in zip(past, (k, v), strict=True):
        kept[:, :, places] = new[:, :, -context:]
    return seen


class Block(nn.Module):
    """Attention over the slots of a frame, or of each slot over its own past, then a SwiGLU; norms before them, and on
    queries and keys. `kv_heads` heads of keys and values serve `heads` of queries (grouped-query attention)."""

    def __init__(self, dim: int, heads: int, kv_heads: int, over_time: bool, context: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.over_time, self.context = over_time, context
        self.norm, self.ff_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        self.out = nn.Linear(dim, dim, bias=False)
        hidden = 64 * math.ceil(dim * 8 / 3 / 64)
        self.ff_in, self.ff_out = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x, mask, turn=None, past: list | None = None, first: int = 0):
        """x (B, T, S, D); mask (S, S), or over time (T, K), (B, T, K), None for all; True may be seen. Over time `turn`
        is the frames' rotation, `past` what `remember` keeps of the frames before the `first`. Returns (B, T, S, D)."""
        B, T, S, D = x.shape
        y = self.norm(x)
        y = y.transpose(1, 2).reshape(B * S, T, D) if self.over_time else y.reshape(B * T, S, D)
        heads = self.qkv(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (rows, heads, length, H)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.over_time:
            q, k = rope(q, turn), rope(k, turn)
            if past is not None:
                k, v = remember(past, k, v, first, self.context)
            if mask is not None and mask.dim() == 3:
                mask = mask[:, None].expand(B, S, *mask.shape[1:]).reshape(B * S, 1, *mask.shape[1:])
        if x.is_cuda and self.heads != self.kv_heads:  # fused kernels that take a mask take no groups
            k, v = (a.repeat_interleave(self.heads // self.kv_heads, 1) for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != self.heads)
        y = self.out(y.transpose(1, 2).flatten(2))
        y = y.reshape(B, S, T, D).transpose(1, 2) if self.over_time else y.reshape(B, T, S, D)
        x = x + y
        gate, value = self.ff_in(self.ff_norm(x)).chunk(2, -1)
        return x + self.ff_out(F.silu(gate) * value)


class Trunk(nn.Module):
    """Blocks over (B, T, S, D): every `time_every`-th over time, causal, `context` frames far; the others over the
    slots, where `allowed` (S, S) says which query sees which key."""

    def __init__(self, dim, layers, heads, kv_heads, time_every, context, allowed: torch.Tensor):
        super().__init__()
        over_time = [time_every > 0 and i % time_every == time_every - 1 for i in range(layers)]
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads, time, context) for time in over_time)
        self.norm, self.context, self.head_dim, self.recompute = nn.RMSNorm(dim), context, dim // heads, False
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
        """`cache` of the frames before, {} for none, None where none is wanted. Returns x and the new cache, which
        shares its memory with the one given: that one can only be given again for the same frame."""
        first = cache["first"] if cache else 0
        past = cache["past"] if cache else [None if cache is None else [] for _ in self.blocks]
        known = min(first, self.context - 1)
        mask = self.time_mask(x.shape[1], known, independent)
        turn = rotation(first, x.shape[1], self.head_dim, x.device)
        for block, before in zip(self.blocks, past, strict=True):
            args = (x, mask if block.over_time else self.allowed, turn, before, first)
            recomputed = self.recompute and self.training and torch.is_grad_enabled()
            x = recompute(block, *args, use_reentrant=False) if recomputed else block(*args)
        return self.norm(x), None if cache is None else {"first": first + x.shape[1], "past": past}


class Tokenizer(nn.Module):
    """Masked autoencoder: frames to `n_latents` x `latent_dim` numbers in -1..1, and back. Frames are read, and
    written, as what differs from the mean frame. `pack` latents make one token for the dynamics: N is n_latents / pack,
    Z is latent_dim * pack."""

    def __init__(self, size, patch, dim, layers, heads, n_latents, latent_dim, pack, time_every, clip, grid: bool):
        super().__init__()
        side, cells = size // patch, math.isqrt(n_latents)
        if grid and (cells * cells != n_latents or side % cells):
            raise ValueError(f"{n_latents} latents are no grid over {side} x {side} patches. Take --latents free")
        self.size, self.patch, self.side, self.cells, self.grid = size, patch, side, cells, grid
        self.n_latents, self.pack = n_latents, pack
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
        z = torch.tanh(self.to_latent(x[:, :, self.side**2 :]))  # (B, T, n_latents, latent_dim)
        return z.unflatten(2, (-1, self.pack)).flatten(3), cache

    def decode(self, z: torch.Tensor, cache: dict | None = None):
        """z (B, T, N, Z) -> frames (B, T, 3, H, W), about 0..1, and the cache."""
        latents, p = self.from_latent(z.unflatten(3, (self.pack, -1)).flatten(2, 3)), self.patch
        queries = self.query_position.expand(*z.shape[:2], -1, -1)
        if self.grid:
            c, k = self.cells, self.side // self.cells
            near = latents.unflatten(2, (c, c)).repeat_interleave(k, 2).repeat_interleave(k, 3)
            queries = queries + near.flatten(2, 3)
        x, cache = self.decoder(torch.cat([queries, latents + self.latent_position], 2), cache=cache)
        x = self.to_pixels(x[:, :, : self.side**2])  # (B, T, P, 3 * patch^2)
        x = x.unflatten(2, (self.side, self.side)).unflatten(-1, (3, p, p)).permute(0, 1, 4, 2, 5, 3, 6)
        return self.mean_frame + x.flatten(5, 6).flatten(3, 4), cache


class Dynamics(nn.Module):
    """Clean latents from noisy ones, the past and the actions. Slots of a frame: latents, each with what it was in the
    frame before, registers, the action, the noise level with the step size, and last the agent, who sees all and whom
    nobody sees."""

    def __init__(
        self,
        z_shape,
        bounded,
        n_movement,
        n_keys,
        n_tasks,
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
        (self.n_tokens, token_dim), self.k_max = z_shape, k_max
        self.bounded = bounded  # z lies in -1..1
        S = self.n_tokens + registers + 3
        is_agent = torch.arange(S) == S - 1
        self.z_in, self.z_out = nn.Linear(token_dim, dim), nn.Linear(dim, token_dim)
        self.before_in, self.before_signal = nn.Linear(3 * token_dim, dim), nn.Embedding(k_max, dim)
        self.slots = nn.Parameter(0.02 * torch.randn(S - 1, dim))  # registers, an action that is not known: this alone
        self.movement, self.keys = nn.Embedding(n_movement, dim), nn.Embedding(max(1, n_keys), dim)
        self.signal, self.step = nn.Embedding(k_max, dim // 2), nn.Embedding(k_max.bit_length(), dim - dim // 2)
        self.agent, self.task = nn.Parameter(0.02 * torch.randn(dim)), nn.Embedding(n_tasks, dim)
        for table in (self.movement, self.keys, self.signal, self.before_signal, self.step, self.task):
            nn.init.normal_(table.weight, std=0.02)
        self.trunk = Trunk(dim, layers, heads, kv_heads, time_every, context, ~is_agent | is_agent[:, None])

    def forward(self, z, signal, step, actions: dict, independent=None, cache: dict | None = None):
        """z (B, T, N, Z) noisy; signal (B, T) in 0..k_max - 1, of k_max; step (B, T), of the size 2^step / k_max;
        actions movement (B, T), keys (B, T, A), act_valid (B, T), and task (B,); independent (B,) bool, whose frames
        are unrelated images. Returns clean z (B, T, N, Z), what the agent reads (B, T, D), and the cache."""
        known = actions["act_valid"] if independent is None else actions["act_valid"] & ~independent[:, None]
        action = self.movement(actions["movement"]) + actions["keys"] @ self.keys.weight[: actions["keys"].shape[-1]]
        action = torch.where(known[..., None], action, 0.0)  # (B, T, D)
        level = torch.cat([self.signal(signal), self.step(step)], -1)
        registers = torch.zeros(*level.shape[:2], len(self.slots) - self.n_tokens - 2, level.shape[-1], device=z.device)
        latents = self.z_in(z) + self.frame_before(z, signal, independent, cache)
        world = torch.cat([latents, registers, action[:, :, None], level[:, :, None]], 2) + self.slots
        agent = (self.agent + self.task(actions["task"]))[:, None, None].expand(-1, level.shape[1], -1, -1)
        x, cache = self.trunk(torch.cat([world, agent], 2), independent, cache)
        cache = None if cache is None else cache | {"z": z[:, -1:], "signal": signal[:, -1:]}
        return self.z_out(x[:, :, : self.n_tokens]), x[:, :, -1], cache

    def frame_before(self, z, signal, independent, cache: dict | None) -> torch.Tensor:
        """(B, T, N, D) of what a token and the two beside it were in the frame before, and of the noise level; 0 where
        there is none. Attention could fetch that, but learns it long after it could have learnt what an action does."""
        last_z, last_signal = (cache["z"], cache["signal"]) if cache else (torch.zeros_like(z[:, :1]), signal[:, :1])
        z, signal = torch.cat([last_z, z[:, :-1]], 1), torch.cat([last_signal, signal[:, :-1]], 1)
        beside = F.pad(z, (0, 0, 1, 1))  # (B, T, N + 2, Z)
        before = self.before_in(torch.cat([beside[:, :, :-2], z, beside[:, :, 2:]], -1))
        before = before + self.before_signal(signal)[:, :, None]
        if cache:
            return before
        known = torch.ones_like(signal, dtype=torch.bool)
        known[:, 0] = False
        if independent is not None:
            known &= ~independent[:, None]
        return torch.where(known[..., None, None], before, 0.0)

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
        self.n_movement, self.n_keys = n_movement, n_keys
        self.reward, self.policy = Head(dim, ahead, N_BINS), Head(dim, ahead, n_movement + n_keys)
        self.cont, self.value = Head(dim, 1, 1), Head(dim, 1, N_BINS)  # the value learns in imagination
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


def mtp_means(nll: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Of (B, T, L) the mean over the pairs that count, (L,) per distance, 0 without a pair; their sum is Eq. 9."""
    return torch.where(counts, nll, 0.0).sum((0, 1)) / counts.sum((0, 1)).clamp(min=1)


def action_kl(logits: torch.Tensor, prior: torch.Tensor, n_movement: int) -> torch.Tensor:
    """KL[p || prior] (...) in nats of two policies' logits (..., M + A): the sum over the movement and each key."""
    log_p, log_q = logits[..., :n_movement].log_softmax(-1), prior[..., :n_movement].log_softmax(-1)
    moving = (log_p.exp() * (log_p - log_q)).sum(-1)
    on, off = logits[..., n_movement:], prior[..., n_movement:]
    p = on.sigmoid()
    pressing = p * (F.logsigmoid(on) - F.logsigmoid(off)) + (1 - p) * (F.logsigmoid(-on) - F.logsigmoid(-off))
    return moving + pressing.sum(-1)


def action_nll(logits: torch.Tensor, movement: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """-log p (...) of an action: movement (...) one of M, each of the keys (..., A) by itself. logits (..., M + A)."""
    n_movement = logits.shape[-1] - keys.shape[-1]
    moving = -logits[..., :n_movement].log_softmax(-1).gather(-1, movement[..., None])[..., 0]
    return moving + F.binary_cross_entropy_with_logits(logits[..., n_movement:], keys, reduction="none").sum(-1)


def agent_losses(
    heads: Heads, h: torch.Tensor, batch: dict, policy_rows: torch.Tensor, reward_rows: torch.Tensor
) -> dict:
    """Scalars `policy`, `reward`, `cont` of h (B, T, D) and labels of T + L rows; which rows learn, (B, T) bool. Beside
    them what the nearest row's share is, `policy_next` and `reward_now`, and of how many pairs, `policy_pairs`."""
    logits = heads.policy(h)  # (B, T, L, M + A)
    row, counts = mtp_pairs(policy_rows, batch["act_valid"], logits.shape[2], first=1)
    policy = mtp_means(action_nll(logits, batch["movement"][:, row], batch["keys"][:, row]), counts)
    pairs = counts[..., 0].sum()
    logits = heads.reward(h)  # (B, T, L, N_BINS)
    row, counts = mtp_pairs(reward_rows, batch["rew_valid"], logits.shape[2], first=0)
    reward = mtp_means(twohot_nll(logits, batch["reward"][:, row], heads.reward_bins), counts)
    alive = batch["cont"][:, : h.shape[1], None]
    ends = F.binary_cross_entropy_with_logits(heads.cont(h)[..., 0], alive, reduction="none")
    terms = {"policy": policy.sum(), "reward": reward.sum(), "cont": mtp_means(ends, reward_rows[..., None]).sum()}
    return terms | {"policy_next": policy[0].detach(), "reward_now": reward[0].detach(), "policy_pairs": pairs}


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


def shortcut_losses(z_pred, z, target, signal, step, counts, k_max: int, ramp: float = 0.9) -> dict[str, torch.Tensor]:
    """Scalar `dynamics` (Eq. 7): frames of the smallest steps should be z, those of larger ones `target`, all of them
    (B, T, N, Z); frames near the noise count less, pure noise 1 - `ramp` (Eq. 8). `counts` (B, T) bool, the frames that
    learn. `flow` and `bootstrap` are the two kinds by themselves, to look at.

    One sum: normalised apart, the second takes over, as it is 0 for a network that always says the same."""
    weight = (ramp * signal / k_max + 1 - ramp) * counts
    goal = torch.where((step == 0)[..., None, None], z, target)
    error = weight * (z_pred.float() - goal).square().mean((2, 3))
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


def pmpo_loss(log_probs, advantages, alpha: float = 0.5, weighted: bool = False) -> torch.Tensor:
    """Eq. 11 before its KL term: means over the actions that turned out well (advantage 0 and more) and badly. Only the
    sign counts, or in `weighted` means its size as well; the scale never does. An empty set adds nothing."""
    weights = advantages.abs() if weighted else torch.ones_like(advantages)
    good, bad = weights * (advantages >= 0), weights * (advantages < 0)
    mean_good = (log_probs * good).sum() / good.sum().clamp(min=1e-8)
    mean_bad = (log_probs * bad).sum() / bad.sum().clamp(min=1e-8)
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
        return loss / (self.value().to(loss.dtype) + 1e-8)

    def value(self) -> torch.Tensor:
        """Root of the running mean square so far."""
        return (self.mean_square / (1 - self.decay ** self.count.clamp(min=1))).sqrt()


def amp_config(device: str | torch.device, bf16_supported: bool) -> tuple[torch.dtype | None, bool]:
    """Autocast type (None: none) and whether gradients need a scaler."""
    if torch.device(device).type != "cuda":
        return None, False
    return (torch.bfloat16, False) if bf16_supported else (torch.float16, True)


def parameter_groups(new: list[nn.Parameter], modules: list[nn.Module], lr: float, scale: float, decay: float):
    """Of all parameters in `modules`: those in `new` learn at `lr`, others at `scale` times that; only the weights of
    linear layers decay; `matrices` of blocks are for Muon. Frozen parameters are in none."""
    parts = [part for module in modules for part in module.modules()]
    linear = {part.weight for part in parts if isinstance(part, nn.Linear)}
    matrices = {p for part in parts if isinstance(part, Block) for p in part.parameters() if p.dim() == 2}
    new, groups = set(new), {}
    for p in dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad):
        kind = (lr if p in new else lr * scale, decay if p in linear else 0.0, p in matrices)
        groups.setdefault(kind, []).append(p)
    return [
        {"params": ps, "lr": rate, "base_lr": rate, "weight_decay": wd, "matrices": muon}
        for (rate, wd, muon), ps in groups.items()
    ]


def make_optimizers(groups: list[dict], fused: bool = True) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (Jordan 2024, at the update size of AdamW: Liu et al. 2025, arXiv 2502.16982) for the matrices of
    blocks, which learn from half as many frames with it."""
    others, matrices = ([group for group in groups if group["matrices"] == muon] for muon in (False, True))
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.99), fused=fused, foreach=False)]
    return optimizers + ([torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")] if matrices else [])


# reading, imagining, playing ------------------------------------------------------------------------------------------
ACTION = ("movement", "keys", "act_valid")  # by row; beside them a task


def as_pictures(frames: np.ndarray, device) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float (..., 3, H, W) in 0..1."""
    return torch.tensor(frames, device=device).movedim(-1, -3).float() / 255


def chunks(rows: Rows) -> list[list[slice]]:
    """Of each run its slices, of at most 64 rows."""
    return [[slice(i, min(stop, i + 64)) for i in range(first, stop, 64)] for first, stop in rows.runs]


@torch.no_grad()
def encode_rows(tokenizer: Tokenizer, rows: Rows, device) -> torch.Tensor:
    """z (R, N, Z) float16 of all frames."""
    tokenizer.eval()
    z, progress = [], tqdm(total=len(rows.frames), desc="encode", unit="frame", leave=False)
    for run in chunks(rows):
        cache = {}
        for part in run:
            latents, cache = tokenizer.encode(as_pictures(rows.frames[part], device)[None], cache=cache)
            z.append(latents[0].half().cpu())
            progress.update(len(z[-1]))
    progress.close()
    return torch.cat(z)


@torch.no_grad()
def read_rows(dynamics: Dynamics, rows: Rows, device) -> torch.Tensor:
    """What the agent reads (R, D) of each row, after all before it in its run, as at play."""
    dynamics.eval()
    generator, h, progress = torch.Generator().manual_seed(0), [], tqdm(total=len(rows.z), desc="read", leave=False)
    for run in chunks(rows):
        cache = {}
        for part in run:
            actions = {name: getattr(rows, name)[part][None].to(device) for name in ACTION}
            actions["task"] = rows.task[part][:1].to(device)
            read, cache = look(dynamics, rows.z[part][None].float().to(device), actions, cache, generator)
            h.append(read[0])
            progress.update(len(read[0]))
    progress.close()
    return torch.cat(h)


def draw_noise(shape: tuple, generator, device) -> torch.Tensor:
    """Normal numbers (B, ...); `generator` None, one for all, or a list with one for each of the B."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape[1:], generator=one) for one in generator]).to(device)
    return torch.randn(shape, generator=generator).to(device)


def look(dynamics: Dynamics, z: torch.Tensor, actions: dict, cache: dict, generator=None, noise: float = 0.0):
    """Take real or finished frames z (B, T, N, Z) into the cache with a share of `noise`, 0 for the least that was
    trained. Returns what the agent reads (B, T, D) and the cache."""
    level = dynamics.k_max - max(1, round(noise * dynamics.k_max))
    level = torch.full(z.shape[:2], level, device=z.device)
    z = noisy(z, draw_noise(z.shape, generator, z.device), level, dynamics.k_max)
    _, h, cache = dynamics(z, level, torch.zeros_like(level), actions, cache=cache)
    return h, cache


def predict_frame(dynamics: Dynamics, actions: dict, cache: dict, n_steps: int, shape: tuple, generator=None):
    """z (B, 1, N, Z) of the next frame, `n_steps` Euler steps away from noise; actions of one row. `look` at it next,
    with the same cache."""
    z = draw_noise(shape, generator, actions["movement"].device)
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
        return {name: actions[name][:, first:stop] for name in ACTION} | {"task": actions["task"]}

    _, cache = look(dynamics, z[:, :n_context], part(0, n_context), {}, generator)
    frames, shape = [], (len(z), 1, *z.shape[2:])
    for t in range(n_context, z.shape[1]):
        frames.append(predict_frame(dynamics, part(t, t + 1), cache, n_steps, shape, generator))
        _, cache = look(dynamics, frames[-1], part(t, t + 1), cache, generator)
    return torch.cat(frames, 1)


def choose_actions(
    logits: torch.Tensor, n_movement: int, chance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Movement (B,) and keys (B, A) of a policy's logits (B, M + A): drawn with `chance`, (B, M + A) uniform in 0..1,
    the likeliest without."""
    moving, pressing = logits[:, :n_movement], logits[:, n_movement:]
    if chance is None:
        return moving.argmax(-1), (pressing > 0).float()
    moving = moving - (-chance[:, :n_movement].log()).log()  # the largest is a draw (Gumbel)
    return moving.argmax(-1), (chance[:, n_movement:] < pressing.sigmoid()).float()


@torch.no_grad()
def dream(
    dynamics: Dynamics,
    heads: Heads,
    policy: Head | None,
    batch: dict,
    n_context: int,
    horizon: int,
    args: Args,
    generator=None,
) -> dict:
    """H = `horizon` frames after the first C = `n_context` of the batch's z (B, C or more, N, Z), by the actions that
    `policy` draws, or without one by those of the batch. Returns h (B, 1 + H, D) of the states 0 .. H, and what came
    with arriving at 1 .. H: z (B, H, N, Z), movement (B, H), keys (B, H, A), reward (B, H), cont (B, H), the chance
    that the game goes on."""
    B, shape = len(batch["z"]), (len(batch["z"]), 1, *batch["z"].shape[2:])
    n_steps = args.sampling_steps or min(4, dynamics.k_max)
    context = {name: batch[name][:, :n_context] for name in ACTION} | {"task": batch["task"]}
    h, cache = look(dynamics, batch["z"][:, :n_context], context, {}, generator, args.context_noise)
    made = {"h": [h[:, -1:]], "z": [], "movement": [], "keys": []}
    for i in range(n_context, n_context + horizon):
        if policy is None:
            row = {name: batch[name][:, i : i + 1] for name in ACTION}
        else:
            logits = policy(made["h"][-1])[:, 0, 0]
            chance = torch.rand(logits.shape, generator=generator).to(logits.device)
            movement, keys = choose_actions(logits, heads.n_movement, chance)
            known = torch.ones(B, 1, dtype=torch.bool, device=logits.device)
            row = {"movement": movement[:, None], "keys": keys[:, None], "act_valid": known}
        row["task"] = batch["task"]
        z = predict_frame(dynamics, row, cache, n_steps, shape, generator)
        h, cache = look(dynamics, z, row, cache, generator, args.context_noise)
        for name, new in (("h", h), ("z", z), ("movement", row["movement"]), ("keys", row["keys"])):
            made[name].append(new)
    made = {name: torch.cat(parts, 1) for name, parts in made.items()}
    made["reward"] = twohot_decode(heads.reward(made["h"][:, 1:])[:, :, 0], heads.reward_bins)
    return made | {"cont": heads.cont(made["h"][:, 1:])[:, :, 0, 0].sigmoid()}


def alive(cont: torch.Tensor) -> torch.Tensor:
    """(B, H) chances that the game went on at each step -> the chance (B, H) that it is on before each."""
    return torch.cat([torch.ones_like(cont[:, :1]), cont[:, :-1]], 1).cumprod(1)


def dream_returns(made: dict, gamma: float) -> torch.Tensor:
    """(B,) discounted sum of a dream's rewards, while the game is on."""
    discount = gamma ** torch.arange(made["reward"].shape[1], device=made["reward"].device)
    return (made["reward"] * alive(made["cont"]) * discount).sum(1)


class AgentPlayer:
    """The agent at play, one frame at a time, in E games at once, by the actions that `policy` draws (`sample`) or
    holds for the likeliest; the game of a seed does not depend on the others. An action is movement * 2^A + the keys
    as bits."""

    def __init__(self, networks: dict[str, nn.Module], policy: Head, task: int, sample: bool, device):
        self.tokenizer, self.dynamics, self.heads = (networks[name].eval() for name in list(BUILD)[:3])
        self.policy, self.task, self.sample, self.device = policy, task, sample, device
        self.bits = torch.arange(self.heads.n_keys)

    def reset(self, seeds: list[int]):
        """Begin a game for each seed."""
        self.seen, self.known, self.generators = {}, {}, [torch.Generator().manual_seed(seed) for seed in seeds]
        self.took(np.zeros(len(seeds), np.int64))
        self.last["act_valid"] = torch.zeros(len(seeds), 1, dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def act(self, screens: np.ndarray) -> np.ndarray:
        """uint8 (E, H, W, 3) -> actions (E,)"""
        frames = resize(torch.tensor(screens, device=self.device).movedim(-1, 1), *[self.tokenizer.size] * 2)
        z, self.seen = self.tokenizer.encode(frames[:, None].float() / 255, cache=self.seen)
        z = z.half().float()  # as `encode_rows` keeps it
        h, self.known = look(self.dynamics, z, self.last, self.known, self.generators)
        logits, chance = self.policy(h)[:, 0, 0].cpu(), None  # (E, M + A), of the next row
        if self.sample:
            chance = torch.stack([torch.rand(logits.shape[1], generator=one) for one in self.generators])
        movement, keys = choose_actions(logits, self.heads.n_movement, chance)
        return ((movement << len(self.bits)) + (keys.long() << self.bits).sum(-1)).numpy()

    def took(self, actions: np.ndarray):
        """What was really done (E,) leads to the next frame."""
        actions = torch.tensor(actions).long()
        self.last = {
            "movement": (actions >> len(self.bits))[:, None].to(self.device),
            "keys": ((actions[:, None] >> self.bits) & 1).float()[:, None].to(self.device),
            "act_valid": torch.ones(len(actions), 1, dtype=torch.bool, device=self.device),
            "task": torch.full((len(actions),), self.task, device=self.device),
        }


# evaluation: whole held-out episodes ----------------------------------------------------------------------------------
@torch.no_grad()
def evaluate_tokenizer(tokenizer: Tokenizer, held: Rows, device) -> dict[str, float]:
    """Quality of the frames after encoding and decoding, beside the mean frame's."""
    tokenizer.eval()
    quality = {way: (Decibels(), Decibels()) for way in ("made", "mean")}  # of all pixels, of the foreground
    for run in chunks(held):
        seen, shown = {}, {}
        for part in run:
            real = as_pictures(held.frames[part], device)[None]
            z, seen = tokenizer.encode(real, cache=seen)
            made, shown = tokenizer.decode(z, cache=shown)
            front = foreground(real, tokenizer.mean_frame)
            for way, frames in (("made", made.clamp(0, 1)), ("mean", tokenizer.mean_frame)):
                quality[way][0].add(frames, real)
                quality[way][1].add(frames, real, front)
    return {
        "eval/psnr": quality["made"][0].value(),
        "eval/psnr_mean_frame": quality["mean"][0].value(),
        "eval/psnr_foreground": quality["made"][1].value(),
        "eval/psnr_foreground_mean_frame": quality["mean"][1].value(),
    }


def spread_windows(rows: Rows, length: int, limit: int) -> np.ndarray:
    """(W, 2) first row and end of the run, of up to `limit` windows of `length` rows, evenly from all, eight rows apart
    from each other."""
    windows = [(start, stop) for first, stop in rows.runs for start in range(first, stop - length + 1, 8)]
    return np.array(windows)[np.linspace(0, len(windows) - 1, min(limit, len(windows))).astype(int)]


def check_windows(rows: Rows, length: int, where: str):
    """Raise ValueError where `spread_windows` would find less than two. Now, not after the training."""
    if np.maximum(0, 1 + (np.diff(rows.runs) - length) // 8).sum() < 2:
        raise ValueError(f"there are no two windows of {length} frames in {where}")


@torch.no_grad()
def evaluate_dynamics(
    dynamics: Dynamics, tokenizer: Tokenizer | None, held: Rows, n_steps: int, device, limit: int = 64
):
    """Open-loop predictions on windows of held-out runs, beside holding the last frame, and with the actions of another
    window. Returns metrics at 8 frames ahead, a table per horizon, and pictures of one window."""
    dynamics.eval()
    length = START + max(HORIZONS)
    windows = spread_windows(held, length, limit)
    batch = gather(held, windows, length, 0, device)
    z, half = batch["z"], len(windows) // 2  # the window half of all away is of another game, or long after
    other = {name: torch.cat([batch[name][:, :START], batch[name].roll(half, 0)[:, START:]], 1) for name in ACTION}
    other["task"] = batch["task"]

    def predict(actions: dict, steps: int, seed: int) -> torch.Tensor:
        return open_loop(dynamics, z, actions, START, steps, torch.Generator().manual_seed(seed))

    samples = [predict(batch, n_steps, seed) for seed in range(4)]
    made = {"one_step": predict(batch, 1, 0), "sample": samples[0], "mean_of_4": torch.stack(samples).mean(0)}
    made |= {"shuffled": predict(other, 1, 0), "hold_last": z[:, START - 1 : START].expand_as(samples[0])}
    at, table = [h - 1 for h in HORIZONS], {"windows": len(windows), "horizons": list(HORIZONS)}
    for way, latents in made.items():
        table[f"latent_mse_{way}"] = (latents - z[:, START:]).square().mean((0, 2, 3))[at].tolist()
    metrics = {
        "eval/latent_mse": table["latent_mse_one_step"][3],
        "eval/latent_mse_sample": table["latent_mse_sample"][3],
        "eval/latent_mse_hold_last": table["latent_mse_hold_last"][3],
        "eval/action_shuffle_ratio": table["latent_mse_shuffled"][3] / table["latent_mse_one_step"][3],
    }
    if tokenizer is None:
        return metrics, table, None
    index = torch.tensor(windows[:, :1]) + torch.arange(length)
    real = as_pictures(held.frames[index], device)  # (W, T, 3, H, W)
    real, before = real[:, START:], real[:, START - 1 : START]
    front = foreground(real, tokenizer.mean_frame)

    def show(latents: torch.Tensor) -> torch.Tensor:
        return tokenizer.decode(torch.cat([z[:, :START], latents], 1))[0][:, START:].clamp(0, 1)

    shown = {"one_step": show(made["one_step"]), "sample": show(made["sample"]), "ceiling": show(z[:, START:])}
    shown["hold_last"] = before.expand_as(real)  # the frame itself, not what the latents keep of it
    for way, frames in shown.items():
        table[f"psnr_{way}"] = [psnr(frames[:, t], real[:, t]) for t in at]
        table[f"psnr_foreground_{way}"] = [psnr(frames[:, t], real[:, t], front[:, t]) for t in at]
    metrics |= {
        "eval/predicted_psnr_foreground": table["psnr_foreground_one_step"][3],
        "eval/predicted_psnr_foreground_hold_last": table["psnr_foreground_hold_last"][3],
        "eval/predicted_psnr_foreground_ceiling": table["psnr_foreground_ceiling"][3],
    }
    w = int(front.sum((1, 2, 3, 4)).argmax())  # where most is to be seen
    return metrics, table, {"real": real[w], "predicted": shown["sample"][w], "one step": shown["one_step"][w]}


@torch.no_grad()
def evaluate_agent(dynamics: Dynamics, heads: Heads, train: Rows, held: Rows, key_names: list[str], device):
    """Policy, reward and continue head on whole held-out runs, beside what counting predicts. Metrics and tables."""
    heads.eval()
    h = read_rows(dynamics, held, device)
    metrics, table = score_policy(heads.policy(h)[:, 0].cpu(), train, held, key_names)
    predicted = twohot_decode(heads.reward(h), heads.reward_bins).cpu().numpy()  # (R, L)
    found, more = score_reward(predicted, -heads.cont(h)[:, 0, 0].cpu().numpy(), held)
    return metrics | found, table | more


@torch.no_grad()
def follow_recorded(
    dynamics: Dynamics, heads: Heads, rows: Rows, n_context: int, args: Args, device
) -> dict[str, float]:
    """What dreams are worth, on windows of the rows. With the recorded actions: how well their rewards tell what came,
    and how often they fire beside the real frames, at what fires as often as the events come there. With two actions
    held, the two that part the most: how far dreams part, beside those of two noise seeds; `held` is how far movement m
    and key k (0: none) part them from the first."""
    dynamics.eval(), heads.eval()
    batch = gather(rows, spread_windows(rows, n_context + args.horizon, 256), n_context + args.horizon, 0, device)
    z, known = batch["z"], {name: batch[name] for name in ACTION} | {"task": batch["task"]}
    made = dream(dynamics, heads, None, batch, n_context, args.horizon, args, torch.Generator().manual_seed(0))
    h, _ = look(dynamics, z, known, {}, torch.Generator().manual_seed(0), args.context_noise)
    seen = twohot_decode(heads.reward(h[:, n_context:])[:, :, 0], heads.reward_bins)
    valid, found = batch["rew_valid"][:, n_context:], {}
    for kind, sign in (("gain", 1), ("loss", -1)):
        event = (sign * batch["reward"][:, n_context:] > 0)[valid]
        real, dreamed = (sign * seen)[valid], (sign * made["reward"])[valid]
        found[f"events_{kind}"] = int(event.sum())
        found[f"auc_{kind}"] = auc(event.cpu().numpy(), dreamed.cpu().numpy())
        found[f"auc_{kind}_real_frames"] = auc(event.cpu().numpy(), real.cpu().numpy())
        if found[f"events_{kind}"]:
            fires = real.sort(descending=True).values[found[f"events_{kind}"] - 1]
            found[f"real_rate_{kind}"] = float((real >= fires).sum() / found[f"events_{kind}"])
            found[f"rate_{kind}"] = float((dreamed >= fires).sum() / (real >= fires).sum())
    some = {name: x[:: max(1, len(z) // 32)] for name, x in batch.items()}

    def hold(movement: int, key: int, seed: int) -> torch.Tensor:
        after = torch.arange(z.shape[1], device=device) >= n_context
        keys = F.one_hot(torch.tensor(key), heads.n_keys + 1)[1:].to(device)  # key 0 is none
        held = {
            "movement": torch.where(after, movement, some["movement"]),
            "keys": torch.where(after[:, None], keys, some["keys"]),
            "act_valid": some["act_valid"] | after,
        }
        generator = torch.Generator().manual_seed(seed)
        return dream(dynamics, heads, None, some | held, n_context, min(8, args.horizon), args, generator)["z"][:, -1]

    actions = [(m, 0) for m in range(heads.n_movement)] + [(0, k + 1) for k in range(heads.n_keys)]
    actions = actions[:32]  # of many, the first: each is compared with each
    ends = torch.stack([hold(*action, seed=0) for action in actions])  # (actions, W, N, Z)
    apart = (ends[:, None] - ends).square().mean((3, 4))  # (actions, actions, W)
    half = apart.shape[2] // 2  # the pair is chosen on one half, measured on the other
    first, second = divmod(int(apart[..., :half].mean(2).argmax()), len(actions))
    found["held"] = [[*action, float(distance)] for action, distance in zip(actions, apart[0].mean(1), strict=True)]
    noise = [(ends[i] - hold(*actions[i], seed=1)).square().mean((1, 2)) for i in (first, second)]
    found |= {"actions_apart": float(apart[first, second, half:].mean()), "opposite": [actions[first], actions[second]]}
    return found | {"seeds_apart": float(torch.stack(noise)[:, half:].mean())}


def check_dreams(found: dict):
    """Raise ValueError with the reason where `follow_recorded` found dreams that teach nothing."""
    mend = "Train the dynamics for longer or on more frames, or --no-gates"
    if found["opposite"][0] == found["opposite"][1]:
        raise ValueError("the game has one action, there is nothing to choose. --no-gates")
    if not found["actions_apart"] > found["seeds_apart"]:
        apart = f"{found['actions_apart']:.4f} apart, two noise seeds {found['seeds_apart']:.4f}"
        raise ValueError(
            f"dreams do not follow the actions: the two that part them the most bring them {apart}. {mend}"
        )
    events = {kind: found[f"events_{kind}"] for kind in ("gain", "loss")}
    if sum(events.values()) < 10:
        found = f"{events['gain']} gains and {events['loss']} losses in the windows, expected 10"
        raise ValueError(f"too few rewards to check what dreams pay: {found}. {mend}")
    for kind in (kind for kind in events if events[kind] and found[f"real_rate_{kind}"] > 2):
        raise ValueError(f"the reward head does not tell a {kind} from other frames. {mend}")
    rate = sum(found.get(f"rate_{kind}", 0) * n for kind, n in events.items()) / sum(events.values())
    if not 0.5 <= rate <= 2:
        fires = f"the reward head fires {rate:.2f} times as often as in real frames, expected 0.5 to 2"
        raise ValueError(f"dreams do not pay as the game does: {fires}. {mend}")
    for kind, n in events.items():
        if n and not 0.5 <= found[f"rate_{kind}"] <= 2:
            print(f"dreams show a {kind} {found[f'rate_{kind}']:.2f} times as often as real frames do")


@torch.no_grad()
def evaluate_imagination(
    dynamics: Dynamics, heads: Heads, prior: Head, tokenizer, held: Rows, n_context: int, task: int, args: Args, device
) -> tuple[dict, dict, dict | None]:
    """Dreams of the tuned policy and of the one before, from the same held-out contexts and noise: metrics, a table,
    and films (4, T, 3, H, W) of some of them."""
    windows = spread_windows(held, n_context, 512)
    windows = windows[held.cont.numpy()[windows[:, 0] + n_context - 1] > 0]  # the game goes on
    _, block = np.unique(windows[:, 0] // BLOCK, return_inverse=True)
    batch = gather(held, windows, n_context, 0, device)
    batch["task"] = torch.full_like(batch["task"], task)
    made = {"agent": [], "prior": []}
    for seed in range(4):
        for name, policy in (("agent", heads.policy), ("prior", prior)):
            generator = torch.Generator().manual_seed(seed)
            made[name].append(dream(dynamics, heads, policy, batch, n_context, args.horizon, args, generator))
    returns = {
        name: torch.stack([dream_returns(one, args.gamma) for one in dreams]).mean(0).cpu().numpy()
        for name, dreams in made.items()
    }  # (W,) each; what is near in time is alike, so the intervals are over the means of blocks
    returns = {name: np.bincount(block, one) / np.bincount(block) for name, one in returns.items()}
    h = torch.cat([one["h"][:, :-1] for one in made["agent"]])
    kl = action_kl(heads.policy(h)[:, :, 0], prior(h)[:, :, 0], heads.n_movement).mean()
    table = {
        "contexts": len(windows),
        "blocks": int(block.max()) + 1,
        "return": {name: interval(one) for name, one in returns.items()},
    }
    table |= {"gain": interval(returns["agent"] - returns["prior"]), "kl": float(kl)}
    metrics = {
        "eval/dream_return": table["return"]["agent"][0],
        "eval/dream_return_prior": table["return"]["prior"][0],
        "eval/dream_kl": float(kl),
    }
    if tokenizer is None:
        return metrics, table, None
    some = torch.linspace(0, len(batch["z"]) - 1, 4).long()
    films = {
        name: tokenizer.decode(torch.cat([batch["z"], dreams[0]["z"]], 1)[some])[0].clamp(0, 1)
        for name, dreams in made.items()
    }
    return metrics, table, films


# training ------------------------------------------------------------------------------------------------------------
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
    z_noisy, actions = (
        noisy(z, noise, signal, k_max),
        {name: batch[name][:, :T] for name in ACTION} | {"task": batch["task"]},
    )
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
    terms = shortcut_losses(z_pred, z, target, signal, step, inside & uniform[:, None], k_max, args.ramp)
    if heads is not None:
        reads = inside & ~independent[:, None] & (signal >= args.agent_signal * k_max)
        imitates = reads if uniform.all() else reads & ~uniform[:, None]
        terms |= agent_losses(heads, h, batch, imitates, reads)
    return terms


def imagine_terms(dynamics: Dynamics, heads: Heads, prior: Head, batch: dict, args: Args) -> dict:
    """Scalars `actor` (Eq. 11: PMPO, and the KL to `prior`) and `value` of one dream from each context z (B, C, N, Z).
    Only the policy and the value head learn. `kl` and `return` are to look at."""
    made = dream(dynamics, heads, heads.policy, batch, batch["z"].shape[1], args.horizon, args)
    h = made["h"][:, :-1]  # (B, H, D), the states in which an action was chosen
    with torch.no_grad():
        values = twohot_decode(heads.value(made["h"])[:, :, 0], heads.value_bins)  # (B, H + 1)
        returns = lambda_returns(made["reward"], values, made["cont"], args.gamma, args.lam)[:, :-1]
        advantages = returns - values[:, :-1]  # (B, H)
        prior_logits = prior(h)[:, :, 0]
    torch.clear_autocast_cache()  # weights that were cast without a gradient
    logits = heads.policy(h)[:, :, 0]  # (B, H, M + A)
    log_probs = -action_nll(logits, made["movement"], made["keys"])
    kl = action_kl(logits, prior_logits, heads.n_movement).mean()
    weight = alive(made["cont"])
    value = twohot_nll(heads.value(h)[:, :, 0], returns, heads.value_bins)
    return {
        "actor": pmpo_loss(log_probs, advantages, args.alpha, args.advantage_weights) + args.beta * kl,
        "value": (weight * value).sum() / weight.sum(),
        "kl": kl.detach(),
        "return": dream_returns(made, args.gamma).mean(),
    }


def fit_value(dynamics: Dynamics, heads: Heads, rows: Rows, held: Rows, args: Args, device) -> float:
    """The value begins with what followed the recorded frames: dreams are too short, and too kind, to teach it that.
    Returns the share of the held-out returns' variance that it explains, NaN where too few returns are known."""
    h, returns = read_rows(dynamics, rows, device), recorded_returns(rows, args.gamma).to(device)
    known, value = torch.nonzero(returns.isfinite())[:, 0], heads.value.requires_grad_(True)
    if not len(known):
        return math.nan
    optimizer = torch.optim.AdamW(value.parameters(), lr=1e-3, weight_decay=args.weight_decay)
    for step in tqdm(range(VALUE_STEPS), desc="value", unit="update", leave=False):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / VALUE_STEPS)
        some = known[torch.randint(len(known), (512,)).to(device)]
        optimizer.zero_grad(set_to_none=True)
        twohot_loss(value(h[some])[:, 0], returns[some], heads.value_bins).backward()
        optimizer.step()
    returns = recorded_returns(held, args.gamma)
    with torch.no_grad():
        found = twohot_decode(value(read_rows(dynamics, held, device))[:, 0], heads.value_bins).cpu()
    known = returns.isfinite()
    return float(1 - (returns - found)[known].var() / returns[known].var()) if known.sum() > 1 else math.nan


BUILD = {"tokenizer": Tokenizer, "dynamics": Dynamics, "heads": Heads, "prior": Head}
TERMS = {  # what each phase minimises: TensorBoard's name of the loss, and of the RMS that it is divided by
    "tokenizer": {"recon": ("train/recon_loss", "train/recon_rms")},
    "dynamics": {"dynamics": ("train/dynamics_loss", "train/dynamics_rms")},
    "agent": {
        "dynamics": ("train/dynamics_loss", "train/dynamics_rms"),
        "policy": ("train/policy_loss", "train/policy_rms"),
        "reward": ("train/reward_loss", "train/reward_rms"),
        "cont": ("train/cont_loss", "train/cont_rms"),
    },
    "imagine": {"actor": ("train/actor_loss", "train/actor_rms"), "value": ("train/value_loss", "train/value_rms")},
}
PARTS = {  # of those, to look at
    "flow": "train/flow_loss",
    "bootstrap": "train/bootstrap_loss",
    "policy_next": "train/policy_next_loss",
    "reward_now": "train/reward_now_loss",
    "policy_pairs": "train/policy_pairs",
    "kl": "train/kl",
    "return": "train/dream_return",
}


def build(name: str, sizes: dict, device) -> nn.Module:
    network = BUILD[name](**sizes).to(device)
    network.sizes = sizes
    return network


def network_sizes(phase: str, args: Args, meta: dict, rows: Rows, networks: dict, n_tasks: int) -> tuple[str, dict]:
    """The network that a phase begins with: its name, and what builds it."""
    p, actions = PRESETS[args.preset], {"n_movement": meta["n_movement"], "n_keys": len(meta["keys"])}
    if phase == "tokenizer":
        sizes = {"size": p.frame_size, "patch": p.patch, "dim": p.tokenizer_dim, "layers": p.tokenizer_layers}
        sizes |= {"heads": p.tokenizer_heads, "n_latents": p.n_latents, "latent_dim": p.latent_dim, "pack": p.pack}
        sizes |= {"time_every": p.tokenizer_time_every, "clip": p.clip, "grid": args.latents == "grid"}
        return "tokenizer", sizes
    if phase == "dynamics":
        sizes = {"z_shape": list(rows.z.shape[1:]), "bounded": bool(rows.z.abs().max() <= 1), "dim": p.dim}
        sizes |= {"layers": p.layers, "heads": p.heads, "kv_heads": p.kv_heads, "registers": p.registers}
        sizes |= actions | {"n_tasks": n_tasks}
        return "dynamics", sizes | {"time_every": p.time_every, "k_max": p.k_max, "context": p.context}
    dim = networks["dynamics"].sizes["dim"]
    if phase == "imagine":
        heads = networks["heads"]
        return "prior", {"dim": dim, "ahead": heads.sizes["ahead"], "n_out": heads.n_movement + heads.n_keys}
    reward = max(args.reward_range, float(symlog(rows.reward.abs().max())))  # as wide as the data need
    sizes = {"dim": dim, "ahead": args.mtp, "reward_limit": reward}
    return "heads", sizes | actions | {"value_limit": max(args.value_range, reward)}


def print_bins(reward: torch.Tensor, bins: torch.Tensor):
    """What the rewards (R,) use of the bins."""
    events = reward[reward != 0]
    low, _ = twohot_neighbours(events, bins)
    print(
        f"rewards {reward.min():g} to {reward.max():g}, {len(events):,} not 0, in {len(low.unique())} of {N_BINS} bins "
        f"of -{bins[-1]:g} to {bins[-1]:g}; {float((reward.abs() > bins[-1]).float().mean()):.2%} clamped"
    )
    least = float(events.abs().min()) if len(events) else math.inf
    if least < bins[N_BINS // 2 + 1] / 4:
        print(f"the least reward, {least:g}, is below a quarter of a bin: scale it up, or lower --reward-range")


def tokenizer_id(networks: dict[str, nn.Module]) -> str | None:
    """SHA-256 over its weights; None without one."""
    if "tokenizer" not in networks:
        return None
    tensors = networks["tokenizer"].state_dict().values()
    return hashlib.sha256(b"".join(x.cpu().contiguous().numpy().tobytes() for x in tensors)).hexdigest()[:16]


def name_tasks(args: Args, meta: dict, known: list[str] | None) -> tuple[list[str], dict[str, int]]:
    """Names of the tasks, those of a checkpoint if it has any, and the task of each episode."""
    each = {name: str(facts.get("player", "unknown")) for name, facts in meta["episodes"].items()}
    each = each if args.tasks == "player" else dict.fromkeys(each, "all")
    tasks = known or sorted(set(each.values()))
    new = sorted(set(each.values()) - set(tasks))
    if new:
        found = f"{args.data_dir} has episodes of {', '.join(new)}, the checkpoint knows {', '.join(tasks)}"
        mend = "Add --tasks none" if tasks == ["all"] else "Leave out --tasks none" if args.tasks == "none" else ""
        raise ValueError(f"{found}. {mend or 'Name data of those players, or train the dynamics on these'}")
    if args.play_task is not None and args.play_task not in tasks:
        raise ValueError(f"--play-task {args.play_task}: expected one of {', '.join(tasks)}")
    return tasks, {name: tasks.index(task) for name, task in each.items()}


def best_task(rows: Rows) -> int:
    """The task of the episodes whose mean sum of rewards is the highest."""
    returns = np.bincount(rows.episode, rows.reward.numpy())
    task = rows.task.numpy()[np.unique(rows.episode, return_index=True)[1]]  # of each episode
    return int(max(np.unique(task), key=lambda i: returns[task == i].mean()))


def action_spec(meta: dict) -> dict:
    return {name: meta.get(name) for name in ("n_movement", "movements", "keys", "fps")}


def load_networks(path: Path, state: dict, names: list[str], device) -> dict[str, nn.Module]:
    """Of the checkpoint that was read from `path`, strictly: every tensor of each. Raises ValueError with its name."""
    try:
        networks = {name: build(name, state["sizes"][name], device) for name in names}
        for name, network in networks.items():
            network.load_state_dict(state["models"][name])
    except (KeyError, TypeError, RuntimeError) as error:
        found = f"{path} is of another version of {Path(__file__).name} ({str(error).splitlines()[0]})"
        raise ValueError(f"{found}. Train it again, or take the script in its run folder") from None
    return networks


def load_phase(phase: str, path: Path, args: Args, meta: dict) -> dict:
    """The checkpoint that the flag of a phase names. Raises ValueError where it is none of that phase, or belongs to
    another preset or to data of another kind."""
    if not path.is_file():
        raise ValueError(f"{path} is no file. Name the {phase}.pt of a run: --{phase}-checkpoint runs/<run>/{phase}.pt")
    state = runs.load_checkpoint(path)
    if "tokenizer_id" not in state:  # not by the script's name: a copy under another may read what this one wrote
        raise ValueError(f"{path} is of another script, or of an older version of it. Train it again")
    if "step" in state and state["phase"] == phase:
        raise ValueError(f"{path} stopped at update {state['step']}. Finish it: --resume {state['run_dir']}")
    if state["phase"] == "imagine" and phase == "agent":
        raise ValueError(f"{path} has dreamed already. Evaluate it with --phase eval --imagine-checkpoint {path}")
    missing = [name for name in list(BUILD)[: PHASES.index(phase) + 1] if name not in state["models"]]
    if missing and not (missing == ["tokenizer"] and "z_shape" in meta):
        raise ValueError(f"{path} holds no {missing[0]}. Name the {phase}.pt of a run of {Path(__file__).name}")
    if state["args"]["preset"] != args.preset:
        raise ValueError(f"{path} is of the preset {state['args']['preset']}. Add --preset {state['args']['preset']}")
    spec = {"actions": action_spec(meta)} | ({"rewards": meta.get("reward")} if phase in ("agent", "imagine") else {})
    was = {"actions": state["action_spec"], "rewards": state["reward"]}
    for what, here in spec.items() if phase != "tokenizer" else ():
        if was[what] != here:
            found = f"the {what} {was[what]}, {args.data_dir} has {here}"
            raise ValueError(f"{path} was trained on {found}. Name the data that it was trained on")
    return state


def load_given(args: Args, meta: dict, device) -> tuple[dict[str, nn.Module], list[str], list[str] | None, str | None]:
    """The networks that the checkpoint flags name, the phases that are done by it, the tasks that the agent knows, None
    without a dynamics, and as which of them it has dreamed, None where it has not. Raises ValueError for checkpoints
    that do not belong together, or not to the data."""
    given = {
        "tokenizer": args.tokenizer_checkpoint,
        "dynamics": args.dynamics_checkpoint,
        "agent": args.agent_checkpoint,
        "imagine": args.imagine_checkpoint,
    }
    states = {phase: (path, load_phase(phase, Path(path), args, meta)) for phase, path in given.items() if path}
    networks, done, tasks, play_task = {}, [], None, None
    for phase, (path, state) in states.items():
        first_path, first = next(iter(states.values()))
        if state["tokenizer_id"] != first["tokenizer_id"]:
            raise ValueError(f"{path} was trained with another tokenizer than {first_path}. Name that of its run")
        done = list(PHASES[: PHASES.index(phase) + 1])
        names = [name for name in list(BUILD)[: len(done)] if name != "tokenizer" or "frame_shape" in meta]
        networks, tasks = load_networks(path, state, names, device), state["tasks"] if phase != "tokenizer" else None
        play_task = state["play_task"] if phase == "imagine" else None
    z_shape = networks["dynamics"].sizes["z_shape"] if "dynamics" in networks else meta.get("z_shape")
    if z_shape != meta.get("z_shape", z_shape):
        found = f"latents of {z_shape}, {args.data_dir} has {meta['z_shape']}"
        raise ValueError(f"{path} was trained on {found}. Name the data that it was trained on")
    size = networks["tokenizer"].size if "tokenizer" in networks else PRESETS[args.preset].frame_size
    if meta.get("frame_shape", [size, size, 3]) != [size, size, 3]:
        raise ValueError(
            f"{args.data_dir} has frames of {meta['frame_shape']}, the tokenizer of --preset {args.preset}, or the one "
            f"given, takes {size} x {size}. Pack them with pack_episodes.py --frame-size {size}"
        )
    return networks, done, tasks, play_task


def check_args(args: Args, meta: dict):
    """Raise ValueError for values that cannot be meant."""
    shares = ("mask_ratio", "bootstrap_ratio", "bootstrap_from", "independent_frame_ratio", "agent_signal")
    shares += ("gamma", "lam", "alpha", "context_noise", "ramp")
    wrong = [name for name in shares if not 0 <= getattr(args, name) <= 1]
    if wrong:
        raise ValueError(f"--{wrong[0].replace('_', '-')} {getattr(args, wrong[0])}: expected 0 to 1")
    least = dict.fromkeys(("mtp", "play_episodes", "num_envs", "max_steps", "log_every", "save_every", "horizon"), 1)
    least |= dict.fromkeys(("batch_size", "tokenizer_steps", "dynamics_steps", "agent_steps", "imagine_steps"), 0)
    least |= dict.fromkeys(("warmup_steps", "long_every", "play_seed", "beta"), 0)
    least |= dict.fromkeys(("lr", "weight_decay", "max_grad_norm", "foreground_weight"), 0)
    for name, low in least.items():
        if not getattr(args, name) >= low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name):g}: expected {low} or more")
    if not min(args.reward_range, args.value_range) > 0:
        raise ValueError(f"--reward-range {args.reward_range:g} --value-range {args.value_range:g}: expected above 0")
    k_max = PRESETS[args.preset].k_max
    if args.sampling_steps > k_max:
        raise ValueError(f"--sampling-steps {args.sampling_steps}: --preset {args.preset} has {k_max} levels")
    highest = 1 - 1 / k_max
    if args.agent_signal > highest:
        raise ValueError(f"--agent-signal {args.agent_signal}: no frame is above {highest:g}, no head would learn")
    if not min(args.trunk_lr_scale, args.policy_lr_scale) > 0:
        found = f"--trunk-lr-scale {args.trunk_lr_scale:g} --policy-lr-scale {args.policy_lr_scale:g}"
        raise ValueError(f"{found}: expected above 0")
    if args.sampling_steps < 0 or args.sampling_steps & (args.sampling_steps - 1):
        raise ValueError(f"--sampling-steps {args.sampling_steps}: expected 0 or a power of two")
    if args.phase == "eval" and not (args.agent_checkpoint or args.imagine_checkpoint):
        raise ValueError("--phase eval trains nothing. Name the agent: --agent-checkpoint runs/<run>/agent.pt")
    if args.imagine_checkpoint and args.phase != "eval":
        raise ValueError(f"--imagine-checkpoint {args.imagine_checkpoint} is for --phase eval, not {args.phase}")
    if args.agent_checkpoint and args.phase not in ("imagine", "eval", "all"):
        raise ValueError(f"--agent-checkpoint {args.agent_checkpoint} is for --phase imagine, not {args.phase}")
    if args.env_id and args.phase in ("tokenizer", "dynamics"):
        raise ValueError(f"--env-id {args.env_id}: nobody plays after --phase {args.phase}. Leave it out")
    if "z_shape" in meta and (args.phase == "tokenizer" or args.tokenizer_checkpoint or args.env_id):
        raise ValueError(
            f"{args.data_dir} holds latents, no frames: leave out --phase tokenizer, --tokenizer-checkpoint, --env-id"
        )


def split_episodes(args: Args, meta: dict) -> tuple[list[str], list[str]]:
    """Names of the episodes to train on, and of those held out."""
    names = sorted(meta["episodes"])
    held = [name for name in names if fnmatch(name, args.heldout)]
    if not held and args.heldout != Args.heldout:
        raise ValueError(f"--heldout {args.heldout}: {args.data_dir} has no such episode, but {', '.join(names[:5])}")
    held = held or names[-1:]
    if len(held) == len(names):
        raise ValueError(
            f"{args.data_dir}: all its episodes ({len(names)}) are held out by --heldout {args.heldout}. Pack more"
        )
    return [name for name in names if name not in held], held


def train(phase, args, rows: Rows, networks, n_steps, task, resumed, save, writer, before, device) -> bool:
    """A phase of `n_steps` updates on its networks, from the checkpoint `resumed` on if that is not None; dreams are of
    `task`. `save(name, **training)` writes a checkpoint; TensorBoard counts on from `before`. Returns whether a signal
    stopped it."""
    preset = PRESETS[args.preset]
    tokenizer, dynamics, heads, prior = (networks.get(name) for name in BUILD)
    modules = {"tokenizer": [tokenizer], "dynamics": [dynamics], "agent": [dynamics, heads]}.get(phase)
    modules = [heads.policy, heads.value] if phase == "imagine" else modules
    new = parameters = [p for module in modules for p in module.train().requires_grad_(True).parameters()]
    if phase == "agent":
        dynamics.requires_grad_(args.trunk == "finetune")
        heads.value.requires_grad_(False)  # learns in imagination
        new = [*dynamics.agent_parameters(), *heads.reward.parameters(), *heads.policy.parameters()]
        new += heads.cont.parameters()
        for p in new:
            p.requires_grad_(True)
    if phase == "imagine":
        new = list(heads.value.parameters())
    for trunk in (part for module in modules for part in module.modules() if isinstance(part, Trunk)):
        trunk.recompute = args.activation_checkpointing
        for block in trunk.blocks if args.compile_model else ():
            block.compile()
    scale = args.policy_lr_scale if phase == "imagine" else args.trunk_lr_scale
    groups = parameter_groups(new, modules, args.lr or preset.lr, scale, args.weight_decay)
    optimizers = make_optimizers(groups)
    dtype, scaled = amp_config(device, device.type == "cuda" and torch.cuda.is_bf16_supported())
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    rms = nn.ModuleDict({name: RunningRMS() for name in TERMS[phase]}).to(device)
    T, T_long = preset.lengths
    windows, relevant = choose_windows(rows, T)
    if phase == "imagine":
        windows, relevant = choose_contexts(rows, T, task), np.zeros(0, bool)
    mixture = np.flatnonzero(relevant) if phase == "agent" and args.reward_mixture else np.zeros(0, np.int64)
    sampler = WindowSampler(len(windows), mixture, args.seed + PHASES.index(phase))
    step, frames_seen, skipped = 0, 0, 0
    if resumed:
        for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(resumed["scaler"])
        rms.load_state_dict(resumed["rms"])
        sampler.state, step, frames_seen = resumed["sampler"], resumed["step"], resumed["frames_seen"]
        runs.set_rng_state(resumed["rng"])

    def save_last():
        writer.flush()  # a run that is killed goes on from here, its curves too
        training = {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        training |= {"scaler": scaler.state_dict(), "rms": rms.state_dict()}
        training |= {"sampler": dict(sampler.state), "rng": runs.rng_state(), "threads": torch.get_num_threads()}
        save("last.pt", step=step, frames_seen=frames_seen, **training)

    B = args.batch_size or preset.batch_sizes[PHASES.index(phase)]
    progress = tqdm(total=n_steps, initial=step, desc=phase, unit="update")
    started, first_step, first_frames = time.time(), step, frames_seen
    with runs.StopSignal() as stop_signal:
        if not resumed:
            save_last()
        while step < n_steps and not stop_signal:
            # fetch
            long = phase in ("dynamics", "agent") and args.long_every and (step + 1) % args.long_every == 0
            length = T_long if long else T
            chosen, uniform = sampler.draw(max(2, B * T // length))
            clips = draw_clips(windows[chosen], T, preset.clip) if phase == "tokenizer" else None
            frames_seen += len(chosen) * {"tokenizer": preset.clip, "imagine": args.horizon}.get(phase, length)

            # forward and loss
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                if phase == "tokenizer":
                    terms = tokenizer_terms(tokenizer, rows, clips, args, device)
                elif phase == "imagine":
                    batch = gather(rows, windows[chosen], length, 0, device)
                    batch["task"] = torch.full_like(batch["task"], task)
                    terms = imagine_terms(dynamics, heads, prior, batch, args)
                else:
                    batch = gather(rows, lengthen(windows[chosen], T, length), length, args.mtp, device)
                    bootstrap = phase == "agent" or step >= args.bootstrap_from * n_steps
                    terms = world_terms(dynamics, heads, batch, torch.tensor(uniform, device=device), bootstrap, args)
            loss = sum(rms[name](terms[name]) for name in TERMS[phase])

            # step
            warmup = max(1, min(args.warmup_steps, n_steps // 5))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                rise, fall = (step + 1) / warmup, 1 - step / n_steps if args.anneal_lr else 1.0
                group["lr"] = group["base_lr"] * min(1.0, rise) * fall
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
            finite = bool(torch.isfinite(norm))
            for optimizer in optimizers if finite else ():
                scaler.step(optimizer)
            skipped = 0 if finite else skipped + 1
            scaler.update()
            step += 1
            progress.update()

            # log
            if step % args.log_every == 0 or step == n_steps:
                elapsed = time.time() - started
                scalars = {PARTS[name]: term.item() for name, term in terms.items() if name in PARTS}
                for name, (loss_name, rms_name) in TERMS[phase].items():
                    scalars |= {loss_name: terms[name].item(), rms_name: rms[name].value().item()}
                scalars |= {
                    "train/loss": loss.item(),
                    "train/grad_norm": norm.item(),
                    "train/reward_windows": float(relevant[chosen].mean()) if len(relevant) else 0.0,
                    "charts/learning_rate": optimizers[0].param_groups[-1]["lr"],
                    "charts/SPS": (frames_seen - first_frames) / elapsed,
                    "charts/frames_seen": frames_seen,
                    "charts/epoch": sampler.state["epoch"] + sampler.state["position"] / sampler.n,
                    "time/step_ms": 1000 * elapsed / (step - first_step),
                }
                for name, scalar in scalars.items():
                    writer.add_scalar(name, scalar, before + step)
                progress.set_postfix({name: f"{terms[name].item():.3f}" for name in TERMS[phase]})
            if skipped == 20:
                progress.close()
                raise FloatingPointError(
                    f"20 updates in a row, to number {step} of the {phase}, had gradients that are not finite and were "
                    "left out. Lower --lr"
                )

            # save
            if step % args.save_every == 0 or step == n_steps or stop_signal:
                save_last()
    progress.close()
    if step == n_steps:
        save(f"{phase}.pt")
    return bool(stop_signal)


# main -----------------------------------------------------------------------------------------------------------------
def main(args: Args) -> dict:
    checkpoint = None
    try:
        if args.resume:
            args = runs.resume_args(args, may_change=("device", "env_id", "play_episodes", "num_envs"))
            checkpoint = runs.load_checkpoint(Path(args.resume) / "last.pt")
            torch.set_num_threads(checkpoint["threads"])  # another number sums in another order
        device = runs.pick_device(args.device)
        data_dir = Path(args.data_dir)
        meta = load_meta(data_dir)
        check_args(args, meta)
        train_names, held_names = split_episodes(args, meta)
        data_files = [data_dir / "meta.json", *(data_dir / f"{name}.npz" for name in meta["episodes"])]
        if checkpoint:
            runs.check_fingerprint(Path(args.resume), data_files)
            networks = load_networks(Path(args.resume) / "last.pt", checkpoint, list(checkpoint["models"]), device)
            if "optimizers" not in checkpoint:
                raise ValueError(f"{args.resume} is of an older version of {Path(__file__).name}. Train it again")
            done, known, play_task = checkpoint["done"], checkpoint["tasks"], checkpoint["play_task"]
        else:
            networks, done, known, play_task = load_given(args, meta, device)
        tasks, task_of = name_tasks(args, meta, known)
        rows, held = (load_rows(data_dir, names, meta, task_of) for names in (train_names, held_names))
        if play_task and args.play_task not in (None, play_task):
            raise ValueError(f"--play-task {args.play_task}: the agent has dreamed as {play_task}. Leave it out")
        play_task = args.play_task or play_task
        task = best_task(rows) if play_task is None else tasks.index(play_task)
        if args.phase != "tokenizer":
            check_windows(held, START + max(HORIZONS), "the held-out episodes. Hold longer ones out: --heldout")
        if args.env_id:
            check_game(args.env_id, meta)
        n_context = PRESETS[args.preset].lengths[0]
        windows, relevant = choose_windows(rows, n_context)
        if not len(windows):
            raise ValueError(f"{data_dir}: no run of two frames to train on. Pack longer ones with pack_episodes.py")
        if args.phase in ("imagine", "all") or args.imagine_checkpoint:
            mend = "Hold longer ones out: --heldout, or lower --horizon"
            check_windows(held, n_context + args.horizon, f"the held-out episodes. {mend}")
        if args.phase in ("imagine", "all"):
            if not len(choose_contexts(rows, n_context, task)):
                raise ValueError(f"{data_dir}: no run of more than {n_context} frames to dream from. Pack longer ones")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    n_phases = {"tokenizer": 1, "dynamics": 2, "agent": 3, "imagine": 4, "all": 4, "eval": 0}[args.phase]
    phases = [p for p in PHASES[:n_phases] if p not in done and (p != "tokenizer" or "frame_shape" in meta)]

    # run folder
    if checkpoint:
        run_dir = Path(args.resume)
        provenance = json.loads((run_dir / "provenance.json").read_text())
    else:
        run_dir = runs.make_run_dir(args, __file__, data_dir.resolve().name)
        provenance = runs.write_provenance(run_dir, data_files, device=str(device))
        runs.write_json(run_dir / "split.json", {"train": train_names, "heldout": held_names})
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, sync_tensorboard=True)
    steps = (args.tokenizer_steps, args.dynamics_steps, args.agent_steps, args.imagine_steps)
    updates = {p: n or preset for p, n, preset in zip(PHASES, steps, PRESETS[args.preset].steps, strict=True)}
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
        f"{len(windows):,} windows, {int(relevant.sum()):,} with a reward; on {device}: "
        f"{', '.join(phases) or 'evaluation'}"
    )

    unseen = sorted({tasks[i] for i in held.task.unique()} - {tasks[i] for i in rows.task.unique()})
    if unseen:
        print(f"of {', '.join(unseen)} there are held-out episodes only: the agent does not learn to play as they do")

    # training
    for phase in phases:
        if checkpoint and PHASES.index(phase) < PHASES.index(checkpoint["phase"]):
            continue
        resumed = checkpoint if checkpoint and checkpoint["phase"] == phase else None
        runs.seed_everything(args.seed + PHASES.index(phase), args.torch_deterministic)
        if phase != "tokenizer" and rows.z is None:
            rows.z = encode_rows(networks["tokenizer"], rows, device)
        name, sizes = network_sizes(phase, args, meta, rows, networks, len(tasks))
        if name not in networks:
            networks[name] = build(name, sizes, device)
        if phase == "tokenizer" and not resumed:
            networks[name].mean_frame.copy_(as_pictures(rows.frames.mean(0, dtype=np.float32), device))
        if phase == "agent":
            print_bins(rows.reward, networks[name].reward_bins.cpu())
        if phase == "imagine" and not resumed:
            networks["prior"].load_state_dict(networks["heads"].policy.state_dict())
            if held.z is None:
                held.z = encode_rows(networks["tokenizer"], held, device)
            try:
                if args.gates:
                    check_dreams(
                        follow_recorded(networks["dynamics"], networks["heads"], held, n_context, args, device)
                    )
            except ValueError as error:
                writer.close()
                agent = args.agent_checkpoint or run_dir / "agent.pt"
                raise SystemExit(f"{error}. The agent is in {agent}, --phase eval plays it") from None
            explained = fit_value(networks["dynamics"], networks["heads"], rows, held, args, device)
            writer.add_scalar("train/value_explained_variance", explained, before[phase])
            if math.isnan(explained):
                print(f"the runs break off before --gamma {args.gamma:g} has seen enough: the value is not checked")
            else:
                print(f"the value explains {explained:.0%} of the variance of what followed in the held-out games")

        def save(name: str, phase=phase, **training):
            state = {"sizes": {name: network.sizes for name, network in networks.items()}, "done": done, "phase": phase}
            state |= {"models": {name: network.state_dict() for name, network in networks.items()}}
            state |= {"tokenizer_id": tokenizer_id(networks), "action_spec": action_spec(meta)}
            state |= {
                "tasks": tasks,
                "action_index": "arrival",
                "reward": meta.get("reward"),
                "source": meta.get("source"),
            }
            state |= {
                "play_task": tasks[task],
                "args": dict(vars(args)),
                "script": Path(__file__).name,
                "run_dir": str(run_dir.resolve()),
            }
            state |= {"commit": provenance["commit"], "dataset_fingerprint": provenance["dataset_fingerprint"]}
            runs.save_checkpoint(run_dir / name, state | training)

        try:
            stopped = train(
                phase, args, rows, networks, updates[phase], task, resumed, save, writer, before[phase], device
            )
        except FloatingPointError as error:
            writer.close()
            raise SystemExit(f"{error}, or go on from the last save: --resume {run_dir}") from None
        if stopped and not ((run_dir / f"{phase}.pt").exists() and phase == phases[-1]):
            writer.close()
            print(f"stopped in the {phase} and saved. Go on with: python {Path(__file__).name} --resume {run_dir}")
            raise SystemExit(130)

    # evaluation on whole held-out episodes, and in the game
    tokenizer, dynamics, heads, prior = (networks.get(name) for name in BUILD)
    metrics, tables, last = {}, {"heldout": held_names}, sum(updates[p] for p in phases)
    if tokenizer is not None:
        metrics |= evaluate_tokenizer(tokenizer, held, device)
        held.z = encode_rows(tokenizer, held, device)
    if dynamics is not None:
        n_steps = args.sampling_steps or min(4, dynamics.k_max)
        found, tables["open_loop"], pictures = evaluate_dynamics(dynamics, tokenizer, held, n_steps, device)
        metrics |= found
        draw_open_loop(run_dir, writer, tables["open_loop"], pictures, meta["fps"])
    if heads is not None:
        found, tables["agent"] = evaluate_agent(dynamics, heads, rows, held, meta["keys"], device)
        metrics |= found
        weights = {f"{n}.{key}": x.contiguous() for n, m in networks.items() for key, x in m.state_dict().items()}
        save_file(weights, run_dir / "model.safetensors")
        config = {"sizes": {name: network.sizes for name, network in networks.items()}, "tasks": tasks}
        runs.write_json(run_dir / "config.json", config | {"action_spec": action_spec(meta)})
    if prior is not None:
        tables["follow_recorded"] = follow_recorded(dynamics, heads, held, n_context, args, device)
        metrics["eval/dream_reward_auc"] = tables["follow_recorded"]["auc_gain"]
        imagined = evaluate_imagination(dynamics, heads, prior, tokenizer, held, n_context, task, args, device)
        metrics, tables["dreams"] = metrics | imagined[0], imagined[1]
        if imagined[2] is not None:
            draw_dreams(run_dir, writer, imagined[2], n_context, meta["fps"])
    for name, metric in metrics.items():
        writer.add_scalar(name, metric, last)
    report(metrics, tables)
    runs.write_json(run_dir / "eval.json", {"metrics": metrics} | tables)
    if heads is not None and args.env_id:
        policies = {"": heads.policy} | ({"bc_": prior} if prior is not None and args.baselines else {})
        agents = {
            f"{name}{way}": AgentPlayer(networks, policy, task, way == "sampled", device)
            for name, policy in policies.items()
            for way in ("greedy", "sampled")
        }
        seeds = list(range(args.play_seed, args.play_seed + args.play_episodes))
        try:
            limits = args.num_envs, args.max_steps
            play = compare_players(args.env_id, meta, agents, seeds, *limits, run_dir, args.baselines)
        except (ValueError, OSError, ImportError, RuntimeError, gym.error.Error) as error:
            writer.close()
            agent = args.imagine_checkpoint or args.agent_checkpoint if not phases else run_dir / f"{phases[-1]}.pt"
            raise SystemExit(f"{error}. The agent is in {agent}, --phase eval plays it") from None
        tables["play"] = play | {"task": tasks[task]}
        print(f"the agent plays as {tasks[task]}")
        for name, (mean, low, high) in play["score"].items():
            speed = f", {play['decisions_per_second'][name]:.0f} frames a second" if name in agents else ""
            print(f"score {name:<12}{mean:>8.1f} ({low:.1f} to {high:.1f}){speed}")
        metrics |= {
            "eval/score": play["score"]["sampled"][0],
            "eval/score_greedy": play["score"]["greedy"][0],
        }
        if args.baselines:
            metrics["eval/score_random"] = play["score"]["random"][0]
        if prior is not None and args.baselines:
            metrics |= {
                "eval/score_bc": play["score"]["bc_sampled"][0],
                "eval/score_bc_greedy": play["score"]["bc_greedy"][0],
            }
        for name in (name for name in metrics if name.startswith("eval/score")):
            writer.add_scalar(name, metrics[name], last)
        runs.write_json(run_dir / "eval.json", {"metrics": metrics} | tables)
    writer.close()
    print(f"\nfiles  {run_dir}")
    return metrics | {"run_dir": str(run_dir)}


if __name__ == "__main__":
    main(tyro.cli(Args))
