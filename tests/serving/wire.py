"""Requests written by hand on sockets, without any library of models or clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me of the fox"}], "max_tokens": 8, "temperature": 0}


async def talk(
    address: str, body: Any, path: str = "/v1/chat/completions", headers: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """(status, head, rest) of one request on a connection of its own."""
    return await heard(*await sent(address, body, path, headers))


async def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, str, str]:
    """(status, head, rest) of the answer."""
    try:
        raw = (await reader.read()).decode()
    finally:
        writer.close()
    head, _, rest = raw.partition("\r\n\r\n")
    return (int(head.split()[1]) if head else 0), head, rest


async def sent(
    address: str, body: Any, path: str = "/v1/chat/completions", headers: Mapping[str, str] | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which one request was just sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    lines.append(f"Content-Length: {len(data)}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    await writer.drain()
    return reader, writer
