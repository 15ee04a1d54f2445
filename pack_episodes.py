"""Recorded play as packed episodes for agent_finetune.py: frames or latents, actions and rewards, row by row.

Three doors into one contract: games of stable-retro, played here by scripted players (--env-id); sessions of this
project, labelled (--sessions); latents and features.json of the reviewed pipeline (--latents-dir, --features-dir). A
row holds a frame, the action that led into it and the reward collected on arriving. Page: docs/pack_episodes.md

    python pack_episodes.py --env-id retro:Airstriker-Genesis-v0
    python pack_episodes.py --sessions sample_dataset

Out: packed/meta.json and an .npz per game, session or video, whole ones only, also after Ctrl-C.
"""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import runs
from common.returns import death_events
from common.sessions import EPISODES, RETURNS, Session, find_sessions, key_names, key_table, load_session, read_table
from common.video import VideoReader, iter_frames, resize
from packed_episodes.rows import check_rows, run_starts
from retro_env.airstriker import MIX, find_ship, make_player, move_to_hits, read_mix, spread
from retro_env.game import MOVEMENTS, make_game


@dataclass
class Args:
    env_id: str | None = None
    """first door: a game of stable-retro to play, retro:GAME"""
    sessions: Path | None = None
    """second door: folder of labelled sessions, or one session"""
    latents_dir: Path | None = None
    """third door: folder of <video>.npz with latents and frame_indices; needs --features-dir"""
    features_dir: Path | None = None
    """third door: folder that holds <video>/features.json"""

    output: Path = Path("packed")
    """folder that receives meta.json and the episodes"""
    overwrite: bool = False
    """replace the packing in --output"""
    frame_size: int = 64
    """side of the square the frames are resized to, pixels; first and second door"""

    frames: int = 60_000
    """first door: games are played until they have so many frames, the last to its end; held-out ones come on top"""
    heldout_episodes: int = 8
    """first door: games named heldout_0001 and so on, 0 or more"""
    seed: int = 1
    """first door: seed of all games and players"""
    players: tuple[str, ...] = MIX
    """first door: PLAYER=SHARE of the games; random, sticky, in Airstriker also hesitant and shooter:SKILL, 0 to 1"""
    max_steps: int = 1000
    """first door: steps after which a game is cut; 0 means never"""
    sticky: float = 0.05
    """first door: chance that a step repeats the previous action, 0 to below 1; what was done is recorded"""
    num_workers: int = 2
    """first door: processes that play; 1 plays in this one. The result is the same"""
    score_scale: float = 0.01
    """first door: reward for a point of the game's score"""
    life_penalty: float = -1.0
    """first door: reward for a life lost; the end of the game is one"""
    life_lost_at: Literal["hit", "count"] = "hit"
    """first door: hit: in Airstriker in the frame that shows the ship gone; count: where the game counts a life less,
    up to 27 frames later. In other games it is the count"""

    min_key_rate: float = 0.01
    """second door: share of frames in which a key must be down to be a key of the packing; arrows make the movement"""
    max_gap: float = 2.0
    """second door: a frame that comes later than so many nominal intervals begins a new run; above 1"""

    gold_scale: float = 0.01
    """third door: reward for a piece of gold"""
    death_penalty: float = -10.0
    """third door: reward for a death, once, in the frame where the health bar is gone"""


# Axes: N rows of an episode, A keys, S frame size. Row t: frame t, the action INTO it, the reward on arriving there.
DOORS = {  # fields that belong to one door
    "env_id": "frames heldout_episodes seed players max_steps sticky num_workers".split()
    + ["score_scale", "life_penalty", "life_lost_at"],
    "sessions": ["min_key_rate", "max_gap"],
    "latents_dir": ["features_dir", "gold_scale", "death_penalty"],
}
ARROWS = ("KEY_UP", "KEY_DOWN", "KEY_LEFT", "KEY_RIGHT")
COMPASS = (("up-left", "up", "up-right"), ("left", "stay", "right"), ("down-left", "down", "down-right"))
SECTORS = 18  # of 20 degrees; sector 0 also stands for a picture that does not move
ABILITIES = ("ability_q", "ability_w", "ability_e", "ability_r", "summoner_d", "summoner_f", "item_used")


# --- ALGO LOGIC: the contract ---


def make_rows(pixels, frame_index, movement, keys, reward, cont=None, act_valid=None, rew_valid=None) -> dict:
    """The arrays of one .npz. `pixels` is frames, uint8 (N, S, S, 3), or z, float16 (N, Nz, Dz); the others (N,), keys
    (N, A). A run begins where frame_index jumps and behind cont 0; its first row, and what is not valid, is zeros.

    Raises ValueError for arrays that break the contract."""
    N = len(frame_index)
    cont, act_valid, rew_valid = (np.ones(N, bool) if x is None else np.array(x) for x in (cont, act_valid, rew_valid))
    rows = {
        "frames" if pixels.dtype == np.uint8 else "z": np.ascontiguousarray(pixels),
        "frame_index": np.asarray(frame_index, np.int32),
        "movement": np.array(movement, np.int16),
        "keys": np.array(keys, np.uint8),
        "reward": np.array(reward, np.float32),
        "cont": cont.astype(np.uint8),
        "act_valid": act_valid.astype(bool),
        "rew_valid": rew_valid.astype(bool),
    }
    check_rows(rows, "frames" if "frames" in rows else "z")
    first = run_starts(rows["frame_index"], rows["cont"])
    for valid, columns in (("act_valid", ("movement", "keys")), ("rew_valid", ("reward",))):
        rows[valid] &= ~first
        for name in columns:
            rows[name][~rows[valid]] = 0
    return rows


class Packing:
    """A folder under way, beside the one it becomes: nothing is replaced before `install`."""

    def __init__(self, output: Path, meta: dict):
        self.output, self.meta = output, {"schema": 1, "action_index": "arrival"} | meta | {"episodes": {}}
        self.staging = output.with_name(f".{output.name}.tmp")
        shutil.rmtree(self.staging, ignore_errors=True)  # of a run that was killed
        self.staging.mkdir(parents=True)

    def add(self, name: str, rows: dict, facts: dict):
        kind = "frames" if "frames" in rows else "z"
        shape = list(rows[kind].shape[1:])
        if self.meta.setdefault(f"{kind.removesuffix('s')}_shape", shape) != shape:
            expected = self.meta[f"{kind.removesuffix('s')}_shape"]
            raise ValueError(f"{name}: a row of {kind} has the shape {shape}, others have {expected}. Pack it apart")
        with open(self.staging / f".{name}.npz.tmp", "wb") as file:
            np.savez_compressed(file, **rows)
        os.replace(self.staging / f".{name}.npz.tmp", self.staging / f"{name}.npz")
        self.meta["episodes"][name] = facts | {
            "score": round(float(facts.get("score", rows["reward"].sum())), 4),
            "frames": len(rows["reward"]),
            "runs": int(run_starts(rows["frame_index"], rows["cont"]).sum()),
            "gains": int((rows["reward"] > 0).sum()),
            "losses": int((rows["reward"] < 0).sum()),
            "ends": int((rows["cont"] == 0).sum()),
        }

    def install(self):
        """Replace what was in the folder. meta.json goes first and comes last: with it the files are whole."""
        self.output.mkdir(parents=True, exist_ok=True)
        if (self.output / "meta.json").exists():
            old = json.loads((self.output / "meta.json").read_text())
            (self.output / "meta.json").unlink()
            for name in old["episodes"]:
                (self.output / f"{name}.npz").unlink(missing_ok=True)
        for name in self.meta["episodes"]:
            os.replace(self.staging / f"{name}.npz", self.output / f"{name}.npz")
        runs.write_json(self.output / "meta.json", self.meta)

    def close(self):
        shutil.rmtree(self.staging, ignore_errors=True)


# --- First door: games ---


def to_square(screen: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (S, S, 3), by the one resize of the project."""
    return resize(torch.from_numpy(screen).movedim(-1, 0)[None], size, size)[0].movedim(0, -1).numpy()


def sees_hits(args: Args) -> bool:
    return args.life_lost_at == "hit" and "Airstriker" in args.env_id


def play(args: Args, name: str, player_name: str, seed: int) -> tuple[str, dict, dict]:
    """A game from beginning to end: name, rows, facts. What a row has as action is what the game really did."""
    player = make_player(player_name)
    with closing(make_game(args.env_id, sticky=args.sticky, max_steps=args.max_steps or None)) as game:
        screen, info = game.reset(seed=seed)
        player.reset(seed)
        frames, actions, gains, lost = [to_square(screen, args.frame_size)], [0], [0.0], [False]
        ship, over, terminated = [find_ship(screen) is not None], False, False
        while not over:
            screen, _, terminated, truncated, info = game.step(player.act(screen))
            frames.append(to_square(screen, args.frame_size))
            actions.append(info["action"])
            gains.append(info["score_gain"])
            lost.append(info["life_lost"])
            ship.append(find_ship(screen) is not None)
            over = terminated or truncated
    if sees_hits(args):
        lost = move_to_hits(np.array(lost), np.array(ship))
    rewards = args.score_scale * np.array(gains) + args.life_penalty * np.array(lost)
    actions, cont = np.array(actions), np.ones(len(actions), np.uint8)
    cont[-1] = not terminated
    rows = make_rows(np.stack(frames), np.arange(len(actions)), actions // 2, actions[:, None] % 2, rewards, cont)
    return name, rows, {"player": player_name, "seed": seed, "score": info["score"]}


def games(args: Args) -> Iterator[tuple[str, str, int]]:
    """Name, player and seed of the games: those held out, then the others without end."""
    shares = read_mix(args.players)
    for kind, stem, numbers in ((1, "heldout", range(1, args.heldout_episodes + 1)), (0, "episode", count(1))):
        for number, player in zip(numbers, spread(shares), strict=False):
            seed = np.random.SeedSequence([args.seed, kind, number]).generate_state(1)[0]
            yield f"{stem}_{number:04d}", player, int(seed)


def work(args: Args, connection):
    """A process that plays the games it is sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    torch.set_num_threads(1)
    while True:
        connection.send(play(args, *connection.recv()))


def play_games(args: Args) -> Iterator[tuple[str, dict, dict]]:
    """What `play` makes of `games`, in their order, without end. Raises RuntimeError where a worker dies."""
    if args.num_workers == 1:
        for game in games(args):
            yield play(args, *game)
    context, todo, waiting, done, processes = multiprocessing.get_context("spawn"), games(args), {}, {}, []
    try:
        for _ in range(args.num_workers):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(args, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            waiting[ours] = None
        order = []
        for connection in waiting:
            order.append(next(todo))
            connection.send(order[-1])
        while True:
            for connection in wait(list(waiting)):
                try:
                    name, *result = connection.recv()
                except (EOFError, ConnectionError):
                    raise RuntimeError("a process that plays died, it said why above. Try --num-workers 1") from None
                done[name] = result
                order.append(next(todo))
                connection.send(order[-1])
            while order[0][0] in done:
                name = order.pop(0)[0]
                yield name, *done.pop(name)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def open_game(args: Args) -> tuple[dict, Iterator, int, str]:
    shares = read_mix(args.players)
    if any(name.startswith(("shooter", "hesitant")) for name in shares) and "Airstriker" not in args.env_id:
        raise ValueError(
            f"--env-id {args.env_id}: shooter and hesitant play Airstriker only. "
            "Name others: --players random=0.5 sticky=0.5"
        )
    with closing(make_game(args.env_id, sticky=args.sticky)) as game:
        fps, frame_skip = game.fps, game.frame_skip
    meta = {"fps": fps, "n_movement": len(MOVEMENTS), "movements": list(MOVEMENTS), "keys": ["B"]}
    meta["reward"] = {"score_scale": args.score_scale, "life_penalty": args.life_penalty}
    meta["reward"]["life_lost_at"] = "hit" if sees_hits(args) else "count"
    meta["source"] = {"kind": "game", "env_id": args.env_id, "frame_skip": frame_skip, "sticky": args.sticky}
    meta["source"] |= {"max_steps": args.max_steps, "seed": args.seed, "players": shares}

    def enough() -> Iterator[tuple[str, dict, dict]]:
        n = 0
        with closing(play_games(args)) as played:
            while n < args.frames:
                name, rows, facts = next(played)
                n += 0 if name.startswith("heldout_") else len(rows["reward"])
                yield name, rows, facts

    return meta, enough(), args.frames, "frame"


# --- Second door: sessions ---


def arrow_movement(down: np.ndarray) -> np.ndarray:
    """Keys up, down, left, right (N, 4) bool -> movement (N,), numbers of MOVEMENTS. Opposite keys cancel."""
    table = np.array([[MOVEMENTS.index(name) for name in line] for line in COMPASS])
    up, below, left, right = down.astype(int).T
    return table[below - up + 1, right - left + 1]


def used_keys(sessions: list[Session], min_rate: float) -> list[str]:
    """Keys other than arrows that are down in `min_rate` of the frames of the sessions that are not held out."""
    training = [s for s in sessions if not fnmatch(s.name, "heldout*")] or sessions
    names = sorted(set().union(*(key_names(session) for session in training)) - set(ARROWS))
    rates = np.concatenate([key_table(session, names)[1] for session in training]).mean(axis=0)  # (K,)
    return [name for name, rate in zip(names, rates, strict=True) if rate >= min_rate]


def arrivals(episodes: list[dict], reward: np.ndarray, linked: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which frames are rows, their reward on arriving and cont, each (N,). `reward` (N,): of the way from frame i to
    i + 1, as labelled, so it arrives at i + 1. `linked` (N - 1,) bool: no gap in time between i and i + 1.

    What ended an episode at frame e arrives at e + 1, which is the last row of that run; without such a frame, at e.
    Of the two frames beside a gap in time the second is left out, so that frame_index jumps."""
    N = len(reward)
    kept, arrived, cont, free = np.zeros(N, bool), np.zeros(N), np.ones(N, np.uint8), 0
    for episode in episodes:
        start, end, ended = max(episode["start_frame"], free), episode["end_frame"], episode["outcome"] != "INCOMPLETE"
        if start > end or end >= N:  # all used up by the episode before, or of a video that was cut off
            end, ended = min(end, N - 1), False
        last = end + 1 if ended and end + 1 < N and linked[end] else end
        kept[start : last + 1] = True
        arrived[start + 1 : last + 1] = reward[start:last]
        if ended:
            cont[last] = 0
            arrived[last] += reward[end] if last == end else 0.0
        free = max(free, last + 1)
    kept[1:] &= linked
    return kept, arrived, cont


def pack_session(args: Args, session: Session, keys: list[str]) -> tuple[str, dict, dict]:
    folder, reader = session.folder, VideoReader(session.video)
    N = min(session.n_frames, reader.n_frames)
    down = np.zeros((N, len(ARROWS) + len(keys)), bool)
    down[1:] = key_table(session, [*ARROWS, *keys])[1][: N - 1]  # any[i] leads from frame i to i + 1
    reward, table = np.zeros(N), read_table(folder / "returns.parquet", RETURNS)
    labelled = table["frame_idx"].to_numpy()
    if len(labelled) and not 0 <= labelled.min() <= labelled.max() < session.n_frames:
        raise ValueError(
            f"{folder}/returns.parquet labels frame {labelled.max()}, there are {session.n_frames}. Label it again: "
            f"python precompute_labels.py --overwrite --data-dir {folder.parent}"
        )
    rewards = table["reward"].to_pylist()
    if None in rewards:
        raise ValueError(
            f"{folder}/returns.parquet has no reward at frame {labelled[rewards.index(None)]}. Label it again: "
            f"python precompute_labels.py --overwrite --data-dir {folder.parent}"
        )
    inside = labelled < N
    reward[labelled[inside]] = np.array(rewards, float)[inside]
    linked = np.diff(session.timestamps[:N]) <= args.max_gap * 1000 / session.fps
    episodes = read_table(folder / "episodes.parquet", EPISODES).sort_by("start_frame").to_pylist()
    kept, arrived, cont = arrivals(episodes, reward, linked)
    if not kept.any():
        raise ValueError(f"{folder}/episodes.parquet has no episode with a frame. Take the session away")
    frames = torch.cat([part for _, part in iter_frames(reader, stop=N, size=args.frame_size)])
    frames = frames.movedim(1, -1).numpy()[kept]
    movement, pressed = arrow_movement(down[:, : len(ARROWS)])[kept], down[:, len(ARROWS) :][kept]
    rows = make_rows(frames, np.flatnonzero(kept), movement, pressed, arrived[kept], cont[kept])
    seed = session.metadata.get("seed", "")
    player = session.metadata.get("demonstrator", "unknown")
    return session.name, rows, {"player": player, "seed": int(seed) if seed.isdigit() else None}


def label_settings(folder: Path, size: int) -> dict:
    """The rewards that a session was labelled with. Raises ValueError for labels of another recording."""
    metadata = read_table(folder / "returns.parquet", RETURNS).schema.metadata or {}
    made_for = metadata.get(b"recording_bytes")
    if made_for is not None and int(made_for) != size:
        raise ValueError(
            f"{folder}/returns.parquet was made for a recording of {int(made_for)} bytes, recording.mp4 has {size}. "
            f"Label it again: python precompute_labels.py --overwrite --data-dir {folder.parent}"
        )
    names = ("death_reward", "win_reward", "attack_reward", "survival_bonus", "gamma")
    return {name: float(metadata[name.encode()]) for name in names if name.encode() in metadata}


def open_sessions(args: Args) -> tuple[dict, Iterator, int, str]:
    sessions = [load_session(folder) for folder in find_sessions(args.sessions)]
    settings = {s.name: {"fps": s.fps} | label_settings(s.folder, s.video.stat().st_size) for s in sessions}
    first = sessions[0].name
    for name, found in settings.items():
        if found != settings[first]:
            raise ValueError(
                f"{args.sessions}: {name} has {found}, {first} has {settings[first]}. Label all with the same settings "
                f"(python precompute_labels.py --overwrite --data-dir {args.sessions}), pack other rates apart"
            )
    reward, keys = dict(settings[first]), used_keys(sessions, args.min_key_rate)
    meta = {"fps": reward.pop("fps"), "n_movement": len(MOVEMENTS), "movements": list(MOVEMENTS), "keys": keys}
    meta |= {"reward": reward, "source": {"kind": "sessions", "folder": args.sessions.name, "max_gap": args.max_gap}}
    return meta, (pack_session(args, session, keys) for session in sessions), len(sessions), "session"


# --- Third door: latents and features ---


def read_features(path: Path) -> tuple[dict, dict[int, dict]]:
    """Header and the labels by frame number."""
    try:
        features = json.loads(path.read_text())
        labels = {int(label["frame_idx"]): label for label in features["frames"]}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing. Make it, or move the latents of that video away") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no labels with a frame_idx ({error!r}). Extract it again") from None
    if len(labels) < len(features["frames"]):
        raise ValueError(f"{path} has two labels for one frame_idx. Extract it again")
    return features, labels


def real_fps(path: Path, header: dict) -> float:
    """Frames a second that were kept: the extractor takes every n-th, and writes down what it was asked for."""
    try:
        source, asked = float(header["source_fps"]), float(header["output_fps"])
        return source / max(1, int(source / asked))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        found = {name: header.get(name) for name in ("source_fps", "output_fps")}
        raise ValueError(f"{path} has {found}, expected two rates above 0. Extract it again") from None


def dead_frames(labels: dict[int, dict]) -> tuple[set[int], set[int]]:
    """Frame numbers of deaths, and of frames of which nobody knows. Labels are looked at in stretches without a gap."""
    numbers = np.array(sorted(labels), np.int64)
    deaths, unknown = set(), set()
    for stretch in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        present = np.array([labels[i]["health_bar_x"] is not None for i in stretch.tolist()], bool)
        for found, where in zip((deaths, unknown), death_events(present), strict=True):
            found |= set(stretch[where].tolist())
    return deaths, unknown


def pack_video(args: Args, path: Path) -> tuple[str, dict, dict]:
    """Latents with the labels of the same frame number; frames without a label are not valid."""
    features_path = args.features_dir / path.stem / "features.json"
    try:
        with np.load(path) as file:
            latents, numbers = file["latents"], file["frame_indices"].astype(np.int64)
        N, C = latents.shape[:2]
        z = latents.reshape(N, C, -1).swapaxes(1, 2)  # (N, H * W, C): token s = width * y + x
    except Exception as error:  # a damaged archive raises many kinds
        raise ValueError(f"{path} has no latents (N, C, H, W), frame_indices ({error!r}). Encode it again") from None
    _, labels = read_features(features_path)
    movement, keys, reward = np.zeros(N), np.zeros((N, len(ABILITIES))), np.zeros(N)
    act_valid, rew_valid = np.zeros(N, bool), np.zeros(N, bool)
    try:
        deaths, unknown = dead_frames(labels)
        for row, number in enumerate(numbers.tolist()):
            if number not in labels:
                continue
            label = labels[number]
            act_valid[row], rew_valid[row] = label["movement_slice"] is not None, number not in unknown
            if act_valid[row]:
                still = abs(label["movement_dx"] or 0) < 1 and abs(label["movement_dy"] or 0) < 1
                movement[row] = 0 if still else 1 + label["movement_slice"]
                keys[row] = [bool(label[name]) for name in ABILITIES]
            reward[row] = args.gold_scale * (label["gold_gained"] or 0) + args.death_penalty * (number in deaths)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{features_path}: a label is not as expected ({error!r}). Extract it again") from None
    if movement.min() < 0 or movement.max() > SECTORS:
        raise ValueError(f"{features_path} has the sector {movement.max() - 1:.0f}, expected 0 to {SECTORS - 1}")
    try:
        rows = make_rows(z.astype(np.float16), numbers, movement, keys, reward, None, act_valid, rew_valid)
    except ValueError as error:
        raise ValueError(f"{path} with {features_path}: {error}") from None
    return path.stem, rows, {"player": "video", "seed": None, "unlabelled": int((~act_valid).sum())}


def open_latents(args: Args) -> tuple[dict, Iterator, int, str]:
    if args.features_dir is None:
        raise ValueError("--latents-dir needs --features-dir, the folder that holds <video>/features.json")
    paths = sorted(args.latents_dir.glob("*.npz"))
    if not paths:
        raise ValueError(f"--latents-dir {args.latents_dir} holds no <video>.npz")
    features = [args.features_dir / path.stem / "features.json" for path in paths]
    rates = {path: real_fps(path, read_features(path)[0]) for path in features}
    slow, fast = min(rates, key=rates.get), max(rates, key=rates.get)
    if rates[fast] > 1.02 * rates[slow]:
        raise ValueError(f"{slow} has {rates[slow]:.2f} frames a second, {fast} {rates[fast]:.2f}. Pack them apart")
    movements = ["stay", *(f"sector {i}" for i in range(SECTORS))]
    meta = {"fps": rates[slow], "n_movement": len(movements), "movements": movements, "keys": list(ABILITIES)}
    meta["reward"] = {"gold_scale": args.gold_scale, "death_penalty": args.death_penalty}
    meta["source"] = {"kind": "latents", "latents": args.latents_dir.name, "features": args.features_dir.name}
    return meta, (pack_video(args, path) for path in paths), len(paths), "video"


# --- main ---


def table(episodes: dict[str, dict]) -> str:
    """Episodes by player, with the rows that hold a reward."""
    heads = f"{'episodes':>9}{'frames':>9}{'runs':>6}{'gains':>7}{'losses':>8}{'ends':>6}{'mean score':>12}"
    lines = [f"{'player':<14}{heads}"]
    players = list(dict.fromkeys(facts["player"] for facts in episodes.values()))
    for player in [*sorted(players), "all"]:
        mine = [facts for facts in episodes.values() if player in (facts["player"], "all")]
        frames, n_runs, gains, losses, ends, score = (
            sum(facts[name] for facts in mine) for name in ("frames", "runs", "gains", "losses", "ends", "score")
        )
        lines.append(
            f"{player:<14}{len(mine):>9}{frames:>9,}{n_runs:>6}{gains:>7}{losses:>8}{ends:>6}{score / len(mine):>12.2f}"
        )
    return "\n".join(lines)


def check(args: Args) -> str:
    """The door. Raises ValueError for values that cannot be meant, and for an output that holds something else."""
    chosen = [door for door in DOORS if getattr(args, door) is not None]
    if len(chosen) != 1:
        raise ValueError(f"expected one of --env-id, --sessions and --latents-dir, {len(chosen)} are given")
    defaults = {field.name: field.default for field in fields(Args)}
    others = [name for door, names in DOORS.items() for name in names if door != chosen[0]]
    others += ["frame_size"] if chosen[0] == "latents_dir" else []
    for name in others:
        if getattr(args, name) != defaults[name]:
            flag, door = (f"--{word.replace('_', '-')}" for word in (name, chosen[0]))
            raise ValueError(f"{flag} does nothing beside {door}. Leave it out")
    least = {"frame_size": 8, "frames": 1, "heldout_episodes": 0, "max_steps": 0, "num_workers": 1, "min_key_rate": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {low} or more")
    if not args.max_gap > 1 or not 0 <= args.sticky < 1:
        raise ValueError(f"--max-gap {args.max_gap} --sticky {args.sticky}: expected above 1, and 0 to below 1")
    meta = args.output / "meta.json"
    if meta.exists():
        if '"action_index"' not in meta.read_text():
            raise ValueError(f"{meta} is not of a packing. Name another folder: --output")
        if not args.overwrite:
            raise ValueError(f"--output {args.output} holds another packing. Name another folder, or add --overwrite")
    elif args.output.exists() and (not args.output.is_dir() or any(args.output.glob("*.npz"))):
        raise ValueError(f"--output {args.output} is a file or holds other .npz files. Name another folder")
    return chosen[0]


def main(args: Args) -> dict:
    """Pack, then print the table. Returns meta.json. Exit status 1 with a message for input that cannot be packed, and
    the output stays as it was; 130 after Ctrl-C, with what is whole."""
    stopped, packing = False, None
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        # Open
        door = check(args)
        openers = {"env_id": open_game, "sessions": open_sessions, "latents_dir": open_latents}
        meta, episodes, total, unit = openers[door](args)
        packing = Packing(args.output, meta)

        # Pack
        try:
            with closing(episodes), tqdm(total=total, unit=unit) as bar:
                for name, rows, facts in episodes:
                    packing.add(name, rows, facts)
                    held_out = name.startswith("heldout_")
                    bar.update(1 if unit != "frame" else 0 if held_out else len(rows["reward"]))
        except KeyboardInterrupt:
            stopped = True

        # Install, which no signal cuts in half
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        if packing.meta["episodes"]:
            packing.install()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    finally:
        if packing:
            packing.close()
        for number, handler in before.items():
            signal.signal(number, handler)

    if packing.meta["episodes"]:
        print(table(packing.meta["episodes"]))
        print(f"{len(packing.meta['episodes'])} episodes in {args.output}")
    if stopped:
        whole = "what is whole is kept" if packing.meta["episodes"] else "no episode was whole, nothing is written"
        print(f"stopped by Ctrl-C: {whole}")
        raise SystemExit(130)
    return packing.meta


if __name__ == "__main__":
    main(tyro.cli(Args))
