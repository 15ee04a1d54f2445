"""Timing of rival ways to do the same work on a machine that is not quiet: in turn, in CPU-seconds, as ratios.

Round after round every way runs once: A B C A B C. A ratio is taken inside a round, and the median over the rounds is
the result. The time is that of the processor, of this process and its children together, with all libraries on one
thread, so that other programs hardly count. The way that comes first runs again as the last of each round: its ratio to
itself, which ought to be 1, says how far to trust the others.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent.parent / "results"


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_in_turn(
    ways: dict[str, Callable], rounds: int, warm_up: int = 1, clock: Callable[[], float] = cpu_seconds
) -> dict[str, list[float]]:
    """CPU-seconds of every way in every round. A way is called with the number of the round; the first `warm_up` rounds
    are not counted. The first way is there twice, the second time as "<name>, again". A `clock` of another kind, in
    seconds, is for work that is not the processor's."""
    first = next(iter(ways))
    ways = ways | {f"{first}, again": ways[first]}
    seconds = {name: [] for name in ways}
    for number in tqdm(range(warm_up + rounds), desc="rounds"):
        for name, way in ways.items():
            begin = clock()
            way(number)
            if number >= warm_up:
                seconds[name].append(clock() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], way: str, rival: str) -> dict[str, float]:
    """How many times as fast as `rival` a `way` is: median, lowest and highest of the rounds."""
    ratios = [b / a for a, b in zip(seconds[way], seconds[rival], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def report(name: str, seconds: dict, units: float, unit: str, targets: list[tuple[str, str, float]], more: dict):
    """Print a table and write benchmarks/results/<name>.json. `targets`: (way, rival, least ratio)."""
    first = next(iter(seconds))
    ways = {
        way: {
            f"{unit}_per_cpu_second": units / statistics.median(times),
            f"times_{first}": ratio(seconds, way, first),
            "cpu_seconds": times,
        }
        for way, times in seconds.items()
    }
    print(f"\n{'':<42}{unit + '/s':>12}   times {first} (least to most)")
    for way, row in ways.items():
        r = row[f"times_{first}"]
        rate = row[f"{unit}_per_cpu_second"]
        print(f"{way:<42}{rate:>12.1f}   {r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})")
    rows = []
    for way, rival, least in targets:
        rows.append({"way": way, "rival": rival, "target": least} | ratio(seconds, way, rival))
        verdict = "holds" if rows[-1]["median"] >= least else "MISSED"
        print(f"{way} / {rival}: {rows[-1]['median']:.2f}, target {least}: {verdict}")
    for key, value in more.items():
        print(f"{key}: {value}")
    result = {"name": name, "targets": rows, "ways": ways} | more | {"machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f"{name}.json.tmp"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, RESULTS / f"{name}.json")
    print(f"written: {RESULTS / name}.json")


def machine() -> dict:
    """What a result depends on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = {"python": platform.python_version()}
    for package in ("torch", "torchcodec", "av", "numpy", "opencv-python-headless"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "none"
    git = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    commit, changed = (subprocess.run(c, capture_output=True, text=True, cwd=RESULTS.parent).stdout for c in git)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "versions": packages,
        "commit": commit.strip(),
        "uncommitted_changes": bool(changed.strip()),
        "command": " ".join(["python", "-m", f"benchmarks.speed.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }
