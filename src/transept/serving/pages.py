"""The playground's files: held in memory, told apart by their content, and allowed to reach nothing but this server."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
OWN = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
HEADERS = {
    "Content-Security-Policy": f"{OWN}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # A browser keeps a file and asks whether it is still the same, so that a new version is seen at once.
    "Cache-Control": "no-cache",
}


class Pages:
    """Serves the files of one folder by name, `index.html` at `/`. Files of other kinds than KINDS are left out."""

    def __init__(self, folder: Path):
        held = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in KINDS}
        self.files = {f"/{name}": (KINDS[Path(name).suffix], data, tag(data)) for name, data in held.items()}
        self.files["/"] = self.files["/index.html"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self.files:
            raise HTTPException(404)
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"Allow": "GET, HEAD"})
        kind, data, etag = self.files[scope["path"]]
        known = [one.strip().removeprefix("W/") for one in Request(scope).headers.get("if-none-match", "").split(",")]
        headers = {**HEADERS, "ETag": etag}
        response = Response(status_code=304, headers=headers) if etag in known else Response(data, headers=headers, media_type=kind)
        await response(scope, receive, send)


def tag(data: bytes) -> str:
    """The ETag of a content."""
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'
