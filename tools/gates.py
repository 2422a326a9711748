"""Measures the source against its limits and exits 1 where one is passed. Raising a limit needs a line of reason in docs/log.md.

    python tools/gates.py            every gate
    python tools/gates.py --quick    those that need no other program
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import os
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

Node = TypeVar("Node", bound=ast.AST)
WINDOW = 8
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Gate:
    """One measured value beside its limit, and the places that made it (worst first)."""

    name: str
    value: float
    limit: float
    unit: str = ""
    places: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        return self.value <= self.limit


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def _parsed(path: Path, stamp: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def parsed(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


# --- size and shape ----------------------------------------------------------------------------------------------------------------------


def significant_lines(path: Path) -> list[str]:
    """The file's lines without imports, decorators, comments, blank lines and outer spaces: what a copy would consist of."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    drop: set[int] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            drop.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for decorator in getattr(node, "decorator_list", []):
            drop.update(range(decorator.lineno, decorator.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [line.strip() for number, line in enumerate(lines, start=1) if number not in drop and line.strip()]


def duplicates(folder: Path, limit: float = 1.0) -> Gate:
    """Share of the windows of eight significant lines that stand in more than one file, in percent."""
    seen: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in python_files(folder):
        lines = significant_lines(path)
        for start in range(len(lines) - WINDOW + 1):
            seen[tuple(lines[start : start + WINDOW])].append(path)
    copies = {window: paths for window, paths in seen.items() if len(set(paths)) > 1}
    total = sum(map(len, seen.values()))
    share = 100 * sum(map(len, copies.values())) / total if total else 0.0
    pairs: dict[str, int] = defaultdict(int)
    for paths in copies.values():
        pairs[" = ".join(sorted({path.relative_to(folder).as_posix() for path in paths}))] += 1
    return Gate("duplicate windows", round(share, 2), limit, "%", tuple(f"{pair} ({n} windows)" for pair, n in _worst(pairs)))


def constructor_parameters(folder: Path, limit: int = 8) -> Gate:
    """The most parameters of an __init__, without self. Fields of dataclasses are counted by `spec_fields`."""
    found = {}
    for path, node in _nodes(folder, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                args = method.args
                count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs) - 1
                found[f"{path.relative_to(folder)}:{method.lineno} {node.name}"] = count
    return _largest("constructor parameters", found, limit)


def spec_fields(folder: Path, limit: int = 20) -> Gate:
    """The most fields of a dataclass, inherited ones included where the base is in the same file."""
    found = {}
    for path in python_files(folder):
        classes = {node.name: node for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)}
        for node in classes.values():
            if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                found[f"{path.relative_to(folder)}:{node.lineno} {node.name}"] = len(_fields(node, classes))
    return _largest("Spec fields", found, limit)


def _fields(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    lines = (line for line in node.body if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation))
    own = {line.target.id for line in lines if isinstance(line.target, ast.Name)}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes and base.id != node.name:
            own |= _fields(classes[base.id], classes)
    return own


def _function_lengths(folder: Path) -> dict[str, int]:
    found = {}
    for path, node in (*_nodes(folder, ast.FunctionDef), *_nodes(folder, ast.AsyncFunctionDef)):
        found[f"{path.relative_to(folder)}:{node.lineno} {node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    return found


def function_length(folder: Path, limit: int = 50) -> Gate:
    """The 95th percentile of function lengths in lines, docstring included."""
    found = _function_lengths(folder)
    ordered = sorted(found.values())
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0
    over = {name: length for name, length in found.items() if length > limit}
    return Gate("function length p95", p95, limit, "lines", tuple(f"{name} ({n})" for name, n in _worst(over)))


def longest_function(folder: Path, limit: int = 80) -> Gate:
    return _largest("longest function", _function_lengths(folder), limit, "lines")


def model_file(folder: Path, limit: int = 300) -> Gate:
    """The longest file of a family."""
    pages = folder / "models"
    return _largest("model file", {path.relative_to(folder).as_posix(): _lines(path) for path in python_files(pages)}, limit, "lines")


def library_lines(folder: Path, limit: int = 36_000) -> Gate:
    """All lines of the library, blank ones and comments included."""
    return Gate("core library", sum(map(_lines, python_files(folder))), limit, "lines")


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _nodes(folder: Path, kind: type[Node]) -> Iterator[tuple[Path, Node]]:
    for path in python_files(folder):
        for node in ast.walk(parsed(path)):
            if isinstance(node, kind):
                yield path, node


def _worst(found: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(found.items(), key=lambda item: -item[1])[:10]


def _largest(name: str, found: dict[str, int], limit: int, unit: str = "") -> Gate:
    over = {place: value for place, value in found.items() if value > limit}
    return Gate(name, max(found.values(), default=0), limit, unit, tuple(f"{place} ({value})" for place, value in _worst(over)))


# --- source rules (nothing in a data file may name code) ---------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "code", "pty"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_CALLS = {
    "builtins.eval", "builtins.exec",
    "torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
# a module name that is not written out may be imported only where families and the door's lazy names are looked up by path
DYNAMIC_IMPORT = {"importlib.import_module", "importlib.util.spec_from_file_location", "runpy.run_path", "runpy.run_module"}
DYNAMIC_IMPORT_FILES = {"core/registry.py", "cli/train.py", "__init__.py"}


def source_rules(folder: Path) -> Gate:
    """Counts calls and imports that could run what a file says: pickle and its kin, eval, a shell, torch.load, dynamic imports."""
    found = [f"{path.relative_to(folder)}:{line} {what}" for path in python_files(folder) for line, what in _breaches(path, folder)]
    return Gate("forbidden calls", len(found), 0, "", tuple(found))


def _breaches(path: Path, folder: Path) -> Iterator[tuple[int, str]]:
    tree = parsed(path)
    names = _aliases(tree)
    dynamic = path.relative_to(folder).as_posix() in DYNAMIC_IMPORT_FILES
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            wanted = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"imports {name}") for name in wanted if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Name | ast.Attribute):
            # a name counts, called or not: `load = torch.load` is the same hole
            full = _full_name(node, names)
            # a field that bears a builtin's name is written, not read
            read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            if full in FORBIDDEN_CALLS or (read and full in FORBIDDEN_BUILTINS and full not in names):
                yield node.lineno, f"uses {full}"
            elif full in DYNAMIC_IMPORT and not dynamic:
                yield node.lineno, f"uses {full} outside {', '.join(sorted(DYNAMIC_IMPORT_FILES))}"
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle", "trust_remote_code"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value.lineno, f"passes {node.arg}={ast.unparse(node.value)}"
        elif isinstance(node, ast.Assert):
            yield node.lineno, "asserts; a check of input must outlive python -O"


def _aliases(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: `import torch as t` gives t -> torch, `from torch import load` gives load -> torch.load."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def silent_skips(folder: Path) -> Gate:
    """Counts skips and expected failures in tests that give no reason."""
    found = []
    for path in python_files(folder):
        tree = parsed(path)
        called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"pytest\.(mark\.)?(skip|xfail|skipif)", ast.unparse(node)):
                call = called.get(id(node))
                needs = 2 if node.attr == "skipif" else 1
                if call is None or (len(call.args) < needs and not any(word.arg == "reason" for word in call.keywords)):
                    found.append(f"{path.relative_to(folder)}:{node.lineno} {ast.unparse(node)}")
    return Gate("skips without a reason", len(found), 0, "", tuple(found))


# --- words -------------------------------------------------------------------------------------------------------------------------------

# written with classes of one letter so that this file does not contain what it looks for
PRIVATE = re.compile(
    r"(?<![\w.])/(?:wor[k]|roo[t]|opt/pyp[i]\S*)/|/hom[e]/\w"
    r"|pyp[i]\.org|pythonhoste[d]|extra-index-ur[l]|index-ur[l][ =]|download\.pytorch\.or[g]|registry\.npmj[s]"
)
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cfg", ".sh", ".jinja", ""}
PATH_IN_TEXT = re.compile(r"`((?:src|tests|tools|docs|recipes|benchmarks|examples|\.ci)/[\w./-]*)`")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")
MAKE = re.compile(r"`make ([a-z][\w-]*)")
COMMAND = re.compile(r"(?:^|[`$(] ?)transept ([a-z][\w-]*)", re.MULTILINE)


def private_traces(root: Path, files: Iterable[Path]) -> Gate:
    """Counts lines that name a path of somebody's machine or the host of a registry."""
    found = []
    for path in files:
        if path.suffix in TEXT and path.is_file() and path.stat().st_size < 2_000_000:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                if hit := PRIVATE.search(line):
                    found.append(f"{path.relative_to(root)}:{number} {hit.group()}")
    return Gate("private paths and hosts", len(found), 0, "", tuple(found))


def documents(root: Path, commands: Callable[[set[str]], set[str]]) -> Gate:
    """Counts links, paths, make targets and commands that the documents name and that do not exist.

    `commands` tells which of the named subcommands of `transept` exist.
    """
    targets = set(re.findall(r"^([a-z][\w-]*):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found: list[str] = []
    asked: dict[str, str] = {}
    for path in [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]:
        text, where = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        found += [f"{where} links to {name}" for name in LINK.findall(text) if not (path.parent / name).exists()]
        found += [f"{where} names {name}" for name in PATH_IN_TEXT.findall(text) if not (root / name).exists()]
        found += [f"{where} names make {name}" for name in MAKE.findall(text) if name not in targets]
        asked.update(dict.fromkeys(COMMAND.findall(text), where))
    missing = set(asked) - commands(set(asked)) if asked else set()
    found += [f"{asked[name]} names transept {name}" for name in sorted(missing)]
    return Gate("documents that name nothing", len(found), 0, "", tuple(found))


def existing_commands(names: set[str]) -> set[str]:
    """Those of the names that `transept NAME --help` knows."""
    transept = str(Path(sys.executable).parent / "transept")
    return {name for name in names if subprocess.run([transept, name, "--help"], capture_output=True, check=False).returncode == 0}


def repository_files(root: Path) -> list[Path]:
    """Files under version control or about to be; every file where git is not at hand."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(command, cwd=root, capture_output=True, check=False)
    if answer.returncode == 0:
        return [root / name for name in sorted(set(answer.stdout.decode().split("\0"))) if name]
    return [path for path in sorted(root.rglob("*")) if path.is_file() and not {".git", ".venv"} & set(path.relative_to(root).parts)]


# --- other programs ----------------------------------------------------------------------------------------------------------------------


def program(name: str, command: list[str], root: Path, complaint: str) -> Gate:
    """Runs a checker of the same environment and counts its lines that match `complaint`; an exit other than 0 counts as one at least."""
    beside = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}", "NO_COLOR": "1"}
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        return Gate(name, 1, 0, "", (f"{command[0]} is not installed; run make test once",))
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    complaints = [line.strip() for line in lines if re.search(complaint, line)]
    if done.returncode == 0:
        return Gate(name, 0, 0)
    return Gate(name, max(1, len(complaints)), 0, "", tuple((complaints or lines)[:40]))


def import_floors(root: Path) -> Gate:
    """Imports against the floors, by import-linter."""
    return program("import floors", ["lint-imports", "--no-cache"], root, r"^- ")


def ruff(root: Path) -> Gate:
    """Complaints of ruff."""
    return program("ruff", ["ruff", "check", "--quiet", "--no-cache", "--output-format=concise", "."], root, r":\d+:\d+: ")


def pyright(root: Path) -> Gate:
    """Type errors, by basedpyright at its basic level."""
    return program("pyright (basic)", ["basedpyright", "--level", "error"], root, r":\d+:\d+ - error")


def quick_gates(root: Path) -> list[Gate]:
    """Every gate that reads the tree and needs no other program."""
    source = root / "src" / "transept"
    return [
        duplicates(source),
        constructor_parameters(source),
        spec_fields(source),
        function_length(source),
        longest_function(source),
        model_file(source),
        library_lines(source),
        source_rules(source),
        silent_skips(root / "tests"),
        private_traces(root, repository_files(root)),
    ]


def all_gates(root: Path) -> list[Gate]:
    return [
        import_floors(root),
        *quick_gates(root),
        documents(root, existing_commands),
        ruff(root),
        pyright(root),
    ]


def table(gates: list[Gate]) -> str:
    """The gates as aligned text: name, value, limit, verdict."""
    width = max(len(gate.name) for gate in gates)
    lines = [f"{'gate':<{width}}  {'value':>9}  {'limit':>9}  {'unit':<5}"]
    for gate in gates:
        verdict = "kept" if gate.kept else "OVER"
        lines.append(f"{gate.name:<{width}}  {gate.value:>9,.6g}  {gate.limit:>9,.6g}  {gate.unit:<5}  {verdict}")
        if not gate.kept:
            lines += [f"    {place}" for place in gate.places]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the source against its limits.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository to measure")
    parser.add_argument("--quick", action="store_true", help="only the gates that need no other program")
    options = parser.parse_args(arguments)
    gates = (quick_gates if options.quick else all_gates)(options.root)
    print(table(gates))
    over = [gate.name for gate in gates if not gate.kept]
    print(f"{len(gates) - len(over)} of {len(gates)} gates kept" + (f"; over the limit: {', '.join(over)}" if over else ""))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
