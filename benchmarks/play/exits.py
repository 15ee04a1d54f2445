"""Are all keys released, however a live play ends?

Each trial starts `play_reflex.py live --send-keys` as a process of its own on a small window under Xvfb, with a policy
that always presses three keys. When the X server says that they are down, and a random moment later, the play is ended
in one of the ways below. The X server is then asked until no key is down, and once more when the process has gone.

    python benchmarks/play/exits.py --times 100

Out: benchmarks/results/live_exits.json and a table. Needs Xvfb.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import tyro
from onnx import TensorProto, helper
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import play_reflex  # noqa: E402
from common import runs  # noqa: E402
from common.desktop import Keyboard  # noqa: E402
from supertux_env.launch import Xvfb  # noqa: E402

KINDS = (
    "time is up, Ctrl-C, SIGTERM, SIGHUP, two signals, exception, window closed, focus lost, panic key, "
    "key of a person, kill -9, kill -9 of its watchdog, X server gone"
).split(", ")
KEYS = ["KEY_LEFTCTRL", "KEY_RIGHT", "KEY_SPACE"]
PATIENCE_S = 20.0


@dataclass
class Args:
    times: int = 100
    """trials of each kind"""
    kinds: tuple[str, ...] = tuple(KINDS)
    """ways to end, see the table"""
    workers: int = 2
    """trials side by side"""
    minutes: float = 0.0
    """start no further trial after so many minutes; 0 means all are made"""
    seed: int = 1
    """of the random moments"""
    output: Path = ROOT / "benchmarks/results/live_exits.json"
    """the figures"""


def write_model(folder: Path) -> Path:
    """A model that always wants all keys, at 20 frames a second."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),  # (B, T)
        helper.make_node("Add", ["means", "five"], ["keys_logits"]),
        helper.make_node("Slice", ["means", "zero", "two", "one"], ["mouse_pos"]),
        helper.make_node("ReduceMean", ["means", "one"], ["value"], keepdims=0),
    ]
    constants = {"axes": np.array([2, 3, 4]), "five": np.float32(5)}
    constants |= {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, "height", "width", 3])
    shapes = {"keys_logits": ["batch", 3], "mouse_pos": ["batch", 2], "value": ["batch"]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "always", [pixels], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (folder / "always.onnx").write_bytes(model.SerializeToString())
    manifest = {
        "model": {"sha256": hashlib.sha256(model.SerializeToString()).hexdigest()},
        "inputs": {"pixels": {"stack_order": ["t-2", "t-1", "t"]}},
        "outputs": {"keys_logits": {"keys": KEYS}},
        "fps": 20.0,
        "horizon": {"frames": 2, "ms": 100},
        "thresholds": [0.5] * 3,
        "allowed_keys": KEYS,
    }
    (folder / "always_manifest.json").write_text(json.dumps(manifest))
    return folder / "always.onnx"


class Window:
    """A window with the focus."""

    def __init__(self, display: str, title: str, left: int):
        from Xlib.display import Display

        self.display = Display(display)
        screen = self.display.screen()
        self.window = screen.root.create_window(left, 0, 100, 80, 0, screen.root_depth, background_pixel=0x808080)
        self.window.set_wm_name(title)
        self.window.map()
        self.display.sync()

    def focus(self):
        from Xlib import X

        self.window.set_input_focus(X.RevertToPointerRoot, X.CurrentTime)
        self.display.sync()

    def close(self):
        self.display.close()


def player(model: Path, display: str, folder: Path, kind: str, log: Path):
    """The process that plays. Its figure is left out, as drawing takes longer than the trial."""
    os.setsid()
    os.environ |= {"DISPLAY": display, "XDG_SESSION_TYPE": "x11", "TQDM_DISABLE": "1"}
    said = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout, sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb", 0)), io.TextIOWrapper(os.fdopen(2, "wb", 0))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    play_reflex.draw_latency = lambda *_: None
    if kind == "exception":
        run, calls = play_reflex.Policy.run, iter(range(20))
        play_reflex.Policy.run = lambda self: run(self) if next(calls) < 14 else 1 / 0
    args = play_reflex.Live(
        model=model, window="the game", send_keys=True, output=folder.parent, name=folder.name, max_still=0.0,
        max_seconds=1.0 if kind == "time is up" else 60.0, preset="ultrafast", resume_after=30.0,
    )  # fmt: skip
    play_reflex.main(args)


def watchdog_of(pid: int) -> int:
    """The only child of a player."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def until(done, seconds: float = PATIENCE_S) -> float | None:
    """Seconds until `done()`; None where that took too long."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if done():
            return time.monotonic() - start
        time.sleep(0.002)
    return None


def trial(kind: str, model: Path, display: str, server: Xvfb, folder: Path, rng: np.random.Generator) -> dict:
    """One play that is ended by `kind`. `released_ms` is None where a key stayed down."""
    game, other = Window(display, "the game", 0), Window(display, "another window", 150)
    keyboard = Keyboard(display)
    game.focus()
    log = folder.with_suffix(".log")
    process = multiprocessing.get_context("fork").Process(target=player, args=(model, display, folder, kind, log))
    process.start()
    pressed = until(lambda: keyboard.down() >= set(KEYS) or process.exitcode is not None)
    result = {"kind": kind, "pressed": pressed is not None and process.exitcode is None}
    time.sleep(rng.uniform(0, 0.2))
    if kind == "Ctrl-C":
        os.kill(process.pid, signal.SIGINT)
    elif kind == "SIGTERM":
        process.terminate()
    elif kind == "SIGHUP":
        os.kill(process.pid, signal.SIGHUP)
    elif kind == "two signals":
        process.terminate()
        os.kill(process.pid, signal.SIGINT)
    elif kind == "window closed":
        game.window.destroy()
        game.display.sync()
    elif kind == "focus lost":
        other.focus()
    elif kind == "panic key":
        keyboard.tap("KEY_F12")
    elif kind == "key of a person":  # a pause, then the end
        keyboard.tap("KEY_A")
    elif kind == "kill -9":
        watchdog = watchdog_of(process.pid)
        process.kill()
    elif kind == "kill -9 of its watchdog":
        os.kill(watchdog_of(process.pid), signal.SIGKILL)
    elif kind == "X server gone":
        server.__exit__()
        result["released_ms"] = 0.0  # with the server
    start = time.monotonic()
    if kind != "X server gone":
        released = until(lambda: not keyboard.down())
        result["released_ms"] = None if released is None else 1000 * released
    if kind == "key of a person":
        process.terminate()
    process.join(PATIENCE_S)
    result |= {"ended_ms": 1000 * (time.monotonic() - start), "status": process.exitcode}
    if kind == "kill -9":
        until(lambda: not Path(f"/proc/{watchdog}").exists())
    if kind != "X server gone":
        time.sleep(0.1)
        if keyboard.down():  # pressed again, or never released
            result["released_ms"] = None
    if process.exitcode is None or result["released_ms"] is None or not result["pressed"]:
        result["said"] = log.read_text(errors="replace")[-1500:]
        process.kill()
        process.join()
    for thing in (keyboard, game, other):
        with contextlib.suppress(Exception):  # closed already, or its server has gone
            thing.close()
    return result


def work(number: int, jobs, results, model: Path, folder: Path, seed: int):
    """Trials one after another, each kind that ends the X server on a fresh one."""
    rng, server, display = np.random.default_rng([seed, number]), None, None
    for index, kind in iter(jobs.get, None):
        if server is None:
            server = Xvfb(320, 240)
            display = server.__enter__()
        results.put(trial(kind, model, display, server, folder / f"{number}_{index}", rng))
        if kind == "X server gone":
            server = None
    if server:
        server.__exit__()


def main(args: Args) -> dict:
    unknown = set(args.kinds) - set(KINDS)
    if unknown:
        raise SystemExit(f"--kinds {', '.join(sorted(unknown))}: expected of {', '.join(KINDS)}")
    started, context = time.monotonic(), multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        model, jobs, results = write_model(Path(name)), context.Queue(), context.Queue()
        for index in range(args.times):
            for kind in args.kinds:
                jobs.put((index * len(args.kinds) + args.kinds.index(kind), kind))
        workers = [
            context.Process(target=work, args=(n, jobs, results, model, Path(name), args.seed))
            for n in range(args.workers)
        ]
        for worker in workers:
            worker.start()
        n_trials, trials, start = args.times * len(args.kinds), [], time.monotonic()
        bar = tqdm(total=n_trials, unit="trial", mininterval=5)
        while len(trials) < n_trials and (args.minutes == 0 or time.monotonic() - start < 60 * args.minutes):
            trials.append(results.get(timeout=120))
            bar.update()
        bar.close()
        while len(trials) < n_trials and not jobs.empty():  # what there is no time for
            with contextlib.suppress(queue.Empty):
                jobs.get(timeout=1)
        for _ in workers:
            jobs.put(None)
        for worker in workers:
            while worker.is_alive():
                with contextlib.suppress(queue.Empty):
                    trials.append(results.get(timeout=0.5))
        facts = runs.write_provenance(Path(name), [])

    rows = {}
    for kind in args.kinds:
        mine = [t for t in trials if t["kind"] == kind]
        good = [t["released_ms"] for t in mine if t["pressed"] and t["released_ms"] is not None]
        rows[kind] = {
            "trials": len(mine),
            "released": len(good),
            "released_ms": {"p50": float(np.median(good)), "max": float(max(good))} if good else None,
            "ended": sum(t["status"] is not None for t in mine),
            "status": sorted({t["status"] for t in mine if t["status"] is not None}),
        }
    result = {"command": f"python benchmarks/play/exits.py --times {args.times} --workers {args.workers}"}
    result |= {"minutes": (time.monotonic() - started) / 60, "keys_held": KEYS, "kinds": rows}
    result |= {"failures": [t for t in trials if t["released_ms"] is None or not t["pressed"]][:10]}
    result |= {key: facts[key] for key in ("commit", "dirty", "python")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(args.output, result)
    print(f"\n{'exit':<26}{'released':>12}{'p50 ms':>9}{'max ms':>9}   exit status")
    for kind, row in rows.items():
        ms = row["released_ms"] or {"p50": np.nan, "max": np.nan}
        cells = f"{row['released']} of {row['trials']}"
        print(f"{kind:<26}{cells:>12}{ms['p50']:>9.0f}{ms['max']:>9.0f}   {', '.join(map(str, row['status']))}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
