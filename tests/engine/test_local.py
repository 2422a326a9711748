"""A decoder's own engine: streams read in turn, left early, read by threads, broken off; each writes what the plain loop writes."""

from __future__ import annotations

import threading
from itertools import zip_longest

import pytest

from tests.contracts.decoders import model
from tests.engine.cases import Letters, case_of, draw_ask
from transept.core.errors import InputError
from transept.inference import generation
from transept.inference.engine import Ask, Local, RequestError, TorchRunner
from transept.inference.generation import Generation

CASE = ("llama", "gqa")


def local() -> Local:
    return Local(TorchRunner(model(case_of(*CASE)), pages=24, page=8, context=64), pages=24, page=8, context=64)


def plain(ask: Ask) -> Generation:
    steps = generation.steps(model(case_of(*CASE)), ask.prompt, ask.sampling, max_tokens=ask.max_tokens, context=64)
    return generation.last(generation.stream(steps, Letters(), prompt_tokens=len(ask.prompt), ends=ask.ends, stop=ask.stop))


def test_streams_read_in_turn_write_what_each_writes_alone() -> None:
    case, here = case_of(*CASE), local()
    asks = [draw_ask(i, case, 12, ends=(3, 5), stop=("ab",)) for i in range(4)]
    streams = [here.stream(ask, Letters) for ask in asks]
    finals = {i: piece.final for row in zip_longest(*streams) for i, piece in enumerate(row) if piece is not None and piece.final}
    for i, ask in enumerate(asks):
        want, found = plain(ask), finals[i]
        assert isinstance(found, Generation) and (found.ids, found.text, found.finish_reason) == (want.ids, want.text, want.finish_reason)
    assert here.engine.scheduler.pages.available == 24


def test_who_leaves_or_errs_holds_nothing() -> None:
    here = local()
    left = here.stream(Ask(prompt=[1, 2, 3], max_tokens=40))
    next(left)
    del left
    with pytest.raises(InputError, match="the prompt is empty"):
        next(here.stream(Ask(prompt=[])))
    with pytest.raises(InputError, match="5000"):
        next(here.stream(Ask(prompt=[5000], max_tokens=4)))
    assert generation.last(here.stream(Ask(prompt=[1], max_tokens=0))).ids == []
    assert not here.engine.busy and here.engine.scheduler.pages.available == 24


def test_threads_read_their_own_streams() -> None:
    case, here = case_of(*CASE), local()
    asks, found = [draw_ask(i, case, 10) for i in range(4)], {}

    def read(i: int) -> None:
        found[i] = generation.last(here.stream(asks[i])).ids

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == [plain(ask).ids for ask in asks]


def test_a_step_that_is_broken_off_ends_those_under_way_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: object) -> None:
        raise KeyboardInterrupt

    here, ask = local(), Ask(prompt=[1, 2, 3], max_tokens=6)
    other = here.stream(Ask(prompt=[4, 5], max_tokens=9))
    next(other)
    with monkeypatch.context() as patch:
        patch.setattr(here.engine.runner, "step", broken)
        with pytest.raises(KeyboardInterrupt):
            next(here.stream(ask))
    with pytest.raises(RequestError, match="KeyboardInterrupt"):
        list(other)
    assert generation.last(here.stream(ask)).ids == plain(ask).ids


def test_pages_that_others_reserve_are_told() -> None:
    here = local()
    held = here.reserve(24 * 8)
    with pytest.raises(InputError, match="8 columns need 1 pages of cache, but 0 are free"):
        here.reserve(8)
    with pytest.raises(RequestError, match="nothing moves"):
        next(here.stream(Ask(prompt=[1], max_tokens=4)))
    here.release(held)
    assert len(generation.last(here.stream(Ask(prompt=[1], max_tokens=4))).ids) == 4
