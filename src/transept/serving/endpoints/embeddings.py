"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.core.errors import InputError
from transept.serving.endpoints.encoders import listed, texts
from transept.serving.replies import EmbeddingReply, documented
from transept.serving.requests import EmbeddingRequest
from transept.serving.shelf import Served
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/embeddings", response_model=None, responses=documented(EmbeddingReply))
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """A vector for each text, pooled and normalised as the model declares."""
    many = texts(request, body.input)

    def work(served: Served, part: list[str]) -> list[Any]:
        vectors = served.model.embed(part).float().cpu()
        if body.dimensions is not None and body.dimensions != vectors.shape[1]:
            raise InputError(f"dimensions: this model's vectors have {vectors.shape[1]} numbers and are not cut to {body.dimensions}")
        if body.encoding_format == "base64":
            return [base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() for vector in vectors]
        return vectors.tolist()

    def shaped(i: int, vector: Any) -> dict[str, Any]:
        return {"object": "embedding", "index": i, "embedding": vector}

    return await listed(request, body.model, "embeddings", many, work, shaped)
