"""POST /v1/inspect/positions: how alike the model holds two positions."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.inspection.positions import similarity
from transept.serving.desk import Desk
from transept.serving.endpoints.inspected import rows, told
from transept.serving.gate import Ticket
from transept.serving.replies import PositionsReply, documented
from transept.serving.requests import PositionsRequest
from transept.serving.shelf import Served
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/inspect/positions", response_model=None, responses=documented(PositionsReply))
async def positions(body: PositionsRequest, request: Request) -> Response:
    """The similarity of the first positions, learned, computed, turned or added to the scores."""
    desk: Desk = request.app.state.desk

    def work(served: Served) -> dict[str, Any]:
        found = similarity(served.model.look(), body.count)
        return {"kind": found.kind, "told": found.told, "count": len(found.matrix), "similarity": rows(found.matrix)}

    async def run(served: Served, ticket: Ticket) -> dict[str, Any]:
        return told(served.book.name, "positions", 0, await asyncio.to_thread(work, served))

    return await desk.run(request, body.model, "inspect", run)
