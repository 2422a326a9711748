"""Checkpoints under fire: every state that a crash can leave, a fault at every file operation, processes killed and told to stop.

    python -m transept.evaluation.crashes kill|stop COUNT SEED     # a process of its own, that only forks
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transept.core.errors import CheckpointError
from transept.evaluation.subjects import Noisy, bits, documents, small
from transept.training import state
from transept.training.log import read
from transept.training.loop import Loop
from transept.training.objectives.causal import Causal
from transept.training.resume import restore
from transept.training.run import Loading, Optim, Run, Saving, Schedule, Settings, Shape
from transept.training.state import Disk, State

Found = tuple[int, list[str]]


def example(step: int) -> State:
    """A small state whose numbers tell its step."""
    gen = torch.Generator().manual_seed(step)
    groups = {"model": 40, "optim": 80, "random": 8}
    tensors = {g: {f"{g}{i}": torch.randn(n, generator=gen) for i in range(3)} for g, n in groups.items()}
    return State({"step": step, "cursor": [0, 0, step], "note": "x" * 200}, tensors)


# --- what a power cut may leave ----------------------------------------------------------------------------------------------------------


class Recorder(Disk):
    """Does everything, and takes down what it did."""

    def __init__(self, synced: bool = True) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.names: dict[int, Path] = {}
        self.synced = synced

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.done.append(("mkdir", path))

    def create(self, path: Path) -> int:
        handle = super().create(path)
        self.names[handle] = path
        self.done.append(("create", path))
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        many = super().write(handle, data[:97])
        self.done.append(("write", self.names[handle], bytes(data[:many])))
        return many

    def sync(self, handle: int) -> None:
        super().sync(handle)
        if self.synced:
            self.done.append(("sync", self.names[handle]))

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        if self.synced:
            self.done.append(("sync_folder", path))

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.done.append(("rename", old, new))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.done.append(("remove", path))


@dataclass
class _File:
    data: bytes = b""
    safe: int = 0


@dataclass
class _World:
    """A file system as it is remembered (`names`: folder -> file -> content) and the namespace operations that may still be lost."""

    names: dict[str, dict[str, _File]] = field(default_factory=dict)
    pending: list[tuple[Any, ...]] = field(default_factory=list)
    open: dict[Path, _File] = field(default_factory=dict)

    def take(self, op: tuple[Any, ...]) -> None:
        kind, path = op[0], op[1]
        if kind == "write":
            self.open[path].data += op[2]
        elif kind == "sync":
            self.open[path].safe = len(self.open[path].data)
        elif kind == "sync_folder":
            self._settle(path)
        else:
            if kind == "create":
                op = (*op, self.open.setdefault(path, _File()))
            self.pending.append(op)

    def _settle(self, folder: Path) -> None:
        """What happened in one folder is on the disk; with it, in order, whatever came before (a journal keeps its order)."""
        last = max((i for i, op in enumerate(self.pending) if op[1].parent == folder), default=-1)
        for op in self.pending[: last + 1]:
            _apply(self.names, op)
        del self.pending[: last + 1]

    def crashed(self, kept: int, rng: random.Random) -> dict[str, dict[str, bytes]]:
        """What is found after a crash that kept `kept` of the pending operations and some of each file's bytes."""
        names = {folder: dict(files) for folder, files in self.names.items()}
        for op in self.pending[:kept]:
            _apply(names, op)
        return {folder: {name: _torn(file, rng) for name, file in files.items()} for folder, files in names.items()}


def _apply(names: dict[str, dict[str, _File]], op: tuple[Any, ...]) -> None:
    kind, path = op[0], op[1]
    if kind == "mkdir":
        names[path.name] = {}
    elif kind == "create":
        names.setdefault(path.parent.name, {})[path.name] = op[2]
    elif kind == "rename":
        names[op[2].name] = names.pop(path.name, {})
    else:
        names.pop(path.name, None)


def _torn(file: _File, rng: random.Random) -> bytes:
    """The bytes that were synced, and of the others all, none, some, or zeros in their place."""
    rest = file.data[file.safe :]
    if not rest:
        return file.data
    how = rng.randrange(4)
    cut = rng.randrange(len(rest) + 1)
    return file.data[: file.safe] + (rest, b"", rest[:cut], rest[:cut] + bytes(len(rest) - cut))[how]


def recorded(folder: Path, synced: bool = True) -> tuple[_World, list[tuple[Any, ...]]]:
    """A world with one sound checkpoint, and the operations of two more saves with what they prune."""
    state.save(folder, example(1))
    world = _World({p.name: {f.name: _File(f.read_bytes(), f.stat().st_size) for f in p.iterdir()} for p in folder.iterdir()})
    disk = Recorder(synced)
    for step in (2, 3):
        state.save(folder, example(step), disk)
        state.prune(folder, 1, None, disk)
    return world, disk.done


def crash_states(share: float, seed: int, synced: bool = True) -> Found:
    """20,000 states that a crash may leave, at every point of two saves: each holds a sound checkpoint, none older than was promised."""
    rng, many = random.Random(seed), max(1, round(20000 * share))
    bad: list[str] = []
    known: dict[Any, int] = {}
    with tempfile.TemporaryDirectory() as place:
        world, ops = recorded(Path(place, "real"), synced)
        each, tried, promised = -(-many // (len(ops) + 1)), 0, 1
        for point in range(len(ops) + 1):
            if point:
                world.take(ops[point - 1])
                promised = max([promised, *_promised(world)])
            for _ in range(each):
                tried += 1
                found = world.crashed(rng.randint(0, len(world.pending)), rng)
                step = _latest(found, Path(place, "crash"), known)
                if step < promised:
                    bad.append(f"after operation {point} ({ops[point - 1][0]}): step {step} is found, {promised} was promised")
    return tried, bad


def _promised(world: _World) -> Iterator[int]:
    """The steps whose names are on the disk for good, and whose removal is not pending."""
    for name in world.names:
        if name.startswith("step-"):
            yield int(name[5:])


def _latest(found: dict[str, dict[str, bytes]], place: Path, known: dict[Any, int]) -> int:
    """The step that a reader finds in these folders; hidden ones, which it does not look at, tell no states apart."""
    key = tuple(sorted((folder, tuple(sorted(files.items()))) for folder, files in found.items() if not folder.startswith(".")))
    if key not in known:
        for folder, files in found.items():
            (place / folder).mkdir(parents=True)
            for name, data in files.items():
                (place / folder / name).write_bytes(data)
        place.mkdir(exist_ok=True)
        best, _ = state.latest(place)
        known[key] = 0 if best is None else best.step
        shutil.rmtree(place)
    return known[key]


# --- faults of the disk ------------------------------------------------------------------------------------------------------------------


class Faulty(Disk):
    """Fails at the n-th operation: with an error, or by writing less than it was given."""

    def __init__(self, at: int, kind: int):
        self.at, self.kind, self.calls = at, kind, 0

    def _count(self) -> bool:
        self.calls += 1
        if self.calls == self.at and self.kind:
            raise OSError(self.kind, os.strerror(self.kind))
        return self.calls == self.at

    def mkdir(self, path: Path) -> None:
        self._count()
        super().mkdir(path)

    def create(self, path: Path) -> int:
        self._count()
        return super().create(path)

    def write(self, handle: int, data: memoryview) -> int:
        data = data[:150]
        return super().write(handle, data[: max(1, len(data) // 2)] if self._count() else data)

    def sync(self, handle: int) -> None:
        self._count()
        super().sync(handle)

    def sync_folder(self, path: Path) -> None:
        self._count()
        super().sync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self._count()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._count()
        super().remove(path)


def faults(share: float, seed: int) -> Found:
    """A full disk, a broken one, a quota, an interruption, a short write, at every operation of a save: the checkpoint before it stays."""
    kinds = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR, 0)
    with tempfile.TemporaryDirectory() as place:
        probe = Faulty(0, 0)
        _second(Path(place, "probe"), probe)
        points = [(at, kind) for at in range(1, probe.calls + 1) for kind in kinds]
        chosen = random.Random(seed).sample(points, max(1, round(len(points) * share)))
        bad = []
        for at, kind in chosen:
            folder = Path(place, f"{at}-{kind}")
            raised = _second(folder, Faulty(at, kind))
            found, _ = state.latest(folder)
            # A save that returned has promised the new one; one that failed may have come so far or not.
            if found is None or found.step < (1 if raised else 2) or (kind != 0) != raised:
                bad.append(f"operation {at}, {errno.errorcode.get(kind, 'short write')}: found {None if found is None else found.step}")
            shutil.rmtree(folder)
    return len(chosen), bad


def _second(folder: Path, disk: Disk) -> bool:
    """A sound save, then one on that disk; True if the second raised."""
    state.save(folder, example(1))
    try:
        state.save(folder, example(2), disk)
        state.prune(folder, 1, None, disk)
    except OSError:
        return True
    return False


# --- processes killed and told to stop ---------------------------------------------------------------------------------------------------

EVERY = 5


def victim(folder: Path, steps: int = 10**6) -> int:
    """Trains a tiny model in `folder` from where it stands; returns the signal that stopped it, 0 for none."""
    settings = Settings(
        steps=steps, ema=0.9, optim=Optim(lr=1e-3), schedule=Schedule(shape=Shape.CONSTANT, warmup=3), loading=Loading(batch=8, micro=4),
        saving=Saving(every=EVERY),
    )  # fmt: skip
    loop = Loop(Run(small(0, dropout=0.1), Causal(), Noisy(torch.cat(documents(60, 0)), 8), settings), folder)
    if (folder / "checkpoints").is_dir() and state.latest(folder / "checkpoints")[0] is not None:
        restore(loop, folder)
    return loop.train().signal


def kills(share: float, seed: int) -> Found:
    """200 kill -9 at random moments: always a sound checkpoint, at most one interval lost, and in the end the uninterrupted run's bits."""
    return _apart("kill", max(1, round(200 * share)), seed)


def stops(share: float, seed: int) -> Found:
    """50 SIGTERM and SIGINT at random moments: exit 143 or 130 within 5 s, not one step lost."""
    return _apart("stop", max(1, round(50 * share)), seed)


def _apart(what: str, many: int, seed: int) -> Found:
    """In a fresh process: one that has not computed anything yet may fork."""
    line = [sys.executable, "-m", "transept.evaluation.crashes", what, str(many), str(seed)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise CheckpointError(f"the check {what!r} ended with {done.returncode}: {done.stderr[-500:]}")
    tried, bad = json.loads(done.stdout.splitlines()[-1])
    return tried, bad


def _child(folder: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            stopped = victim(folder)
        except BaseException:
            os._exit(70)
        os._exit(128 + stopped if stopped else 0)
    return child


def _steps(folder: Path) -> int:
    """The last update that the log tells of."""
    path = folder / "log.jsonl"
    return max((line["step"] for line in read(path) if "loss" in line), default=0) if path.exists() else 0


def _kill(folder: Path, many: int, rng: random.Random) -> Iterator[str]:
    """Kills, and what did not hold."""
    last, begun = 0, time.monotonic()
    child = _child(folder)
    while not _steps(folder):
        time.sleep(0.01)
    start = time.monotonic() - begun
    for cycle in range(many):
        child = child if cycle == 0 else _child(folder)
        # From the very beginning to well after the first save, however slow the machine is.
        time.sleep(rng.uniform(0.0, start + 0.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found, _ = state.latest(folder / "checkpoints")
        step, logged = 0 if found is None else found.step, _steps(folder)
        if not os.WIFSIGNALED(status):
            yield f"kill {cycle}: the run ended by itself with {os.waitstatus_to_exitcode(status)}"
        if step < last or (found is None and last):
            yield f"kill {cycle}: step {step} is found after {last}"
        if logged - step > EVERY:
            yield f"kill {cycle}: {logged - step} updates lost, an interval is {EVERY}"
        last = step
    if last == 0:
        yield "no checkpoint was ever written"
    yield from _compared(folder, last)


def _compared(folder: Path, steps: int) -> Iterator[str]:
    """The uninterrupted run, against what was found."""
    whole = folder.with_name("whole")
    victim(whole, steps)
    one, two = (state.latest(place / "checkpoints")[0] for place in (folder, whole))
    if one is None or two is None:
        yield "a checkpoint is missing at the end"
        return
    left, right = bits(one), bits(two)
    wrong = [key for key in right if left.get(key) != right[key]]
    if wrong:
        yield f"after {steps} updates {wrong[:3]} differ from the uninterrupted run's"


def _stop(folder: Path, many: int, rng: random.Random) -> Iterator[str]:
    """Orders to stop, and what did not hold."""
    for cycle in range(many):
        before, child = _steps(folder), _child(folder)
        while _steps(folder) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        order = (signal.SIGTERM, signal.SIGINT)[cycle % 2]
        begin = time.monotonic()
        os.kill(child, order)
        _, status = os.waitpid(child, 0)
        seconds, code = time.monotonic() - begin, os.waitstatus_to_exitcode(status)
        found, _ = state.latest(folder / "checkpoints")
        if code != 128 + order or seconds > 5:
            yield f"stop {cycle}: exit {code} after {seconds:.1f} s, expected {128 + order}"
        if found is None or found.step != _steps(folder):
            yield f"stop {cycle}: step {None if found is None else found.step} is saved, {_steps(folder)} were made"


def main(what: str, many: int, seed: int) -> None:
    """Runs one of the two and prints [tried, [what did not hold]]."""
    import torch._dynamo  # the optimisers' first step would, in each child anew

    torch.set_num_threads(1)
    trials: dict[str, Callable[[Path, int, random.Random], Iterator[str]]] = {"kill": _kill, "stop": _stop}
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps([many, list(trials[what](Path(place, "run"), many, random.Random(seed)))]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
