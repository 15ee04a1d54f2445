"""How long a live decision takes beside the real game, and whether the game keeps its rate.

SuperTux runs on a generated level under Xvfb, and `play_reflex.py live --send-keys` plays it as a process of its own.

    python benchmarks/play/latency.py --model reflex.onnx

Out: benchmarks/results/live_latency.json, docs/play_live.png and the table of the play. Needs SuperTux and Xvfb.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import runs  # noqa: E402
from common.desktop import Keyboard  # noqa: E402
from supertux_env.launch import Game, Xvfb  # noqa: E402
from supertux_env.levels import generate_level  # noqa: E402


@dataclass
class Args:
    model: Path
    """the .onnx file of export_reflex.py"""
    seconds: float = 60.0
    """of play"""
    level: int = 3
    """seed of the generated level"""
    width: int = 640
    """of the game's window, in pixels"""
    height: int = 480
    """of the game's window, in pixels"""
    output: Path = ROOT / "benchmarks/results/live_latency.json"
    """the figures"""
    figure: Path = ROOT / "docs/play_live.png"
    """their picture"""


def main(args: Args) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder, level = Path(name), generate_level(args.level, Path(name) / "level.stl")
        size = (args.width, args.height)
        with Xvfb(*size) as display, Game(level, display, *size) as game:
            keyboard = Keyboard(display)
            game.skip_intro(keyboard)
            flags = ["--model", str(args.model.resolve()), "--window", "SuperTux", "--send-keys", "--max-still", "0"]
            flags += ["--max-seconds", f"{args.seconds:g}", "--output", name, "--name", "play"]
            environment = os.environ | {"DISPLAY": display, "XDG_SESSION_TYPE": "x11"}
            words = [sys.executable, "play_reflex.py", "live", *flags]
            done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"play_reflex.py live ended with {done.returncode}")
            logic_hz, held = game.logic_hz(), sorted(keyboard.down())
            keyboard.close()
        print(done.stdout[done.stdout.index("\nplay ended") :])
        result = json.loads((folder / "play/latency.json").read_text())
        facts = runs.write_provenance(folder, [args.model])
        shutil.copy(folder / "play/latency.png", args.figure)
    command = f"python benchmarks/play/latency.py --model {args.model.name} --seconds {args.seconds:g}"
    result |= {"command": command, "frame_size": f"{args.width}x{args.height}", "logic_hz": logic_hz, "held": held}
    result |= {"load": os.getloadavg()[0], "cores": os.cpu_count()}
    result |= {key: facts[key] for key in ("commit", "dirty", "python")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(args.output, {key: value for key, value in result.items() if key != "session"})
    print(f"the game stepped at {logic_hz:.1f} Hz at its slowest; keys down after it: {', '.join(held) or 'none'}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
