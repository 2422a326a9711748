"""Many clients at once: `transept serve` beside llama.cpp's servers, on the same file, over HTTP, streaming.

    python benchmarks/load.py [--clients 16] [--requests 2] [--rounds 3] [--files Q4_1 Q8_0]

Each client sends one request after the other; conversations differ, so no answer comes out of a cache. All servers are up and take
turns, so that a slow moment of the machine hits all alike. "tokens/s" are the answers' tokens as each server counts them, over the
seconds from the first request to the last byte; "first token" is the time to the first event that holds text. `transept serve --fast`
computes as llama.cpp does, with activations of 8 bits where the weights are quantised; without it activations stay in float32. llama.cpp's
own server is the program `llama-server` (on the path, or $LLAMA_SERVER); `llama_cpp.server` is that of llama-cpp-python, one request at a
time. What is not there is left out and said.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from decode import files

WORDS = ("river lantern winter harbour violin garden engine letter mountain clock bridge orchard teacher storm village painter castle "
         "sparrow market island mirror forest captain candle railway desert").split()  # fmt: skip
ASKS = ("Write a short story about", "Explain to a child", "Give three facts about", "What would you say of", "Write a letter about")
CONTEXT = 1024
OURS, PEER = "transept serve --fast", "llama-server"


def messages(seed: int) -> list[dict[str, str]]:
    """A conversation of its own for each request: 40 to 220 tokens."""
    rng = random.Random(seed)
    chosen = [rng.choices(WORDS, k=3) for _ in range(rng.randrange(1, 16))]
    sentences = [f"The {a} of the {b} was near the {c}." for a, b, c in chosen]
    asked = f"{rng.choice(ASKS)} the {rng.choice(WORDS)} and the {rng.choice(WORDS)} number {seed}."
    return [{"role": "user", "content": " ".join([*sentences, asked])}]


@dataclass
class Round:
    """What one round of all clients came to."""

    tokens: int = 0
    prompt: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)


@dataclass
class Server:
    """One server with one file, waiting in its own process."""

    name: str
    command: list[str]
    port: int
    env: dict[str, str]
    once: bool = False
    model: str = ""
    rounds: list[Round] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Errors: RuntimeError where it ends or is not ready within two minutes."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **self.env})
        until, address = time.monotonic() + 120, f"http://127.0.0.1:{self.port}/v1/models"
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(address, timeout=5) as reply:
                self.model = json.load(reply)["data"][0]["id"]
                asyncio.run(self.work(1, 1, 4, -1))
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} did not come up: {' '.join(self.command)}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def one(self, seed: int, tokens: int, into: Round) -> None:
        """One request; reads the stream as it comes."""
        body = {"model": self.model, "messages": messages(seed), "max_tokens": tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        begin, first, usage, pieces = time.perf_counter(), 0.0, b"", 0
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)
        status = await reader.readline()
        async for line in reader:
            if not first and line.startswith(b"data: {") and any(c["delta"].get("content") for c in json.loads(line[6:])["choices"]):
                first = time.perf_counter() - begin
            pieces += line.startswith(b"data: {")
            if b'"usage":{' in line or b'"usage": {' in line:
                usage = line
        writer.close()
        if b" 200 " not in status or not first:
            raise RuntimeError(f"{self.name} answered {status!r} and no text")
        # A server that tells no usage sends its first event without text, one for each token, and one for the end.
        told = json.loads(usage[6:])["usage"] if usage else {"completion_tokens": pieces - 2, "prompt_tokens": 0}
        into.tokens += told["completion_tokens"]
        into.prompt += told["prompt_tokens"]
        into.first.append(first)

    async def work(self, clients: int, requests: int, tokens: int, turn: int) -> Round:
        """All clients, each with its requests one after the other."""
        found, begin = Round(), time.perf_counter()

        async def client(number: int) -> None:
            for i in range(requests):
                await self.one(1_000_000 * turn + 1000 * number + i, tokens, found)

        await asyncio.gather(*(client(number) for number in range(clients)))
        found.seconds = time.perf_counter() - begin
        return found


def free() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def servers(path: Path, clients: int, threads: int) -> Iterator[Server]:
    """All servers that are there, for one file."""
    ours = [sys.executable, "-m", "transept.cli.main", "serve", str(path), "--rows", str(clients), "--context", str(CONTEXT)]
    env = {"TRANSEPT_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    for name, more in ((OURS, ["--fast"]), ("transept serve", [])):
        port = free()
        yield Server(name, [*ours, "--pages", str(clients * CONTEXT // 16), "--port", str(port), *more], port, env)
    common = ["--host", "127.0.0.1", "--port"]
    program = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if program:
        port = free()
        room = ["-np", str(clients), "-c", str(clients * CONTEXT), "-cb", "-t", str(threads), "-tb", str(threads)]
        yield Server(PEER, [program, "-m", str(path), *room, *common, str(port)], port, {})
    else:
        print("llama-server is not on the path, and $LLAMA_SERVER names none: left out")
    if importlib.util.find_spec("llama_cpp"):
        port = free()
        line = [sys.executable, "-W", "ignore", "-m", "llama_cpp.server", "--model", str(path), "--n_ctx", str(CONTEXT)]
        line += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--interrupt_requests", "False", *common, str(port)]
        # One request at a time takes so long that it does the first round only.
        yield Server("llama_cpp.server", line, port, {}, once=True)
    else:
        print("llama_cpp is not installed: its server is left out")


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(tried: list[Server], json_lines: bool, kind: str) -> None:
    """A line for each server, and the ratios of the rounds that two of them have in common."""
    rate = {s.name: [r.tokens / r.seconds for r in s.rounds] for s in tried}
    wait = {s.name: [t for r in s.rounds for t in r.first] for s in tried}
    for s in tried:
        speeds, first = rate[s.name], wait[s.name]
        prompt, told = statistics.mean(r.prompt for r in s.rounds), statistics.mean(r.tokens for r in s.rounds)
        print(f"  {s.name:<24} {statistics.median(speeds):7.1f} tokens/s ({min(speeds):.1f} to {max(speeds):.1f})   first token "
              f"p50 {percentile(first, 0.5):.2f} s, p99 {percentile(first, 0.99):.2f} s   {prompt:.0f} tokens in, {told:.0f} out")
    for name in [n for n in rate if not n.startswith("transept")]:
        for own in [n for n in rate if n.startswith("transept")]:
            pairs = [a / b for a, b in zip(rate[own], rate[name], strict=False)]
            late = [percentile(wait[own], share) / percentile(wait[name], share) for share in (0.99, 0.5)]
            print(f"  {own} beside {name}: {statistics.median(pairs):.2f}x tokens/s ({min(pairs):.2f} to {max(pairs):.2f}), "
                  f"first token after {late[0]:.2f}x its time at p99, {late[1]:.2f}x at p50")
    if json_lines:
        print(json.dumps({"file": kind, "rate": rate, "p50": {n: percentile(v, 0.5) for n, v in wait.items()},
                          "p99": {n: percentile(v, 0.99) for n, v in wait.items()}}))  # fmt: skip


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--files", nargs="+", default=["Q4_1", "Q8_0"], help="storage types of the bundled model")
    parse.add_argument("--clients", type=int, default=16)
    parse.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parse.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parse.add_argument("--only", nargs="+", help="servers whose names begin so")
    parse.add_argument("--json", action="store_true")
    chosen = parse.parse_args()
    print(f"{chosen.clients} clients, each {chosen.requests} requests of at most {chosen.tokens} tokens a round, {chosen.rounds} rounds, "
          f"{chosen.threads} threads; clients and servers share the cores")
    for kind in chosen.files:
        tried: list[Server] = []
        try:
            for server in servers(files()[kind], chosen.clients, chosen.threads):
                if chosen.only is None or server.name.startswith(tuple(chosen.only)):
                    tried.append(server)
                    server.start()
            for turn in range(chosen.rounds):
                for server in (s for s in (tried if turn % 2 == 0 else tried[::-1]) if not (turn and s.once)):
                    server.rounds.append(asyncio.run(server.work(chosen.clients, chosen.requests, chosen.tokens, turn)))
            print(f"SmolLM2-135M-Instruct {kind}:")
            report(tried, chosen.json, kind)
        finally:
            for server in tried:
                server.stop()


if __name__ == "__main__":
    main()
