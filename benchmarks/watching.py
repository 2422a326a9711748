"""What it costs that a model can be watched, while nobody watches: the same forward pass with its taps and with the taps taken out.

    python benchmarks/watching.py [MODEL] [--tokens N ...] [--seconds N] [--threads N]

Compared is layer by layer: each layer's real input is kept, and the two ways take turns on it within milliseconds: with, without, without,
with, and the other way round the next time. So a machine whose memory slows down and speeds up disturbs few pairs and favours none. The
median of all ratios counts, with the interval in which it lies at 95 % (of order statistics, so no distribution is assumed), and the whole
interval must lie below 1 %. A layer's weights are in the processor's cache by then, so its taps weigh more than in a pass. Beside it stands
what cannot be disturbed: how often a pass taps, times what one tap costs, over the pass. One thread unless told otherwise.
"""

from __future__ import annotations

import argparse
import itertools
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
from transept.blocks.block import Block
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


def layered(module: Any, ids: torch.Tensor, budget: float) -> tuple[float, float, float, int]:
    """The median of the ratios of a layer with taps to the same without, its interval, and the number of ratios that came together in so
    many seconds.
    """
    kept: list[Callable[[], Any]] = []

    def keep(layer: Any, args: Any, kwargs: Any) -> None:
        kept.append(partial(layer.forward, *args, **kwargs))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in module.modules() if isinstance(layer, Block)]
    module(ids)
    for hook in hooks:
        hook.remove()

    def one(call: Callable[[], Any], bare: bool) -> float:
        # Either way the functions are put into their places, so that what a call finds in the processor's caches is the same.
        with without_taps() if bare else taps(tap=core.tap, peek=core.peek):
            return seconds(call)

    ratios: list[float] = []
    until = time.monotonic() + budget
    for turn in itertools.count():
        if time.monotonic() > until and turn > 4:
            break
        for call in kept:
            call()
            took = {True: 0.0, False: 0.0}
            for bare in (False, True, True, False) if turn % 2 else (True, False, False, True):
                took[bare] += one(call, bare)
            ratios.append(took[False] / took[True])
    found, n = sorted(ratios), len(ratios)
    reach = math.ceil(0.98 * math.sqrt(n))
    return statistics.median(found) - 1, found[max(0, n // 2 - reach)] - 1, found[min(n - 1, n // 2 + reach)] - 1, n


def watching(module: Any, ids: torch.Tensor, names: tuple[str, ...], budget: float) -> float:
    """The median of the ratios of a watched pass to one that nobody watches."""
    ratios = []
    until = time.monotonic() + budget
    while time.monotonic() < until or len(ratios) < 5:
        plain = seconds(lambda: module(ids))
        with transept.watch(module, *names):
            ratios.append(seconds(lambda: module(ids)) / plain)
    return statistics.median(ratios) - 1


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
    parser.add_argument("--seconds", type=float, default=90.0, help="for each number of tokens")
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
            median, low, high, ratios = layered(module, ids, args.seconds)
            others = {name: watching(module, ids, names, args.seconds / 30) for name, names in watched.items()}
        kept = kept and share <= BAR and high <= BAR
        told = {"unwatched %": median, "from %": low, "to %": high, "counted %": share, **{f"{name} %": v for name, v in others.items()}}
        print(json.dumps({"model": args.model, "tokens": tokens, "threads": args.threads, "ratios": ratios,
                          **{name: round(100 * value, 3) for name, value in told.items()}}), flush=True)  # fmt: skip
    print(f"a pass that nobody watches costs {'at most' if kept else 'perhaps more than'} {100 * BAR:.0f} % more than one without taps")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
