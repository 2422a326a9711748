"""One server of tiny models for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest

from tests.contracts.conftest import one_thread
from tests.serving import tiny
from transept.serving.run import Running

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = {"answer": 16, "max_tokens": 64, "header_seconds": 5}
    with Running(tiny.settings(tmp_path_factory.mktemp("models"), encoders=True, limits=limits)) as server:
        yield server


@pytest.fixture
def address(running: Running) -> Iterator[str]:
    yield running.address
    tiny.settle(running.app)


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    """Without the checks of shapes and types at run time, which make a tiny model's step ten times as long; test_openai.py has them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
