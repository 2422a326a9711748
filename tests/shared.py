"""Finds the real data that lies beside a developer's checkout, and says so when it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("TRANSEPT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared(name: str) -> Path:
    """The path of one shared data file; skips the test, saying which file is missing, where it is not there."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"needs the real data file {name}; set TRANSEPT_DATA to the folder that holds it")
    return path
