"""POST /v1/fill: the likeliest words for each mask of a text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.serving.endpoints.encoders import listed
from transept.serving.replies import FillReply, documented
from transept.serving.requests import FillRequest
from transept.serving.shelf import Served
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/fill", response_model=None, responses=documented(FillReply))
async def fill(body: FillRequest, request: Request) -> Response:
    """For each mask in the text its likeliest tokens, with the text that each gives."""

    def work(served: Served, part: list[str]) -> list[Any]:
        return [[asdict(one) for one in found] for found in served.model.fill_mask(part[0], top=body.top)]

    return await listed(request, body.model, "fill", [body.input], work, lambda i, row: row)
