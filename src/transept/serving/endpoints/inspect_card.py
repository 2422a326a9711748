"""POST /v1/inspect/card: what a model costs, and what of it can be looked into; nothing is loaded."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from transept.inspection.attention import kinds, of_kind
from transept.inspection.card import card
from transept.inspection.sites import patterns
from transept.serving.desk import Desk
from transept.serving.endpoints.inspected import told
from transept.serving.replies import CardReply, documented
from transept.serving.requests import CardRequest
from transept.serving.shelf import Book
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/inspect/card", response_model=None, responses=documented(CardReply))
async def costs(body: CardRequest, request: Request) -> Response:
    """Parameters, operations and cache bytes, the kinds of attention, and the names that `transept.watch` takes."""
    desk: Desk = request.app.state.desk
    ticket = desk.gate.enter(request.scope.get("tenant", ""))
    try:
        book = desk.shelf.find(body.model, "inspect")
        return JSONResponse(told(book.name, "card", 0, await asyncio.to_thread(counted, book, body.length)))
    finally:
        ticket.close()


def counted(book: Book, length: int | None) -> dict[str, Any]:
    """The card of a model for so many tokens."""
    model = book.source.empty()
    c = card(model, book.source.spec, book.source.family.name)
    length = length or min(c.context or 1024, 1024)
    found = {kind: of_kind(model, kind) for kind in kinds(model)}
    return {
        "family": c.family, "parameters": c.parameters, "active": c.active, "groups": c.groups, "context": book.context, "length": length,
        "flops": c.flops(length), "attention_flops": 2 * length * length * c.attention, "cache_bytes": c.cache_bytes(length),
        "cache_bytes_per_token": c.cache_bytes(1), "kinds": [*found], "layers": {kind: len(all) for kind, all in found.items()},
        "heads": {kind: max(one.heads for one in all) for kind, all in found.items()}, "names": patterns(model),
    }  # fmt: skip
