"""People who leave, faults inside, more requests than fit, orders to stop, and long use (RELIABILITY E-1, E-2, E-4, E-5, E-7)."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy
import psutil
import pytest
import torch

from tests import figures
from tests.counts import FULL, count
from tests.serving import tiny
from tests.serving.wire import sent, talk
from transept.cli.main import main
from transept.core.errors import InputError
from transept.inference.engine.engine import Choice
from transept.serving import desk as desks
from transept.serving.endpoints import chat
from transept.serving.run import Running

pytestmark = pytest.mark.usefixtures("unchecked")
ENDS = torch.tensor([318, 319])
MARK = "\x07"
"""Stands in the culprit's prompt only, and is a token of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.decoder(tmp_path_factory.mktemp("spawned") / "tiny")


# --- leaving ---


async def leave(address: str, rng: random.Random) -> None:
    """One client that asks for something long and goes away at a random moment."""
    body = {**tiny.ASK, "max_tokens": rng.choice([2, 60]), "stream": rng.random() < 0.7, "n": rng.choice([1, 1, 3]), "temperature": 1}
    if rng.random() < 0.3:
        body["stop"] = ["e"]
    phase = rng.choice(["at once", "queued", "chunks", "slow", "late"])
    reader, writer = await sent(address, body)
    try:
        async with asyncio.timeout(20):
            if phase == "queued":
                await asyncio.sleep(rng.random() * 0.05)
            elif phase == "chunks":
                for _ in range(rng.randint(1, 30)):
                    await reader.readline()
            elif phase == "slow":
                await asyncio.sleep(0.2 * rng.random())
                await reader.read(10)
            elif phase == "late":
                await reader.read()
    except TimeoutError:
        pass
    finally:
        writer.transport.abort()


def stepped(engine: Any, patch: pytest.MonkeyPatch) -> list[int]:
    """How many steps begin between a cancellation and the return of its pages, for each that comes from now on."""
    at: dict[Any, int] = {}
    waited: list[int] = []
    ask, end = engine._cancel, engine.engine.cancel

    def asked(stream: Any) -> None:
        if stream.handle is not None:
            at.setdefault(stream.handle, engine.engine.counts["steps"])
        ask(stream)

    def ended(handle: Any) -> None:
        end(handle)
        if handle in at:
            waited.append(engine.engine.counts["steps"] - at.pop(handle))

    patch.setattr(engine, "_cancel", asked)
    patch.setattr(engine.engine, "cancel", ended)
    return waited


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_who_leaves_leaves_nothing_behind(running: Running, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages come back within one step; after each batch no place, no task, no page is held; the server then answers as before."""
    expected = tiny.post(address).json()["choices"]
    number, rng, begin = count(1000), random.Random(1), time.monotonic()
    waited = stepped(running.app.state.desk.shelf.books["tiny"].served.engine, monkeypatch)
    for _ in range(number // 25):

        async def batch() -> None:
            await asyncio.gather(*(leave(address, rng) for _ in range(25)))

        asyncio.run(batch())
        tiny.settle(running.app)
        assert tiny.post(address).json()["choices"] == expected
    print(f"{len(waited)} of {number} were cancelled while they ran, at most {max(waited, default=0)} steps before their pages came back")
    figures.record("E-1 disconnects", n_tried=number, n_ok=number, n_bad=0, seconds=time.monotonic() - begin, seed=1)
    assert all(steps <= 1 for steps in waited)


def test_work_stops_when_the_client_leaves(running: Running, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tokens asked for, few are computed once the reader is gone, whose pages come back within one step."""
    front = running.app.state.desk.shelf.books["tiny"].served.engine
    engine, waited = front.engine, stepped(front, monkeypatch)
    before = engine.counts["generated_tokens"]

    async def go() -> None:
        body = {**tiny.ASK, "max_tokens": 64, "n": 8, "temperature": 1, "stream": True}
        for _ in range(3):
            reader, writer = await sent(address, body)
            for _ in range(12):
                await reader.readline()
            writer.transport.abort()

    asyncio.run(go())
    tiny.settle(running.app)
    assert engine.counts["generated_tokens"] - before < 3 * 8 * 64
    assert waited and max(waited) <= 1


def test_an_answer_that_nobody_begins_to_read_is_ended(running: Running, address: str) -> None:
    """A place that is given back takes with it what the engine still computes for it."""
    desk = running.app.state.desk
    served = desk.shelf.books["tiny"].served

    async def go() -> None:
        ticket = desk.gate.enter("")
        asks = [desks.Ask(prompt=[1, 2, 3], max_tokens=900, processors=[lambda tokens, logits: logits.index_fill(0, ENDS, -1e9)])]
        desks.submit(served, ticket, asks)
        ticket.close()

    before = served.engine.engine.counts["generated_tokens"]
    asyncio.run(go())
    tiny.settle(running.app)
    assert served.engine.engine.counts["generated_tokens"] - before < 900


# --- faults ---


class Boom(Exception):
    """A fault that nobody expects."""


def culprit(running: Running) -> Callable[[Any], bool]:
    """Whether a list of tokens is the culprit's."""
    (id,) = running.app.state.desk.shelf.books["tiny"].served.tokenizer.encode(MARK, specials=False)
    return lambda tokens: id in list(tokens)


def injected(point: str, error: Exception, running: Running, patch: pytest.MonkeyPatch) -> None:
    """Makes this point of the server fail for the culprit alone."""
    served = running.app.state.desk.shelf.books["tiny"].served
    engine, guilty = served.engine.engine, culprit(running)

    def broken(owner: Any, name: str, wrong: Callable[..., bool]) -> None:
        plain = getattr(owner, name)

        def fail(*args: Any, **rest: Any) -> Any:
            if wrong(*args, **rest):
                raise error
            return plain(*args, **rest)

        patch.setattr(owner, name, fail)

    def his(row: Any) -> bool:
        tables = [task.pages for task in engine.scheduler.tasks.values() if guilty(task.tokens)]
        return any(list(row.pages) == table[: len(row.pages)] for table in tables)

    def rows(rows: Any, first: bool) -> bool:
        return any((row.start == 0) == first and his(row) for row in rows)

    def last(served: Any, event: Any) -> bool:
        return event.final is not None and len(event.final.ids) == 13

    def nan(found: Any) -> Any:
        parts = numpy.split(numpy.asarray(plain_step(found)), numpy.cumsum([row.logits for row in found])[:-1])
        return numpy.concatenate([part * numpy.float32("nan") if his(row) else part for row, part in zip(found, parts, strict=True)])

    plain_step = engine.runner.step
    points: dict[str, Callable[[], None]] = {
        "tokenise": lambda: broken(served.tokenizer, "encode_chat", lambda turns, **rest: MARK in turns[0]["content"]),
        "template": lambda: broken(served.tokenizer, "render", lambda turns, **rest: MARK in turns[0]["content"]),
        "admit": lambda: broken(chat, "submit", lambda served, ticket, asks: asks[0].max_tokens == 13),
        "allocate": lambda: broken(engine.scheduler, "add", lambda task: guilty(task.tokens)),
        "prefill": lambda: broken(engine.runner, "step", lambda found: rows(found, True)),
        "decode": lambda: broken(engine.runner, "step", lambda found: rows(found, False)),
        "sampler": lambda: broken(Choice, "emit", lambda choice, logits: guilty(choice.tokens)),
        "processor": lambda: broken(desks, "processors", lambda body, *rest: body.max_tokens == 13),
        "grammar": lambda: broken(chat, "constraint", lambda body, *rest: body.max_tokens == 13),
        "detokenise": lambda: broken(Choice, "_read", lambda choice, token: guilty(choice.tokens)),
        "write": lambda: broken(chat, "logprobs", last),
        "metrics": lambda: broken(running.app.state.desk.metrics, "answered", lambda model, prompt, said, begin: said == 13),
        "NaN": lambda: patch.setattr(engine.runner, "step", nan),
    }
    points[point]()


POINTS = "tokenise template admit allocate prefill decode sampler processor grammar detokenise write metrics NaN".split()


@pytest.mark.reliability
@pytest.mark.parametrize("point", POINTS)
def test_a_fault_in_one_touches_no_other(running: Running, address: str, point: str) -> None:
    """The culprit gets a typed error without a trace; its neighbours the very same texts and log-probabilities as without it."""
    rounds, begin = count(300) // 12 + 1, time.monotonic()
    same = {**tiny.ASK, "max_tokens": 10, "logprobs": True, "top_logprobs": 2}
    said = [[{"role": "user", "content": f"Tell me of {i} foxes"}] for i in range(3)]
    others = [{**same, "messages": messages, "temperature": i % 2, "seed": i} for i, messages in enumerate(said)]
    bad = {**tiny.ASK, "messages": [{"role": "user", "content": MARK}], "max_tokens": 13, "logprobs": True, "temperature": 1, "seed": 3}

    async def all_at_once(bodies: list[Any]) -> list[tuple[int, str, str]]:
        return list(await asyncio.gather(*(talk(address, body) for body in bodies)))

    def choices(found: list[tuple[int, str, str]]) -> list[Any]:
        assert all(status == 200 for status, _, _ in found), found
        return [json.loads(rest)["choices"] for _, _, rest in found]

    expected = choices(asyncio.run(all_at_once(others)))
    for i in range(rounds):
        stream = i % 2 == 1
        error = (Boom("secret detail"), torch.OutOfMemoryError("no memory"), InputError("refused"), RuntimeError("secret detail"))[i % 4]
        with pytest.MonkeyPatch.context() as patch:
            injected(point, error, running, patch)
            *neighbours, (status, _, rest) = asyncio.run(all_at_once([*others, {**bad, "stream": stream}]))
        assert choices(neighbours) == expected
        assert '"error":{"message":"' in rest and "Traceback" not in rest and ".py" not in rest, rest[:300]
        assert status in ((200, 400, 500) if stream else (400, 500)), rest[:300]
        tiny.settle(running.app)
    assert choices(asyncio.run(all_at_once(others))) == expected
    figures.record(f"E-2 fault in {point}", n_tried=3 * rounds, n_ok=3 * rounds, n_bad=0, seconds=time.monotonic() - begin)


# --- more than fits ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = ("the-heavy-key", "the-light-key")
    with Running(tiny.settings(tmp_path_factory.mktemp("models"), keys=keys, rows=4, limits={"queue": 96})) as server:
        yield server
        tiny.settle(server.app)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_more_requests_than_fit(tmp_path: Path) -> None:
    """Each request is answered whole or refused with 429 and a time to wait; no work is thrown away by it."""
    number, at_once, keys = count(2000), 256 if FULL else 128, ("the-heavy-key", "the-light-key")
    begin = time.monotonic()
    line = [sys.executable, "-m", "tests.serving.alone", str(tmp_path), *keys]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        crowd = [sys.executable, "-m", "tests.serving.crowd", address, keys[1], str(number), str(at_once)]
        found = json.loads(subprocess.run(crowd, check=True, capture_output=True, text=True, timeout=1200).stdout)
        counts = json.loads(server.communicate("\n", timeout=120)[0])
    answered, refused = found["answered"], sorted(found["refused"])
    assert not found["wrong"] and answered + len(refused) == number and refused and answered >= 72
    # Prompts share their beginnings, so fewer tokens may be computed than were sent, but hardly more.
    assert counts["computed_tokens"] - counts["guessed_tokens"] <= (found["prompt"] + 8 * answered) / 0.95
    late = 1000 * refused[int(0.99 * len(refused))]
    figures.record("E-4 overload", n_tried=number, n_ok=number, n_bad=0, worst_ms=late, seconds=time.monotonic() - begin)


def test_a_heavy_key_does_not_keep_a_light_one_waiting(small: Running) -> None:
    """In order of completion, not by the clock: between a light key's arrival and its last answer few of the heavy key's requests end."""
    order: list[str] = []
    engine = small.app.state.desk.shelf.books["tiny"].served.engine

    async def one(key: str, tokens: int) -> None:
        body = {**tiny.ASK, "max_tokens": tokens, "temperature": 1, "logit_bias": {"318": -100, "319": -100}}
        status, _, rest = await talk(small.address, body, headers=bearer(f"the-{key}-key"))
        assert status == 200, rest
        order.append(key)

    def tenants() -> list[int]:
        """How many requests of each key the engine has."""
        with engine.lock:
            return sorted(Counter(stream.ask.tenant for stream in engine.open).values())

    async def go() -> int:
        heavy = [asyncio.create_task(one("heavy", 48)) for _ in range(64)]
        while sum(tenants()) + len(order) < 64:
            await asyncio.sleep(0.005)
        light = [asyncio.create_task(one("light", 8)) for _ in range(4)]
        while "light" not in order and (len(tenants()) < 2 or tenants()[0] < 4):
            await asyncio.sleep(0.005)
        before = len(order)
        await asyncio.gather(*light, *heavy)
        return before

    before = asyncio.run(go())
    last = max(i for i, key in enumerate(order) if key == "light")
    assert order[before:last].count("heavy") <= 16 and before < 48, (before, order)


def test_what_prepares_slowly_leaves_the_event_loop(running: Running, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may take its time; it holds the others up twice and then no more."""
    served, real, threads = running.app.state.desk.shelf.books["tiny"].served, chat.prepared, list[str]()

    def slow(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        until = time.thread_time() + 2 * desks.HELD
        while time.thread_time() < until:
            pass
        return real(*given)

    monkeypatch.setattr(chat, "prepared", slow)
    try:
        for _ in range(4):
            assert tiny.post(address).status_code == 200
    finally:
        served.slow = 0
    assert threads[0] == threads[1] == running.thread.name and running.thread.name not in threads[2:]


def test_one_key_gets_its_share_only(small: Running) -> None:
    gate = small.app.state.desk.gate
    tickets = [gate.enter("a") for _ in range(72)]
    with pytest.raises(desks.Refusal, match="share"):
        gate.enter("a")
    tickets += [gate.enter("b") for _ in range(24)]
    with pytest.raises(desks.Refusal, match="all that this server takes"):
        gate.enter("c")
    for ticket in tickets:
        ticket.close()
        ticket.close()
    assert gate.requests == 0


# --- told to stop ---


@pytest.mark.reliability
@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_streams_end_whole_when_told_to_stop(folder: Path) -> None:
    """16 streams under way at SIGTERM: every one ends with its last event, then the process ends with 0."""
    rounds, begin = count(20), time.monotonic()
    for _ in range(rounds):
        with tiny.spawned(folder) as (process, address):

            async def go(process: subprocess.Popen[str], address: str) -> list[bytes]:
                body = {**tiny.ASK, "max_tokens": 40, "stream": True, "temperature": 1}
                links = [await sent(address, body) for _ in range(16)]
                firsts = [await reader.readuntil(b"data: ") for reader, _ in links]
                process.send_signal(signal.SIGTERM)
                rests = await asyncio.gather(*(reader.read() for reader, _ in links))
                for _, writer in links:
                    writer.close()
                return [first + rest for first, rest in zip(firsts, rests, strict=True)]

            for raw in asyncio.run(go(process, address)):
                assert b" 200 " in raw.split(b"\r\n", 1)[0] and b"data: [DONE]\n\n" in raw and b'"finish_reason":"' in raw
            assert process.wait(60) == 0
    figures.record("E-5 drain", n_tried=16 * rounds, n_ok=16 * rounds, n_bad=0, seconds=time.monotonic() - begin)


@pytest.mark.serial
def test_told_twice_it_ends_at_once(tmp_path: Path) -> None:
    """The second signal waits for the first to be seen: two that are pending at once are one, says POSIX."""
    long = tiny.decoder(tmp_path / "tiny", context=32768)
    with tiny.spawned(long, "--limit", "drain_seconds=600", "--limit", "answer=30000", "--pages", "16000") as (process, address):
        body = {**tiny.ASK, "max_tokens": 30000, "n": 8, "stream": True, "temperature": 1, "logit_bias": {"318": -100, "319": -100}}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            with suppress(httpx.TransportError):
                while httpx.get(f"{address}/ready", timeout=60).status_code == 200:
                    time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        assert '"error":{"message":"the engine was closed' in rest and process.wait(60) == 0


def test_what_cannot_be_served_is_said_before_it_listens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text().replace("LlamaForCausalLM", "LamaForCausalLM"))
    for line, words in (
        ((str(tmp_path / "nothing"),), "no file or folder"),
        ((str(tmp_path),), "LamaForCausalLM"),
        ((str(folder), "--host", "0.0.0.0"), "--api-key"),
        ((str(folder), "--limit", "n=9999"), "between 1 and"),
        ((str(folder), "--api-key", "with a space"), "space"),
        ((str(folder), "--api-key", "schlüssel"), "ASCII"),
        ((str(folder), "--context", "99999"), "1024"),
        ((str(folder), "--port", "70000"), "70000"),
        ((str(folder), "--memory", "0.0001"), "--memory"),
    ):
        code, told = main(["serve", *line]), capsys.readouterr()
        assert code == 1 and told.out == "" and told.err.startswith("transept: ") and words in told.err, told.err


# --- long use ---


@pytest.mark.reliability
@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_where_it_is(folder: Path) -> None:
    """Mixed requests, good, bad and broken off: memory grows by less than 1 MiB per 10,000; files and threads not at all."""
    number, rng, seen = count(20_000) if FULL else 800, random.Random(2), []
    with tiny.spawned(folder) as (process, address):
        watched = psutil.Process(process.pid)

        async def one() -> None:
            kind = rng.random()
            if kind < 0.1:
                await leave(address, rng)
                return
            body: dict[str, Any] = {**tiny.ASK, "max_tokens": rng.randint(1, 3), "stream": kind < 0.4, "temperature": 1}
            if kind > 0.9:
                body |= {"n": -1} if kind > 0.95 else {"response_format": {"type": "json_object"}}
            status, _, rest = await talk(address, body)
            assert status == (400 if "n" in body else 200), rest

        async def part(size: int) -> None:
            for _ in range(size // 8):
                await asyncio.gather(*(one() for _ in range(8)))

        asyncio.run(part(number // 4))
        begin = time.monotonic()
        for at in range(20):
            asyncio.run(part(3 * number // 80))
            done = number // 4 + at * (3 * number // 80)
            seen.append((done, watched.memory_info().rss, watched.num_fds(), watched.num_threads()))
        seconds = time.monotonic() - begin
    slope = 10_000 * float(numpy.polyfit([row[0] for row in seen], [row[1] / 2**20 for row in seen], 1)[0])
    figures.record("E-7 soak", n_tried=number, n_ok=number, n_bad=0, worst_ms=None, seconds=seconds, seed=2)
    print(f"memory grows by {slope:.2f} MiB per 10,000 requests; files and threads {seen[0][2:]} -> {seen[-1][2:]}")
    assert seen[-1][2] <= seen[0][2] + 2 and seen[-1][3] <= seen[0][3]
    # Few requests show the allocator's noise only.
    assert slope < (1 if FULL else 40)
