"""One thread, as for every test on tiny models; its fixture is used by all tests here."""

from tests.contracts.conftest import one_thread

__all__ = ["one_thread"]
