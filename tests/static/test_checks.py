"""Every check of `checks.py` finds what it is there for, and passes what is right."""

import textwrap

from tests.static import checks

GOOD = textwrap.dedent('''
    """Line 1
    2
    3
    4
    5
    6"""

    import os
    from dataclasses import dataclass

    import torch.nn as nn
    import tyro


    @dataclass
    class Args:
        exp_name: str = os.path.basename(__file__)
        """name"""
        seed: int = 1
        """seed"""
        shuffle: bool = True
        """order"""


    class Net(nn.Module):
        def forward(self, x):
            import mss
            print(open(x), mss)


    def value_loss(x):  # twin: value-loss
        """Text."""
        return x


    def evaluate(args):
        return {"eval/f1": args.seed, "train/loss": args.exp_name} | ({"eval/ap": 1} if args.shuffle else {})


    def main(args: Args) -> dict:
        return evaluate(args)


    if __name__ == "__main__":
        main(tyro.cli(Args))
''').strip()
FLAGS = {"a.py": {"--help", "--seed", "--shuffle", "--no-shuffle"}, "b.py": {"--help", "--fps"}}


def bad(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_the_good_script_passes():
    for check in (
        checks.module_docstring,
        checks.undocumented_fields,
        checks.unread_fields,
        checks.section_order,
        checks.guard,
        checks.import_effects,
        checks.built_metrics,
        checks.machine_paths,
    ):
        assert check(GOOD) == [], check


def test_module_docstring():
    assert checks.module_docstring(bad("4\n5\n", "")) == ["the module docstring has 4 lines, expected 6 to 12"]
    assert checks.module_docstring("x = 1") == ["the module docstring has 0 lines, expected 6 to 12"]


def test_fields():
    assert checks.undocumented_fields(bad('"""seed"""', "")) == ["Args.seed has no string under it"]
    assert checks.unread_fields(bad("args.seed", "1")) == ["Args.seed is never read"]
    assert checks.unread_fields(bad("args.seed", "vars(args)")) == ["Args.seed is never read"]
    assert checks.unread_fields(bad("args.seed", "1"), shared="def f(args): return args.seed") == []


def test_run_block():
    fields = "".join(f"    {name}: str = 'x'\n    '''text'''\n" for name in checks.RUN_BLOCK)
    script = f"class Args:\n{fields}    lr: float = 1e-3\n"
    assert checks.run_block({"a": script, "b": script + "    '''rate'''\n", "tool": GOOD}) == []
    assert checks.run_block({"a": script, "b": script.replace("seed: str = 'x'", "seed: int = 1")}) != []
    assert checks.run_block({"a": script, "b": script.replace("'''text'''", "'''other'''", 1)}) != []
    assert checks.run_block({"a": script.replace("seed", "sead")}) != []


def test_twins():
    twin = "def f(x):  # twin: f\n    return x\n"
    assert (
        checks.twins({"a": twin, "b": 'def f(\n    x,\n):  # twin: f\n    """Text."""\n    return x  # same\n'}) == []
    )
    assert checks.twins({"a": twin, "b": twin.replace("return x", "return x + 1")})[0].startswith(
        "twin f: b:1 f differs"
    )
    assert checks.twins({"a": twin, "b": twin.replace("def f", "def g")}) != []
    plain = twin.replace("  # twin: f", "")
    assert checks.twins({"a": plain, "b": plain}) == ["a:1 f and b:1 f are equal: mark them `# twin: name`"]
    assert checks.twins({"a": plain, "b": twin}) == ["a:1 f and b:1 f are equal: mark them `# twin: name`"]


def test_guard():
    assert checks.guard(bad("main(tyro.cli(Args))", "main(tyro.cli(Args, args=words()))")) == []
    assert checks.guard(bad("    main(tyro.cli(Args))", "    args = tyro.cli(Args)\n    main(args)")) != []
    assert checks.guard(bad("main(tyro.cli(Args))", "main(Args())")) != []
    assert checks.guard(bad("tyro.cli(Args)", "tyro.extras.subcommand_cli_from_dict(COMMANDS)")) == []
    assert checks.guard(bad("tyro.cli(Args)", "tyro.extras.subcommand_cli_from_dict({'eval': Eval})")) != []


def test_fields_of_subcommands():
    subcommand = 'class Eval(Args):\n    fps: float = 1.0\n    """rate"""\n    bare: int = 0\n\n\n'
    text = bad("class Net(nn.Module):", subcommand + "class Net(nn.Module):")
    assert list(checks.args_fields(text)) == ["exp_name", "seed", "shuffle", "fps", "bare"]
    assert checks.undocumented_fields(text) == ["Args.bare has no string under it"]
    assert checks.unread_fields(text) == ["Args.fps is never read", "Args.bare is never read"]
    assert checks.guard(GOOD + "\nx = 1") == ["the last statement is not the `__main__` guard"]


def test_section_order():
    moved = GOOD.replace("class Net(nn.Module)", "class Nothing") + "\nclass Net(nn.Module): pass"
    assert checks.section_order(moved) != []
    assert checks.section_order(bad("def main", "def start")) == ["there is no main"]


def test_import_effects():
    for line in (
        "import mss",
        "from Xlib.display import Display",
        "file = open('x')",
        "gpu = torch.cuda.is_available()",
        "torch.set_num_threads(1)",
        "class A:\n    text = Path('x').read_text()",
        "def f(x=subprocess.run('ls')): pass",
        "if True:\n    os.makedirs('x')",
    ):
        assert len(checks.import_effects(line)) == 1, line
    assert checks.import_effects("def f():\n    open('x')\ng = lambda: open('y')") == []


def test_machine_paths():
    assert checks.machine_paths("a\ncd /home" + "/me/x") == ["line 2 names /home" + "/me"]
    assert checks.machine_paths("/usr/games/supertux2") == []


def test_metrics():
    assert checks.metric_names(GOOD) == {"eval/f1", "eval/ap", "train/loss"}
    assert checks.metric_names('metrics.get(f"eval/key_{x}")') == set()
    assert checks.built_metrics('writer.add_scalar(f"eval/{key}", 1)') != []
    assert checks.built_metrics('{"eval/" + key: 1}') != []
    assert checks.built_metrics('m[f"eval/f1_{key}"] = 1') != []
    assert checks.built_metrics('print(m[f"eval/f1_{key}"])') == []
    register = "| name | meaning |\n|-|-|\n| `eval/f1`, `eval/ap` | x |\n| `train/loss` | beside `train/other` |\n"
    assert checks.metric_register({"a": GOOD}, register) == []
    assert checks.metric_register({"a": GOOD}, register.replace("`eval/ap`", "")) != []
    assert checks.metric_register({"a": GOOD}, register + "| `time/x` | y |\n") != []


def test_flags():
    assert checks.script_flags(GOOD) == {"--help", "--exp-name", "--no-shuffle", "--seed", "--shuffle"}
    right = "Set `--seed`:\n```\npython a.py --seed 1 \\\n    --no-shuffle\npip install --anything\n```\nor --fps."
    assert checks.unknown_flags(right, FLAGS) == []
    for wrong in (
        "`--sed`",
        "text --sed",
        "    python a.py --fps 1\n",
        "`python c.py`",
        "```\npython b.py \\\n --seed\n```",
    ):
        assert len(checks.unknown_flags(wrong, FLAGS)) == 1, wrong


def test_messages():
    source = 'def f(x):\n    raise ValueError(f"{x} is bad. Try: python a.py --sead {x}") from None'
    assert "_ is bad. Try: python a.py --sead _" in checks.raised_messages(source)
    assert len(checks.unknown_flags("_ is bad. Try: python a.py --sead _", FLAGS)) == 1


def test_paths(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "data.md").touch()
    right = "[a](data.md#part) `docs/data.md` `docs/` `runs/x/y` `dataset/run_<time>/recording.mp4` `H/4` [b](https://x.y/z)"
    assert checks.missing_paths(right, tmp_path, tmp_path / "docs") == []
    for wrong in (
        "[a](docs/data.md)",
        "`data.md`",
        "`docs/other.md`",
        "`doc/`",
        "```\npython x.py\n```",
        "`x/frames.txt`",
    ):
        assert len(checks.missing_paths(wrong, tmp_path, tmp_path / "docs")) == 1, wrong


def test_targets():
    makefile = "SHELL := bash\ndemo: x\n\techo\n"
    assert checks.missing_targets("`make demo`, make it", makefile) == []
    assert checks.missing_targets("    make tests\n", makefile) == ["the Makefile has no target tests"]
