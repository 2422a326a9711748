"""The engine behind its thread: many threads and tasks submit, read and leave."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.contracts.decoders import model
from tests.engine.cases import Letters, case_of, draw_ask
from transept.core.errors import InputError
from transept.inference.engine import Ask, AsyncEngine, Busy, Engine, Limits
from transept.inference.generation import Generation

CASE = ("llama", "gqa")
SMALL = Limits(pages=24, page=8, rows=4, budget=16)


def engine() -> Engine:
    return Engine(model(case_of(*CASE)), context=64, limits=SMALL, tokenizer=Letters)


def test_threads_and_tasks_get_what_the_engine_gives_alone() -> None:
    case = case_of(*CASE)
    asks = [draw_ask(i, case, 8) for i in range(8)]
    expected = [g.ids for (g,) in engine().run(asks) if isinstance(g, Generation)]
    front = AsyncEngine(engine())
    found: dict[int, list[int]] = {}

    def read(i: int) -> None:
        found[i] = [id for event in front.submit(asks[i]) for id in event.ids]

    async def task(i: int) -> None:
        found[i] = [id async for event in front.submit(asks[i]) for id in event.ids]

    async def tasks() -> None:
        await asyncio.gather(*(task(i) for i in range(4, 8)))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(tasks())
    for thread in threads:
        thread.join()
    front.close()
    assert [found[i] for i in range(8)] == expected
    assert not front.open and front.engine.scheduler.pages.available == SMALL.pages


def test_who_leaves_gives_everything_back() -> None:
    """A loop that is left early cancels; a cancelled loop ends; nothing is held afterwards."""
    front = AsyncEngine(engine())

    async def leave() -> None:
        stream = front.submit(Ask(prompt=[1, 2, 3], max_tokens=50))
        events = stream.__aiter__()
        assert (await anext(events)).ids
        await events.aclose()

    asyncio.run(leave())
    stream = front.submit(Ask(prompt=[1, 2, 3], max_tokens=50, n=2))
    next(iter(stream))
    stream.cancel()
    stream.cancel()
    list(stream)
    after = list(front.submit(Ask(prompt=[1, 2], max_tokens=2)))
    assert after[-1].final is not None
    assert not front.open and not front.engine.busy and front.engine.scheduler.pages.available == SMALL.pages
    front.close()


def test_too_many_and_too_late_are_refused() -> None:
    front = AsyncEngine(engine(), queue_size=2)
    with pytest.raises(InputError, match="the prompt is empty"):
        front.submit(Ask(prompt=[]))
    streams = [front.submit(Ask(prompt=[1], max_tokens=60)) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests are under way"):
        front.submit(Ask(prompt=[1]))
    front.close()
    assert all(list(stream)[-1].over for stream in streams)
    with pytest.raises(Busy, match="closing"):
        front.submit(Ask(prompt=[1]))


def test_closing_with_time_lets_all_finish() -> None:
    front = AsyncEngine(engine())
    streams = [front.submit(Ask(prompt=[i], max_tokens=6)) for i in range(3)]
    front.close(drain=60.0)
    assert all(list(stream)[-1].final is not None for stream in streams)


def test_a_fault_of_the_engine_itself_ends_those_under_way_only(monkeypatch: pytest.MonkeyPatch) -> None:
    front = AsyncEngine(engine())
    monkeypatch.setattr(front.engine.scheduler, "schedule", lambda: 1 / 0)
    (event,) = front.submit(Ask(prompt=[1], max_tokens=4))
    assert "ZeroDivisionError" in str(event.error)
    assert list(front.submit(Ask(prompt=[1], max_tokens=4)))[-1].final is not None
    front.close()
