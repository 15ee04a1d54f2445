"""Importing a script touches no display, GPU, game or file of the project, whatever folder it is done from."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WATCH = """
import importlib, os, sys
root, here, seen = sys.argv[1], os.getcwd(), []
def hook(event, args):
    path = os.path.abspath(args[0]) if args and isinstance(args[0], str) else ""
    inside = path.startswith((root + os.sep, here + os.sep)) and not path.startswith(os.path.join(root, ".venv"))
    if event == "open" and inside and not path.endswith((".py", ".pyc")):
        seen.append(f"opens {path}")
    elif event in ("os.mkdir", "os.remove", "os.rename") and inside or event in ("subprocess.Popen", "socket.connect"):
        seen.append(f"{event} {args[0]}")
import matplotlib, torch, torch.utils.tensorboard  # what they do themselves is theirs
sys.addaudithook(hook)
for name in sys.argv[2:]:
    importlib.import_module(name)
    print(*[f"{name}: {what}" for what in seen], sep="\\n", end="")
    seen.clear()
    late = {"mss", "Xlib", "pynput", "wandb"} & set(sys.modules)
    print(*[f"{name}: imports {module}" for module in late], sep="\\n", end="")
    if torch.cuda.is_initialized():
        print(f"{name}: starts CUDA")
"""


def import_alone(names: list[str], folder: Path, root: Path = ROOT) -> str:
    """What importing `names` from `root`, in a process of its own with `folder` as working folder, was seen to do."""
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    env |= {"PYTHONPATH": os.pathsep.join([str(root), str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WATCH, str(root), *names]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_a_script_does_nothing(tmp_path):
    assert import_alone([path.stem for path in sorted(ROOT.glob("*.py"))], tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_what_a_bad_script_does_is_seen(tmp_path):
    (tmp_path / "bad_script.py").write_text("import os, mss\nopen('x.txt', 'w')\nos.mkdir('y')\n")
    seen = import_alone(["bad_script"], tmp_path, tmp_path)
    assert all(what in seen for what in ("x.txt", "os.mkdir", "imports mss"))
