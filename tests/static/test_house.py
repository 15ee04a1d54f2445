"""The rules of the house, checked on every script, on common/ and on the documents."""

import ast
import tomllib
from pathlib import Path

import pytest

from tests.static import checks

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}
COMMON = {f"common/{path.name}": path.read_text() for path in sorted((ROOT / "common").glob("*.py"))}
PACKAGES = ("pokemon_env", "motion_controls", "packed_episodes", "retro_env", "session_labels")
ENVS = {f"{path.parent.name}/{path.name}": path.read_text() for name in PACKAGES for path in (ROOT / name).glob("*.py")}
PAGES = [
    page for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))] if page.exists()
]
FLAGS = {name: checks.script_flags(text) for name, text in SCRIPTS.items()}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "check",
    [checks.module_docstring, checks.undocumented_fields, checks.section_order, checks.guard, checks.built_metrics],
)
def test_script(name, check):
    assert check(SCRIPTS[name]) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_is_read(name):
    shared = COMMON["common/runs.py"] if "runs" in SCRIPTS[name] else ""
    assert checks.unread_fields(SCRIPTS[name], shared) == []


@pytest.mark.parametrize("name", SCRIPTS | COMMON | ENVS)
def test_importing_does_nothing(name):
    assert checks.import_effects((SCRIPTS | COMMON | ENVS)[name]) == []


@pytest.mark.parametrize("name", SCRIPTS | COMMON | ENVS)
def test_messages_and_help_name_flags_and_scripts_that_exist(name):
    text = (SCRIPTS | COMMON | ENVS)[name]
    docs = [doc for _, _, doc in checks.args_fields(text).values() if doc] + [ast.get_docstring(ast.parse(text)) or ""]
    assert [p for words in checks.raised_messages(text) + docs for p in checks.unknown_flags(words, FLAGS)] == []


def test_run_block_is_the_same():
    assert checks.run_block(SCRIPTS) == []


def test_twins_are_equal():
    assert checks.twins(SCRIPTS) == []


def test_common_imports_no_script():
    names = [name.removesuffix(".py") for name in SCRIPTS]
    assert [
        (name, s) for name, text in COMMON.items() for s in names if f"import {s}" in text or f"from {s}" in text
    ] == []


def test_metric_register():
    register = ROOT / "docs" / "metrics.md"
    assert checks.metric_register(SCRIPTS | ENVS, register.read_text() if register.exists() else "") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page):
    text = page.read_text()
    assert checks.unknown_flags(text, FLAGS) == []
    assert checks.missing_paths(text, ROOT, page.parent) == []
    assert checks.missing_targets(text, (ROOT / "Makefile").read_text()) == []


def test_no_machine_is_named():
    texts = {name: ROOT / name for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt", ".ci/run")}
    texts |= {str(page.relative_to(ROOT)): page for page in PAGES}
    folders = ("common", "supertux_env", *PACKAGES, "benchmarks", "tests/unit", "tests/smoke", "tests/game")
    texts |= {str(path.relative_to(ROOT)): path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    found = {name: checks.machine_paths(path.read_text()) for name, path in texts.items()}
    found |= {name: checks.machine_paths(text) for name, text in SCRIPTS.items()}
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_nothing_goes_into_a_wheel():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools == {"packages": [], "py-modules": []}
