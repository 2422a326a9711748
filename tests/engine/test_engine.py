"""The engine against the plain loop: the same text for every decoder; guesses lose nothing; a fault stays with its request; pages come
back.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.contracts.decoders import Case, draw_ids, model, spec
from tests.counts import count
from tests.engine.cases import Letters, case_of, draw_ask, paged
from tests.figures import record
from transept import native
from transept.core.errors import InputError, NumericsError, TranseptError
from transept.inference import generation
from transept.inference.engine import Ask, Draft, Engine, Event, Limits, Lookup, RequestError, Row, TorchRunner
from transept.inference.engine.speculate import Clock, Pace
from transept.inference.generation import Generation
from transept.inference.plan import ModuleWeights, NativeModel
from transept.inference.sampling import Sampling

CASE = ("llama", "gqa")
SMALL = Limits(pages=24, page=8, rows=4, budget=16)


def plain(m: torch.nn.Module, ask: Ask, context: int) -> Generation:
    """What the plain loop writes."""
    steps = generation.steps(m, ask.prompt, ask.sampling, max_tokens=ask.max_tokens, context=context)
    return generation.last(generation.stream(steps, Letters(), prompt_tokens=len(ask.prompt), ends=ask.ends, stop=ask.stop))


def same(found: object, expected: Generation) -> None:
    assert isinstance(found, Generation), found
    assert (found.ids, found.text, found.finish_reason) == (expected.ids, expected.text, expected.finish_reason)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=2e-5)


def all_free(engine: Engine) -> bool:
    return engine.scheduler.pages.available == engine.limits.pages and not engine.scheduler.tasks


@pytest.mark.parametrize("case", paged(), ids=lambda case: f"{case[0].name}-{case[1]}")
def test_text_is_that_of_the_plain_loop(case: Case) -> None:
    """Requests of all lengths at once, greedy and by seed, with end tokens and stop strings, in fixed tiles and without."""
    m, context = model(case), spec(case).context
    asks = [draw_ask(i, case, 10, ends=(3, 5), stop=("ab", "q")) for i in range(4)]
    for deterministic in (True, False):
        engine = Engine(m, context=context, limits=SMALL, deterministic=deterministic, tokenizer=Letters)
        for ask, (found,) in zip(asks, engine.run(asks), strict=True):
            same(found, plain(m, ask, context))
        assert all_free(engine)


def test_stop_strings_and_ends_are_met() -> None:
    """Else the test above would compare lengths only."""
    case = case_of(*CASE)
    asks = [draw_ask(i, case, 32, ends=(3, 5), stop=("ab", "q")) for i in range(12)]
    found = [g for (g,) in Engine(model(case), context=spec(case).context, limits=SMALL, tokenizer=Letters).run(asks)]
    reasons = [(g.finish_reason, bool(g.ids and g.ids[-1] in (3, 5))) for g in found if isinstance(g, Generation)]
    assert {("stop", True), ("stop", False)} <= set(reasons)


def test_pieces_join_to_the_text() -> None:
    case, events = case_of(*CASE), []
    engine = Engine(model(case), context=64, limits=SMALL, tokenizer=Letters)
    engine.add(draw_ask(2, case, 24, stop=("zz",)), events.append)
    while engine.busy:
        engine.step()
    final = events[-1].final
    assert final is not None and not any(e.over for e in events[:-1])
    assert "".join(e.text for e in events) == final.text
    assert [i for e in events for i in e.ids] == final.ids
    assert [p for e in events for p in e.logprobs] == final.logprobs


class Oracle:
    """Knows what comes, and is wrong now and then."""

    def __init__(self, answer: Sequence[int], seed: int):
        self.answer, self.random, self.length = list(answer), random.Random(seed), 0

    def push(self, tokens: Sequence[int]) -> None:
        self.length += len(tokens)

    def propose(self, costs: Sequence[float], step: float) -> tuple[int, ...]:
        guess = self.answer[self.length : self.length + self.random.randint(0, 6)]
        return tuple(token if self.random.random() < 0.8 else (token + 1) % 5 for token in guess)

    def judged(self, proposed: int, accepted: int) -> None:
        pass


@pytest.mark.parametrize("name", [CASE, ("deepseek_v3", "moe"), ("llama", "window")])
def test_guessing_changes_no_bit(name: tuple[str, str]) -> None:
    """Right, half right and wrong guesses, greedy and drawn: the same tokens and bits as without; and many of them are confirmed."""
    case, confirmed = case_of(*name), 0
    m, context = model(case), spec(case).context
    runner = TorchRunner(m, pages=40, page=8, context=context)
    for seed in range(4):
        ask = draw_ask(seed, case, 24, ends=(1,))
        (expected,) = Engine(runner, context=context, limits=SMALL, drafter=None).run([ask])[0]
        assert isinstance(expected, Generation)
        engine = Engine(runner, context=context, limits=SMALL, drafter=lambda a=[*ask.prompt, *expected.ids], s=seed: Oracle(a, s))
        (found,) = engine.run([ask])[0]
        assert isinstance(found, Generation)
        assert (found.ids, found.logprobs) == (expected.ids, expected.logprobs)
        confirmed += engine.counts["confirmed_tokens"]
    assert confirmed > 20


def test_lookup_guesses_what_repeats_and_gives_up_on_noise() -> None:
    """A cheap guess is long, a dear one short; what keeps failing pauses, each time for longer, and one good guess ends that."""
    lookup = Lookup()
    lookup.push([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert lookup.propose([0.02 * n for n in range(9)], 0.0) == (4, 5, 6, 1, 2, 3)
    dear = [0.3 * n for n in range(9)]
    assert lookup.propose(dear, 0.0) == (4, 5) and lookup.propose([0.5 * n for n in range(9)], 0.0) == (4,)
    assert lookup.propose([0.0, 0.4, 0.4, 0.4, 3.0], 0.0) == (4, 5, 6), "three cost no more than one, a fourth would"
    failed, tokens, spans = 0, len(lookup.tokens), []
    for _ in range(3):
        while guess := lookup.propose(dear, 0.0):
            lookup.judged(len(guess), 0)
            failed += 1
        waited = 0
        while not lookup.propose(dear, 0.0):
            lookup.push([1, 2, 3])
            waited += 3
        spans.append(waited)
    assert failed <= 6 and Pace.PAUSE <= spans[0] < spans[1] < spans[2] and len(lookup.tokens) == tokens + sum(spans)
    for _ in range(8):
        lookup.judged(1, 1)
    assert len(lookup.propose([0.1 * n for n in range(9)], 0.0)) > 2


def test_the_clock_finds_what_rows_cost() -> None:
    """By the steps it saw, which need not lie on a line; between and beyond them by a line; by a belief before it saw any."""
    clock = Clock()
    assert clock.costs(1, 2) == [0.0, Clock.COST, 2 * Clock.COST]
    clock.seen(1, 0.008)
    assert clock.costs(1, 2) == pytest.approx([0.0, Clock.COST, 2 * Clock.COST])
    for _ in range(20):
        for rows, seconds in ((1, 0.006), (4, 0.0075), (9, 0.018)):
            clock.seen(rows, seconds)
    costs = clock.costs(1, 8)
    assert costs[0] == 0.0 and costs[3] < 0.3 and costs[8] == pytest.approx(2.0, rel=0.1) and costs[3] < costs[5] < costs[8]
    assert clock.costs(4, 5)[5] == pytest.approx(4 * (0.018 / 0.0075 - 1), rel=0.1)


@pytest.mark.skipif(not native.available(), reason=f"the native core is not compiled here: {native.why_not()}")
def test_a_draft_model_guesses_and_changes_no_bit() -> None:
    """The model as its own draft is right throughout, one with other weights hardly ever; neither changes a bit, and the pages come back.
    """
    case = case_of(*CASE)
    m, context = model(case), spec(case).context
    runner = TorchRunner(m, pages=40, page=8, context=context)
    wrong = copy.deepcopy(m)
    with torch.no_grad():
        wrong.stack.layers[0].mlp.down.weight.mul_(-3)
    for module, least in ((m, 20), (wrong, 0)):
        lowered = NativeModel(module, ModuleWeights(module), context=context, threads=1)
        confirmed = 0
        for seed in (1, 3):
            ask = draw_ask(seed, case, 24)
            (expected,) = Engine(runner, context=context, limits=SMALL, drafter=None).run([ask])[0]
            engine = Engine(runner, context=context, limits=SMALL, drafter=lambda lowered=lowered: Draft(lowered, context))
            (found,) = engine.run([ask])[0]
            assert isinstance(found, Generation) and isinstance(expected, Generation)
            assert (found.ids, found.logprobs) == (expected.ids, expected.logprobs)
            assert engine.counts["guessed_tokens"] > 0
            confirmed += engine.counts["confirmed_tokens"]
            del engine
        assert confirmed >= least
        assert lowered.local.reserve(context), "the draft's pages came back"


def test_more_than_one_continuation() -> None:
    """n of them share the prompt's pages; the first is what n=1 gives, each is what its own seed gives."""
    case = case_of(*CASE)
    m, events = model(case), []
    ask = Ask(prompt=draw_ids(0, (40,), 96).tolist(), max_tokens=12, n=3, sampling=Sampling(temperature=1.0, seed=5))
    engine = Engine(m, context=64, limits=SMALL, tokenizer=Letters)
    engine.add(ask, events.append)
    while engine.busy:
        engine.step()
    finals = {e.index: e.final for e in events if e.final is not None}
    for i in range(3):
        same(finals[i], plain(m, Ask(prompt=ask.prompt, max_tokens=12, sampling=Sampling(temperature=1.0, seed=5 + i)), 64))
    # 40 tokens of prompt once and 11 new columns each; the others compute no more of it than what fills no page.
    assert engine.counts["computed_tokens"] <= 40 + 3 * 11 + 2 * 8 + engine.counts["guessed_tokens"]


def test_alternatives_are_the_most_probable() -> None:
    case, events = case_of(*CASE), []
    m = model(case)
    ask = Ask(prompt=[1, 2, 3], max_tokens=6, top=4)
    engine = Engine(m, context=64, limits=SMALL)
    engine.add(ask, events.append)
    while engine.busy:
        engine.step()
    tops, ids = [t for e in events for t in e.top], [i for e in events for i in e.ids]
    with torch.no_grad():
        logp = m(torch.tensor([[1, 2, 3, *ids]])).logits[0, 2:-1].log_softmax(-1)
    for top, row in zip(tops, logp, strict=True):
        best = row.topk(4)
        assert [id for id, _ in top] == best.indices.tolist()
        assert [p for _, p in top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_prefix_cache_saves_the_prompt() -> None:
    case = case_of(*CASE)
    engine = Engine(model(case), context=64, limits=SMALL, drafter=None)
    ask = Ask(prompt=draw_ids(0, (48,), 96).tolist(), max_tokens=2)
    first = engine.run([ask])[0][0]
    before = engine.counts["computed_tokens"]
    again = engine.run([ask])[0][0]
    assert engine.counts["computed_tokens"] - before == 2
    assert isinstance(first, Generation) and isinstance(again, Generation) and again.logprobs == first.logprobs
    other = engine.counts["computed_tokens"]
    engine.run([Ask(prompt=ask.prompt, max_tokens=2, tenant="somebody else")])
    assert engine.counts["computed_tokens"] - other == 49


class Broken:
    """A runner that fails, or answers NaN, wherever a row has the token 95."""

    def __init__(self, runner: TorchRunner, how: str):
        self.runner, self.how, self.steps = runner, how, 0

    def prepare(self, copies: Sequence[tuple[int, int]], fresh: Sequence[int]) -> None:
        self.runner.prepare(copies, fresh)

    def step(self, rows: Sequence[Row]) -> Tensor:
        self.steps += 1
        hit = [95 in row.tokens for row in rows]
        if any(hit) and self.how != "nan":
            raise MemoryError("planted") if self.how == "memory" else RuntimeError("planted")
        logits = self.runner.step(rows)
        owners = [flag for row, flag in zip(rows, hit, strict=True) for _ in range(row.logits)]
        if self.how == "nan" and any(owners):
            logits = logits.clone()
            logits[owners] = float("nan")
        return logits


def planted(how: str) -> tuple[Ask, type[TranseptError]]:
    """A request that goes wrong in this way."""

    def raises(tokens: Sequence[int], logits: Tensor) -> Tensor:
        raise ZeroDivisionError("planted")

    class Bad:
        done = False

        def mask(self, vocab: int) -> Tensor:
            raise InputError("the grammar failed: planted")

        def advance(self, token: int) -> None:
            pass

    prompt = [4, 5, 95 if how in ("nan", "raise", "memory") else 6, 7]
    rest = {"processor": {"processors": (raises,)}, "grammar": {"grammar": Bad}}.get(how, {})
    kind = {"nan": NumericsError, "grammar": InputError}.get(how, RequestError)
    return Ask(prompt=prompt, max_tokens=8, **rest), kind


@pytest.mark.parametrize("how", ["nan", "raise", "memory", "processor", "grammar", "sink"])
def test_a_fault_stays_with_its_request(how: str) -> None:
    """One of six requests goes wrong: it ends with a typed error, the others with the bits that they have without it, and all pages come
    back.
    """
    case = case_of(*CASE)
    runner = TorchRunner(model(case), pages=SMALL.pages, page=8, context=64)
    others = [
        Ask(prompt=[i % 94 for i in range(s, s + 9 + s)], max_tokens=10, sampling=Sampling(temperature=0.9, seed=s)) for s in range(5)
    ]
    expected = Engine(runner, context=64, limits=SMALL, drafter=None).run(others)
    bad, kind = planted(how)
    engine = Engine(Broken(runner, how), context=64, limits=SMALL, drafter=None)
    events: list[Event] = []

    def sink(event: Event) -> None:
        events.append(event)
        if how == "sink":
            raise OSError("planted: the reader is gone")

    results: dict[int, Generation | None] = {}
    for i, ask in enumerate(others):
        if i == 2:
            engine.add(bad, sink)
        engine.add(ask, lambda event, i=i: results.update({i: event.final}) if event.over else None)
    while engine.busy:
        engine.step()
    assert isinstance(events[-1].error, kind)
    assert [(g.ids, g.logprobs) for g in (results[i] for i in range(5)) if g] == [
        (g.ids, g.logprobs) for (g,) in expected if isinstance(g, Generation)
    ]
    assert all_free(engine) and engine.counts["failed_requests"] == 1


def test_what_a_nan_left_behind_reaches_nobody() -> None:
    """A request whose columns are NaN fails; whoever gets its pages next is not touched."""
    case = case_of(*CASE)
    limits = Limits(pages=8, page=8, rows=1, budget=64)
    runner = TorchRunner(model(case), pages=8, page=8, context=64)
    ask = Ask(prompt=[1, 2, 3, 4], max_tokens=8)
    expected = Engine(runner, context=64, limits=limits).run([ask])[0][0]
    for slots in runner.slots:
        for slot in slots.values():
            slot.k[1:], slot.v[1:] = float("nan"), float("nan")
    found = Engine(runner, context=64, limits=limits).run([ask])[0][0]
    assert isinstance(found, Generation) and isinstance(expected, Generation) and found.logprobs == expected.logprobs


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_cancelled_requests_give_their_pages_back_at_once() -> None:
    """At random moments: waiting, within the prompt, between tokens, one of several continuations, twice, after the end."""
    case, total, done, began = case_of(*CASE), count(1000), 0, time.perf_counter()
    runner = TorchRunner(model(case), pages=SMALL.pages, page=8, context=64)
    rng, phases = random.Random(0), set()
    engine = Engine(runner, context=64, limits=SMALL)
    while done < total:
        handles = [engine.add(draw_ask(rng.randrange(10**6), case, 16, n=rng.choice([1, 1, 3]))) for _ in range(5)]
        rng.shuffle(handles)
        for handle in handles:
            for _ in range(rng.choice([0, 1, 2, 3, 4, 20])):
                engine.step()
            tasks = [engine.scheduler.tasks.get(id) for id in handle.ids]
            phases |= {"over" if t is None else "waiting" if not t.running else "prompt" if t.lacking > 1 else "decoding" for t in tasks}
            engine.cancel(handle)
            if rng.random() < 0.2:
                engine.cancel(handle)
            held = {page for t in engine.scheduler.tasks.values() for page in t.pages}
            assert engine.scheduler.pages.available == SMALL.pages - len(held)
            assert not set(handle.ids) & set(engine.scheduler.tasks)
            done += 1
        assert all_free(engine)
    assert phases == {"over", "waiting", "prompt", "decoding"}
    record("E-1 cancellations", n_tried=done, n_ok=done, n_bad=0, seconds=time.perf_counter() - began, seed=0)


def test_what_cannot_be_served_is_refused_before_anything_happens() -> None:
    engine = Engine(model(case_of(*CASE)), context=64, limits=Limits(pages=4, page=8, rows=2, budget=8))
    for ask, words in (
        (Ask(prompt=[]), "the prompt is empty"),
        (Ask(prompt=[1] * 65), "the prompt has 65 tokens, but the model's context is 64"),
        (Ask(prompt=[1] * 30, max_tokens=10), "may reach 40 tokens, but the engine's cache holds 32"),
        (Ask(prompt=[1], n=0), "n should be 1 or more, found 0"),
        (Ask(prompt=[1], sampling=Sampling(temperature=-1.0)), "temperature should be between"),
    ):
        with pytest.raises(InputError, match=words):
            engine.add(ask)
    assert not engine.busy and all_free(engine)
    with pytest.raises(InputError, match="less than one for each of 16 rows"):
        Engine(model(case_of(*CASE)), limits=Limits(budget=8))


def test_a_token_outside_the_vocabulary_fails_its_request_only() -> None:
    engine = Engine(model(case_of(*CASE)), context=64, limits=SMALL)
    (bad,), (good,) = engine.run([Ask(prompt=[5000], max_tokens=2), Ask(prompt=[1], max_tokens=2)])
    assert isinstance(bad, InputError) and "5000" in str(bad)
    assert isinstance(good, Generation)
