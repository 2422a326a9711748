"""What every test shares: fixed seeds, a fixed thread count, hypothesis without clocks, and families from outside the package."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# a clock never decides a test, and the same commit always draws the same examples
hypothesis.settings.register_profile(
    "transept",
    deadline=None,
    derandomize=True,
    print_blob=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("transept")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--family",
        action="append",
        default=[],
        metavar="FILE",
        help="a family page outside the package; every contract test runs on it too (may be given several times)",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    # here and not at import: the hook that checks shapes must be in place before transept is imported
    pages = session.config.getoption("--family")
    if pages:
        from transept.core import registry
        from transept.core.errors import TranseptError

        try:
            for page in pages:
                registry.add(Path(page))
        except TranseptError as err:
            raise pytest.UsageError(f"--family {page}: {err}") from err


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("serial"):
            item.add_marker(pytest.mark.xdist_group("serial"))


@pytest.fixture(autouse=True)
def same_every_time() -> Iterator[None]:
    """Seeds and threads, for the libraries that the test has imported; two processes share the two cores of a small machine."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own, and no folder of wheels."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRANSEPT_CACHE", str(cache))
    monkeypatch.delenv("TRANSEPT_WHEELS", raising=False)
    return cache
