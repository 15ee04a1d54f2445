"""The rules of the house as functions from source text to a list of what breaks them. Nothing is imported or run."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

RUN_BLOCK = "exp_name seed torch_deterministic device track wandb_project_name wandb_entity run_root resume".split()
METRIC = r"(train|eval|charts|time)/"
# top-level calls that reach for a file, a device, a display or a process
EFFECTS = re.compile(r"open|print|os\.(mkdir|makedirs|remove|system)|subprocess\..*|torch\.(cuda|load|set_|manual_).*")
EFFECT_METHODS = re.compile(r"(mkdir|unlink|touch|iterdir|glob|exists|is_file|is_dir|(read|write)_(text|bytes))")
LATE_IMPORTS = {
    "mss",
    "Xlib",
    "pynput",
    "wandb",
    "retro",
    "stable_retro",
    "libretro",
    "pygame",
    "ale_py",
    "pygba",
    "mgba",
    "ray",
}  # inside the function that needs them
OTHER_TOOLS = "pip git make pytest ruff tensorboard apt-get ffmpeg xvfb-run pre-commit nvidia-smi supertux2 ray".split()
OUTPUT_FOLDERS = (
    "runs dataset plays build .venv creatures levels expert_data recordings models videos packed Emerald-GBAdvance "
    "label_report"
).split()  # made by us, or the game's: not in the tree
OUTPUT_FILES = (
    "run_* *.jsonl recording.mp4 frames.parquet inputs.parquet truth.parquet "
    "detections.parquet events.parquet episodes.parquet returns.parquet curves.parquet report.* "
    "overrides.parquet overrides.json thresholds.toml review.html progress.parquet progress.png intent.parquet "
    "closed_loop.json closed_loop.png best.mp4 median.mp4 *_closed_loop_* latency.json latency.png "
    "args.json provenance.json split.json last.pt best.pt eval.json eval.png eval.mp4 my_*.py "
    "*.onnx *_manifest.json *_eval_* preds.parquet metrics.json overlay.mp4 "
    "meta.json tokenizer.pt dynamics.pt agent.pt imagine.pt dreams.mp4 *.safetensors config.json open_loop.* "
    "heldout_* episode_* session_*.npz dagger_round_* eval_*.json *.pth chunk_* facts.json"
).split()
SUFFIXES = ".py .md .sh .toml .txt .yaml .json .jsonl .parquet .mp4 .png .pt .onnx .stl .npz .pth .gba .c".split()


# Python sources -------------------------------------------------------------------------------------------------------
def args_fields(text: str) -> dict[str, tuple[str, str, str | None]]:
    """Fields of `Args` and of classes that inherit from it (subcommands), in order: name -> (type, default, the string
    under it)."""
    fields = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and "Args" in (node.name, *map(ast.unparse, node.bases)):
            for statement, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    default = ast.unparse(statement.value) if statement.value else ""
                    doc = below.value.value if _is_string(below) else None
                    fields[statement.target.id] = (ast.unparse(statement.annotation), default, doc)
    return fields


def undocumented_fields(text: str) -> list[str]:
    return [f"Args.{name} has no string under it" for name, (_, _, doc) in args_fields(text).items() if not doc]


def unread_fields(text: str, shared: str = "") -> list[str]:
    """Fields without an `args.field` in the script or in `shared`, the code of common/ that is handed `args`."""
    nodes = [node for source in (text, shared) for node in ast.walk(ast.parse(source))]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "args"}
    return [f"Args.{name} is never read" for name in args_fields(text) if name not in read]


def run_block(texts: dict[str, str]) -> list[str]:
    """The run block is the same in every training script, that is every one with a field `resume`."""
    problems, first = [], None
    for script, text in texts.items():
        fields = args_fields(text)
        if "resume" not in fields:
            continue
        if list(fields)[: len(RUN_BLOCK)] != RUN_BLOCK:
            problems.append(f"{script}: Args begins with {list(fields)[: len(RUN_BLOCK)]}, expected {RUN_BLOCK}")
            continue
        first = first or (script, fields)
        for name in RUN_BLOCK:
            if fields[name] != first[1][name]:
                problems.append(f"{script}: Args.{name} is {fields[name]}, in {first[0]} {first[1][name]}")
    return problems


def twins(texts: dict[str, str]) -> list[str]:
    """Functions with one `# twin: name` are equal but for docstrings and comments; equal functions have that mark."""
    problems, by_mark, by_code = [], {}, {}
    for script, text in texts.items():
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            head = lines[node.lineno - 1 : max(node.lineno, node.body[0].lineno - 1)]
            mark = re.search(r"#\s*twin:\s*(\S+)", "\n".join(head))
            where, code = f"{script}:{node.lineno} {node.name}", ast.unparse(_without_docstrings(node))
            by_code.setdefault(code, []).append((script, where, mark))
            if mark:
                by_mark.setdefault(mark[1], []).append((where, code))
    for mark, holders in by_mark.items():
        first, code = holders[0]
        problems += [f"twin {mark}: {where} differs from {first}" for where, other in holders[1:] if other != code]
    for holders in by_code.values():
        if len({script for script, _, _ in holders}) > 1 and not all(mark for _, _, mark in holders):
            problems.append(f"{' and '.join(where for _, where, _ in holders)} are equal: mark them `# twin: name`")
    return problems


def guard(text: str) -> list[str]:
    """The last statement is the guard, and holds nothing but `main(tyro.cli(Args))`; `cli` may get more arguments. A
    script with subcommands: `main(tyro.extras.subcommand_cli_from_dict(COMMANDS))`."""
    last = ast.parse(text).body[-1]
    if not (isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"):
        return ["the last statement is not the `__main__` guard"]
    guards = r"main\(tyro\.cli\(Args(, .+)?\)\)|main\(tyro\.extras\.subcommand_cli_from_dict\(COMMANDS\)\)"
    if len(last.body) == 1 and re.fullmatch(guards, ast.unparse(last.body[0])):
        return []
    return [f"the guard holds {ast.unparse(last.body)!r}, expected the one statement main(tyro.cli(Args))"]


def module_docstring(text: str) -> list[str]:
    lines = len((ast.get_docstring(ast.parse(text)) or "").splitlines())
    return [] if 6 <= lines <= 12 else [f"the module docstring has {lines} lines, expected 6 to 12"]


def section_order(text: str) -> list[str]:
    """Args, networks, losses, evaluate, main: each begins after the one before it."""
    found = {}
    for node in ast.parse(text).body:
        name = getattr(node, "name", "")
        if isinstance(node, ast.ClassDef):
            network = any(ast.unparse(base) == "nn.Module" for base in node.bases)
            section = "Args" if name == "Args" else "network" if network else None
        elif isinstance(node, ast.FunctionDef):
            section = name if name in ("evaluate", "main") else "losses" if name.endswith("_loss") else None
        else:
            continue
        if section:
            found.setdefault(section, node.lineno)
    expected = [section for section in ("Args", "network", "losses", "evaluate", "main") if section in found]
    actual = sorted(found, key=found.get)
    problems = [f"there is no {name}" for name in ("Args", "main") if name not in found]
    return problems if actual == expected else [*problems, f"the order is {actual}, expected {expected}"]


def import_effects(text: str) -> list[str]:
    """What importing the module would do beside defining names."""
    problems = []
    for node in _import_time(ast.parse(text).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            late = [name for name in names if name.split(".")[0] in LATE_IMPORTS]
            problems += [f"line {node.lineno} imports {name} at the top; import it where it is used" for name in late]
        elif isinstance(node, ast.Call):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if EFFECTS.fullmatch(ast.unparse(node.func)) or EFFECT_METHODS.fullmatch(method):
                problems.append(f"line {node.lineno} calls {ast.unparse(node.func)} when imported")
    return problems


def machine_paths(text: str) -> list[str]:
    """Paths that exist on one machine only."""
    lines = enumerate(text.splitlines(), 1)
    return [f"line {n} names {m[0]}" for n, line in lines if (m := re.search(r"/(work|root|home|Users)/\w+", line))]


def _import_time(nodes: list) -> Iterator[ast.AST]:
    """All nodes that run on import: not the bodies of functions, nor of the `__main__` guard."""
    for node in nodes:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _import_time([*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)])
        elif isinstance(node, ast.Lambda):
            yield from _import_time([*node.args.defaults])
        else:
            yield from _import_time(list(ast.iter_child_nodes(node)))


def _is_string(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _without_docstrings(node: ast.AST) -> ast.AST:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and _is_string(inner.body[0]):
            inner.body = inner.body[1:] or [ast.Pass()]
    return node


# Metrics --------------------------------------------------------------------------------------------------------------
def metric_names(text: str) -> set[str]:
    """Names of metrics written out in a script."""
    nodes = list(ast.walk(ast.parse(text)))
    pieces = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in pieces]
    return {s for s in strings if isinstance(s, str) and re.fullmatch(METRIC + r"\w+", s)}


def built_metrics(text: str) -> list[str]:
    """Names put together where a metric is written: as a dict's key or for `add_scalar`. They have to be spelt out."""
    problems = []
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Dict):
            names = node.keys
        elif isinstance(node, ast.DictComp):
            names = [node.key]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            names = [node.slice]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_scalar":
            names = node.args[:1]
        for name in names:
            if isinstance(name, ast.JoinedStr | ast.BinOp) and re.match("f?['\"]" + METRIC, ast.unparse(name)):
                problems.append(f"line {name.lineno} builds the metric name {ast.unparse(name)}; spell it out")
    return problems


def metric_register(texts: dict[str, str], register: str) -> list[str]:
    """Names in the first column of the tables in docs/metrics.md against names in the scripts, both ways."""
    cells = [line.split("|")[1] for line in register.splitlines() if line.startswith("|")]
    listed = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    used = {name: script for script, text in texts.items() for name in metric_names(text)}
    return [f"{name} of {used[name]} is not in docs/metrics.md" for name in sorted(set(used) - listed)] + [
        f"docs/metrics.md lists {name}, which no script writes" for name in sorted(listed - set(used))
    ]


# Documents ------------------------------------------------------------------------------------------------------------
def script_flags(text: str) -> set[str]:
    """All flags that a script's command line knows."""
    flags = {"--help"}
    for name, (kind, _, _) in args_fields(text).items():
        flag = name.replace("_", "-")
        flags |= {f"--{flag}", f"--no-{flag}"} if kind == "bool" else {f"--{flag}"}
    return flags


def unknown_flags(text: str, flags: dict[str, set[str]]) -> list[str]:
    """Scripts and flags named in a document or message that do not exist. `flags`: script name -> its flags.

    A flag beside a script's name belongs to that script, one alone to any; what other tools are called with is theirs.
    """
    copies = {copy: flags[script] for script, copy in re.findall(r"cp (\w+\.py) (\w+\.py)", text) if script in flags}
    flags = flags | copies  # a reader who follows the page has made them
    problems, all_flags = [], set().union(*flags.values())
    for fragment in _code(text) + _prose(text):
        scripts = re.findall(r"(?:python\S* |^\s*)(\w+\.py)\b", fragment)
        problems += [f"there is no script {name}: {fragment.strip()!r}" for name in scripts if name not in flags]
        words = [word for word in fragment.split() if word != "$" and not re.match(r"[A-Z_]+=", word)]
        if words and Path(words[0]).name in OTHER_TOOLS:
            continue
        known = set().union(*(flags[name] for name in scripts if name in flags)) or all_flags
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", fragment):
            if flag not in known:
                problems.append(f"{flag} is no flag of {' or '.join(scripts) or 'any script'}: {fragment.strip()!r}")
    return problems


def raised_messages(text: str) -> list[str]:
    """The strings of all `raise` statements, with _ where a value is put in."""
    messages = []
    for statement in ast.walk(ast.parse(text)):
        if isinstance(statement, ast.Raise):
            nodes = [n for n in ast.walk(statement) if isinstance(n, ast.JoinedStr | ast.Constant)]
            pieces = {id(part) for n in nodes if isinstance(n, ast.JoinedStr) for part in n.values}
            for node in nodes:
                parts = node.values if isinstance(node, ast.JoinedStr) else [] if id(node) in pieces else [node]
                messages.append("".join(str(p.value) if isinstance(p, ast.Constant) else "_" for p in parts))
    return messages


def missing_paths(text: str, root: Path, here: Path) -> list[str]:
    """Files and folders linked (from `here`) or named in code (from `root`) that are not in the tree and no output."""
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    problems = [f"the link to {link} leads nowhere" for link in links if not (here / link).exists()]
    for word in dict.fromkeys(word.strip("\"'`,;:()[]") for line in _code(text) for word in line.split()):
        named = (
            word.endswith("/")
            or Path(word).suffix in SUFFIXES
            or ("/" in word and (root / word.split("/")[0]).exists())
        )
        if not (named and re.fullmatch(r"[\w.<{*][\w.<>{}*-]*(/[\w.<>{}*-]+)*/?", word)):
            continue
        path = re.sub(r"<[^>]*>|\{[^}]*\}", "*", word.rstrip("/"))  # <placeholder>, {placeholder}
        output = path.split("/")[0] in OUTPUT_FOLDERS or any(fnmatch(path.split("/")[-1], o) for o in OUTPUT_FILES)
        if not (output or any(True for _ in root.glob(path))):
            problems.append(f"{word} does not exist")
    return problems


def missing_targets(text: str, makefile: str) -> list[str]:
    """`make TARGET` in a document without such a target."""
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = [m[1] for fragment in _code(text) if (m := re.match(r"\s*(?:\$ )?make ([a-z][\w-]*)", fragment))]
    return [f"the Makefile has no target {name}" for name in named if name not in targets]


def _code(text: str) -> list[str]:
    """Lines of fenced and of indented code, continuations joined, and the `spans` of the rest."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4}(?=\S)(.*)$", rest, re.MULTILINE)
    return [line for block in fenced for line in block.splitlines()] + indented + re.findall(r"`([^`\n]+)`", rest)


def _prose(text: str) -> list[str]:
    """The lines of a document without its code."""
    return re.sub(r"^```.*?^```|^ {4}\S[^\n]*|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
