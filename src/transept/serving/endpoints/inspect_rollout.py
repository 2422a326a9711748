"""POST /v1/inspect/rollout: how much of each token reaches each token through the layers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.inspection.attention import of_kind, rolled
from transept.serving.endpoints.inspected import Look, looked, rows
from transept.serving.replies import RolloutReply, documented
from transept.serving.requests import RolloutRequest
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/inspect/rollout", response_model=None, responses=documented(RolloutReply))
async def rollout(body: RolloutRequest, request: Request) -> Response:
    """The attention of all layers multiplied (Abnar and Zuidema 2020); of an encoder-decoder, its encoder's where no kind is named."""

    def work(look: Look) -> dict[str, Any]:
        kind = body.kind or ("self" if look.source is None else "encoder")
        layers, tokens = of_kind(look.module, kind), look.tokens(kind)
        look.desk.limits.check("weights", len(tokens) ** 2, "input")
        found = rolled(look.module, look.ids, source=look.source, kind=kind, layer=body.layer)
        return {"kind": kind, "layers": len(layers), "tokens": tokens, "rollout": rows(found[0])}

    return await looked(request, body, "rollout", work)
