"""An exported reflex policy at play: what it would have pressed over a recorded session.

`eval` shows the model of `export_reflex.py` a session frame by frame, raw and one at a time as a live game would, turns
its probabilities into keys with the rule that playing uses, and compares them with the keys that were recorded.
No labels are needed. Page: docs/play_reflex.md

    python play_reflex.py eval --model reflex.onnx --session sample_dataset/heldout_1

In: reflex.onnx, reflex_manifest.json, a session. Out: <stem>_eval_<session>/ with preds.parquet, metrics.json,
overlay.mp4.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import tyro
from scipy.special import expit
from tqdm import tqdm

from common.runs import write_json
from common.sessions import MARKER_KEYS, Session, find_sessions, key_table, load_session, write_table
from common.video import VideoReader, VideoWriter, draw_keys, iter_frames


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


# Axes: N decisions, K keys, T frames in a stack (oldest first), H W of the raw frame
RESULTS = ("preds.parquet", "metrics.json", "overlay.mp4")
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
            self.stack = deque(maxlen=len(pixels["stack_order"]))
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
        try:
            self.session = ort.InferenceSession(content, options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds
            raise ValueError(f"{model} does not load: {str(error).splitlines()[0]}. Export again") from None

    def reset(self):
        """Forget the frames seen: the next one is the first."""
        self.stack.clear()

    def __call__(self, frame: np.ndarray) -> tuple[np.ndarray, float]:
        """The next raw frame (H, W, 3) uint8 RGB -> probability of each key (K,) float32, value. Before the first frame
        the first one is repeated, as in training."""
        if not self.stack:
            self.stack.extend([frame] * self.stack.maxlen)
        self.stack.append(frame)
        logits, _, value = self.session.run(None, {"pixels": np.stack(self.stack)[None]})  # (1, T, H, W, 3)
        return expit(logits[0]), float(value[0])

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
        thresholds = [t if np.isfinite(t) else None for t in rule.thresholds]  # None: never pressed
        settings = {"debounce": args.debounce, "max_keys": args.max_keys, "thresholds": thresholds}
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
        names, lists = np.array(policy.keys), pa.list_(pa.string())
        table = {"frame_idx": frames, "timestamp": session.timestamps}
        schema = [("frame_idx", pa.int64()), ("timestamp", pa.int64())]
        for name, keys in (("pressed", pressed), ("released", released), ("active", active)):
            table[name] = [names[row].tolist() for row in keys]
            schema.append((name, lists))
        for k, key in enumerate(policy.keys):
            table[f"probability_{key}"] = probability[:, k]
            schema.append((f"probability_{key}", pa.float32()))
        table["value"] = value
        schema.append(("value", pa.float32()))
        facts = {"model_sha256": policy.sha256, "settings": json.dumps(settings)}
        write_table(unfinished / "preds.parquet", table, pa.schema(schema), facts)
        write_json(unfinished / "metrics.json", result)
        replace_folder(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report(result, policy.keys)
    print(f"\nfiles  {output}: preds.parquet, metrics.json{', overlay.mp4' * args.video}")
    return result


def check_output(output: Path, overwrite: bool):
    """Raise ValueError where `output` holds something that must not be replaced."""
    if not output.exists():
        return
    strange = sorted(p.name for p in output.iterdir() if p.name not in RESULTS) if output.is_dir() else ["a file"]
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


# main -----------------------------------------------------------------------------------------------------------------
COMMANDS = {"eval": Eval}


def main(args: Eval) -> dict:
    return evaluate(args)


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict(COMMANDS))
