"""Time and memory of sparse attention against dense attention by length; writes docs/sparse.json and docs/sparse.png (rows 43-50).

    python benchmarks/sparse.py [--lengths 1024 2048 ...] [--repeat 3]

One layer's attention of 8 heads of width 64, forward, one row, one thread, the plan of the mask included. Time is processor time, the best
of the repetitions, so that a busy machine does not blur it; memory is the growth of the resident peak in a process of its own. Dense is
torch's fused kernel without a mask, and with the triangle for the causal patterns: nothing dense is faster here. The slope is fitted to
the logarithms of all lengths.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from transept.ops.attention import attend
from transept.ops.masks import Bound, Causal, Full, Global, Mask, Positions, Window
from transept.ops.patterns import Dilated, Fixed, Listed, Strided

LENGTHS = (1024, 2048, 4096, 8192, 16384)
DOCS = Path(__file__).parents[1] / "docs"


def bigbird(blocks: int, size: int = 64, random: int = 3) -> Mask:
    """BigBird in blocks: the first and the last are global, three make the window, three are drawn."""
    draw = np.random.default_rng(0)
    table = [tuple(range(blocks))]
    for i in range(1, blocks - 1):
        table.append(tuple(sorted({0, i - 1, i, i + 1, blocks - 1} | set(draw.choice(blocks, random, replace=False).tolist()))))
    return Listed(size, (*table, table[0]))


MASKED = "dense with the window's mask"
PATTERNS = {
    "dense": lambda n: Full(),
    "dense, causal": lambda n: Causal(),
    MASKED: lambda n: Window(257) | Global((0,)),
    "Longformer, window 512, 1 global": lambda n: Window(257) | Global((0,)),
    "Longformer, dilated by 2": lambda n: Dilated(129, 2) | Global((0,)),
    "BigBird, blocks of 64": lambda n: bigbird(n // 64),
    "strided, 128, causal": lambda n: Causal() & Strided(128),
    "fixed, 128 and 8, causal": lambda n: Causal() & Fixed(128, 8),
    "fixed, 256 and 8, causal": lambda n: Causal() & Fixed(256, 8),
    "fixed, 512 and 8, causal": lambda n: Causal() & Fixed(512, 8),
}


def measure(name: str, length: int, repeat: int) -> dict[str, float]:
    """Seconds and bytes of one attention; meant for a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 64) for _ in range(3))
    where = Positions.span(0, length)
    mask = PATTERNS[name](length)

    def run() -> float:
        begin = time.process_time()
        bound = Bound(mask, where, where)
        if name == MASKED:
            F.scaled_dot_product_attention(q, k, v, attn_mask=bound.dense, scale=0.125)
        else:
            attend(q, k, v, mask=bound, scale=0.125)
        return time.process_time() - begin

    with torch.inference_mode():
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        grown = _status("VmHWM") - before
        return {"seconds": min(run() for _ in range(repeat)), "bytes": max(grown, 0)}


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def slope(points: dict[int, float]) -> float:
    """The exponent of a power of the length."""
    x, y = np.log(list(points)), np.log(list(points.values()))
    return float(np.polyfit(x, y, 1)[0])


def plot(table: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Time and memory by length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for name, rows in table.items():
        style = "k--" if name == "dense" else "k:" if name.startswith("dense") else "o-"
        times = {n: row["seconds"] for n, row in rows.items()}
        left.loglog(list(times), list(times.values()), style, label=f"{name} (slope {slope(times):.2f})", markersize=4)
        right.loglog(list(rows), [row["bytes"] / 2**20 for row in rows.values()], style, markersize=4)
    for axis, title in ((left, "seconds of processor time"), (right, "peak memory above the inputs, MiB")):
        axis.set_xticks(list(next(iter(table.values()))), [f"{n // 1024}k" for n in next(iter(table.values()))])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="measure these again and keep the others of docs/sparse.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.repeat)))
        return
    table: dict[str, dict[int, dict[str, float]]] = {name: {} for name in PATTERNS}
    if options.patterns is not PATTERNS:
        kept = json.loads((DOCS / "sparse.json").read_text())["measured"]
        table |= {name: {int(n): row for n, row in rows.items()} for name, rows in kept.items()}
    for name in options.patterns:
        for n in options.lengths:
            command = [sys.executable, __file__, "--one", name, str(n), "--repeat", str(options.repeat)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            table[name][n] = json.loads(done.stdout)
        shown = "  ".join(f"{n // 1024}k {row['seconds'] * 1e3:7.1f} ms {row['bytes'] / 2**20:5.0f} MiB" for n, row in table[name].items())
        times = {n: row["seconds"] for n, row in table[name].items()}
        print(f"{name:34s} {shown}  slope {slope(times) if len(times) > 1 else math.nan:.2f}", flush=True)
    slopes = {
        name: {
            what: slope({n: max(row[what], 1) if what == "bytes" else row[what] for n, row in rows.items()})
            for what in ("seconds", "bytes")
        }
        for name, rows in table.items()
    }
    DOCS.joinpath("sparse.json").write_text(json.dumps({"torch": torch.__version__, "measured": table, "slope": slopes}, indent=2) + "\n")
    plot(table, DOCS / "sparse.png")


if __name__ == "__main__":
    main()
