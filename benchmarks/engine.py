"""The engine beside static batching, a shared prefix, and guessing beside plain decoding; ratios of one run.

    python benchmarks/engine.py [batching|prefix|speculation ...] [--model NAME] [--rounds 3] [--threads 2] [--exact] [--torch]

batching: 64 requests of mixed length. Static batching takes them in groups of 16 in the order in which they came; a group is padded to its
longest prompt and runs until its longest answer is done, as a plain loop over batches does. Both use the same runner and greedy decoding.
prefix: the time to the first token of a request, and of a second one that shares its first 1,000 tokens. speculation: decoding with
guesses looked up in the text itself, or made by a draft model (--draft FILE), beside decoding without; the tokens must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transept.door import Model, load
from transept.inference.engine import Ask, Draft, Drafter, Engine, Event, Limits, Lookup
from transept.inference.generation import Generation
from transept.inference.rows import Row
from transept.inference.sampling import Sampling

ROWS, PAGES = 16, 512
PASSAGE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However little "
    "known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the minds of "
    "the surrounding families, that he is considered as the rightful property of some one or other of their daughters."
)
CODE = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def add(self, other):\n"


def requests(count: int, vocab: int) -> list[Ask]:
    """Prompts of 8 to 128 tokens; answers of 8 to 128, most of them short, as people ask."""
    rng = random.Random(0)
    return [
        Ask(prompt=[rng.randrange(3, vocab) for _ in range(rng.randint(8, 128))], max_tokens=min(128, 8 + int(rng.expovariate(1 / 28))))
        for _ in range(count)
    ]


def static(runner: Any, asks: list[Ask]) -> float:
    """Seconds of static batching."""
    began = time.perf_counter()
    for at in range(0, len(asks), ROWS):
        group = asks[at : at + ROWS]
        width, longest = max(len(ask.prompt) for ask in group), max(ask.max_tokens for ask in group)
        each = -(-(width + longest) // 16)
        tables = [tuple(range(1 + i * each, 1 + (i + 1) * each)) for i in range(len(group))]
        tokens = [(0,) * (width - len(ask.prompt)) + tuple(ask.prompt) for ask in group]
        start = 0
        for step in range(longest):
            logits = np.asarray(runner.step([Row(row, start, table, 1) for row, table in zip(tokens, tables, strict=True)]))
            start, tokens = width + step, [(int(token),) for token in logits.argmax(-1)]
    return time.perf_counter() - began


def engine_of(runner: Any, context: int, drafter: Callable[[], Drafter] | None = None) -> Engine:
    """An engine with cold pages."""
    return Engine(runner, context=context, limits=Limits(pages=PAGES, page=16, rows=ROWS, budget=128), drafter=drafter)


def batching(m: Model, runner: Any, rounds: int) -> dict[str, Any]:
    """Tokens a second of both; the rounds take turns, so that a busy moment of the machine hits both."""
    asks = requests(64, m.spec.vocab)  # type: ignore[attr-defined]
    seconds: dict[str, list[float]] = {"static": [], "engine": []}
    for _ in range(rounds):
        seconds["static"].append(static(runner, asks))
        began = time.perf_counter()
        found = engine_of(runner, m.context or 2048).run(asks)
        seconds["engine"].append(time.perf_counter() - began)
        assert all(isinstance(g, Generation) and len(g.ids) == ask.max_tokens for (g,), ask in zip(found, asks, strict=True))
    tokens = sum(ask.max_tokens for ask in asks)
    ratios = [a / b for a, b in zip(seconds["static"], seconds["engine"], strict=True)]
    rates = {name: round(tokens / statistics.median(values), 1) for name, values in seconds.items()}
    return {"requests": len(asks), "tokens": tokens, "tokens_per_second": rates, "engine to static": spread(ratios)}


def prefix(m: Model, runner: Any, rounds: int) -> dict[str, Any]:
    """The second request's time to the first token, beside the first's."""
    times: list[tuple[float, float]] = []
    engine = engine_of(runner, m.context or 2048)
    for turn in range(rounds):
        rng = random.Random(turn)
        shared = [rng.randrange(3, m.spec.vocab) for _ in range(1000)]  # type: ignore[attr-defined]
        first, second = (first_token(engine, [*shared, *own]) for own in ((5, 6, 7), (8, 9, 10)))
        times.append((first, second))
    return {
        "first ms": round(1000 * statistics.median(a for a, _ in times), 1),
        "second ms": round(1000 * statistics.median(b for _, b in times), 1),
        "second to first": spread([b / a for a, b in times]),
    }


def first_token(engine: Engine, prompt: list[int]) -> float:
    """Seconds until the first token of a request that comes alone."""
    times: list[float] = []

    def sink(event: Event) -> None:
        times.append(time.perf_counter())

    began = time.perf_counter()
    engine.add(Ask(prompt=prompt, max_tokens=2), sink)
    while engine.busy:
        engine.step()
    return times[0] - began


def texts(m: Model) -> dict[str, Ask]:
    """What is decoded: a passage to be copied, code, an open question, and prose drawn at random, where nothing repeats."""
    made = {
        "a passage that the prompt asks to copy": (m.chat_ids(f"Repeat this text word for word:\n\n{PASSAGE}"), 110, Sampling()),
        "code, greedy": (m.encode(CODE), 128, Sampling()),
        "an open question, greedy": (m.chat_ids("Why is the sky blue?"), 128, Sampling()),
        "prose drawn at temperature 1": (m.encode(PASSAGE), 192, Sampling(temperature=1.0, seed=1)),
    }
    return {name: Ask(prompt=ids, max_tokens=n, sampling=sampling, ends=m.ends) for name, (ids, n, sampling) in made.items()}


def speculation(m: Model, runner: Any, rounds: int, draft: Model | None) -> dict[str, Any]:
    """Tokens a second with guesses over those without, for each text."""
    context = m.context or 2048
    ways: dict[str, Callable[[], Drafter] | None] = {"plain": None, "lookup": Lookup}
    lowered = None if draft is None else draft.lowered()
    if lowered is not None:
        ways["draft"] = lambda: Draft(lowered, 1024)
    report: dict[str, Any] = {}
    for name, ask in texts(m).items():
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        ids: list[list[int]] = []
        counts = {}
        for turn in range(rounds):
            # There and back, so that no way always runs behind the same other.
            for way, drafter in list(ways.items())[:: 1 if turn % 2 else -1]:
                engine = engine_of(runner, context, drafter)
                (found,) = engine.run([ask])[0]
                assert isinstance(found, Generation)
                seconds[way].append(found.usage.decode_seconds)
                ids.append(found.ids)
                counts[way] = [engine.counts["guessed_tokens"], engine.counts["confirmed_tokens"]]
        assert all(other == ids[0] for other in ids), "guessing changed the text"
        rate = (len(ids[0]) - 1) / statistics.median(seconds["plain"])
        report[name] = {"tokens": len(ids[0]), "plain tokens/s": round(rate, 1)}
        for way in list(ways)[1:]:
            ratios = [a / b for a, b in zip(seconds["plain"], seconds[way], strict=True)]
            report[name][way] = {"to plain": spread(ratios), "guessed, confirmed": counts[way]}
    return report


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("what", nargs="*", default=["batching", "prefix", "speculation"], choices=["batching", "prefix", "speculation", []])
    parse.add_argument("--model", default="smollm2-135m-instruct")
    parse.add_argument("--draft")
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--threads", type=int, default=2)
    parse.add_argument("--exact", action="store_true", help="activations in float32")
    parse.add_argument("--torch", action="store_true", help="the torch executor instead of the native core")
    chosen = parse.parse_args()
    os.environ["TRANSEPT_THREADS"] = str(chosen.threads)
    m = load(chosen.model, fast=not chosen.exact)
    runner: Any = m.look() if chosen.torch else m.runner(PAGES)
    if chosen.torch:
        from transept.inference.engine import TorchRunner

        runner = TorchRunner(runner, pages=PAGES, context=m.context)
    report: dict[str, Any] = {"model": chosen.model, "threads": chosen.threads, "runner": type(runner).__name__, "exact": chosen.exact}
    for what in chosen.what:
        if what == "speculation":
            report[what] = speculation(m, runner, chosen.rounds, load(chosen.draft, fast=True) if chosen.draft else None)
        else:
            report[what] = {"batching": batching, "prefix": prefix}[what](m, runner, chosen.rounds)
        print(f"{what}: {json.dumps(report[what], indent=1)}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
