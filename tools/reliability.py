"""Runs every test marked `reliability` at its full count and renders docs/reliability.md; exits 1 where one fails.

Usage: python tools/reliability.py [pytest arguments | --figures FILE]

A part of the tests replaces its own rows and leaves the others as they were, with the day and commit at which each was tried.
--figures takes what tests appended to the file named by TRANSEPT_FIGURES when they were run by hand.
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
KEPT = ROOT / "docs" / "reliability.json"

Line = dict[str, Any]


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
    """A number with thousands separators and at most one decimal, or a dash."""
    return "-" if value is None else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def merged(kept: list[Line], found: list[Line]) -> list[Line]:
    """The kept rows with those that were tried again in their place, by id."""
    return sorted({line["id"]: line for line in (*kept, *found)}.values(), key=lambda line: line["id"])


def render(lines: list[Line], failed: str) -> str:
    """The page: head, table by id, and what the columns mean."""
    rows = [
        f"| {line['id']} | {figure(line['n_tried'])} | {figure(line['n_bad'])} | {figure(line['worst_ms'])} | {figure(line['seconds'])} "
        f"| {figure(line['seed']) if line['seed'] is None else line['seed']} | {line['date']}, {line['commit']} |"
        for line in lines
    ]
    total, bad = sum(line["n_tried"] for line in lines), sum(line["n_bad"] for line in lines)
    verdict = f"A TEST FAILED ({failed})" if failed else "All tests passed" if not bad else "SOMETHING BEHAVED OTHERWISE"
    return "\n".join(
        [
            "# Reliability",
            "",
            "Written by `make reliability`; a part of it (`python tools/reliability.py tests/serving`) replaces its own rows only.",
            f"Machine: {machine()}.",
            "",
            f"**{verdict}: {total:,} inputs tried, {bad:,} behaved otherwise than promised.**",
            "",
            "| What | Tried | Bad | Worst ms of one input | Seconds | Seed | When, commit |",
            "|---|---:|---:|---:|---:|---:|---|",
            *rows,
            "",
            "Tried: inputs fed. Bad: crashes, untyped or unhelpful errors, time or memory beyond bounds, watched events of the",
            "interpreter, and accepted files that the format's own package reads otherwise. Worst: processor time of one input.",
            "One machine, small files; no outside audit.",
            "",
        ]
    )


def tried(arguments: list[str], figures: Path) -> int:
    """Runs the tests at their full counts; they append their figures. Returns pytest's exit status."""
    environment = {**os.environ, "TRANSEPT_FULL": "1", "TRANSEPT_FIGURES": str(figures)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "reliability", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """Runs the tests, or takes the figures of a run by hand (--figures FILE), writes the page, returns the exit status."""
    arguments, status = sys.argv[1:], 0
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.jsonl"
        if arguments[:1] == ["--figures"]:
            figures = Path(arguments[1])
        else:
            status = tried(arguments, figures)
        text = figures.read_text(encoding="utf-8") if figures.exists() else ""
    when = {"date": str(datetime.date.today()), "commit": commit()}
    found: list[Line] = [json.loads(line) | when for line in text.splitlines()]
    for line in found:
        line["seconds"] = line["seconds"] and round(line["seconds"], 1)
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else []
    lines = merged(kept, found)
    failed = "" if status == 0 and found else f"{' '.join(arguments) or 'all'}, {when['date']}, {when['commit']}"
    KEPT.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(lines, failed), encoding="utf-8")
    bad = bool(failed) or any(line["n_bad"] for line in lines)
    print(f"{PAGE.relative_to(ROOT)}: {'FAILED' if bad else 'passed'}, {len(found)} rows of {len(lines)} are new")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
