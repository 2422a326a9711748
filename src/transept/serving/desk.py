"""What happens to every request: a place, a model, the work beside a watch on the client, a reply; and how requests become the engine's."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from transept.core.errors import InputError
from transept.core.shapes import Tensor
from transept.data.text.stream import ALPHABET, token_bytes
from transept.inference.engine import Ask, Event, RequestError, Stream
from transept.inference.sampling import Sampling
from transept.serving.errors import Refusal, refused, shape
from transept.serving.gate import Gate, Ticket
from transept.serving.metrics import Metrics
from transept.serving.requests import Sampled
from transept.serving.shelf import Served, Settings, Shelf

T = TypeVar("T")
Work = Callable[[Served, Ticket], Awaitable[dict[str, Any] | AsyncGenerator[dict[str, Any], None]]]
SHORT = 4096
"""Bytes of a request that is prepared at once."""
HELD = 0.02
"""Seconds of work that, twice in a row, move the preparation of a model's requests to threads."""
LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot write."""


@dataclass
class Desk:
    """The server's parts, which every endpoint finds at `request.app.state.desk`."""

    settings: Settings
    shelf: Shelf
    gate: Gate
    metrics: Metrics
    ready: bool = False
    # One model at a time is looked into: a look is heavy, and answers go before it.
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def limits(self) -> Any:
        return self.settings.limits

    def sizes(self) -> dict[str, int]:
        """What is in use."""
        return {"requests": self.gate.requests, "tokens": self.gate.tokens, **self.shelf.sizes()}

    async def run(self, request: Request, model: str, task: str, work: Work) -> Response:
        """Does the work with a model, for one request: a dict becomes JSON, a generator of dicts a stream of events.

        When the client leaves, the work is cancelled and its place, model and pages come back.
        """
        async with AsyncExitStack() as stack:
            ticket = self.gate.enter(request.scope.get("tenant", ""))
            stack.callback(ticket.close)
            served = await stack.enter_async_context(self.shelf.use(model, task))
            try:
                async with asyncio.timeout(self.limits["request_seconds"]):
                    found = await beside(request, work(served, ticket))
            except TimeoutError:
                raise Refusal(504, f"the request took more than {self.limits['request_seconds']} seconds") from None
            if found is None:
                return Response(status_code=499)
            if isinstance(found, dict):
                # An answer is short; vectors and maps may be long.
                data = encoded(found) if "choices" in found else await asyncio.to_thread(encoded, found)
                return Response(data, media_type="application/json")
            stack.push_async_callback(found.aclose)
            return Events(found, stack.pop_all(), self.limits["request_seconds"])
        raise RequestError("a place at the desk swallowed an error")


async def beside(request: Request, work: Awaitable[Any]) -> Any:
    """The work's result; None where the client left first, and then the work is cancelled."""
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
        return job.result() if job.done() else None
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def aside(request: Request, served: Served, work: Callable[[], T], quick: bool = True) -> T:
    """The work's result; in a thread where the request is long, the work not `quick` or the model's template known to be slow, since it
    would hold up everybody.

    What is short is done in the time that a thread would take to get its turn, and takes no turns from requests that wait to be refused.
    """
    if served.slow > 1 or not quick or len(await request.body()) > SHORT:
        return await asyncio.to_thread(work)
    began = time.thread_time()
    try:
        return work()
    finally:
        served.slow = served.slow + 1 if time.thread_time() - began > HELD else 0


async def left(request: Request) -> None:
    """Returns when the client is gone; the body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """Server-sent events; what the request holds comes back when the stream ends, whichever way.

    Not sse-starlette: that one cuts every stream off when the server is told to stop, and here they are to run to their end.
    """

    def __init__(self, body: AsyncGenerator[dict[str, Any], None], held: AsyncExitStack, seconds: int):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(lines(body, seconds), headers=headers, media_type="text/event-stream")
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.held.aclose()


async def lines(body: AsyncGenerator[dict[str, Any], None], seconds: int) -> AsyncIterator[bytes]:
    """Dicts as events; an error inside becomes the last event, and the stream ends as it should."""
    until = asyncio.get_running_loop().time() + seconds
    try:
        async for item in body:
            if asyncio.get_running_loop().time() > until:
                raise Refusal(504, f"the request took more than {seconds} seconds")
            yield b"data: " + encoded(item) + b"\n\n"
    except Exception as error:
        r = refused(error)
        yield b"data: " + encoded(shape(r.status_code, str(r.detail), r.param, r.code)) + b"\n\n"
    yield b"data: [DONE]\n\n"


def encoded(value: Mapping[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


# --- requests to the engine ---


def ask(desk: Desk, served: Served, body: Sampled, prompt: Sequence[int], **rest: Any) -> Ask:
    """The engine's request for one prompt. Errors: InputError for what is over a limit."""
    limits, room = desk.limits, getattr(body, "max_completion_tokens", None) or body.max_tokens
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    limits.check("n", body.n, "n")
    limits.check("max_tokens", room, "max_tokens")
    limits.check("stop", len(stop), "stop")
    for text in stop:
        limits.check("stop_length", len(text), "stop")
    limits.check("logit_bias", len(body.logit_bias or ()), "logit_bias")
    if any(not text for text in stop):
        raise InputError("stop: a stop string is empty")
    if body.stream_options is not None and not body.stream:
        raise InputError("stream_options: they are for streams; set stream to true")
    vocab = served.model.spec.vocab  # type: ignore[attr-defined]
    wrong = next((i for i in prompt if i >= vocab), None)
    if wrong is not None:
        raise InputError(f"prompt: the token id {wrong} is not in the vocabulary of {vocab}")
    if len(prompt) == served.book.context:
        raise InputError(f"prompt: it has {len(prompt)} tokens and the model's context is {len(prompt)}, so there is no room for an answer")
    sampling = Sampling(temperature=1.0 if body.temperature is None else float(body.temperature), top_k=body.top_k,
                        top_p=None if body.top_p is None else float(body.top_p), min_p=None if body.min_p is None else float(body.min_p),
                        repetition_penalty=float(body.repetition_penalty or 1.0), seed=body.seed)
    return Ask(prompt=prompt, max_tokens=room or limits["answer"], sampling=sampling.check(), ends=served.model.ends, stop=stop,
               n=body.n or 1, processors=processors(body, len(prompt), vocab), **rest)


def processors(body: Sampled, prompt: int, vocab: int) -> list[Callable[[Sequence[int], Tensor], Tensor]]:
    """logit_bias, and the two penalties on what was already said, as the OpenAI API defines them."""
    found: list[Callable[[Sequence[int], Tensor], Tensor]] = []
    if body.logit_bias:
        for key in body.logit_bias:
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab):
                raise InputError(f"logit_bias: {key[:40]!r} is not a token id below {vocab}")
        ids, values = torch.tensor([int(key) for key in body.logit_bias]), torch.tensor([float(v) for v in body.logit_bias.values()])
        found.append(lambda tokens, logits: logits.index_add(0, ids, values))
    if body.presence_penalty or body.frequency_penalty:
        presence, frequency = body.presence_penalty or 0.0, body.frequency_penalty or 0.0

        def lowered(tokens: Sequence[int], logits: Tensor) -> Tensor:
            said = Counter(tokens[prompt:])
            cut = torch.tensor([presence + frequency * times for times in said.values()])
            return logits.index_add(0, torch.tensor(list(said)), -cut) if said else logits

        found.append(lowered)
    return found


def submit(served: Served, ticket: Ticket, asks: Sequence[Ask]) -> list[Stream]:
    """Hands requests to the engine. Errors: InputError, Busy, Refusal (429)."""
    engine = served.engine
    if engine is None:
        raise InputError(f"model: {served.book.name!r} does not generate")
    ticket.claim(sum((len(one.prompt) + engine.engine.room(one)) * one.n for one in asks))
    for one in asks:
        # The ticket ends them where nobody else comes to do it: a client may leave before its answer begins to be read.
        ticket.streams.append(engine.submit(one))
    return ticket.streams


async def events(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Event], None]:
    """(prompt, Event) of all streams as they come; those that are not over are cancelled when the reader leaves. Raises the first error."""
    if len(streams) == 1:
        # Nearly every request: no task in between, which costs each token two turns of the event loop.
        try:
            async for event in streams[0]:
                if event.error is not None:
                    raise event.error
                yield 0, event
        finally:
            if streams[0].left:
                streams[0].cancel()
        return
    queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    async def forward(i: int, stream: Stream) -> None:
        async for event in stream:
            queue.put_nowait((i, event))
        queue.put_nowait(None)

    tasks = [asyncio.create_task(forward(i, stream)) for i, stream in enumerate(streams)]
    left = len(tasks)
    try:
        while left:
            found = await queue.get()
            if found is None:
                left -= 1
            elif found[1].error is not None:
                raise found[1].error
            else:
                yield found
    finally:
        for task, stream in zip(tasks, streams, strict=True):
            task.cancel()
            if stream.left:
                stream.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Head:
    """What every chunk and reply of one answer begins with, and its counts."""

    desk: Desk
    served: Served
    object: str
    id: str
    prompt: int = 0
    completion: int = 0
    begin: float = 0.0

    def made(self, object: str | None = None, **rest: Any) -> dict[str, Any]:
        """A chunk or reply with these fields."""
        book = self.served.book
        return {"id": self.id, "object": object or self.object, "created": int(time.time()), "model": book.name,
                "system_fingerprint": book.fingerprint, **rest}

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion}

    async def watched(self, streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Event], None]:
        """The events, counted."""
        self.begin = time.monotonic()
        first = True
        source = events(streams)
        try:
            async for i, event in source:
                if first:
                    first = False
                    self.desk.metrics.first.labels(self.served.book.name).observe(time.monotonic() - self.begin)
                if event.final is not None:
                    self.completion += event.final.usage.completion_tokens
                yield i, event
        finally:
            await source.aclose()
            self.desk.metrics.answered(self.served.book.name, self.prompt, self.completion, self.begin)


def spelled(served: Served, id: int) -> tuple[str, list[int]]:
    """A token's text and its bytes, which alone may be no character."""
    tokenizer = served.tokenizer
    token = tokenizer.token(id)
    bytewise = (tokenizer.source.get("decoder") or {}).get("type") == "ByteLevel" and id not in tokenizer.specials
    if bytewise and all(c in ALPHABET for c in token):
        raw = token_bytes(token)
        return raw.decode("utf-8", "replace"), list(raw)
    text = tokenizer.decode([id], skip_specials=False)
    return text, list(text.encode())


def finite(logprob: float) -> float:
    """A log-probability that JSON can write."""
    return max(logprob, LEAST)
