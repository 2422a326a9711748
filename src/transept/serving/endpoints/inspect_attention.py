"""POST /v1/inspect/attention: who looks at whom, by layer and head."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.inspection.attention import kinds, maps, of_kind
from transept.serving.endpoints.inspected import Look, looked, rows
from transept.serving.replies import AttentionReply, documented
from transept.serving.requests import AttentionRequest
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/inspect/attention", response_model=None, responses=documented(AttentionReply))
async def attention(body: AttentionRequest, request: Request) -> Response:
    """The attention weights of one layer and head, or of all; recomputed beside the fused kernels for these heads alone."""

    def work(look: Look) -> dict[str, Any]:
        kind = body.kind or look.kind
        layers = of_kind(look.module, kind)
        queries, keys = look.tokens(kind), look.keys(kind)
        count = sum(1 if body.head is not None else one.heads for one in layers if body.layer in (None, one.index))
        look.desk.limits.check("weights", count * len(queries) * len(keys), "layer")
        found = maps(look.module, look.ids, source=look.source, kind=kind, layer=body.layer, head=body.head)
        told = [
            {"layer": one.layer, "head": one.head, "name": one.name.replace(".weights", ""), "weights": rows(one.weights[0])}
            for one in found
        ]
        return {
            "kind": kind,
            "kinds": kinds(look.module),
            "layers": len(layers),
            "heads": max(one.heads for one in layers),
            "queries": queries,
            "keys": keys,
            "maps": told,
        }

    return await looked(request, body, "attention", work)
