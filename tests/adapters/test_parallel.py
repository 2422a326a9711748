"""Two processes that share one model: they take over from one process and learn the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transept.training import state
from transept.training.log import read

PROGRAM = '''
import sys, torch
from pathlib import Path
from transept.adapters.parallel import mesh, shard, split
from transept.evaluation.invariants import Noisy, documents, small
from transept.training.loop import Loop
from transept.training.objectives.causal import Causal
from transept.training.ranks import Ranks, joined
from transept.training.resume import restore
from transept.training.run import Judging, Loading, Optim, Run, Saving, Settings
torch.set_num_threads(1)
how, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
with joined() as ranks:
    model = small()
    if how == "fsdp":
        shard(model, mesh()["data"])
    if how == "tensor":
        split(model, mesh(2)["tensor"])
        ranks = Ranks(first=ranks.first)  # both see all the data
    source = Noisy(torch.cat(documents(40, 0)), 8)
    judging = Judging(every=2, source="held")
    settings = Settings(steps=steps, optim=Optim(lr=1e-2), loading=Loading(batch=7, micro=2), judging=judging, ema=0.5,
                        saving=Saving(every=3))
    loop = Loop(Run(model, Causal(), source, settings, eval={"held": source}), folder, ranks=ranks)
    if (folder / "checkpoints").exists():
        restore(loop, folder)
    loop.train()
'''


def started(how: str, folder: Path, steps: int) -> None:
    """Runs the program in one process, or in two under torchrun."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    many = [] if how == "one" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", sys.executable]
    line = [sys.executable, *many, "-c", PROGRAM, how, str(folder), str(steps)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five updates by one process, with the checkpoints of the third and the fifth."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    started("one", folder, 5)
    return folder


@pytest.mark.serial
@pytest.mark.parametrize("how", ["fsdp", "tensor"])
def test_two_processes_go_on_from_what_one_saved_and_learn_what_it_learns(how: str, alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "checkpoints" / "step-00000003", tmp_path / "run" / "checkpoints" / "step-00000003")
    started(how, tmp_path / "run", 5)
    logs = [read(folder / "log.jsonl") for folder in (alone, tmp_path / "run")]
    for key in ("loss", "norm", "held.loss"):
        one, two = ([line[key] for line in log if key in line and line["step"] > 3] for log in logs)
        assert len(one) == len(two) >= 1 and one == pytest.approx(two, abs=2e-6), key
    one, two = (state.latest(folder / "checkpoints")[0] for folder in (alone, tmp_path / "run"))
    assert one is not None and two is not None and one.step == two.step == 5
    for group, tensors in one.tensors.items():
        assert set(tensors) == set(two.tensors[group])
        for name, tensor in tensors.items():
            # The bias of k moves all scores of a row alike: its gradient is nothing but rounding, which Adam blows up.
            if group in ("model", "mean") and not name.endswith("attn.k.bias"):
                assert torch.allclose(tensor, two.tensors[group][name], atol=1e-5), name
