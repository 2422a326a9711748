"""The engine beside static batching on requests of mixed length, and what a shared prefix saves; ratios of one run.

    python benchmarks/engine.py MODEL [--requests 64] [--rounds 3] [--threads 2]

Static batching: the requests in groups of `rows` in the order in which they came; a group is padded to its longest prompt and runs until
its longest answer is done, as a plain loop over batches does. Both use the same network and greedy decoding, and both give the same
number of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import torch

import transept
from transept.inference.engine import Ask, Engine, Event, Limits

ROWS = 16


def requests(count: int, vocab: int) -> list[Ask]:
    """Prompts of 8 to 128 tokens; answers of 8 to 128, most of them short, as people ask."""
    rng = random.Random(0)
    return [
        Ask(prompt=[rng.randrange(3, vocab) for _ in range(rng.randint(8, 128))], max_tokens=min(128, 8 + int(rng.expovariate(1 / 28))))
        for _ in range(count)
    ]


@torch.inference_mode()
def static(network: torch.nn.Module, asks: list[Ask]) -> float:
    """Seconds of static batching."""
    began = time.perf_counter()
    for at in range(0, len(asks), ROWS):
        group = asks[at : at + ROWS]
        width = max(len(ask.prompt) for ask in group)
        ids = torch.tensor([[0] * (width - len(ask.prompt)) + list(ask.prompt) for ask in group])
        mask = torch.tensor([[False] * (width - len(ask.prompt)) + [True] * len(ask.prompt) for ask in group])
        longest = max(ask.max_tokens for ask in group)
        cache = network.cache(len(group), width + longest)
        logits = network.head(network.hidden(ids, mask=mask, cache=cache)[:, -1])
        for _ in range(longest - 1):
            logits = network.head(network.hidden(logits.argmax(-1)[:, None], cache=cache)[:, -1])
    return time.perf_counter() - began


def engine_of(network: torch.nn.Module, context: int, deterministic: bool) -> Engine:
    limits = Limits(pages=512, page=16, rows=ROWS, budget=128)
    return Engine(network, context=context, limits=limits, deterministic=deterministic, drafter=None)


def continuous(engine: Engine, asks: list[Ask]) -> float:
    """Seconds of the engine."""
    began = time.perf_counter()
    found = engine.run(asks)
    seconds = time.perf_counter() - began
    assert [len(g.ids) for (g,) in found] == [ask.max_tokens for ask in asks]
    return seconds


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


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("model")
    parse.add_argument("--requests", type=int, default=64)
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--threads", type=int, default=2)
    chosen = parse.parse_args()
    torch.set_num_threads(chosen.threads)
    m = transept.load(chosen.model, dtype=torch.float32)
    context = m.context or 2048
    asks = requests(chosen.requests, m.spec.vocab)
    tokens = sum(ask.max_tokens for ask in asks)
    seconds: dict[str, list[float]] = {"static": [], "engine": [], "engine, deterministic": []}
    shared: list[float] = []
    for turn in range(chosen.rounds):
        # Interleaved, so that a busy moment of the machine hits all alike; a fresh engine has a cold prefix cache.
        seconds["static"].append(static(m.model, asks))
        seconds["engine"].append(continuous(engine_of(m.model, context, False), asks))
        seconds["engine, deterministic"].append(continuous(engine := engine_of(m.model, context, True), asks))
        rng = random.Random(turn)
        prefix = [rng.randrange(3, m.spec.vocab) for _ in range(1000)]
        first = first_token(engine, [*prefix, 5, 6, 7])
        shared.append(first_token(engine, [*prefix, 8, 9, 10]) / first)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "requests": len(asks),
        "tokens": tokens,
        "threads": chosen.threads,
        "tokens_per_second": {name: round(tokens / value, 1) for name, value in middle.items()},
        "engine_to_static": round(middle["static"] / middle["engine"], 2),
        "deterministic_to_static": round(middle["static"] / middle["engine, deterministic"], 2),
        "second_first_token_to_first": round(statistics.median(shared), 4),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
