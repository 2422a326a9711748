"""Named intermediates: nothing happens unless somebody listens, and a listener may put another value in its place."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from transept.core.tap import listening, peek, tap


class Notes:
    """Notes what it hears; wants the names given; replaces by the table given."""

    def __init__(self, wanted: set[str] | None = None, instead: dict[str, Any] | None = None):
        self.wanted, self.instead = wanted, instead or {}
        self.heard: list[tuple[object, str, Any]] = []

    def wants(self, owner: object, name: str) -> bool:
        return self.wanted is None or name in self.wanted

    def hear(self, owner: object, name: str, value: Any) -> Any:
        self.heard.append((owner, name, value))
        return self.instead.get(name, value)


def never() -> Any:
    raise AssertionError("computed without a listener")


def test_without_a_listener_nothing_happens() -> None:
    value = object()
    assert tap(None, "x", value) is value
    peek(None, "x", never)


def test_a_listener_hears_owner_name_and_value() -> None:
    ear, owner, value = Notes(), object(), object()
    with listening(ear):
        assert tap(owner, "x", value) is value
        peek(owner, "y", lambda: 7)
    assert ear.heard == [(owner, "x", value), (owner, "y", 7)]
    assert tap(owner, "x", 1) == 1
    assert len(ear.heard) == 2


def test_only_what_is_wanted_is_computed() -> None:
    ear = Notes(wanted={"y"})
    with listening(ear):
        peek(None, "x", never)
        peek(None, "y", lambda: 7)
    assert ear.heard == [(None, "y", 7)]


def test_another_value_flows_on() -> None:
    with listening(Notes(instead={"x": 5})):
        assert tap(None, "x", 1) == 5
        assert tap(None, "y", 1) == 1


def test_the_inner_listener_hears_and_the_outer_hears_again() -> None:
    outer, inner = Notes(), Notes()
    with listening(outer):
        tap(None, "a", 1)
        with listening(inner):
            tap(None, "b", 2)
        tap(None, "c", 3)
    assert [name for _, name, _ in outer.heard] == ["a", "c"]
    assert [name for _, name, _ in inner.heard] == ["b"]


def test_an_error_ends_the_listening() -> None:
    ear = Notes()
    with pytest.raises(ZeroDivisionError), listening(ear):
        raise ZeroDivisionError
    tap(None, "x", 1)
    assert ear.heard == []


def test_another_thread_is_not_heard() -> None:
    """Two requests that run at once do not hear each other."""
    ear = Notes()
    with listening(ear):
        thread = threading.Thread(target=tap, args=(None, "x", 1))
        thread.start()
        thread.join()
    assert ear.heard == []
