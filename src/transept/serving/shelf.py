"""The models of one process: described before a byte of their weights is read, loaded when asked for, within one budget of memory."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transept import __version__
from transept.blocks.encoder import Encoder, MaskedHead, PretrainHead, RowHead, SpanHead
from transept.blocks.seq2seq import EncoderDecoder
from transept.blocks.stack import Decoder
from transept.checkpoints.load import Source, describe
from transept.core.errors import InputError, TokenizerError, TranseptError, nearest
from transept.data.text.tokenizer import Tokenizer
from transept.door import Model, load
from transept.inference.engine import AsyncEngine, Engine, GrammarCompiler
from transept.inference.engine import Limits as Sizes
from transept.inspection.card import card
from transept.serving.errors import Refusal
from transept.serving.limits import Limits

log = logging.getLogger("transept.serving")
PAGE = 16
ROOM = 8192
"""Tokens of cache beside what one whole context needs."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operator decides. `pages` of 16 tokens and `context` hold for every model; `memory` is the budget in bytes; `fast` lets
    quantised weights meet activations of 8 bits.
    """

    models: tuple[str, ...]
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = ()
    context: int | None = None
    pages: int | None = None
    rows: int = 16
    dtype: torch.dtype | None = None
    memory: int | None = None
    deterministic: bool = True
    fast: bool = False
    limits: Limits = field(default_factory=Limits)


class Served:
    """A loaded model, with an engine where it generates."""

    def __init__(self, book: Book, model: Model, settings: Settings):
        self.book, self.model, self.settings = book, model, settings
        self.engine: AsyncEngine | None = None
        self.lock = threading.Lock()
        self.compiler: GrammarCompiler | None = None
        self.slow = 0
        if "completions" in book.tasks:
            stream = None if model.tokenizer is None else model.tokenizer.stream
            engine = Engine(model.runner(book.pages), context=book.context, limits=Sizes(pages=book.pages, page=PAGE, rows=settings.rows),
                            deterministic=settings.deterministic, tokenizer=stream)
            self.engine = AsyncEngine(engine, queue_size=settings.limits["queue"] * settings.limits["prompts"])

    @property
    def tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            raise TokenizerError(f"the model {self.book.name!r} has no tokenizer: put a tokenizer.json beside its weights")
        return self.model.tokenizer

    def text(self, text: str, param: str) -> str:
        """The text, if a prompt within the context could be so long."""
        if self.book.context is not None and len(text) > self.settings.limits["text"] * self.book.context:
            most = self.settings.limits["text"] * self.book.context
            raise InputError(f"{param}: the text has {len(text)} characters; with a context of {self.book.context} tokens {most} are read")
        return text

    def grammars(self) -> GrammarCompiler:
        """The compiler for this vocabulary, made when first asked for; not on the event loop."""
        with self.lock:
            if self.compiler is None:
                self.compiler = GrammarCompiler(self.tokenizer.source, self.model.ends, getattr(self.model.spec, "vocab", None))
            return self.compiler


@dataclass
class Book:
    """One model on the shelf; `cost` is what it takes in memory, with its cache."""

    name: str
    source: Source
    tasks: tuple[str, ...]
    context: int | None
    pages: int
    parameters: int
    cost: int
    fingerprint: str | None
    created: int = field(default_factory=lambda: int(time.time()))
    served: Served | None = None
    loading: asyncio.Task[Served] | None = None
    users: int = 0
    used: float = 0.0


class Shelf:
    """All models by name. Errors of the constructor: those of `describe`, and InputError where a model alone is over the budget."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.budget = available() * 7 // 10 if settings.memory is None else settings.memory
        self.books: dict[str, Book] = {}
        self.turn = asyncio.Lock()
        for source in settings.models:
            name = Path(source).name if Path(source).exists() else source
            book = entry(source if name in self.books else name, describe(source), settings)
            if book.cost > self.budget:
                raise InputError(f"the model {name!r} needs {book.cost:,} bytes with its cache and the budget is {self.budget:,}; "
                                 f"lower --context or --pages, or raise --memory")
            self.books[book.name] = book

    def find(self, name: str, task: str) -> Book:
        """The model, if it is here and does the task."""
        book = self.books.get(name)
        if book is None:
            raise Refusal(404, f"no model is called {name[:80]!r}{nearest(name, self.books)}; those served are {', '.join(self.books)}",
                          param="model", code="model_not_found")
        if task not in book.tasks:
            raise Refusal(400, f"the model {name!r} is a {book.source.family.name} of a form that does not do {task}; "
                               f"it does {', '.join(book.tasks) or 'nothing that is served'}", param="model", code="task_not_supported")
        return book

    @asynccontextmanager
    async def use(self, name: str, task: str) -> AsyncIterator[Served]:
        """The loaded model; it stays loaded while it is used."""
        book = self.find(name, task)
        book.users += 1
        try:
            if book.served is None:
                book.loading = book.loading or asyncio.create_task(self._load(book))
                # A client that leaves while it waits ends its own wait and not the loading.
                await asyncio.shield(book.loading)
            if book.served is None:
                raise Refusal(503, f"the model {name!r} could not be loaded", code="model_not_loaded")
            yield book.served
        finally:
            book.users -= 1
            book.used = time.monotonic()

    async def _load(self, book: Book) -> Served:
        try:
            async with self.turn:
                await self._make_room(book)
                book.served = await asyncio.to_thread(_made, book, self.settings)
                await asyncio.to_thread(_kept)
                return book.served
        finally:
            book.loading = None

    async def _make_room(self, book: Book) -> None:
        """Closes models that nobody uses, the longest unused first."""
        held = [b for b in self.books.values() if b.served is not None]
        for other in sorted((b for b in held if not b.users), key=lambda b: b.used):
            if sum(b.cost for b in held) + book.cost <= self.budget:
                return
            held.remove(other)
            served, other.served = other.served, None
            if served is not None and served.engine is not None:
                await asyncio.to_thread(served.engine.close)
        if sum(b.cost for b in held) + book.cost > self.budget:
            sentence = f"the memory is taken by models in use, so {book.name!r} cannot be loaded now; try again in 5 seconds"
            raise Refusal(429, sentence, code="memory_full", headers={"Retry-After": "5"})

    def close(self) -> None:
        """Ends every engine and its thread."""
        for book in self.books.values():
            served, book.served = book.served, None
            if served is not None and served.engine is not None:
                served.engine.close()

    def sizes(self) -> dict[str, int]:
        """What is loaded and how full it is."""
        served = [b.served for b in self.books.values() if b.served is not None]
        pools = [s.engine.engine.scheduler.pages for s in served if s.engine is not None]
        return {"models": len(served), "bytes": sum(s.book.cost for s in served), "pages": sum(p.total for p in pools),
                "free_pages": sum(p.available for p in pools)}


def _made(book: Book, settings: Settings) -> Served:
    return Served(book, load(book.source.path, settings.dtype, fast=settings.fast), settings)


def entry(name: str, source: Source, settings: Settings) -> Book:
    """What a model can do and what it costs, from its configuration alone."""
    empty = source.empty()
    counts = card(empty, source.spec, source.family.name)
    context = min((n for n in (settings.context, counts.context) if n is not None), default=None)
    if settings.context is not None and counts.context is not None and settings.context > counts.context:
        raise InputError(f"--context {settings.context} is more than the {counts.context} tokens of {name!r}")
    tasks = doable(empty)
    # Quantised and half-precision files are computed in 4 bytes unless a narrower type is asked for or declared.
    stored = source.config.get("dtype") or source.config.get("torch_dtype")
    width = (settings.dtype or torch.float32).itemsize if settings.dtype or stored != "bfloat16" else 2
    pages = settings.pages or -(-max(context or ROOM, ROOM) // PAGE)
    held = (pages + 1) * PAGE * sum(counts.cache) * width if "completions" in tasks else 0
    told = (source.family.name, str(source.spec), width, settings.context, settings.fast)
    words = (__version__, torch.__version__, torch.get_num_threads(), *told)
    mark = hashlib.sha256(repr(words).encode()).hexdigest()[:12]
    fingerprint = f"fp_{mark}" if settings.deterministic else None
    return Book(name, source, tasks, context, pages, counts.parameters, counts.parameters * width + held, fingerprint)


def doable(model: Any) -> tuple[str, ...]:
    """The tasks of a model, by its parts."""
    head = getattr(model, "head", None)
    if isinstance(model, Decoder):
        return "chat", "completions", "embeddings", "inspect"
    if not isinstance(model, Encoder):
        return ("inspect",) if isinstance(model, EncoderDecoder) else ()
    heads: Sequence[tuple[Any, str]] = (((MaskedHead, PretrainHead), "fill"), (RowHead, "classifications"), (SpanHead, "answers"))
    return ("embeddings", *(name for kind, name in heads if isinstance(head, kind)), "inspect")


def available() -> int:
    """Bytes of memory that are free for use now."""
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def _kept() -> None:
    """What lives now is left out of later searches for cycles: with torch's objects a search holds every request up for 0.1 s."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def warm(shelf: Shelf, told: Callable[[Served], None]) -> None:
    """Loads what fits together, in the order given; one that fails is logged and leaves the others alone."""
    cost = 0
    for book in shelf.books.values():
        if cost + book.cost > shelf.budget or not book.tasks:
            continue
        try:
            async with shelf.use(book.name, book.tasks[0]) as served:
                cost += book.cost
                await asyncio.to_thread(told, served)
        except (TranseptError, Refusal) as error:
            log.error("the model %s cannot be loaded: %s", book.name, error)
        except Exception:
            # Whatever is wrong with one model, the server comes up for the others.
            log.exception("the model %s cannot be loaded", book.name)
