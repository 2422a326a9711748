"""POST /v1/inspect/lens: what the model would answer after each layer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.inspection.lens import Depth, lens
from transept.serving.endpoints.inspected import Look, guesses, looked, numbers
from transept.serving.replies import LensReply, documented
from transept.serving.requests import LensRequest
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/inspect/lens", response_model=None, responses=documented(LensReply))
async def through(body: LensRequest, request: Request) -> Response:
    """The logit lens: the head's guesses from the stream after each layer, at the last positions."""

    def work(look: Look) -> dict[str, Any]:
        def told(depth: Depth) -> dict[str, Any]:
            words = [guesses(look.served, logits, body.top) for logits in depth.logits[0]]
            return {"layer": depth.layer, "name": depth.name, "guesses": words, "entropy": numbers(depth.entropy()[0])}

        tokens = look.tokens()
        at = [*range(len(tokens))][-body.last :]
        layers = [told(depth) for depth in lens(look.module, look.ids, source=look.source, last=body.last)]
        return {"tokens": [tokens[i] for i in at], "at": at, "layers": layers}

    return await looked(request, body, "lens", work)
