"""Advantage-weighted reflex policy for side-scrollers: from recorded sessions to keys, learnt offline.

Learns from `recording.mp4`, `inputs.parquet` (docs/data.md) and the returns of `precompute_labels.py`. A value head
fits an upper expectile of the return (Kostrikov et al. 2021, IQL, eq. 5), with --q-head of a bootstrapped Q (eq. 6);
the key head imitates the player, weighted by exp(advantage) (Peng et al. 2019, AWR, eq. 3); an inverse-dynamics head
names the keys that led from one frame to the next (Pathak et al. 2017, ICM, eq. 2). Page: docs/iql_reflex.md

    python precompute_labels.py --data-dir sample_dataset --half-life-s 2
    python iql_reflex.py --data-dir sample_dataset

In: a folder of labelled sessions. Out: runs/<task>__iql_reflex__<seed>__<time>/ with last.pt, best.pt, eval.json,
eval.png, eval.mp4 and TensorBoard events.
"""

import copy
import os
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from common import runs
from common.sessions import (
    EPISODES,
    EVENTS,
    INTENT,
    INTENT_NAMES,
    RETURNS,
    Session,
    find_sessions,
    key_names,
    key_table,
    load_session,
    mouse_table,
    read_table,
)
from common.video import ForwardReader, VideoReader, VideoWriter, draw_keys, iter_frames, video_backend


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

    data_dir: str = "dataset"
    """folder of labelled sessions"""
    heldout: str = "heldout*"
    """name or pattern of the sessions read once, at the end; if none matches, the last by name"""
    val_fraction: float = 0.1
    """share of the training sessions, in blocks of 10 s, that chooses thresholds and best.pt; 0..0.5"""
    keys: tuple[str, ...] = ()
    """keys to predict, such as KEY_RIGHT; empty means those down in `min_key_rate` of the training frames"""
    min_key_rate: float = 0.01
    """how often a key must be down to be predicted; share of frames"""
    mix_corrections: bool = False
    """also train on sessions that a policy played, on the stretches where a person took over; False leaves them out"""
    action_horizon: int = 2
    """predict the keys this many frames ahead, the player's reaction time; >= 0"""
    image_size: int = 224
    """side of the square the frames are resized to; pixels"""
    workers: int = 2
    """threads that decode ahead; 0 decodes in the training loop"""
    buffer_frames: int = 4096
    """size of the shuffle buffer in frames, 3 * image_size^2 bytes each"""
    shuffle: bool = True
    """shuffle the training frames; False trains in the order of recording, session after session"""

    backbone: Literal["resnet18", "cnn"] = "resnet18"
    """resnet18 (11.2 M parameters) or a 4-layer cnn"""
    cnn_grid: int = 4
    """the cnn's features are averaged over a grid of so many squares a side: more say better where things are"""
    pretrained: str | None = None
    """file with torchvision's ResNet-18 weights (state dict); None starts from random ones"""
    epochs: int = 10
    """passes over the training frames"""
    max_updates: int = 0
    """stop after this many updates; 0 means `epochs` decide"""
    batch_size: int = 32
    """samples per update"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    weight_decay: float = 1e-4
    """weight decay of AdamW"""
    max_pos_weight: float = 3.0
    """upper limit of the weight off/on that rare keys get in the loss"""
    thresholds: Literal["equal-rate", "even-odds"] = "equal-rate"
    """when a key counts as pressed: equal-rate, as often as the player pressed it on the validation blocks; even-odds,
    where it is more likely down than up, the weights of the loss taken out again"""
    random_shift: int = 2
    """augmentation: shift each stack by up to this many pixels; 0 means none"""
    use_awr: bool = True
    """weight imitation by advantage; False is plain behavioural cloning"""
    iql_expectile: float = 0.7
    """expectile of the value loss; 0.5 is the mean, above it is optimistic"""
    iql_adv_temperature: float = 1.0
    """temperature T of exp(A / T), A in standard deviations"""
    iql_adv_clip: float = 10.0
    """upper limit of the advantage weight"""
    iql_adv_normalizer: Literal["running", "batch-mean"] = "running"
    """running: A is divided by its running standard deviation. batch-mean: weights are divided by their batch mean
    instead, which cancels the advantage where neighbours share a batch; kept to show that"""
    confident_from: float = 0.0
    """begin with episodes whose death or win is at least this sure, 0..1; over the first half of the updates the bar
    falls linearly to the least sure one. 0 means all episodes from the start"""
    value_coef: float = 0.5
    """coefficient of the value loss"""
    mouse_coef: float = 1.0
    """coefficient of the mouse loss, on frames where the pointer is known"""
    inv_dyn_weight: float = 0.2
    """coefficient of the inverse-dynamics loss; 0 leaves the head out"""
    q_head: bool = False
    """advantages from a twin Q(s, a) that bootstraps from the rewards (IQL) in place of returns; needs an action
    horizon of 0"""
    q_coef: float = 0.5
    """coefficient of the Q loss"""
    q_tau: float = 0.005
    """share of Q that its target takes over in each update"""
    intents: bool = False
    """learn the player's intent (intent.parquet) with a head of its own, and to play towards one given as a goal"""
    intent_coef: float = 0.25
    """coefficient of the intent loss"""
    goal_dropout: float = 0.5
    """share of the training samples that are told no goal, 0..1: the policy has to play without, too"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast or not; auto takes it on CUDA, and on CPUs with AMX, elsewhere it is slower"""
    compile_model: bool = False
    """torch.compile the network"""

    log_every: int = 10
    """updates between two rows of TensorBoard scalars"""
    save_every: int = 200
    """updates between two saves of last.pt; it is also saved after each epoch and on Ctrl-C or SIGTERM"""
    checkpoint_dir: str | None = None
    """folder that also receives reflex_epoch_<n>.pth after each epoch; None means none"""
    overwrite: bool = False
    """replace another run's files in `checkpoint_dir`"""
    bootstrap: int = 1000
    """resamples of 5 s blocks behind the intervals of the final evaluation"""
    video_seconds: float = 20.0
    """length of eval.mp4, predicted and true keys over the held-out session; 0 means none"""


# Axes: B batch, N frames of a recording, K keys, G intents, T = 3 stacked frames, C H W image (uint8 RGB), S image_size
CONTEXT = 3  # frames in a stack, oldest first
RUN = 8  # frames that are decoded together and stay together in the shuffle buffer
MIX = 64  # runs whose frames are shuffled when they leave it
MAX_Q_KEYS = 8  # an exported Q head says what each of 2^K sets of keys is worth
EPOCH_FILE = "reflex_epoch_{}.pth"  # in `checkpoint_dir`, the first epoch is 0


# data: which frames, which labels -------------------------------------------------------------------------------------
@dataclass
class Recording:
    """A labelled session. Row i of every array belongs to frame i, the moment of decision."""

    name: str
    video: Path
    fps: float
    keys: np.ndarray  # (N, K) bool, down at any moment of [t_{i+h}, t_{i+h+1}), h = action_horizon: the label
    keys_before: np.ndarray  # (N, K) bool, the same at i - 1, the last row fully known at the decision
    keys_now: np.ndarray  # (N, K) bool, down at t_i: what leads from frame i to i + 1
    mouse: np.ndarray  # (N, 2) pointer in 0..1 of the picture
    mouse_known: np.ndarray  # (N,) bool
    returns: np.ndarray  # (N,)
    rewards: np.ndarray  # (N,) on the way from frame i to i + 1, as labelled; the returns are made of them
    gamma: float  # of the returns, per frame; NaN in labels that do not say
    intents: np.ndarray  # (N,) what the player is about to do, its number in INTENT_NAMES; 0 without --intents
    finished: np.ndarray  # (N,) bool, the episode ended in a win or a death, so the return is known
    terminal: np.ndarray  # (N,) bool, the last frame of such an episode that has a label
    confidence: np.ndarray  # (N,) of the event that ends the episode; 1 where none does
    usable: np.ndarray  # (N,) bool, frame and label lie inside one episode, the stack inside the recording
    training: np.ndarray  # (N,) bool, usable and neither validation nor the gap beside it


def person_plays(session: Session) -> np.ndarray:
    """(N,) bool, where the keys are a person's or a script's. In a policy's play (play_reflex.py live) that is from a
    person's key until `resume_after` seconds after the last one was released, as then the policy went on."""
    if session.metadata.get("dry_run") != "false":
        return np.ones(session.n_frames, bool)
    theirs, held, rows = np.zeros(session.n_frames, bool), set(), session.inputs
    rows = rows.filter(pc.and_(pc.equal(rows["source"], "human"), pc.equal(rows["event_type"], "key")))
    times, wait_ms = rows["timestamp"].to_numpy(), 1000 * float(session.metadata["resume_after"])
    following = np.append(times[1:], np.inf)
    for first, nxt, name, state in zip(
        times, following, rows["key_name"].to_pylist(), rows["state"].to_pylist(), strict=True
    ):
        (held.discard if state == "up" else held.add)(name)
        last = nxt if held else min(nxt, first + wait_ms)
        theirs |= (session.timestamps >= first) & (session.timestamps < last)
    return theirs


def load_intents(session: Session, N: int) -> np.ndarray:
    """(N,) numbers in INTENT_NAMES. Raises ValueError where they belong to another recording, or other episodes."""
    path, size = session.folder / "intent.parquet", session.video.stat().st_size
    table, again = read_table(path, INTENT), "Make it again: python precompute_labels.py --labeler keys --data-dir"
    episodes = read_table(session.folder / "episodes.parquet", EPISODES).to_pylist()
    cuts = sorted({frame for e in episodes for frame in (e["start_frame"], e["end_frame"] + 1)})
    if (table.schema.metadata or {}).get(b"cuts", str(cuts).encode()).decode() != str(cuts):
        raise ValueError(
            f"{path} was made for other episodes than episodes.parquet has. {again} {session.folder.parent}"
        )
    made_for = int((table.schema.metadata or {}).get(b"recording_bytes", size))
    unknown = set(table["intent"].to_pylist()) - set(INTENT_NAMES)
    if made_for != size or len(table) < N or unknown:
        raise ValueError(
            f"{path} has {len(table):,} rows for a recording with recording_bytes {made_for} and "
            f"{', '.join(sorted(unknown)) or 'no'} unknown intent, recording.mp4 has {N:,} frames and {size} bytes. "
            f"{again} {session.folder.parent}"
        )
    return np.array([INTENT_NAMES.index(name) for name in table["intent"].to_pylist()[:N]])


def load_recording(folder: Path, keys: list[str], h: int, intents: bool = False) -> Recording:
    session = load_session(folder)
    reader = VideoReader(session.video)
    N = min(session.n_frames, reader.n_frames)
    if N < session.n_frames:
        tqdm.write(
            f"{session.video} has {N:,} frames for {session.n_frames:,} rows of frames.parquet: using these {N:,}"
        )
    keys_now, keys_any = (table[:N] for table in key_table(session, keys))  # (N, K), (N, K)
    mouse, mouse_known = mouse_table(session)
    returns, rewards, episode = np.zeros(N), np.zeros(N), np.full(N, -1)
    finished, terminal, confidence = np.zeros(N, bool), np.zeros(N, bool), np.ones(N)
    events = read_table(folder / "events.parquet", EVENTS).to_pylist()
    sure = {(event["frame_idx"], event["event"]): event["confidence"] for event in events}
    for row in read_table(folder / "episodes.parquet", EPISODES).to_pylist():
        inside = slice(row["start_frame"], row["end_frame"] + 1)
        episode[inside], finished[inside] = row["episode_id"], row["outcome"] != "INCOMPLETE"
        confidence[inside] = sure.get((row["end_frame"], row["outcome"]), 1.0)
        if row["outcome"] != "INCOMPLETE" and row["start_frame"] <= row["end_frame"] - h < N:
            terminal[row["end_frame"] - h] = True
    table = read_table(folder / "returns.parquet", RETURNS)
    made_for, size = (table.schema.metadata or {}).get(b"recording_bytes"), session.video.stat().st_size
    if made_for is not None and int(made_for) != size:
        raise ValueError(
            f"{folder}/returns.parquet was made for a recording with recording_bytes {int(made_for)}, recording.mp4 "
            f"has {size}. Label it again: python precompute_labels.py --overwrite --data-dir {folder.parent}"
        )
    if len(table) and table["frame_idx"][-1].as_py() >= session.n_frames:
        raise ValueError(
            f"{folder}/returns.parquet labels frame {table['frame_idx'][-1]}, there are {session.n_frames:,}. "
            "Label it again: python precompute_labels.py --overwrite --data-dir " + str(folder.parent)
        )
    table = table.filter(pc.less(table["frame_idx"], N))
    returns[table["frame_idx"].to_numpy()] = table["return"].to_numpy()
    rewards[table["frame_idx"].to_numpy()] = table["reward"].to_numpy()
    usable = episode >= 0
    usable[: CONTEXT - 1] = usable[N - h :] = False
    usable[: N - h] &= episode[h:] == episode[: N - h]
    usable[: N - h] &= person_plays(session)[h:N]
    return Recording(
        name=session.name,
        video=session.video,
        fps=session.fps,
        keys=np.concatenate([keys_any[h:], np.zeros_like(keys_any[:h])]),
        keys_before=np.concatenate([np.zeros_like(keys_any[:1]), keys_any[:-1]]),
        keys_now=keys_now,
        mouse=mouse[:N] / [reader.width, reader.height],
        mouse_known=mouse_known[:N],
        returns=returns,
        rewards=rewards,
        gamma=float((table.schema.metadata or {}).get(b"gamma", "nan")),
        intents=load_intents(session, N) if intents else np.zeros(N, int),
        finished=finished,
        terminal=terminal,
        confidence=confidence,
        usable=usable,
        training=usable.copy(),
    )


def split_sessions(folders: list[Path], heldout: str) -> tuple[list[Path], list[Path]]:
    """Training and held-out sessions, by name."""
    held = [f for f in folders if fnmatch(f.name, heldout)] or folders[-1:]
    train = [f for f in folders if f not in held]
    if not train:
        raise ValueError(
            f"{folders[0].parent} has {len(folders)} session(s) and {held[0].name} is held out: none is left to train. "
            "Record another with: python record_session.py"
        )
    return train, held


def choose_keys(folders: list[Path], min_rate: float) -> list[str]:
    """Keys down in at least `min_rate` of the training frames, marker keys never."""
    sessions = [load_session(folder) for folder in folders]
    names = sorted(set().union(*(key_names(session) for session in sessions)))
    if not names:
        raise ValueError(f"{folders[0].parent}: no key was pressed in any session. Check inputs.parquet.")
    rate = np.concatenate([key_table(session, names)[1] for session in sessions]).mean(0)  # (K,)
    keys = [name for name, r in zip(names, rate, strict=True) if r >= min_rate]
    if not keys:
        raise ValueError(
            f"no key is down in {min_rate:.1%} of the frames (most: {rate.max():.2%}). Lower --min-key-rate."
        )
    return keys


def check_q_head(args: Args, recordings: list[Recording], keys: list[str]):
    """Raise ValueError where Q cannot be learnt."""
    if args.action_horizon:
        raise ValueError(
            f"--q-head with --action-horizon {args.action_horizon}: the next frame does not show what they do. "
            "Add --action-horizon 0"
        )
    if len(keys) > MAX_Q_KEYS:
        raise ValueError(f"--q-head takes {MAX_Q_KEYS} keys at most. Name them: --keys {' '.join(keys[:MAX_Q_KEYS])}")
    gammas = {recording.gamma: recording.video.parent for recording in recordings}
    if len(gammas) > 1 or any(np.isnan(gamma) for gamma in gammas):
        found = ", ".join(f"{folder}/returns.parquet {gamma:g}" for gamma, folder in gammas.items())
        raise ValueError(
            f"Q needs one gamma in all labels, they have {found}. Label all of them again, with your settings: "
            f"python precompute_labels.py --overwrite --half-life-s 2 --data-dir {args.data_dir}"
        )


def choose_validation(recordings: list[Recording], fraction: float, seed: int) -> list[tuple[int, int, int]]:
    """Mark blocks of 10 s as validation, 1 s on either side of them as gap. Returns (recording, start, stop)."""
    rng = np.random.default_rng(seed)
    blocks = [
        (r, start, min(start + int(10 * recording.fps), len(recording.usable)))
        for r, recording in enumerate(recordings)
        for start in range(0, len(recording.usable), int(10 * recording.fps))
    ]
    count = max(1, round(fraction * len(blocks))) if fraction else 0
    chosen = sorted(blocks[b] for b in rng.choice(len(blocks), count, replace=False))
    for r, start, stop in chosen:
        gap = int(recordings[r].fps)
        recordings[r].training[max(0, start - gap) : stop + gap] = False
    return chosen


def plan_epoch(training: list[np.ndarray], buffer_frames: int, shuffle: bool, seed: int, epoch: int):
    """The order in which runs (recording, start, stop) are decoded, and the order in which samples (run, frame) are
    trained on. A pure function: resume needs no more than the epoch and the position in it.

    Eight recordings are read side by side, each forwards. A buffer of `buffer_frames` gives away random runs, and the
    frames of MIX runs are shuffled once more: in a batch of neighbours a few frames would do all the talking. Of every
    four frames two stay together, (i, i + 1), other two in each epoch: inverse dynamics needs the frame that follows.
    """
    rng = np.random.default_rng((seed, epoch))
    runs_of = []
    for r, mask in enumerate(training):  # mask (N,) bool
        edges = np.flatnonzero(np.diff(np.r_[False, mask, False])).tolist()  # start, stop, start, stop, ...
        spans = zip(edges[::2], edges[1::2], strict=True)
        runs_of.append([(r, s, min(s + RUN, stop)) for start, stop in spans for s in range(start, stop, RUN)])
    if not shuffle:
        decode = [run for recording_runs in runs_of for run in recording_runs]
        return decode, [(run, i) for run in decode for i in range(run[1], run[2])]
    decode, order = [], rng.permutation(len(training)).tolist()
    for group in (order[g : g + 8] for g in range(0, len(order), 8)):
        decode += sorted((run for r in group for run in runs_of[r]), key=lambda run: run[1] / len(training[run[0]]))
    train, buffer = [], []
    for run in decode:
        buffer.append(run)
        if len(buffer) * RUN > buffer_frames:
            i = rng.integers(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            train.append(buffer.pop())
    train += [buffer[i] for i in rng.permutation(len(buffer))]
    samples = []
    for first in range(0, len(train), MIX):
        units = []
        for run in train[first : first + MIX]:
            frames = deque(range(run[1], run[2]))
            while frames:
                together = 2 if (frames[0] + epoch) % 4 == 0 and len(frames) > 1 else 1
                units.append([(run, frames.popleft()) for _ in range(together)])
        samples += [sample for u in rng.permutation(len(units)) for sample in units[u]]
    return decode, samples


def stream_batches(recordings: list[Recording], decode: list, samples: list, args: Args, first_batch: int):
    """Batches of an epoch, from `first_batch` on: stacks (B, T * 3, S, S) uint8, oldest frame first, and rows (B,) of
    the training recordings' arrays laid end to end."""
    samples = samples[first_batch * args.batch_size :]
    left = Counter(run for run, _ in samples)  # samples of a run still to be given out
    offset = np.cumsum([0] + [len(recording.usable) for recording in recordings])
    readers = [ForwardReader(recording.video, args.image_size) for recording in recordings]
    threads = [ThreadPoolExecutor(1) for _ in range(args.workers)]  # a recording stays with one thread, so in order
    to_decode, ahead, pixels = deque(run for run in decode if run in left), deque(), {}

    def decode_next():
        while to_decode and len(ahead) < 1 + 8 * args.workers:
            r, start, stop = to_decode.popleft()
            read = partial(readers[r].read, start - CONTEXT + 1, stop)
            ahead.append(((r, start, stop), threads[r % args.workers].submit(read).result if threads else read))
        run, result = ahead.popleft()
        pixels[run] = result()  # (stop - start + T - 1, 3, S, S)

    try:
        for first in range(0, len(samples) - args.batch_size + 1, args.batch_size):
            stacks, rows = [], []
            for run, i in samples[first : first + args.batch_size]:
                while run not in pixels:
                    decode_next()
                stacks.append(pixels[run][i - run[1] : i - run[1] + CONTEXT].flatten(0, 1))
                rows.append(offset[run[0]] + i)
                left[run] -= 1
                if left[run] == 0:
                    del pixels[run]
            yield torch.stack(stacks), torch.tensor(rows)
    finally:
        for thread in threads:
            thread.shutdown(cancel_futures=True)


# ALGO LOGIC: network --------------------------------------------------------------------------------------------------
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015), with torchvision's parameter names."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet18(nn.Module):
    """(B, channels, H, W) -> (B, 512)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for layer, (inputs, outputs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
            blocks = BasicBlock(inputs, outputs, 1 if layer == 1 else 2), BasicBlock(outputs, outputs, 1)
            self.add_module(f"layer{layer}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)  # (B, 64, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 512, H/32, W/32)
        return x.mean((2, 3))

    def load_pretrained(self, file: str):
        """Take torchvision's ImageNet weights; each frame of the stack gets a third of the first layer's."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        state["conv1.weight"] = state["conv1.weight"].repeat(1, CONTEXT, 1, 1) / CONTEXT
        self.load_state_dict(state)


class CNN(nn.Module):
    """(B, channels, H, W) -> (B, 512)"""

    def __init__(self, channels: int, grid: int):
        super().__init__()
        layers = []
        for inputs, outputs in [(channels, 32), (32, 64), (64, 128), (128, 128)]:
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        pooled = [nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(128 * grid**2, 512), nn.ReLU()]
        self.layers = nn.Sequential(*layers, *pooled)

    def forward(self, x):
        return self.layers(x)


class TwinQ(nn.Module):
    """Two Q(s, a) of features and keys; where one is asked for, the smaller (Fujimoto et al. 2018, TD3)."""

    def __init__(self, n_features: int, n_keys: int):
        super().__init__()
        sizes = n_features + n_keys, 256
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(*sizes), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
            for _ in range(2)
        )

    def forward(self, features, keys):  # (..., F), (..., K) -> (2, ...)
        features_and_keys = torch.cat([features, keys], -1)
        return torch.stack([head(features_and_keys).squeeze(-1) for head in self.heads])


class ReflexNet(nn.Module):
    """Shared backbone with a key, a mouse and a value head, and where asked for inverse dynamics and Q. Any H and W.
    With intents, a goal joins the features of key and value head, and a head names the intent without knowing it."""

    def __init__(
        self,
        n_keys: int,
        backbone: str,
        grid: int = 4,
        inverse_dynamics: bool = False,
        q_head: bool = False,
        n_intents: int = 0,
    ):
        super().__init__()
        self.n_intents = n_intents
        fused = 512 + (64 if n_intents else 0)
        self.backbone = CNN(3 * CONTEXT, grid) if backbone == "cnn" else ResNet18(3 * CONTEXT)
        self.keys_head = nn.Sequential(nn.Linear(fused, 256), nn.ReLU(), nn.Linear(256, n_keys))
        self.mouse_head = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 2), nn.Sigmoid())
        self.value_head = nn.Sequential(nn.Linear(fused, 128), nn.ReLU(), nn.Linear(128, 1))
        self.inverse_head = None
        if inverse_dynamics:
            self.inverse_head = nn.Sequential(nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, n_keys))
        self.q_head = TwinQ(512, n_keys) if q_head else None
        if n_intents:
            self.goal_encoder = nn.Sequential(nn.Linear(n_intents, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
            self.intent_head = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, n_intents))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).repeat(CONTEXT).view(1, -1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).repeat(CONTEXT).view(1, -1, 1, 1) * 255)

    def features(self, pixels):  # (B, T * 3, H, W) uint8, oldest frame first -> (B, 512)
        return self.backbone(((pixels.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last))

    def heads(self, features, goal=None):  # (B, 512), (B, G) one-hot, zeros or None for no goal -> (B, K), (B, 2), (B,)
        fused = features
        if self.n_intents:
            goal = features.new_zeros(features.shape[0], self.n_intents) if goal is None else goal
            fused = torch.cat([features, self.goal_encoder(goal)], 1)  # (B, 576)
        return self.keys_head(fused), self.mouse_head(features), self.value_head(fused).squeeze(1)

    def inverse_dynamics(self, features, next_features):  # (B, 512), (B, 512) -> (B, K)
        return self.inverse_head(torch.cat([features, next_features], 1))

    def forward(self, pixels):  # (B, T * 3, H, W) uint8 -> (B, K), (B, 2), (B,)
        return self.heads(self.features(pixels))


# ALGO LOGIC: losses ---------------------------------------------------------------------------------------------------
def expectile_loss(returns, value, expectile, mask):
    """IQL eq. 5 on returns: |expectile - 1[G < V]| (G - V)^2, mean over the frames in `mask`. All (B,) -> scalar."""
    difference = returns - value
    weight = torch.where(difference > 0, expectile, 1 - expectile)
    return (weight * difference.square() * mask).sum() / mask.sum().clamp(min=1)


def q_loss(q, rewards, next_value, mask):
    """IQL eq. 6: (r + gamma V(s') - Q(s, a))^2, mean over both Q and the rows in `mask`. `next_value` is gamma V(s'),
    0 after an end. (2, B), (B,), (B,), (B,) -> scalar"""
    return ((rewards + next_value - q).square().mean(0) * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def update_target(target_q, q_head, tau: float):
    """Let the target of Q follow it (Polyak averaging)."""
    for slow, fast in zip(target_q.parameters(), q_head.parameters(), strict=True):
        slow.lerp_(fast, tau)


def update_running(running, advantage, mask, decay: float = 0.99):
    """Running moments of the advantage: (3,) holding sums of 1, A and A^2, old batches fading. Returns the new (3,)."""
    moments = torch.stack([mask, mask * advantage, mask * advantage.square()]).mean(1)  # (3,)
    return decay * running + (1 - decay) * moments


def advantage_weights(advantage, running, temperature, clip, normalizer):
    """AWR eq. 3: exp(A / T), clipped, A divided by its running standard deviation. (B,) -> (B,)"""
    if normalizer == "batch-mean":
        weights = (advantage / temperature).exp().clamp(max=clip)
        return weights / weights.mean()
    mean, mean_square = running[1:] / running[0].clamp(min=1e-8)
    std = (mean_square - mean.square()).clamp(min=1e-8).sqrt()
    return (advantage / std / temperature).exp().clamp(max=clip)


def keys_loss(logits, keys, weights, pos_weight):
    """Binary cross-entropy, mean over keys, weighted per sample. (B, K), (B, K), (B,), (K,) -> scalar"""
    per_sample = F.binary_cross_entropy_with_logits(logits, keys, pos_weight=pos_weight, reduction="none").mean(1)
    return (weights * per_sample).mean()


def mouse_loss(predicted, mouse, known):
    """Squared error where the pointer is known. (B, 2), (B, 2), (B,) -> scalar"""
    return ((predicted - mouse).square().mean(1) * known).sum() / known.sum().clamp(min=1)


def inverse_dynamics_loss(logits, keys, followed):
    """Binary cross-entropy on the rows whose next frame is known. (B, K), (B, K), (B,) -> scalar"""
    per_row = F.binary_cross_entropy_with_logits(logits, keys, reduction="none").mean(1)  # (B,)
    return (per_row * followed).sum() / followed.sum().clamp(min=1)


def intent_loss(logits, intents, weights):
    """Cross-entropy, weighted per sample as the keys are: at play the head chooses goals, so it should learn what
    turned out well. (B, G), (B,), (B,) -> scalar"""
    return (weights * F.cross_entropy(logits, intents, reduction="none")).mean()


def drop_goals(goal, share: float):
    """Zeros, that is no goal, in the place of a random `share` of the goals. (B, G) -> (B, G)"""
    return goal * (torch.rand(len(goal), 1, device=goal.device) >= share)


def random_shift(stacks, pixels: int):
    """Shift every stack by up to `pixels`, its border repeated (DrQ, Kostrikov et al. 2020). (B, C, H, W) uint8"""
    B, _, H, W = stacks.shape
    dy, dx = torch.randint(-pixels, pixels + 1, (2, B, 1), device=stacks.device)
    y = (torch.arange(H, device=stacks.device) + dy).clamp(0, H - 1)  # (B, H)
    x = (torch.arange(W, device=stacks.device) + dx).clamp(0, W - 1)  # (B, W)
    return stacks[torch.arange(B, device=stacks.device)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(
        0, 3, 1, 2
    )


# evaluation -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def predict(network, recording: Recording, start: int, stop: int, args: Args, device) -> tuple[np.ndarray, ...]:
    """Of frames [start, stop), in order: key probabilities (n, K), values (n,), and the probabilities (n, K) that
    inverse dynamics gives to the keys between a frame and the next, NaN on the last row and without that head. Of a
    network with intents also their logits (n, G), and the key probabilities (n, K) with the true intent as goal."""
    network.eval()
    reader, features = ForwardReader(recording.video, args.image_size), []
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(args.precision, device)):
        for first in range(start, stop, 64):
            last = min(first + 64, stop)
            frames = reader.read(max(0, first - CONTEXT + 1), last).to(device)
            rows = torch.arange(first, last)[:, None] + torch.arange(1 - CONTEXT, 1)  # (n, T)
            rows = rows.clamp(min=0) - max(0, first - CONTEXT + 1)  # before the first frame: the first frame again
            features.append(network.features(frames[rows.to(device)].flatten(1, 2)))
        features = torch.cat(features)  # (n, 512)
        logits, _, value = network.heads(features)
        inverse = torch.full_like(logits, torch.nan)
        if network.inverse_head is not None:
            inverse[:-1] = network.inverse_dynamics(features[:-1], features[1:])
        told = []
        if network.n_intents:
            goal = F.one_hot(torch.from_numpy(recording.intents[start:stop]), network.n_intents).to(features)
            told = [network.intent_head(features), network.heads(features, goal)[0].float().sigmoid()]
    network.train()
    return tuple(x.float().cpu().numpy() for x in (logits.float().sigmoid(), value, inverse.float().sigmoid(), *told))


def f1(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:  # twin: f1
    """F1 per key, 0 where a key is neither pressed nor predicted. (N, K), (N, K) -> (K,)"""
    hits = (predicted & true).sum(0)
    return 2 * hits / np.maximum(predicted.sum(0) + true.sum(0), 1)


def event_f1(  # twin: event_f1
    predicted: np.ndarray, true: np.ndarray, part: np.ndarray, change: int, tolerance: int = 1
) -> float:
    """F1 of key onsets (change +1) or releases (-1) over all keys. A predicted one is right when a true one, each used
    once, lies within `tolerance` frames. (N, K), (N, K), (N,) number of the unbroken stretch a frame belongs to"""

    def events(keys):
        changed = (np.diff(keys.astype(int), axis=0) == change) & (np.diff(part) == 0)[:, None]
        return [np.flatnonzero(column) for column in changed.T]

    hits = total = 0
    for mine, theirs in zip(events(predicted), events(true), strict=True):
        total += len(mine) + len(theirs)
        nxt = 0
        for frame in mine:
            while nxt < len(theirs) and theirs[nxt] < frame - tolerance:
                nxt += 1
            if nxt < len(theirs) and theirs[nxt] <= frame + tolerance:
                hits, nxt = hits + 1, nxt + 1
    return 2 * hits / max(total, 1)


def chatter(keys: np.ndarray, part: np.ndarray) -> np.ndarray:  # twin: chatter
    """Flips per pair of neighbouring frames, per key. (N, K), (N,) as in `event_f1` -> (K,)"""
    neighbours = np.diff(part) == 0  # (N - 1,)
    return (keys[1:] != keys[:-1])[neighbours].sum(0) / max(neighbours.sum(), 1)


def calibration_error(probability: np.ndarray, true: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) of the probability that a key is down: over bins of equal
    width, the mean of |mean probability - share of true| by share of the rows. Any shape, the same for both."""
    p, y = probability.ravel().astype(float), true.ravel()
    return np.abs(np.bincount(np.minimum((p * bins).astype(int), bins - 1), p - y)).sum() / len(p)


def equal_rate_thresholds(probabilities: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Per key, the threshold that presses it as often as the player did. (N, K), (N, K) -> (K,)"""
    return np.array([np.quantile(p, 1 - rate) for p, rate in zip(probabilities.T, true.mean(0), strict=True)])


def even_odds_thresholds(pos_weight: np.ndarray) -> np.ndarray:
    """Where a key is as likely down as up: `pos_weight` (K,) multiplied the odds that the network learnt. (K,)"""
    return pos_weight / (1 + pos_weight)


def evaluate(network, parts: list, thresholds, args: Args, device, bootstrap: int = 0) -> tuple[dict, dict]:
    """Score the policy on `parts` [(recording, start, stop)], none of them trained on.

    Returns the metrics with their baselines, flat, and details: `per_key` columns (K,), `value` and `returns` (N,),
    `intervals_95`. `thresholds` (K,) None takes those of equal rate, which is for validation only. `bootstrap`
    resamples of 5 s blocks make the intervals.
    """
    columns = []
    for number, (recording, start, stop) in enumerate(parts):
        use = recording.usable[start:stop]
        names = ("keys", "keys_before", "keys_now", "returns", "finished")
        column = {name: getattr(recording, name)[start:stop] for name in names}
        predictions = predict(network, recording, start, stop, args, device)
        column |= dict(zip(("probability", "value", "inverse"), predictions, strict=False))
        column["part"] = 10**6 * number + np.cumsum(~use)  # one number for every unbroken stretch
        if network.n_intents:
            column["intents"], column["intent_logits"], column["told"] = recording.intents[start:stop], *predictions[3:]
        columns.append({name: values[use] for name, values in column.items()})
    true, before, now, returns, finished, probability, value, inverse, part, *of_intents = (
        np.concatenate([column[name] for column in columns]) for name in columns[0]
    )
    if thresholds is None:
        thresholds = equal_rate_thresholds(probability, true)
    predicted, always_on, rate = probability > thresholds, np.ones_like(true), true.mean(0)
    changed = true != before  # (N, K), repeat-last is wrong on each of them
    rng = np.random.default_rng(args.seed)
    shifts = rng.integers(1, max(2, len(true)), 100)  # a random policy of equal rates: ours, at another time
    random = [np.roll(predicted, shift, axis=0) for shift in shifts]

    def key_f1(keys) -> float:
        return f1(keys, true).mean()

    def change_f1(keys) -> float:
        return f1(keys & changed, true & changed).mean()

    def change_accuracy(keys) -> float:
        return ((keys == true) & changed).sum() / max(changed.sum(), 1)

    def scores(rows) -> dict:
        known = rows[finished[rows]]
        constant = len(known) < 2 or np.ptp(returns[known]) == 0 or np.ptp(value[known]) == 0
        pairs = zip(true[rows].T, probability[rows].T, strict=True)
        ap = np.array([average_precision_score(t, p) if t.any() else np.nan for t, p in pairs])  # (K,)
        return {
            "ap": ap,
            "ap_above_base": ap - true[rows].mean(0),  # (K,)
            "f1_above_always_on": f1(predicted[rows], true[rows]).mean() - f1(always_on[rows], true[rows]).mean(),
            "value_rank": np.nan if constant else spearmanr(value[known], returns[known]).statistic,
        }

    whole = scores(np.arange(len(true)))
    metrics = {
        "eval/key_ap": np.nanmean(whole["ap"]),
        "eval/key_ap_random": rate.mean(),
        "eval/key_ece": calibration_error(probability, true),
        "eval/key_f1": key_f1(predicted),
        "eval/key_f1_always_off": 0.0,
        "eval/key_f1_always_on": key_f1(always_on),
        "eval/key_f1_majority": key_f1(np.broadcast_to(rate > 0.5, true.shape)),
        "eval/key_f1_repeat_last": key_f1(before),
        "eval/key_f1_random": np.mean([key_f1(keys) for keys in random]),
        "eval/onset_f1": event_f1(predicted, true, part, +1),
        "eval/onset_f1_repeat_last": event_f1(before, true, part, +1),
        "eval/onset_f1_random": np.mean([event_f1(keys, true, part, +1) for keys in random]),
        "eval/release_f1": event_f1(predicted, true, part, -1),
        "eval/release_f1_repeat_last": event_f1(before, true, part, -1),
        "eval/release_f1_random": np.mean([event_f1(keys, true, part, -1) for keys in random]),
        "eval/change_f1": change_f1(predicted),
        "eval/change_f1_always_on": change_f1(always_on),
        "eval/change_f1_repeat_last": change_f1(before),
        "eval/change_f1_random": np.mean([change_f1(keys) for keys in random]),
        "eval/change_accuracy": change_accuracy(predicted),
        "eval/change_accuracy_always_on": change_accuracy(always_on),
        "eval/change_accuracy_repeat_last": change_accuracy(before),
        "eval/change_accuracy_random": np.mean([change_accuracy(keys) for keys in random]),
        "eval/chatter": chatter(predicted, part).mean(),
        "eval/chatter_player": chatter(true, part).mean(),
        "eval/value_rank_correlation": whole["value_rank"],
    }
    followed = ~np.isnan(inverse[:, 0])  # (N,)
    if followed.any():
        now, inverse = now[followed], inverse[followed]
        metrics |= {
            "eval/inv_dyn_f1": f1(inverse > 0.5, now).mean(),
            "eval/inv_dyn_f1_always_on": f1(np.ones_like(now), now).mean(),
            "eval/inv_dyn_f1_majority": f1(np.broadcast_to(now.mean(0) > 0.5, now.shape), now).mean(),
        }
    if of_intents:
        intents, intent_logits, told = of_intents  # (N,), (N, G), (N, K)
        told_ap = [average_precision_score(t, p) for t, p in zip(true.T, told.T, strict=True) if t.any()]
        metrics |= {
            "eval/intent_accuracy": (intent_logits.argmax(1) == intents).mean(),
            "eval/intent_accuracy_majority": np.bincount(intents).max() / len(intents),
            "eval/key_ap_leaking_goal": np.mean(told_ap) if told_ap else np.nan,
            "eval/key_f1_leaking_goal": key_f1(told > thresholds),
            "eval/onset_f1_leaking_goal": event_f1(told > thresholds, true, part, +1),
        }
    hits = (predicted & true).sum(0)  # (K,)
    per_key = {
        "support": true.sum(0),
        "rate": rate,
        "policy_rate": predicted.mean(0),
        "threshold": thresholds,
        "precision": hits / np.maximum(predicted.sum(0), 1),
        "recall": hits / np.maximum(true.sum(0), 1),
        "f1": f1(predicted, true),
        "ap": whole["ap"],
        "ece": np.array([calibration_error(p, t) for p, t in zip(probability.T, true.T, strict=True)]),
        "chatter": chatter(predicted, part),
        "chatter_player": chatter(true, part),
    }
    details = {"per_key": per_key, "value": value, "returns": np.where(finished, returns, np.nan), "intervals_95": {}}
    if bootstrap:
        blocks = np.array_split(np.arange(len(true)), max(1, len(true) // int(5 * parts[0][0].fps)))
        picks = rng.integers(len(blocks), size=(bootstrap, len(blocks)))
        picks = tqdm(picks, desc="intervals", leave=False)
        draws = [scores(np.concatenate([blocks[b] for b in pick])) for pick in picks]
        for name in whole:  # (2,) or (2, K)
            details["intervals_95"][name] = np.nanpercentile([draw[name] for draw in draws], [2.5, 97.5], axis=0)
    return {name: float(metric) for name, metric in metrics.items()}, details


COMPARED = {  # what the final evaluation prints and draws beside its baselines
    "keys, F1": "eval/key_f1",
    "onsets, F1": "eval/onset_f1",
    "releases, F1": "eval/release_f1",
    "changes, F1": "eval/change_f1",
    "changes, accuracy": "eval/change_accuracy",
    "inverse dynamics, F1": "eval/inv_dyn_f1",
}
BASELINES = {
    "policy": "",
    "random": "_random",
    "repeat last": "_repeat_last",
    "always on": "_always_on",
    "majority": "_majority",
}


def table_of_keys(per_key: dict) -> tuple[list[str], list[list[str]]]:
    """Headings, and one row of cells per key."""
    columns = [[f"{x:.0f}" if name == "support" else f"{x:.2f}" for x in column] for name, column in per_key.items()]
    return [name.replace("_", " ") for name in per_key], [list(row) for row in zip(*columns, strict=True)]


def report(metrics: dict, details: dict, keys: list[str]):
    """The figures of the final evaluation, for the terminal."""
    headings, rows = table_of_keys(details["per_key"])
    print(f"\n{'':<14}" + "".join(f"  {name:>5}" for name in headings) + "  AP above base rate")
    for k, (key, row) in enumerate(zip(keys, rows, strict=True)):
        low, high = details["intervals_95"]["ap_above_base"][:, k]
        cells = "".join(f"  {cell:>{max(5, len(name))}}" for name, cell in zip(headings, row, strict=True))
        print(f"{key:<14}{cells}  {low:>+8.2f} to {high:+.2f}")
    print(f"\n{'':<20}" + "".join(f"{name:>13}" for name in BASELINES))
    for label, metric in COMPARED.items():
        if metric in metrics:
            cells = [metrics.get(metric + suffix) for suffix in BASELINES.values()]
            print(f"{label:<20}" + "".join(f"{'-' if cell is None else f'{cell:.2f}':>13}" for cell in cells))
    print(f"\ncalibration error {metrics['eval/key_ece']:.3f} over all keys", end=", ")
    print(f"chatter {metrics['eval/chatter']:.3f}, the player's {metrics['eval/chatter_player']:.3f}")
    if "eval/intent_accuracy" in metrics:
        accuracy, majority = metrics["eval/intent_accuracy"], metrics["eval/intent_accuracy_majority"]
        print(f"intent, accuracy {accuracy:.2f}, always the most frequent {majority:.2f}", end="; ")
        print(
            f"told the player's intent, which is made of his keys: keys, F1 {metrics['eval/key_f1_leaking_goal']:.2f}"
        )
    low, high = details["intervals_95"]["value_rank"]
    rank = metrics["eval/value_rank_correlation"]
    print(f"value, rank correlation with the return: {rank:.2f} ({low:.2f} to {high:.2f})")


def plot_evaluation(path: Path, metrics: dict, details: dict, keys: list[str]):
    """eval.png: average precision, the policy beside the baselines, value beside return, and the table of keys."""
    per_key, ap_95 = details["per_key"], details["intervals_95"]["ap"]  # (2, K)
    figure = Figure(figsize=(14, 4.6 + 0.25 * len(keys)), layout="constrained")
    grid = {"width_ratios": [1, 1.6, 1.6], "height_ratios": [4, 0.5 + 0.25 * len(keys)]}
    axes = figure.subplot_mosaic([["keys", "baselines", "value"], ["table"] * 3], **grid)
    errors = np.abs(ap_95 - per_key["ap"])
    axes["keys"].bar(keys, per_key["ap"], yerr=errors, capsize=4, label="policy, 95 %")
    axes["keys"].bar(keys, per_key["rate"], color="none", edgecolor="black", linestyle="--", label="base rate")
    axes["keys"].set(title="average precision per key", ylim=(0, 1))
    axes["keys"].tick_params(axis="x", labelrotation=30)
    compared = {label: metric for label, metric in COMPARED.items() if metric in metrics}
    for j, (name, suffix) in enumerate(BASELINES.items()):
        height = [metrics.get(metric + suffix, 0.0) for metric in compared.values()]
        axes["baselines"].bar(np.arange(len(compared)) + 0.16 * (j - 2), height, 0.16, label=name)
    labels = [label.replace(",", "").replace(" ", "\n") for label in compared]
    axes["baselines"].set(title="beside the baselines", ylim=(0, 1.25), xticks=range(len(compared)), xticklabels=labels)
    axes["baselines"].tick_params(axis="x", labelsize=7)
    axes["value"].plot(details["returns"], label="return")
    axes["value"].plot(details["value"], linewidth=0.8, label="value")
    axes["value"].set(title="value head", xlabel="held-out frame")
    for name in ("keys", "baselines", "value"):
        axes[name].legend(ncols=3 if name == "baselines" else 1, fontsize=8)
    headings, rows = table_of_keys(per_key)
    axes["table"].axis("off")
    axes["table"].table(rows, rowLabels=keys, colLabels=headings, loc="center")
    figure.savefig(path, dpi=110)


def write_video(path: Path, network, recording: Recording, thresholds, keys: list[str], args: Args, device):
    """eval.mp4: the stretch of a held-out recording in which the player's keys change most, with both players' keys."""
    length = max(1, min(int(args.video_seconds * recording.fps), len(recording.usable)))
    changes = np.r_[0, (np.diff(recording.keys.astype(int), axis=0) != 0).any(1)] * recording.usable
    start = int(np.convolve(changes, np.ones(length), "valid").argmax())
    stop = start + length
    probability, value, *_ = predict(network, recording, start, stop, args, device)
    reader, video = VideoReader(recording.video), None
    for frame_numbers, pictures in iter_frames(reader, start, stop):
        for i, picture in zip(frame_numbers, pictures.permute(0, 2, 3, 1).numpy(), strict=True):
            rows = {"player": recording.keys[i], "policy": probability[i - start] > thresholds}
            note = f"{recording.name}  frame {i}  value {value[i - start]:+.2f}"
            note += f"  return {recording.returns[i]:+.2f}" if recording.finished[i] else ""
            drawn = draw_keys(picture, keys, rows, note)
            video = video or VideoWriter(path, recording.fps, drawn.shape[1], drawn.shape[0], crf=23)
            video.add(drawn)
    video.close()


# main -----------------------------------------------------------------------------------------------------------------
def use_bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    return precision == "bf16"


def main(args: Args) -> dict:
    checkpoint = None
    try:
        if args.resume:
            args = runs.resume_args(args, may_change=("epochs", "max_updates", "workers", "device", "overwrite"))
            checkpoint = runs.load_checkpoint(Path(args.resume) / "last.pt")
        device = runs.pick_device(args.device)
        if args.checkpoint_dir:
            runs.check_checkpoint_dir(args, EPOCH_FILE.format("*"), __file__)
        if args.pretrained and args.backbone != "resnet18":
            raise ValueError(f"--pretrained {args.pretrained} holds ResNet-18 weights, --backbone is {args.backbone}")
        if args.backbone != "cnn" and args.cnn_grid != Args.cnn_grid:
            raise ValueError(f"--cnn-grid {args.cnn_grid} belongs to --backbone cnn, --backbone is {args.backbone}")
        if not args.q_head and (args.q_coef, args.q_tau) != (Args.q_coef, Args.q_tau):
            raise ValueError(f"--q-coef {args.q_coef:g} --q-tau {args.q_tau:g} do nothing without --q-head")
        if not 0 <= args.confident_from <= 1:
            raise ValueError(f"--confident-from {args.confident_from:g}: expected a confidence, 0 to 1")
        if not args.intents and (args.intent_coef, args.goal_dropout) != (Args.intent_coef, Args.goal_dropout):
            given = f"--intent-coef {args.intent_coef:g} --goal-dropout {args.goal_dropout:g}"
            raise ValueError(f"{given} do nothing without --intents")
        if args.intents and args.q_head:
            raise ValueError("--intents with --q-head: Q is not told the goal, and V would be. Leave one of them out")
        if not 0 <= args.goal_dropout <= 1:
            raise ValueError(f"--goal-dropout {args.goal_dropout:g}: expected 0 to 1")
        if args.bootstrap < 1:
            raise ValueError(f"--bootstrap {args.bootstrap}: the final evaluation needs at least one resample")
        if args.cnn_grid < 1 or not 0 < args.q_tau <= 1:
            raise ValueError(
                f"--cnn-grid {args.cnn_grid} --q-tau {args.q_tau}: expected 1 or more, above 0 and at most 1"
            )
        if args.action_horizon < 0 or not 0 <= args.val_fraction <= 0.5 or args.batch_size < 1:
            given = f"--action-horizon {args.action_horizon} --val-fraction {args.val_fraction}"
            raise ValueError(f"{given} --batch-size {args.batch_size}: expected 0 or more, 0 to 0.5, and 1 or more")
        folders = find_sessions(args.data_dir)
        played = [folder for folder in folders if not person_plays(load_session(folder)).all()]
        if played and not args.mix_corrections:
            print(f"left out what a policy played: {', '.join(folder.name for folder in played)} (--mix-corrections)")
            folders = [folder for folder in folders if folder not in played]
        if not folders:
            raise ValueError(f"{args.data_dir} holds only sessions that a policy played. Train with --mix-corrections")
        train_folders, heldout_folders = split_sessions(folders, args.heldout)
        corrected = [folder.name for folder in folders if "policy" in load_session(folder).metadata]
        if corrected and (args.use_awr or args.inv_dyn_weight or args.q_head):
            raise ValueError(
                f"{args.data_dir}: in {', '.join(corrected)} a policy played and the keys are a demonstrator's advice, "
                "so what followed does not come from them. Add --no-use-awr --inv-dyn-weight 0, or move them away"
            )
        keys = list(args.keys) or choose_keys(train_folders, args.min_key_rate)
        load = partial(load_recording, keys=keys, h=args.action_horizon, intents=args.intents)
        recordings, heldout = [load(folder) for folder in train_folders], [load(folder) for folder in heldout_folders]
        gamma = recordings[0].gamma
        if args.q_head:
            check_q_head(args, recordings, keys)
        if sum(int(recording.usable.sum()) for recording in heldout) < 2:
            names = ", ".join(recording.name for recording in heldout)
            raise ValueError(f"{names}: no two held-out frames to score on. Name longer sessions with --heldout")
        tables = ["returns", "episodes", "inputs"] + ["events"] * (args.confident_from > 0) + ["intent"] * args.intents
        names = [f"{name}.{form}" for name in tables for form in ("parquet", "jsonl")]
        data_files = [folder / name for folder in folders for name in ("recording.mp4", *names)]
        data_files = [path for path in data_files if path.exists()]
        if checkpoint:
            runs.check_fingerprint(Path(args.resume), data_files)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None

    # labels and split
    validation = choose_validation(recordings, args.val_fraction, args.seed)
    training = [recording.training for recording in recordings]
    n_training = int(sum(mask.sum() for mask in training))
    updates_per_epoch = n_training // args.batch_size
    if updates_per_epoch == 0:
        raise SystemExit(f"{args.data_dir} has {n_training} training frames, fewer than --batch-size {args.batch_size}")
    total_updates = args.max_updates or args.epochs * updates_per_epoch
    labels = {  # rows of all training recordings laid end to end
        name: torch.tensor(np.concatenate([getattr(recording, name) for recording in recordings]), dtype=torch.float32)
        for name in "keys keys_now returns rewards finished terminal confidence mouse mouse_known".split()
    }
    down = labels["keys"][torch.tensor(np.concatenate(training))].mean(0)  # (K,)
    least_sure = labels["confidence"].min().item()
    pos_weight = ((1 - down) / down.clamp(min=1e-6)).clamp(max=args.max_pos_weight)
    labels["intents"] = torch.tensor(np.concatenate([recording.intents for recording in recordings]))
    labels = {name: label.to(device) for name, label in labels.items()}

    # run folder
    bf16 = use_bf16(args.precision, device)
    if checkpoint:
        run_dir = Path(args.resume)
    else:
        run_dir = runs.make_run_dir(args, __file__, Path(args.data_dir).resolve().name)
        runs.write_provenance(run_dir, data_files, device=str(device), video_backend=video_backend(), bf16=bf16)
        split = {"train": [r.name for r in recordings], "heldout": [r.name for r in heldout], "keys": keys}
        runs.write_json(run_dir / "split.json", split | {"validation_blocks": validation})
    if args.checkpoint_dir:
        runs.open_checkpoint_dir(args, EPOCH_FILE.format("*"), __file__, run_dir)
    start_update = checkpoint["update"] if checkpoint else 0
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, sync_tensorboard=True)
    writer = SummaryWriter(str(run_dir), purge_step=start_update + 1 if checkpoint else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    print(f"{run_dir}: {n_training:,} training frames of {len(recordings)} sessions, keys {', '.join(keys)}")
    print(f"{total_updates:,} updates of {args.batch_size} on {device}, video decoded by {video_backend()}")
    if device.type == "cpu" and args.backbone == "resnet18":
        print("seconds for each on a CPU; a fraction with --image-size 112 --backbone cnn --lr 1e-3")

    # network and optimiser
    runs.seed_everything(args.seed, args.torch_deterministic)
    sizes = {
        "n_keys": len(keys),
        "backbone": args.backbone,
        "grid": args.cnn_grid,
        "inverse_dynamics": args.inv_dyn_weight != 0,
        "q_head": args.q_head,
        "n_intents": len(INTENT_NAMES) if args.intents else 0,
    }
    network = ReflexNet(**sizes)
    if args.pretrained:
        network.backbone.load_pretrained(args.pretrained)
    network = network.to(device, memory_format=torch.channels_last)
    features_of = torch.compile(network.features) if args.compile_model else network.features
    target_q = copy.deepcopy(network.q_head)  # None without that head
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    pos_weight, running = pos_weight.to(device), torch.zeros(3, device=device)
    best_ap = -1.0
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        running, best_ap = checkpoint["running"].to(device), checkpoint["best_ap"]
        if target_q:
            target_q.load_state_dict(checkpoint["target_q"])
        runs.set_rng_state(checkpoint["rng"])
        torch.set_num_threads(checkpoint["threads"])  # another number sums in another order

    def save(path: Path, update: int):
        runs.save_checkpoint(
            path,
            {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "running": running,
                "best_ap": best_ap,
                "target_q": target_q.state_dict() if target_q else None,
                "rng": runs.rng_state(),
                "threads": torch.get_num_threads(),
                "update": update,
                "network": sizes,  # ReflexNet(**network), of the script beside this file or in the run folder
                "script": Path(__file__).name,
                "run_dir": str(run_dir.resolve()),
                "keys": keys,
                "intents": list(INTENT_NAMES) if args.intents else [],
                "thresholds": thresholds.tolist(),
                "image_size": args.image_size,
                "action_horizon": args.action_horizon,
                "fps": recordings[0].fps,
            },
        )

    fixed = even_odds_thresholds(pos_weight.cpu().numpy()) if args.thresholds == "even-odds" else None
    start_thresholds = np.full(len(keys), 0.5) if fixed is None else fixed
    thresholds = np.array(checkpoint["thresholds"]) if checkpoint else start_thresholds
    val_parts = [(recordings[r], start, stop) for r, start, stop in validation]
    val_parts = [part for part in val_parts if part[0].usable[part[1] : part[2]].any()]
    progress = tqdm(total=total_updates, initial=start_update, desc="updates", unit="update")
    update, started, waited, wait_from = start_update, time.time(), 0.0, time.time()
    with runs.StopSignal() as stop_signal:
        while update < total_updates and not stop_signal:
            epoch, first_batch = divmod(update, updates_per_epoch)
            decode, samples = plan_epoch(training, args.buffer_frames, args.shuffle, args.seed, epoch)
            for stacks, rows in stream_batches(recordings, decode, samples, args, first_batch):
                waited += time.time() - wait_from

                # fetch
                stacks, rows = stacks.to(device), rows.to(device)  # (B, T * 3, S, S), (B,)
                returns, finished = labels["returns"][rows], labels["finished"][rows]  # (B,)
                followed = (rows[1:] == rows[:-1] + 1).float()  # (B - 1,) the next row is the next frame
                bar = least_sure + (args.confident_from - least_sure) * max(0.0, 1 - 2 * update / total_updates)
                sure = (labels["confidence"][rows] >= bar).float()  # (B,) of an episode to learn from by now
                if args.random_shift:
                    stacks = random_shift(stacks, args.random_shift)
                intents, goal = labels["intents"][rows], None  # (B,)
                if args.intents:
                    goal = drop_goals(F.one_hot(intents, len(INTENT_NAMES)).float(), args.goal_dropout)  # (B, G)

                # forward and loss
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    features = features_of(stacks)  # (B, 512)
                    logits, mouse_xy, value = network.heads(features, goal)
                    if args.intents:
                        intent_logits = network.intent_head(features)  # (B, G)
                    if args.inv_dyn_weight:
                        inverse = network.inverse_dynamics(features[:-1], features[1:])  # (B - 1, K)
                logits, mouse_xy, value = logits.float(), mouse_xy.float(), value.float()
                q_penalty, known = 0.0, finished * sure  # (B,) where the return is known
                if args.q_head:  # what is to come after a terminal row is in its return
                    terminal, keys_held = labels["terminal"][rows], labels["keys"][rows]  # (B,), (B, K)
                    rewards = torch.where(terminal > 0, returns, labels["rewards"][rows])
                    next_value = gamma * F.pad(value[1:].detach(), (0, 1)) * (1 - terminal)
                    q = network.q_head(features.float(), keys_held)  # (2, B)
                    q_penalty = q_loss(q, rewards, next_value, sure * torch.maximum(terminal, F.pad(followed, (0, 1))))
                    returns, known = target_q(features.float(), keys_held).amin(0).detach(), sure
                advantage = (returns - value).detach()  # (B,)
                running = update_running(running, advantage, known)
                weights = torch.ones_like(advantage)
                if args.use_awr:
                    weights = advantage_weights(
                        advantage, running, args.iql_adv_temperature, args.iql_adv_clip, args.iql_adv_normalizer
                    )
                    weights = torch.where(known > 0, weights, 1.0)  # an unfinished episode's return is not known
                policy_loss = keys_loss(logits, labels["keys"][rows], sure * weights, pos_weight)
                value_loss = expectile_loss(returns, value, args.iql_expectile, known)
                pointer_loss = mouse_loss(mouse_xy, labels["mouse"][rows], labels["mouse_known"][rows])
                loss = policy_loss + args.value_coef * value_loss + args.mouse_coef * pointer_loss
                loss = loss + args.q_coef * q_penalty
                if args.inv_dyn_weight:
                    inverse_loss = inverse_dynamics_loss(inverse.float(), labels["keys_now"][rows[:-1]], followed)
                    loss = loss + args.inv_dyn_weight * inverse_loss
                if args.intents:
                    intents_loss = intent_loss(intent_logits.float(), intents, sure * weights)
                    loss = loss + args.intent_coef * intents_loss

                # step
                lr = args.lr * (1 - update / total_updates) if args.anneal_lr else args.lr
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()  # no clipping by norm: where neighbours share a batch it cancels the weights again
                if args.q_head:
                    update_target(target_q, network.q_head, args.q_tau)
                update += 1
                progress.update()

                # log
                if update % args.log_every == 0 or update == total_updates:
                    elapsed = time.time() - started
                    scalars = {
                        "train/loss": loss.item(),
                        "train/policy_loss": policy_loss.item(),
                        "train/value_loss": value_loss.item(),
                        "train/mouse_loss": pointer_loss.item(),
                        "train/advantage_mean": advantage.mean().item(),
                        "train/weight_mean": weights.mean().item(),
                        "train/weight_clipped_frac": (weights >= args.iql_adv_clip).float().mean().item(),
                        "charts/learning_rate": lr,
                        "charts/SPS": (update - start_update) * args.batch_size / elapsed,
                        "charts/frames_seen": update * args.batch_size,
                        "charts/epoch": update / updates_per_epoch,
                        "time/data_wait_frac": waited / elapsed,
                        "time/step_ms": 1000 * (elapsed - waited) / (update - start_update),
                    }
                    if args.inv_dyn_weight:
                        scalars["train/inv_dyn_loss"] = inverse_loss.item()
                    if args.confident_from:
                        scalars["train/confident_frac"] = sure.mean().item()
                    if args.intents:
                        scalars["train/intent_loss"] = intents_loss.item()
                    if args.q_head:
                        scalars |= {"train/q_loss": q_penalty.item(), "train/q_mean": q.mean().item()}
                    for name, scalar in scalars.items():
                        writer.add_scalar(name, scalar, update)
                    progress.set_postfix(loss=f"{scalars['train/loss']:.3f}", epoch=f"{scalars['charts/epoch']:.2f}")

                # evaluate, save
                if update % updates_per_epoch == 0 or update == total_updates:
                    if val_parts:
                        metrics, details = evaluate(network, val_parts, fixed, args, device)
                        thresholds = details["per_key"]["threshold"]
                        for name, metric in metrics.items():
                            writer.add_scalar(name, metric, update)
                    if not val_parts or not metrics["eval/key_ap"] <= best_ap:  # also where it is NaN
                        best_ap = metrics["eval/key_ap"] if val_parts else best_ap
                        save(run_dir / "best.pt", update)
                    if args.checkpoint_dir and update % updates_per_epoch == 0:
                        save(Path(args.checkpoint_dir) / EPOCH_FILE.format(update // updates_per_epoch - 1), update)
                    save(run_dir / "last.pt", update)
                elif update % args.save_every == 0 or stop_signal:
                    save(run_dir / "last.pt", update)
                if stop_signal or update == total_updates:
                    break
                wait_from = time.time()
    progress.close()
    if stop_signal:
        writer.close()
        print(f"stopped after update {update} and saved. Go on with: python {Path(__file__).name} --resume {run_dir}")
        raise SystemExit(130)

    # final evaluation: the held-out session is read once, with the thresholds and the network that validation chose
    best = runs.load_checkpoint(run_dir / "best.pt", device)
    network.load_state_dict(best["model"])
    thresholds = np.array(best["thresholds"])
    parts = [(recording, 0, len(recording.usable)) for recording in heldout]
    metrics, details = evaluate(network, parts, thresholds, args, device, args.bootstrap)
    held_names = [recording.name for recording in heldout]
    per_key = {key: {name: float(c[k]) for name, c in details["per_key"].items()} for k, key in enumerate(keys)}
    intervals = {name: interval.tolist() for name, interval in details["intervals_95"].items()}
    evaluation = {"sessions": held_names, "keys": keys, "metrics": metrics, "per_key": per_key}
    runs.write_json(run_dir / "eval.json", evaluation | {"intervals_95": intervals})
    settings = {name: x if isinstance(x, int | float | str) else str(x) for name, x in vars(args).items()}
    final = {name.replace("eval/", "heldout/"): metric for name, metric in metrics.items()}
    for summary in hparams(settings, final):  # add_hparams would do the same in a run of its own
        writer.file_writer.add_summary(summary)
    for name, metric in final.items():
        writer.add_scalar(name, metric, update)
    plot_evaluation(run_dir / "eval.png", metrics, details, keys)
    if args.video_seconds:
        write_video(run_dir / "eval.mp4", network, heldout[0], thresholds, keys, args, device)
    writer.close()
    print(f"\nheld-out {', '.join(held_names)}: {len(details['value']):,} frames in episodes")
    report(metrics, details, keys)
    print(f"\nfiles  {run_dir}: eval.json, eval.png,{' eval.mp4,' * (args.video_seconds > 0)} best.pt, last.pt")
    print(f"curves tensorboard --logdir {args.run_root}")
    return metrics | {"run_dir": str(run_dir), "update": update}


if __name__ == "__main__":
    main(tyro.cli(Args, args=runs.cli_words(Args, env_prefix="REFLEX_TRAIN_")))
