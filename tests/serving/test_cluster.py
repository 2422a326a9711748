"""Several replicas behind one address, where ray is installed; without it, a sentence that says what to install."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import tiny
from transept.core.errors import InputError, SourceError
from transept.serving.cluster import application

ROOT = Path(__file__).parents[2]
HERE = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HERE, reason="ray is installed, so nothing is missing")
def test_without_ray_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"transept\[cluster\]"):
        application(tiny.settings(tmp_path))


def test_a_cluster_has_replicas(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found 0"):
        application(tiny.settings(tmp_path), replicas=0)


@pytest.mark.serial
@pytest.mark.skipif(not HERE, reason="needs the extra [cluster], 80 MB: pip install 'transept[cluster]'")
def test_two_replicas_behind_one_address(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tests.serving.cluster_child", str(tmp_path)]
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0 and "two replicas, one answer" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]
