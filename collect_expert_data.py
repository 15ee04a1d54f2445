"""Episodes of an expert as files to learn from: what it saw, what it pressed, what it got.

The expert is scripted, a person at the keyboard, a file of yours, a trained policy, a list of actions or chance; the
game is PokemonEnv, with your Emerald ROM or the small quest that ships with it, or any Gymnasium environment with
pictures and a Discrete action space. Page: docs/collect_expert_data.md

    python collect_expert_data.py --episodes 20

Out: expert_data/episode_0001.npz and so on, numbering goes on from what is there; failed ones in expert_data/failed/.
"""

import errno
import json
import math
import os
import signal
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from tqdm import tqdm

from pokemon_env import EMERALD_ROM, experts
from pokemon_env.episode_writer import Writer, recover
from pokemon_env.episodes import episode_paths, open_observations, other_game, read_game
from pokemon_env.wrappers import choose_env, make_env


@dataclass
class Args:
    episodes: int = 10
    """episodes to collect now, 1 or more; those that fail count"""
    expert: str = "scripted"
    """scripted, random[:seed], keyboard, replay:FILE, checkpoint:RUN_OR_FILE or path/to/file.py:factory"""
    expert_data_dir: Path = Path("expert_data")
    """folder the episodes go to, one game each; what is in it stays"""
    seed: int = 1
    """episode n of the folder is reset with seed + n"""
    epsilon: float = 0.0
    """share of steps, 0 to 1, in which a random action is played; the expert's own stays the label"""
    num_workers: int = 1
    """processes that play; 1 plays in this one"""

    env_id: str | None = None
    """a Gymnasium environment, such as ALE/Freeway-v5; None: PokemonEnv"""
    rom_path: Path = EMERALD_ROM
    """Pokemon Emerald (US); the default missing, the quest is played"""
    core: Path | None = None
    """a libretro core for the emulator; None: the one of stable-retro"""
    init_state: Path | None = None
    """save-state that episodes begin from; None: power on"""
    max_steps: int | None = None
    """steps after which an episode is cut, in place of the environment's own limit; 0 or None: that limit"""

    compress: bool = False
    """deflate the files: the quest's become 28 times smaller, and the trainer has to unpack them first"""
    chunk_steps: int = 256
    """steps that a killed run loses at most, 1 or more"""
    record_video: bool = False
    """write a video beside every episode, one picture a step"""
    video_fps: int = 8
    """pictures per second of that video"""

    keys: tuple[str, ...] = (
        "z=A",
        "x=B",
        "return=START",
        "right shift=SELECT",
        "up=UP",
        "down=DOWN",
        "left=LEFT",
        "right=RIGHT",
        "a=L",
        "s=R",
    )
    """keyboard expert: KEY=ACTION each, keys by their pygame name, actions by name or number"""
    idle: str | None = None
    """keyboard expert: action played and recorded while no key is down; None: the game waits for a key"""
    steps_per_s: float = 4.0
    """keyboard expert: most steps per second; a step is a second of the game"""


# --- ALGO LOGIC: which environment is played, and who says what is played. T steps, H W of a picture ---


def meanings(env: gym.Env) -> list[str] | None:
    """Names of the actions, where the environment has any."""
    get = getattr(env.unwrapped, "get_action_meanings", None)
    return list(get()) if get else None


def person(args: Args, names: list[str] | None, n_actions: int, stop) -> experts.KeyboardExpert:
    """The keyboard expert with the keys of `args`."""
    idle = None if args.idle is None else to_number(args.idle, names, n_actions, "--idle")
    return experts.KeyboardExpert(key_table(args.keys, names, n_actions), idle, args.steps_per_s, stop)


def key_table(rows: tuple[str, ...], names: list[str] | None, n_actions: int) -> dict[str, int]:
    table = {}
    for row in rows:
        key, equals, action = row.partition("=")
        if not (key and equals and action):
            raise ValueError(f"--keys {row!r}: expected KEY=ACTION, such as z=A")
        table[key] = to_number(action, names, n_actions, f"--keys {row}")
    return table


def to_number(action: str, names: list[str] | None, n_actions: int, where: str) -> int:
    try:
        return experts.normalize_action(int(action) if action.isdigit() else action, names, n_actions)[0]
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).replace('the expert answered', 'there is no action')}") from None


# collecting -----------------------------------------------------------------------------------------------------------
PLAY, END = 0, 1  # what a recorder is told
SLICE_S = 0.1  # seconds that it plays on its own


class GameError(Exception):
    """The game raised an OSError, raised from it; one without this is the data folder's."""


class Recorder(gym.Env):
    """An environment with an expert and a writer. One step of it plays on for SLICE_S and writes what happens, so that
    pictures stay in the process that sees them. Its info holds a report as JSON: steps and labels since the last one,
    the `episode` that ended, a `problem` that ends the run, `stop` after Ctrl-C."""

    observation_space, action_space = gym.spaces.Discrete(1), gym.spaces.Discrete(2)

    def __init__(self, args: Args, where: tuple, fixed_seed: int | None, stop=None):
        if args.expert == "keyboard":
            self.env = make_env(*where)
            actions = meanings(self.env), int(self.env.action_space.n)
            self.env.expert = experts.Driver(person(args, *actions, stop), *actions)
        else:
            self.env = make_env(*where, args.expert)
        self.args, self.fixed_seed, self.writer, self.state = args, fixed_seed, None, None
        n_actions = int(self.env.action_space.n)
        self.facts = {
            "env_id": choose_env(*where)[0],
            "rom_sha1": getattr(self.env.unwrapped, "rom_sha1", None) or "",
            "action_meanings": meanings(self.env) or [str(n) for n in range(n_actions)],
            "shape": self.env.observation_space.shape,
            "expert": args.expert,
            "epsilon": args.epsilon,
        }

    def reset(self, *, seed=None, options=None):
        """A new episode. Its number and seed come from the folder, not from `seed`."""
        return 0, self.report(self.begin)

    def step(self, action):
        return 0, 0.0, False, False, self.report(self.interrupt if action == END else self.play)

    def report(self, act) -> dict:
        self.news = {"steps": 0, "actions": [0] * len(self.facts["action_meanings"]), "episode": None}
        self.news |= {"problem": "", "stop": False}
        try:
            act()
        except KeyboardInterrupt:  # the window was closed, or a second Ctrl-C
            self.news["stop"] = True
            self.quietly(self.interrupt)
        except OSError as error:
            self.news["problem"] = f"{self.args.expert_data_dir}: {error.strerror or error}"
            if error.errno == errno.ENOSPC:
                self.news["problem"] += ". The finished episodes are whole. Free some space and start again"
            self.drop()
        except Exception as error:  # the game's own
            error = error.__cause__ if isinstance(error, GameError) else error
            traceback.print_exception(error)
            self.news["problem"] = f"{self.facts['env_id']} failed: {experts.describe(error)}"
            self.quietly(self.interrupt)
        return {"report": json.dumps(self.news)}

    def quietly(self, act):
        try:
            act()
        except OSError as error:
            self.news["problem"] = self.news["problem"] or f"{self.args.expert_data_dir}: {error.strerror or error}"
            self.drop()

    def game(self, act, *args, **options):
        """What `act` of the environment returns."""
        try:
            return act(*args, **options)
        except OSError as error:
            raise GameError from error

    def begin(self):
        args = self.args
        self.writer = Writer.begin(args.expert_data_dir, args.seed, self.fixed_seed, self.facts, args.chunk_steps)
        seed, self.state = self.writer.facts["seed"], None
        self.rng, self.episode_return = np.random.default_rng([seed, 1]), 0.0
        obs, self.state = self.game(self.env.reset, seed=seed)
        self.writer.observe(np.ascontiguousarray(obs))
        self.check(False, False)

    def play(self):
        until = time.monotonic() + SLICE_S
        while self.writer and time.monotonic() < until:
            info, label = self.state["json"], self.state["expert_action"]
            taken = label
            if self.args.epsilon and self.rng.random() < self.args.epsilon:
                taken = int(self.rng.integers(len(self.facts["action_meanings"])))
            obs, reward, terminated, truncated, self.state = self.game(self.env.step, taken)
            self.writer.step(label, taken, reward, terminated or truncated, info)
            self.writer.observe(np.ascontiguousarray(obs))
            self.episode_return += reward
            self.news["steps"] += 1
            self.news["actions"][label] += 1
            self.check(terminated, truncated)

    def check(self, terminated: bool, truncated: bool):
        """End the episode where the game or the expert does."""
        error = self.state["expert_error"]
        if terminated or truncated:
            self.end(truncated=truncated and not terminated, error="")
        elif error:
            self.end(truncated=True, error="" if error.startswith("EpisodeEnd") else error)

    def interrupt(self):
        if self.state is None:
            self.drop()
        elif self.writer:
            self.end(truncated=True, error="", interrupted=True)

    def end(self, truncated: bool, error: str, interrupted: bool = False):
        args, writer, info = self.args, self.writer, self.state["json"]
        ending = {"truncated": truncated, "interrupted": interrupted, "error": error}
        ending |= {"success": self.state["success"], "final_info": info}
        path = writer.close(ending, args.compress)
        self.writer = None
        self.news["episode"] = ending | {"number": writer.number, "length": writer.steps, "return": self.episode_return}
        self.news["episode"]["milestones"] = json.loads(info).get("milestones", {}).get("completed", [])
        if path and args.record_video and writer.steps:
            write_video(path, args.video_fps)

    def drop(self):
        """Let go of the episode as it is: the next start joins it."""
        if self.writer:
            self.writer.file.close()
        self.writer = None

    def close(self):
        self.drop()
        self.env.close()


def write_video(path: Path, fps: int):
    """The pictures of an episode as a video beside it."""
    from common.video import VideoWriter  # imports torch

    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    try:
        with open_observations(path) as (shape, _, stream), VideoWriter(temporary, fps, shape[2], shape[1]) as video:
            for _ in range(shape[0]):
                video.add(np.frombuffer(stream.read(math.prod(shape[1:])), np.uint8).reshape(shape[1:]))
        os.replace(temporary, path.with_suffix(".mp4"))
    finally:
        temporary.unlink(missing_ok=True)


# workers --------------------------------------------------------------------------------------------------------------
class LocalWorker:
    """A recorder in this process. `reset` and `step` say what to do, `receive` does it."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.request = recorder, None

    def reset(self):
        self.request = self.recorder.reset

    def step(self, action: int):
        self.request = partial(self.recorder.step, action)

    def receive(self) -> dict:
        return json.loads(self.request()[-1]["report"])

    def close(self):
        self.recorder.close()


class RemoteWorker:
    """A recorder in a process of its own, as a vector of one: together, each would wait for the slowest."""

    def __init__(self, make):
        self.env = AsyncVectorEnv([make], context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        self.connection, self.wait = self.env.parent_pipes[0], None

    def reset(self):
        self.env.reset_async()
        self.wait = self.env.reset_wait

    def step(self, action: int):
        self.env.step_async(np.array([action]))
        self.wait = self.env.step_wait

    def receive(self) -> dict:
        """Raises EOFError or ConnectionError where the process is dead."""
        return json.loads(self.wait()[-1]["report"][0])

    def close(self):
        """Without a word to the process, which may be dead or in the middle of a step."""
        for process in self.env.processes:
            process.terminate()
        for process in self.env.processes:
            process.join()
        self.env.closed = True  # its own close() would wait for an answer


def ready(workers: list) -> list:
    """Those with an answer; waits for one."""
    if isinstance(workers[0], LocalWorker):
        return list(workers)
    answered = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in answered]


@dataclass
class Tally:
    """What came of the run so far."""

    names: list[str]  # of the actions
    episodes: list[dict] = field(default_factory=list)
    actions: np.ndarray = None  # labels per action
    steps: int = 0
    problem: str = ""

    def add(self, report: dict):
        self.steps += report["steps"]
        self.actions = np.array(report["actions"]) + (0 if self.actions is None else self.actions)
        self.episodes += [report["episode"]] if report["episode"] else []
        self.problem = self.problem or report["problem"]


def collect(args: Args, workers: list, tally: Tally, stop: "Stop", bar: tqdm):
    """Until all episodes are there. After Ctrl-C or a problem those under way are ended and no other begins."""
    left, busy, begun = args.episodes, [], time.monotonic()
    for worker in workers[: args.episodes]:
        worker.reset()
        busy.append(worker)
    left -= len(busy)
    while busy:
        for worker in ready(busy):
            try:
                report = worker.receive()
            except (EOFError, ConnectionError) as error:
                tally.problem = tally.problem or f"a worker died ({experts.describe(error)})"
                busy.remove(worker)
                continue
            tally.add(report)
            stop.received |= report["stop"]
            bar.update(bool(report["episode"]))
            bar.set_postfix_str(f"{tally.steps} steps, {tally.steps / (time.monotonic() - begun):.0f}/s", False)
            over = stop() or tally.problem
            if not (report["episode"] or report["problem"]):
                worker.step(END if over else PLAY)
            elif left and not over:
                worker.reset()
                left -= 1
            else:
                busy.remove(worker)


# the table ------------------------------------------------------------------------------------------------------------
def summarise(tally: Tally) -> dict:
    """Numbers over the episodes that came to their end; those without a step are `empty`."""
    failed = [e for e in tally.episodes if e["error"]]
    cut = [e for e in tally.episodes if e["interrupted"] and e["length"]]
    ended = [e for e in tally.episodes if not e["error"] and not e["interrupted"]]
    whole = [e for e in ended if e["length"]]
    counts = np.zeros(len(tally.names), int) if tally.actions is None else tally.actions
    reached = list(dict.fromkeys(name for e in whole for name in e["milestones"]))
    return {
        "episodes": len(whole),
        "empty": len(ended) - len(whole),
        "failed": {e["number"]: e["error"] for e in failed},
        "interrupted": [e["number"] for e in cut],
        "returns": [e["return"] for e in whole],
        "lengths": [e["length"] for e in whole],
        "success": [e["success"] for e in whole],
        "milestones": {name: sum(name in e["milestones"] for e in whole) for name in reached},
        "actions": {name: int(n) for name, n in zip(tally.names, counts, strict=True)},
        "steps": tally.steps,
    }


def table(summary: dict) -> str:
    from scipy.stats import binomtest  # a second to import, which every worker would pay

    def line(name: str, values: list[float]) -> str:
        v = np.array(values, float)
        return f"{name:<12}{v.mean():>9.2f}{v.std():>9.2f}{v.min():>9.2f}{np.median(v):>9.2f}{v.max():>9.2f}"

    def rate(name: str, hits: int, n: int) -> str:
        interval = binomtest(hits, n).proportion_ci(method="wilson")
        return f"{name:<26}{hits:>5} of {n:<5}{hits / n:>7.1%}   {interval.low:.1%} to {interval.high:.1%}"

    lines, n = [], summary["episodes"]
    if n:
        lines.append(f"{'':<12}{'mean':>9}{'std':>9}{'min':>9}{'median':>9}{'max':>9}")
        lines += [line("return", summary["returns"]), line("length", summary["lengths"])]
    if n and summary["milestones"]:
        lines.append(f"{'rates':<26}{'':<14}{'':>7}   95 % interval")
        lines += [rate(name, hits, n) for name, hits in summary["milestones"].items()]
        lines.append(rate("success", sum(summary["success"]), n))
    total = sum(summary["actions"].values())
    if total:
        counts = sorted(summary["actions"].items(), key=lambda item: -item[1])
        lines.append("actions     " + ", ".join(f"{name} {k} ({k / total:.1%})" for name, k in counts if k))
    return "\n".join(lines)


# main -----------------------------------------------------------------------------------------------------------------
class Stop:
    """Called: whether Ctrl-C or SIGTERM came. The first is noted, so that files are closed; the next stops at once."""

    def __init__(self):
        self.received = False

    def __call__(self) -> bool:
        return self.received

    def __enter__(self) -> "Stop":
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, _):
        self.received = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def check(args: Args):
    """Raise ValueError for values that cannot be meant."""
    for name, low, high in (
        ("episodes", 1, None),
        ("num_workers", 1, None),
        ("chunk_steps", 1, None),
        ("video_fps", 1, None),
        ("max_steps", 0, None),
        ("epsilon", 0, 1),
    ):
        value = getattr(args, name)
        if value is not None and (value < low or (high is not None and value > high)):
            expected = f"{low} to {high}" if high is not None else f"{low} or more"
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {expected}")
    if not args.steps_per_s > 0:
        raise ValueError(f"--steps-per-s {args.steps_per_s}: expected more than 0")
    if args.expert == "keyboard" and args.num_workers > 1:
        raise ValueError(f"--num-workers {args.num_workers}: one person plays one game, expected 1")
    if args.expert_data_dir.exists() and not args.expert_data_dir.is_dir():
        raise ValueError(f"--expert-data-dir {args.expert_data_dir} is a file, expected a folder")


def check_folder(folder: Path, facts: dict):
    """Raise ValueError where the episodes of `folder` are not of the game of `facts`; looks at the first of them."""
    for path in episode_paths(folder)[:1]:
        if found := other_game({**facts, "shape": (0, *facts["shape"])}, read_game(path), path.name):
            raise ValueError(
                f"{folder} holds another game: now {found}. Name another folder by --expert-data-dir, "
                f"or the same --env-id and --rom-path"
            )


def main(args: Args) -> dict:
    """Collect, then print the table. Returns what is in it, and `recovered`. Exit status 1 if an episode failed,
    none has a step or the disk is full, 130 after Ctrl-C."""
    stop, workers = Stop(), []
    try:
        check(args)
        where = (args.env_id, args.rom_path, args.core, args.init_state, args.max_steps)
        fixed_seed = None
        if args.expert.startswith("replay:"):
            fixed_seed = experts.load_replay(Path(args.expert.removeprefix("replay:")))[1]
        args.expert_data_dir.mkdir(parents=True, exist_ok=True)
        recovered = recover(args.expert_data_dir, args.compress)
        recorder = Recorder(args, where, fixed_seed, stop)
        try:
            check_folder(args.expert_data_dir, recorder.facts)
        except (ValueError, OSError):
            recorder.close()
            raise
    except (ValueError, OSError, ImportError, gym.error.Error) as error:
        raise SystemExit(str(error)) from None
    n_workers = min(args.num_workers, args.episodes)
    by = f"{n_workers} workers" if n_workers > 1 else "this process"
    env_id, tally = recorder.facts["env_id"], Tally(recorder.facts["action_meanings"])
    print(f"{env_id}: {args.episodes} episodes of the {args.expert} expert by {by} into {args.expert_data_dir}")
    if args.expert == "keyboard":
        print("keys: " + ", ".join(args.keys) + "; Escape or closing the window ends")

    with stop, tqdm(total=args.episodes, unit="episode") as bar:
        try:
            if n_workers == 1:
                workers.append(LocalWorker(recorder))
            else:
                recorder.close()
                for _ in range(n_workers):
                    workers.append(RemoteWorker(partial(Recorder, args, where, fixed_seed)))
            collect(args, workers, tally, stop, bar)
        except KeyboardInterrupt:  # a second Ctrl-C
            pass
        except (EOFError, ConnectionError) as error:
            tally.problem = f"a worker did not start ({experts.describe(error)})"
        finally:
            for worker in workers:
                worker.close()
    if stop.received or tally.problem:
        try:
            recovered += recover(args.expert_data_dir, args.compress)
        except OSError:  # a full disk; the next start does it
            pass

    summary = summarise(tally)
    print(table(summary))
    for number, error in summary["failed"].items():
        print(f"episode {number:04d} failed: {error}")
    if summary["interrupted"]:
        print("cut short: episodes " + ", ".join(f"{number:04d}" for number in summary["interrupted"]))
    if summary["empty"]:
        print(f"episodes that ended before their first step, without a file: {summary['empty']}")
    print(f"files in {args.expert_data_dir}" + ("; failed ones in failed, not for training" * bool(summary["failed"])))
    if stop.received:
        print(tally.problem or "stopped by Ctrl-C")
        raise SystemExit(130)
    if tally.problem:
        raise SystemExit(tally.problem)
    if summary["failed"]:
        raise SystemExit(f"{len(summary['failed'])} of {len(tally.episodes)} episodes failed")
    if not summary["episodes"]:
        raise SystemExit(f"no episode was collected: --expert {args.expert} ended all {args.episodes} at once")
    return summary | {"recovered": recovered}


if __name__ == "__main__":
    main(tyro.cli(Args))
