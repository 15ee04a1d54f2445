"""An exported reflex policy at play: over a recorded session, or on a window of the desktop.

`eval` shows the model of `export_reflex.py` a session frame by frame, raw as a live game would, and compares the keys
it would have held with those recorded; no labels are needed. `live` plays, with the same rule from probabilities to
keys, and saves what was played as a session. Page: docs/play_reflex.md

    python play_reflex.py eval --model reflex.onnx --session sample_dataset/heldout_1
    python play_reflex.py live --model reflex.onnx --window "SuperTux" --send-keys

In: reflex.onnx, reflex_manifest.json, a session or a game's window. Out: <stem>_eval_<session>/ with preds.parquet,
metrics.json, overlay.mp4; plays/play_<time>/, a session with preds.parquet, latency.json, latency.png.
"""

import dataclasses
import gc
import hashlib
import json
import math
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import tyro
from matplotlib.figure import Figure
from scipy.special import expit
from tqdm import tqdm

from common import desktop
from common.runs import StopSignal, write_json, write_provenance
from common.sessions import (
    MARKER_KEYS,
    WIN_KEY,
    Session,
    SessionWriter,
    find_sessions,
    key_table,
    load_session,
    write_table,
)
from common.video import VideoReader, VideoWriter, draw_keys, iter_frames
from supertux_env import closed_loop
from supertux_env.launch import find_program


@dataclass(kw_only=True)
class Args:
    """What every way to play needs."""

    model: Path
    """the .onnx file of export_reflex.py"""
    manifest: Path | None = None
    """its manifest; None means <stem>_manifest.json beside it"""
    threshold: float | None = None
    """press a key above this probability, 0..1; None takes the manifest's threshold of each key"""
    debounce: int = 2
    """a key changes when that was wanted on this many frames in a row; 1 means at once"""
    max_keys: int = 4
    """want at most this many keys at once, the most probable ones; 0 means no limit"""
    goal_intent: str | None = None
    """play towards this intent, such as LEAP; needs a model of iql_reflex.py --intents. None means no goal"""
    auto_intent: bool = False
    """take the intent that the model names as the goal, once it is the same on --intent-stability frames in a row"""
    intent_stability: int = 5
    """frames in a row that must name the same intent before it becomes the goal, 1 or more"""


@dataclass(kw_only=True)
class Eval(Args):
    """Play over a recorded session and compare with its keys."""

    session: Path
    """folder of the session; labels are not needed"""
    output: Path | None = None
    """folder that receives the results; None means <stem>_eval_<session> beside the model"""
    overwrite: bool = False
    """replace the results that are there already"""
    video: bool = True
    """draw overlay.mp4, the session with the keys of player and policy below it"""
    seed: int = 1
    """of the random baseline"""


@dataclass(kw_only=True)
class ClosedLoop(Args):
    """Play the real SuperTux, episode after episode, beside baselines."""

    level: str = "generated:0-9"
    """generated:<seed of the level>, generated:<first>-<last> in turn, or a level that comes with the game"""
    episodes: int = 20
    """of each player, 2 or more, all on the same seeds"""
    seed: int = 0
    """the first of the seeds: each picks the pause before play and where Tux starts"""
    players: tuple[Literal["policy", "skilled", "replay", "random", "always-right", "no-op"], ...] = closed_loop.PLAYERS
    """who plays; differences are the first one's minus each other's"""
    decode: Literal["threshold", "sample", "q"] = "threshold"
    """keys from probabilities: above the threshold; or drawn anew in each frame, without debounce; or the best of 16
    such draws by the Q head of iql_reflex.py --q-head"""
    max_hold: float = 10.0
    """as in live play: a key held for so many seconds goes up for one decision; 0 means never"""
    replay_session: Path = Path("sample_dataset/run_1")
    """session of the training data whose keys replay sends, and whose key rates random has: take the best one"""
    games: int = 3
    """how many games run side by side"""
    output: Path | None = None
    """folder that receives the results; None means <stem>_closed_loop_<level> beside the model"""
    overwrite: bool = False
    """replace the results that are there already"""


@dataclass(kw_only=True)
class Live(Args):
    """Play a window. Without --send-keys this is a dry run: it looks, decides and records, and presses nothing."""

    window: str = ""
    """part of the title of the game's window, in any case (X11); empty means the first monitor, for a dry run"""
    send_keys: bool = False
    """press keys; without it this is a dry run"""
    panic_key: str = "KEY_F12"
    """evdev name of a function key that ends the play at once"""
    resume_after: float = 2.0
    """the policy waits while you press keys, and plays on this many seconds after the last one"""
    max_seconds: float = 600.0
    """longest play; 0 means until something else ends it"""
    max_hold: float = 10.0
    """a key held for so many seconds goes up for one decision; 0 means never"""
    max_stale: float = 3.0
    """the play ends after so many seconds without a picture of the window; above 0"""
    max_still: float = 15.0
    """the play ends after so many seconds of one picture that stays the same; 0 means never"""
    fps: float | None = None
    """decisions per second; None takes the model's, and what differs from that by more than 10 % is refused"""
    input: Literal["auto", "x11", "pynput", "evdev"] = "auto"
    """where keys are heard and pressed: auto is x11 on Linux, pynput elsewhere; evdev uses the kernel's devices"""
    output: Path = Path("plays")
    """folder that receives the session's folder"""
    name: str = ""
    """name of the session's folder; empty means play_<time>"""
    crf: int = 27
    """x264 quality of the recording, 0 (lossless) to 51"""
    preset: Literal["ultrafast", "superfast", "veryfast", "fast", "medium"] = "veryfast"
    """x264 effort; it runs beside the decisions, in a thread of its own"""


# Axes: N decisions, K keys, G intents, T frames in a stack (oldest first), H W of the raw frame
RESULTS = ("preds.parquet", "metrics.json", "overlay.mp4")
Q_DRAWS = 16  # sets of keys that --decode q chooses from
RATE_TOLERANCE = 0.1  # a session whose rate is this share off the model's counts as equal


# ALGO LOGIC: the policy -----------------------------------------------------------------------------------------------
class DecisionRule:
    """Probabilities to keys held, one frame at a time. `active` (K,) bool are the keys held now.

    A key is wanted where its probability is above its threshold, and at most `max_keys` are, the most probable ones (0:
    no limit; of equals the first). It changes when what is wanted differed from what is held on `debounce` frames in a
    row.
    """

    def __init__(self, thresholds: np.ndarray, debounce: int = 2, max_keys: int = 4):
        self.thresholds, self.debounce, self.max_keys = thresholds, debounce, max_keys
        self.active = np.zeros(len(thresholds), bool)
        self.waiting = np.zeros(len(thresholds), int)  # frames in a row on which wanted and held differed

    def step(self, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the probabilities (K,) of a frame. Returns the keys to press and those to release, (K,) bool each."""
        wanted = probability > self.thresholds
        if self.max_keys:
            ranked = np.argsort(np.where(wanted, -probability, np.inf), kind="stable")
            wanted[ranked[self.max_keys :]] = False
        self.waiting = np.where(wanted != self.active, self.waiting + 1, 0)
        change = self.waiting >= self.debounce
        self.waiting[change] = 0
        self.active = self.active ^ change
        return change & self.active, change & ~self.active

    def settings(self) -> dict:
        """As they are written down; a threshold of None is a key that is never pressed."""
        thresholds = [float(t) if np.isfinite(t) else None for t in self.thresholds]
        return {"debounce": self.debounce, "max_keys": self.max_keys, "thresholds": thresholds}


class GoalRule:
    """The goal (1, G) that the network is told: zeros for none, or one-hot, of a fixed intent or of the network's own.

    With `stability` (0: the goal is fixed) an intent becomes the goal when the network named it on that many frames in
    a row; until the first has, there is none.
    """

    def __init__(self, n_intents: int, fixed: int | None = None, stability: int = 0):
        self.n_intents, self.fixed, self.stability = n_intents, fixed, stability
        self.reset()

    def reset(self):
        self.goal = np.zeros((1, self.n_intents), np.float32)
        if self.fixed is not None:
            self.goal[0, self.fixed] = 1
        self.named, self.frames = None, 0  # the last intent, and on how many frames in a row it was named

    def step(self, intent_logits: np.ndarray):
        """Take what the network named on a frame, (G,); the goal is that of the next frame."""
        named = int(intent_logits.argmax())
        self.frames = self.frames + 1 if named == self.named else 1
        self.named = named
        if self.stability and self.frames >= self.stability:
            self.goal[:] = 0
            self.goal[0, named] = 1


def goal_settings(args: Args) -> dict:
    """As they are written down."""
    return {name: getattr(args, name) for name in ("goal_intent", "auto_intent", "intent_stability")}


class Policy:
    """The exported network with its manifest. Raises ValueError or OSError naming the file that does not fit."""

    def __init__(self, model: Path, manifest: Path | None = None):
        manifest = manifest or model.with_name(f"{model.stem}_manifest.json")
        for path in (model, manifest):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing. Make it with: python export_reflex.py --checkpoint <run>")
        try:
            self.manifest = json.loads(manifest.read_text())
            pixels = self.manifest["inputs"]["pixels"]
            self.keys = self.manifest["outputs"]["keys_logits"]["keys"]
            self.fps, self.horizon = float(self.manifest["fps"]), int(self.manifest["horizon"]["frames"])
            self.thresholds = np.array(self.manifest["thresholds"], float)  # (K,)
            self.allowed = np.isin(self.keys, self.manifest["allowed_keys"])  # (K,) bool
            self.sha256 = self.manifest["model"]["sha256"]
            self.T = len(pixels["stack_order"])
            self.intents = self.manifest["inputs"].get("goal", {}).get("intents", [])  # G names, none without a goal
            if not len(self.keys) == len(self.thresholds) > 0:
                raise ValueError(f"{len(self.keys)} keys have {len(self.thresholds)} thresholds")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is no manifest of export_reflex.py: {error!r}. Export again") from None
        content = model.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(
                f"{manifest} belongs to another model than {model} (sha256). Export again, or name --manifest"
            )
        self.allowed &= ~np.isin(self.keys, MARKER_KEYS)  # those belong to the person at the desk
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the game needs the processor
        self.q: np.ndarray | None = None  # (2^K,) of the last frame, with a Q head; bit k of a set's number is key k
        self.pixels: np.ndarray | None = None  # (1, T, H, W, 3) uint8, the stack, oldest first
        self.goal_rule = GoalRule(len(self.intents))  # no goal
        self.goals: list[str | None] = []  # of each decision since the last reset; empty where the network takes none
        try:
            self.session = ort.InferenceSession(content, options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds
            raise ValueError(f"{model} does not load: {str(error).splitlines()[0]}. Export again") from None

    def reset(self):
        """Forget the frames seen: the next one is the first."""
        self.pixels, self.goals = None, []
        self.goal_rule.reset()

    def follow_goal(self, args: Args):
        """Play towards the goal that `args` ask for. Raises ValueError where that cannot be."""
        if args.intent_stability < 1 or (args.goal_intent and args.auto_intent):
            found = f"--goal-intent {args.goal_intent} --intent-stability {args.intent_stability}"
            found += " --auto-intent" * args.auto_intent
            raise ValueError(f"{found}: expected a fixed goal or --auto-intent, and 1 frame or more")
        if (args.goal_intent or args.auto_intent) and not self.intents:
            raise ValueError(
                f"{args.model} takes no goal, which --goal-intent and --auto-intent give it. Train with: "
                "iql_reflex.py --intents"
            )
        if args.goal_intent and args.goal_intent not in self.intents:
            raise ValueError(f"--goal-intent {args.goal_intent}: {args.model} knows {', '.join(self.intents)}")
        fixed = self.intents.index(args.goal_intent) if args.goal_intent else None
        self.goal_rule = GoalRule(len(self.intents), fixed, args.intent_stability if args.auto_intent else 0)

    def __call__(self, frame: np.ndarray) -> tuple[np.ndarray, float]:
        """The next raw frame (H, W, 3) uint8 RGB -> probability of each key (K,) float32, value. Before the first frame
        the first one is repeated, as in training."""
        if self.pixels is None:
            self.pixels = np.repeat(frame[None, None], self.T, axis=1)
        for t in range(self.T - 1):  # in place, as a fresh stack per frame costs its page faults
            self.pixels[0, t] = self.pixels[0, t + 1]
        self.pixels[0, -1] = frame
        logits, _, value, *further = self.run()  # Q or intents
        self.q = further[0][0] if further and not self.intents else None
        if self.intents:
            goal = self.goal_rule.goal[0]
            self.goals.append(self.intents[goal.argmax()] if goal.any() else None)
            self.goal_rule.step(further[0][0])
        return expit(logits[0]), float(value[0])

    def run(self) -> list[np.ndarray]:
        """Bare onnxruntime on the stack and the goal as they are."""
        inputs = {"pixels": self.pixels} | ({"goal": self.goal_rule.goal} if self.intents else {})
        return self.session.run(None, inputs)

    def decision_rule(self, args: Args) -> DecisionRule:
        """The rule that `args` ask for; keys that may not be sent are never wanted."""
        thresholds = self.thresholds if args.threshold is None else np.full(len(self.keys), args.threshold)
        return DecisionRule(np.where(self.allowed, thresholds, np.inf), args.debounce, args.max_keys)


# data: the frames of a session that the policy sees -------------------------------------------------------------------
def frames_at_rate(session: Session, n_frames: int, fps: float) -> np.ndarray:
    """Which of the first `n_frames` the policy sees: (N,) frame numbers, `fps` a second. All of them where the session
    has that rate; of a faster one those nearest in time to each tick. Raises ValueError for a slower one."""
    if abs(session.fps - fps) <= RATE_TOLERANCE * fps:
        return np.arange(n_frames)
    if session.fps < fps:
        raise ValueError(
            f"{session.folder} has {session.fps:g} frames a second, the model needs {fps:g}. Record it again with "
            f"record_session.py --fps {fps:g}, or train on sessions of {session.fps:g}"
        )
    times = session.timestamps[:n_frames]
    ticks = np.arange(times[0], times[-1] + 1, 1000 / fps)  # ms
    after = np.searchsorted(times, ticks).clip(1, n_frames - 1)
    return np.unique(np.where(ticks - times[after - 1] <= times[after] - ticks, after - 1, after))


def read_pictures(reader: VideoReader, frames: np.ndarray) -> Iterator[np.ndarray]:
    """The `frames` (N,) of a video, in order: (H, W, 3) uint8."""
    wanted = set(frames.tolist())
    for numbers, chunk in iter_frames(reader, 0, int(frames[-1]) + 1):
        for number, picture in zip(numbers, chunk.permute(0, 2, 3, 1).numpy(), strict=True):
            if number in wanted:
                yield picture


# evaluation -----------------------------------------------------------------------------------------------------------
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


def compare(active: np.ndarray, true: np.ndarray, before: np.ndarray, seed: int) -> tuple[dict, dict]:
    """Keys held by the policy against recorded ones: metrics with their baselines, and columns (K,) per key.

    active (N, K); true (N, K), recorded the horizon later, as in training; before (N, K), those last fully known."""
    part, always_on = np.zeros(len(true), int), np.ones_like(true)
    shifts = np.random.default_rng(seed).integers(1, max(2, len(true)), 100)
    random = [np.roll(active, shift, axis=0) for shift in shifts]  # ours, at another time: equal in rate and rhythm
    metrics = {
        "eval/key_f1": f1(active, true).mean(),
        "eval/key_f1_always_on": f1(always_on, true).mean(),
        "eval/key_f1_repeat_last": f1(before, true).mean(),
        "eval/key_f1_random": np.mean([f1(keys, true).mean() for keys in random]),
        "eval/onset_f1": event_f1(active, true, part, +1),
        "eval/onset_f1_repeat_last": event_f1(before, true, part, +1),
        "eval/onset_f1_random": np.mean([event_f1(keys, true, part, +1) for keys in random]),
        "eval/release_f1": event_f1(active, true, part, -1),
        "eval/release_f1_repeat_last": event_f1(before, true, part, -1),
        "eval/release_f1_random": np.mean([event_f1(keys, true, part, -1) for keys in random]),
        "eval/chatter": chatter(active, part).mean(),
        "eval/chatter_player": chatter(true, part).mean(),
    }
    per_key = {"rate_player": true.mean(0), "rate_policy": active.mean(0), "f1": f1(active, true)}
    per_key |= {"chatter_player": chatter(true, part), "chatter_policy": chatter(active, part)}
    per_key["agreement"] = (active == true).mean(0)
    return {name: float(metric) for name, metric in metrics.items()}, per_key


def evaluate(args: Eval) -> dict:
    """Play the model over a session and write the results folder. Returns what metrics.json holds."""
    try:
        if args.debounce < 1 or args.max_keys < 0 or not 0 <= (args.threshold or 0) <= 1:
            found = f"--debounce {args.debounce} --max-keys {args.max_keys} --threshold {args.threshold}"
            raise ValueError(f"{found}: expected at least 1, at least 0, and 0..1")
        if not args.session.name:  # "."
            args = dataclasses.replace(args, session=args.session.resolve())
        policy = Policy(args.model, args.manifest)
        policy.follow_goal(args)
        folders = find_sessions(args.session)
        if folders != [args.session]:
            raise ValueError(f"{args.session} holds {len(folders)} sessions. Name one: --session {folders[0]}")
        session, reader = load_session(args.session), VideoReader(args.session / "recording.mp4")
        n_frames = min(session.n_frames, reader.n_frames)
        frames = frames_at_rate(session, n_frames, policy.fps)  # (N,)
        N, h = len(frames), policy.horizon
        if N <= h + 1:
            raise ValueError(f"{args.session} has {N} frames to decide on, expected {h + 2} or more")
        output = args.output or args.model.with_name(f"{args.model.stem}_eval_{session.name}")
        check_output(output, args.overwrite)
        unfinished = output.with_name(f".{output.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    if n_frames < session.n_frames:
        print(f"{session.video} has {n_frames:,} frames for {session.n_frames:,} rows of frames.parquet: using these")
    if N < n_frames:
        print(
            f"warning: {args.session} has {session.fps:g} frames a second, the model was trained at {policy.fps:g}: of "
            f"{n_frames:,} frames the {N:,} nearest in time are used"
        )
    fps = policy.fps if N < n_frames else session.fps
    session = dataclasses.replace(session, fps=fps, timestamps=session.timestamps[frames])
    keys_any = key_table(session, policy.keys)[1]  # (N, K), down at any moment between a decision and the next

    try:
        # decide, frame by frame
        rule, rows, ms, video = policy.decision_rule(args), [], [], None
        pictures = tqdm(read_pictures(reader, frames), total=N, desc=session.name, unit="frame")
        for i, picture in enumerate(pictures):
            started = time.perf_counter()
            probability, value = policy(picture)
            pressed, released = rule.step(probability)
            ms.append(1000 * (time.perf_counter() - started))
            rows.append((probability, value, pressed, released, rule.active))
            if args.video:
                note = f"{session.name}  frame {frames[i]}  value {value:+.2f}  (player: {h} frames later)"
                caps = {"player": keys_any[min(i + h, N - 1)], "policy": rule.active}
                drawn = draw_keys(picture, policy.keys, caps, note)
                video = video or VideoWriter(unfinished / "overlay.mp4", fps, drawn.shape[1], drawn.shape[0], crf=23)
                video.add(drawn)
        if video:
            video.close()
        probability, value, pressed, released, active = (np.stack(column) for column in zip(*rows, strict=True))

        # compare with the keys recorded h frames later, as training does; the last h decisions have none
        true = keys_any[h:]  # (N - h, K)
        before = np.concatenate([np.zeros_like(keys_any[:1]), keys_any[:-1]])[: N - h]  # known at the decision
        metrics, per_key = compare(active[: N - h], true, before, args.seed)
        settings = rule.settings() | goal_settings(args)
        result = {
            "session": session.name,
            "model_sha256": policy.sha256,
            "frames": N,
            "frames_recorded": n_frames,
            "fps": fps,
            "frame_size": f"{reader.width}x{reader.height}",
            "horizon_frames": h,
            "settings": settings,
            "metrics": metrics,
            "agreement": float((active[: N - h] == true).mean()),
            "agreement_all_keys": float((active[: N - h] == true).all(1).mean()),
            "per_key": {
                key: {name: float(column[k]) for name, column in per_key.items()} for k, key in enumerate(policy.keys)
            },
            "ms_per_decision": {"p50": float(np.median(ms)), "p95": float(np.percentile(ms, 95))},
        }

        # write
        held = {"pressed": pressed, "released": released, "active": active}
        facts = {"model_sha256": policy.sha256, "settings": json.dumps(settings)}
        where = unfinished / "preds.parquet"
        write_decisions(where, policy.keys, frames, session.timestamps, held, probability, value, policy.goals, facts)
        write_json(unfinished / "metrics.json", result)
        replace_folder(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report(result, policy.keys)
    print(f"\nfiles  {output}: preds.parquet, metrics.json{', overlay.mp4' * args.video}")
    return result


def write_decisions(
    path: Path, keys: list[str], frames, timestamps, held: dict, probability, value, goals: list, facts: dict
):
    """`preds.parquet`, one row per decision: frame numbers and times in ms (N,), columns of `held` (N, K) bool as lists
    of names, probability (N, K), value (N,), `goals` (N,) or none, and `facts` as metadata."""
    names, lists = np.array(keys), pa.list_(pa.string())
    table = {"frame_idx": frames, "timestamp": timestamps}
    schema = [("frame_idx", pa.int64()), ("timestamp", pa.int64())]
    for name, rows in held.items():
        table[name] = [names[row].tolist() for row in rows]
        schema.append((name, lists))
    for k, key in enumerate(keys):
        table[f"probability_{key}"] = probability[:, k]
        schema.append((f"probability_{key}", pa.float32()))
    table["value"] = value
    schema.append(("value", pa.float32()))
    if goals:
        table["goal"] = goals
        schema.append(("goal", pa.string()))
    write_table(path, table, pa.schema(schema), facts)


def check_output(output: Path, overwrite: bool, names: tuple[str, ...] = RESULTS):
    """Raise ValueError where `output` holds something that must not be replaced, that is files other than `names`."""
    if not output.exists():
        return
    strange = sorted(p.name for p in output.iterdir() if p.name not in names) if output.is_dir() else ["a file"]
    if strange:
        raise ValueError(f"{output} is no results folder ({', '.join(strange[:3])}). Choose another --output")
    if not overwrite:
        raise ValueError(f"{output} is there already. Replace it with --overwrite, or choose another --output")


def replace_folder(new: Path, output: Path):
    """Put the finished folder in the place of `output`; the old one goes last."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.replace(output, old)
    os.replace(new, output)
    shutil.rmtree(old, ignore_errors=True)


def report(result: dict, keys: list[str]):
    """The figures for the terminal."""
    print(f"\n{'key':<16}{'player':>8}{'policy':>8}{'F1':>7}{'agreement':>11}   flips a frame, player and policy")
    for key in keys:
        row = result["per_key"][key]
        cells = f"{key:<16}{row['rate_player']:>8.1%}{row['rate_policy']:>8.1%}{row['f1']:>7.2f}"
        print(f"{cells}{row['agreement']:>11.1%}   {row['chatter_player']:.3f} {row['chatter_policy']:.3f}")
    print(f"\n{'F1':<16}{'policy':>8}{'random':>8}{'repeat last':>13}{'always on':>11}")
    for group in ("key", "onset", "release"):
        names = ("", "_random", "_repeat_last", "_always_on")
        cells = [result["metrics"].get(f"eval/{group}_f1{name}") for name in names]
        cells = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        print(f"{group:<16}{cells[0]:>8}{cells[1]:>8}{cells[2]:>13}{cells[3]:>11}")
    ms = result["ms_per_decision"]
    print(
        f"\nall keys as recorded on {result['agreement_all_keys']:.1%} of {result['frames']:,} decisions; "
        f"{ms['p50']:.1f} ms a decision on frames of {result['frame_size']} (p95 {ms['p95']:.1f})"
    )


# live: decisions ------------------------------------------------------------------------------------------------------
class Decision(NamedTuple):
    """One decision. Times are CLOCK_MONOTONIC ns, in the order in which they come."""

    due: int  # the tick it belongs to
    started: int  # the grab began
    taken: int  # the moment that the picture shows
    captured: int  # the picture was ready
    inferred: int  # the probabilities were
    decided: int  # the keys were, and may be sent
    sent: int  # they had arrived
    grabbed: bool  # otherwise the last picture was used again
    still: bool  # the picture looks like the last one
    probability: np.ndarray  # (K,) float32
    value: float
    pressed: np.ndarray  # (K,) bool, by the rule
    released: np.ndarray
    active: np.ndarray
    held: frozenset[str]  # the keys that were down after it


class LiveRunner:
    """Decides at the ticks of `fps`, on the newest picture: grab, policy, rule, keys. What comes late leaves ticks out.

    `policy(frame)` gives probabilities (K,) and a value, `rule.step` the keys. Without a keyboard it is a dry run.
    `may_send()` is asked right before keys go out; where it says no, all are released. Keys outside `allowed` (K,) bool
    never go out, and one held for `max_hold_s` (0: any time) goes up for one decision. The rule knows nothing of all
    this, so that it decides as in `eval`.
    """

    def __init__(
        self,
        policy: Callable[[np.ndarray], tuple[np.ndarray, float]],
        rule: DecisionRule,
        keys: list[str],
        allowed: np.ndarray,
        screen: desktop.Screen,
        keyboard: desktop.Sender | None,
        fps: float,
        max_hold_s: float = 0.0,
        may_send: Callable[[], bool] = lambda: True,
    ):
        self.policy, self.rule, self.names, self.allowed = policy, rule, np.array(keys), allowed
        self.screen, self.keyboard, self.may_send = screen, keyboard, may_send
        self.period_ns, self.max_hold_ns = round(1e9 / fps), round(max_hold_s * 1e9) or math.inf
        self.start_ns, self.tick, self.dropped = None, 0, 0
        self.since: dict[str, int] = {}  # key down -> when it was pressed
        self.last: np.ndarray | None = None  # (H, W, 3), the last picture

    def until_due(self) -> float:
        """Seconds until the next tick, below 0 where it is late. The first one is now."""
        now = time.monotonic_ns()
        self.start_ns = self.start_ns or now
        return (self.start_ns + self.tick * self.period_ns - now) / 1e9

    def step(self, picture: np.ndarray) -> Decision:
        """Decide, with room for the picture in `picture`, uint8 (H, W, 3). Call it when `until_due` is 0."""
        due = self.start_ns + self.tick * self.period_ns
        started = time.monotonic_ns()
        image, taken = self.screen.grab(picture)
        if image is None and self.last is not None:
            picture[:] = self.last
        captured = time.monotonic_ns()
        probability, value = self.policy(picture)
        inferred = time.monotonic_ns()
        pressed, released = self.rule.step(probability)
        wanted = set(self.names[self.rule.active & self.allowed].tolist())
        wanted -= {name for name, ns in self.since.items() if inferred - ns >= self.max_hold_ns}
        wanted = wanted if self.may_send() and self.keyboard else set()
        decided = time.monotonic_ns()
        if self.keyboard:
            self.keyboard.hold(wanted)
        sent = time.monotonic_ns()

        # what needs no haste
        self.since = {name: self.since.get(name, sent) for name in wanted}
        still = self.last is not None and np.array_equal(picture[::4, ::4], self.last[::4, ::4])
        self.last = np.empty_like(picture) if self.last is None else self.last
        self.last[:] = picture
        next_tick = max(self.tick + 1, (time.monotonic_ns() - self.start_ns) // self.period_ns)
        self.dropped, self.tick = self.dropped + next_tick - self.tick - 1, next_tick
        times = (due, started, taken, captured, inferred, decided, sent)
        active = self.rule.active.copy()
        return Decision(
            *times, image is not None, still, probability, value, pressed, released, active, frozenset(wanted)
        )


class Recorder:
    """Writes the session in a thread of its own, so that encoding makes no decision late. `error`: what went wrong."""

    def __init__(self, folder: Path, fps: float, width: int, height: int, args: Live, keys: list[str], facts: dict):
        self.writer = SessionWriter(folder, fps, width, height, keys, facts)
        self.video = VideoWriter(folder / "recording.mp4", fps, width, height, args.crf, args.preset)
        self.shape, self.spare = (height, width, 3), max(8, 2**28 // (3 * width * height))  # 256 MiB of pictures
        self.free, self.work, self.error = queue.SimpleQueue(), queue.SimpleQueue(), None
        self.first_ns, self.n_frames, self.repeated = None, 0, 0
        self.thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self.thread.start()

    def room(self) -> np.ndarray:
        """Room for a picture, used again when the last one in it is written. Raises RuntimeError where none is left."""
        if self.error is not None:
            raise RuntimeError(f"the recording failed ({self.error}), so the play was ended")
        try:
            return self.free.get_nowait()
        except queue.Empty:
            self.spare -= 1
        if self.spare < 0:
            raise RuntimeError("encoding cannot keep up with the play. Use --preset ultrafast, or a smaller window")
        return np.empty(self.shape, np.uint8)

    def frame(self, picture: np.ndarray, now_ns: int, repeated: bool):
        self.first_ns = self.first_ns or now_ns
        self.n_frames, self.repeated = self.n_frames + 1, self.repeated + repeated
        self.work.put((picture, now_ns, repeated))

    def key(self, now_ns: int, name: str, state: str, source: str):
        self.work.put((now_ns, name, state, source))

    def _write(self):
        try:
            while (item := self.work.get()) is not None:
                if len(item) == 4:
                    self.writer.key(*item)
                    continue
                picture, now_ns, repeated = item
                self.video.add(picture, now_ns - self.first_ns)
                self.writer.frame(now_ns, repeated)
                self.free.put(picture)
        except Exception as error:  # a full disk, as a rule
            self.error = error

    def close(self, **facts):
        """Finish the files. `facts` join the metadata. Raises what went wrong in the thread."""
        self.work.put(None)
        self.thread.join()
        self.writer.metadata |= {"repeated": self.repeated} | facts
        try:
            self.video.close()
        finally:
            self.writer.close()
        if self.error is not None:
            raise self.error


# live: safety ---------------------------------------------------------------------------------------------------------
class Guard:
    """Says whether keys may be sent now, and in `why` what ends the play.

    A key that is heard and was not sent by us is a person's: sending waits until `args.resume_after` seconds after the
    last one. `begin` starts a look at the window, which runs beside the policy and is read in `may_send`.
    """

    def __init__(self, args: Live, window, screen, listener, keyboard, recorder: Recorder):
        self.args, self.window, self.screen, self.listener = args, window, screen, listener
        self.keyboard, self.recorder, self.ledger = keyboard, recorder, desktop.Ledger(keyboard)
        self.why, self.person_ns, self.presses, self.written = "", -math.inf, 0, 0
        self.persons = set(listener.held)  # keys that a person holds
        self.rows: dict[str, str] = {}  # key whose last row is no release -> its source
        self.names: set[str] = set()  # of the game's keys that were pressed
        self.size, self.thread, self.look = screen.region[2:], ThreadPoolExecutor(1), None
        self.stale_since = self.still_since = None

    def begin(self):
        if self.window:
            self.look = self.thread.submit(lambda: (self.window.region(), self.window.shown(), self.window.focused()))

    def may_send(self) -> bool:
        self.listen()
        if not self.listener.thread.is_alive():
            self.why = self.why or "the X server ended"
        elif self.look:
            region, shown, focused = self.look.result()
            if region is None:
                self.why = self.why or "the window was closed"
            elif region[2:] != self.size:
                self.why = self.why or f"the window became {region[2]}x{region[3]}"
            elif not (shown and focused):
                self.why = self.why or "the window lost the focus"
            else:
                self.screen.region = region  # it may have moved
        return not self.why and not self.paused()

    def paused(self) -> bool:
        return bool(self.persons) or time.monotonic_ns() - self.person_ns < self.args.resume_after * 1e9

    def listen(self):
        """Sort what was heard into ours and a person's, and write a person's keys down."""
        for now_ns, name, state in self.listener.drain():
            if self.ledger.is_ours(now_ns, name, state):
                continue
            self.person_ns, self.presses = time.monotonic_ns(), self.presses + (state == "down")
            (self.persons.discard if state == "up" else self.persons.add)(name)
            if name == self.args.panic_key:
                self.why = self.why or "the panic key"
            elif state != "up" or name in self.rows:
                self.row(now_ns, name, state, "human")
        self.persons &= self.listener.held

    def row(self, now_ns: int, name: str, state: str, source: str):
        self.recorder.key(now_ns, name, state, source)
        self.names |= {name} - set(MARKER_KEYS)
        if state == "up":
            self.rows.pop(name, None)
        else:
            self.rows[name] = source

    def begin_rows(self, now_ns: int):
        """Keys that a person holds already go down with the first frame."""
        for name in sorted(self.persons - self.rows.keys() - {self.args.panic_key}):
            self.row(now_ns, name, "down", "human")

    def note(self):
        """Write our keys down; after each `hold`."""
        if self.keyboard:
            self.ledger.note()
            for now_ns, name, state in self.keyboard.sent[self.written :]:
                self.row(now_ns, name, state, "policy")
            self.written = len(self.keyboard.sent)

    def wait(self, runner: LiveRunner):
        """Until the next tick. A person's key releases ours at once, not at the next decision."""
        while not self.why and (left := runner.until_due()) > 0:
            self.listener.wait(left)
            self.listen()
            if self.keyboard and self.keyboard.held and (self.why or self.paused()):
                self.keyboard.hold(set())
                self.note()

    def judge(self, decision: Decision):
        """End the play where there was no new picture for too long."""
        self.stale_since = None if decision.grabbed else self.stale_since or decision.due
        self.still_since = None if decision.grabbed and not decision.still else self.still_since or decision.due
        if self.stale_since and decision.sent - self.stale_since >= self.args.max_stale * 1e9:
            self.why = self.why or f"no picture could be taken for {self.args.max_stale:g} s: {self.screen.failure}"
        elif self.still_since and 0 < self.args.max_still * 1e9 <= decision.sent - self.still_since:
            self.why = self.why or f"the picture did not change for {self.args.max_still:g} s"

    def close(self):
        """After the keyboard was closed: what is still down goes up in the session."""
        self.note()
        self.listener.close()
        self.listen()
        now = time.monotonic_ns()
        for name, source in sorted(self.rows.items()):
            self.row(now, name, "up", source)
        self.thread.shutdown()


# live: the loop -------------------------------------------------------------------------------------------------------
def live(args: Live) -> dict:
    """Play a window until something ends it. Returns what latency.json holds."""
    for name in ("SIGTERM", "SIGHUP"):  # before the play begins they end us as Ctrl-C does
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    folder, decisions = args.output / (args.name or time.strftime("play_%Y-%m-%d_%H-%M-%S")), []
    if folder.exists():
        raise SystemExit(f"{folder} is there already and is never overwritten. Choose another --name")
    try:
        check_live(args)
        policy = Policy(args.model, args.manifest)
        policy.follow_goal(args)
        fps = policy.fps if args.fps is None else args.fps
        if abs(fps - policy.fps) > RATE_TOLERANCE * policy.fps:
            raise ValueError(
                f"--fps {fps:g}: the model was trained at {policy.fps:g} frames a second, at another rate motion looks "
                "faster or slower to it. Leave --fps out, or train on sessions of that rate"
            )
        why, facts, bare_ms, dropped = play(args, policy, fps, folder, decisions)
        if not decisions:
            raise ValueError(f"ended ({why}) before the first decision")
    except (RuntimeError, ValueError, OSError, ImportError, KeyboardInterrupt) as error:
        if not decisions:
            shutil.rmtree(folder, ignore_errors=True)
        kept = f"{len(decisions)} frames are in {folder}" if decisions else "Nothing was played"
        raise SystemExit(f"{str(error).rstrip('.') or 'stopped'}. {kept}") from None

    # what was decided, and when
    columns = Decision(*map(np.array, zip(*decisions, strict=True)))
    held = {"pressed": columns.pressed, "released": columns.released, "active": columns.active}
    held["sent"] = np.array([np.isin(policy.keys, list(keys)) for keys in columns.held])  # (N, K)
    times, frames = load_session(folder).timestamps, np.arange(len(decisions))
    path = folder / "preds.parquet"
    goals = policy.goals[: len(decisions)]
    write_decisions(path, policy.keys, frames, times, held, columns.probability, columns.value, goals, facts)
    result = {"session": str(folder), "ended": why, "dry_run": not args.send_keys, **facts, "fps": fps}
    result |= latency(columns, bare_ms, fps, dropped)
    write_json(folder / "latency.json", result)
    draw_latency(columns, bare_ms, fps, folder / "latency.png")
    report_latency(result)
    print(f"\nfiles  {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return result


def check_live(args: Live):
    """Raises ValueError for flags that cannot be met."""
    if args.debounce < 1 or args.max_keys < 0 or not 0 <= (args.threshold or 0) <= 1 or not 0 <= args.crf <= 51:
        found = f"--debounce {args.debounce} --max-keys {args.max_keys} --threshold {args.threshold} --crf {args.crf}"
        raise ValueError(f"{found}: expected at least 1, at least 0, 0..1, and 0 to 51")
    if min(args.resume_after, args.max_seconds, args.max_hold, args.max_still) < 0 or args.max_stale <= 0:
        found = f"--resume-after {args.resume_after:g} --max-seconds {args.max_seconds:g} --max-hold {args.max_hold:g}"
        found += f" --max-still {args.max_still:g} --max-stale {args.max_stale:g}"
        raise ValueError(f"{found}: expected 0 or more, and --max-stale above 0")
    if args.panic_key not in MARKER_KEYS or args.panic_key == WIN_KEY:
        raise ValueError(f"--panic-key {args.panic_key}: expected a key that no game plays with, such as KEY_F12")
    if args.window and sys.platform != "linux":
        raise ValueError(f"--window {args.window!r}: windows are found on X11 only. Leave it out to play the screen")
    if args.send_keys and not args.window and sys.platform == "linux":
        raise ValueError("--send-keys needs --window, as keys go out only while that has the focus. Name the game's")


def play(args: Live, policy: Policy, fps: float, folder: Path, decisions: list[Decision]):
    """Fills `decisions`. Returns why it ended, facts for the files, times of bare onnxruntime in ms, ticks left out.
    Whatever happens, the keys are released first."""
    kind = args.input if args.input != "auto" else "x11" if sys.platform == "linux" else "pynput"
    window = desktop.Window(None, args.window) if args.window else None
    screen = desktop.Screen(None, window.region() if window else None)
    picture, _ = screen.grab()
    if picture is None:
        raise ValueError(f"nothing can be grabbed at {screen.region}: {screen.failure}. Bring all of it on screen")
    H, W = (length // 2 * 2 for length in picture.shape[:2])  # yuv420p needs even ones
    names = np.array(policy.keys)[policy.allowed].tolist()
    keyboard = watchdog = listener = recorder = guard = runner = bar = None
    why, bare_ms, switch_s = "", [], sys.getswitchinterval()
    rule = policy.decision_rule(args)
    facts = {"model_sha256": policy.sha256, "settings": json.dumps(rule.settings() | goal_settings(args))}
    with StopSignal() as stop:
        if hasattr(signal, "SIGHUP"):  # the terminal was closed
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            listener = {
                "x11": desktop.KeyListener, "evdev": desktop.EvdevListener, "pynput": desktop.PynputListener,
            }[kind]()  # fmt: skip
            if args.send_keys and kind == "x11":
                watchdog = desktop.Watchdog(None, names, max(2.0, 3 / fps))
            for _ in range(3):  # the first runs are slower
                policy(picture[:H, :W])
            policy.reset()
            title = window.title if window else "the screen"
            said = ", ".join(name.removeprefix("KEY_") for name in names)
            print(f"{title}, {W}x{H}, {fps:g} decisions a second, keys {said}, into {folder}")
            panic = args.panic_key.removeprefix("KEY_")
            if args.send_keys:
                print(f"{panic} or Ctrl-C ends it; any key of yours makes it wait {args.resume_after:g} s", flush=True)
            else:
                print(f"dry run, no key is pressed: add --send-keys to play. {panic} or Ctrl-C ends it", flush=True)

            # wait until the window has the focus
            while not why and window and not window.focused():
                print(f"click into {title} to begin", end="\r", flush=True)
                listener.wait(0.1)
                pressed = {name for _, name, state in listener.drain() if state == "down"}
                why = "a signal" if stop else "the panic key" if args.panic_key in pressed else ""
                why = why or ("" if window.region() else "the window was closed")
            if why:
                return why, facts, bare_ms, 0
            listener.drain()
            screen.region = window.region() if window else screen.region  # it may have moved
            if screen.region is None or screen.region[2:] != (picture.shape[1], picture.shape[0]):
                raise ValueError(f"{title} was closed or has changed its size. Start again")
            if watchdog:
                watchdog.wait_ready()
            if args.send_keys:
                senders = {"evdev": desktop.UinputKeyboard, "pynput": desktop.PynputKeyboard}
                keyboard = senders[kind]() if kind in senders else desktop.Keyboard(None)

            # play
            folder.mkdir(parents=True)
            told = facts | {"window": title, "platform": sys.platform, "dry_run": str(not args.send_keys).lower()}
            told |= {"resume_after": f"{args.resume_after:g}"}
            recorder = Recorder(folder, fps, W, H, args, policy.keys, told)
            guard = Guard(args, window, screen, listener, keyboard, recorder)
            runner = LiveRunner(
                policy, rule, policy.keys, policy.allowed, screen, keyboard, fps, args.max_hold, guard.may_send
            )
            gc.collect()
            gc.freeze()  # a full collection in play would take longer than a decision
            sys.setswitchinterval(5e-4)  # s; a decision that waits for another thread of ours waits a tenth as long
            n_ticks = round(args.max_seconds * fps) or math.inf
            bar = tqdm(total=n_ticks if args.max_seconds else None, unit="decision", desc=folder.name, mininterval=0.5)
            while True:
                guard.wait(runner)
                if stop or guard.why or runner.tick >= n_ticks:
                    break
                if watchdog:
                    watchdog.beat()
                picture = recorder.room()
                guard.begin()
                decision = runner.step(picture)
                if not decisions:
                    guard.begin_rows(decision.taken)
                guard.note()
                if guard.why:  # the picture may show another window
                    break
                recorder.frame(picture, decision.taken, not decision.grabbed)
                decisions.append(decision)
                guard.judge(decision)
                # bare onnxruntime in the same conditions, where there is time for it
                spent_ns = decision.inferred - decision.captured
                if len(decisions) % 5 == 0 and runner.until_due() * 1e9 > 3 * spent_ns:
                    started = time.perf_counter()
                    policy.run()
                    bare_ms.append(1000 * (time.perf_counter() - started))
                bar.update(1)
                held = " ".join(sorted(name.removeprefix("KEY_") for name in decision.held))
                state = "wait for you" if guard.paused() else held or "-"
                bar.set_postfix_str(f"left out {runner.dropped}, keys {state}", refresh=False)
            return "a signal" if stop else guard.why or "the time is up", facts, bare_ms, runner.dropped
        except KeyboardInterrupt:  # a second signal
            return "a signal", facts, bare_ms, runner.dropped if runner else 0
        except ConnectionError:
            if not decisions:
                raise
            return "the X server ended", facts, bare_ms, runner.dropped
        finally:
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a further one would cut off what follows
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), signal.SIG_IGN)
            try:
                if keyboard:
                    keyboard.close()
            finally:
                if watchdog:
                    watchdog.close(released=keyboard is None or not keyboard.held)
            gc.unfreeze()
            sys.setswitchinterval(switch_s)
            if runner:
                if bar is not None:
                    bar.close()
                guard.close()
                played = {"dropped": runner.dropped, "presses_of_person": guard.presses}
                recorder.close(keys=json.dumps(sorted(set(policy.keys) | guard.names)), **played)
            elif listener:
                listener.close()
            screen.close()


# live: how long it took -----------------------------------------------------------------------------------------------
STAGES = {  # name: from, to
    "capture": ("started", "captured"),
    "inference": ("captured", "inferred"),
    "rule and checks": ("inferred", "decided"),
    "send": ("decided", "sent"),
    "end to end": ("started", "sent"),
    "tick to sent": ("due", "sent"),
}


def stage_times(columns: Decision, bare_ms: list[float]) -> dict[str, np.ndarray]:
    """Times in ms of each stage, of `columns`, a Decision of arrays (N,). Sending counts where keys changed."""
    ms = {name: (getattr(columns, to) - getattr(columns, first)) / 1e6 for name, (first, to) in STAGES.items()}
    before = [frozenset(), *columns.held[:-1]]
    ms["send"] = ms["send"][[now != last for now, last in zip(columns.held, before, strict=True)]]
    ms["bare onnxruntime"] = np.array(bare_ms)
    return {name: times for name, times in ms.items() if len(times)}


def latency(columns: Decision, bare_ms: list[float], fps: float, dropped: int) -> dict:
    """What latency.json holds of the times: percentiles in ms per stage, and counts."""
    ms = stage_times(columns, bare_ms)
    rows = {
        name: {f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)} | {"max": float(np.max(times))}
        for name, times in ms.items()
    }
    late, N = ms["tick to sent"] >= 1000 / fps, len(columns.due)
    seconds = (columns.sent[-1] - columns.due[0]) / 1e9
    bare = rows.get("bare onnxruntime", {}).get("p50")
    return {
        "decisions": N,
        "seconds": float(seconds),
        "within_frame": float(1 - late.mean()),
        "late": int(late.sum()),
        "left_out": int(dropped),
        "stale": int((~columns.grabbed).sum()),
        "still": int(columns.still.sum()),
        "end_to_end_over_bare": rows["end to end"]["p50"] / bare if bare else None,
        "ms": rows,
    }


def report_latency(result: dict):
    """The table for the terminal."""
    kind = "dry run" if result["dry_run"] else "play"
    print(f"\n{kind} ended: {result['ended']}, after {result['decisions']:,} decisions in {result['seconds']:.1f} s")
    print(f"\n{'ms':<18}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}")
    for name, row in result["ms"].items():
        print(f"{name:<18}" + "".join(f"{row[q]:>8.2f}" for q in ("p50", "p90", "p99", "max")))
    over = result["end_to_end_over_bare"]
    print(
        f"\n{result['within_frame']:.1%} of the decisions inside their own frame: {result['late']} late, "
        f"{result['left_out']} ticks left out, {result['stale']} without a new picture, {result['still']} on a picture "
        f"that had not changed" + (f"; end to end takes {over:.2f} times bare onnxruntime" if over else "")
    )


def draw_latency(columns: Decision, bare_ms: list[float], fps: float, path: Path):
    """Left the share of decisions below a time, right every decision of the play."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    shares, play = figure.subplots(1, 2)
    ms = stage_times(columns, bare_ms)
    for name, times in ms.items():
        style = "--" if name == "bare onnxruntime" else "-"
        shares.plot(np.sort(times), np.arange(1, len(times) + 1) / len(times), style, label=name)
    shares.set(xscale="log", xlabel="ms", ylabel="share of decisions below", ylim=(0, 1))
    shares.legend(fontsize="small")
    seconds = (columns.due - columns.due[0]) / 1e9
    play.plot(seconds, ms["tick to sent"], ".", markersize=3, label="tick to sent")
    play.axhline(1000 / fps, color="black", linewidth=0.8, label="next frame")
    play.set(yscale="log", xlabel="s of play", ylabel="ms")
    play.legend(fontsize="small")
    for axes in (shares, play):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


# closed loop ----------------------------------------------------------------------------------------------------------
class PolicyPlayer:
    """The policy as a player of supertux_env.closed_loop."""

    def __init__(self, args: ClosedLoop, terrain=None, seed: int = 0):
        self.policy = Policy(args.model, args.manifest)
        self.policy.follow_goal(args)
        if args.decode == "q" and "q" not in self.policy.manifest["outputs"]:
            raise ValueError(f"{args.model} has no Q head, which --decode q asks. Train with: iql_reflex.py --q-head")
        self.rule, self.names = self.policy.decision_rule(args), np.array(self.policy.keys)
        self.decode, self.rng = args.decode, np.random.default_rng(seed)
        if args.decode != "threshold":
            self.rule.debounce = 1
        self.max_hold_s, self.since = args.max_hold or math.inf, {}  # key down -> when it was pressed
        self.policy(np.zeros((480, 640, 3), np.uint8))  # the first run of a network is slow
        self.policy.reset()

    def step(self, frame: np.ndarray, position, time_s: float) -> Iterator[tuple[float, set[str]]]:
        """The keys to hold from this frame (H, W, 3) on. Where Tux is it does not look."""
        probability, _ = self.policy(frame)
        if self.decode == "sample":  # a key goes down with its probability
            self.rule.thresholds = np.where(self.policy.allowed, self.rng.random(len(probability)), np.inf)
        if self.decode == "q":
            draws = self.rng.random((Q_DRAWS, len(probability))) < np.where(self.policy.allowed, probability, 0)
            if self.rule.max_keys:
                draws[draws.sum(1) > self.rule.max_keys] = False  # no key rather than some of them
            best = self.policy.q[draws @ 2 ** np.arange(len(probability))].argmax()
            self.rule.thresholds, probability = np.where(self.policy.allowed, 0.5, np.inf), draws[best].astype(float)
        self.rule.step(probability)
        wanted = set(self.names[self.rule.active].tolist())
        wanted -= {name for name, pressed_s in self.since.items() if time_s - pressed_s >= self.max_hold_s}
        self.since = {name: self.since.get(name, time_s) for name in wanted}
        yield 0.0, wanted


def play_closed_loop(args: ClosedLoop) -> dict:
    """Play all episodes and write the results folder. Returns what closed_loop.json holds, without the episodes."""
    started = time.monotonic()
    try:
        if args.debounce < 1 or args.max_keys < 0 or not 0 <= (args.threshold or 0) <= 1:
            found = f"--debounce {args.debounce} --max-keys {args.max_keys} --threshold {args.threshold}"
            raise ValueError(f"{found}: expected at least 1, at least 0, and 0..1")
        if not args.max_hold >= 0:
            raise ValueError(f"--max-hold {args.max_hold:g}: expected 0 seconds or more")
        if args.decode != "threshold" and args.threshold is not None:
            raise ValueError(
                f"--threshold {args.threshold} means nothing to --decode {args.decode}. Leave one of them out"
            )
        if args.episodes < 2 or args.games < 1 or args.seed < 0 or len(set(args.players)) < max(1, len(args.players)):
            found = f"--episodes {args.episodes} --games {args.games} --seed {args.seed} --players {args.players}"
            raise ValueError(f"{found}: expected 2 or more, 1 or more, 0 or more, and each player once")
        policy = PolicyPlayer(args).policy
        makers = {"policy": partial(PolicyPlayer, args)}
        makers |= closed_loop.baselines(load_session(args.replay_session), policy.fps)
        players = {name: makers[name] for name in args.players}
        if "skilled" in players:
            closed_loop.frame_step(policy.fps)
        closed_loop.level_variants(args.level)
        for program in ("supertux2", "Xvfb"):
            find_program(program)
        output = args.output or args.model.with_name(f"{args.model.stem}_closed_loop_{args.level.replace(':', '_')}")
        check_output(output, args.overwrite, closed_loop.RESULTS)
        unfinished = output.with_name(f".{output.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None

    seeds = list(range(args.seed, args.seed + args.episodes))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: games and X servers are stopped first
    try:
        with tempfile.TemporaryDirectory(prefix="closed_loop_") as name:
            recorded = Path(name)
            videos = {"policy": recorded} if "policy" in players else {}
            episodes = closed_loop.play_episodes(players, args.level, seeds, policy.fps, args.games, videos)
            mine = [episode for episode in episodes if episode["player"] == "policy"]
            mine.sort(key=lambda episode: (-episode["progress"], episode["seconds"]))
            for title, episode in (("best", mine[0]), ("median", mine[len(mine) // 2])) if mine else ():
                source = recorded / f"{episode['seed']}.mp4"
                closed_loop.draw_video(episode, source, unfinished / f"{title}.mp4", policy.keys, policy.fps)
        settings = {"decode": args.decode, "debounce": args.debounce, "max_keys": args.max_keys}
        settings |= {
            "threshold": args.threshold,
            "max_hold": args.max_hold,
            **goal_settings(args),
            "replay_session": str(args.replay_session),
            "games": args.games,
        }
        facts = write_provenance(unfinished, [args.model])
        result = {"level": args.level, "model_sha256": policy.sha256, "fps": policy.fps, "settings": settings}
        result |= {"commit": facts["commit"], "command": facts["command"], "minutes": (time.monotonic() - started) / 60}
        result |= closed_loop.summarise(episodes, policy.fps)
        rows = [{name: e[name] for name in e if name not in closed_loop.PER_DECISION} for e in episodes]
        write_json(unfinished / "closed_loop.json", result | {"episodes": rows})
        closed_loop.draw_figure(episodes, result, unfinished / "closed_loop.png", args.level)
        replace_folder(unfinished, output)
    except (RuntimeError, OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"{str(error).rstrip('.') or 'stopped'}. Nothing was written.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    closed_loop.report(result)
    print(f"\nfiles  {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return result


# main -----------------------------------------------------------------------------------------------------------------
COMMANDS = {"eval": Eval, "live": Live, "closed-loop": ClosedLoop}


def main(args: Eval | Live | ClosedLoop) -> dict:
    commands = {Eval: evaluate, Live: live, ClosedLoop: play_closed_loop}
    return commands[type(args)](args)


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict(COMMANDS))
