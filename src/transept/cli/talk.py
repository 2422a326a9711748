"""`transept generate` and `transept chat`."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transept.cli.progress import told
from transept.compiled import Compiled, load
from transept.core.errors import InputError
from transept.inference.generation import Generation, Piece

if TYPE_CHECKING:
    from transept.door import Model


def generate(args: argparse.Namespace) -> int:
    """Prints the continuation as it comes, or one JSON object."""
    m = _load(args)
    prompt: Any = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.ids:
        prompt = _ids(prompt)
    elif args.chat:
        prompt = m.chat_ids(prompt, args.system)
    options = _options(args)
    if args.beams > 1:
        result = m.generate(prompt, max_tokens=args.max_tokens, beams=args.beams)
        if not args.json:
            print(result.text)
    else:
        result = _show(m.stream(prompt, **options), quiet=args.json)
    if args.json:
        usage = {**vars(result.usage), "prefill_rate": result.usage.prefill_rate, "decode_rate": result.usage.decode_rate}
        record = {
            "text": result.text,
            "ids": result.ids,
            "finish_reason": result.finish_reason,
            "usage": usage,
            "peak_memory_bytes": peak_memory(),
        }
        print(json.dumps(record))
    elif args.stats:
        print(stats(result))
    return 0


def chat(args: argparse.Namespace) -> int:
    """A conversation on the terminal, or over a pipe: one line, one answer."""
    m = _load(args)
    turns: list[dict[str, str]] = [] if args.system is None else [{"role": "system", "content": args.system}]
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        turns.append({"role": "user", "content": line})
        try:
            answer = _show(m.chat(turns, **_options(args)))
        except KeyboardInterrupt:
            turns.pop()
            print()
            continue
        if args.stats:
            print(stats(answer))
        turns.append({"role": "assistant", "content": answer.text})


def stats(result: Generation) -> str:
    """One line: how fast each phase went, and the most memory the process ever held."""
    u = result.usage
    return (
        f"[prefill {u.prompt_tokens} tokens at {u.prefill_rate:.1f} tokens/s"
        f" | decode {u.completion_tokens} tokens at {u.decode_rate:.1f} tokens/s"
        f" | peak memory {peak_memory() / 2**20:.0f} MiB]"
    )


def peak_memory() -> int:
    """The most bytes that this process held at once."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _load(args: argparse.Namespace) -> Model | Compiled:
    from transept.cli.progress import loading

    dtype = None
    if args.dtype:
        import torch

        dtype = getattr(torch, args.dtype)
    with loading(args.model) as progress, told():
        return load(args.model, dtype=dtype, fast=args.fast, progress=progress)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def _ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    for word in words:
        if not word.isdigit():
            raise InputError(f"--ids expects whole numbers, found {word!r}")
    return [int(word) for word in words]


def _show(pieces: Iterator[Piece], quiet: bool = False) -> Generation:
    final = None
    for piece in pieces:
        if not quiet:
            print(piece.text, end="", flush=True)
        final = piece.final
    if not quiet:
        print()
    if final is None:
        raise InputError("the model gave no answer")
    return final
