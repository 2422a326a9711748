"""plan, compile and doctor as a user calls them; and a machine without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transept
from transept import native
from transept.cli.main import main
from transept.core.registry import family
from transept.door import Model
from transept.native.build import build, library_name

SRC = str(Path(transept.__file__).parents[1])
core = pytest.mark.skipif(not native.available(), reason=f"the native core is not compiled here: {native.why_not()}")


def saved(folder: Path, name: str, size: str) -> Path:
    fam = family(name)
    torch.manual_seed(0)
    return transept.save(Model(fam.build(fam.tiny[size]), fam, None, fam.tiny[size]), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny"), "llama", "gqa")


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = main(line)
    out, err = capsys.readouterr()
    return code, out, err


@core
def test_a_plan_counts_what_the_card_counts(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    card = transept.door.load(folder).card
    code, out, _ = run(capsys, "plan", str(folder), "--length", "20", "--json", "--all")
    record = json.loads(out)
    linear = [r for r in record["records"] if r["op"] == "linear"]
    assert code == 0 and record["share"] == "measured"
    assert sum(r["flops"] for r in linear) == 2 * card.linear
    assert sum(r["flops"] for r in record["records"] if r["op"] == "attend") == 2 * card.attention * 20
    assert 4 * card.linear <= sum(r["nbytes"] for r in linear) <= 4.4 * card.linear  # outputs are filled up to panels of 16
    assert sum(r["share"] for r in record["records"]) == pytest.approx(1.0)
    code, out, _ = run(capsys, "plan", str(folder), "--length", "20", "--json")
    layers = json.loads(out)["records"]
    assert len(layers) < len(record["records"]) and sum(r["count"] for r in layers) == len(record["records"])
    assert sum(r["flops"] for r in layers) == record["flops"]


@core
def test_a_plan_as_a_table(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, _ = run(capsys, "plan", str(folder), "--length", "4")
    assert code == 0 and "attend" in out and "stack.layers.*.mlp" in out and "GB/s measured here" in out


@core
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("plan", "{}", "--length", "0"), ("--length", "found 0")),
        (("plan", "{}", "--length", "64"), ("63", "found 64")),
        (("plan", "/nowhere/model"), ("/nowhere/model",)),
        (("compile", "/nowhere/model"), ("/nowhere/model",)),
    ],
)
def test_wrong_lines_are_one_sentence(
    capsys: pytest.CaptureFixture[str], folder: Path, line: tuple[str, ...], words: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, *(part.format(folder) for part in line))
    assert code == 1 and out == "" and err.startswith("transept: ") and "Traceback" not in err
    assert all(word in err for word in words), err


@core
def test_what_does_not_lower_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v3", next(iter(family("deepseek_v3").tiny)))
    for command in ("plan", "compile"):
        code, _, err = run(capsys, command, str(tmp_path))
        assert code == 1 and "runs in torch: stack.layers.0.attn has widths" in err, err


@core
def test_compile_then_generate(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    line = ("generate", str(folder), "1 2 3", "--ids", "--max-tokens", "8", "--json")
    before = json.loads(run(capsys, *line)[1])["ids"]
    code, out, _ = run(capsys, "compile", str(folder), "--json")
    path = Path(json.loads(out)["path"])
    assert code == 0 and path.parent == folder and path.stat().st_size == json.loads(out)["bytes"]
    assert json.loads(run(capsys, *line)[1])["ids"] == before
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run(capsys, *line)
    assert code == 0 and json.loads(out)["ids"] == before and "made again" in err
    assert run(capsys, *line)[2] == ""


def bare(tmp_path: Path, *line: str) -> subprocess.CompletedProcess[str]:
    """The command on a machine with neither a compiler nor a compiled core."""
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "LD_PRELOAD")}
    env |= {"PATH": str(tmp_path), "PYTHONPATH": SRC, "TRANSEPT_NATIVE_LIBRARY": str(tmp_path / "none.so")}
    return subprocess.run([sys.executable, "-m", "transept.cli.main", *line], env=env, capture_output=True, text=True, timeout=120)


def test_without_a_compiler_everything_but_the_speed_is_there(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    line = ("generate", str(folder), "1 2 3", "--ids", "--max-tokens", "8", "--json")
    done = bare(tmp_path, *line)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ids"] == json.loads(run(capsys, *line)[1])["ids"]

    done = bare(tmp_path, "doctor", "--json")
    found = {f["what"]: f for f in json.loads(done.stdout)}
    assert done.returncode == 0 and found["compiler"]["found"] == "none" and "cannot be compiled" in found["compiler"]["lost"]
    assert "no native core was compiled" in found["native core"]["found"] and "in torch" in found["native core"]["lost"]
    assert found["torch"]["lost"] == ""

    done = bare(tmp_path, "compile", str(folder))
    assert done.returncode == 1 and "the native core, which is not there" in done.stderr and "Traceback" not in done.stderr


def test_the_build_says_that_there_is_no_compiler(tmp_path: Path) -> None:
    env = {**{k: v for k, v in os.environ.items() if k != "CXX"}, "PATH": str(tmp_path), "PYTHONPATH": SRC}
    done = subprocess.run(
        [sys.executable, "-m", "transept.native.build", "--out", str(tmp_path)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "No C++ compiler was found" in done.stderr and not (tmp_path / library_name()).exists()
    assert callable(build)


def test_the_doctor_counts_threads_and_cores(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSEPT_THREADS", "999")
    found = {f["what"]: f for f in json.loads(run(capsys, "doctor", "--json")[1])}
    assert found["threads"]["found"].startswith("999 on ") and "more threads than cores" in found["threads"]["lost"]
    assert "GB/s" in found["memory"]["found"]
