"""Who may ask, from where, how much, and in what words (RELIABILITY H-2, H-8, H-9)."""

from __future__ import annotations

import ast
import asyncio
import inspect
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import figures
from tests.counts import FULL, count
from tests.serving import tiny
from transept.core.errors import InputError
from transept.serving import wire
from transept.serving.limits import CEILING, TABLE, Limits
from transept.serving.run import Running, bound
from transept.serving.wire import loopback

pytestmark = pytest.mark.usefixtures("unchecked")
KEYS = ("a-very-secret-key", "another-secret-key")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tiny.settings(tmp_path_factory.mktemp("models"), keys=KEYS, limits={"body": 20_000, "queue": 4})) as server:
        yield server


def routes(running: Running) -> list[tuple[str, str]]:
    """Every operation, from the document of the application itself."""
    paths = running.app.openapi()["paths"]
    return [(method.upper(), path.replace("{name}", "tiny")) for path, found in paths.items() for method in found]


def test_every_address_asks_for_the_key(locked: Running) -> None:
    with httpx.Client(base_url=locked.address) as client:
        others = [("GET", path) for path in ("/openapi.json", "/nowhere", "/main.js/", "/v1/", "/%2e%2e/etc/passwd")]
        for method, path in [*routes(locked), *others]:
            wrong = ("Bearer wrong", f"Basic {KEYS[0]}", KEYS[0], f"Bearer {KEYS[0]}x")
            for headers in ({}, {"x-api-key": KEYS[0]}, *({"authorization": value} for value in wrong)):
                reply = client.request(method, path, headers=headers, params={"api_key": KEYS[0]} if not headers else None)
                if path in ("/health", "/ready"):
                    assert reply.status_code == 200
                else:
                    assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", (method, path, headers)
                    assert reply.json()["error"]["type"] == "authentication_error"
                assert KEYS[0] not in reply.text and "wrong" not in reply.text
        for key in KEYS:
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_the_pages_own_files_need_no_key(locked: Running) -> None:
    """The playground loads and asks for the key itself; its files are those of the repository, the same with and without a key."""
    static = Path(wire.__file__).parent / "static"
    with httpx.Client(base_url=locked.address) as client:
        for path in ("/", *(f"/{file.name}" for file in static.iterdir())):
            reply = client.get(path)
            assert reply.status_code == 200 and reply.content == (static / (path[1:] or "index.html")).read_bytes()
            assert client.get(path, headers={"origin": "http://evil.example"}).status_code == 403
            assert client.post(path, json={}).status_code == 405


def test_keys_are_compared_in_constant_time() -> None:
    """The one comparison is hmac.compare_digest, seen in the syntax and not by a stopwatch."""
    tree = ast.parse(inspect.getsource(wire.same))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "hmac.compare_digest" in calls and not [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [n for n in ast.walk(ast.parse(Path(wire.__file__).read_text())) if isinstance(n, ast.Compare) and "key" in ast.unparse(n)]


HOSTS = ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "LOCALHOST", "localhost."]
FOREIGN = ["evil.example", "localhost.evil.example", "0.0.0.0", "169.254.169.254", "127.0.0.1.nip.io", "[::2]", "", "a b", "[", "::1@evil"]


@pytest.mark.parametrize(("host", "ok"), [(h, True) for h in HOSTS] + [(h, False) for h in FOREIGN])
def test_hosts_and_origins(address: str, host: str, ok: bool) -> None:
    port = address.rpartition(":")[2]
    for suffix in ("", f":{port}"):
        name = host + suffix
        reply = httpx.get(f"{address}/v1/models", headers={"host": name})
        assert reply.status_code == (200 if ok else 403) or reply.status_code == 400, (name, reply.text)
        assert not [h for h in reply.headers if h.startswith("access-control")]
        for origin in ("null", "http://evil.example", f"http://{name}.evil.example", "http://localhost:1", "file://"):
            found = httpx.get(f"{address}/v1/models", headers={"host": name, "origin": origin})
            assert found.status_code in (403, 400) and not [h for h in found.headers if h.startswith("access-control")]
        if ok:
            assert httpx.get(f"{address}/v1/models", headers={"host": name, "origin": f"http://{name}"}).status_code == 200
    preflight = httpx.options(f"{address}/v1/chat/completions", headers={"origin": "http://evil.example"})
    assert preflight.status_code == 403


def test_one_socket_on_loopback(locked: Running) -> None:
    sockets = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    ours = [c for c in sockets if c.laddr.port == locked.sock.getsockname()[1]]
    assert len(ours) == 1 and all(c.laddr.ip == "127.0.0.1" for c in sockets)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_others_are_let_in_only_with_a_key(tmp_path: Path, host: str) -> None:
    assert not loopback(host)
    with pytest.raises(InputError, match="--api-key"):
        bound(host, 0, tiny.settings(tmp_path))


def test_a_port_in_use_is_said(locked: Running, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="in use"):
        bound("127.0.0.1", locked.sock.getsockname()[1], tiny.settings(tmp_path))
    with pytest.raises(InputError, match="70000"):
        bound("127.0.0.1", 70000, tiny.settings(tmp_path))


def test_secrets_and_texts_stay_where_they_belong(
    locked: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Canaries in keys, prompts and headers show up in no log, no metric and no error of another (E-6)."""
    canary, headers = "canary-7f3a", {"authorization": f"Bearer {KEYS[0]}", "x-request-id": "canary-7f3a-id"}
    with httpx.Client(base_url=locked.address, headers=headers, timeout=60) as client:
        said = [{"role": "user", "content": canary}]
        asks: list[Any] = [{**tiny.ASK, "messages": said}, {**tiny.ASK, "model": canary}, {**tiny.ASK, canary: 1}]
        for ask in asks:
            client.post("/v1/chat/completions", json=ask)
        other = client.post("/v1/chat/completions", json=tiny.ASK, headers={"authorization": f"Bearer {KEYS[1]}"})
        metrics = client.get("/metrics").text
    seen = other.text + metrics + caplog.text + "".join(capfd.readouterr())
    assert other.status_code == 200 and not any(secret in seen for secret in (canary, *KEYS))


def test_every_limit_has_a_value_within_its_ceiling() -> None:
    assert len({limit.name for limit in TABLE}) == len(TABLE) and all(0 < limit.default <= limit.ceiling for limit in TABLE)
    assert Limits({"n": 3})["n"] == 3
    for wrong in ({"nn": 3}, {"n": 0}, {"n": CEILING["n"] + 1}):
        with pytest.raises(InputError, match="limit"):
            Limits(wrong)


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b"", "application/json", 400, "no body"),
        (b"[]", "application/json", 400, "body"),
        (b'{"model": "tiny", "n": 1e400}', "application/json", 400, "1e400"),
        (b'{"model": NaN}', "application/json", 400, "NaN"),
        (b'{"model": "\\ud800"}', "application/json", 400, "surrogate"),
        (b'{"model": "\xff"}', "application/json", 400, "UTF-8"),
        (b"\xef\xbb\xbf{}", "application/json", 400, "JSON"),
        (b"[" * 5000, "application/json", 400, "nested"),
        (b"[" * 5000 + b"]" * 5000, "application/json", 400, "nested"),
        (b"{}", "text/plain", 415, "application/json"),
        (b"{}", "", 415, "application/json"),
        (b"x" * 20_001, "application/json", 413, "20000"),
    ],
)
def test_wrong_bodies_get_a_sentence(locked: Running, content: bytes, kind: str, status: int, words: str) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"} | ({"content-type": kind} if kind else {})
    reply = httpx.post(f"{locked.address}/v1/chat/completions", content=content, headers=headers)
    assert reply.status_code == status and words in reply.json()["error"]["message"], reply.text


# --- bytes on the wire ---

GOOD = b'{"model":"tiny","prompt":"fox","max_tokens":1}'


def request(head: bytes = b"", body: bytes = GOOD, line: bytes = b"POST /v1/completions HTTP/1.1", length: bytes | None = None) -> bytes:
    size = b"Content-Length: " + (str(len(body)).encode() if length is None else length) + b"\r\n"
    return line + b"\r\nHost: localhost\r\nContent-Type: application/json\r\n" + head + size + b"\r\n" + body


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
LINES = [b"GET /health HTTP/9.9", b"GET /health", b"PRI * HTTP/2.0", b"BREW /health HTTP/1.1", b"GET  /  HTTP/1.1"]
TARGETS = [b"/%", b"/%ff%fe", b"/..%2f..%2fetc/passwd", b"/v1/models/%00", b"http://evil/ "]


def hostile(rng: random.Random) -> bytes:
    """One request that no client should send."""
    noise = rng.randbytes(rng.randint(1, 60)).replace(b"\n", b" ").replace(b"\r", b" ")
    kinds = [
        lambda: noise + b"\r\n\r\n",
        lambda: request(line=noise + b" / HTTP/1.1"),
        lambda: request(line=b"GET /" + noise + b" HTTP/1.1"),
        lambda: request(line=rng.choice(LINES)),
        lambda: request(b"X: " + noise + b"\r\n"),
        lambda: request(b"X: " + b"a" * rng.choice([30_000, 70_000]) + b"\r\n"),
        lambda: request(b"".join(b"X%d: y\r\n" % i for i in range(rng.choice([100, 5000])))),
        lambda: request(b"X: a\r\n folded\r\n"),
        lambda: request(b"Transfer-Encoding: chunked\r\n"),
        lambda: request(b"Content-Length: 3\r\n"),
        lambda: request(length=rng.choice([b"-1", b"99999999999999999999", b"abc", b"+5", b"0x10", b"1e3"])),
        lambda: CHUNKED + rng.choice([b"FFFFFFFFFFFFFFFFF\r\n", b"-1\r\n", b"zz\r\n", b"5\r\nab"]),
        lambda: CHUNKED + b"1\r\n{\r\n" * 300 + b"0\r\n\r\n",
        lambda: request(b"Expect: 100-continue\r\n"),
        lambda: request(b"Content-Encoding: gzip\r\n", body=b"\x1f\x8b" + noise),
        lambda: request(b"Upgrade: websocket\r\nConnection: Upgrade\r\n"),
        lambda: request(body=bytes(rng.choice(b'{}[]":,0123456789eE+-.truefalsn\\u\x00\xff ') for _ in range(rng.randint(0, 200)))),
        lambda: request(body=mutated(rng, GOOD)),
        lambda: mutated(rng, request()),
        lambda: request() * rng.randint(2, 4),
        lambda: request()[: rng.randint(1, len(request()) - 1)],
        lambda: request(line=b"GET " + rng.choice(TARGETS) + b" HTTP/1.1"),
    ]
    return rng.choice(kinds)()


def mutated(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found))
        found[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    return bytes(found)


async def thrown(port: int, data: bytes, wait: float) -> bytes:
    """Sends the bytes and reads what comes, at most so long; sometimes that is nothing, and the connection is cut."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = b""
    try:
        writer.write(data)
        async with asyncio.timeout(wait):
            await writer.drain()
            found = await reader.read(200)
    except (TimeoutError, OSError):
        pass
    finally:
        writer.transport.abort()
    return found


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_hostile_bytes_kill_nothing(running: Running, address: str) -> None:
    """Random hostile requests, eight at a time: none gets a 5xx, the server lives, and /health answers meanwhile."""
    port, number, rng, late = running.sock.getsockname()[1], count(50_000) if FULL else 1500, random.Random(0), []
    begin, done = time.monotonic(), threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not done.wait(0.05):
                start = time.monotonic()
                assert client.get("/health").status_code == 200
                late.append(time.monotonic() - start)

    async def all_of_them() -> int:
        failed, left = 0, iter(range(number))

        async def worker() -> None:
            nonlocal failed
            for _ in left:
                found = await thrown(port, hostile(rng), rng.choice([0.0, 0.01, 0.3]))
                failed += found.startswith(b"HTTP/1.1 5")

        await asyncio.gather(*(worker() for _ in range(8)))
        return failed

    watcher = threading.Thread(target=watch)
    watcher.start()
    failed = asyncio.run(all_of_them())
    done.set()
    watcher.join()
    late.sort()
    figures.record("H-2 hostile bytes", n_tried=number, n_ok=number - failed, n_bad=failed, worst_ms=1000 * late[int(0.99 * len(late))],
                   seconds=time.monotonic() - begin, seed=0)  # fmt: skip
    assert failed == 0 and late
    assert tiny.post(address).status_code == 200


def test_slow_senders_are_cut(tmp_path: Path) -> None:
    """Headers and bodies that trickle in, and connections that say nothing, end at their deadlines; a good request does not notice."""
    limits = {"header_seconds": 1, "body_seconds": 1}
    with Running(tiny.settings(tmp_path, limits=limits)) as server:
        head, idle, body = (socket.create_connection(("127.0.0.1", server.sock.getsockname()[1])) for _ in range(3))
        body.sendall(request(length=b"1000"))
        for letter in b"GET /health":
            try:
                head.sendall(bytes([letter]))
            except OSError:
                break
            time.sleep(0.15)
        assert tiny.post(server.address).status_code == 200
        for sock in (head, idle, body):
            sock.settimeout(20)
        assert ended(head) == b"" and ended(idle) == b""
        assert b" 408 " in ended(body)
        tiny.settle(server.app)


def ended(sock: socket.socket) -> bytes:
    """What comes until the connection ends."""
    found = b""
    with sock:
        try:
            while piece := sock.recv(4096):
                found += piece
        except ConnectionResetError:
            pass
    return found
