"""The engine behind a thread of its own: submit from any thread or event loop, read pieces, cancel (row 82c)."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress

from transept.core.errors import TranseptError
from transept.inference.engine.engine import Ask, Engine, Event, Handle, RequestError


class Busy(TranseptError):
    """The engine takes no more requests now: too many are waiting, or it is closing."""


class Stream:
    """The Events of one request, for a loop in a thread (`for`) or, where it was submitted on an event loop, a task (`async for`)."""

    def __init__(self, ask: Ask, cancel: Callable[[Stream], None]):
        self.ask, self._cancel = ask, cancel
        self.handle: Handle | None = None
        self.left = ask.n
        self.dead = False
        try:
            self.loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self.loop = None
        self.later: asyncio.Queue[Event | None] = asyncio.Queue()
        self.now: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

    def end(self) -> None:
        """The reader of a cancelled request waits no longer."""
        if self.loop is None:
            self.now.put(None)
        else:
            _told(self.loop, [(self, None)])

    def cancel(self) -> None:
        """Ends the request; its pages are free within one step. Safe in any thread, any number of times."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Event]:
        while self.left and (event := self.now.get()) is not None:
            yield self._counted(event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while self.left and (event := await self.later.get()) is not None:
                yield self._counted(event)
        finally:
            if self.left:
                self.cancel()

    def _counted(self, event: Event) -> Event:
        self.left -= event.over
        return event


class AsyncEngine:
    """Runs the engine's steps in one thread while there is something to do; at most `queue` requests are under way."""

    def __init__(self, engine: Engine, queue_size: int = 256):
        self.engine, self.queue_size = engine, queue_size
        self.lock = threading.Lock()
        self.open: set[Stream] = set()
        self.closing = False
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.mail: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event | None]]] = {}
        self.thread = threading.Thread(target=self._work, name="transept-engine", daemon=True)
        self.thread.start()

    def submit(self, ask: Ask) -> Stream:
        """Hands a request over. Errors: InputError where it cannot be served, Busy where too many are under way."""
        self.engine.room(ask)
        stream = Stream(ask, self._cancel)
        with self.lock:
            if self.closing:
                raise Busy("the engine is closing and takes no more requests")
            if len(self.open) >= self.queue_size:
                raise Busy(f"{len(self.open)} requests are under way, which is all this engine takes; try again later")
            self.open.add(stream)
        self.commands.put(lambda: self._begin(stream))
        return stream

    def close(self, drain: float = 0.0) -> None:
        """Takes no more requests, lets those under way go on for `drain` seconds, ends the rest with an error, and stops the thread."""
        with self.lock:
            self.closing = True
        until = time.monotonic() + drain
        while self.open and self.thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        self.commands.put(None)
        self.thread.join()

    # --- in the engine's thread ---

    def _work(self) -> None:
        while True:
            try:
                if not self._obey():
                    return
                self.engine.step()
            except Exception as error:
                # A fault that belongs to no request: those under way end, those to come find a fresh scheduler.
                self.engine.abort(RequestError(f"the engine's step failed: {type(error).__name__}: {str(error)[:300]}"))
            finally:
                self._deliver()

    def _post(self, stream: Stream, event: Event) -> None:
        if stream.loop is None:
            stream.now.put(event)
        else:
            self.mail.setdefault(stream.loop, []).append((stream, event))

    def _deliver(self) -> None:
        """Wakes each event loop once for all events of a step: a waking is a system call, and one a stream would cost both sides."""
        mail, self.mail = self.mail, {}
        for loop, items in mail.items():
            _told(loop, items)

    def _obey(self) -> bool:
        """Does what other threads asked for, waiting for it where there is nothing else to do; False at the end."""
        while not self.engine.busy or not self.commands.empty():
            command = self.commands.get()
            if command is None:
                self.engine.abort(RequestError("the engine was closed"))
                return False
            command()
            self._deliver()
        return True

    def _begin(self, stream: Stream) -> None:
        if stream.dead:
            return
        left = [stream.ask.n]

        def sink(event: Event) -> None:
            left[0] -= event.over
            if not left[0]:
                self._forget(stream)
            self._post(stream, event)

        try:
            stream.handle = self.engine.add(stream.ask, sink)
        except Exception as error:
            typed = (
                error
                if isinstance(error, TranseptError)
                else RequestError(f"the request failed: {type(error).__name__}: {str(error)[:300]}")
            )
            self._forget(stream)
            for index in range(stream.ask.n):
                self._post(stream, Event(index, error=typed))

    def _cancel(self, stream: Stream) -> None:
        stream.dead = True
        self._forget(stream)
        self.commands.put(lambda: self.engine.cancel(stream.handle) if stream.handle is not None else None)
        stream.end()

    def _forget(self, stream: Stream) -> None:
        with self.lock:
            self.open.discard(stream)


def _told(loop: asyncio.AbstractEventLoop, mail: Sequence[tuple[Stream, Event | None]]) -> None:
    def put() -> None:
        for stream, event in mail:
            stream.later.put_nowait(event)

    # A loop that has ended has no readers.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(put)
