"""A decoder's own engine: the streams of one process take part in its steps, whoever asks for a piece moves all of them on (row 82c).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from transept.core.errors import InputError
from transept.inference.engine.engine import Ask, Engine, Event, RequestError
from transept.inference.engine.scheduler import Limits
from transept.inference.generation import CHUNK, Detokenizer, Piece
from transept.inference.rows import Runner

ROWS = 16


class Local:
    """Streams of requests without a thread of their own, over `pages` of `page` tokens; any thread may read them."""

    def __init__(self, runner: Runner, *, pages: int, page: int, context: int | None):
        self.engine = Engine(runner, context=context, limits=Limits(pages=pages, page=page, rows=ROWS, budget=CHUNK), drafter=None)
        self.lock = threading.Lock()
        self.left: deque[Callable[[], None]] = deque()

    def stream(self, ask: Ask, tokenizer: Callable[[], Detokenizer] | None = None) -> Iterator[Piece]:
        """The pieces of one continuation. A stream that is not read to its end gives its pages back. Errors: TranseptError."""
        news: deque[Event] = deque()
        with self.lock:
            handle = self.engine.add(ask, news.append, tokenizer)
        try:
            over = False
            while not over:
                while not news:
                    self._step(news)
                event = news.popleft()
                over = event.over
                if event.error is not None:
                    raise event.error
                yield Piece(event.text, event.ids, event.final)
        finally:
            self._later(lambda: self.engine.cancel(handle))

    def reserve(self, tokens: int) -> tuple[int, ...]:
        """Pages for so many tokens that no stream uses, until `release`. Errors: InputError where they are not free."""
        with self.lock:
            self._clear()
            pages = self.engine.scheduler.pages
            wanted = pages.needed(tokens)
            if wanted > pages.available:
                raise InputError(f"{tokens} columns need {wanted} pages of cache, but {pages.available} are free")
            return tuple(page for _ in range(wanted) if (page := pages.take()) is not None)

    def release(self, pages: tuple[int, ...]) -> None:
        """These reserved pages are free again."""
        self._later(lambda: self.engine.scheduler.pages.drop(pages, keep=False))

    def _step(self, news: deque[Event]) -> None:
        with self.lock:
            self._clear()
            # Another thread may have moved this stream on meanwhile.
            if news:
                return
            try:
                moved = self.engine.step()
            except BaseException as error:
                # Broken off within a step, say by a key: what the pages hold is not certain any more.
                self.engine.abort(RequestError(f"the engine's step was broken off: {type(error).__name__}"))
                raise
            if not (moved or news):
                raise RequestError("nothing moves: all pages of the cache are reserved by others")

    def _later(self, command: Callable[[], None]) -> None:
        self.left.append(command)
        # A forgotten stream is closed wherever the interpreter finds it, even within a step: then the next one clears up.
        if self.lock.acquire(blocking=False):
            try:
                self._clear()
            finally:
                self.lock.release()

    def _clear(self) -> None:
        while self.left:
            self.left.popleft()()
