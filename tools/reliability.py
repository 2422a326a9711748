"""Runs every test marked `reliability` at its full count and renders docs/reliability.md; exits 1 where one fails.

Usage: python tools/reliability.py [pytest arguments]
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"


def output(*command: str) -> str:
    """What a command prints, or '' where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def machine() -> str:
    """Processor, cores, system and Python, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    """The short commit, marked where the tree differs from it."""
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    return (output("git", "rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def figure(value: Any) -> str:
    """A number with thousands separators, or a dash."""
    return "-" if value is None else f"{value:,}"


def render(lines: list[dict[str, Any]], passed: bool, seconds: float) -> str:
    """The page: head, table by id, and what the columns mean."""
    rows = [
        f"| {line['id']} | {figure(line['n_tried'])} | {figure(line['n_bad'])} | {figure(line['worst_ms'])} | {figure(line['seconds'])} "
        f"| {figure(line['seed']) if line['seed'] is None else line['seed']} |"
        for line in sorted(lines, key=lambda line: line["id"])
    ]
    total, bad = sum(line["n_tried"] for line in lines), sum(line["n_bad"] for line in lines)
    return "\n".join(
        [
            "# Reliability",
            "",
            f"Rendered by `make reliability` on {datetime.date.today()}, commit {commit()}, in {seconds:.0f} s.",
            f"Machine: {machine()}.",
            "",
            f"**{'All tests passed' if passed else 'A TEST FAILED'}: {total:,} inputs tried, {bad:,} behaved otherwise than promised.**",
            "",
            "| What | Tried | Bad | Worst ms of one input | Seconds | Seed |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
            "",
            "Tried: inputs fed. Bad: crashes, untyped or unhelpful errors, time or memory beyond bounds, watched events of the",
            "interpreter, and accepted files that the format's own package reads otherwise. Worst: processor time of one input.",
            "One machine, small files; no outside audit.",
            "",
        ]
    )


def main() -> int:
    """Runs the tests, writes the page, returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.jsonl"
        environment = {**os.environ, "TRANSEPT_FULL": "1", "TRANSEPT_FIGURES": str(figures)}
        begin = datetime.datetime.now()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "reliability", *sys.argv[1:]], cwd=ROOT, env=environment, check=False
        )
        seconds = (datetime.datetime.now() - begin).total_seconds()
        lines = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
    passed = done.returncode == 0 and bool(lines) and not any(line["n_bad"] for line in lines)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(lines, passed, seconds), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {'passed' if passed else 'FAILED'}, {len(lines)} rows")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
