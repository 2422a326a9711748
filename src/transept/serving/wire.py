"""What stands between the socket and an endpoint: time and size limits, keys, Host and Origin, strict JSON (RELIABILITY H-2, H-8)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import math
import re
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

import h11
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from transept.serving.errors import Refusal, reply, shape
from transept.serving.limits import Limits

OPEN = ("/health", "/ready")
_SURROGATE = re.compile(rb"\\u[dD][89abAB]")


# --- the socket ---


def protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with a deadline for headers and idle connections, and a limit on how many there are."""

    class Guarded(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits["connections"]:
                transport.abort()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.deadline is not None:
                self.deadline.cancel()

        def _watch(self) -> None:
            """A clock runs while no request is being answered; bytes that trickle in do not set it back."""
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self.deadline is None:
                self.deadline = self.loop.call_later(limits["header_seconds"], self.transport.abort)
            elif not idle and self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(shape(400, "this is no HTTP/1.1 request that the server understands")).encode()
            head = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                for event in (h11.Response(status_code=400, headers=head), h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Guarded


# --- every request ---


def loopback(host: str) -> bool:
    """True for names and addresses that reach this machine only."""
    try:
        return host.rstrip(".").lower() == "localhost" or ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def same(given: str, key: str) -> bool:
    """Equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), key.encode("utf-8", "replace"))


class Shield:
    """The outermost layer: who may ask, how long and how much; a fault inside becomes one reply and touches nothing else.

    `hosts` are the names in a Host header that are served beside loopback ones; None allows all, which needs keys. `pages` are the
    addresses that need no key because they hold no secret: the playground's own files. `full` is told who sends work and raises where
    there is no place for it, so that a refusal costs neither the reading of a body nor its checks.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Sequence[str], hosts: Sequence[str] | None, observe: Callable[[Scope, int], None],
        pages: Collection[str] = (), full: Callable[[str], None] = lambda tenant: None,
    ):  # fmt: skip
        self.app, self.limits, self.keys, self.observe, self.full = app, limits, tuple(keys), observe, full
        self.open = frozenset((*OPEN, *pages))
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = [0]

        async def out(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            async with asyncio.timeout(self.limits["send_seconds"]):
                await send(message)

        try:
            self._admit(scope)
            await self.app(scope, self._bounded(receive), out)
        except Exception as error:
            if not status[0]:
                await reply(error)(scope, receive, out)
            elif not isinstance(error, (TimeoutError, OSError)):
                reply(error)
        finally:
            self.observe(scope, status[0])

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self.hosts is not None and not (loopback(name) or name in self.hosts):
            raise Refusal(403, "the Host header names another machine; start the server with --allow-host to serve under that name")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise Refusal(403, "the request comes from a page of another site, and only the server's own pages may call it")
        scope["tenant"] = ""
        if self.keys and scope["path"] not in self.open:
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = [key for key in self.keys if same(given.strip(), key)]
            if kind.lower() != "bearer" or not right:
                sentence = "give the server's key in the header 'Authorization: Bearer KEY'"
                raise Refusal(401, sentence, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            scope["tenant"] = hashlib.sha256(right[0].encode()).hexdigest()[:16]
        if scope["method"] == "POST":
            self.full(scope["tenant"])

    def _bounded(self, receive: Receive) -> Receive:
        most, seconds, seen, over = self.limits["body"], self.limits["body_seconds"], 0, False
        until = asyncio.get_running_loop().time() + seconds

        async def bounded() -> Message:
            nonlocal seen, over
            if over:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, f"the body did not arrive within {seconds} seconds", headers={"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            over = not message.get("more_body", False)
            if seen > most:
                raise Refusal(413, f"the body may have at most {most} bytes", code="body_too_large", headers={"Connection": "close"})
            return message

        return bounded


# --- the body ---


def parse(raw: bytes, depth: int) -> Any:
    """A JSON value; refuses what is no JSON, numbers that are not finite, lone surrogates, and more than `depth` levels."""

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise Refusal(400, f"the body holds the number {text[:20]}, which is not finite", code="invalid_json")
        return value

    def constant(text: str) -> NoReturn:
        raise Refusal(400, f"the body holds {text}, which is no JSON", code="invalid_json")

    try:
        text = raw.decode("utf-8")
        value = json.loads(text, parse_float=number, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start} is wrong", code="invalid_json") from None
    except RecursionError:
        raise Refusal(400, f"the body is nested more than {depth} deep", code="invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not valid JSON: {str(error)[:120]}", code="invalid_json") from None
    level = [value]
    for _ in range(depth + 1):
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        if not level:
            break
    else:
        raise Refusal(400, f"the body is nested more than {depth} deep", code="invalid_json")
    if _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise Refusal(400, "the body holds half of a surrogate pair, which is no character", code="invalid_json") from None
    return value


class Strict(Request):
    """A request whose body is JSON under the limits, parsed away from the event loop where it is large."""

    async def body(self) -> bytes:
        if self.method == "POST":
            kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if self.headers.get("content-encoding", "identity").lower() != "identity":
                raise Refusal(415, "the body is compressed; send it as it is")
            if kind != "application/json":
                raise Refusal(415, f"the body should be application/json, found {kind[:60] or 'no Content-Type'!r}")
        return await super().body()

    async def json(self) -> Any:
        raw, depth = await self.body(), self.app.state.desk.limits["depth"]
        return parse(raw, depth) if len(raw) < 1 << 16 else await asyncio.to_thread(parse, raw, depth)


class Route(APIRoute):
    """A route whose requests are Strict."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def run(request: Request) -> Response:
            return await handler(Strict(request.scope, request.receive))

        return run
