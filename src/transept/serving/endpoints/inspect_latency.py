"""POST /v1/inspect/latency: where the time of one forward pass goes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.inspection.latency import breakdown
from transept.serving.endpoints.inspected import Look, looked
from transept.serving.replies import LatencyReply, documented
from transept.serving.requests import LatencyRequest
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/inspect/latency", response_model=None, responses=documented(LatencyReply))
async def latency(body: LatencyRequest, request: Request) -> Response:
    """The seconds of qkv, scores, softmax, reshape, feed-forward and the other parts, beside whatever else the server computes now."""

    def work(look: Look) -> dict[str, Any]:
        found = breakdown(look.module, look.ids, source=look.source, runs=body.runs)
        shares = found.shares()
        parts = [{"part": part, "seconds": took, "share": shares[part]} for part, took in found.parts.items()]
        return {"runs": body.runs, "seconds": found.seconds, "apart": found.apart, "parts": parts}

    return await looked(request, body, "latency", work)
