"""What the server says when it opens: its address, and one real example of each model with the time it took."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import transept
from tests.serving import tiny
from transept.cli import serve
from transept.serving.run import Running

pytestmark = pytest.mark.xdist_group("browser")


def test_the_opening_lines(tmp_path: Path) -> None:
    folder = tiny.decoder(tmp_path / "tiny")
    with tiny.spawned(folder) as (process, address):
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
    assert f"{address}/v1" in lines[0]
    said = re.fullmatch(r"  tiny: (.*) in \d+ ms\n", lines[1])
    asked = "The capital of France is"
    assert said is not None and said[1] == repr(asked + transept.load(folder).generate(asked, max_tokens=8).text)


def test_an_example_of_each_task(playground: Running, capsys: pytest.CaptureFixture[str]) -> None:
    books = playground.app.state.desk.shelf.books
    for name, says in (("fill", "[MASK]"), ("answer", "finds"), ("classify", "is '")):
        serve._example(books[name].served)
        line = capsys.readouterr().out
        assert line.startswith(f"  {name}: ") and says in line and re.search(r"in \d+ ms$", line.strip()), line


def test_without_any_model_the_command_says_how_to_begin(tmp_path: Path) -> None:
    env = {**os.environ, "TRANSEPT_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-m", "transept.cli.main"], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "transept pull smollm2-135m-instruct" in run.stderr and not run.stdout
