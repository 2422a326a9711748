"""The invariants that `transept check training` tries, T-1 to T-7 of the plan; all of each under TRANSEPT_FULL=1, else a tenth."""

from __future__ import annotations

import time

import pytest

from tests.counts import FULL
from tests.figures import record
from transept.evaluation import crashes
from transept.evaluation.invariants import CHECKS, configurations

PLAN = {
    "any split of a batch": "T-8",
    "padded and packed": "T-8",
    "two runs, the same bits": "T-8",
    "resume at every step": "T-1",
    "crash states": "T-3",
    "faults at every file operation": "T-3",
    "bit flips": "T-4",
    "kill -9": "T-2",
    "told to stop": "T-5",
    "not finite": "T-6",
    "bad rows": "T-7",
}
# Of the slowest less than a tenth.
REDUCED = {"resume at every step": 0.02, "kill -9": 0.05, "told to stop": 0.06, "bit flips": 0.05}
FULL_COUNTS = {
    "crash states": 20000,
    "bit flips": 20000,
    "kill -9": 200,
    "told to stop": 50,
    "resume at every step": 60 * 11,
    "not finite": 40,
    "faults at every file operation": 200,
}


@pytest.mark.reliability
@pytest.mark.serial
@pytest.mark.timeout(3600 if FULL else 300)
@pytest.mark.parametrize("name", CHECKS)
def test_promises_of_training_hold(name: str) -> None:
    begin = time.perf_counter()
    share = 1.0 if FULL else REDUCED.get(name, 0.1)
    tried, bad = CHECKS[name](share, 20261121)
    seconds = round(time.perf_counter() - begin, 1)
    record(id=f"{PLAN[name]} {name}", n_tried=tried, n_ok=tried - len(bad), n_bad=len(bad), seconds=seconds, seed=20261121)
    assert not bad, bad[:5]
    assert tried >= int(share * FULL_COUNTS.get(name, 1))


def test_there_are_at_least_sixty_configurations() -> None:
    names = [name for name, _ in configurations()]
    assert len(names) == len(set(names)) >= 60


def test_without_syncing_the_same_crashes_lose_checkpoints() -> None:
    """The inverse: the enumeration must be able to fail, or it proves nothing."""
    _, bad = crashes.crash_states(0.02, 1, synced=False)
    assert bad
