"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.core.errors import InputError
from transept.inference.engine import Ask, Event, Stream
from transept.serving.desk import Desk, Head, aside, ask, finite, spelled, submit
from transept.serving.gate import Ticket
from transept.serving.replies import ChatReply, documented
from transept.serving.requests import ChatRequest
from transept.serving.shelf import Served
from transept.serving.tools import Shaper, chosen, constraint, schemas, shown
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/chat/completions", response_model=None, responses=documented(ChatReply, stream=True))
async def chat(body: ChatRequest, request: Request) -> Response:
    """The assistant's answer to a conversation; with "stream" as server-sent events."""
    desk: Desk = request.app.state.desk
    desk.limits.check("messages", len(body.messages), "messages")
    desk.limits.check("tools", len(body.tools or ()), "tools")
    desk.limits.check("top_logprobs", body.top_logprobs, "top_logprobs")
    for i, message in enumerate(body.messages):
        desk.limits.check("parts", len(message.content) if isinstance(message.content, list) else 0, f"messages.{i}.content")
    if body.top_logprobs and not body.logprobs:
        raise InputError("top_logprobs: it needs logprobs to be true")
    if body.max_tokens and body.max_completion_tokens:
        raise InputError("max_tokens: give this or max_completion_tokens, not both")
    if body.continue_final_message:
        continuable(body)

    async def work(served: Served, ticket: Ticket) -> dict[str, Any] | AsyncGenerator[dict[str, Any], None]:
        plain = not (body.tools or body.response_format)
        one, shaper = await aside(request, served, lambda: prepared(desk, served, body, ticket.tenant), quick=plain)
        head = Head(desk, served, "chat.completion", f"chatcmpl-{uuid.uuid4().hex}", prompt=len(one.prompt))
        streams = submit(served, ticket, [one])
        shapers = [shaper() for _ in range(one.n)]
        return chunks(head, streams, shapers, body) if body.stream else await whole(head, streams, shapers, body)

    return await desk.run(request, body.model, "chat", work)


def continuable(body: ChatRequest) -> None:
    """Errors: InputError where there is no answer to go on from."""
    if len(body.messages) < 2 or body.messages[-1].role != "assistant" or body.messages[-1].tool_calls:
        raise InputError("continue_final_message: the last of several messages should be the assistant's text")
    if body.tools or (body.response_format is not None and body.response_format.type != "text"):
        raise InputError("continue_final_message: an answer that follows a format or calls tools is written from its beginning")


def prepared(desk: Desk, served: Served, body: ChatRequest, tenant: str) -> tuple[Ask, Any]:
    """The engine's request and the reader of its answer: template, tokens, grammar."""
    for schema in schemas(body):
        desk.limits.check("schema", len(json.dumps(schema)), "a JSON schema")
    turns, options = shown(body.messages, chosen(body), served.tokenizer, served.book.name)
    for i, turn in enumerate(turns):
        served.text(turn["content"], f"messages.{i}")
    served.text("".join(turn["content"] for turn in turns), "messages")
    begun = turns.pop()["content"] if body.continue_final_message else ""
    ids = served.tokenizer.encode_chat(turns, add_generation_prompt=True, **options)
    ids += served.tokenizer.encode(begun, specials=False)
    one = ask(desk, served, body, ids, tenant=tenant, top=body.top_logprobs or 0)
    grammar, shaper = constraint(body, served.grammars)
    return one if grammar is None else Ask(**{**vars(one), "grammar": grammar}), shaper


def logprobs(served: Served, event: Event) -> list[dict[str, Any]]:
    """The tokens of an event as the API tells them; the token that ends an answer is not told."""
    found = []
    for place, (id, logprob) in enumerate(zip(event.ids, event.logprobs, strict=True)):
        if id not in served.model.ends:
            top = [entry(served, *pair) for pair in event.top[place]]
            found.append({**entry(served, id, logprob), "top_logprobs": top})
    return found


def entry(served: Served, id: int, logprob: float) -> dict[str, Any]:
    """One token with its log-probability."""
    text, raw = spelled(served, id)
    return {"token": text, "logprob": finite(logprob), "bytes": raw}


def ended(event: Event, shaper: Shaper) -> str:
    """Why the answer ended."""
    reason = event.final.finish_reason if event.final is not None else "length"
    return "tool_calls" if shaper.called and reason == "stop" else reason


async def chunks(head: Head, streams: list[Stream], shapers: list[Shaper], body: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    """The answer as it comes."""

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, told: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}
        return head.made("chat.completion.chunk", choices=[choice])

    for index in range(len(shapers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    source = head.watched(streams)
    try:
        async for _, event in source:
            shaper = shapers[event.index]
            told = {"content": logprobs(head.served, event)} if body.logprobs else None
            deltas = shaper.feed(event.text) + (shaper.end() if event.over else [])
            for i, delta in enumerate(deltas or ([{}] if told and told["content"] else [])):
                yield chunk(event.index, delta, None, None if i else told)
            if event.over:
                yield chunk(event.index, {}, ended(event, shaper))
    finally:
        await source.aclose()
    if body.stream_options is not None and body.stream_options.include_usage:
        yield head.made("chat.completion.chunk", choices=[], usage=head.usage)


async def whole(head: Head, streams: list[Stream], shapers: list[Shaper], body: ChatRequest) -> dict[str, Any]:
    """The answer when it is complete."""
    choices: list[dict[str, Any]] = []
    for i in range(len(shapers)):
        message = {"role": "assistant", "content": "", "refusal": None}
        choices.append({"index": i, "message": message, "logprobs": {"content": []} if body.logprobs else None})
    async for _, event in head.watched(streams):
        shaper, choice = shapers[event.index], choices[event.index]
        if body.logprobs:
            choice["logprobs"]["content"] += logprobs(head.served, event)
        for delta in shaper.feed(event.text) + (shaper.end() if event.over else []):
            joined(choice["message"], delta)
        if event.over:
            choice["finish_reason"] = ended(event, shaper)
    return head.made(choices=choices, usage=head.usage)


def joined(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds a stream's fragment to a message."""
    message["content"] = (message["content"] or "") + delta.get("content", "") if "tool_calls" not in delta else None
    for call in delta.get("tool_calls", ()):
        if "id" in call:
            message["tool_calls"] = [{"id": call["id"], "type": "function", "function": dict(call["function"])}]
        else:
            message["tool_calls"][0]["function"]["arguments"] += call["function"]["arguments"]
