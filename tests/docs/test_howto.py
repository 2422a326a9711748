"""The how-to pages do what they say: their code is taken from the page and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_a_family_of_the_readers_own_passes_every_contract(tmp_path: Path) -> None:
    page, use = blocks("docs/howto/add-a-family.md", "python")
    (tmp_path / "birch.py").write_text(page)
    (command,) = blocks("docs/howto/add-a-family.md", "bash")
    assert command.startswith("pytest tests/contracts tests/laws --family birch.py")
    env = {**os.environ, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)}
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/contracts",
        "tests/laws",
        "--family",
        str(tmp_path / "birch.py"),
        "-k",
        "birch",
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 10, done.stdout[-500:]
    used = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    assert len(eval_list(used.stdout)) == 5


def eval_list(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def test_an_objective_of_the_readers_own_trains_and_goes_on(tmp_path: Path) -> None:
    (page,) = blocks("docs/howto/add-an-objective.md", "python")
    (tmp_path / "distance.py").write_text(page)
    losses = []
    for command in blocks("docs/howto/add-an-objective.md", "bash"):
        program, *words = command.split()
        assert program == "transept"
        line = [sys.executable, "-m", "transept.cli.main", *words]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "go on: transept train --resume distance-run" in done.stdout
        found = json.loads((tmp_path / "distance-run" / "result.json").read_text())
        losses.append(found["figures"]["eval.loss"])
    assert found["step"] == 80 and losses[1] < losses[0] < 0.25
