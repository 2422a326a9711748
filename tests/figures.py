"""One JSON line per reliability test, for the report that tools/reliability.py renders."""

from __future__ import annotations

import json
import os


def record(
    id: str, *, n_tried: int, n_ok: int, n_bad: int, worst_ms: float | None = None, seconds: float | None = None, seed: int | None = None
) -> None:
    """Appends the figures of one test to the file named by TRANSEPT_FIGURES; does nothing where it is unset.

    id: the anchor of the plan ("L-1 safetensors"); n_tried inputs, of which n_ok behaved as promised and n_bad did not.
    """
    path = os.environ.get("TRANSEPT_FIGURES")
    if not path:
        return
    line = {"id": id, "n_tried": n_tried, "n_ok": n_ok, "n_bad": n_bad, "worst_ms": worst_ms, "seconds": seconds, "seed": seed}
    # One write of one short line in append mode: parallel workers cannot tear it.
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
