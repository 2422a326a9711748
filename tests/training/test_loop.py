"""The loop beside a plain torch loop, and what it does when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.counts import FULL
from transept.core.batch import Draw
from transept.core.errors import CheckpointError, ConfigError, InputError
from transept.data.source import Samples, Windows
from transept.evaluation.subjects import Noisy, documents, small
from transept.training import batches, state
from transept.training.batches import Sampler
from transept.training.judge import measure
from transept.training.log import read
from transept.training.loop import Loop
from transept.training.objective import Sum
from transept.training.objectives.causal import Causal
from transept.training.remat import recompute
from transept.training.resume import restore
from transept.training.run import Judging, Loading, Optim, Order, Precision, Run, Saving, Schedule, Settings, Shape, Track, override

IDS = torch.cat(documents(40, 0))


# torch's own compiler module still uses what torch deprecates.
COMPILES = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


def settings(**rest) -> Settings:
    plain = {"steps": 6, "loading": Loading(batch=8, order=Order.SEQUENTIAL), "schedule": Schedule(shape=Shape.CONSTANT, warmup=1)}
    return Settings(**{**plain, **rest})


def near(name: str, a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Close; but the bias of k moves all scores of a row alike, so its gradient is nothing but rounding, which Adam blows up."""
    return name.endswith("attn.k.bias") or torch.allclose(a, b, atol=tolerance)


def test_the_loop_learns_what_a_plain_torch_loop_learns() -> None:
    mine, other = small(), small()
    source = Windows(IDS, 8, 8)
    options = Optim(lr=1e-2, decay=0.1, clip=0.5)
    Loop(Run(mine, Causal(), source, settings(optim=options, loading=Loading(batch=8, micro=3, order=Order.SEQUENTIAL)))).train()
    halves = [[p for p in other.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    adam = torch.optim.AdamW([{"params": halves[0], "weight_decay": 0.1}, {"params": halves[1], "weight_decay": 0.0}], 1e-2, (0.9, 0.95))
    at = 0
    for _ in range(6):
        at = 0 if at >= len(source) else at
        ids = torch.stack([source[i]["ids"] for i in range(at, min(at + 8, len(source)))])
        at += 8
        loss = F.cross_entropy(other(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        adam.step()
    for (name, p), q in zip(mine.named_parameters(), other.parameters(), strict=True):
        assert near(name, p, q, 2e-6), (name, float((p - q).abs().max()))


def test_every_sample_is_seen_once_an_epoch_in_an_order_that_changes() -> None:
    source = Windows(IDS, 8, 4)
    for order in (Order.SHUFFLED, Order.BUCKETED):
        source.lengths = [i % 7 for i in range(len(source))]
        sampler = Sampler(source, Loading(batch=8, order=order), seed=5)
        one, two = (list(sampler.order(epoch)) for epoch in (0, 1))
        assert sorted(one) == sorted(two) == list(range(len(source))) and one != two
        assert one == list(Sampler(source, Loading(batch=8, order=order), seed=5).order(0))


def test_tiles_cover_a_text_once_an_epoch_from_another_beginning() -> None:
    source, seen, firsts = Windows(torch.arange(100), 8), [], set()
    sampler = Sampler(source, Loading(batch=5, order=Order.TILED), seed=3)
    cursor = Draw(3, 0, 0)
    for _ in range(30):
        begin, many, cursor = sampler.span(cursor)
        seen += [(begin.epoch, int(row[0])) for row in sampler.batch(begin, many)["ids"]]
    for epoch in range(8):
        tiles = sorted(at for of, at in seen if of == epoch)
        assert tiles == list(range(tiles[0], 92, 8)) and tiles[0] < 8
        firsts.add(tiles[0])
    assert len(firsts) > 3 and seen == [*dict.fromkeys(seen)]
    for wrong in (Windows(torch.arange(100), 8, 2), Samples([{"ids": [1]}], lambda rows, draw: {})):
        with pytest.raises(ConfigError, match="TILED"):
            batches._tiled(wrong, 5, 0)


def test_recomputed_activations_give_the_same_gradients() -> None:
    batch = {"ids": torch.stack([IDS[i : i + 9] for i in range(4)])}
    found = []
    for again in (False, True):
        model = small()
        if again:
            assert recompute(model) == 2
        Causal()(model, batch).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


COMPILED = """
import sys, torch
from pathlib import Path
from transept.evaluation.subjects import documents, small
from transept.data.source import Samples, Windows
from transept.training.loop import Loop
from transept.training.objectives.causal import Causal
from transept.training.run import Loading, Optim, Run, Settings
torch.set_num_threads(1)
for name in ("plain", "compiled"):
    settings = Settings(steps=6, compile=name == "compiled", loading=Loading(batch=8), optim=Optim(lr=1e-2))
    Loop(Run(small(), Causal(), Windows(torch.cat(documents(40, 0)), 8), settings), Path(sys.argv[1], name)).train()
"""


@pytest.mark.serial
@pytest.mark.reliability
@pytest.mark.skipif(not FULL, reason="compiles for half a minute; runs under make reliability (TRANSEPT_FULL=1)")
def test_a_compiled_run_learns_the_same(tmp_path: Path) -> None:
    # In a process of its own, without the type checker, which cannot be compiled.
    done = subprocess.run([sys.executable, "-c", COMPILED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, compiled = ([line["loss"] for line in read(tmp_path / name / "log.jsonl")] for name in ("plain", "compiled"))
    assert len(plain) == 6 and plain == pytest.approx(compiled, abs=1e-4)


def test_bfloat16_and_recomputing_runs_learn() -> None:
    for change in ({"precision": Precision.BF16}, {"checkpointing": True}):
        source = Windows(IDS[:33], 8, 8)
        run = Run(small(), Causal(), source, settings(steps=15, loading=Loading(batch=4), optim=Optim(lr=2e-2), **change))
        start = measure(Causal(), run.model, source)["loss"]
        Loop(run).train()
        assert measure(Causal(), run.model, source)["loss"] < 0.8 * start, change


class Hungry:
    """Runs out of memory above a number of rows."""

    def __init__(self, most: int):
        self.most, self.seen = most, []

    def __call__(self, model: nn.Module, batch) -> Sum:
        if len(batch["ids"]) > self.most:
            raise torch.OutOfMemoryError("not enough memory")
        self.seen.append(batch["ids"])
        return Causal()(model, batch)


def test_out_of_memory_halves_the_micro_batch_with_the_same_samples(tmp_path: Path) -> None:
    runs = [Run(small(), objective, Noisy(IDS, 8), settings(steps=2)) for objective in (Causal(), Hungry(4))]
    for i, run in enumerate(runs):
        Loop(run, tmp_path / str(i)).train()
    logs = [[line for line in read(tmp_path / str(i) / "log.jsonl") if "loss" in line] for i in (0, 1)]
    assert [a["loss"] for a in logs[0]] == pytest.approx([b["loss"] for b in logs[1]], abs=1e-6)
    assert [line["event"] for line in read(tmp_path / "1" / "log.jsonl") if "event" in line] == ["out_of_memory"]
    with pytest.raises(torch.OutOfMemoryError):
        Loop(Run(small(), Hungry(1), Noisy(IDS, 8), settings())).train()


def test_the_best_checkpoint_stays_and_no_better_one_ends_the_run(tmp_path: Path) -> None:
    figures = iter([3.0, 1.0, 2.0, 2.5, 4.0, 5.0])
    judging, saving = Judging(every=2, metric="wrong", patience=3), Saving(every=1, keep=1)
    run = Run(small(), Causal(), Noisy(IDS, 8), settings(steps=50, judging=judging, saving=saving),
              measure=lambda model: {"wrong": next(figures)})  # fmt: skip
    result = Loop(run, tmp_path).train()
    assert result.step == 10 and result.best == 1.0 and "3 looks" in result.why
    assert [step for step, _ in state.listed(tmp_path / "checkpoints")] == [10, 4]


def test_a_changed_recipe_is_told_and_needs_force(tmp_path: Path) -> None:
    run = Run(small(), Causal(), Noisy(IDS, 8), settings())
    Loop(run, tmp_path).train()
    other = dataclasses.replace(run, settings=override(run.settings, {"optim.lr": "0.5", "steps": "9"}))
    loop = Loop(other, tmp_path)
    with pytest.raises(ConfigError, match=r"settings\.optim\.lr: was 0\.0003, is 0\.5; --force"):
        restore(loop, tmp_path)
    restore(loop, tmp_path, force=True)
    assert loop.train().step == 9
    wider = Loop(dataclasses.replace(other, model=nn.Linear(2, 2)), None)
    with pytest.raises(CheckpointError, match="another model"):
        restore(wider, tmp_path, force=True)


def test_frozen_weights_are_not_saved_and_must_be_the_same(tmp_path: Path) -> None:
    def made(seed: int) -> Run:
        model = small(seed)
        for name, p in model.named_parameters():
            p.requires_grad = "norm" in name
        return Run(model, Causal(), Noisy(IDS, 8), settings())

    Loop(made(0), tmp_path).train()
    found, _ = state.latest(tmp_path / "checkpoints")
    assert found is not None and all("norm" in name for name in found.tensors["model"])
    restore(Loop(made(0)), tmp_path)
    with pytest.raises(ConfigError, match="not trained differ"):
        restore(Loop(made(1)), tmp_path)


@COMPILES
def test_wrong_settings_and_data_are_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'optm\.lr' \(nearest: 'optim\.lr'\)"):
        override(Settings(), {"optm.lr": "1"})
    with pytest.raises(ConfigError, match="'lr' should be one of int, float, found 'fast'"):
        override(Settings(), {"optim.lr": "fast"})
    with pytest.raises(ConfigError, match="needs an end"):
        Loop(Run(small(), Causal(), Windows(IDS, 8), Settings()))
    with pytest.raises(InputError, match="a window of 8 needs 9"):
        Windows(IDS[:5], 8)
    with pytest.raises(InputError, match="vocabulary has 20"):
        Windows(IDS, 8, vocab=20)
    for compiled in (False, True):
        with pytest.raises(InputError, match="token id 77 is outside the vocabulary of 32"):
            Loop(Run(small(), Causal(), Windows(torch.full((20,), 77), 8), settings(compile=compiled))).train()


class Writer:
    """What torch's writer of tensorboard files is asked to do."""

    def __init__(self, folder: str):
        self.seen: list[tuple[str, float, int]] = []
        self.closed = False
        Writer.last = self

    last: Writer

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not self.closed
        self.seen.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_a_tracker_gets_every_figure_and_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    Loop(Run(small(), Causal(), Windows(IDS, 8, 8), settings(track=Track.TENSORBOARD)), tmp_path / "one").train()
    logged = [("loss", line["loss"], line["step"]) for line in read(tmp_path / "one" / "log.jsonl") if "loss" in line]
    assert [entry for entry in Writer.last.seen if entry[0] == "loss"] == logged and len(logged) == 6 and Writer.last.closed
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'transept\[track\]'"):
        Loop(Run(small(), Causal(), Windows(IDS, 8, 8), settings(track=Track.WANDB)), tmp_path / "two").train()


def test_a_log_cut_short_and_a_full_disk_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(folder, found, disk=None):
        calls.append(found.step)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save", full)
    Loop(Run(small(), Causal(), Noisy(IDS, 8), settings(saving=Saving(every=2))), tmp_path).train()
    assert calls == [2, 4, 6]
    events = [line["event"] for line in read(tmp_path / "log.jsonl") if "event" in line]
    assert events == ["not_saved"] * 3
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert max(line["step"] for line in read(tmp_path / "log.jsonl")) == 6
    json.dumps(read(tmp_path / "log.jsonl"))
