"""One thread for tiny models."""

from __future__ import annotations

from tests.contracts.conftest import one_thread

__all__ = ["one_thread"]
