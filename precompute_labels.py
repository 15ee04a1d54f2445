"""Label recorded sessions: deaths, squished enemies and wins, which frames are one attempt, what followed each frame.

Deaths and squished enemies are found by matching the game's sprites with every frame (masked zero-mean NCC, from coarse
to fine), wins by the marker key that the player pressed: --game names the file that says so of a game. An episode ends
at a death or a win; its frames get discounted returns.

    python precompute_labels.py --data-dir sample_dataset

Reads recording.mp4, frames.parquet, inputs.parquet of every session; writes detections.parquet (what sprites scored
where) and events.parquet, episodes.parquet, returns.parquet beside them, these three or none. --progress-reward adds
how far the picture scrolled, --labeler what the player is about to do, --truth truth.parquet compares with what
scripted recordings know, in label_report/, --review asks a person, on review.html. Page: docs/precompute_labels.md
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import runs
from common.returns import discounted_returns, gamma_from_half_life
from common.sessions import (
    EPISODES,
    EVENTS,
    INTENT_NAMES,
    KEY_CODES,
    RETURNS,
    WIN_KEY,
    Session,
    find_sessions,
    load_session,
    read_table,
)
from common.template_matching import distinct, find, join, load_sprites, make_finder
from common.video import VideoReader, grey, iter_frames
from session_labels import calibration, files, intents, review, scrolling, surroundings, truth
from session_labels.game import Game, Rule, load_game
from session_labels.review import Override
from session_labels.sprites import (
    Roi,
    Sighting,
    Sprites,
    check_roi,
    check_room,
    crop,
    find_scale,
    kept_from,
    read_scales,
)
from session_labels.workers import on_cluster, side_by_side

LONGER = 1.1  # times as long as it stays: what is seen for longer than this is two on one place
MARGIN_MS = 1000  # a win key pressed this far outside the video's time still belongs to its first or last frame


@dataclass
class Args:
    data_dir: Path = Path("dataset")
    """folder of sessions (run_*), or one session"""
    game: Path = Path(__file__).parent / "supertux_env" / "supertux.toml"
    """TOML file that says which sprites to look for, what they tell, and which key marks a win"""
    sprites: Path | None = None
    """folder of the game's sprites; None: that of the game's file, else sprites/ in data_dir or beside it"""
    device: str = "auto"
    """where sprites are matched: auto, cpu or cuda[:n]"""
    overwrite: bool = False
    """label sessions again that have labels; what was found in their videos is used again if the search was the same"""
    rescan: bool = False
    """search videos again that were searched already"""
    num_workers: int = 1
    """sessions whose videos are searched at a time, each in a process, 1 or more"""
    ray_address: str | None = None
    """Ray cluster whose CPUs search videos instead, one each: auto (that of this machine), HOST:PORT or local (one
    that lives as long as this run); all nodes have to see data_dir and this code at the same place"""
    truth: str | None = None
    """name of the file in each session, such as truth.parquet, that holds what the game reported: labels are compared
    with it, in label_report/ of data_dir. None: they are not"""
    review: int = 0
    """events, taken or not, nearest to their thresholds that <data_dir>/review.html asks a person about; 0: no page"""
    overrides: Path | None = None
    """what that page has saved, to be honoured from now on; None: overrides.json in data_dir if it is there"""

    detect_events: bool = True
    """search the video for sprites; without, only wins are found"""
    sprite_threshold: float | None = None
    """score, 0 to 1, from which a place shows a sprite; None: as the game's file says"""
    death_threshold: float | None = None
    """that score for the sprites of deaths; None: sprite_threshold"""
    attack_threshold: float | None = None
    """that score for the sprites of squished enemies; None: sprite_threshold"""
    template_thresholds: tuple[str, ...] = ()
    """that score for single sprites, NAME=SCORE each, such as squished-left=0.9; beats the three above and those
    of the game's file"""
    event_free: tuple[str, ...] = ()
    """footage without events: sessions, FOLDER:FIRST-LAST for some frames of one, folders of sessions, or truth for all
    that --truth tells none of. A sprite that scores there gets a higher threshold or is dropped, in thresholds.toml of
    data_dir, which counts from then on"""
    sprite_scales: tuple[str, ...] = ()
    """size of the sprites in the recording, 1 as drawn; auto finds it in every recording, several are all searched;
    empty: as the game's file says"""
    roi: tuple[int, int, int, int] | None = None
    """region of interest X Y W H, left, top, width and height in pixels of the recording: only there are sprites
    looked for; None: everywhere"""
    event_stride: int = 1
    """look at every n-th frame, 1 or more; a death shows for 1.5 s, a squished enemy for 2 s"""
    death_min_gap_s: float | None = None
    """seconds within which a second sighting is the same death; None: as the game's file says"""
    win_key: str | None = None
    """evdev name of the key that marks a win; None: as the game's file says"""
    win_key_min_presses: int | None = None
    """presses within --win-key-window-s that make a win; None: as the game's file says"""
    win_key_window_s: float | None = None
    """seconds in which these presses come; None: as the game's file says"""
    win_key_cooldown_s: float | None = None
    """seconds after a win in which there is no other; None: as the game's file says"""

    min_event_confidence: float = 0.0
    """events less sure than this are in events.parquet, but end no episode and bring no reward; 0 to 1"""
    respawn_gap_s: float | None = None
    """seconds after a death or win that belong to no episode; None: as the game's file says"""
    death_reward: float = -1.0
    """reward on the frame of a death"""
    win_reward: float = 1.0
    """reward on the frame of a win"""
    attack_reward: float = 0.1
    """reward for a squished enemy, to the frames before it"""
    survival_bonus: float = 0.0
    """reward on every other frame of an episode"""
    progress_reward: float = 0.0
    """reward for each sprite width that the picture scrolls to the right, to the frame before; 0: not measured"""
    gamma: float = 0.99
    """discount per frame, 0 to 1"""
    half_life_s: float | None = None
    """seconds after which a reward counts one half; takes the place of gamma. None: gamma as given"""

    labeler: Literal["none", "keys", "supertux"] = "none"
    """what makes intent.parquet, also where there are labels: keys, the keys of the next moments; supertux, also what
    is near Tux, on frames as far apart as --event-stride says; none: nothing"""
    intent_horizon_s: float = 1.0
    """seconds of keys ahead of a frame that its intent is made of, 0 or more; never beyond the end of its episode"""


SETTINGS = (
    "detect_events sprite_threshold death_threshold attack_threshold template_thresholds sprite_scales roi "
    "event_stride death_min_gap_s win_key win_key_min_presses win_key_window_s win_key_cooldown_s min_event_confidence "
    "respawn_gap_s death_reward win_reward attack_reward survival_bonus progress_reward gamma"
).split()  # of Args, which labels depend on and tell in their metadata
OLDER = {"progress_reward": "0.0", "roi": "None"} | review.used([])  # what labels were made with that do not say it


# --- ALGO LOGIC: sightings of sprites and key presses -> events -> episodes -> rewards. N frames of a session ---


def find_detections(
    reader: VideoReader, sprites: Sprites, n_frames: int, stride: int, bar: tqdm, roi: Roi | None = None
) -> list[Sighting]:
    """All places in frames 0, stride, 2 stride, ... below `n_frames` that score a sprite's threshold, or KEPT less;
    with `roi` those inside it."""
    left, top = roi[:2] if roi else (0, 0)
    detections = []
    for indices, frames in iter_frames(reader, stop=n_frames, stride=stride):
        for i, hits in zip(indices, find(grey(crop(frames, roi)), sprites.finder), strict=True):
            detections += [Sighting(i, sprites.events[t], t, score, top + y, left + x) for score, t, y, x in hits]
        bar.update(min(len(indices) * stride, n_frames - bar.n))
    return detections


def find_sightings(detections: list[Sighting], sprites: Sprites, event: str) -> list[Sighting]:
    """Those `detections` that score the threshold, in pixels of sprites as drawn, however large they were recorded; of
    the event's sprites on one place the best, best first. `sprite` counts those that differ in more than size."""
    kinds = list(dict.fromkeys(sprites.kinds))
    shapes = zip(sprites.finder.bank.templates, sprites.scales, sprites.events, strict=True)
    sizes = [[side / scale for side in template.shape] for template, scale, its in shapes if its == event]
    h, w = (max(size[i] for size in sizes) for i in (0, 1))
    sightings = []
    for frame, group in groupby((d for d in detections if d.event == event), key=lambda d: d.frame):
        sure = [d for d in group if d.score >= sprites.thresholds[d.sprite]]
        drawn = [(d, sprites.scales[d.sprite]) for d in sure]
        hits = [
            (d.score, kinds.index(sprites.kinds[d.sprite]), d.y / scale, d.x / scale, i)
            for i, (d, scale) in enumerate(drawn)
        ]
        best = distinct(hits, h / 2, w / 2)
        sightings += [Sighting(frame, event, kind, score, y, x, sure[i]) for score, kind, y, x, i in best]
    return sightings


def death_groups(
    sightings: list[Sighting], times: np.ndarray, min_gap_s: float, stride: int = 1
) -> list[list[Sighting]]:
    """The sightings of each death. Frame `times` (N,) in ms.

    What is seen within `min_gap_s` of the first, or goes on from one looked at frame to the next, is the same death.
    """
    groups: list[list[Sighting]] = []
    for s in sightings:
        near = groups and times[s.frame] - times[groups[-1][0].frame] < min_gap_s * 1000
        if near or (groups and s.frame - groups[-1][-1].frame <= stride):
            groups[-1].append(s)
        else:
            groups.append([s])
    return groups


@dataclass
class Track:
    """One squished enemy. It lies still, so on the screen it moves as all others do: against the camera."""

    first: int  # ms
    last: int  # ms, last seen
    sprite: int
    y: float  # where it is on the screen, seen or hidden
    x: float
    seen: list[Sighting]


def attack_groups(
    sightings: list[Sighting], times: np.ndarray, stays_s: float, camera_speed: float
) -> list[list[Sighting]]:
    """The sightings of each squished enemy, which lies there for `stays_s`. Frame `times` (N,) in ms.

    In each frame the camera's step is the one that most tracks agree on, and of these the nearest to the last step.
    A sighting where no track is now begins a track.
    """
    tracks: list[Track] = []
    longest = LONGER * 1000 * stays_s
    velocity, before = np.zeros(2), int(times[0])  # of the tracks on the screen, pixels per second; ms
    for frame, group in groupby(sightings, key=lambda s: s.frame):
        seen, now = list(group), int(times[frame])
        alive = [k for k in tracks if now - k.first <= longest or now - k.last <= 300]
        seconds = max(0.001, (now - before) / 1000)
        expected = velocity * seconds
        pairs = np.array([(s.y - k.y, s.x - k.x) for k in alive for s in seen if s.sprite == k.sprite]).reshape(-1, 2)
        possible = pairs[np.abs(pairs - expected).max(axis=1) <= camera_speed * seconds]  # (p, 2)
        step = expected
        if len(possible):
            votes = (np.abs(possible[:, None] - possible).max(axis=2) <= 6).sum(axis=1)
            step = possible[np.lexsort((np.abs(possible - expected).sum(axis=1), -votes))[0]]
        for k in alive:
            k.y, k.x = k.y + step[0], k.x + step[1]
        for s in seen:
            here = [k for k in alive if k.sprite == s.sprite and max(abs(k.y - s.y), abs(k.x - s.x)) <= 6]
            if here:
                track = here[0]
                alive.remove(track)
                track.last, track.y, track.x = now, s.y, s.x
                track.seen.append(s)
            else:
                tracks.append(Track(now, now, s.sprite, s.y, s.x, [s]))
        velocity, before = step / seconds if len(possible) else np.zeros(2), now
    return [k.seen for k in tracks]


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


def episode_rewards(
    episode: dict, attacks: list[int], survival_bonus: float, attack_reward: float, gamma: float
) -> np.ndarray:
    """Reward of each of the episode's frames (length,): survival on all but the last, the outcome on the last.

    Of a squished enemy the frame before `attacks` gets gamma * attack_reward, as it counts strictly before its frame;
    with discounted_returns this is the closed form in common/returns.py.
    """
    rewards = np.full(episode["length"], survival_bonus)
    rewards[-1] = episode["reward"]
    for frame in attacks:
        if episode["start_frame"] < frame <= episode["end_frame"]:
            rewards[frame - episode["start_frame"] - 1] += gamma * attack_reward
    return rewards


def persists(group: list[Sighting], rule: Rule, n_frames: int, stride: int, overrides: Sequence[Override]) -> bool:
    """Whether a thing is seen often enough, from its first frame on, or a person says that it is there. Where the
    recording ends before, every frame that is left has to show it."""
    first = group[0].frame
    frames = {s.frame for s in group if s.frame < first + rule.of_frames * stride}
    least = min(rule.min_sightings, 1 + (n_frames - 1 - first) // stride)
    return len(frames) >= least or any(review.is_judged(s, overrides, accepted=True) for s in group)


def split_chains(sightings: list[Sighting], times: np.ndarray, stride: int) -> list[list[Sighting]]:
    """The sightings of each thing, as far as it can have moved from one frame to the next. Frame `times` (N,) in ms."""
    chains = []
    while sightings:
        chains.append(review.follow(sightings[0], sightings, times, stride))
        taken = {id(s) for s in chains[-1]}
        sightings = [s for s in sightings if id(s) not in taken]
    return chains


def sprite_groups(
    args: Args, rule: Rule, sightings: list[Sighting], times: np.ndarray, overrides: Sequence[Override] = ()
) -> list[list[Sighting]]:
    """The sightings of each event, as its `rule` says, without what a person has rejected."""
    if rule.rule == "track":
        tracks = attack_groups(sightings, times, rule.stays_s, rule.camera_speed)
        tracks = [track for track in tracks if persists(track, rule, len(times), args.event_stride, overrides)]
        return review.without_rejected(tracks, overrides)
    if rule.min_sightings > 1:
        chains = split_chains(sightings, times, args.event_stride)
        chains = [chain for chain in chains if persists(chain, rule, len(times), args.event_stride, overrides)]
        sightings = sorted((s for chain in chains for s in chain), key=lambda s: s.frame)
    deaths = death_groups(sightings, times, rule.min_gap_s, args.event_stride)
    together = partial(review.follow, times=times, stride=args.event_stride)
    return review.without_rejected(deaths, overrides, together)


def group_events(rule: Rule, groups: list[list[Sighting]], times: np.ndarray) -> list[tuple[int, float]]:
    """Groups of sightings as (frame first seen, peak score). Frame `times` (N,) in ms.

    Tracked things that are seen for LONGER than they stay are two on one place, the second began that long before the
    end.
    """
    events = []
    for group in groups:
        first, last, peak = times[group[0].frame], times[group[-1].frame], max(s.score for s in group)
        events.append((group[0].frame, peak))
        if rule.rule == "track" and last - first > LONGER * 1000 * rule.stays_s:
            events.append((int(np.searchsorted(times, last - rule.stays_s * 1000)), peak))
    return sorted(events)


def sprite_events(
    args: Args,
    event: str,
    detections: list[Sighting],
    sprites: Sprites,
    times: np.ndarray,
    overrides: Sequence[Override] = (),
) -> list[tuple[int, float]]:
    """The events of one kind that the `detections` show: (frame first seen, peak score)."""
    rule, sightings = sprites.rules[event], find_sightings(detections, sprites, event)
    return group_events(rule, sprite_groups(args, rule, sightings, times, overrides), times)


def episodes_and_returns(
    args: Args, gamma: float, steps: np.ndarray | None, events: list[tuple[int, str]], times: np.ndarray
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows of EPISODES and columns of RETURNS, from `events` (frame, name). `steps` (N,): the camera's into each frame,
    where progress is rewarded."""
    outcomes = {"DEATH": args.death_reward, "WIN": args.win_reward}
    episodes = find_episodes(events, times, outcomes, args.respawn_gap_s)
    attacks = [frame for frame, name in events if name == "ATTACK"]
    rewards = [episode_rewards(e, attacks, args.survival_bonus, args.attack_reward, gamma) for e in episodes]
    if steps is not None:
        for reward, e in zip(rewards, episodes, strict=True):
            reward += args.progress_reward * scrolling.progress_rewards(steps, e["start_frame"], e["end_frame"])
    return episodes, {
        "frame_idx": np.concatenate([np.arange(e["start_frame"], e["end_frame"] + 1) for e in episodes]),
        "return": np.concatenate([discounted_returns(r, gamma) for r in rewards]),
        "reward": np.concatenate(rewards),
    }


# --- Sessions ---


def as_game_says(args: Args, game: Game) -> Args:
    """`args` with what the game's file says in place of flags that are not given. Raises ValueError for a flag of an
    event that no sprite of the game tells."""
    for name, event in (("death_threshold", "DEATH"), ("death_min_gap_s", "DEATH"), ("attack_threshold", "ATTACK")):
        if getattr(args, name) is not None and event not in game.rules:
            raise ValueError(f"--{name.replace('_', '-')}: {args.game} has no sprites of {event}. Leave the flag out")
    said = {"sprite_threshold": game.sprite_threshold, "respawn_gap_s": game.respawn_gap_s}
    said |= {"death_min_gap_s": game.rules["DEATH"].min_gap_s if "DEATH" in game.rules else None}
    said |= {f"win_{key}": value for key, value in game.win.items()}
    said = {name: value for name, value in said.items() if getattr(args, name) is None}
    return replace(args, sprite_scales=args.sprite_scales or game.sprite_scales, **said)


def sprite_folder(args: Args, paths: list[str]) -> Path:
    """The first folder that has all sprites at `paths`. Raises FileNotFoundError naming what is missing where."""
    game = load_game(args.game)
    folders = [args.sprites] if args.sprites is not None else [*game.folders, args.data_dir / "sprites"]
    if args.sprites is None and (args.data_dir / "recording.mp4").exists():  # one session
        folders.append(args.data_dir.parent / "sprites")
    missing = {f: [path for path in paths if not (f / path).exists()] for f in folders}
    folder = next((f for f in folders if not missing[f]), None)
    if folder is None:
        raise FileNotFoundError(
            f"no sprites: {' and '.join(str(f / those[0]) for f, those in missing.items())} do not exist. "
            f"{game.missing}, or name its folder of images: --sprites FOLDER"
        )
    return folder


def load_all_sprites(args: Args, scales: tuple[float, ...] = (1.0,)) -> Sprites:
    """The sprites of every event at all `scales`, from the first folder that has them all, with their thresholds.

    Raises FileNotFoundError naming what is missing where, ValueError for a threshold that cannot be.
    """
    game = load_game(args.game)
    args, rules = as_game_says(args, game), game.rules
    paths = [path for rule in rules.values() for path in rule.sprites]
    folder = sprite_folder(args, paths)
    names, single = [Path(path).stem for path in paths], dict(game.template_thresholds)
    for word in args.template_thresholds:
        name, _, score = word.partition("=")
        if name not in names or not re.fullmatch(r"\d*\.?\d+", score):
            raise ValueError(f"--template-thresholds {word}: expected NAME=SCORE with NAME one of {', '.join(names)}")
        single[name] = float(score)
    banks, kinds, events, sizes, thresholds = [], [], [], [], []
    of_event = {"DEATH": args.death_threshold, "ATTACK": args.attack_threshold}
    for event, rule in rules.items():
        threshold = args.sprite_threshold if of_event.get(event) is None else of_event[event]
        for scale in scales:
            bank = load_sprites([folder / path for path in rule.sprites], scale, rule.mirror, rule.alpha)
            bank.names = [name.removeprefix(f"{folder}/") for name in bank.names]
            for name in bank.names:
                stem = Path(name.removesuffix(" mirrored")).stem
                thresholds.append(single.get(stem, threshold))
                if not 0 < thresholds[-1] <= 1:
                    raise ValueError(
                        f"the threshold of {stem} is {thresholds[-1]}, expected a score above 0, at most 1"
                    )
            kinds += bank.names
            if scale != 1:
                bank.names = [f"{name} x{scale:g}" for name in bank.names]
            banks.append(bank)
            events += [event] * len(bank.names)
            sizes += [scale] * len(bank.names)
    if "DEATH" in rules:
        rules["DEATH"].min_gap_s = args.death_min_gap_s
    bank, thresholds = join(*banks), np.array(thresholds)
    finder = make_finder(bank, kept_from(thresholds))
    return Sprites(finder, bank.names, kinds, events, sizes, thresholds, folder, rules)


def label_metadata(args: Args, session: Session, n_frames: int) -> dict[str, str]:
    """What the labels were made from and with. `recording_*` tell whether they still belong to the recording."""
    gamma = args.gamma if args.half_life_s is None else gamma_from_half_life(args.half_life_s, session.fps)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"gamma": gamma, "fps": session.fps}
    game = load_game(args.game)
    settings |= {"game": game.name, "game_digest": game.digest}
    recording = files.recording_of(session.folder, n_frames)
    overrides = review.load_overrides(session.folder, recording) if args.detect_events else []
    return {k: str(v) for k, v in (settings | recording | review.used(overrides)).items()}


def progress_bar(args: Args) -> Callable[..., tqdm]:
    """Of one session: silent where several are worked on. An explicit disable=False would beat TQDM_DISABLE=1."""
    return partial(tqdm, disable=True) if args.num_workers > 1 or args.ray_address else tqdm


def pick_scales(args: Args, session: Session, reader: VideoReader, metadata: dict) -> tuple[float, ...]:
    """The sizes of --sprite-scales; with auto the one that this recording was searched for already, or shows."""
    if scales := read_scales(args.sprite_scales):
        return scales
    made = files.scan_of(session.folder)
    if not args.rescan and made.get("size_from") == "auto":
        scales = tuple(json.loads(made["scales"]))
        wanted = files.scan_metadata(load_all_sprites(args, scales), metadata)
        same = ("recording_frames", "recording_bytes", "search_version", "roi", "sprites")
        if all(made.get(key) == wanted[key] for key in same):
            return scales
    n, name = int(metadata["recording_frames"]), f"{session.name}: size of the sprites"
    bar = partial(progress_bar(args), desc=name, leave=False)
    scale = find_scale(partial(load_all_sprites, args), args.sprite_threshold, reader, n, bar, args.roi)
    if scale is None:
        print(f"{session.name}: no sprite is to be seen at any size, looked for as drawn; see --sprite-scales")
    elif scale != 1:
        print(f"{session.name}: sprites are {scale:g} times as large as drawn; --sprite-scales says otherwise")
    return (scale or 1.0,)


def detect(args: Args, session: Session, reader: VideoReader, metadata: dict) -> tuple[Sprites, list[Sighting]]:
    """The sprites to look for in a session, and where they are: from its detections.parquet, else searched, written."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a single frame is too little to share: on a busy machine two threads are 5 times slower
    try:
        check_roi(args.roi, reader)
        sprites = load_all_sprites(args, pick_scales(args, session, reader, metadata))
        check_room(args.roi, sprites)
        scan = files.scan_metadata(sprites, metadata)
        detections = None if args.rescan else files.load_detections(session.folder, sprites, scan)
        if detections is None:
            files.say_why_again(session.folder, scan)
            n = int(metadata["recording_frames"])
            with progress_bar(args)(total=n, desc=session.name, unit="frame") as bar:
                detections = find_detections(reader, sprites, n, args.event_stride, bar, args.roi)
            how = "given" if read_scales(args.sprite_scales) else "auto"
            files.save_detections(session.folder, detections, sprites, scan | {"size_from": how})
    finally:
        torch.set_num_threads(threads)
    return sprites, detections


def calibrate(args: Args, device: str, path: Path) -> tuple[str, ...]:
    """NAME=SCORE of each sprite that scores too high in footage without events, also written to `path` with the why."""
    peaks, count = {}, 0
    for footage in calibration.find_footage(args.event_free, args.data_dir, args.truth):
        try:
            session, reader = load_session(footage.folder), VideoReader(footage.folder / "recording.mp4", device)
        except (ValueError, OSError) as error:
            print(f"--event-free does without {footage.folder}: {error}")
            continue
        n = min(session.n_frames, reader.n_frames)
        quiet = footage.frames(session.timestamps[:n])  # (n,)
        sprites, detections = detect(args, session, reader, label_metadata(args, session, n))
        calibration.add_peaks(peaks, session.name, detections, sprites, quiet)
        count += int(quiet[:: args.event_stride].sum())
    if count == 0:
        given = " ".join(args.event_free)
        raise ValueError(f"--event-free {given} names no frame without an event that is looked at. Name more footage")
    sprites = load_all_sprites(args)
    thresholds = dict(zip(map(calibration.stem, sprites.kinds), sprites.thresholds, strict=True))
    chosen = calibration.choose_thresholds(thresholds, peaks)
    game = load_game(args.game)
    calibration.write_thresholds(path, chosen, f"{game.name} {game.digest}: from {count} frames without an event")
    for name, threshold in thresholds.items():
        most = f"{peaks[name].score:.3f} at most" if name in peaks else f"less than {kept_from(threshold):g}"
        score, reason = chosen.get(name, (threshold, f"stays: scores {most}"))
        print(f"{name}: threshold {score:g}, {reason}")
    print(f"{path}: from {count} frames without an event; it counts from now on, take it away to do without")
    return tuple(f"{name}={score:g}" for name, (score, _) in chosen.items())


def judged(
    args: Args, session: Session, reader: VideoReader, metadata: dict
) -> tuple[Sprites, list[Sighting], list[Override]]:
    """The sprites, where they are, what a person has accepted among it, and all that a person has decided."""
    sprites, detections = detect(args, session, reader, metadata)
    overrides = review.load_overrides(session.folder, metadata)
    detections = review.accept(detections, overrides, sprites, session.timestamps, args.event_stride)
    return sprites, detections, overrides


def find_cards(args: Args, session: Session, reader: VideoReader, metadata: dict) -> list[review.Card]:
    """What a person could be asked about a session."""
    sprites, detections, overrides = judged(replace(args, rescan=False), session, reader, metadata)

    def groups_at(less: float, decided: Sequence[Override]) -> list[list[Sighting]]:
        lower, groups = replace(sprites, thresholds=sprites.thresholds - less), []
        for event, rule in sprites.rules.items():
            seen = find_sightings(detections, lower, event)
            groups += sprite_groups(args, rule, seen, session.timestamps, decided)
        return groups

    return review.make_cards(session, metadata, sprites, groups_at, overrides, args.event_stride)


def known_scale(args: Args, session: Session) -> float:
    """The size of the sprites that were found in a session, else that of --sprite-scales."""
    found = json.loads(files.scan_of(session.folder).get("scales", "[]")) if args.detect_events else []
    return [*found, *read_scales(args.sprite_scales), 1.0][0]


def intent_rules(args: Args) -> intents.Rules:
    """Those of the game's file for --labeler keys, where it has some."""
    of_game = load_game(args.game).intents if args.labeler == "keys" else []
    return of_game or intents.RULES[args.labeler]


def find_intents(args: Args, session: Session, reader: VideoReader, n_frames: int) -> np.ndarray:
    """Make a session's intent.parquet. Returns the intents, numbers in INTENT_NAMES (n_frames,)."""
    made_from, near = files.recording_of(session.folder, n_frames), None
    if args.labeler == "supertux":
        searched = {name: getattr(args, name) for name in ("event_stride", "sprite_threshold")}
        made_from |= searched | {"scale": known_scale(args, session)}
        eyes = surroundings.open_eyes(sprite_folder(args, surroundings.ALL), made_from["scale"], args.sprite_threshold)
        near = surroundings.find_surroundings(reader, eyes, n_frames, args.event_stride, session.name)
    return intents.label_intents(session, args.labeler, args.intent_horizon_s, made_from, near, intent_rules(args))


def scroll(args: Args, session: Session, reader: VideoReader, metadata: dict) -> np.ndarray | None:
    """The camera's step into each frame (N,), in widths of the sprites that were found, else of --sprite-scales; None
    where progress is not rewarded."""
    if args.progress_reward == 0:
        return None
    width = load_game(args.game).sprite_width * known_scale(args, session)
    n = int(metadata["recording_frames"])
    return scrolling.progress_steps(session, reader, n, width, args.rescan, progress_bar(args))


def search(args: Args, device: str, folder: Path) -> bool:
    """What a worker does: search the video of one session. False if it cannot, why is said when its turn comes."""
    try:
        session, reader = load_session(folder), VideoReader(folder / "recording.mp4", device)
        metadata = label_metadata(args, session, min(session.n_frames, reader.n_frames))
        detect(args, session, reader, metadata)
        scroll(args, session, reader, metadata)
    except (ValueError, OSError):
        return False
    return True


def search_at_once(args: Args, device: str, folders: list[Path]) -> tuple[set[Path], dict[Path, str]]:
    """Search the videos of several sessions at a time, where that is asked for. Returns those that were searched, and
    those whose worker was lost, with the reason."""
    if not folders or not args.detect_events or (args.num_workers == 1 and args.ray_address is None):
        return set(), {}
    sprites = args.sprites if args.sprites is None else args.sprites.resolve()
    work, desc = partial(search, replace(args, data_dir=args.data_dir.resolve(), sprites=sprites)), "videos searched"
    if args.ray_address is None:
        return side_by_side(partial(work, device), folders, args.num_workers, desc)
    kind = torch.device(device).type  # a task sees the GPU that it was given, and no other
    return on_cluster(partial(work, kind), folders, args.ray_address, int(kind == "cuda"), desc)


def label_session(args: Args, session: Session, reader: VideoReader, metadata: dict) -> None:
    """Find events, episodes and returns of one session and write them."""
    n, events = int(metadata["recording_frames"]), []
    times = session.timestamps[:n]  # (n,) ms
    if args.detect_events:
        sprites, detections, overrides = judged(args, session, reader, metadata)
        for name in sprites.rules:
            found = sprite_events(args, name, detections, sprites, times, overrides)
            events += [(frame, name, peak) for frame, peak in found]
    presses = [
        row["timestamp"]
        for row in session.inputs.to_pylist()
        if args.win_key and row["key_name"] in (args.win_key, f"Key({args.win_key})") and row["state"] == "down"
        if times[0] - MARGIN_MS <= row["timestamp"] <= times[-1] + MARGIN_MS  # what was won is in the video
    ]
    wins = win_events(
        np.array(presses), times, args.win_key_min_presses, args.win_key_window_s, args.win_key_cooldown_s
    )
    events = sorted(events + [(frame, "WIN", 1.0) for frame in wins])
    sure = [(frame, name) for frame, name, confidence in events if confidence >= args.min_event_confidence]
    steps = scroll(args, session, reader, metadata)
    episodes, returns = episodes_and_returns(args, float(metadata["gamma"]), steps, sure, times)
    files.write_labels(
        session.folder,
        {name: [event[column] for event in events] for column, name in enumerate(EVENTS.names)},
        {name: [episode[name] for episode in episodes] for name in EPISODES.names},
        returns,
        metadata,
    )


# --- Comparison with the truth ---


def beside_truth(args: Args, session: Session, reader: VideoReader, metadata: dict[str, str]) -> truth.Compared:
    """The labels of a session, and what its true events and other thresholds would give with the same settings."""
    folder, times = session.folder, session.timestamps[: int(metadata["recording_frames"])]
    metadata = metadata | OLDER | files.metadata_of(folder / "returns.parquet", RETURNS)
    known = {name: ast.literal_eval(metadata[name]) for name in SETTINGS if name != "win_key"}
    made_with, thresholds = replace(args, **known, rescan=False), None
    if args.detect_events and made_with.detect_events:
        thresholds = other_thresholds(made_with, folder, times, metadata)
    steps = scroll(made_with, session, reader, metadata)  # the same, so that only events differ
    label = partial(episodes_and_returns, made_with, made_with.gamma, steps)
    size = f"{reader.width}x{reader.height}"
    return truth.compare(session.name, size, folder / args.truth, times, label, thresholds)


def other_thresholds(args: Args, folder: Path, times: np.ndarray, metadata: dict[str, str]) -> truth.Thresholds | None:
    """What detections.parquet tells of labels made with `args` but for the thresholds; None if it is of others."""
    made = files.scan_of(folder)
    sprites = load_all_sprites(args, tuple(json.loads(made.get("scales", "[1]"))))
    chosen, sprites.thresholds = sprites.thresholds, np.ones(len(sprites.names))  # all that is there will do
    detections = files.load_detections(folder, sprites, files.scan_metadata(sprites, metadata))
    if detections is None:
        return None

    def find_at(event: str, threshold: float) -> list[int]:
        if event not in sprites.rules:
            return []
        at = replace(sprites, thresholds=np.full(len(sprites.names), threshold))
        return [frame for frame, _ in sprite_events(args, event, detections, at, times)]

    return truth.Thresholds(
        sprites.events, chosen, [json.loads(made["least"])[name] for name in sprites.names], find_at
    )


def main(args: Args) -> dict:
    """Label every session below `args.data_dir`; counts per session, and the comparison with the truth if asked for.

    Sessions that cannot be read do not stop the others; they end the program with status 1 and a list. Ctrl-C ends it
    with status 130; each session has then its new labels, or what it had before. The last line tells what was done.
    """
    for name in ("event_stride", "num_workers"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 1 or more")
    if args.ray_address is not None and args.num_workers > 1:
        raise SystemExit(f"--num-workers {args.num_workers}: leave it out, --ray-address takes all CPUs of the cluster")
    try:
        args = as_game_says(args, load_game(args.game))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    for name in ("death_reward", "win_reward", "attack_reward", "survival_bonus", "progress_reward"):
        if not np.isfinite(getattr(args, name)):
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a finite number")
    for name in ("death_min_gap_s", "win_key_window_s", "win_key_cooldown_s", "respawn_gap_s", "intent_horizon_s"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < float("inf"):  # None: not in this game
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 0 or more seconds")
    if args.win_key_min_presses < 1:
        raise SystemExit(f"--win-key-min-presses is {args.win_key_min_presses}, expected 1 or more")
    if args.win_key is not None and args.win_key not in KEY_CODES:
        raise SystemExit(
            f"--win-key {args.win_key} is no evdev key name, expected one such as {WIN_KEY} (docs/data.md)"
        )
    if args.review < 0:
        raise SystemExit(f"--review is {args.review}, expected 0 or more")
    if (args.review or args.overrides or args.event_free) and not args.detect_events:
        flags = "--review, --overrides and --event-free"
        raise SystemExit(f"--no-detect-events looks for no sprites: leave it out, or {flags}")
    if args.roi and (min(args.roi[:2]) < 0 or min(args.roi[2:]) < 1):
        given = " ".join(map(str, args.roi))
        raise SystemExit(f"--roi {given}: expected X and Y of 0 or more, W and H of 1 or more")
    if not 0 <= args.min_event_confidence <= 1:
        raise SystemExit(f"--min-event-confidence is {args.min_event_confidence}, expected 0 to 1")
    if not 0 <= args.gamma <= 1 or (args.half_life_s is not None and not args.half_life_s > 0):
        given = f"--gamma {args.gamma} --half-life-s {args.half_life_s}"
        raise SystemExit(f"{given}: expected a gamma of 0 to 1, and a half-life above 0")
    args = replace(args, data_dir=args.data_dir if args.data_dir.name else args.data_dir.resolve())  # "." has no name
    try:
        device = "cpu" if args.device == "auto" and not torch.cuda.is_available() else runs.pick_device(args.device)
        folders = find_sessions(args.data_dir)
        if args.truth is not None:
            truth.check_name(args.truth, folders)
        if args.labeler == "supertux":
            sprite_folder(args, surroundings.ALL)  # raises before the work begins
        if args.detect_events:
            drawn = load_all_sprites(args, read_scales(args.sprite_scales) or (1.0,))  # raises before the work begins
            review.import_overrides(
                args.overrides, args.data_dir, folders, dict(zip(drawn.kinds, drawn.events, strict=True))
            )
            path, single = calibration.thresholds_file(args.data_dir), args.template_thresholds
            if args.event_free:
                single = (*single, *calibrate(args, device, path))  # the last of a name counts
            else:
                single = (*calibration.read_thresholds(path, set(map(calibration.stem, drawn.kinds))), *single)
            args = replace(args, template_thresholds=single)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before the first session; what was searched for --event-free need not be again")
        raise SystemExit(130) from None

    sessions, failures, done, stopped = {}, [], {"labelled": 0, "kept": 0}, False
    rows, cards, compared, curves, fallbacks = {}, [], [], [], {""}
    unlabelled = [folder for folder in folders if args.overwrite or not files.has_labels(folder)]
    try:
        searched, lost = search_at_once(args, device, unlabelled)
    except (ImportError, ConnectionError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        print(f"{len(folders)} sessions: none labelled; stopped by Ctrl-C, what was searched need not be again")
        raise SystemExit(130) from None
    for folder in folders:
        try:
            if folder in lost:
                raise RuntimeError(lost[folder])
            # Read
            session, reader = load_session(folder), VideoReader(folder / "recording.mp4", device)
            n = min(session.n_frames, reader.n_frames)
            if reader.fallback not in fallbacks:
                fallbacks.add(reader.fallback)
                print(f"{folder}: the CPU decodes its video, {device} only searches it: {reader.fallback}")
            if session.n_frames != reader.n_frames:
                print(f"{folder}: {session.n_frames} rows, {reader.n_frames} video frames; the first {n} are labelled")

            # Label
            metadata = label_metadata(args, session, n)
            files.install_labels(folder)
            if args.overwrite or not files.has_labels(folder):
                again = args.rescan and folder not in searched  # else it was just now
                files.say_what_changes(folder, metadata, OLDER)
                label_session(replace(args, rescan=again), session, reader, metadata)
                done["labelled"] += 1
            else:
                files.check_labels(folder, metadata, OLDER)
                done["kept"] += 1
            events = read_table(folder / "events.parquet", EVENTS).to_pylist()
            found = {name: [e["frame_idx"] for e in events if e["event"] == name] for name in truth.TRUE_NAMES}
            outcomes = read_table(folder / "episodes.parquet", EPISODES)["outcome"].to_pylist()
            sessions[folder.name] = {"frames": n} | {name: len(frames) for name, frames in found.items()}
            counts = ", ".join(f"{name} {len(frames)}" for name, frames in found.items())
            print(f"{folder.name}: {n} frames, {counts}, {len(outcomes)} episodes ({', '.join(outcomes)})")
            inside, least = len(read_table(folder / "returns.parquet", RETURNS)), [e["confidence"] for e in events]
            cells = (n, inside, len(outcomes), *map(len, found.values()), f"{min(least):.2f}" if least else "-")
            rows[folder] = f"| {folder.name} | {' | '.join(map(str, cells))} |"

            # Intents
            if args.labeler != "none":
                labels = find_intents(args, session, reader, n)
                shares = np.bincount(labels, minlength=len(INTENT_NAMES)) / n
                parts = [f"{name} {share:.0%}" for name, share in zip(INTENT_NAMES, shares, strict=True) if share]
                print(f"{folder.name}: intents {', '.join(parts)}")
                if (labels == INTENT_NAMES.index("WAIT")).all():
                    signs = " ".join(intents.signs_of(intent_rules(args)))
                    print(f"{folder.name}: none of {signs} was there; [intents] of the --game file names others")
            elif intents.are_outdated(folder):
                print(f"{folder.name}: intent.parquet was made for other episodes, kept; --labeler makes it again")

            # Ask
            if args.review:
                cards += find_cards(args, session, reader, metadata)

            # Compare
            if args.truth is not None and truth.is_there(folder / args.truth):
                compared.append(beside_truth(args, session, reader, metadata))
                if args.progress_reward:
                    those = scrolling.true_curves(folder / args.truth, session.timestamps[:n], reader.width)
                    if not those:
                        print(f"{folder.name}: no positions in {args.truth}, or no progress.parquet: none compared")
                    curves += those
            elif args.truth is not None:
                print(f"{folder.name}: no {args.truth}, not compared")
        except KeyboardInterrupt:
            stopped = True
            break
        except (ValueError, OSError, RuntimeError) as error:
            failures.append(f"{folder}: {error}")
            rows[folder] = f"| {folder.name} | failed |"

    totals = None
    try:
        if args.review and sessions and not stopped:
            cards = review.choose(cards, args.review)
            gammas = {files.metadata_of(card.folder / "returns.parquet", RETURNS).get("gamma") for card in cards}
            kept = ["--gamma", *gammas] if len(gammas) == 1 and gammas != {str(Args.gamma)} else []
            review.write_page(args.data_dir / "review.html", cards, drawn.folder, args.data_dir, kept)
            taken = sum(card.taken for card in cards)
            print(f"{args.data_dir / 'review.html'} asks about {len(cards)} events, {taken} of them taken; open it")
        if compared and not stopped:
            totals = truth.write_report(args.data_dir / "label_report", compared)
        if curves and not stopped:
            print(scrolling.progress_report(curves))
            scrolling.draw_progress(curves, args.data_dir / "label_report" / "progress.png")
    except OSError as error:
        raise SystemExit(f"the labels are written, what tells of them in {args.data_dir} is not: {error}") from None
    if len(rows) > 1:
        columns = ("session", "frames", "in episodes", "episodes", *truth.TRUE_NAMES, "least sure event")
        print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", *rows.values(), sep="\n")
    counts = ", ".join(f"{name} {sum(s[name] for s in sessions.values())}" for name in truth.TRUE_NAMES)
    summary = (
        f"{len(folders)} sessions: {done['labelled']} labelled, {done['kept']} kept, {len(failures)} failed; {counts}"
    )
    if failures:
        summary = f"{len(failures)} of {len(folders)} sessions failed:\n" + "\n".join([*failures, summary])
    if stopped:
        print(f"{summary}; stopped by Ctrl-C, the rest is as before")
        raise SystemExit(130)
    if failures:
        raise SystemExit(summary)
    print(summary)
    return {"sessions": sessions, "truth": totals}


if __name__ == "__main__":
    main(tyro.cli(Args, args=runs.cli_words(Args, env_prefix="REFLEX_TRAIN_")))
