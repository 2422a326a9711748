"""What the inspector's addresses have in common: texts become tokens, one look at a time goes on beside answers, numbers become JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import Request
from starlette.responses import Response
from torch import nn

from transept.blocks.seq2seq import EncoderDecoder
from transept.core.errors import InputError
from transept.core.shapes import Float, Tensor
from transept.inference.generation import check_length
from transept.inference.rules import start_of
from transept.inspection.attention import batch_of
from transept.inspection.watch import chained
from transept.serving.desk import Desk, aside, spelled
from transept.serving.gate import Ticket
from transept.serving.requests import Inspected
from transept.serving.shelf import Served
from transept.serving.tools import shown

ANSWER = 32
"""Tokens of an encoder-decoder's own answer, where no target is given."""


@dataclass(frozen=True)
class Look:
    """A network and what it reads: `ids` and, beside an encoder-decoder's target, its `source`."""

    desk: Desk
    served: Served
    module: nn.Module
    ids: Tensor
    source: Tensor | None

    @property
    def kind(self) -> str:
        """The attention that is shown where none is named."""
        return "self" if self.source is None else "cross"

    def tokens(self, kind: str = "self") -> list[dict[str, Any]]:
        """The tokens of the sequence that this kind of attention asks from."""
        return self.told(self.source if kind == "encoder" and self.source is not None else self.ids)

    def keys(self, kind: str) -> list[dict[str, Any]]:
        """The tokens that it looks at."""
        return self.told(self.source if kind in ("encoder", "cross") and self.source is not None else self.ids)

    def told(self, ids: Tensor) -> list[dict[str, Any]]:
        """Tokens with their text."""
        return [{"id": id, "text": spelled(self.served, id)[0]} for id in ids[0].tolist()]


Work = Callable[[Look], dict[str, Any]]


async def looked(request: Request, body: Inspected, name: str, work: Work) -> Response:
    """The reply to a look into a text; the look goes on in a thread of its own, and the next one waits for it."""
    desk: Desk = request.app.state.desk
    desk.limits.check("messages", len(body.messages or ()), "messages")

    async def run(served: Served, ticket: Ticket) -> dict[str, Any]:
        ids = await aside(request, served, lambda: prompt(desk, served, body))
        ticket.claim(len(ids))
        found = await alone(desk, lambda: work(look(desk, served, body, ids)))
        desk.metrics.tokens.labels(served.book.name, "prompt").inc(len(ids))
        return told(served.book.name, name, len(ids), found)

    return await desk.run(request, body.model, "inspect", run)


def told(model: str, name: str, tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    """A reply with what all of them have."""
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    return {"object": f"inspection.{name}", "model": model, "usage": usage, **found}


async def alone(desk: Desk, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The work's result. Where the client leaves, the work that has begun ends first, and only then the next one begins."""
    await desk.looking.acquire()
    job = asyncio.ensure_future(asyncio.to_thread(work))

    def over(done: asyncio.Future[Any]) -> None:
        desk.looking.release()
        if not done.cancelled():
            done.exception()

    job.add_done_callback(over)
    return await asyncio.shield(job)


def prompt(desk: Desk, served: Served, body: Inspected) -> list[int]:
    """The tokens of the text or conversation. Errors: InputError for none, both, an empty or a long one."""
    if (body.input is None) == (body.messages is None):
        raise InputError("input: give a text here or a conversation in messages" + (", not both" if body.messages is not None else ""))
    if body.input is not None:
        # Where words are filled in, a mask in the text is one, as it is at /v1/fill.
        ids = served.tokenizer.encode(served.text(body.input, "input"), parse_specials="fill" in served.book.tasks)
    else:
        turns, _ = shown(body.messages or [], (), served.tokenizer, served.book.name)
        served.text("".join(turn["content"] for turn in turns), "messages")
        begun = turns.pop()["content"] if len(turns) > 1 and turns[-1]["role"] == "assistant" else ""
        ids = served.tokenizer.encode_chat(turns, add_generation_prompt=True)
        ids += served.tokenizer.encode(begun, specials=False)
    return sized(desk, served, ids, "input" if body.messages is None else "messages")


def sized(desk: Desk, served: Served, ids: list[int], param: str) -> list[int]:
    """The ids, if the model reads so many and they may be looked into."""
    if not ids:
        raise InputError(f"{param}: the text is empty")
    check_length(len(ids), served.book.context)
    desk.limits.check("inspected", len(ids), param)
    return ids


def look(desk: Desk, served: Served, body: Inspected, ids: list[int]) -> Look:
    """The network with its input; an encoder-decoder writes its own answer where none is given."""
    module = served.model.look()
    if not isinstance(module, EncoderDecoder):
        if body.target is not None:
            raise InputError(f"target: {served.book.name!r} writes nothing beside a source; only encoder-decoders do")
        return Look(desk, served, module, batch_of(ids, module), None)
    start = start_of(served.model.rules, served.book.source.family.name)
    if body.target is None:
        written = answer(served, ids, ANSWER).ids
    else:
        written = sized(desk, served, served.tokenizer.encode(served.text(body.target, "target")), "target")
    return Look(desk, served, module, batch_of([start, *written][: served.book.context], module), batch_of(ids, module))


class Nobody:
    """Hears nothing: while it listens, the network that can be watched is what answers."""

    def wants(self, owner: object, name: str) -> bool:
        return False

    def hear(self, owner: object, name: str, value: Any) -> Any:
        return value


def answer(served: Served, ids: Sequence[int], most: int) -> Any:
    """The greedy continuation or answer, by the network that is looked into."""
    context, beside = served.book.context, isinstance(served.model.look(), EncoderDecoder)
    room = most if context is None else min(most, context - (1 if beside else len(ids)))
    with chained(Nobody()):
        return served.model.generate([*ids], max_tokens=room)


def rows(values: Float[Tensor, "n m"]) -> list[list[float]]:
    """Numbers with five digits behind the point, as JSON writes them shortest."""
    return values.detach().double().mul(1e5).round().div(1e5).tolist()


def guesses(served: Served, logits: Float[Tensor, "v"], top: int, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The likeliest tokens, or classes where they have names."""
    chance, ids = logits.double().softmax(-1).topk(min(top, len(logits)))
    return [
        {"id": id, "token": labels[id] if labels else spelled(served, id)[0], "p": round(p, 6)}
        for id, p in zip(ids.tolist(), chance.tolist(), strict=True)
        if labels or id < served.tokenizer.vocab_size
    ]


def numbers(values: Tensor) -> list[float]:
    """A row of numbers with six digits behind the point."""
    return torch.round(values.double(), decimals=6).tolist()
