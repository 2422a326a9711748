"""What the encoders' addresses have in common: texts go through in small parts, so that a client that leaves stops the work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from transept.core.errors import InputError
from transept.serving.desk import Desk, aside
from transept.serving.gate import Ticket
from transept.serving.shelf import Served

PART = 16
Texts = Sequence[Any]


def texts(request: Request, given: Any) -> list[Any]:
    """One text or several as a list. Errors: InputError over the limit."""
    many = [given] if isinstance(given, str) else list(given)
    request.app.state.desk.limits.check("inputs", len(many), "input")
    return many


async def listed(
    request: Request, model: str, task: str, many: Texts, work: Callable[[Served, Any], list[Any]], shaped: Callable[[int, Any], Any]
) -> Response:
    """The reply with a row for each input, in order."""
    desk: Desk = request.app.state.desk

    async def run(served: Served, ticket: Ticket) -> dict[str, Any]:
        tokens = await aside(request, served, lambda: counted(served, many))
        ticket.claim(tokens)
        rows: list[Any] = []
        for at in range(0, len(many), PART):
            try:
                rows += await asyncio.to_thread(work, served, many[at : at + PART])
            except InputError as error:
                raise InputError(str(error) + (f" (text 0 is number {at} of the request)" if at else "")) from None
        desk.metrics.tokens.labels(served.book.name, "prompt").inc(tokens)
        return {"object": "list", "model": served.book.name, "data": [shaped(i, row) for i, row in enumerate(rows)],
                "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}}

    return await desk.run(request, model, task, run)


def counted(served: Served, many: Texts) -> int:
    """The tokens of all inputs."""
    pieces = [piece for one in many for piece in ([one] if isinstance(one, str) else one)]
    return sum(len(served.tokenizer.encode(served.text(piece, "input"))) for piece in pieces)
