"""POST /v1/classifications: the class of each text or pair of texts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.serving.endpoints.encoders import listed, texts
from transept.serving.replies import ClassificationReply, documented
from transept.serving.requests import ClassificationRequest
from transept.serving.shelf import Served
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/classifications", response_model=None, responses=documented(ClassificationReply))
async def classifications(body: ClassificationRequest, request: Request) -> Response:
    """The likeliest class of each text, and the probability of every class."""

    def work(served: Served, part: list[Any]) -> list[Any]:
        return [asdict(label) for label in served.model.classify([one if isinstance(one, str) else (one[0], one[1]) for one in part])]

    return await listed(request, body.model, "classifications", texts(request, body.input), work, lambda i, row: {"index": i, **row})
