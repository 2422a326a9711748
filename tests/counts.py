"""How often the long tests repeat: the issue's full counts under `make reliability`, a tenth of them under `make test`."""

from __future__ import annotations

import os

FULL = os.environ.get("TRANSEPT_FULL") == "1"


def count(full: int) -> int:
    """The number of repetitions to run now, out of `full`; never fewer than one."""
    return full if FULL else max(1, full // 10)
