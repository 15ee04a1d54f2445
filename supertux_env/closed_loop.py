"""Episodes of the real game, for any player that presses keys: how far it gets, beside baselines.

An episode is one life in a game of its own on an X server of its own: from the spawn point to a death, a win, 10 s
without progress, or 45 s. A seed picks the pause before play and how far to the right Tux starts, so that players are
compared on equal seeds. Games run side by side in processes; an episode whose game or player was starved is void and
played again.

A player is made by `make(terrain, seed)` and has `step(frame, position, time_s)`, called once per frame of the grid
with the picture (H, W, 3) uint8 RGB, Tux's (x, y, vx, vy) and the seconds since play began. It yields (seconds from
now, keys to hold from then on); the last keys stay held. The page is docs/closed_loop.md.
"""

import ctypes
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import connection, get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from common.desktop import Keyboard, Screen
from common.sessions import Session, key_names, key_table
from common.video import VideoWriter, draw_keys, iter_frames
from supertux_env.demonstrators import KEYS, RIGHT, Demonstrator
from supertux_env.launch import MIN_LOGIC_HZ, Game, Truth, Xvfb
from supertux_env.levels import STOCK, TILE, Terrain, make_level, move_spawn, read_terrain

PLAYERS = ("policy", "skilled", "replay", "random", "always-right", "no-op")
RESULTS = ("closed_loop.json", "closed_loop.png", "best.mp4", "median.mp4", "provenance.json")
PER_DECISION = ("decision_ms", "held")  # of an episode; too long for closed_loop.json
EPISODE_S, STUCK_S = 45.0, 10.0
DELAY_S, SPAWN_SHIFT = 1.0, 3 * TILE  # most seconds before play, most pixels to the right: the ground there is flat
DEMONSTRATOR_FPS = 10.0  # its delays are counted in frames of this rate
LEFT_OUT, SPARE = 0.05, 3  # an episode is void where more decisions were left out than either: this share, this many
TRIES = 5  # of an episode that is void
SILENCE_S = 180.0  # no episode takes this long


# players --------------------------------------------------------------------------------------------------------------
class Constant:
    """Holds the same keys all the time."""

    def __init__(self, keys: frozenset[str], terrain: Terrain, seed: int):
        self.keys = set(keys)

    def step(self, frame, position, time_s) -> Iterator[tuple[float, set[str]]]:
        yield 0.0, self.keys


class Skilled:
    """The scripted demonstrator at its best: without the random acts of its recordings, at the rate it was made for."""

    def __init__(self, fps: float, terrain: Terrain, seed: int):
        self.demonstrator, self.every, self.calls = Demonstrator("skilled", terrain, seed), frame_step(fps), 0
        self.demonstrator.skill = replace(self.demonstrator.skill, random=0.0)

    def step(self, frame, position, time_s) -> Iterator[tuple[float, set[str]]]:
        if self.calls % self.every == 0:
            yield 0.0, self.demonstrator.due()
            self.demonstrator.decide(frame, position)
        self.calls += 1


class Replay:
    """Open loop: the keys of a session, sent at the times at which they were recorded."""

    def __init__(self, changes: list[tuple[float, str, bool]], fps: float, terrain: Terrain, seed: int):
        self.changes, self.period_s, self.down = deque(changes), 1 / fps, set()

    def step(self, frame, position, time_s) -> Iterator[tuple[float, set[str]]]:
        while self.changes and self.changes[0][0] < time_s + self.period_s:
            at_s, key, pressed = self.changes.popleft()
            (self.down.add if pressed else self.down.discard)(key)
            yield at_s - time_s, set(self.down)


class Random:
    """Each key goes down and up by chance, as often and for as long as in a session: `press` and `release` (K,) are the
    chances per frame that an upper key goes down and a lower one up."""

    def __init__(self, keys: list[str], press: np.ndarray, release: np.ndarray, terrain: Terrain, seed: int):
        self.keys, self.press, self.release = np.array(keys), press, release
        self.rng, self.down = np.random.default_rng(seed), np.zeros(len(keys), bool)

    def step(self, frame, position, time_s) -> Iterator[tuple[float, set[str]]]:
        self.down ^= self.rng.random(len(self.keys)) < np.where(self.down, self.release, self.press)
        yield 0.0, set(self.keys[self.down].tolist())


def frame_step(fps: float) -> int:
    """Every how many frames of `fps` the demonstrator looks. ValueError where its own rate does not divide that."""
    every = round(fps / DEMONSTRATOR_FPS)
    if every < 1 or abs(fps - every * DEMONSTRATOR_FPS) > 0.01 * fps:
        raise ValueError(
            f"the demonstrator looks {DEMONSTRATOR_FPS:g} times a second, which does not divide {fps:g} frames a "
            "second. Leave skilled out of --players"
        )
    return every


def baselines(session: Session, fps: float) -> dict[str, Callable]:
    """The players that need no model, by name; `replay` and `random` take their keys from `session`."""
    rows = session.inputs.to_pylist()
    start_ms, keys = int(session.timestamps[0]), key_names(session)
    changes = [
        ((row["timestamp"] - start_ms) / 1000, row["key_name"], row["state"] == "down")
        for row in rows
        if row["event_type"] == "key" and row["key_name"] in keys and row["state"] in ("down", "up")
    ]
    ticks = np.arange(session.timestamps[0], session.timestamps[-1] + 1, 1000 / fps)  # ms
    state = key_table(session, keys)[0][np.searchsorted(session.timestamps, ticks, side="right") - 1]  # (N, K)
    before, after = state[:-1], state[1:]
    press = (~before & after).sum(0) / np.maximum(1, (~before).sum(0))
    release = (before & ~after).sum(0) / np.maximum(1, before.sum(0))
    if not changes:
        raise ValueError(f"{session.folder} holds no key of a game. Name a session in which one was played")
    return {
        "skilled": partial(Skilled, fps),
        "replay": partial(Replay, changes, fps),
        "random": partial(Random, keys, press, release),
        "always-right": partial(Constant, frozenset({RIGHT})),
        "no-op": partial(Constant, frozenset()),
    }


# an episode -----------------------------------------------------------------------------------------------------------
def level_variants(level: str) -> list[tuple[str, int]]:
    """What `--level` names: `generated:3`, `generated:0-9`, or a level of the game -> [(name, seed of the level)].
    ValueError for anything else."""
    name, _, numbers = level.partition(":")
    first, _, last = numbers.partition("-")
    if name == "generated" and first.isdecimal() and (last or first).isdecimal() and int(last or first) >= int(first):
        return [("generated", variant) for variant in range(int(first), int(last or first) + 1)]
    if level in STOCK:
        return [(level, 0)]
    expected = ", ".join(["generated:3", "generated:0-9", *sorted(STOCK)])
    raise ValueError(f"--level {level} is not known, expected one like {expected}")


def play_episode(make: Callable, level: str, seed: int, fps: float, video: Path | None = None) -> dict:
    """Play one life. Returns what came of it; `held` (one list of key names per decision) belongs to the frames of
    `video`. Raises RuntimeError where game or player was starved, or the game ended by itself."""
    variants, rng = level_variants(level), np.random.default_rng(seed)
    name, variant = variants[seed % len(variants)]
    delay_s, shift = rng.uniform(0, DELAY_S), rng.uniform(0, SPAWN_SHIFT)
    with ExitStack() as machine:
        scratch = machine.enter_context(tempfile.TemporaryDirectory(prefix="closed_loop_"))
        path = move_spawn(make_level(name, variant, Path(scratch) / "level.stl"), shift)
        terrain = read_terrain(path)
        player = make(terrain, seed)
        display = machine.enter_context(Xvfb())
        game = machine.enter_context(Game(path, display))
        keyboard, screen = Keyboard(display), Screen(display)
        machine.callback(screen.close)
        machine.callback(keyboard.close)
        writer = machine.enter_context(VideoWriter(video, fps, 640, 480, 20, "ultrafast")) if video else None
        game.skip_intro(keyboard)
        time.sleep(delay_s)
        first_ns = time.monotonic_ns()
        played = _play(player, game, keyboard, screen, fps, writer)
        end_ns = time.monotonic_ns()
        keyboard.hold(set())
        logic_hz = game.logic_hz()
    if logic_hz < MIN_LOGIC_HZ:
        raise RuntimeError(f"the game ran at {logic_hz:.0f} steps a second, expected {MIN_LOGIC_HZ:g} or more")
    missed, ticks = played["left_out"], played["decisions"] + played["left_out"]
    allowed = max(SPARE, int(LEFT_OUT * ticks))
    if missed > allowed:
        raise RuntimeError(f"{missed} of {ticks} decisions came too late, expected {allowed} or fewer")
    facts = {"seed": seed, "level": f"{name}:{variant}" if name == "generated" else name, "delay_s": delay_s}
    facts |= {"spawn_x": terrain.spawn_x, "logic_hz": logic_hz}
    return facts | played | score(game.events, game.positions, first_ns, end_ns, terrain)


def _play(player, game: Game, keyboard: Keyboard, screen: Screen, fps: float, writer: VideoWriter | None) -> dict:
    """The loop from the first picture to the end of the episode: decisions on the grid of frames, what is late is left
    out."""
    start, tick, far, far_at, late = time.monotonic(), 0, -np.inf, 0.0, 0
    held, decision_ms = [], []
    while (now_s := tick / fps) < EPISODE_S and now_s - far_at < STUCK_S:
        _sleep_until(start + now_s)
        frame, grabbed_ns = screen.grab()
        if game.count("death") or game.count("win"):
            break
        if frame is None or not game.running() or game.count("start") > 1:
            raise RuntimeError(f"the game ended or began again by itself: {screen.failure or game.log[-3:]}")
        position = game.position()
        if position[0] >= far + 1:  # by a pixel
            far, far_at = position[0], now_s
        sent_ns = grabbed_ns
        for number, (after_s, keys) in enumerate(player.step(frame, position, now_s)):
            _sleep_until(start + now_s + after_s)
            keyboard.hold(keys)
            if number == 0 and after_s <= 0:
                sent_ns = time.monotonic_ns()
        decision_ms.append((sent_ns - grabbed_ns) / 1e6)
        held.append(sorted(keyboard.held))
        if writer:
            writer.add(frame)
        next_tick = max(tick + 1, int((time.monotonic() - start) * fps))
        late += next_tick - tick - 1
        tick = next_tick
    outcome = "time" if now_s >= EPISODE_S else "stuck"  # death and win are the game's to tell
    return {
        "outcome": outcome, "decisions": len(held), "left_out": late, "decision_ms": decision_ms, "held": held
    }  # fmt: skip


def score(events: list[Truth], positions: list[tuple], start_ns: int, stop_ns: int, terrain: Terrain) -> dict:
    """What came of a life that was played from `start_ns` to `stop_ns`: progress up to the first death or win, and the
    `outcome` where it was one of these."""
    last = next((event for event in events if event.what in ("death", "win")), None)
    end_ns = last.monotonic_ns if last else stop_ns
    way = terrain.goal_x - terrain.spawn_x  # pixels
    far = max((x for ns, x, *_ in positions if ns <= end_ns), default=terrain.spawn_x)
    progress = 1.0 if last and last.what == "win" else float(np.clip((far - terrain.spawn_x) / way, 0, 1))
    before = [event.what for event in events if event.monotonic_ns <= end_ns]
    figures = {"progress": progress, "tiles": progress * way / TILE, "seconds": (end_ns - start_ns) / 1e9}
    figures |= {"squishes": before.count("squish"), "other_kills": before.count("kill")}
    return figures | ({"outcome": last.what} if last else {})


def _sleep_until(monotonic: float):
    time.sleep(max(0.0, monotonic - time.monotonic()))


# many episodes, games side by side ------------------------------------------------------------------------------------
def play_episodes(
    players: dict[str, Callable], level: str, seeds: list[int], fps: float, games: int = 3, videos: dict | None = None
) -> list[dict]:
    """Every player on every seed, `games` at a time: one dict per episode, by player, then by seed.

    `players` are picklable `make(terrain, seed)`, such as `functools.partial` of a class at the top of a module; call
    this under the guard of a script. `videos` {player: folder} records those players' episodes as <seed>.mp4.
    Raises RuntimeError for an episode that is void `TRIES` times.
    """
    level_variants(level)
    waiting = deque((name, seed) for seed in seeds for name in players)  # all players meet the same load
    voids, done, running, workers = {}, {}, {}, {}
    context = get_context("spawn")

    def begin(pipe):
        name, seed = running[pipe] = waiting.popleft()
        video = videos[name] / f"{seed}.mp4" if videos and name in videos else None
        pipe.send((players[name], level, seed, fps, video))

    bar = tqdm(total=len(waiting), unit="episode", desc=level, smoothing=0)
    try:
        for _ in range(min(games, len(waiting))):
            pipe, far_end = context.Pipe()
            process = context.Process(target=_serve, args=(far_end,), daemon=True)
            process.start()
            far_end.close()
            workers[pipe] = process
        for pipe in workers:
            _receive(pipe)  # all have imported what they need, which would starve a game
        for pipe in workers:
            begin(pipe)
        while running:
            ready = connection.wait(list(running), SILENCE_S)
            if not ready:
                raise RuntimeError(f"no episode came to its end in {SILENCE_S:.0f} s. Try again with --games 1")
            for pipe in ready:
                kind, answer = _receive(pipe)
                name, seed = running.pop(pipe)
                if kind == "void":
                    voids[name, seed] = [*voids.get((name, seed), []), answer]
                    waiting.appendleft((name, seed))
                    if len(voids[name, seed]) == TRIES:
                        raise RuntimeError(
                            f"{name}, seed {seed} was void {TRIES} times, at last because {answer}. Run less beside "
                            "it, play fewer at a time (--games 1), or use a smaller network"
                        )
                else:
                    done[name, seed] = {"player": name, **answer, "voids": voids.get((name, seed), [])}
                    bar.update(1)
                bar.set_postfix_str(f"void {sum(map(len, voids.values()))}")
                if waiting:
                    begin(pipe)
    finally:
        bar.close()
        for pipe, process in workers.items():
            pipe.close()
            if running:  # cut off: they stop their game and X server first
                process.terminate()
        for process in workers.values():
            process.join(15)
            process.kill()
    return [done[name, seed] for name in players for seed in seeds]


def _receive(pipe) -> tuple[str, object]:
    """The next answer of a process. Raises RuntimeError for one that says error, and where the process is gone."""
    try:
        kind, answer = pipe.recv()
    except (EOFError, ConnectionError):
        kind, answer = "error", "the process of a game ended by itself. Its last words stand above, if it had any"
    if kind == "error":
        raise RuntimeError(answer)
    return kind, answer


def _serve(pipe):
    """A process that plays one episode after the other, until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the contexts, which stop game and X server
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: the same where the parent was killed
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        pipe.send(("ready", None))
        while True:
            task = pipe.recv()
            try:
                answer = "played", play_episode(*task)
            except (RuntimeError, TimeoutError, ConnectionError) as error:
                answer = "void", str(error).rstrip(".")
            except (ValueError, OSError, ImportError) as error:
                answer = "error", str(error)
            except Exception:
                answer = "error", traceback.format_exc()
            pipe.send(answer)


# what it says ---------------------------------------------------------------------------------------------------------
def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate."""
    centre, half = hits / n + z**2 / (2 * n), z * np.sqrt(hits / n * (1 - hits / n) / n + z**2 / (4 * n**2))
    low, high = np.clip(np.array([centre - half, centre + half]) / (1 + z**2 / n), 0, 1)
    return float(low), float(high)


def resample(levels: list[str], draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """How often each of N episodes, whose level is `levels[i]`, is drawn: (draws, N) counts for bootstrap means.

    Whole levels are drawn with all their episodes where there is more than one: episodes of one level are alike, and
    what is said should hold for other levels. On one level episodes are drawn."""
    names = sorted(set(levels))
    unit = np.array([names.index(level) for level in levels]) if len(names) > 1 else np.arange(len(levels))  # (N,)
    n_units = int(unit.max()) + 1
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_units, np.full(n_units, 1 / n_units), draws)[:, unit]


def mean_interval(values: np.ndarray, weights: np.ndarray) -> dict:
    """Mean of (N,) values and its 95 % percentile interval over bootstrap counts (draws, N)."""
    means = weights @ values / weights.sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


def summarise(episodes: list[dict], fps: float) -> dict:
    """Figures per player, and paired differences of the first player minus each other one."""
    by_player: dict[str, list[dict]] = {}
    for episode in episodes:
        by_player.setdefault(episode["player"], []).append(episode)
    first = next(iter(by_player))
    weights = resample([episode["level"] for episode in by_player[first]])
    columns = {
        name: {key: np.array([e[key] for e in rows], float) for key in ("tiles", "progress", "seconds", "squishes")}
        for name, rows in by_player.items()
    }
    players, differences = {}, {}
    for name, rows in by_player.items():
        outcomes, hz = [episode["outcome"] for episode in rows], [episode["logic_hz"] for episode in rows]
        ms = np.concatenate([episode["decision_ms"] for episode in rows])
        decisions, left_out = (sum(e[key] for e in rows) for key in ("decisions", "left_out"))
        keys = [key for e in rows for held in e["held"] for key in held]
        players[name] = {key: mean_interval(values, weights) for key, values in columns[name].items()}
        players[name] |= {
            "outcomes": {what: outcomes.count(what) for what in ("win", "death", "stuck", "time")},
            "win_rate_interval": wilson(outcomes.count("win"), len(rows)),
            "episodes": len(rows),
            "voids": sum(len(e["voids"]) for e in rows),
            "logic_hz": {"lowest": min(hz), "median": float(np.median(hz))},
            "decision_ms": dict(zip(("p50", "p99", "max"), np.percentile(ms, [50, 99, 100]).tolist(), strict=True)),
            "inside_their_frame": float((ms < 1000 / fps).sum() / max(1, decisions + left_out)),
            "key_rates": {key: keys.count(key) / max(1, decisions) for key in sorted({*KEYS, *keys})},
        }
        if name != first:
            differences[name] = {
                key: mean_interval(columns[first][key] - columns[name][key], weights) for key in ("tiles", "progress")
            }
    return {"players": players, "reference": first, "reference_minus": differences}


def report(summary: dict):
    """The figures for the terminal."""
    players = summary["players"]
    print(f"\n{'player':<14}{'tiles':>6}{'95 %':>16}{'of the way':>12}{'seconds':>9}{'squishes':>10}   wins, 95 %")
    for name, row in players.items():
        tiles, (low, high) = row["tiles"], row["win_rate_interval"]
        between = f"{tiles['low']:.1f} to {tiles['high']:.1f}"
        others = f"{row['progress']['mean']:>12.1%}{row['seconds']['mean']:>9.1f}{row['squishes']['mean']:>10.2f}"
        wins = f"{row['outcomes']['win']} of {row['episodes']}, {low:.0%} to {high:.0%}"
        print(f"{name:<14}{tiles['mean']:>6.1f}{between:>16}{others}   {wins}")
    for name, row in summary["reference_minus"].items():
        tiles = row["tiles"]
        between = f"{tiles['low']:+.1f} to {tiles['high']:+.1f}"
        print(f"{summary['reference']} minus {name}: {tiles['mean']:+.1f} tiles, {between}")
    slowest, voids = min(r["logic_hz"]["lowest"] for r in players.values()), sum(r["voids"] for r in players.values())
    inside = ", ".join(f"{name} {row['inside_their_frame']:.1%}" for name, row in players.items())
    print(f"\n{slowest:.0f} game steps a second or more; {voids} void episodes were played again")
    print(f"decisions inside their own frame: {inside}")


def draw_figure(episodes: list[dict], summary: dict, path: Path, title: str):
    """Progress per player: a point per episode, the mean and its interval."""
    players = summary["players"]
    figure = Figure(figsize=(7, 1 + 0.5 * len(players)), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for row, (name, figures) in enumerate(players.items()):
        tiles, mean = [e["tiles"] for e in episodes if e["player"] == name], figures["tiles"]
        axes.scatter(tiles, row + rng.uniform(-0.2, 0.2, len(tiles)), s=12, color="tab:blue", alpha=0.5)
        axes.plot([mean["low"], mean["high"]], [row, row], color="black", linewidth=2)
        axes.plot(mean["mean"], row, "D", color="black", markersize=5)
    axes.set_yticks(range(len(players)), [f"{n}, {p['outcomes']['win']} wins" for n, p in players.items()])
    axes.invert_yaxis()
    axes.set_xlabel("progress in tiles of 32 pixels: episodes, mean, 95 % interval")
    axes.set_title(title)
    figure.savefig(path, dpi=110)


def draw_video(episode: dict, recorded: Path, path: Path, keys: list[str], fps: float):
    """A recorded episode above the keys that were held from each picture on."""
    note = f"{episode['level']}, seed {episode['seed']}: {episode['outcome']} after {episode['seconds']:.1f} s, "
    note += f"{episode['tiles']:.1f} tiles"
    held, video = iter(episode["held"]), None
    for _, pictures in iter_frames(recorded):
        for picture in pictures.permute(0, 2, 3, 1).numpy():  # (H, W, 3)
            drawn = draw_keys(picture, keys, {episode["player"]: np.isin(keys, next(held))}, note)
            video = video or VideoWriter(path, fps, drawn.shape[1], drawn.shape[0], crf=23)
            video.add(drawn)
    if video:
        video.close()
