"""GET /v1/models and /v1/models/{name}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from transept.core.errors import nearest
from transept.serving.desk import Desk
from transept.serving.errors import Refusal
from transept.serving.replies import ModelCard, ModelsReply, documented
from transept.serving.shelf import Book
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


def told(book: Book) -> dict[str, Any]:
    """A model as the API lists it, from its card."""
    return {"id": book.name, "object": "model", "created": book.created, "owned_by": "transept", "tasks": list(book.tasks),
            "context": book.context, "parameters": book.parameters, "bytes": book.cost, "loaded": book.served is not None}


@router.get("/v1/models", response_model=ModelsReply, responses=documented(ModelsReply))
async def models(request: Request) -> Any:
    """The models that may be asked for, loaded or not."""
    desk: Desk = request.app.state.desk
    return {"object": "list", "data": [told(book) for book in desk.shelf.books.values()]}


@router.get("/v1/models/{name:path}", response_model=ModelCard, responses=documented(ModelCard))
async def model(name: str, request: Request) -> Any:
    """One model."""
    books = request.app.state.desk.shelf.books
    if name not in books:
        raise Refusal(404, f"no model is called {name[:80]!r}{nearest(name, books)}", param="model", code="model_not_found")
    return told(books[name])
