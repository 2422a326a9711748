"""POST /v1/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.core.errors import InputError
from transept.inference.engine import Ask, Event, Stream
from transept.serving.desk import Desk, Head, aside, ask, finite, spelled, submit
from transept.serving.gate import Ticket
from transept.serving.replies import CompletionReply, documented
from transept.serving.requests import CompletionRequest
from transept.serving.shelf import Served
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/completions", response_model=None, responses=documented(CompletionReply, stream=True))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """The continuation of one or more texts, or of token ids; with "stream" as server-sent events."""
    desk: Desk = request.app.state.desk
    desk.limits.check("top_logprobs", body.logprobs, "logprobs")
    prompts = split(body)
    desk.limits.check("prompts", len(prompts), "prompt")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InputError("best_of: only the value of n is served: every answer that is drawn is returned")
    if body.suffix:
        raise InputError("suffix: the models served here go on from a text and do not fill one in")
    if body.echo and body.logprobs is not None:
        raise InputError("echo: the prompt's own logprobs are not told; leave one of the two out")

    async def work(served: Served, ticket: Ticket) -> dict[str, Any] | AsyncGenerator[dict[str, Any], None]:
        asks = await aside(request, served, lambda: [prepared(desk, served, body, prompt, ticket.tenant) for prompt in prompts])
        head = Head(desk, served, "text_completion", f"cmpl-{uuid.uuid4().hex}", prompt=sum(len(one.prompt) for one in asks))
        before = [echoed(served, prompt) if body.echo else "" for prompt in prompts]
        streams = submit(served, ticket, asks)
        return chunks(head, streams, before, body) if body.stream else await whole(head, streams, before, body)

    return await desk.run(request, body.model, "completions", work)


def split(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts, each a text or ids."""
    given: Any = body.prompt
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def prepared(desk: Desk, served: Served, body: CompletionRequest, prompt: str | list[int], tenant: str) -> Ask:
    ids = served.tokenizer.encode(served.text(prompt, "prompt")) if isinstance(prompt, str) else prompt
    if not ids:
        raise InputError("prompt: the text is empty")
    return ask(desk, served, body, ids, tenant=tenant, top=body.logprobs or 0)


def echoed(served: Served, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)


class Offsets:
    """The log-probabilities of one answer in the old form, with the character at which each token begins."""

    def __init__(self, served: Served, top: int):
        self.served, self.top, self.at = served, top, 0

    def told(self, event: Event) -> dict[str, Any]:
        """Those of an event."""
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [] if self.top else None, "text_offset": []}
        for place, (id, logprob) in enumerate(zip(event.ids, event.logprobs, strict=True)):
            if id in self.served.model.ends:
                continue
            text, _ = spelled(self.served, id)
            out["tokens"].append(text)
            out["token_logprobs"].append(finite(logprob))
            out["text_offset"].append(self.at)
            self.at += len(text)
            if self.top:
                out["top_logprobs"].append({spelled(self.served, other)[0]: finite(p) for other, p in event.top[place]})
        return out


async def chunks(head: Head, streams: list[Stream], before: list[str], body: CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
    """The answers as they come; answer i to prompt p has the number p * n + i."""
    n = body.n or 1
    offsets = [Offsets(head.served, body.logprobs or 0) for _ in range(n * len(streams))]
    begun: set[int] = set()
    source = head.watched(streams)
    try:
        async for p, event in source:
            index = p * n + event.index
            text = event.text if index in begun else before[p] + event.text
            begun.add(index)
            told = None if body.logprobs is None else offsets[index].told(event)
            if text or told or event.final is not None:
                reason = None if event.final is None else event.final.finish_reason
                yield head.made(choices=[{"index": index, "text": text, "logprobs": told, "finish_reason": reason}])
    finally:
        await source.aclose()
    if body.stream_options is not None and body.stream_options.include_usage:
        yield head.made(choices=[], usage=head.usage)


async def whole(head: Head, streams: list[Stream], before: list[str], body: CompletionRequest) -> dict[str, Any]:
    """The answers when they are complete."""
    choices: dict[int, dict[str, Any]] = {}
    async for piece in chunks(head, streams, before, body):
        for part in piece["choices"]:
            choice = choices.setdefault(part["index"], part)
            if choice is not part:
                choice["text"] += part["text"]
                choice["finish_reason"] = part["finish_reason"]
                for name, values in (part["logprobs"] or {}).items():
                    if values is not None:
                        choice["logprobs"][name] += values
    return head.made(choices=[choices[i] for i in sorted(choices)], usage=head.usage)
