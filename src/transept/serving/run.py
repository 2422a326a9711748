"""Listening: one socket, loopback unless a key is set; a drain when told to stop (RELIABILITY H-9, E-5)."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from transept.core.errors import InputError
from transept.serving.app import create
from transept.serving.shelf import Served, Settings
from transept.serving.wire import loopback, protocol

ANY = ("0.0.0.0", "::", "")
TURN = 0.0005
"""Seconds after which a thread that wants the interpreter gets it."""
YOUNG = (10_000, 20, 20)
"""New objects, and searches of a generation, after which cycles are looked for: a request makes a thousand objects and hardly a cycle."""


def bound(host: str, port: int, settings: Settings) -> socket.socket:
    """The listening socket. Errors: InputError where others could reach the server without a key, OSError where the port is taken."""
    if not loopback(host) and not settings.keys:
        raise InputError(f"the host {host!r} lets other machines in, and that needs --api-key; 127.0.0.1 is for this machine only")
    if not 0 <= port <= 65535:
        raise InputError(f"a port is a number from 0 to 65535, found {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=settings.limits["connections"])


class Server(uvicorn.Server):
    """uvicorn that lets requests end when told to stop; told twice, it ends them with an error; told three times, it is gone."""

    told = 0

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until told to stop.

        Meanwhile threads take turns ten times as often as Python lets them: an event loop gives the interpreter away with every packet, and
        beside an engine that computes it would wait 5 ms to get it back.
        """
        turn, young = sys.getswitchinterval(), gc.get_threshold()
        sys.setswitchinterval(TURN)
        gc.set_threshold(*YOUNG)
        try:
            super().run(sockets=sockets)
        finally:
            sys.setswitchinterval(turn)
            gc.set_threshold(*young)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        app: FastAPI = self.config.app  # type: ignore[assignment]
        app.state.desk.ready, self.should_exit, self.told = False, True, self.told + 1
        if self.told == 2:
            # Not uvicorn's force_exit: an engine that computes while the interpreter ends brings the process down.
            threading.Thread(target=app.state.desk.shelf.close, daemon=True).start()
        elif self.told > 2:
            os._exit(1)


def server(app: FastAPI) -> Server:
    """The server of an application, not yet running."""
    limits = app.state.desk.limits
    config = uvicorn.Config(
        app, http=protocol(limits), ws="none", lifespan="on", loop="asyncio", log_level="critical", access_log=False, server_header=False,
        proxy_headers=False, timeout_keep_alive=limits["header_seconds"], timeout_graceful_shutdown=limits["drain_seconds"],
        h11_max_incomplete_event_size=limits["header"],
    )  # fmt: skip
    return Server(config)


def serve(settings: Settings, host: str, port: int, *, opened: Callable[[str], None], told: Callable[[Served], None]) -> None:
    """Serves until it is told to stop; `opened` is called with the address, `told` with each model that is loaded."""
    app = create(settings, told)
    with bound(host, port, settings) as sock:
        opened(address(sock))
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        server(app).run(sockets=[sock])


def address(sock: socket.socket) -> str:
    """Where a browser finds a socket."""
    host, port = sock.getsockname()[:2]
    name = "127.0.0.1" if host in ANY else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


class Running:
    """A server in a thread of this process: `with Running(settings) as running: running.address`."""

    def __init__(self, settings: Settings):
        self.app = create(settings)
        self.sock = bound("127.0.0.1", 0, settings)
        self.address = address(self.sock)
        self.server = server(self.app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.sock]}, name="transept-server", daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.app.state.desk.ready and self.thread.is_alive():
            self.thread.join(0.02)
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.sock.close()
