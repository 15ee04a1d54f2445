"""Label recorded sessions: where the player died or won, which frames belong to an attempt, what followed each frame.

Deaths are found by matching the game's death sprites with every frame (masked zero-mean NCC at half size), wins by the
marker key that the player pressed. An episode ends at a death or a win; its frames get discounted returns.

    python precompute_labels.py --data-dir sample_dataset

Reads recording.mp4, frames.parquet, inputs.parquet of every session; writes events.parquet, episodes.parquet and
returns.parquet beside them, all three or none. With --truth it compares the events with truth.parquet, which scripted
recordings have. Page: docs/precompute_labels.md
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common.returns import discounted_returns, gamma_from_half_life
from common.sessions import (
    EPISODES,
    EVENTS,
    KEY_CODES,
    RETURNS,
    TRUTH,
    WIN_KEY,
    Session,
    find_sessions,
    load_session,
    read_table,
    write_table,
)
from common.template_matching import Bank, load_sprites, match
from common.video import VideoReader, grey, iter_frames, resize

INSTALLED_SPRITES = Path("/usr/share/games/supertux2/images")  # Debian's package supertux-data
DEATH_SPRITES = "creatures/tux/small/gameover-*.png"  # the only death pictures, big Tux dies with them too
SCALE = 0.5  # of the frames that are searched whole
NEAR = 0.1  # below the threshold: from there full size decides; clouds score 0.83 halved and 0.79 whole
TOLERANCE_S = 0.5  # an event this close to a true one has found it


@dataclass
class Args:
    data_dir: Path = Path("dataset")
    """folder of sessions (run_*), or one session"""
    sprites: Path | None = None
    """folder that holds creatures/tux/small/gameover-*.png; None: the installed SuperTux's, else <data_dir>/sprites"""
    device: str = "auto"
    """where sprites are matched: auto, cpu or cuda[:n]"""
    overwrite: bool = False
    """label sessions again that have labels"""
    truth: bool = False
    """compare with truth.parquet and print precision, recall and time offsets"""

    sprite_threshold: float = 0.85
    """score, 0 to 1, from which a frame shows the death sprite"""
    event_stride: int = 1
    """look at every n-th frame; the sprite shows for 1.5 s"""
    death_min_gap_s: float = 2.5
    """seconds within which a second sighting is the same death; SuperTux needs 3 s to restart"""
    win_key: str = WIN_KEY
    """evdev name of the key that marks a win"""
    win_key_min_presses: int = 1
    """presses within --win-key-window-s that make a win"""
    win_key_window_s: float = 2.0
    """seconds in which these presses come"""
    win_key_cooldown_s: float = 30.0
    """seconds after a win in which there is no other"""

    respawn_gap_s: float = 3.0
    """seconds after a death or win that belong to no episode"""
    death_reward: float = -1.0
    """reward on the frame of a death"""
    win_reward: float = 1.0
    """reward on the frame of a win"""
    survival_bonus: float = 0.0
    """reward on every other frame of an episode"""
    gamma: float = 0.99
    """discount per frame, 0 to 1"""
    half_life_s: float | None = None
    """seconds after which a reward counts one half; takes the place of gamma. None: gamma as given"""


# --- ALGO LOGIC: scores and key presses -> events -> episodes -> rewards. N frames of a session ---


def full_size_score(frame: torch.Tensor, y: int, x: int, bank: Bank, margin: int = 6) -> torch.Tensor:
    """Best score of any sprite of `bank` in `frame` (3, H, W) uint8 within `margin` pixels of its corner at y, x."""
    H, W = frame.shape[1:]
    h, w = (max(t.shape[i] for t in bank.templates) + 2 * margin for i in (0, 1))
    top, left = max(0, min(y - margin, H - h)), max(0, min(x - margin, W - w))
    return match(grey(frame[None, :, top : top + h, left : left + w]), bank)[0].max()


def death_scores(
    reader: VideoReader, banks: tuple[Bank, Bank], near: float, n_frames: int, stride: int, device: str, bar: tqdm
) -> np.ndarray:
    """Best score of any death sprite in frames 0, stride, 2 stride, ...: (ceil(n_frames / stride),) float32.

    `banks`: the sprites at SCALE and at full size. Frames that score `near` or more at SCALE get the full size score.
    """
    small, full = banks
    scores, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # a single frame is too little to share: on a busy machine two threads are 5 times slower
    try:
        for indices, frames in iter_frames(reader, stop=n_frames, stride=stride):
            frames = frames.to(device)
            halved = resize(frames, round(reader.height * SCALE), round(reader.width * SCALE))
            score, y, x = match(grey(halved), small)  # (n, T) each
            best, t = score.max(dim=1)  # (n,)
            for i in torch.nonzero(best >= near).flatten().tolist():
                best[i] = full_size_score(frames[i], int(y[i, t[i]] / SCALE), int(x[i, t[i]] / SCALE), full)
            scores.append(best.cpu())
            bar.update(min(len(indices) * stride, n_frames - bar.n))
    finally:
        torch.set_num_threads(threads)
    return torch.cat(scores).numpy()


def death_events(scores: np.ndarray, times: np.ndarray, threshold: float, min_gap_s: float) -> list[tuple[int, float]]:
    """Deaths as (row, confidence): the row where `scores` (N,) reaches `threshold`, and the peak of that sighting.

    `times` (N,) in ms. Scores that come within `min_gap_s` of the crossing belong to the same death.
    """
    events: list[tuple[int, float]] = []
    above = scores >= threshold
    for row in np.flatnonzero(above):
        same = events and (times[row] - times[events[-1][0]] < min_gap_s * 1000 or above[row - 1])
        if same:
            events[-1] = (events[-1][0], max(events[-1][1], float(scores[row])))
        else:
            events.append((int(row), float(scores[row])))
    return events


def win_events(
    presses: np.ndarray, times: np.ndarray, min_presses: int, window_s: float, cooldown_s: float
) -> list[int]:
    """Frames of wins: the last frame at or before the first of `min_presses` within `window_s`.

    `presses` and frame `times` (N,) in ms. A press within `cooldown_s` of the last win is no win, and uses up nothing.
    """
    frames, last_win = [], -np.inf
    for press in np.sort(presses):
        together = ((presses >= press) & (presses <= press + window_s * 1000)).sum()
        if together >= min_presses and press - last_win >= cooldown_s * 1000:
            frames.append(max(0, int(np.searchsorted(times, press, side="right")) - 1))
            last_win = press
    return frames


def find_episodes(
    events: list[tuple[int, str]], times: np.ndarray, rewards: dict[str, float], gap_s: float
) -> list[dict]:
    """Cut a session at its DEATH and WIN `events` (frame, name); rows of EPISODES.

    The next episode begins at the first frame `gap_s` after an end; an event before that belongs to no episode. Frames
    after the last end are INCOMPLETE.
    """
    episodes, start = [], 0

    def add(end: int, outcome: str):
        row = {"episode_id": len(episodes), "start_frame": start, "end_frame": end, "outcome": outcome}
        episodes.append(row | {"reward": rewards.get(outcome, 0.0), "length": end - start + 1})

    for frame, name in sorted(events):
        if name in ("DEATH", "WIN") and frame >= start:
            add(frame, name)
            start = max(frame + 1, int(np.searchsorted(times, times[frame] + gap_s * 1000)))
    if start < len(times):
        add(len(times) - 1, "INCOMPLETE")
    return episodes


def episode_rewards(episode: dict, survival_bonus: float) -> np.ndarray:
    """Reward of each of the episode's frames (length,): survival on all but the last, the outcome on the last."""
    rewards = np.full(episode["length"], survival_bonus)
    rewards[-1] = episode["reward"]
    return rewards


# --- Label files ---


def find_sprites(sprites: Path | None, data_dir: Path) -> list[Path]:
    """The death sprites, from the first folder that has them. Raises FileNotFoundError naming where it looked."""
    folders = [INSTALLED_SPRITES, data_dir / "sprites"] if sprites is None else [sprites]
    for folder in folders:
        if paths := sorted(folder.glob(DEATH_SPRITES)):
            return paths
    raise FileNotFoundError(
        f"no death sprites: {' and '.join(str(f / DEATH_SPRITES) for f in folders)} do not exist. Install the game "
        "(apt-get install supertux-data), or name its folder of images: --sprites FOLDER"
    )


def write_labels(folder: Path, events: dict, episodes: dict, returns: dict, metadata: dict):
    """Write the three tables, all or none: returns.parquet goes first and comes last."""
    temporary = folder / ".labels.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tables = {"events": (events, EVENTS), "episodes": (episodes, EPISODES), "returns": (returns, RETURNS)}
    for name, (rows, schema) in tables.items():
        write_table(temporary / f"{name}.parquet", rows, schema, metadata)
    (folder / "returns.parquet").unlink(missing_ok=True)
    for name in tables:
        os.replace(temporary / f"{name}.parquet", folder / f"{name}.parquet")
    temporary.rmdir()


def label_metadata(args: Args, session: Session, n_frames: int) -> dict[str, str]:
    """What the labels were made from and with. `recording_*` tell whether they still belong to the recording."""
    gamma = args.gamma if args.half_life_s is None else gamma_from_half_life(args.half_life_s, session.fps)
    names = "sprite_threshold event_stride death_min_gap_s win_key win_key_min_presses win_key_window_s "
    names += "win_key_cooldown_s respawn_gap_s death_reward win_reward survival_bonus"
    settings = {name: getattr(args, name) for name in names.split()} | {"gamma": gamma, "fps": session.fps}
    recording = {"recording_frames": n_frames, "recording_bytes": session.video.stat().st_size}
    return {k: str(v) for k, v in (settings | recording).items()}


def check_labels(folder: Path, metadata: dict[str, str]) -> None:
    """Say that labels are kept; raise ValueError where they belong to another recording."""
    schema = read_table(folder / "returns.parquet", RETURNS).schema
    old = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    for key in ("recording_frames", "recording_bytes"):
        if key in old and old[key] != metadata[key]:
            raise ValueError(
                f"{folder}/returns.parquet was made for a recording with {key} {old[key]}, recording.mp4 has "
                f"{metadata[key]}. Label it again with --overwrite"
            )
    changed = [f"{key} {old.get(key)}, not {value}" for key, value in metadata.items() if old.get(key) != value]
    note = f" (made with {'; '.join(changed)})" if changed else ""
    print(f"{folder.name}: has labels{note}, kept; --overwrite makes them again")


def label_session(args: Args, session: Session, reader: VideoReader, banks: tuple, device: str, metadata: dict) -> None:
    """Find events, episodes and returns of one session and write them."""
    n = int(metadata["recording_frames"])
    times = session.timestamps[:n]  # (n,) ms
    with tqdm(total=n, desc=session.name, unit="frame") as bar:
        scores = death_scores(reader, banks, args.sprite_threshold - NEAR, n, args.event_stride, device, bar)
    deaths = death_events(scores, times[:: args.event_stride], args.sprite_threshold, args.death_min_gap_s)
    presses = [
        row["timestamp"]
        for row in session.inputs.to_pylist()
        if row["key_name"] in (args.win_key, f"Key({args.win_key})") and row["state"] == "down"
    ]
    wins = win_events(
        np.array(presses), times, args.win_key_min_presses, args.win_key_window_s, args.win_key_cooldown_s
    )
    events = [(row * args.event_stride, "DEATH", peak) for row, peak in deaths] + [(f, "WIN", 1.0) for f in wins]
    events.sort()
    outcomes = {"DEATH": args.death_reward, "WIN": args.win_reward}
    episodes = find_episodes([(frame, name) for frame, name, _ in events], times, outcomes, args.respawn_gap_s)
    rewards = [episode_rewards(episode, args.survival_bonus) for episode in episodes]
    write_labels(
        session.folder,
        {name: [event[column] for event in events] for column, name in enumerate(EVENTS.names)},
        {name: [episode[name] for episode in episodes] for name in EPISODES.names},
        {
            "frame_idx": np.concatenate([np.arange(e["start_frame"], e["end_frame"] + 1) for e in episodes]),
            "return": np.concatenate([discounted_returns(r, float(metadata["gamma"])) for r in rewards]),
            "reward": np.concatenate(rewards),
        },
        metadata,
    )


# --- Comparison with the truth ---


def compare_with_truth(found: np.ndarray, true: np.ndarray, tolerance_s: float) -> dict:
    """Match `found` and `true` times (ms) one to one, in order, within `tolerance_s`; offsets are found - true."""
    found, true, offsets, i, j = np.sort(found), np.sort(true), [], 0, 0
    while i < len(found) and j < len(true):
        offset = int(found[i] - true[j])
        if abs(offset) <= tolerance_s * 1000:
            offsets.append(offset)
        i, j = i + (offset <= tolerance_s * 1000), j + (offset >= -tolerance_s * 1000)
    return {"truth": len(true), "found": len(found), "hits": len(offsets), "offsets_ms": offsets}


def truth_line(name: str, event: str, result: dict) -> str:
    """One line of the comparison, for reading."""
    hits, offsets = result["hits"], np.abs(result["offsets_ms"])
    line = f"{name}: {event} truth {result['truth']} found {result['found']}"
    line += f" missed {result['truth'] - hits} false {result['found'] - hits}"
    line += f" precision {hits / result['found']:.3f}" if result["found"] else " precision -"
    line += f" recall {hits / result['truth']:.3f}" if result["truth"] else " recall -"
    return line + (f" offset median {np.median(offsets):.0f} ms, max {offsets.max()} ms" if hits else "")


def main(args: Args) -> dict:
    """Label every session below `args.data_dir`; counts per session, and the comparison with the truth if asked for.

    Sessions that cannot be read do not stop the others; they end the program with status 1 and a list.
    """
    if args.event_stride < 1:
        raise SystemExit(f"--event-stride is {args.event_stride}, expected 1 or more")
    if args.win_key not in KEY_CODES:
        raise SystemExit(
            f"--win-key {args.win_key} is no evdev key name, expected one such as {WIN_KEY} (docs/data.md)"
        )
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        folders = find_sessions(args.data_dir)
        sprites = find_sprites(args.sprites, args.data_dir)
        banks = load_sprites(sprites, SCALE), load_sprites(sprites, 1)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None

    sessions, failures = {}, []
    totals = {event: {"truth": 0, "found": 0, "hits": 0, "offsets_ms": []} for event in ("DEATH", "WIN")}
    for folder in folders:
        try:
            # Read
            session, reader = load_session(folder), VideoReader(folder / "recording.mp4")
            n = min(session.n_frames, reader.n_frames)
            if session.n_frames != reader.n_frames:
                print(f"{folder}: {session.n_frames} rows, {reader.n_frames} video frames; the first {n} are labelled")

            # Label
            metadata = label_metadata(args, session, n)
            if args.overwrite or not (folder / "returns.parquet").exists():
                label_session(args, session, reader, banks, device, metadata)
            else:
                check_labels(folder, metadata)
            events = read_table(folder / "events.parquet", EVENTS).to_pylist()
            found = {name: [e["frame_idx"] for e in events if e["event"] == name] for name in totals}
            outcomes = read_table(folder / "episodes.parquet", EPISODES)["outcome"].to_pylist()
            sessions[folder.name] = {"frames": n} | {name: len(frames) for name, frames in found.items()}
            print(f"{folder.name}: {n} frames, {len(outcomes)} episodes ({', '.join(outcomes)})")

            # Compare
            if args.truth:
                truth = read_table(folder / "truth.parquet", TRUTH).to_pylist()
                times = session.timestamps[:n]
                for event, total in totals.items():
                    true = [row["timestamp"] for row in truth if row["what"] == event.lower()]
                    true = [time for time in true if times[0] <= time <= times[-1]]  # what was recorded
                    result = compare_with_truth(times[found[event]], np.array(true), TOLERANCE_S)
                    for key in total:
                        total[key] = total[key] + result[key]
                    sessions[folder.name][f"{event}_truth"] = result
                    print(truth_line(folder.name, event, result))
        except (ValueError, OSError) as error:
            failures.append(f"{folder}: {error}")

    if args.truth:
        for event, total in totals.items():
            print(truth_line("total", event, total))
    if failures:
        raise SystemExit(f"{len(failures)} of {len(folders)} sessions were not labelled:\n" + "\n".join(failures))
    return {"sessions": sessions, "truth": totals if args.truth else None}


if __name__ == "__main__":
    main(tyro.cli(Args))
