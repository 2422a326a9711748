"""`transept serve`, `transept` alone, and `transept --check`."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from transept.core.errors import InputError, TranseptError

if TYPE_CHECKING:
    from transept.serving.shelf import Served, Settings


def options(sub: argparse.ArgumentParser) -> None:
    """The options of `transept serve`."""
    sub.add_argument("models", nargs="*", metavar="MODEL", help="folders, GGUF files, bundled names or hub ids (default: what is pulled)")
    sub.add_argument("--host", default="127.0.0.1", help="another address than loopback needs --api-key")
    sub.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    sub.add_argument("--api-key", action="append", default=[], metavar="KEY", help="what clients must give (or TRANSEPT_API_KEY)")
    sub.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name in the Host header that is served too")
    sub.add_argument("--context", type=int, default=None, metavar="N", help="longest sequence in tokens (default: the model's own)")
    sub.add_argument("--pages", type=int, default=None, metavar="N", help="pages of 16 tokens in each model's cache")
    sub.add_argument("--rows", type=int, default=16, metavar="N", help="sequences that are computed at once")
    sub.add_argument("--memory", type=float, default=None, metavar="GB", help="budget of all models (default: 70 %% of what is free)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    sub.add_argument("--fast", action="store_true", help="activations of 8 bits where the weights are quantised, as llama.cpp computes")
    sub.add_argument("--no-deterministic", action="store_true", help="let an answer's last bits depend on what else is computed")
    sub.add_argument("--limit", action="append", default=[], metavar="NAME=N", help="change one of the server's limits; may be repeated")


def settings(args: argparse.Namespace) -> Settings:
    """What the line asks for. Errors: InputError for a limit that is none, or where no model is named and none is pulled."""
    import torch

    from transept.serving.limits import Limits
    from transept.serving.shelf import Settings

    limits = {}
    for text in args.limit:
        name, _, value = text.partition("=")
        if not value.isdigit():
            raise InputError(f"--limit expects NAME=N with a whole number, found {text!r}")
        limits[name] = int(value)
    models = tuple(args.models) or pulled()
    if not models:
        raise InputError("no model is named and none is pulled; begin with: transept pull smollm2-135m-instruct")
    for name, value in (("context", args.context), ("pages", args.pages), ("rows", args.rows)):
        if value is not None and value < 1:
            raise InputError(f"--{name} should be 1 or more, found {value}")
    own = os.environ.get("TRANSEPT_API_KEY")
    keys = tuple(args.api_key) + ((own,) if own else ())
    if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise InputError("a key should have at least 8 characters, each a letter, digit or sign of ASCII and none a space")
    return Settings(
        models=models, keys=keys, hosts=None if keys and not args.allow_host else (args.host, *args.allow_host), context=args.context,
        pages=args.pages, rows=args.rows, dtype=getattr(torch, args.dtype) if args.dtype else None,
        memory=int(args.memory * 1e9) if args.memory is not None else None, deterministic=not args.no_deterministic, fast=args.fast,
        limits=Limits(limits),
    )  # fmt: skip


def pulled() -> tuple[str, ...]:
    """The bundled models that are on this machine and that some family's page can run."""
    from transept.checkpoints.pull import catalogue, locate
    from transept.core.registry import all_families

    known = {family.name for family in all_families()}
    return tuple(entry.name for entry in catalogue() if entry.architecture in known and locate(entry.name) is not None)


def serve(args: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    from transept.serving.run import serve as listen

    def opened(address: str) -> None:
        print(f"Transept at {address}", flush=True)
        print(f"  the playground is that page in a browser; clients of the OpenAI API take {address}/v1", flush=True)

    listen(settings(args), args.host, args.port, opened=opened, told=_example)
    return 0


def check(args: argparse.Namespace) -> int:
    """One request to each endpoint; 0 if all went well."""
    from transept.serving.check import check as tried

    good = True
    for model, request, ok, found in tried(settings(args)):
        good = good and ok
        print(f"{'ok  ' if ok else 'FAIL'}  {model}  {request}  {found!r}", flush=True)
    return 0 if good else 1


def _example(served: Served) -> None:
    """One real answer of a model that was just loaded, and how long it took."""
    begin = time.perf_counter()
    try:
        found = _asked(served)
    except TranseptError as error:
        found = f"ready, but its example says: {error}"
    print(f"  {served.book.name}: {found} in {1000 * (time.perf_counter() - begin):.0f} ms", flush=True)


def _asked(served: Served) -> str:
    """What the model answers to an example of its first task."""
    m, tasks = served.model, served.book.tasks
    if m.tokenizer is None:
        return "ready, without a tokenizer"
    if "completions" in tasks:
        asked: str = "The capital of France is"
        return repr(asked + m.generate(asked, max_tokens=8).text)
    if "fill" in tasks and m.tokenizer.mask_id is not None:
        text = f"Paris is the {m.tokenizer.token(m.tokenizer.mask_id)} of France."
        return f"{text!r} has {m.fill_mask(text, top=1)[0][0].token!r}"
    if "answers" in tasks:
        return f"'Where is Paris?' finds {m.answer('Where is Paris?', 'Paris is in France.').text!r}"
    if "classifications" in tasks:
        return f"'Paris is beautiful.' is {m.classify('Paris is beautiful.')[0].label!r}"
    if "embeddings" in tasks:
        one, other = m.embed(["Paris is in France.", "France holds Paris."])
        return f"two sentences of the same meaning have the similarity {float(one @ other / (one.norm() * other.norm())):.2f}"
    return "ready"
