"""Named intermediates: a block says what it computed, and nothing happens unless somebody listens.

A listener may return another value, which then flows on: that is how heads are masked and activations patched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, runtime_checkable

V = TypeVar("V")


@runtime_checkable
class Listener(Protocol):
    """Hears every named value; returns the value that flows on."""

    def wants(self, owner: object, name: str) -> bool | tuple[int, ...]:
        """True if `peek` should compute the value at all; the numbers of heads if it is to compute these alone."""
        ...

    def hear(self, owner: object, name: str, value: Any) -> Any:
        """Takes note of the value; returns it, or another in its place."""
        ...


_listener: ContextVar[Listener | None] = ContextVar("transept_tap", default=None)
# How many contexts listen, in all threads: a plain number, so that compiled code can see that there is none.
_open = 0
_counting = threading.Lock()


def tap(owner: object, name: str, value: V) -> V:
    """Name a value that was computed anyway; returns it, or what the listener puts in its place."""
    if not _open:
        return value
    listener = _listener.get()
    return value if listener is None else listener.hear(owner, name, value)


def peek(owner: object, name: str, compute: Callable[..., Any]) -> None:
    """Name a value that is computed only for a listener that wants it, such as attention weights beside a fused kernel.

    A listener that wants some heads alone gets `compute(heads=...)`.
    """
    if not _open:
        return
    listener = _listener.get()
    wanted = listener is not None and listener.wants(owner, name)
    if listener is not None and wanted:
        listener.hear(owner, name, compute() if wanted is True else compute(heads=wanted))


def listened() -> bool:
    """True while somebody listens."""
    return _listener.get() is not None


def current() -> Listener | None:
    """Who listens now."""
    return _listener.get()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within this context `listener` hears the taps of this thread of control."""
    token = _listener.set(listener)
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _listener.reset(token)


def _count(change: int) -> None:
    global _open
    with _counting:
        _open += change
