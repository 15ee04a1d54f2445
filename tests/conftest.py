"""Marked tests: `game` skips without its game (SuperTux and Xvfb; stable-retro for the modules that say `EMULATOR =
True`), `gpu` without CUDA. Where CI=true or REQUIRE_GPU=1 promise them, a skip is a failure."""

import importlib.util
import os
import shutil

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: networks this small lose time by sharing work
os.environ["TQDM_DISABLE"] = "1"

PROMISED = {"game": ("CI", "true"), "gpu": ("REQUIRE_GPU", "1")}  # marker -> variable and value that forbid a skip
WITH_GAMES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/games"])  # Debian's games, not on root's PATH


def pytest_collection_modifyitems(items):
    for item in items:
        if "game" in item.path.parts:
            item.add_marker("game")


def pytest_runtest_setup(item):
    if item.get_closest_marker("game") and getattr(item.module, "EMULATOR", False):
        if not importlib.util.find_spec("stable_retro"):
            pytest.skip("stable-retro missing: pip install -e '.[pokemon]'")
    elif item.get_closest_marker("game"):
        missing = [name for name in ("supertux2", "Xvfb") if not shutil.which(name, path=WITH_GAMES)]
        if missing:
            pytest.skip(f"{' and '.join(missing)} missing: apt-get install supertux xvfb")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    for marker, (variable, value) in PROMISED.items():
        promised = os.environ.get(variable) == value and item.get_closest_marker(marker)
        if promised and report.skipped and not hasattr(report, "wasxfail"):
            report.outcome = "failed"
            report.longrepr = f"{variable}={value} allows no skip of a {marker} test: {report.longrepr[2]}"
    return report
