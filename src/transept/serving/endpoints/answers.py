"""POST /v1/answers: the span of a text that answers a question."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.serving.endpoints.encoders import listed
from transept.serving.replies import AnswerReply, documented
from transept.serving.requests import AnswerRequest
from transept.serving.shelf import Served
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/answers", response_model=None, responses=documented(AnswerReply))
async def answers(body: AnswerRequest, request: Request) -> Response:
    """Where the context answers the question: the characters context[start:end]."""

    def work(served: Served, part: list[Any]) -> list[Any]:
        return [asdict(served.model.answer(question, context)) for question, context in part]

    return await listed(request, body.model, "answers", [(body.question, body.context)], work, lambda i, row: row)
