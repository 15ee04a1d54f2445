"""The run folder: made once, never reused; provenance, atomic files, checkpoints, RNG state, signals."""

import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

PREFIXES = ("_orig_mod.", "module.")  # what torch.compile and DataParallel put before every name


def make_run_dir(args, script: Path | str, task: str) -> Path:
    """`{run_root}/{task}__{exp_name}__{seed}__{unix_time}/` with `args.json` and a copy of the script."""
    script, now = Path(script), int(time.time())
    while True:
        run_dir = Path(args.run_root) / f"{task}__{args.exp_name}__{args.seed}__{now}"
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:  # two runs in one second
            now += 1
        except OSError as error:
            raise SystemExit(
                f"{args.run_root} cannot be written to ({error.strerror}). Choose another --run-root."
            ) from None
    shutil.copy(script, run_dir / script.name)
    write_json(run_dir / "args.json", dataclasses.asdict(args))
    return run_dir


def cli_words(args_class: type, env_prefix: str) -> list[str]:
    """The command line, in words tyro reads: environment variables `{env_prefix}{FIELD}` come first, so that flags beat
    them (those of another script are named and left out), and `--flag true` or `--flag false` stands for `--flag` or
    `--no-flag`."""
    fields = {field.name: field for field in dataclasses.fields(args_class)}
    words = []
    for name, value in os.environ.items():
        if name.startswith(env_prefix):
            field = name.removeprefix(env_prefix).lower()
            if field not in fields:
                print(f"{name} is left out: there is no --{field.replace('_', '-')} here", file=sys.stderr)
                continue  # another script's
            words += [f"--{field}", value]
    result = []
    for word in words + sys.argv[1:]:
        flag = result[-1][2:].replace("-", "_") if result and result[-1].startswith("--") else ""
        if flag in fields and fields[flag].type is bool and word.lower() in ("true", "false"):
            result[-1] = f"--{flag}" if word.lower() == "true" else f"--no-{flag}"
        else:
            result.append(word)
    return result


def resume_args(args, may_change: tuple[str, ...]):
    """The arguments of the run in `args.resume`. Flags given beside --resume hold for the fields in `may_change`; any
    other that differs from the run's raises ValueError, as the run would no longer be the same."""
    path = Path(args.resume) / "args.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --resume takes a run folder, such as the newest in {args.run_root}/"
        )
    flags = {word.partition("=")[0][2:].removeprefix("no-").replace("-", "_") for word in sys.argv if word[:2] == "--"}
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
    foreign = sorted(set(saved) - {field.name for field in dataclasses.fields(args)})
    if foreign:
        raise ValueError(f"{path} is of another script or version: it has {', '.join(foreign)}. Resume another run.")
    for field in dataclasses.fields(args):
        given = getattr(args, field.name)
        is_given = given != field.default or field.name in flags
        if not is_given or given == saved.get(field.name) or field.name == "resume":
            continue
        if field.name not in may_change:
            flag = f"--{field.name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {given} differs from {saved.get(field.name)} in {path}. Leave it out, or start a new run."
            )
        saved[field.name] = given
    saved |= {"overwrite": args.overwrite} if "overwrite" in saved else {}  # allowed once, not for good
    return type(args)(**saved | {"resume": args.resume})


def check_checkpoint_dir(args, patterns: str, script: Path | str, field: str = "checkpoint_dir"):
    """Raise ValueError where the folder in `args`' field holds files of a run other than `args.resume`: its settings,
    its checkpoints, named like one of the `patterns`, its script. With `args.overwrite` only the script's own folder is
    refused."""
    folder, script, flag = Path(getattr(args, field)), Path(script).resolve(), f"--{field.replace('_', '-')}"
    if folder.resolve() == script.parent or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{flag} {folder} is no folder of its own. Name another, such as checkpoints/my_run")
    others = _files_of_another_run(folder, args.resume, patterns, script, field)
    if others and not args.overwrite:
        raise ValueError(
            f"{flag} {folder} holds {len(others)} files of another run, such as {others[0].name}. Name "
            "another folder, or replace them with --overwrite"
        )


def open_checkpoint_dir(args, patterns: str, script: Path | str, run_dir: Path, field: str = "checkpoint_dir"):
    """Remove what `check_checkpoint_dir` looks for, then leave a copy of the script and its settings there."""
    folder, script = Path(getattr(args, field)), Path(script).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for path in _files_of_another_run(folder, args.resume, patterns, script, field):
        path.unlink()
    shutil.copy(script, folder / script.name)
    settings = dataclasses.asdict(args) | {"run_dir": str(run_dir.resolve())}
    write_json(_settings_file(folder, script, field), settings)


def _settings_file(folder: Path, script: Path, field: str) -> Path:
    """In models/, which scripts share, under a name of the script's own."""
    return folder / ("config.json" if field == "checkpoint_dir" else f"{script.stem}_args.json")


def _files_of_another_run(folder: Path, run_dir: str | None, patterns: str, script: Path, field: str) -> list[Path]:
    config = _settings_file(folder, script, field)
    if run_dir and config.is_file() and f'"run_dir": {json.dumps(str(Path(run_dir).resolve()))}' in config.read_text():
        return []
    return sorted({path for name in (config.name, *patterns.split(), script.name) for path in folder.glob(name)})


def write_provenance(run_dir: Path, files: list[Path], **facts) -> dict:
    """`provenance.json`: commit, dirty or not, versions, device, fingerprint of the data, and `facts`."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    provenance = {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dataset_fingerprint": fingerprint(files),
    } | facts
    write_json(run_dir / "provenance.json", provenance)
    return provenance


def fingerprint(files: list[Path]) -> str:
    """SHA-256 over the names and contents of `files`; of a file above 4 MiB, its size and first and last 2 MiB."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name}:{size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**21))
            file.seek(max(2**21, size - 2**21))
            digest.update(file.read(2**21))
    return digest.hexdigest()[:16]


def check_fingerprint(run_dir: Path, files: list[Path]):
    """Raise ValueError where the data are no longer those that the run in `run_dir` began with."""
    began_with, now = json.loads((run_dir / "provenance.json").read_text())["dataset_fingerprint"], fingerprint(files)
    if now != began_with:
        raise ValueError(
            f"the data have the fingerprint {now}, {run_dir} began with {began_with}: recordings or labels have "
            "changed. Bring them back, or start a new run."
        )


def write_json(path: Path, value):
    """Write through a temporary name, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def save_checkpoint(path: Path, checkpoint: dict):
    """Atomic `torch.save`. State dicts lose the name prefixes of wrappers."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        torch.save({key: _strip(value) for key, value in checkpoint.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _strip(state):
    if not isinstance(state, dict):
        return state
    for prefix in PREFIXES:
        state = {k.removeprefix(prefix) if isinstance(k, str) else k: v for k, v in state.items()}
    return state


def load_checkpoint(path: Path, map_location="cpu") -> dict:
    """`torch.load` that runs no code. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Name a run folder that holds a last.pt, such as the newest in runs/."
        )
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is not a checkpoint ({str(error).splitlines()[0]}). Resume another run.") from None


def rng_state() -> dict:
    """The states of Python's, NumPy's and torch's generators, as `load_checkpoint` can read them back."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict):
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def seed_everything(seed: int, deterministic: bool = True):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises ValueError for a device this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        raise ValueError(f"--device {name}: torch finds no {kind} device here. Use --device cpu or --device auto.")
    return torch.device(name)


class StopSignal:
    """True after the first Ctrl-C or SIGTERM, so that a loop can save and leave; a second Ctrl-C stops at once."""

    def __enter__(self) -> "StopSignal":
        self.received = False
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, _):
        self.received = True
        signal.signal(number, self.previous[number])

    def __bool__(self) -> bool:
        return self.received

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
