"""Every refusal and fault in the error shape of the OpenAI API: one helpful sentence, never a stack trace."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from transept.core.errors import InputError, SourceError, TemplateError, TokenizerError, TranseptError, nearest
from transept.inference.engine import Busy

log = logging.getLogger("transept.serving")

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error",
         503: "overloaded_error", 504: "timeout_error"}  # fmt: skip


class ErrorBody(BaseModel):
    """What went wrong: a sentence, its kind, and the field that it is about."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The reply to a request that failed."""

    error: ErrorBody


class Refusal(HTTPException):
    """A request is not served, for a reason that its sender can act on."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code


def shape(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused(error: BaseException) -> Refusal:
    """What a sender is told of an error; faults of the server get an id that its log repeats with the trace."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        sentence = {404: "there is no such address here; /openapi.json lists them", 405: "this address does not take this method"}
        return Refusal(error.status_code, sentence.get(error.status_code, str(error.detail)), headers=error.headers)
    if isinstance(error, Busy):
        return Refusal(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, (InputError, TokenizerError, TemplateError, SourceError)):
        param = str(error).partition(":")[0] if str(error).partition(":")[0].replace("_", "a").replace(".", "a").isalnum() else None
        code = "context_length_exceeded" if "context is" in str(error) else None
        return Refusal(404 if isinstance(error, SourceError) else 400, str(error), param=param, code=code)
    id = uuid.uuid4().hex[:12]
    log.error("error %s", id, exc_info=error)
    what = str(error) if isinstance(error, TranseptError) else "something went wrong inside the server"
    return Refusal(500, f"{what}; the server's log says more under error {id}", code=id)


def reply(error: BaseException) -> Response:
    """The error as a response."""
    r = refused(error)
    return JSONResponse(shape(r.status_code, str(r.detail), r.param, r.code), r.status_code, headers=r.headers)


def describe(error: RequestValidationError, names: frozenset[str]) -> Refusal:
    """One sentence about the first field that is wrong; `names` are the fields that requests may have."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "path")]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"{param}: this field is unknown here{nearest(where[-1], names)}", param=param, code="unknown_field")
    if first["type"] == "missing" and param is None:
        return Refusal(400, "the request has no body: send a JSON object", code="missing_body")
    try:
        found = json.dumps(first.get("input"), ensure_ascii=True, default=str)
    except (ValueError, RecursionError):
        found = type(first.get("input")).__name__
    found = found if len(found) <= 60 else found[:57] + "..."
    words = first["msg"][:1].lower() + first["msg"][1:300]
    what = words if first["type"] == "missing" else f"{words}, found {found}"
    return Refusal(400, f"{param or 'the body'}: {what}", param=param, code=first["type"])


def install(app: FastAPI, names: frozenset[str]) -> None:
    """Gives the application its error replies."""

    async def answer(request: Request, error: Exception) -> Response:
        return reply(error)

    async def invalid(request: Request, error: Exception) -> Response:
        return reply(describe(error, names)) if isinstance(error, RequestValidationError) else reply(error)

    for kind in (HTTPException, TranseptError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, invalid)
