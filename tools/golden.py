"""Writes what transformers gives for a bundled model, so that `transept verify` can compare where transformers is not installed.

    python tools/golden.py smollm2-135m-instruct
"""

from __future__ import annotations

import json
import sys

from transept.evaluation.verify import GOLDEN, reference


def main(names: list[str]) -> None:
    """One file per name under src/transept/evaluation/golden."""
    GOLDEN.mkdir(exist_ok=True)
    for name in names:
        values = reference(name)
        (GOLDEN / f"{name}.json").write_text(json.dumps(values, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
