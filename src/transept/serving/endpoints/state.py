"""GET /health, /ready and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from transept.serving.desk import Desk
from transept.serving.replies import documented
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


class State(BaseModel):
    status: str


@router.get("/health", response_model=State, responses=documented(State))
async def health() -> Any:
    """The process lives and its event loop turns."""
    return {"status": "ok"}


@router.get("/ready", response_model=None, responses={**documented(State), 503: {"model": State}})
async def ready(request: Request) -> Response:
    """200 when requests are served; 503 while models are loaded and while the server ends."""
    desk: Desk = request.app.state.desk
    return JSONResponse({"status": "ready" if desk.ready else "not ready"}, 200 if desk.ready else 503)


@router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
async def metrics(request: Request) -> Response:
    """Counts and sizes for Prometheus."""
    desk: Desk = request.app.state.desk
    return Response(desk.metrics.text(desk.sizes), media_type=CONTENT_TYPE_LATEST)
