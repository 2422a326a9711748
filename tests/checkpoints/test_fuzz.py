"""Every cut and thousands of lies, fed to each reader in a process of its own: see fuzz_child.py for what is watched."""

from __future__ import annotations

import os
import tempfile

import pytest

from tests.checkpoints.fuzz_child import run_child
from tests.counts import count
from tests.figures import record

SEED = 20261121


@pytest.mark.reliability
@pytest.mark.serial
@pytest.mark.parametrize("reader, leaves", [("safetensors", 400), ("gguf", 1200), ("bin", 2500)])
def test_damaged_files_are_refused_in_bounds(reader: str, leaves: int) -> None:
    mutants = count(20_000)
    # In memory where the system has such a folder: some disks take a millisecond for each small file.
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        out, seconds = run_child(reader, mutants, folder, SEED)
    bad = {name: out[name] for name in ("untyped", "disputed", "unhelpful", "events") if out[name]}
    wrong = len({text.split(":")[0] for texts in bad.values() for text in texts})
    figures = {"worst_ms": round(out["worst_ms"], 1), "seconds": round(seconds, 1), "seed": SEED}
    cut, taken = out["cut"], out["cut_accepted"]
    record(f"L-1 {reader}: every cut of two seeds", n_tried=cut, n_ok=cut - taken, n_bad=taken, **figures)
    record(f"L-2, L-3, X-2 {reader}: mutants", n_tried=mutants, n_ok=mutants - wrong, n_bad=wrong, **figures)
    assert bad == {}
    assert out["cut"] >= leaves and out["cut_accepted"] == 0
    assert out["mutants"] == mutants and out["refused"] > mutants // 2
    # Some lies are true after all; none at all would mean that the other package was never asked.
    assert out["accepted"] > 2
    # Processor time of one file, not the clock's, so that a busy machine decides nothing.
    assert out["worst_ms"] < 1000
