"""What a plan consists of: each record's shape, bytes and FLOPs, and its share of the time. Needs numpy only, never torch."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from transept import native
from transept.inference.plan.steps import Steps
from transept.inference.rows import Row
from transept.native.binding import OPS, PAGE, CRecord
from transept.native.library import library

# Operations of each number that the small records make; their time is that of moving the numbers.
_PER_NUMBER = {"norm": 4, "rotary": 3, "element": 2, "angles": 2, "pool": 1, "route": 8}
_ARITHMETIC = 50e9
"""FLOP/s of one thread that an estimate assumes; only the proportion to the bandwidth counts."""


@dataclass(frozen=True)
class Line:
    """One record, or several alike: bytes read and FLOPs of a step of one token; `share` of the step's time, 0 where it is not known."""

    op: str
    label: str
    shape: str
    nbytes: int
    flops: int
    count: int = 1
    share: float = 0.0


def lines(program: native.Program, length: int) -> list[Line]:
    """Each record in order, for one token that looks at `length` columns of cache."""
    return [_line(program, i, length) for i in range(len(program.records))]


def _line(program: native.Program, i: int, length: int) -> Line:
    record = program.records[i]
    op, label, n = OPS[record.op], program.labels[i], record.i
    weights = [program.weights[w] for w in record.w if w >= 0]
    own = sum(w.data.nbytes for w in weights)
    if op in ("linear", "experts"):
        return _matrices(op, label, record, weights)
    if op == "embed":
        return Line(op, label, f"{weights[0].kind} [{weights[0].n} {weights[0].k}]", own // weights[0].n, 0)
    if op in ("append", "attend"):
        c = program.caches[n[0]]
        column = c.page_bytes // PAGE
        if op == "append":
            return Line(op, label, f"{c.kind} [{c.kv_heads} {c.head}]", column, 0)
        seen = length if n[2] < 0 else min(length, n[2] + 1)
        return Line(op, label, f"{c.kind} [{n[1]} x {c.head}, {c.kv_heads} kv, {seen} keys]", column * seen,
                    2 * n[1] * (c.head + c.vhead) * seen)  # fmt: skip
    width = _width(op, record, weights)
    return Line(op, label, f"[{width}]", own + 4 * width, _PER_NUMBER.get(op, 0) * width)


def _matrices(op: str, label: str, record: CRecord, weights: Sequence[native.Weight]) -> Line:
    shape = ", ".join(f"{w.kind} [{w.n} {w.k}]" for w in weights if w.kind != "VECTOR" or w.n > 1)
    matrices = [w for w in weights if w.kind != "VECTOR"]
    nbytes, flops = sum(w.data.nbytes for w in weights), sum(2 * w.n * w.k for w in matrices)
    if op == "experts":
        # Of all experts, those that one token meets.
        nbytes, flops = (x * record.i[1] // record.i[0] for x in (nbytes, flops))
    how = ", int8 activations" if record.i[3 if op == "experts" else 1] else ""
    return Line(op, label, f"{shape}{how}", nbytes, flops)


def _width(op: str, record: CRecord, weights: Sequence[native.Weight]) -> int:
    n = record.i
    known = {"norm": n[1] * n[2], "rotary": n[0] * n[2], "element": n[1] * n[2], "gather": n[0], "pool": n[2], "route": n[0],
             "unfold": n[0] * n[3]}  # fmt: skip
    return known[op] if op in known else 2 * weights[0].k


def grouped(found: Sequence[Line]) -> list[Line]:
    """Records of the same op, shape and place in their layer as one line, in the order of their first."""
    groups: dict[tuple[str, str, str], Line] = {}
    for line in found:
        label = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", line.label)
        key = (line.op, label, line.shape)
        old = groups.get(key, replace(line, label=label, nbytes=0, flops=0, count=0, share=0.0))
        groups[key] = replace(old, nbytes=old.nbytes + line.nbytes, flops=old.flops + line.flops, count=old.count + line.count,
                              share=old.share + line.share)  # fmt: skip
    return list(groups.values())


def measured(steps: Steps, found: Sequence[Line], length: int, rounds: int = 16) -> tuple[list[Line], float]:
    """The lines with their share of the time, and the seconds of one step of one token after `length` others."""
    pages = tuple(range(-(-(length + 1) // PAGE)))
    steps.run([Row((0,) * length, 0, pages, 0)])
    seconds, wall = np.zeros(len(found)), []
    for _ in range(rounds):
        began = time.perf_counter()
        steps.run([Row((0,), length, pages, 1)], seconds)
        wall.append(time.perf_counter() - began)
    return shared(found, seconds), sorted(wall)[rounds // 2]


def estimated(found: Sequence[Line], bandwidth: float) -> list[Line]:
    """The lines with the share of the time that their bytes and FLOPs would take, whichever is longer."""
    return shared(found, np.array([max(line.nbytes / bandwidth, line.flops / _ARITHMETIC) for line in found]))


def shared(found: Sequence[Line], seconds: NDArray[np.float64]) -> list[Line]:
    """The lines with their part of the sum of `seconds`."""
    total = float(seconds.sum()) or 1.0
    return [replace(line, share=float(s) / total) for line, s in zip(found, seconds, strict=True)]


def bandwidth(threads: int, nbytes: int = 256 << 20, rounds: int = 3) -> float:
    """Bytes per second that the memory is read at by so many threads; by numpy on one where there is no native core."""
    words = np.ones(nbytes // 8, np.uint64)
    team = native.Team(threads) if native.available() else None
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        if team is None:
            words.max()
        else:
            library().transept_read(team.handle, words.ctypes.data, words.size)
        best = max(best, words.nbytes / (time.perf_counter() - began))
    return best
