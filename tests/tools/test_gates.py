"""Every gate is seen to fail on a planted fault and to pass without it; a gate that cannot fail guards nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gates

REPOSITORY = Path(__file__).parents[2]
CLEAN = "from __future__ import annotations\n\n\ndef double(x: int) -> int:\n    return 2 * x\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def body(lines: int) -> str:
    return "".join(f"    x{n} = {n} + x\n" for n in range(lines))


def test_the_same_eight_lines_in_two_files_are_found(tmp_path: Path) -> None:
    one = "import os\n\n\ndef first(x):\n    # why\n" + body(8)
    two = "import sys\n\n\n@decorated\ndef second(x):\n" + body(4) + "\n    # another reason\n" + body(8)[body(4).__len__() :]
    gate = gates.duplicates(write(tmp_path, {"one.py": one, "two.py": two}))
    assert not gate.kept and gate.places == ("one.py = two.py (1 windows)",)
    # each file has nine significant lines, two windows, and one of them stands in both
    assert gate.value == 50.0


def test_seven_lines_or_one_file_are_no_copy(tmp_path: Path) -> None:
    write(tmp_path, {"one.py": "def first(x):\n" + body(7) + "    return 1\n", "two.py": "def second(x):\n" + body(7) + "    return 2\n"})
    assert gates.duplicates(tmp_path).value == 0
    write(tmp_path / "alone", {"one.py": "def first(x):\n" + body(9) + "def second(x):\n" + body(9)})
    assert gates.duplicates(tmp_path / "alone").value == 0


def test_imports_decorators_comments_and_blank_lines_are_no_copy(tmp_path: Path) -> None:
    imports = "".join(f"import module{n}\n" for n in range(5)) + "from a import (\n    b,\n    c,\n    d,\n)\n"
    same = imports + "# words\n# words\n\n\n@mark(\n    1,\n    2,\n)\n"
    write(tmp_path, {"one.py": same + "def one(x):\n" + body(3), "two.py": same + "def two(x):\n    y = 1\n"})
    assert gates.duplicates(tmp_path).value == 0


@pytest.mark.parametrize(
    ("arguments", "count"), [("a, b, c, d, e, f, g, h", 8), ("a, b, c, d, e, f, g, h, i", 9), ("a, /, b, c, *, d, e, f, g, h, i=1", 9)]
)
def test_constructor_parameters(tmp_path: Path, arguments: str, count: int) -> None:
    gate = gates.constructor_parameters(write(tmp_path, {"m.py": f"class M:\n    def __init__(self, {arguments}):\n        pass\n"}))
    assert (gate.value, gate.kept) == (count, count <= 8)


def test_spec_fields_count_what_is_inherited(tmp_path: Path) -> None:
    fields = "".join(f"    a{n}: int\n" for n in range(15))
    more = "".join(f"    b{n}: int = 0\n" for n in range(6))
    text = f"@dataclass(frozen=True)\nclass A(Spec):\n    C: ClassVar[int] = 1\n{fields}\n@dataclasses.dataclass\nclass B(A):\n{more}"
    gate = gates.spec_fields(write(tmp_path, {"m.py": text}))
    assert (gate.value, gate.kept) == (21, False) and "B (21)" in gate.places[0]
    assert gates.spec_fields(write(tmp_path / "ok", {"m.py": f"@dataclass\nclass A:\n{fields}"})).value == 15


def test_function_lengths(tmp_path: Path) -> None:
    short = "".join(f"def f{n}(x):\n    return x\n" for n in range(18))
    write(tmp_path, {"m.py": short + "async def long(x):\n" + body(59) + "def longer(x):\n" + body(89)})
    p95 = gates.function_length(tmp_path)
    assert (p95.value, p95.kept) == (60, False), "the 19th of 20 functions"
    longest = gates.longest_function(tmp_path)
    assert (longest.value, longest.kept) == (90, False) and "longer" in longest.places[0]
    assert gates.function_length(write(tmp_path / "ok", {"m.py": short})).value == 2


def test_model_files_and_the_whole_library(tmp_path: Path) -> None:
    write(tmp_path, {"models/text/a.py": "x = 1\n" * 300, "models/text/b.py": "\n" * 301, "blocks/c.py": "x = 1\n" * 500})
    page = gates.model_file(tmp_path)
    assert (page.value, page.kept, page.places) == (301, False, ("models/text/b.py (301)",))
    assert gates.library_lines(tmp_path).value == 1101
    assert not gates.library_lines(tmp_path, limit=1100).kept


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as json",
        "from pickle import loads",
        "import _pickle",
        "import marshal",
        "import shelve, os",
        "import cloudpickle",
        "def f(x): return eval(x)",
        "f = eval",
        "exec('x = 1')",
        "compile('x', 'y', 'exec')",
        "__import__('os')",
        "import builtins\nbuiltins.exec('x')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load\nload('x')",
        "from torch import load as read\nread('x')",
        "import torch\nread = torch.load",
        "import torch.serialization\ntorch.serialization.load('x')",
        "import yaml\nyaml.load('x')",
        "import os\nos.system('x')",
        "from os import popen\npopen('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import subprocess\nsubprocess.run('x', shell=flag)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "f(trust_remote_code=True)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module(name)",
        "import runpy\nrunpy.run_path('x')",
        "def f(x):\n    assert x > 0",
    ],
)
def test_each_forbidden_call_is_found(tmp_path: Path, line: str) -> None:
    gate = gates.source_rules(write(tmp_path, {"ok.py": CLEAN, "bad.py": line + "\n"}))
    assert not gate.kept and all(place.startswith("bad.py:") for place in gate.places)


@pytest.mark.parametrize(
    "line",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import torch\ntorch.compile(f)",
        "template.exec_module(m)",
        "import subprocess\nsubprocess.run(['x'], shell=False)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import json\njson.load(f)",
        "words = 'import pickle; eval(x)'",
        "from transept.checkpoints import load\nload('x')",
    ],
)
def test_harmless_calls_are_not_found(tmp_path: Path, line: str) -> None:
    assert gates.source_rules(write(tmp_path, {"m.py": line + "\n"})).places == ()


def test_names_are_looked_up_by_path_in_the_registry_only(tmp_path: Path) -> None:
    line = "import importlib\nimportlib.import_module(name)\n"
    gate = gates.source_rules(write(tmp_path, {"core/registry.py": line, "core/other.py": line}))
    assert len(gate.places) == 1 and gate.places[0].startswith("core/other.py:2")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("@pytest.mark.skip\ndef test(): ...", True),
        ("@pytest.mark.xfail()\ndef test(): ...", True),
        ("@pytest.mark.skipif(WINDOWS)\ndef test(): ...", True),
        ("def test():\n    pytest.skip()", True),
        ("@pytest.mark.skipif(WINDOWS, reason='no fork')\ndef test(): ...", False),
        ("def test():\n    pytest.skip('needs the file x')", False),
    ],
)
def test_skips_without_a_reason(tmp_path: Path, line: str, found: bool) -> None:
    assert gates.silent_skips(write(tmp_path, {"test_m.py": line + "\n"})).kept != found


@pytest.mark.parametrize(
    "words", ["/wor*k/main/x", "see /roo*t/.cache", "/hom*e/anna/x", "pyp*i.org/simple", "pythonhoste*d.x", "--index-ur*l x"]
)
def test_private_paths_and_hosts(tmp_path: Path, words: str) -> None:
    words = words.replace("*", "")  # so that this file does not contain them either
    write(tmp_path, {"a.md": f"one\n{words}\n", "b.py": CLEAN})
    gate = gates.private_traces(tmp_path, tmp_path.iterdir())
    assert gate.value == 1 and gate.places[0].startswith("a.md:2")


def test_ordinary_paths_are_no_trace(tmp_path: Path) -> None:
    write(tmp_path, {"a.md": "~/.cache/transept, ./work/x, homework/x, network/root/x, https://arxiv.org/abs/1706.03762\n"})
    assert gates.private_traces(tmp_path, tmp_path.iterdir()).value == 0


DOCUMENT = "See [the log](docs/log.md), [the paper](https://arxiv.org/x), [below](#x), `src/m.py`, `make test`.\n\n    transept chat M\n"
TREE = {"README.md": DOCUMENT, "docs/log.md": "[up](../README.md#x)\n", "src/m.py": "", "Makefile": "VERSION := 1\ntest: stamp\n\techo\n"}


def known(names: set[str]) -> set[str]:
    return names & {"chat", "list"}


def test_documents_that_name_only_what_exists(tmp_path: Path) -> None:
    assert gates.documents(write(tmp_path, TREE), known).places == ()


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("[x](docs/gone.md)", "README.md links to docs/gone.md"),
        ("`src/gone.py`", "README.md names src/gone.py"),
        ("`make gone`", "README.md names make gone"),
        ("`transept gone x`", "README.md names transept gone"),
        ("$ transept gone", "README.md names transept gone"),
        ("```\ntransept gone MODEL\n```", "README.md names transept gone"),
    ],
)
def test_documents_that_name_what_does_not_exist(tmp_path: Path, words: str, place: str) -> None:
    gate = gates.documents(write(tmp_path, {**TREE, "README.md": DOCUMENT + words + "\n"}), known)
    assert gate.places == (place,)


@pytest.mark.serial
def test_commands_are_asked_for_their_help() -> None:
    assert gates.existing_commands({"list", "no-such-command"}) == {"list"}


def planted(tmp_path: Path, files: dict[str, str]) -> Path:
    """A small package on the real floors, under the real settings."""
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    write(tmp_path, {f"src/transept{folder}/__init__.py": CLEAN for folder in ("", "/core", "/blocks")})
    return write(tmp_path, {"tools/t.py": CLEAN, **files})


@pytest.mark.serial
@pytest.mark.parametrize(
    ("files", "kept"),
    [
        ({"src/transept/blocks/a.py": "from transept import core\n"}, True),
        ({"src/transept/core/a.py": "from transept import blocks\n"}, False),
        ({"src/transept/core/a.py": "def f():\n    from transept.blocks import double\n    return double\n"}, False),
        ({"src/transept/ops/__init__.py": "from transept import mapping\n", "src/transept/mapping/__init__.py": ""}, False),
        ({"src/transept/attic/__init__.py": ""}, False),
    ],
    ids=["down", "up", "up-lazily", "sideways", "no-floor"],
)
def test_imports_go_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], kept: bool) -> None:
    monkeypatch.setenv("PYTHONPATH", str(planted(tmp_path, files) / "src"))
    gate = gates.import_floors(tmp_path)
    assert gate.kept == kept, gate.places
    assert kept or any("transept." in place or "attic" in place for place in gate.places)


@pytest.mark.serial
def test_ruff_and_pyright_are_listened_to(tmp_path: Path) -> None:
    root = planted(tmp_path, {"src/transept/core/a.py": "import os\n\n\ndef f(x: int) -> str:\n    return x\n"})
    assert any("F401" in place for place in gates.ruff(root).places)
    assert any("not assignable" in place for place in gates.pyright(root).places)
    (root / "src/transept/core/a.py").unlink()
    assert (gates.ruff(root).places, gates.pyright(root).places) == ((), ())


def test_a_checker_that_is_missing_is_no_pass(tmp_path: Path) -> None:
    assert not gates.program("x", ["no-such-checker-at-all"], tmp_path, "x").kept


@pytest.mark.serial
def test_the_command_exits_1_where_a_limit_is_passed(tmp_path: Path) -> None:
    script = str(REPOSITORY / "tools" / "gates.py")
    root = write(tmp_path, {"src/transept/core/a.py": CLEAN, "tests/test_a.py": CLEAN, "Makefile": "x:\n"})
    good = subprocess.run([sys.executable, script, "--quick", "--root", str(root)], capture_output=True, text=True)
    assert good.returncode == 0, good.stdout
    write(root, {"src/transept/core/b.py": "import pickle\n"})
    bad = subprocess.run([sys.executable, script, "--quick", "--root", str(root)], capture_output=True, text=True)
    assert bad.returncode == 1 and "over the limit: forbidden calls" in bad.stdout and "core/b.py:1 imports pickle" in bad.stdout


def test_nothing_in_the_library_runs_what_a_file_says() -> None:
    assert gates.source_rules(REPOSITORY / "src" / "transept").places == ()
