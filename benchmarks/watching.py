"""What it costs that a model can be watched, while nobody watches: the same forward pass with its taps and with the taps taken out.

    python benchmarks/watching.py [MODEL] [--tokens N ...] [--seconds N] [--threads N]

The two ways take turns within a second: with, without, without, with (and the other way round in the next block), so that a machine that
slows down or speeds up evenly does not count; the median of the blocks' ratios counts, with the interval in which it lies at 95 % (of order
statistics, so no distribution is assumed). Beside it stands what cannot be disturbed: how often a pass taps, times what one tap costs,
over the pass. The bar is 1 %, and the whole interval must lie below it. One thread unless told otherwise: threads that wait for
each other make the interval wide.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import transept
from transept.core import tap as core
from transept.door import load

BAR = 0.01


@contextmanager
def taps(**instead: Callable[..., Any]) -> Iterator[None]:
    """Every module of blocks/ with other functions in place of `tap` and `peek`."""
    places = [(module, name, getattr(core, name)) for label, module in sys.modules.items() if label.startswith("transept.blocks")
              for name in instead if getattr(module, name, None) is getattr(core, name)]  # fmt: skip
    for module, name, _ in places:
        setattr(module, name, instead[name])
    try:
        yield
    finally:
        for module, name, real in places:
            setattr(module, name, real)


def without_taps() -> Any:
    """What a pass would be if nothing could be watched."""
    return taps(tap=lambda owner, name, value: value, peek=lambda owner, name, compute: None)


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def paired(module: Any, ids: torch.Tensor, names: tuple[str, ...], budget: float) -> tuple[float, float, float, int]:
    """The median of the ratios of a watched pass (or, without names, a plain one) to one without taps, its interval, and how many blocks
    of four passes fit into so many seconds.
    """

    def bare() -> float:
        with without_taps():
            return seconds(lambda: module(ids))

    def tapped() -> float:
        if not names:
            return seconds(lambda: module(ids))
        with transept.watch(module, *names):
            return seconds(lambda: module(ids))

    def block(turn: int) -> float:
        took: dict[Any, float] = {bare: 0.0, tapped: 0.0}
        for way in (tapped, bare, bare, tapped) if turn % 2 else (bare, tapped, tapped, bare):
            took[way] += way()
        return took[tapped] / took[bare]

    block(0)
    until, ratios = time.monotonic() + budget, []
    while time.monotonic() < until or len(ratios) < 8:
        ratios.append(block(len(ratios)))
    found, n = sorted(ratios), len(ratios)
    reach = math.ceil(0.98 * math.sqrt(n))
    low, high = found[max(0, n // 2 - reach)], found[min(n - 1, n // 2 + reach)]
    return statistics.median(found) - 1, low - 1, high - 1, n


def counted(module: Any, ids: torch.Tensor) -> float:
    """Taps of a pass, times the seconds of one, over the seconds of the pass."""
    calls: Counter[str] = Counter()

    def tapped(owner: object, name: str, value: Any) -> Any:
        calls["tap"] += 1
        return value

    def peeked(owner: object, name: str, compute: Any) -> None:
        calls["peek"] += 1

    with taps(tap=tapped, peek=peeked):
        module(ids)
    times, owner, value = 100_000, object(), torch.zeros(1)

    def peeking() -> None:
        core.peek(owner, "weights", partial(torch.add, value, value, alpha=1, out=None))

    one = {"tap": seconds(lambda: [core.tap(owner, "q", value) for _ in range(times)]) / times,
           "peek": seconds(lambda: [peeking() for _ in range(times)]) / times}  # fmt: skip
    whole = statistics.median(seconds(lambda: module(ids)) for _ in range(9))
    return sum(calls[name] * one[name] for name in calls) / whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=80.0, help="for each number of tokens")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    m, kept = load(args.model), True
    module = m.look()
    watched = {"one head": ("attn[0].head[0]",), "all heads": ("attn[*]",), "everything": tuple(transept.watchable(module))}
    for tokens in args.tokens:
        ids = torch.arange(3, 3 + tokens)[None] % m.spec.vocab  # type: ignore[attr-defined]
        with torch.inference_mode():
            share = counted(module, ids)
            median, low, high, blocks = paired(module, ids, (), args.seconds)
            others = {name: paired(module, ids, names, args.seconds / 20)[0] for name, names in watched.items()}
        kept = kept and share <= BAR and high <= BAR
        told = {"unwatched %": median, "from %": low, "to %": high, "counted %": share, **{f"{name} %": v for name, v in others.items()}}
        print(json.dumps({"model": args.model, "tokens": tokens, "threads": args.threads, "blocks": blocks,
                          **{name: round(100 * value, 3) for name, value in told.items()}}), flush=True)  # fmt: skip
    print(f"a pass that nobody watches costs {'at most' if kept else 'perhaps more than'} {100 * BAR:.0f} % more than one without taps")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
