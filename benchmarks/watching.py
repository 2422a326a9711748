"""What it costs that a model can be watched, while nobody watches: the same forward pass with its taps and with the taps taken out.

    python benchmarks/watching.py [MODEL] [--tokens N] [--pairs N]

The two ways take turns, and the median of the ratios of neighbours counts: so a machine that slows down for a while slows both. Beside it
stands what watching one head and watching all of them costs. The bar is 1 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import transept
from transept.core import tap as core
from transept.door import load

BAR = 0.01


@contextmanager
def without_taps() -> Iterator[None]:
    """Every module of blocks/ with taps that do nothing at all: what it would be if nothing could be watched."""
    names = {"tap": lambda owner, name, value: value, "peek": lambda owner, name, compute: None}
    held = [(module, name, getattr(module, name)) for label, module in sys.modules.items() if label.startswith("transept.blocks")
            for name in names if getattr(module, name, None) is getattr(core, name)]  # fmt: skip
    for module, name, _ in held:
        setattr(module, name, names[name])
    try:
        yield
    finally:
        for module, name, real in held:
            setattr(module, name, real)


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measured(m: Any, tokens: int, pairs: int) -> dict[str, float]:
    """Medians of the ratios, each to the pass without taps."""
    module, ids = m.look(), torch.arange(3, 3 + tokens)[None] % m.spec.vocab
    watched = {
        "unwatched": (),
        "one head": ("attn[0].head[0]",),
        "all heads": ("attn[*]",),
        "everything": tuple(transept.watchable(module)),
    }
    ratios: dict[str, list[float]] = {name: [] for name in watched}

    def bare() -> float:
        with without_taps():
            return seconds(lambda: module(ids))

    def tapped(names: tuple[str, ...]) -> float:
        if not names:
            return seconds(lambda: module(ids))
        with transept.watch(module, *names):
            return seconds(lambda: module(ids))

    with torch.inference_mode():
        for _ in range(3):
            bare(), tapped(())
        for i in range(pairs):
            for name, names in watched.items():
                # Each goes first in turn.
                first, second = (bare(), tapped(names)) if i % 2 else (tapped(names), bare())
                ratios[name].append((second / first) if i % 2 else (first / second))
    return {name: statistics.median(found) - 1 for name, found in ratios.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--pairs", type=int, default=41)
    args = parser.parse_args()
    m, kept = load(args.model), True
    for tokens in args.tokens:
        found = measured(m, tokens, args.pairs)
        kept = kept and found["unwatched"] <= BAR
        print(
            json.dumps(
                {
                    "model": args.model,
                    "tokens": tokens,
                    "threads": torch.get_num_threads(),
                    "pairs": args.pairs,
                    **{f"{name} %": round(100 * value, 3) for name, value in found.items()},
                }
            ),
            flush=True,
        )
    print(f"a pass that nobody watches costs {'at most' if kept else 'more than'} {100 * BAR:.0f} % more than one without taps")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
