"""Two processes, in three ways: each with the whole model, with parts of every weight, with some of the heads. They take over from one
process and learn the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transept.core.errors import ConfigError
from transept.training import state
from transept.training.log import read

WAYS = ("data", "fsdp", "tensor")
PROGRAM = """
import sys, torch
from pathlib import Path
from transept.adapters.parallel import mesh, shard, split
from transept.evaluation.subjects import Noisy, documents, small
from transept.training.loop import Loop
from transept.training.objectives.causal import Causal
from transept.training.ranks import Ranks, joined
from transept.training.resume import restore
from transept.training.run import Judging, Loading, Optim, Run, Saving, Settings
torch.set_num_threads(1)
with joined() as ranks:
    for how in sys.argv[2:]:
        folder, model, own = Path(sys.argv[1], how), small(), ranks
        if how == "fsdp":
            shard(model, mesh()["data"])
        if how == "tensor":
            split(model, mesh(2)["tensor"])
            own = Ranks(first=ranks.first)  # both see all the data
        source = Noisy(torch.cat(documents(40, 0)), 8)
        settings = Settings(steps=6, optim=Optim(lr=1e-2), loading=Loading(batch=7, micro=2), ema=0.5,
                            judging=Judging(every=2, source="held"), saving=Saving(every=3, keep=9))
        loop = Loop(Run(model, Causal(), source, settings, eval={"held": source}), folder, ranks=own)
        if (folder / "checkpoints").exists():
            restore(loop, folder)
        loop.train()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six updates by one process; and in each way two processes that go on from its third."""
    place = tmp_path_factory.mktemp("runs")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", sys.executable]
    for line, ways in (([], ("alone",)), (two, WAYS)):
        command = [sys.executable, *line, "-c", PROGRAM, str(place), *ways]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        for how in WAYS if ways == ("alone",) else ():
            shutil.copytree(place / "alone" / "checkpoints" / "step-00000003", place / how / "checkpoints" / "step-00000003")
    return place


@pytest.mark.serial
@pytest.mark.parametrize("how", WAYS)
def test_two_processes_go_on_from_what_one_saved_and_learn_what_it_learns(how: str, runs: Path) -> None:
    logs = [read(runs / name / "log.jsonl") for name in ("alone", how)]
    for key in ("loss", "norm", "held.loss"):
        one, two = ([line[key] for line in log if key in line and line["step"] > 3] for log in logs)
        assert len(one) == len(two) >= 1 and one == pytest.approx(two, abs=2e-6), key
    one, two = (state.latest(runs / name / "checkpoints")[0] for name in ("alone", how))
    assert one is not None and two is not None and one.step == two.step == 6
    for group, tensors in one.tensors.items():
        assert set(tensors) == set(two.tensors[group])
        for name, tensor in tensors.items():
            # The bias of k moves all scores of a row alike: its gradient is nothing but rounding, which Adam blows up.
            if group in ("model", "mean") and not name.endswith("attn.k.bias"):
                assert torch.allclose(tensor, two.tensors[group][name], atol=1e-5), name


def test_a_model_that_cannot_be_split_says_why() -> None:
    from transept.adapters.parallel import _plan
    from transept.blocks.attention import Attention
    from transept.ops.masks import Causal

    with pytest.raises(ConfigError, match="x has 3 heads and 3 key/value heads, which 2 processes cannot share"):
        _plan(Attention(24, 3, 3, 8, mask=Causal()), 2, "x")
