"""Deterministic mode: a request's bits are its own, whatever else runs (N-1 of the plan), and the inverse: with the mode off they are
not.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.contracts.decoders import Case, draw_ids, model, spec
from tests.counts import FULL, count
from tests.engine.cases import case_of, draw_ask
from tests.figures import record
from transept.inference.engine import Ask, Engine, Limits, TorchRunner
from transept.inference.generation import Generation

MODELS = [("llama", "gqa"), ("deepseek_v3", "moe"), ("gpt_neo", "alternating"), ("gpt", "gpt2"), ("llama", "window")]
PAGES = 40
NEW = 32


class Batches:
    """Engines of random limits on one runner, whose pages stay warm or are forgotten; and the same requests alone."""

    def __init__(self, case: Case, deterministic: bool):
        self.case, self.context = case, spec(case).context
        self.deterministic = deterministic
        self.runner = TorchRunner(model(case), pages=PAGES, page=8, context=self.context, deterministic=deterministic)
        self.counts = {"preempted": 0, "warm": 0, "chunked": 0}
        self.warm: Engine | None = None

    def engine(self, rng: random.Random) -> Engine:
        if self.warm is not None and rng.random() < 0.5:
            self.counts["warm"] += 1
            return self.warm
        rows = rng.randint(2, 6)
        pages = rng.randint(spec(self.case).context // 8, PAGES)
        limits = Limits(pages=pages, page=8, rows=rows, budget=rows + rng.choice([0, 3, 20, 200]))
        self.warm = Engine(
            self.runner, context=self.context, limits=limits, drafter=None if rng.random() < 0.5 else Engine(self.runner).drafter
        )
        return self.warm

    def alone(self, ask: Ask) -> Generation:
        runner = TorchRunner(model(self.case), pages=PAGES, page=8, context=self.context, deterministic=False)
        runner.sizes = self.runner.sizes
        limits = Limits(pages=PAGES, page=8, rows=1, budget=4096)
        return Engine(runner, context=self.context, limits=limits, drafter=None).run([ask])[0][0]

    def differing(self, seed: int) -> tuple[int, int]:
        """(tokens, tokens that differ in id or in a bit of their log-probability) of one random batch."""
        rng = random.Random(seed)
        engine = self.engine(rng)
        shared = draw_ids(7, (self.context,), spec(self.case).vocab).tolist()
        asks = [draw_ask(rng.randrange(10**6), self.case, min(NEW, self.context // 2), shared) for _ in range(rng.randint(2, 4))]
        self.counts["chunked"] += any(len(ask.prompt) > engine.limits.budget for ask in asks)
        before = engine.scheduler.preempted
        together = engine.run(asks)
        self.counts["preempted"] += engine.scheduler.preempted - before
        bad = total = 0
        for ask, (found,) in zip(asks, together, strict=True):
            expected = self.alone(ask)
            assert isinstance(found, Generation) and len(found.ids) == len(expected.ids) == ask.max_tokens
            total += len(expected.ids)
            bad += sum(
                a != b
                for a, b in zip(zip(found.ids, found.logprobs, strict=True), zip(expected.ids, expected.logprobs, strict=True), strict=True)
            )
        return total, bad


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_bits_do_not_depend_on_the_batch() -> None:
    """Greedy and by seed, warm and cold prefixes, chunks and whole prompts, guesses, preemption: no bit differs from the request alone."""
    began = time.perf_counter()
    # A batch takes seconds in torch: the short form tries each model twice.
    full, tokens, bad = count(200) // (1 if FULL else 2), 0, 0
    counts = {"preempted": 0, "warm": 0, "chunked": 0}
    for i, name in enumerate(MODELS):
        batches = Batches(case_of(*name), deterministic=True)
        for seed in range(i, full, len(MODELS)):
            total, off = batches.differing(seed)
            tokens, bad = tokens + total, bad + off
        counts = {what: n + batches.counts[what] for what, n in counts.items()}
    assert all(counts.values()), f"the batches did not try everything: {counts}"
    record("N-1 batches", n_tried=tokens, n_ok=tokens - bad, n_bad=bad, seconds=time.perf_counter() - began, seed=0)
    assert bad == 0, f"{bad} of {tokens} tokens differ"


def test_with_the_mode_off_bits_do_depend_on_it() -> None:
    """The inverse: without it the same comparison finds differences, so the test above can fail."""
    batches = Batches(case_of("llama", "gqa"), deterministic=False)
    assert sum(batches.differing(seed)[1] for seed in range(3)) > 0
