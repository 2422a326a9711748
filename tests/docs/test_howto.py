"""The how-to pages do what they say: their code is taken from the page and run."""

from __future__ import annotations

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
