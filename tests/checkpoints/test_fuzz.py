"""Every cut and thousands of lies, fed to each reader in a process of its own: see fuzz_child.py for what is watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.counts import count
from tests.figures import record

ROOT = Path(__file__).parents[2]
SEED = 20261121


@pytest.mark.reliability
@pytest.mark.serial
@pytest.mark.parametrize("reader, leaves", [("safetensors", 400), ("gguf", 1200), ("bin", 2500)])
def test_damaged_files_are_refused_in_bounds(reader: str, leaves: int) -> None:
    mutants = count(20_000)
    # In memory where the system has such a folder: some disks take a millisecond for each small file.
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        command = [sys.executable, "-m", "tests.checkpoints.fuzz_child", reader, str(mutants), str(SEED), folder]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, f"the reader's process ended with {done.returncode}: {done.stderr[-2000:]}"
    out = json.loads(done.stdout.splitlines()[-1])
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
