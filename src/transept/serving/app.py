"""The application: endpoints, errors, and what every request passes through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from transept import __version__
from transept.serving import errors, requests
from transept.serving.desk import Desk
from transept.serving.endpoints import ROUTERS
from transept.serving.gate import Gate
from transept.serving.metrics import Metrics
from transept.serving.pages import Pages
from transept.serving.shelf import Served, Settings, Shelf, warm
from transept.serving.wire import Shield

STATIC = Path(__file__).parent / "static"


def create(settings: Settings, told: Callable[[Served], None] = lambda served: None) -> FastAPI:
    """The ASGI application; loads models when it starts and calls `told` with each. Errors: those of Shelf."""
    desk = Desk(settings, Shelf(settings), Gate(settings.limits, len(settings.keys)), Metrics())

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async def load() -> None:
            await warm(desk.shelf, told)
            desk.ready = any(book.served is not None for book in desk.shelf.books.values())

        loading = asyncio.create_task(load())
        yield
        desk.ready = False
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await asyncio.to_thread(desk.shelf.close)

    # The pages at /docs would come from another machine; nor does an environment variable send what happens here to one.
    app = FastAPI(title="Transept", version=__version__, lifespan=life, docs_url=None, redoc_url=None,
                  telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False})  # fmt: skip
    app.state.desk = desk
    for router in ROUTERS:
        app.include_router(router)
    pages = Pages(STATIC)
    app.mount("/", pages, name="static")
    errors.install(app, requests.NAMES)
    rules = {"limits": settings.limits, "keys": settings.keys, "hosts": settings.hosts, "pages": tuple(pages.files)}
    app.add_middleware(Shield, observe=desk.metrics.observe, full=desk.gate.check, **rules)
    return app
