"""The promises of training, tried on this machine: `transept check training`.

Each check takes the share of its full count to run and a seed, and returns (how many were tried, a sentence for each that did not hold).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transept.adapters.tune import Tune, tune
from transept.core.batch import Batch, Draw
from transept.core.errors import CheckpointError, NumericsError
from transept.data.packing import Packed
from transept.data.rows import LONGEST, Quarantine, Table
from transept.data.source import Samples, Windows
from transept.evaluation import crashes
from transept.evaluation.subjects import VOCAB, Noisy, bits, documents, small
from transept.training import state
from transept.training.batches import shares
from transept.training.log import read
from transept.training.loop import Loop
from transept.training.objective import Sum
from transept.training.objectives.causal import Causal
from transept.training.objectives.losses import stacked
from transept.training.resume import restore, snapshot
from transept.training.run import Guard, Judging, Loading, Optim, Precision, Run, Saving, Schedule, Settings, Shape

Found = tuple[int, list[str]]
TIMES = 12


def padded(texts: Sequence[torch.Tensor]) -> Samples:
    """The texts as rows of a padded batch."""
    return Samples([{"ids": t} for t in texts], lambda samples, draw: stacked(samples), [len(t) for t in texts])


def gradients(loop: Loop, splits: Sequence[Sequence[tuple[Draw, int]]]) -> tuple[torch.Tensor, float]:
    """(the gradient divided by the global count, the loss) of pieces that several processes would have."""
    total, loss, count = torch.zeros(()), 0.0, 0.0
    for pieces in splits:
        tally = loop.updater.gradients(list(pieces), lambda piece: loop.sampler.batch(*piece), 0)
        total = total + torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in loop.named.values()])
        pair = tally.sums.get("loss", torch.zeros(2))
        loss, count = loss + float(pair[0]), count + float(pair[1])
    return total / count, loss / count


def splits(share: float, seed: int) -> Found:
    """Any split of a batch over micro-batches and processes: gradients equal to 1e-6, and the same loss."""
    rng, many, bad = random.Random(seed), max(1, round(400 * share)), []
    for trial in range(many):
        size = rng.randint(2, 12)
        loop = Loop(Run(small(trial), Causal(), padded(documents(size, seed + trial)), Settings(steps=1, loading=Loading(batch=size))))
        start = Draw(0, 0, 0)
        want, loss = gradients(loop, [[(start, size)]])
        world, micro = rng.randint(1, min(4, size)), rng.randint(1, size)
        got, again = gradients(loop, [shares(start, size, rank, world, micro) for rank in range(world)])
        off = float((got - want).abs().max())
        if off > 1e-6 or abs(again - loss) > 1e-6:
            bad.append(f"{size} samples over {world} processes, {micro} at a time: gradients differ by {off:.1e}")
    return many, bad


def packing(share: float, seed: int) -> Found:
    """Documents padded, one a row, and packed, several a row: gradients equal to 1e-6, and the same loss."""
    many, bad = max(1, round(200 * share)), []
    for trial in range(many):
        texts = documents(8, seed + trial)
        found = []
        for source in (padded(texts), Packed([t.tolist() for t in texts], 24)):
            settings = Settings(steps=1, loading=Loading(batch=len(source)))
            loop = Loop(Run(small(trial), Causal(), source, settings))
            found.append(gradients(loop, [[(Draw(0, 0, 0), len(source))]]))
        off = float((found[0][0] - found[1][0]).abs().max())
        if off > 1e-6 or abs(found[0][1] - found[1][1]) > 1e-6:
            bad.append(f"trial {trial}: gradients differ by {off:.1e}, losses {found[0][1]} and {found[1][1]}")
    return many, bad


class Following(nn.Module):
    """An objective with everything that an objective may have: a head of its own, a teacher that follows the model, random numbers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.teacher = nn.Buffer(torch.zeros(VOCAB, 16))

    def forward(self, model: nn.Module, batch: Batch) -> Sum:
        hidden = nn.functional.dropout(model(batch["ids"]).hidden * self.scale, 0.1, self.training)
        target = nn.functional.embedding(batch["ids"], self.teacher) + 1.0
        return Sum((hidden - target).square().mean(-1).sum(), batch["ids"].numel(), {"scale": (self.scale.detach(), 1)})

    def after_step(self, model: nn.Module) -> None:
        """The teacher follows the token table."""
        self.teacher.lerp_(model.get_parameter("embed.tokens.weight").detach(), 0.1)


OBJECTIVES: dict[str, Callable[[nn.Module], Any]] = {"causal": lambda m: Causal(), "following": Following, "packed": lambda m: Causal()}


def configurations() -> Iterator[tuple[str, Callable[[], Run]]]:
    """96 runs: objective x precision x accumulation x workers x what is trained; the rest (Muon, means, order, looks) changes along."""
    axes = (OBJECTIVES, Precision, (8, 3), (0, 2), Tune)
    for number, (objective, precision, micro, workers, tuning) in enumerate(itertools.product(*axes)):
        yield f"{objective}, {precision.value}, {micro} at a time, {workers} workers, {tuning.value}", lambda c=(
            objective, precision, micro, workers, tuning, number): configured(*c)  # fmt: skip


def configured(objective: str, precision: Precision, micro: int, workers: int, tuning: Tune, number: int) -> Run:
    """One of the configurations."""
    model = small(number, dropout=0.1)
    # Its head is the token table: the last norm stands for what is new to a task.
    tune(model, tuning, heads=("stack.norm",))
    ids = torch.cat(documents(30, number))
    packed = Packed([t.tolist() for t in documents(60, number)], 24)
    settings = Settings(
        steps=TIMES, seed=number, precision=precision, ema=0.9 * (number % 3 == 0), average=0.5 * (number % 3 == 1),
        optim=Optim(lr=1e-2, muon=0.02 * (number % 2)), schedule=Schedule(shape=list(Shape)[number % 4], warmup=3),
        loading=Loading(batch=8, micro=micro, workers=workers), judging=Judging(every=5 * (number % 2), source="held"),
        saving=Saving(every=1, keep=99),
    )  # fmt: skip
    held = {"held": Windows(ids[:40], 8, 8)} if number % 2 else {}
    return Run(model, OBJECTIVES[objective](model), packed if objective == "packed" else Noisy(ids, 8), settings, eval=held)


def last(folder: Path) -> dict[str, Any]:
    """What must be equal in the newest checkpoint of a run."""
    found, _ = state.latest(folder / "checkpoints")
    if found is None:
        raise CheckpointError(f"{folder} holds no whole checkpoint")
    return bits(found)


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each update, as logged."""
    return {line["step"]: (line["loss"], line["norm"]) for line in read(folder / "log.jsonl") if "loss" in line}


@contextmanager
def steady() -> Iterator[None]:
    """One thread, so that sums are added in one order; the count that was set comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resuming(share: float, seed: int) -> Found:
    """96 configurations, stopped and resumed at every step: weights, optimiser, generators, data and losses bit-identical."""
    every = list(configurations())
    chosen = random.Random(seed).sample(every, max(1, round(len(every) * share)))
    tried, bad = 0, []
    with steady(), tempfile.TemporaryDirectory() as place:
        for name, make in chosen:
            whole = Path(place, "whole")
            loop = Loop(make(), whole)
            loop.train()
            want, curve = last(whole), losses(whole)
            for step in range(1, TIMES):
                part = Path(place, "part")
                shutil.copytree(whole / "checkpoints" / f"step-{step:08d}", part / "checkpoints" / f"step-{step:08d}")
                again = Loop(make(), part)
                restore(again, part)
                again.train()
                got, tried = last(part), tried + 1
                wrong = [key for key in want if got.get(key) != want[key]]
                later = {s: pair for s, pair in curve.items() if s > step}
                if wrong or set(got) != set(want) or losses(part) != later:
                    bad.append(f"{name}, resumed at {step}: {wrong[:3] or 'the losses'} differ")
                shutil.rmtree(part)
            shutil.rmtree(whole)
    return tried, bad


class Broken:
    """The causal loss, spoiled at one update: a loss, a gradient, or a weight that is not finite."""

    def __init__(self, kind: str, at: int, value: float):
        self.kind, self.at, self.value, self.calls = kind, at, value, 0

    def __call__(self, model: nn.Module, batch: Batch) -> Sum:
        found = Causal()(model, batch)
        self.calls += 1
        if self.calls != self.at:
            return found
        if self.kind == "loss":
            return Sum(found.loss * self.value, found.count)
        if self.kind == "gradient":
            found.loss.register_hook(lambda grad: grad * self.value)
            return found
        poisoned = next(model.parameters()) * torch.tensor(self.value)
        return Sum(found.loss + poisoned.sum(), found.count)


def not_finite(share: float, seed: int) -> Found:
    """A loss, gradient or activation that is not finite, at some step and micro-batch: the weights stay, the run stops or skips."""
    kinds = list(itertools.product(("loss", "gradient", "activation"), (math.nan, math.inf, -math.inf), (1, 2, 3, 5, 8), (8, 4)))
    chosen = random.Random(seed).sample(kinds, max(1, min(len(kinds), round(80 * share))))
    bad = []
    for kind, value, at, micro in chosen:
        for skips in (0, 1):
            settings = Settings(steps=10, loading=Loading(batch=8, micro=micro), guard=Guard(skips=skips))
            loop = Loop(Run(small(), Broken(kind, at, value), Windows(torch.cat(documents(30, seed)), 8), settings))
            try:
                loop.train()
                held = skips == 1 and loop.step == 10
            except NumericsError:
                held = skips == 0
            finite = all(bool(p.isfinite().all()) for p in loop.named.values())
            moments = all(bool(t.isfinite().all()) for ts in snapshot(loop).tensors.values() for t in ts.values() if t.is_floating_point())
            if not (held and finite and moments):
                bad.append(f"{kind} {value} in micro-batch {at} of {micro}, {skips} skips: {'not caught' if finite else 'weights spoiled'}")
    return 2 * len(chosen), bad


def flips(share: float, seed: int) -> Found:
    """One byte of the newest checkpoint changed: it is found, said, and the one before it is taken."""
    rng, many, bad = random.Random(seed), max(1, round(20000 * share)), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for step in (1, 2):
            last = state.save(folder, crashes.example(step))
        files = sorted(last.iterdir())
        sizes = [f.stat().st_size for f in files]
        for trial in range(many):
            # Each file in turn, so that the small ones are tried as often as the large.
            file = files[trial % len(files)]
            at, change = rng.randrange(sizes[trial % len(files)]), rng.randrange(1, 256)
            data = file.read_bytes()
            file.write_bytes(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])
            if not damaged(last):
                bad.append(f"byte {at} of {file.name} xor {change}: not found")
            if trial % 100 == 0:
                found, refused = state.latest(folder)
                if found is None or found.step != 1 or not refused:
                    bad.append(f"byte {at} of {file.name} xor {change}: the checkpoint before is not taken")
            file.write_bytes(data)
        if damaged(last):
            bad.append("the checkpoint is refused although every byte is as it was")
    return many, bad


def damaged(path: Path) -> bool:
    """True if a checkpoint is refused."""
    try:
        state.verify(path)
    except CheckpointError:
        return True
    return False


GOOD = b'{"id": 1, "text": "a sound row", "label": 1}'
ROWS: dict[str, tuple[bytes, bool]] = {
    "not UTF-8": (b'{"id": 2, "text": "caf\xe9", "label": 1}', False),
    "cut short": (b'{"id": 2, "text": "caf', False),
    "too long": (b'{"id": 2, "text": "' + b"x" * LONGEST + b'", "label": 1}', False),
    "a column missing": (b'{"id": 2, "label": 1}', False),
    "another type": (b'{"id": 2, "text": 3, "label": 1}', False),
    "empty text": (b'{"id": 2, "text": " ", "label": 1}', False),
    "empty row": (b"", False),
    "not an object": (b"[1, 2]", False),
    "label out of range": (b'{"id": 2, "text": "a", "label": 9}', False),
    "a number that is none": (b'{"id": 2, "text": "a", "label": NaN}', False),
    "nested too deep": (b"[" * 100_000, False),
    "CRLF": (GOOD + b"\r", True),
}


def bad_rows(share: float, seed: int) -> Found:
    """12 kinds of odd rows, 1 % of a file each time: none ends the reading, each bad one is told by file and row, no good one is lost."""
    rng, many, bad = random.Random(seed), max(1, round(60 * share)), []
    with tempfile.TemporaryDirectory() as place:
        for trial in range(many):
            name, (odd, good) = list(ROWS.items())[(trial + seed) % len(ROWS)]
            rows = [GOOD] * 200
            at = sorted(rng.sample(range(200), 2))
            for i in at:
                rows[i] = odd
            path = Path(place, f"{trial}.jsonl")
            path.write_bytes((b"\xef\xbb\xbf" if trial % 2 else b"") + b"\n".join(rows) + b"\n")
            aside = Quarantine()
            check = lambda row: "" if row["label"] in (0, 1) else f"label {row['label']} is neither 0 nor 1"  # noqa: E731
            table = Table(path, {"id": int, "text": str, "label": int}, aside, check)
            want = [] if good else [f"{path}:{i + 1}:" for i in at]
            sound = all(table[i]["text"] == "a sound row" for i in range(len(table)))
            if len(table) != 200 - len(want) or not sound or [r[: len(w)] for r, w in zip(aside.reasons, want, strict=False)] != want:
                bad.append(f"{name}: {len(table)} rows kept, set aside {aside.reasons[:2]}")
    return many, bad


def same_again(share: float, seed: int) -> Found:
    """Two runs of one configuration: the same bits."""
    every = list(configurations())
    chosen = random.Random(seed + 1).sample(every, max(1, round(len(every) * share)))
    bad = []
    with steady(), tempfile.TemporaryDirectory() as place:
        for number, (name, make) in enumerate(chosen):
            folders = [Path(place, f"{number}-{i}") for i in (0, 1)]
            for folder in folders:
                run = make()
                Loop(dataclasses.replace(run, settings=run.settings.replace(saving=Saving())), folder).train()
            one, two = (last(folder) for folder in folders)
            wrong = [key for key in one if one[key] != two.get(key)]
            if wrong:
                bad.append(f"{name}: {wrong[:3]} of two runs differ")
    return len(chosen), bad


CHECKS: dict[str, Callable[[float, int], Found]] = {
    "any split of a batch": splits,
    "padded and packed": packing,
    "two runs, the same bits": same_again,
    "resume at every step": resuming,
    "crash states": crashes.crash_states,
    "faults at every file operation": crashes.faults,
    "bit flips": flips,
    "kill -9": crashes.kills,
    "told to stop": crashes.stops,
    "not finite": not_finite,
    "bad rows": bad_rows,
}
