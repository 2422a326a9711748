"""The libraries that the benchmarks measure, each in a process of its own, so that no one's waiting threads stand in another's way.

    python benchmarks/peers.py NAME MODEL.gguf THREADS

reads one JSON command a line, answers with one JSON line, and sleeps in between. Commands: decode (a prompt of `context` tokens, then
`tokens` new ones, greedily: seconds per token), prefill (`context` tokens: seconds to the logits behind the last), batch (`rows` prompts
of `context` tokens, then `tokens` new ones each: seconds per token of all rows together), read (the memory's GB/s).
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Measure = Callable[..., float]


def prompt(length: int, seed: int = 0, vocab: int = 40_000) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(1000, vocab, length).tolist()


class Ours:
    """The library as its users call it; `exact` keeps activations in float32, else they meet quantised weights in 8 bits."""

    def __init__(self, path: str, threads: int, exact: bool = False):
        os.environ["TRANSEPT_THREADS"] = str(threads)
        from transept.door import load

        self.threads = threads
        self.m = load(path, fast=not exact)
        self.engine: Any = None
        self.prompts = 0

    def decode(self, context: int, tokens: int) -> float:
        # The prompt is the same each time, so from the second round on its keys and values lie in the prefix cache.
        usage = self.m.generate(prompt(context), max_tokens=tokens + 1, ignore_end=True).usage
        return usage.decode_seconds / tokens

    def prefill(self, context: int) -> float:
        self.prompts += 1
        # Each time another prompt: none of it may lie in the prefix cache.
        ids = prompt(context, self.prompts)
        began = time.perf_counter()
        next(iter(self.m.stream(ids, max_tokens=1, ignore_end=True)))
        return time.perf_counter() - began

    def batch(self, rows: int, context: int, tokens: int) -> float:
        from transept.inference.engine import Ask, Engine, Limits

        if self.engine is None:
            limits = Limits(pages=1024, page=16, rows=rows, budget=rows + 256)
            self.engine = Engine(self.m.runner(1024), context=2048, limits=limits, drafter=None)
        asks = lambda n: [Ask(prompt=tuple(prompt(context, i)), max_tokens=n) for i in range(rows)]  # noqa: E731
        seconds = []
        for n in (1, tokens + 1):
            began = time.perf_counter()
            self.engine.run(asks(n))
            seconds.append(time.perf_counter() - began)
        return (seconds[1] - seconds[0]) / (tokens * rows)

    def read(self) -> float:
        from transept import native
        from transept.native.library import library

        team, words = native.Team(self.threads), np.ones(1 << 25, np.uint64)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            library().transept_read(team.handle, words.ctypes.data, words.size)
            times.append(time.perf_counter() - began)
        return words.nbytes / min(times) / 1e9


class LlamaCpp:
    """llama.cpp through the thin low-level calls of llama-cpp-python; the next token is the largest logit."""

    def __init__(self, path: str, threads: int):
        import llama_cpp

        self.lib = llama_cpp
        self.llm = llama_cpp.Llama(path, n_ctx=8192, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.ctx, self.vocab, self.threads, self.path = self.llm._ctx.ctx, self.llm.n_vocab(), threads, path
        self.room = llama_cpp.llama_batch_init(512, 0, 1)
        self.many: Any = None
        self.held = 0

    def step(self, ctx: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decodes rows of (token, position, sequence, whether its logits are wanted)."""
        room = self.room
        room.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            room.token[i], room.pos[i], room.n_seq_id[i], room.logits[i] = token, position, 1, wanted
            room.seq_id[i][0] = sequence
        if self.lib.llama_decode(ctx, room):
            raise RuntimeError("llama_decode failed")

    def best(self, ctx: Any, i: int) -> int:
        pointer = self.lib.llama_get_logits_ith(ctx, i)
        return int(np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab,)).argmax())

    def clear(self, ctx: Any) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(ctx), True)

    def fill(self, ctx: Any, ids: Sequence[int], sequence: int = 0) -> int:
        for at in range(0, len(ids), 512):
            part = ids[at : at + 512]
            self.step(ctx, [(t, at + i, sequence, at + i + 1 == len(ids)) for i, t in enumerate(part)])
        return self.best(ctx, -1)

    def decode(self, context: int, tokens: int) -> float:
        ids = prompt(context)
        if self.held == context:
            # What was filled in before stays; the tokens behind it go, and the last of the prompt is computed for its logits.
            self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.ctx), 0, context - 1, -1)
            self.step(self.ctx, [(ids[-1], context - 1, 0, True)])
            token = self.best(self.ctx, -1)
        else:
            self.clear(self.ctx)
            token, self.held = self.fill(self.ctx, ids), context
        began = time.perf_counter()
        for i in range(tokens):
            self.step(self.ctx, [(token, context + i, 0, True)])
            token = self.best(self.ctx, -1)
        return (time.perf_counter() - began) / tokens

    def prefill(self, context: int) -> float:
        self.clear(self.ctx)
        self.held = 0
        began = time.perf_counter()
        self.fill(self.ctx, prompt(context))
        return time.perf_counter() - began

    def batch(self, rows: int, context: int, tokens: int) -> float:
        if self.many is None:
            p = self.lib.llama_context_default_params()
            p.n_ctx, p.n_batch, p.n_seq_max, p.n_threads, p.n_threads_batch = 8192, 512, rows, self.threads, self.threads
            self.many = self.lib.llama_init_from_model(self.llm._model.model, p)
        self.clear(self.many)
        latest = [self.fill(self.many, prompt(context, i), i) for i in range(rows)]
        began = time.perf_counter()
        for n in range(tokens):
            self.step(self.many, [(latest[i], context + n, i, True) for i in range(rows)])
            latest = [self.best(self.many, i) for i in range(rows)]
        return (time.perf_counter() - began) / (tokens * rows)


class Transformers:
    """transformers, from the same file, in float32 or bfloat16."""

    def __init__(self, path: str, threads: int, dtype: str):
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        file = Path(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=getattr(torch, dtype)
        ).eval()
        self.held: dict[tuple[int, int], Any] = {}

    def _run(self, rows: int, context: int, tokens: int) -> tuple[float, float]:
        """(seconds of the prompts, seconds of the steps after them)"""
        torch = self.torch
        ids = torch.tensor([prompt(context, i) for i in range(rows)])
        began = time.perf_counter()
        if tokens and (rows, context) in self.held:
            # What was filled in before stays; the last token of the prompt is computed for its logits.
            past = self.held[rows, context]
            past.crop(context - 1 - past.get_seq_length())
            out = self.model(ids[:, -1:], past_key_values=past, use_cache=True)
        else:
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            self.held = {(rows, context): out.past_key_values} if tokens else {}
        first = time.perf_counter()
        for _ in range(tokens):
            ids, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            out = self.model(ids, past_key_values=past, use_cache=True)
        return first - began, time.perf_counter() - first

    def decode(self, context: int, tokens: int) -> float:
        return self._run(1, context, tokens)[1] / tokens

    def prefill(self, context: int) -> float:
        return self._run(1, context, 0)[0]

    def batch(self, rows: int, context: int, tokens: int) -> float:
        return self._run(rows, context, tokens)[1] / (tokens * rows)


MAKERS: dict[str, Callable[[str, int], Any]] = {
    "transept": Ours,
    "transept exact": lambda path, threads: Ours(path, threads, exact=True),
    "llama.cpp": LlamaCpp,
    "transformers fp32": lambda path, threads: Transformers(path, threads, "float32"),
    "transformers bf16": lambda path, threads: Transformers(path, threads, "bfloat16"),
}


class Peer:
    """One library with one file, waiting in its own process."""

    def __init__(self, name: str, path: Path, threads: int):
        self.name, self.path = name, path
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, __file__, name, str(path), str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes, text=True, env=env)
        self.answer()

    def answer(self) -> float:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"{self.name} with {self.path.name} ended: is it installed?")
        return float(json.loads(line)["value"])

    def ask(self, do: str, **how: int) -> float:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": do, **how}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def rounds(peers: dict[str, Peer], count: int, do: str, **how: int) -> dict[str, list[float]]:
    """`count` interleaved rounds of one measurement, after one that does not count."""
    seconds: dict[str, list[float]] = {label: [] for label in peers}
    for n in range(count + 1):
        for label, peer in peers.items():
            value = peer.ask(do, **how)
            if n:
                seconds[label].append(value)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lowest, highest)"""
    return statistics.median(values), min(values), max(values)


def main() -> None:
    name, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    replies, sys.stdout = sys.stdout, sys.stderr
    peer = MAKERS[name](path, threads)
    print(json.dumps({"value": 0}), file=replies, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps({"value": getattr(peer, command.pop("do"))(**command)}), file=replies, flush=True)


if __name__ == "__main__":
    main()
