"""Behavioural cloning from expert episodes: the pixels of a Game Boy Advance game to its ten buttons, learnt offline.

Learns from the `episode_0001.npz` files of `collect_expert_data.py`, by one of three algorithms. bc: cross-entropy with
the expert's actions. hybrid: plus n-step double Q-learning (van Hasselt et al. 2015). dagger: the student plays and the
expert labels what it meets (Ross et al. 2011). The network is IMPALA's residual CNN (Espeholt et al. 2018). Any
Gymnasium environment with RGB frames and discrete actions works through --env-id. Page: docs/bc_pokemon.md

    python collect_expert_data.py --episodes 20 --epsilon 0.4
    python bc_pokemon.py --total-training-steps 4000 --learning-rate 1e-3 --anneal-lr --obs-height 40 --obs-width 60

In: expert_data/. Out: runs/<task>__bc_pokemon__<seed>__<time>/ with eval.json, eval.png, TensorBoard events and the
.pth files that models/ receives as copies."""

import copy
import hashlib
import json
import logging
import os
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import runs
from common.video import resize
from pokemon_env.episodes import MEND, open_observations, read_episodes
from pokemon_env.evaluation import (
    Act,
    Film,
    ask_expert,
    in_words,
    make_envs,
    n_milestones,
    play,
    plot_evaluation,
    report,
    rollout,
    summarise,
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

    expert_data_dir: str = "expert_data"
    """folder of episode_*.npz"""
    rom_path: str = "Emerald-GBAdvance/rom.gba"
    """ROM to evaluate in; where the default is missing, the quest that comes with PokemonEnv is played"""
    core: str | None = None
    """libretro core of mGBA to run the ROM with; None takes the one of stable-retro"""
    init_state: str | None = None
    """save-state that every episode starts from; None starts the game itself"""
    env_id: str | None = None
    """any Gymnasium environment with RGB frames and discrete actions, such as ALE/Freeway-v5; None takes `rom_path`"""
    max_steps: int = 0
    """steps until an evaluation episode is cut off; 0 means the environment's own limit"""
    label_budget: int = 0
    """use only so many expert labels, `dagger_steps` of each round included; 0 means all"""
    top_fraction: float = 1.0
    """share of the episodes to learn from, those of highest return; above 0, up to 1"""
    val_fraction: float = 0.1
    """share of the episodes, at least one, that is held out to choose best_val.pth; 0..0.5"""
    allow_pickle: bool = False
    """open episodes with pickled infos, which can run any code that their author put there"""
    cache_dir: str | None = None
    """folder for the resized frames; None means .cache in `expert_data_dir`"""

    algorithm: Literal["bc", "hybrid", "dagger"] = "bc"
    """bc: cross-entropy. hybrid: plus Q-learning on the rewards. dagger: bc, with labels for what the student sees"""
    total_training_steps: int = 100_000
    """updates of the network"""
    batch_size: int = 64
    """samples per update"""
    learning_rate: float = 1e-4
    """learning rate of AdamW"""
    anneal_lr: bool = False
    """let the learning rate fall linearly to 0"""
    weight_decay: float = 1e-5
    """weight decay of AdamW"""
    hidden_dim: int = 256
    """size of the fully connected layer"""
    obs_height: int = 84
    """height the frames are resized to; pixels"""
    obs_width: int = 84
    """width the frames are resized to; pixels"""
    frame_stack: int = 1
    """frames the network sees at once, the newest last"""
    stack_dropout: float = 0.5
    """chance that a sample's older frames are replaced by the newest one, so that they are not all it looks at"""
    class_weights: Literal["none", "sqrt", "inverse"] = "none"
    """weight of an action in the cross-entropy: 1, or (1 / its frequency) to the power of 0.5 or 1"""
    state_inputs: Literal["none", "milestone", "vector", "text"] = "none"
    """what the network gets beside the pixels: how many milestones are reached, the state as numbers, or as words"""
    milestone_curriculum: bool = False
    """begin with what was played before the first milestones; the rest joins during the first half of the updates"""
    bc_weight: float = 1.0
    """hybrid: coefficient of the cross-entropy"""
    gamma: float = 0.99
    """hybrid: discount per step"""
    n_step: int = 5
    """hybrid: rewards summed up before the target network's estimate is taken"""
    target_frequency: int = 1000
    """hybrid: updates between two copies of the network to the target network"""
    prioritized: bool = False
    """hybrid: sample transitions by the size of their last TD error instead of uniformly"""
    expert: str | None = "scripted"
    """whom dagger asks and who plays beside the policy in the evaluation, as in collect_expert_data.py; None: nobody"""
    dagger_rounds: int = 5
    """dagger: how often the student plays, at equal distances between a quarter and three quarters of the updates"""
    dagger_episodes: int = 16
    """dagger: episodes it plays each time"""
    dagger_steps: int = 0
    """dagger: pictures of them, drawn at random, each once, that the expert labels; 0 means all"""
    dagger_share: Literal["return", "decay"] = "return"
    """dagger: share of the steps that the expert plays: 1 - student's return / expert's, or `dagger_decay` ^ round"""
    dagger_decay: float = 0.5
    """dagger: see `dagger_share`"""
    dagger_patience: int = 60
    """dagger: as `eval_patience`, for the student's episodes: going round in circles shows nothing new"""

    eval_frequency: int = 5_000
    """updates between two evaluations in the environment; 0 means at the end only"""
    eval_episodes: int = 5
    """episodes of each, always the same seeds"""
    final_eval_episodes: int = 100
    """episodes of the final evaluation; 0 means none"""
    eval_sampled: bool = True
    """play them a second time, with actions drawn from the policy"""
    baseline_episodes: int = 20
    """episodes of each baseline (expert, random, majority action, repeat previous, replay) at the end; 0 means none"""
    eval_patience: int = 300
    """steps without a new milestone that end an evaluation episode, where there are milestones; 0 means never"""
    eval_seed: int = 1_000_000
    """seed of the first evaluation episode; the others follow"""
    num_envs: int = 4
    """processes that play side by side"""
    log_every: int = 100
    """updates between two rows of TensorBoard scalars"""
    val_frequency: int = 500
    """updates between two looks at the held-out episodes"""
    save_frequency: int = 10_000
    """updates between two checkpoint_<step>.pth; last.pt is saved with every look at the held-out episodes"""
    save_best: bool = True
    """keep best_model.pth (by return) and best_val.pth (by held-out loss)"""
    model_dir: str = "models"
    """folder that receives copies of the run's .pth files"""
    overwrite: bool = False
    """replace another run's files in `model_dir`"""
    capture_video: bool = False
    """write eval.mp4, the first episode of the final evaluation"""
    export_onnx: str | None = None
    """file for the final policy as ONNX, compared with torch; None means none"""


# Axes: B batch, E environments side by side, T steps of an episode, A actions, C H W image (uint8 RGB), h w resized
PREPROCESS_VERSION = 1  # part of the cache's names; a change of `preprocess` needs another
MODEL_FILES = "*.pth"
CHUNK_BYTES = 2**24  # of frames that are resized together
QUICK = (
    "python bc_pokemon.py --total-training-steps 4000 --learning-rate 1e-3 --anneal-lr --obs-height 40 --obs-width 60"
)


# ALGO LOGIC: preprocessing, the same for training, evaluation and export ----------------------------------------------
def preprocess(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, h, w), by the antialiased resize of common/video.py."""
    return resize(frames.permute(0, 3, 1, 2), height, width)


STATE_DIM = {"none": 0, "milestone": 32, "vector": 32, "text": 512}
FACINGS = ("north", "south", "west", "east")
MENUS = ("none", "message", "start", "choose", "action", "move")


def state_features(info: dict, kind: str) -> np.ndarray:
    """What --state-inputs gives the network of an `info` of PokemonEnv: float32 (STATE_DIM[kind],)."""
    x = np.zeros(STATE_DIM[kind], np.float32)
    if not info:  # nothing is played there any more
        return x
    if kind == "milestone":
        x[min(len(info["milestones"]["completed"]), 31)] = 1
    elif kind == "vector":
        player, battle, lead = info["player"], info["battle"] or {}, (info["party"] or [{}])[0]
        enemy = battle.get("enemy") or {}
        x[:2] = (player["x"] or 0) / 32, (player["y"] or 0) / 32
        x[2:4] = [number / 32 for number in player["map"] or (0, 0)]  # None before the game has begun
        x[4:8] = [player["facing"] == facing for facing in FACINGS]
        x[8:14] = [info["menu"] == menu for menu in MENUS]
        x[14:16] = info["dialogue"], info["locked"]
        x[16:18] = battle.get("trainer", 0), battle.get("cursor") or 0
        x[18:20] = [battle.get("kind") == foe for foe in ("leaf", "tide")]
        x[20:22] = (lead.get("hp") or 0) / max(1, lead.get("max_hp") or 1), (lead.get("level") or 0) / 100
        x[22:24] = (enemy.get("hp") or 0) / max(1, enemy.get("max_hp") or 1), (enemy.get("level") or 0) / 100
        x[24:27] = len(info["party"]) / 6, sum(info["badges"]) / 8, np.log1p(info["money"] or 0) / 16
        x[27] = len(info["milestones"]["completed"]) / max(1, info["milestones"]["total"])
    elif kind == "text":
        for word in state_text(info).split():
            x[zlib.crc32(word.encode()) % len(x)] += 1
    return x


def state_text(info: dict) -> str:
    """The state in words, as a language model would be told it."""
    player, battle = info["player"], info["battle"]
    words = [f"at={player['location']}:{player['x']},{player['y']}".replace(" ", "_"), f"facing={player['facing']}"]
    words += [f"x={player['x']}", f"y={player['y']}", f"map={player['map']}".replace(" ", "")]
    words += [f"next={info['milestones']['next']}", f"menu={info['menu']}", f"dialogue={info['dialogue']}"]
    words += [f"flag={flag}" for flag in info["flags"]]
    if battle:
        words += [f"battle={battle['menu']}:{battle['cursor']}:{battle['kind']}", f"trainer={battle['trainer']}"]
    return " ".join(words)


# data: cache, rows, batches -------------------------------------------------------------------------------------------
def cache_frames(episode: dict, args: Args) -> Path:
    """A file for `open_frames`: the episode at the network's resolution, uint8 (T + 1, 3, h, w); the last frame is what
    the last action led to, or the last observation again where it is not known. Made once per file and size."""
    path, (T, H, W, _) = episode["path"], episode["shape"]
    folder = Path(args.cache_dir or Path(args.expert_data_dir) / ".cache")
    size = f"{args.obs_height}x{args.obs_width}"
    cache = folder / f"{path.stem}_{runs.fingerprint([path])}_{size}_v{PREPROCESS_VERSION}.npy"
    if not cache.exists():
        temporary = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            chunk = max(1, CHUNK_BYTES // (H * W * 3))
            header = {"descr": "|u1", "fortran_order": False, "shape": (T + 1, 3, args.obs_height, args.obs_width)}
            with open(temporary, "wb") as file, open_observations(path) as (_, _, stream):
                np.lib.format.write_array_header_1_0(file, header)
                for first in range(0, T, chunk):
                    n = min(chunk, T - first)
                    pixels = np.frombuffer(stream.read(n * H * W * 3), np.uint8).reshape(n, H, W, 3)
                    small = preprocess(torch.tensor(pixels), args.obs_height, args.obs_width)
                    file.write(small.contiguous().numpy())
                stream.read()  # to the end: checks the CRC
                final = torch.tensor(episode.get("final_observation", pixels[-1]))
                file.write(preprocess(final[None], args.obs_height, args.obs_width).contiguous().numpy())
            os.replace(temporary, cache)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise ValueError(f"{path} is cut off or damaged ({error}). {MEND}") from None
        except OSError as error:
            raise ValueError(f"{folder} cannot take {cache.name} ({error}). Choose another --cache-dir") from None
        finally:
            temporary.unlink(missing_ok=True)
    return cache


@lru_cache(maxsize=256)  # each holds a file open
def open_frames(cache: Path) -> np.ndarray:
    return np.load(cache, mmap_mode="r")


class Demonstrations:
    """Rows of all episodes laid end to end, one per observation; an episode's last row has no action. Frames stay on
    disk until a batch asks for them."""

    def __init__(self, gamma: float, n_step: int):
        self.gamma, self.n_step = gamma, n_step
        self.frames, self.starts = [], []  # per episode: (T + 1, 3, h, w) or a file of them, its first row
        self.columns, self.n_rows, self.joined = {}, 0, {}  # name -> one array per episode

    def add(self, frames, actions, taken, rewards, terminated: bool, known_end: bool, features, stage) -> np.ndarray:
        """Append an episode of T steps; `features` (T + 1, D) and `stage` (T + 1,) go on to its last frame. Returns the
        rows of its steps (T,). `known_end`: the last frame is truly what followed, so that the last transition of an
        episode that was cut off can be bootstrapped from it."""
        T, first = len(actions), self.n_rows
        return_n, next_row, discount = n_step_transitions(rewards, terminated, known_end, self.n_step, self.gamma)
        columns = {
            "action": np.append(actions, 0),
            "taken": np.append(taken, 0),
            "return_n": np.append(return_n, 0.0).astype(np.float32),
            "next_row": np.append(first + next_row, first + T),
            "discount": np.append(discount, 0.0).astype(np.float32),
            "td_known": np.append(np.isfinite(return_n), False),
            "features": features,
            "stage": stage,
            "episode_start": np.full(T + 1, first),
        }
        self.frames.append(frames)
        self.starts.append(first)
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column)
        self.n_rows, self.joined = first + T + 1, {}
        return np.arange(first, first + T)

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """Everything but the frames: name -> (R, ...)"""
        if not self.joined:
            self.joined = {name: np.concatenate(columns) for name, columns in self.columns.items()}
        return self.joined

    def gather(self, rows: np.ndarray, stack: int) -> torch.Tensor:
        """Frame stacks of the rows (B,): uint8 (B, stack * 3, h, w), oldest first; an episode's first frame repeats."""
        rows = rows[:, None] + np.arange(1 - stack, 1)  # (B, stack)
        rows = np.maximum(rows, self.rows["episode_start"][rows[:, -1:]]).ravel()
        episode = np.searchsorted(self.starts, rows, "right") - 1
        pixels = None
        for e in np.unique(episode):
            frames = open_frames(self.frames[e]) if isinstance(self.frames[e], Path) else self.frames[e]
            if pixels is None:
                pixels = np.empty((len(rows), *frames.shape[1:]), np.uint8)
            pixels[episode == e] = frames[rows[episode == e] - self.starts[e]]
        return torch.from_numpy(pixels).unflatten(0, (-1, stack)).flatten(1, 2)

    def batch(self, rows: np.ndarray, device, *names: str) -> list[torch.Tensor]:
        return [torch.from_numpy(self.rows[name][rows]).to(device) for name in names]


def n_step_transitions(rewards: np.ndarray, terminated: bool, known_end: bool, n: int, gamma: float):
    """Of every step t of an episode: the discounted sum of up to n rewards from t on, the row that the rest is
    estimated from, and its discount, 0 where the episode ended in a terminal state before. All (T,). The sum is NaN
    where neither the end nor the state after it is known."""
    T = len(rewards)
    return_n, next_row, discount = np.zeros(T), np.minimum(np.arange(T) + n, T), np.zeros(T)
    for t in range(T):
        steps = next_row[t] - t
        return_n[t] = np.sum(gamma ** np.arange(steps) * rewards[t : next_row[t]])
        if next_row[t] < T or (not terminated and known_end):
            discount[t] = gamma**steps
        elif not terminated:
            return_n[t] = np.nan
    return return_n, next_row, discount


def evaluation_seeds(args: Args) -> range:
    most = max(args.eval_episodes, args.final_eval_episodes, args.baseline_episodes)
    return range(args.eval_seed, args.eval_seed + most)


def load_episodes(args: Args) -> tuple[list[dict], list[str]]:
    """The episodes of --expert-data-dir that --top-fraction picks, and the names of the actions. Instead of infos they
    have `features` (T + 1, D) and `stage` (T + 1,), how many milestones were reached."""

    def digest(episode: dict):
        infos = episode.pop("infos")
        infos.append(episode.get("final_info") or infos[-1])
        try:
            episode["features"] = np.array([state_features(info, args.state_inputs) for info in infos])
            episode["stage"] = np.array([n_milestones(info) for info in infos])
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{episode['path']}: its infos lack what --state-inputs {args.state_inputs} reads ({error!r}). Use none"
            ) from None
        seed = int(episode.get("seed", -1))
        if seed in evaluation_seeds(args):
            raise ValueError(
                f"{episode['path']} was played with seed {seed}, which evaluates. Choose another --eval-seed"
            )

    episodes, names = read_episodes(Path(args.expert_data_dir), args.allow_pickle, digest)
    if args.top_fraction < 1:
        episodes = sorted(episodes, key=lambda episode: -episode["rewards"].sum())
        episodes = episodes[: max(1, round(args.top_fraction * len(episodes)))]
    return episodes, names


def lay_out(episodes: list[dict], frames: list[Path], heldout: list[int], args: Args) -> tuple:
    """(all episodes as rows, the rows to train on (N,), those held out (M,), {first row: actions played} of episodes to
    train on). Raises ValueError where --label-budget does not fit."""
    demos, train_rows, val_rows, played = Demonstrations(args.gamma, args.n_step), [], [np.empty(0, int)], {}
    for e, (episode, pixels) in enumerate(zip(episodes, frames, strict=True)):
        rows = demos.add(
            pixels,
            episode["actions"],
            episode["taken_actions"],
            episode["rewards"],
            terminated=bool(episode["dones"][-1]) and not bool(episode.get("truncated", False)),
            known_end="final_observation" in episode,
            features=episode["features"],
            stage=episode["stage"],
        )
        if e in heldout:
            val_rows.append(rows)
        else:
            train_rows.append(rows)
            played[int(rows[0])] = episode["taken_actions"]
    train_rows, val_rows = np.concatenate(train_rows), np.concatenate(val_rows)
    if args.milestone_curriculum and not demos.rows["stage"].any():
        raise ValueError(
            f"--milestone-curriculum: the infos in {args.expert_data_dir} hold no milestones. Leave it out"
        )
    if args.label_budget:
        asked_for = args.dagger_rounds * args.dagger_steps if args.algorithm == "dagger" else 0
        if not asked_for < args.label_budget <= len(train_rows) + asked_for:
            raise ValueError(
                f"--label-budget {args.label_budget}: expected more than the {asked_for} of dagger's rounds, at most "
                f"{asked_for + len(train_rows)}, those and the {len(train_rows)} of {args.expert_data_dir}"
            )
        train_rows = train_rows[: args.label_budget - asked_for]
    return demos, train_rows, val_rows, played


def split_episodes(n: int, fraction: float, seed: int) -> list[int]:
    """Which of n episodes are held out: whole ones, as neighbouring steps look alike."""
    count = min(n - 1, max(1, round(fraction * n))) if fraction else 0
    return sorted(np.random.default_rng(seed).permutation(n)[:count].tolist())


def action_statistics(actions: np.ndarray, A: int, weighting: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which actions the labels (N,) show (A,) bool, and their weights in the cross-entropy (A,), 1 on average."""
    frequency = np.bincount(actions, minlength=A) / len(actions)
    weights = np.maximum(frequency, 1e-9) ** {"none": 0.0, "sqrt": -0.5, "inverse": -1.0}[weighting]
    weights = np.where(frequency > 0, weights / np.sum(frequency * weights), 0)
    return torch.from_numpy(frequency > 0), torch.tensor(weights, dtype=torch.float32)


def sample_rows(rows: np.ndarray, stage: np.ndarray, priority, args: Args, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of an update: rows (B,) and their importance weights (B,). A pure function of the seed and the step, so
    that a resumed run sees the same batches. `priority` (R,) or None; `stage` (R,) of every row."""
    rng = np.random.default_rng((args.seed, step))
    if args.milestone_curriculum:
        stages = np.unique(stage[rows])
        open_stages = max(1, int(np.ceil(len(stages) * min(1.0, 2 * (step + 1) / args.total_training_steps))))
        rows = rows[stage[rows] <= stages[open_stages - 1]]
    if priority is None:
        return rng.choice(rows, args.batch_size), np.ones(args.batch_size, np.float32)
    p = priority[rows] ** 0.6  # exponents of Schaul et al. 2015, proportional variant
    cumulative = np.cumsum(p)
    chosen = np.searchsorted(cumulative, rng.random(args.batch_size) * cumulative[-1], "right")
    weights = (len(rows) * p[chosen] / cumulative[-1]) ** -0.4
    return rows[chosen], (weights / weights.max()).astype(np.float32)


# ALGO LOGIC: network --------------------------------------------------------------------------------------------------
class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv1(F.relu(self.conv0(x))))


class ConvSequence(nn.Module):
    """(B, inputs, h, w) -> (B, outputs, ceil(h / 2), ceil(w / 2))"""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)  # 84 -> 42 -> 21 -> 11
        self.block0 = ResidualBlock(outputs)
        self.block1 = ResidualBlock(outputs)

    def forward(self, x):
        return self.block1(self.block0(self.pool(self.conv(x))))


class ImpalaCNN(nn.Module):
    """Frames, uint8 (B, frames * 3, h, w), and with a `state_dim` a state (B, D) -> logits or Q-values (B, A)."""

    def __init__(self, action_dim: int, hidden_dim: int, height: int, width: int, frames: int = 1, state_dim: int = 0):
        super().__init__()
        self.sequences = nn.Sequential(ConvSequence(3 * frames, 16), ConvSequence(16, 32), ConvSequence(32, 32))
        for _ in range(3):
            height, width = (height + 1) // 2, (width + 1) // 2
        self.fc = nn.Linear(32 * height * width, hidden_dim)
        self.state = nn.Linear(state_dim, 64) if state_dim else None
        self.head = nn.Linear(hidden_dim + (64 if state_dim else 0), action_dim)

    def forward(self, pixels, state=None):
        x = (pixels.float() / 255).contiguous(memory_format=torch.channels_last)  # faster convolutions
        x = self.sequences(x)  # (B, 32, h / 8, w / 8)
        x = F.relu(self.fc(F.relu(x.flatten(1))))  # (B, hidden)
        if self.state is not None:
            x = torch.cat([x, F.relu(self.state(state))], 1)
        return self.head(x)


# ALGO LOGIC: losses ---------------------------------------------------------------------------------------------------
def bc_loss(logits, actions, class_weights, importance):
    """Cross-entropy with the expert's actions. (B, A), (B,), (A,), (B,) -> scalar"""
    per_sample = F.cross_entropy(logits, actions, reduction="none") * class_weights[actions]
    return (importance * per_sample).mean()


def td_target(return_n, discount, next_q, next_q_target, known):
    """n-step double Q (van Hasselt et al. 2015, eq. 4): the network chooses the action, the target network rates it.
    Only actions in `known` (A,) count: the others were never tried. (B,), (B,), (B, A), (B, A), (A,) -> (B,)"""
    best = next_q.masked_fill(~known, -torch.inf).argmax(1, keepdim=True)
    return return_n + discount * next_q_target.gather(1, best).squeeze(1)


def td_batch(network, target_network, demos: "Demonstrations", rows, known, args: Args, device):
    """Of the rows (B,): their targets, the actions played, and whether the target is known. (B,) each"""
    return_n, taken, next_row, discount, td_known = demos.batch(
        rows, device, "return_n", "taken", "next_row", "discount", "td_known"
    )
    next_rows = next_row.cpu().numpy()
    pixels = demos.gather(next_rows, args.frame_stack).to(device)
    (features,) = demos.batch(next_rows, device, "features")
    with torch.no_grad():
        next_q, next_q_target = network(pixels, features), target_network(pixels, features)  # (B, A)
    return td_target(return_n.nan_to_num(), discount, next_q, next_q_target, known), taken.long(), td_known.float()


def td_loss(q, taken, target, known_target, importance):
    """Huber loss of the played action's Q-value, over the rows whose target is known. (B, A), then (B,) -> scalar"""
    error = F.smooth_l1_loss(q.gather(1, taken[:, None]).squeeze(1), target, reduction="none")
    return (importance * known_target * error).sum() / known_target.sum().clamp(min=1)


def drop_older_frames(pixels, chance: float):
    """Replace a sample's older frames by its newest one. uint8 (B, frames * 3, h, w)"""
    newest = pixels[:, -3:].repeat(1, pixels.shape[1] // 3, 1, 1)
    dropped = torch.rand(len(pixels), device=pixels.device) < chance
    return torch.where(dropped[:, None, None, None], newest, pixels)


# evaluation -----------------------------------------------------------------------------------------------------------
class Policy:
    """The network as a player of E environments side by side. `decode`: argmax, or sample from the softmax, in which
    actions that the data never show have no chance."""

    def __init__(self, network: ImpalaCNN, sizes: dict, known, decode: str, device, seed: int = 0):
        self.network, self.sizes, self.decode, self.device = network, sizes, decode, device
        self.known, self.rng = np.asarray(known, bool), np.random.default_rng(seed)
        self.pixels = None  # (E, frames, 3, h, w)

    @classmethod
    def load(cls, checkpoint: dict, decode: str = "argmax", device="cpu") -> "Policy":
        """From what `runs.load_checkpoint` returns for a .pth of this script, as `--expert checkpoint:RUN` does."""
        network = ImpalaCNN(**checkpoint["network"]).to(device)
        network.load_state_dict(checkpoint["model_state_dict"])
        return cls(network, checkpoint["sizes"], checkpoint["known_actions"], decode, torch.device(device))

    @torch.no_grad()
    def logits(self, frames: np.ndarray, infos: list[dict], begun: np.ndarray) -> torch.Tensor:
        """Observations (E, H, W, 3), their infos, which of them begin an episode (E,) -> (E, A)"""
        newest = preprocess(torch.from_numpy(frames), self.sizes["height"], self.sizes["width"])[:, None]
        if self.pixels is None:
            self.pixels = newest.repeat(1, self.sizes["frames"], 1, 1, 1)
        self.pixels = torch.cat([self.pixels[:, 1:], newest], 1)
        again = torch.from_numpy(begun)
        self.pixels[again] = newest[again]
        state = [state_features(info, self.sizes["state_inputs"]) for info in infos]
        was_training = self.network.training
        self.network.eval()
        logits = self.network(self.pixels.flatten(1, 2).to(self.device), torch.tensor(np.array(state)).to(self.device))
        self.network.train(was_training)
        return logits.float().cpu()

    def __call__(self, frames: np.ndarray, infos: list[dict], begun: np.ndarray) -> np.ndarray:
        logits = self.logits(frames, infos, begun)
        if self.decode == "argmax":
            return logits.argmax(1).numpy()
        p = logits.masked_fill(~torch.from_numpy(self.known), -torch.inf).softmax(1).double().numpy()
        p = p.cumsum(1)
        return (p > self.rng.random((len(p), 1)) * p[:, -1:]).argmax(1)


def baselines(envs, demos: Demonstrations, episodes: dict[int, np.ndarray], args: Args) -> dict[str, Act]:
    """Players that a policy has to beat. `episodes`: first row -> actions played, of the training episodes."""
    A = envs.single_action_space.n
    rng = np.random.default_rng(args.seed)
    trained_on = np.concatenate([demos.rows["action"][first : first + len(a)] for first, a in episodes.items()])
    majority = np.bincount(trained_on, minlength=A).argmax()
    firsts = np.array(list(episodes))
    openings = demos.gather(firsts, 1).float()  # (N, 3, h, w)
    previous, script = np.zeros(envs.num_envs, int), [iter(()) for _ in range(envs.num_envs)]

    def repeat_previous(frames, infos, begun):
        previous[begun] = rng.choice([actions[0] for actions in episodes.values()], int(begun.sum()))
        return previous

    def replay(frames, infos, begun):
        for e in np.flatnonzero(begun):
            first = preprocess(torch.from_numpy(frames[e : e + 1]), args.obs_height, args.obs_width).float()
            nearest = firsts[(openings - first).square().flatten(1).mean(1).argmin()]
            script[e] = iter(episodes[nearest].tolist())
        return np.array([next(actions, majority) for actions in script])

    players = {
        "expert": ask_expert,
        "random": lambda frames, infos, begun: rng.integers(0, A, len(frames)),
        "majority": lambda frames, infos, begun: np.full(len(frames), majority),
        "repeat_previous": repeat_previous,
        "replay": replay,
    }
    return players if args.expert else {name: player for name, player in players.items() if name != "expert"}


@torch.no_grad()
def evaluate(network, demos: Demonstrations, rows: np.ndarray, args: Args, device) -> dict:
    """Agreement with the expert on held-out episodes, rows (N,), beside the baselines that need no picture. The loss
    has no class weights, so that it means the same whatever the training episodes show."""
    network.eval()
    logits = []
    for first in range(0, len(rows), 256):
        part = rows[first : first + 256]
        (features,) = demos.batch(part, device, "features")
        logits.append(network(demos.gather(part, args.frame_stack).to(device), features).float().cpu())
    network.train()
    logits, actions = torch.cat(logits), torch.from_numpy(demos.rows["action"][rows]).long()  # (N, A), (N,)
    right = (logits.argmax(1) == actions).numpy()
    actions = actions.numpy()
    previous = demos.rows["taken"][np.maximum(rows - 1, 0)]
    inside = rows > demos.rows["episode_start"][rows]  # there is a step before
    changed = inside & (actions != previous)
    per_class = [right[actions == a].mean() for a in np.unique(actions)]
    counts = np.bincount(actions, minlength=logits.shape[1])
    metrics = {
        "eval/loss": F.cross_entropy(logits, torch.from_numpy(actions)).item(),
        "eval/accuracy": right.mean(),
        "eval/accuracy_majority": counts.max() / counts.sum(),
        "eval/accuracy_repeat_previous": (actions == previous)[inside].mean() if inside.any() else 0.0,
        "eval/balanced_accuracy": np.mean(per_class),
        "eval/balanced_accuracy_majority": 1 / len(per_class),
        "eval/change_accuracy": right[changed].mean() if changed.any() else 0.0,
    }
    return {name: float(metric) for name, metric in metrics.items()}


EPISODE_METRICS = {
    "policy": {
        "return": "eval/episodic_return",
        "length": "eval/episodic_length",
        "success": "eval/success_rate",
    },
    "policy, sampled": {
        "return": "eval/episodic_return_sampled",
        "length": "eval/episodic_length_sampled",
        "success": "eval/success_rate_sampled",
    },
}


def episode_metrics(summary: dict, player: str = "policy") -> dict[str, float]:
    return {name: summary[key][0] for key, name in EPISODE_METRICS[player].items() if key in summary}


def final_games(envs, players: dict[str, Act], metrics: dict, run_dir: Path, names: list[str], args: Args) -> tuple:
    """Let everyone play: their episodes and summaries by name. Adds the policy's figures to `metrics`; eval.json and
    eval.png are written anew after each player."""
    results, summaries, seeds = {}, {}, list(evaluation_seeds(args))
    for name, act in players.items():
        some = seeds[: args.final_eval_episodes if name in EPISODE_METRICS else args.baseline_episodes]
        games = partial(play, envs, act, patience=args.eval_patience, desc=name)
        try:
            if args.capture_video and name == "policy":
                film = Film(run_dir / "eval.mp4", names)
                results[name] = games(some[:1], film=film, ask=args.expert is not None) + games(some[1:])
            else:
                results[name] = games(some, ask=name == "expert")
        except ValueError as error:
            if name != "expert":
                raise
            tqdm.write(f"{name} is left out: {error}")  # the others are worth their time
            continue
        summaries[name] = summarise(results[name])
        if name in EPISODE_METRICS:
            metrics |= episode_metrics(summaries[name], name)
        runs.write_json(run_dir / "eval.json", {"metrics": metrics, "summaries": summaries, "episodes": results})
        plot_evaluation(run_dir / "eval.png", summaries)
        key = "success" if "success" in summaries[name] else "return"
        tqdm.write(f"{name}: {key} {in_words(summaries[name][key])} in {len(some)} episodes")
    return results, summaries


# DAgger ---------------------------------------------------------------------------------------------------------------
DAGGER_COLUMNS = ("frames", "action", "taken", "by_student", "features", "stage", "labelled")


def play_round(envs, policy, number: int, expert_return: float, args: Args) -> tuple[list[dict], float, str]:
    """The episodes of a round with the expert's labels, the share of the steps that the expert played, and why it broke
    off, "" where it did not."""
    rng = np.random.default_rng((args.seed, number))
    seeds = rng.integers(2**30, 2**31, args.eval_episodes + args.dagger_episodes).tolist()
    share = args.dagger_decay**number
    if args.dagger_share == "return":
        results = play(envs, policy("argmax"), seeds[: args.eval_episodes], args.eval_patience, "student")
        student_return = np.mean([result["return"] for result in results])
        share = float(np.clip(1 - student_return / expert_return, 0, 1))
        tqdm.write(f"student's return {student_return:.2f}, that of the episodes {expert_return:.2f}")
    episodes, error = label_by_expert(envs, policy("sample"), share, seeds[args.eval_episodes :], args)
    return episodes, share, error


def label_by_expert(envs, student: Policy, share: float, seeds: list[int], args: Args) -> tuple[list[dict], str]:
    """Whole episodes, one per seed, in which the expert plays `share` of the steps and the student the others. Of all
    their different inputs `args.dagger_steps`, drawn at random, are `labelled`, so that a student who stands before a
    wall for a minute does not use up the labels. Where the expert fails: what there is by then, and why."""
    rng, error = np.random.default_rng((args.seed, seeds[0])), ""
    by_expert = np.zeros(envs.num_envs, bool)

    def mixture(frames, infos, begun):
        by_expert[:] = rng.random(len(frames)) < share
        return np.where(by_expert, ask_expert(frames, infos, begun), student(frames, infos, begun))

    episodes = {seed: {name: [] for name in DAGGER_COLUMNS} for seed in seeds}
    try:
        for step in rollout(envs, mixture, seeds, args.dagger_patience, "expert labels", ask=True):
            frame = preprocess(torch.from_numpy(step["obs"])[None], args.obs_height, args.obs_width)[0].numpy()
            features, stage = state_features(step["info"], args.state_inputs), n_milestones(step["info"])
            by_student = not by_expert[step["env"]]
            values = frame, step["info"]["expert_action"], step["action"], by_student, features, stage, False
            for name, value in zip(DAGGER_COLUMNS, values, strict=True):
                episodes[step["seed"]][name].append(value)
    except ValueError as failure:
        error = str(failure)
    different = {}  # what the network sees: where it came first
    for seed, episode in episodes.items():
        for t, features in enumerate(episode["features"]):
            seen = np.stack(episode["frames"][max(0, t + 1 - args.frame_stack) : t + 1])
            different.setdefault(hashlib.sha1(seen.tobytes() + features.tobytes()).digest(), (seed, t))
    places = list(different.values())
    for i in rng.permutation(len(places))[: args.dagger_steps or None]:
        seed, t = places[i]
        episodes[seed]["labelled"][t] = True
    played = [episode for episode in episodes.values() if episode["action"]]
    return [{name: np.array(values) for name, values in episode.items()} for episode in played], error


def save_round(path: Path, episodes: list[dict]):
    """`path`, an npz of all columns but the frames, and beside it an npy of the frames, each episode's last one twice:
    in `Demonstrations` an episode has one row more than steps."""
    frames = np.concatenate([frames for e in episodes for frames in (e["frames"], e["frames"][-1:])])
    columns = {name: np.concatenate([e[name] for e in episodes]) for name in DAGGER_COLUMNS if name != "frames"}
    for file, write in (
        (path.with_suffix(".npy"), lambda temporary: np.save(temporary, frames)),
        (path, lambda temporary: np.savez(temporary, lengths=[len(e["action"]) for e in episodes], **columns)),
    ):
        temporary = file.with_name(f".{file.stem}.tmp{file.suffix}")
        try:
            write(temporary)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def add_round(demos: Demonstrations, path: Path) -> np.ndarray:
    """Append a round's episodes; returns the rows that are labelled."""
    with np.load(path) as file:
        lengths = file["lengths"]
        columns = {name: np.split(file[name], np.cumsum(lengths)[:-1]) for name in DAGGER_COLUMNS if name != "frames"}
    frames = np.split(np.load(path.with_suffix(".npy"), mmap_mode="r"), np.cumsum(lengths + 1)[:-1])
    rows = []
    for e in range(len(lengths)):
        action, taken, labelled = (columns[name][e] for name in ("action", "taken", "labelled"))
        features, stage = (np.concatenate([columns[name][e], columns[name][e][-1:]]) for name in ("features", "stage"))
        rewards = np.zeros(len(action))  # not kept: no algorithm learns values from these episodes
        rows.append(demos.add(frames[e], action, taken, rewards, False, False, features, stage)[labelled])
    return np.concatenate(rows)


# export ---------------------------------------------------------------------------------------------------------------
class RawPolicy(nn.Module):
    """Raw frames (B, frames, H, W, 3) uint8, oldest first, and the state (B, D) -> logits (B, A)."""

    def __init__(self, network: ImpalaCNN, height: int, width: int):
        super().__init__()
        self.network, self.height, self.width = network, height, width

    def forward(self, frames, state=None):
        B, N = frames.shape[:2]
        frames = frames.flatten(0, 1).permute(0, 3, 1, 2)  # (B * frames, 3, H, W)
        for size in ((frames.shape[2], self.width), (self.height, self.width)):  # as common.video.resize
            frames = F.interpolate(frames.float(), size, mode="bilinear", antialias=True)
            frames = (frames + 0.5).clamp(0, 255).to(torch.uint8)
        return self.network(frames.unflatten(0, (B, N)).flatten(1, 2), state)


def export_onnx(path: Path, policy: Policy, frame_shape: tuple, names: list[str]) -> float:
    """Write the policy as one ONNX file of raw frames; returns the largest difference to torch, relative above 1, on
    frames of noise and of flat colour. Raises ValueError, and leaves no file, where that is above 0.02: the graph
    resizes in float32, which moves a few pixels by one level."""
    import onnx
    import onnxruntime as ort

    raw = RawPolicy(copy.deepcopy(policy.network).cpu(), policy.sizes["height"], policy.sizes["width"]).eval()
    D = STATE_DIM[policy.sizes["state_inputs"]]
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, policy.sizes["frames"], *frame_shape), np.uint8)
    frames[2:] = rng.integers(0, 256, (2, 1, 1, 1, 3))
    state = rng.random((4, D), np.float32)
    example = (torch.from_numpy(frames), torch.from_numpy(state)) if D else (torch.from_numpy(frames),)
    feed = {"frames": frames} | ({"state": state} if D else {})
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            raw,
            example,
            input_names=list(feed),
            output_names=["logits"],
            dynamic_shapes={name: {0: "batch"} for name in feed},
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    model.metadata_props.add(key="actions", value=json.dumps(names))
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    worst = 0.0
    for i in range(4):
        small = preprocess(torch.from_numpy(frames[i]), policy.sizes["height"], policy.sizes["width"])
        with torch.no_grad():
            true = raw.network(small.flatten(0, 1)[None], torch.from_numpy(state[i : i + 1])).numpy()
        logits = session.run(None, {name: value[i : i + 1] for name, value in feed.items()})[0]
        worst = max(worst, float((np.abs(logits - true) / np.maximum(1, np.abs(true))).max()))
    if not worst <= 0.02:
        raise ValueError(
            f"{path} was not written: the graph's logits differ from torch's by {worst:.2g}, expected 0.02"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(model.SerializeToString())
    os.replace(temporary, path)
    return worst


# main -----------------------------------------------------------------------------------------------------------------
def check_args(args: Args):
    limits = dict.fromkeys(
        "total_training_steps batch_size hidden_dim frame_stack n_step target_frequency num_envs eval_episodes "
        "log_every val_frequency save_frequency dagger_rounds dagger_episodes".split(),
        (1, np.inf),
    )
    limits |= dict.fromkeys(
        "max_steps label_budget weight_decay bc_weight eval_frequency final_eval_episodes baseline_episodes "
        "eval_patience eval_seed dagger_steps dagger_patience".split(),
        (0, np.inf),
    )
    limits |= dict.fromkeys(("obs_height", "obs_width"), (8, np.inf))
    limits |= dict.fromkeys(("stack_dropout", "gamma", "dagger_decay"), (0, 1)) | {"val_fraction": (0, 0.5)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            wanted = f"{low} to {high}" if high < np.inf else f"{low} or more"
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {wanted}")
    if not args.learning_rate > 0:
        raise ValueError(f"--learning-rate {args.learning_rate}: expected above 0")
    if not 0 < args.top_fraction <= 1:
        raise ValueError(f"--top-fraction {args.top_fraction}: expected above 0, up to 1")
    if args.algorithm == "dagger" and args.expert in (None, "keyboard"):
        raise ValueError(f"--algorithm dagger needs an expert that answers at once, --expert is {args.expert}")
    if args.algorithm == "dagger" and args.total_training_steps < 4 * args.dagger_rounds:
        raise ValueError(f"--total-training-steps {args.total_training_steps} leave no room for the rounds of dagger")
    if args.algorithm == "dagger" and args.label_budget and not args.dagger_steps:
        raise ValueError(f"--label-budget {args.label_budget} needs --dagger-steps, the labels of each round")
    of_hybrid = ("bc_weight", "gamma", "n_step", "target_frequency", "prioritized")
    for field in fields(args):
        wanted = "hybrid" if field.name in of_hybrid else field.name.partition("_")[0]
        is_set = getattr(args, field.name) != field.default
        if is_set and wanted in ("hybrid", "dagger") and wanted != args.algorithm:
            raise ValueError(
                f"--{field.name.replace('_', '-')} is for --algorithm {wanted}, which is {args.algorithm}. Leave it out"
            )
    for name, in_use, where in (
        ("stack_dropout", args.frame_stack > 1, "--frame-stack above 1"),
        ("dagger_decay", args.dagger_share == "decay", "--dagger-share decay"),
        ("capture_video", args.final_eval_episodes > 0, "--final-eval-episodes above 0"),
    ):
        if getattr(args, name) != Args.__dataclass_fields__[name].default and not in_use:
            raise ValueError(f"--{name.replace('_', '-')} does nothing without {where}")
    if args.export_onnx and not args.export_onnx.endswith(".onnx"):
        raise ValueError(f"--export-onnx {args.export_onnx}: expected a name that ends in .onnx")


def seconds_per_update(network, sizes: dict, args: Args, device) -> float:
    """Measured on a copy of the network, so that nothing of the run changes."""
    network = copy.deepcopy(network)
    pixels = torch.zeros((args.batch_size, 3 * sizes["frames"], sizes["height"], sizes["width"]), dtype=torch.uint8)
    state = torch.zeros((args.batch_size, STATE_DIM[sizes["state_inputs"]]), device=device)
    seconds = []
    for _ in range(5):  # the first ones warm up
        started = time.time()
        network(pixels.to(device), state).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.time() - started)
    return min(seconds)


def open_envs(episode: dict, names: list[str], args: Args) -> gym.vector.VectorEnv:
    """Where the policy will play. Raises ValueError where that is not what `episode` was played in, or where the expert
    does not answer: now, not after hours of training."""
    envs = make_envs(args.num_envs, args.env_id, args.rom_path, args.core, args.init_state, args.max_steps, args.expert)
    shape, here = envs.single_observation_space.shape, envs.get_attr("action_names")[0]
    if here != names or shape != episode["shape"][1:]:
        raise ValueError(
            f"{args.expert_data_dir} holds frames {episode['shape'][1:]} and the actions {', '.join(names)}, the "
            f"environment has {shape} and {', '.join(here)}. Name the one they come from: --env-id, --rom-path"
        )
    rom, played_on = envs.get_attr("rom_sha1")[0], str(episode.get("rom_sha1", ""))
    if rom and played_on and rom != played_on:
        raise ValueError(
            f"{args.expert_data_dir} was played on a ROM with SHA-1 {played_on}, the environment has {rom}. Name the "
            "same one with --rom-path"
        )
    env_id, played_in = envs.get_attr("env_id")[0], str(episode.get("env_id", ""))
    if played_in and played_in != env_id:
        print(f"{args.expert_data_dir} was played in {played_in}, the policy plays in {env_id}")
    if args.expert:
        error = envs.reset(seed=args.seed, options={"ask": True})[1]["expert_error"][0]
        if error:
            raise ValueError(f"the expert fails: {error}. Name another with --expert, or --expert None")
    return envs


def main(args: Args) -> dict:
    checkpoint, envs = None, None
    try:
        if args.resume:
            may_change = ("num_envs", "device", "overwrite", "final_eval_episodes", "baseline_episodes")
            args = runs.resume_args(args, may_change)
            checkpoint = runs.load_checkpoint(Path(args.resume) / "last.pt")
        device = runs.pick_device(args.device)
        check_args(args)
        runs.check_checkpoint_dir(args, MODEL_FILES, __file__, "model_dir")
        episodes, names = load_episodes(args)
        data_files = [episode["path"] for episode in episodes]
        if checkpoint:
            runs.check_fingerprint(Path(args.resume), data_files)
        frames = [cache_frames(episode, args) for episode in tqdm(episodes, desc="frames", leave=False)]
        heldout = split_episodes(len(episodes), args.val_fraction, args.seed)
        demos, train_rows, val_rows, played = lay_out(episodes, frames, heldout, args)
        expert_return = float(np.mean([episode["rewards"].sum() for episode in episodes]))
        if args.algorithm == "dagger" and args.dagger_share == "return" and expert_return <= 0:
            raise ValueError(
                f"--dagger-share return: the episodes' mean return is {expert_return:.2f}, of which no share can be "
                "taken. Use --dagger-share decay"
            )
        plays_between = 0 < args.eval_frequency < args.total_training_steps
        if args.final_eval_episodes or plays_between or args.algorithm == "dagger":
            envs = open_envs(episodes[0], names, args)
        Path(args.model_dir).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ImportError, gym.error.Error) as error:
        raise SystemExit(str(error)) from None
    A = len(names)
    known, class_weights = action_statistics(demos.rows["action"][train_rows], A, args.class_weights)

    # run folder
    if checkpoint:
        run_dir = Path(args.resume)
    else:
        run_dir = runs.make_run_dir(args, __file__, Path(args.expert_data_dir).resolve().name)
        runs.write_provenance(run_dir, data_files, device=str(device))
        split = {"heldout": [episodes[e]["path"].name for e in heldout], "actions": names}
        runs.write_json(run_dir / "split.json", split)
    runs.open_checkpoint_dir(args, MODEL_FILES, __file__, run_dir, "model_dir")
    start_step = checkpoint["step"] if checkpoint else 0
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, sync_tensorboard=True)
    writer = SummaryWriter(str(run_dir), purge_step=start_step + 1 if checkpoint else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    print(f"{run_dir}: {len(train_rows):,} labels of {len(episodes) - len(heldout)} episodes, {len(heldout)} held out")
    counts = np.bincount(demos.rows["action"][train_rows], minlength=A)
    print("labels " + ", ".join(f"{name} {n / counts.sum():.1%}" for name, n in zip(names, counts, strict=True) if n))

    # network and optimiser
    runs.seed_everything(args.seed, args.torch_deterministic)
    sizes = {"height": args.obs_height, "width": args.obs_width, "frames": args.frame_stack}
    network_sizes = sizes | {"action_dim": A, "hidden_dim": args.hidden_dim, "state_dim": STATE_DIM[args.state_inputs]}
    sizes["state_inputs"] = args.state_inputs
    network = ImpalaCNN(**network_sizes).to(device, memory_format=torch.channels_last)
    target_network = copy.deepcopy(network) if args.algorithm == "hybrid" else None
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    priority = np.ones(demos.n_rows, np.float32) if args.prioritized else None
    best_return, best_loss, rounds_done = -np.inf, np.inf, 0
    if checkpoint:
        network.load_state_dict(checkpoint["model_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        best_return, best_loss = checkpoint["best_return"], checkpoint["best_loss"]
        rounds_done = checkpoint["rounds_done"]
        if target_network is not None:
            target_network.load_state_dict(checkpoint["target_state_dict"])
        if priority is not None:
            priority = checkpoint["priority"].numpy()
        for number in range(1, rounds_done + 1):
            train_rows = np.concatenate([train_rows, add_round(demos, run_dir / f"dagger_round_{number}.npz")])
        known, class_weights = action_statistics(demos.rows["action"][train_rows], A, args.class_weights)
        runs.set_rng_state(checkpoint["rng"])
        torch.set_num_threads(checkpoint["threads"])  # another number sums in another order
    known, class_weights = known.to(device), class_weights.to(device)
    expected = seconds_per_update(network, sizes, args, device) * (args.total_training_steps - start_step)
    expected *= 2 if target_network is not None else 1
    print(f"{args.total_training_steps:,} updates of {args.batch_size} on {device}: about {expected / 60:.0f} minutes")
    if expected > 3600:
        print(f"for a first look: {QUICK}")
    if args.save_best and not len(val_rows) and not envs:
        print("no episode is held out and no game is played: there will be no best_val.pth and no best_model.pth")

    again = f"python {Path(__file__).name} --resume {run_dir}"

    def leave(message: str, stopped: bool = False):
        writer.close()
        if envs:
            envs.close()
        if not stopped:
            raise SystemExit(message)
        print(message)
        raise SystemExit(130)

    def save(name: str, step: int, eval_return: float | None = None):
        state = {
            "step": step,
            "model_state_dict": network.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "eval_return": eval_return,
            "network": network_sizes,  # ImpalaCNN(**network), of the script beside this file or in the run folder
            "sizes": sizes,
            "actions": names,
            "known_actions": known.tolist(),
            "best_return": best_return,
            "best_loss": best_loss,
            "rounds_done": rounds_done,
            "rng": runs.rng_state(),
            "threads": torch.get_num_threads(),
            "script": Path(__file__).name,
            "run_dir": str(run_dir.resolve()),
        }
        if target_network is not None:
            state["target_state_dict"] = target_network.state_dict()
        if priority is not None:
            state["priority"] = torch.from_numpy(priority)
        try:
            runs.save_checkpoint(run_dir / name, state)
            if name.endswith(".pth"):
                runs.save_checkpoint(Path(args.model_dir) / name, state)
        except OSError as error:
            leave(f"{name} cannot be written ({error}). Make room, then go on with: {again}")

    def policy(decode: str) -> Policy:
        return Policy(network, sizes, known.cpu(), decode, device, args.seed)

    eval_seeds = list(evaluation_seeds(args))[: args.eval_episodes]
    decodings = {"policy": "argmax"} | ({"policy, sampled": "sample"} if args.eval_sampled else {})
    rounds = args.dagger_rounds if args.algorithm == "dagger" else 0
    round_steps = np.linspace(0.25, 0.75, rounds) * args.total_training_steps
    step, begun, paused, waited = start_step, time.time(), 0.0, 0.0  # paused: seconds spent outside of updates
    progress = tqdm(total=args.total_training_steps, initial=start_step, desc="updates", unit="update")
    with runs.StopSignal() as stop_signal:
        while step < args.total_training_steps and not stop_signal:
            # DAgger: the student plays, the expert labels what it meets
            if rounds_done < rounds and step >= round_steps[rounds_done]:
                pause = time.time()
                rounds_done += 1
                path = run_dir / f"dagger_round_{rounds_done}.npz"
                asked, share, error = play_round(envs, policy, rounds_done, expert_return, args)
                if not asked:
                    leave(f"{error}. No label of round {rounds_done} was given")
                try:
                    save_round(path, asked)
                except OSError as error:
                    leave(f"{path} cannot be written ({error}). Make room, then go on with: {again}")
                train_rows = np.concatenate([train_rows, add_round(demos, path)])
                known, class_weights = action_statistics(demos.rows["action"][train_rows], A, args.class_weights)
                known, class_weights = known.to(device), class_weights.to(device)
                agrees = np.concatenate([(e["action"] == e["taken"])[e["by_student"]] for e in asked])
                agreement = agrees.mean() if len(agrees) else np.nan
                writer.add_scalar("train/expert_share", share, step)
                writer.add_scalar("train/expert_agreement", agreement, step)
                writer.add_scalar("train/expert_labels", len(train_rows), step)
                tqdm.write(
                    f"round {rounds_done}: the expert played {share:.0%} of the steps and agreed with {agreement:.0%} "
                    f"of the student's; {len(train_rows):,} labels"
                )
                save("last.pt", step)
                if error:
                    leave(f"{error}. Its labels up to there are kept. Go on without the rest of the round: {again}")
                paused += time.time() - pause

            # fetch
            fetching = time.time()
            rows, importance = sample_rows(train_rows, demos.rows["stage"], priority, args, step)
            pixels = demos.gather(rows, args.frame_stack).to(device)  # (B, frames * 3, h, w)
            actions, features = demos.batch(rows, device, "action", "features")
            importance = torch.from_numpy(importance).to(device)
            if args.frame_stack > 1 and args.stack_dropout:
                pixels = drop_older_frames(pixels, args.stack_dropout)
            waited += time.time() - fetching

            # forward and loss
            logits = network(pixels, features)  # (B, A)
            imitation = bc_loss(logits, actions.long(), class_weights, importance)
            loss = imitation
            if target_network is not None:
                target, taken, td_known = td_batch(network, target_network, demos, rows, known, args, device)
                temporal = td_loss(logits, taken, target, td_known, importance)
                loss = args.bc_weight * imitation + temporal
                if priority is not None:
                    error = target - logits.detach().gather(1, taken[:, None]).squeeze(1)
                    priority[rows] = (error.abs() * td_known).cpu().numpy() + 1e-3

            # step
            lr = args.learning_rate * (1 - step / args.total_training_steps if args.anneal_lr else 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if target_network is not None and step % args.target_frequency == 0:
                target_network.load_state_dict(network.state_dict())
            progress.update()
            last = step == args.total_training_steps

            # log
            if step % args.log_every == 0 or last:
                elapsed, done = time.time() - begun, step - start_step
                training = elapsed - paused
                scalars = {
                    "train/bc_loss": imitation.item(),
                    "train/accuracy": (logits.argmax(1) == actions).float().mean().item(),
                    "charts/learning_rate": lr,
                    "charts/SPS": done * args.batch_size / elapsed,
                    "charts/frames_seen": step * args.batch_size,
                    "charts/epoch": step * args.batch_size / len(train_rows),
                    "time/data_wait_frac": waited / training,
                    "time/step_ms": 1000 * (training - waited) / done,
                }
                if target_network is not None:
                    scalars["train/td_loss"] = temporal.item()
                    scalars["train/total_loss"] = loss.item()
                    scalars["train/q_mean"] = logits.mean().item()
                    scalars["train/q_std"] = logits.std().item()
                for name, scalar in scalars.items():
                    writer.add_scalar(name, scalar, step)
                progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{scalars['train/accuracy']:.2f}")

            # evaluate, save
            pause = time.time()
            if len(val_rows) and (step % args.val_frequency == 0 or last):
                metrics = evaluate(network, demos, val_rows, args, device)
                for name, metric in metrics.items():
                    writer.add_scalar(name, metric, step)
                if args.save_best and metrics["eval/loss"] < best_loss:
                    best_loss = metrics["eval/loss"]
                    save("best_val.pth", step)
            if envs and args.eval_frequency and step % args.eval_frequency == 0 and not last:
                summaries = {}
                for name, decode in decodings.items():
                    games = play(envs, policy(decode), eval_seeds, args.eval_patience, "evaluation")
                    summaries[name] = summarise(games)
                    for metric, value in episode_metrics(summaries[name], name).items():
                        writer.add_scalar(metric, value, step)
                runs.write_json(run_dir / f"eval_{step}.json", summaries)
                mean = summaries["policy"]["return"]
                tqdm.write(f"update {step}: return {in_words(mean)} in {args.eval_episodes} episodes")
                if args.save_best and mean[0] > best_return:
                    best_return = mean[0]
                    save("best_model.pth", step, best_return)
            if step % args.save_frequency == 0:
                save(f"checkpoint_{step}.pth", step)
            if step % args.val_frequency == 0 or last or stop_signal:
                save("last.pt", step)
            paused += time.time() - pause
    progress.close()
    if stop_signal and step < args.total_training_steps:
        leave(f"stopped after update {step} and saved. Go on with: {again}", stopped=True)

    # final evaluation
    save("final_model.pth", step)
    agreement = evaluate(network, demos, val_rows, args, device) if len(val_rows) else {}
    metrics, summaries = dict(agreement), {}
    if envs and args.final_eval_episodes:
        players = {name: policy(decode) for name, decode in decodings.items()}
        players |= baselines(envs, demos, played, args) if args.baseline_episodes else {}
        try:
            results, summaries = final_games(envs, players, metrics, run_dir, names, args)
        except KeyboardInterrupt:
            leave(f"stopped in the final evaluation. Play it again with: {again}", stopped=True)
        own = np.mean(
            [game["return"] for game in results["policy"][: args.eval_episodes]]
        )  # on the seeds of the others
        if args.save_best and own >= best_return:
            best_return = float(own)
            save("best_model.pth", step, best_return)
    else:
        runs.write_json(run_dir / "eval.json", {"metrics": metrics, "summaries": {}, "episodes": {}})
    if args.save_best and not (run_dir / "best_model.pth").exists() and (run_dir / "best_val.pth").exists():
        for folder in (run_dir, Path(args.model_dir)):
            runs.save_checkpoint(folder / "best_model.pth", runs.load_checkpoint(run_dir / "best_val.pth"))
    for name, metric in metrics.items():
        writer.add_scalar(name, metric, step)
    writer.close()
    if envs:
        envs.close()
    if agreement:
        print("\nheld-out episodes: " + ", ".join(f"{n.removeprefix('eval/')} {m:.3f}" for n, m in agreement.items()))
    if summaries:
        report(summaries)
    if args.export_onnx:
        try:
            off = export_onnx(Path(args.export_onnx), policy("argmax"), episodes[0]["shape"][1:], names)
        except (ValueError, OSError) as error:
            raise SystemExit(str(error)) from None
        print(f"\n{args.export_onnx}: logits within {off:.1e} of torch's")
    pictures = "eval.png, " * bool(summaries) + "eval.mp4, " * bool(summaries and args.capture_video)
    print(f"\nfiles  {run_dir}: eval.json, {pictures}*.pth, last.pt")
    print(f"curves tensorboard --logdir {args.run_root}")
    return metrics | {"run_dir": str(run_dir), "step": step}


if __name__ == "__main__":
    main(tyro.cli(Args, args=runs.cli_words(Args, env_prefix="BC_POKEMON_")))
