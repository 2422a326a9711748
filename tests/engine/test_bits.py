"""Deterministic mode: a request's bits are its own, whatever else runs (N-1 of the plan), and the inverse: with the mode off they are
not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import transept
from tests.contracts.decoders import Case, draw_ids, initialised, model, spec
from tests.counts import FULL, count
from tests.engine.cases import case_of, draw_ask
from tests.figures import record
from tests.plan.test_lower import wide
from transept import native
from transept.adapters.quantize import quantize
from transept.checkpoints.load import describe
from transept.door import Model
from transept.inference.engine import Ask, Engine, Limits, Lookup, Runner, TorchRunner
from transept.inference.generation import Generation
from transept.inference.plan import ModuleWeights, NativeRunner, StoredWeights

MODELS = [("llama", "gqa"), ("deepseek_v3", "moe"), ("gpt_neo", "alternating"), ("gpt", "gpt2"), ("llama", "window")]
PAGES = 40
NEW = 32


class Batches:
    """Engines of random limits on one runner, whose pages stay warm or are forgotten; and the same requests alone, on cold pages."""

    def __init__(self, case: Case, runner: Runner, alone: Runner, page: int):
        self.case, self.context, self.page = case, spec(case).context, page
        self.runner, self.lone = runner, alone
        self.counts = {"preempted": 0, "warm": 0, "chunked": 0, "guessed": 0}
        self.warm: Engine | None = None

    def engine(self, rng: random.Random) -> Engine:
        if self.warm is not None and rng.random() < 0.5:
            self.counts["warm"] += 1
            return self.warm
        rows = rng.randint(2, 6)
        pages = rng.randint(-(-self.context // self.page), PAGES)
        limits = Limits(pages=pages, page=self.page, rows=rows, budget=rows + rng.choice([0, 3, 20, 200]))
        self.warm = Engine(self.runner, context=self.context, limits=limits, drafter=None if rng.random() < 0.5 else Lookup)
        return self.warm

    def alone(self, ask: Ask) -> Generation:
        limits = Limits(pages=PAGES, page=self.page, rows=1, budget=4096)
        return Engine(self.lone, context=self.context, limits=limits, drafter=None).run([ask])[0][0]

    def differing(self, seed: int) -> tuple[int, int]:
        """(tokens, tokens that differ in id or in a bit of their log-probability) of one random batch."""
        rng = random.Random(seed)
        engine = self.engine(rng)
        shared = draw_ids(7, (self.context,), spec(self.case).vocab).tolist()
        asks = [draw_ask(rng.randrange(10**6), self.case, min(NEW, self.context // 2), shared) for _ in range(rng.randint(2, 4))]
        self.counts["chunked"] += any(len(ask.prompt) > engine.limits.budget for ask in asks)
        before, guessed = engine.scheduler.preempted, engine.counts["guessed_tokens"]
        together = engine.run(asks)
        self.counts["preempted"] += engine.scheduler.preempted - before
        self.counts["guessed"] += engine.counts["guessed_tokens"] - guessed
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


def in_torch(name: tuple[str, str], deterministic: bool = True) -> Batches:
    case = case_of(*name)
    runner = TorchRunner(model(case), pages=PAGES, page=8, context=spec(case).context, deterministic=deterministic)
    lone = TorchRunner(model(case), pages=PAGES, page=8, context=spec(case).context, deterministic=False)
    lone.sizes = runner.sizes
    return Batches(case, runner, lone, 8)


def in_the_core(name: tuple[str, str], folder: Path | None = None) -> Batches:
    """In floats; with a folder from 4-bit weights stored there, activations in 8 bits, keys and values in 16. Contexts are so long that
    attention is split over several chunks of keys.
    """
    page = case_of(*name)[0]
    shape = wide(page.tiny[name[1]]).replace(context=200)
    if folder is not None:
        shape = shape.replace(ffn=64)
    module = initialised(page.build(shape)).eval()
    case = (replace(page, tiny={name[1]: shape}), name[1])

    if folder is not None:
        transept.save(Model(module, page, None, shape), folder, coded=quantize(module, "int4"))

    def runner() -> NativeRunner:
        if folder is None:
            return NativeRunner(module, ModuleWeights(module), pages=PAGES + 1, threads=1, max_rows=64)
        source = describe(folder)
        return NativeRunner(source.empty(), StoredWeights(source), pages=PAGES + 1, threads=1, max_rows=64, fast=True)

    return Batches(case, runner(), runner(), 16)


def no_bit_differs(what: str, made: list[Callable[[], Batches]], full: int) -> None:
    """Tries so many batches, takes turns between the models, and records the figures."""
    began, tokens, bad = time.perf_counter(), 0, 0
    counts = {"preempted": 0, "warm": 0, "chunked": 0, "guessed": 0}
    for i, make in enumerate(made):
        batches = make()
        for seed in range(i, full, len(made)):
            total, off = batches.differing(seed)
            tokens, bad = tokens + total, bad + off
        counts = {what: n + batches.counts[what] for what, n in counts.items()}
    assert full < 20 or all(counts.values()), f"the batches did not try everything: {counts}"
    record(what, n_tried=tokens, n_ok=tokens - bad, n_bad=bad, seconds=time.perf_counter() - began, seed=0)
    assert bad == 0, f"{bad} of {tokens} tokens differ"


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS, ids="-".join)
def test_bits_do_not_depend_on_the_batch(name: tuple[str, str]) -> None:
    """Greedy and by seed, warm and cold prefixes, chunks and whole prompts, guesses, preemption: no bit differs from the request alone."""
    # A batch takes seconds in torch: the short form tries two of each model.
    no_bit_differs(f"N-1 batches {'-'.join(name)}", [lambda: in_torch(name)], count(200) // len(MODELS) // (1 if FULL else 2))


@pytest.mark.reliability
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not native.available(), reason=f"the native core is not compiled here: {native.why_not()}")
def test_bits_in_the_native_core_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """The same for the native core, in floats and with stored 4-bit weights."""
    made = [*(lambda name=name: in_the_core(name) for name in MODELS), lambda: in_the_core(("llama", "gqa"), tmp_path)]
    no_bit_differs("N-1 batches in the native core", made, count(200) + 4)


def test_with_the_mode_off_bits_do_depend_on_it() -> None:
    """The inverse: without it the same comparison finds differences, so the test above can fail."""
    batches = in_torch(("llama", "gqa"), deterministic=False)
    assert sum(batches.differing(seed)[1] for seed in range(3)) > 0
