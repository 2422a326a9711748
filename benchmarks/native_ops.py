"""Single operations of the native core beside the floor: `python benchmarks/native_ops.py [--threads 2] [--rounds 7]`.

Decode: GB/s of one row times each kind of weight, beside the memory's measured read bandwidth with the same threads (best of the
rounds, interleaved). Prefill: GFLOP/s of 512 rows beside torch's fp32 matmul.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from transept import native
from transept.native.library import library

KINDS = ("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_1", "Q4_0")
N, K, LAYERS = 3072, 3072, 24  # large enough in every kind that the weights come from memory, not from a cache


def best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of the rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def random_weight(kind: str, n: int, k: int) -> native.Weight:
    """Panels of random small numbers; only their bytes matter here."""
    data = np.random.default_rng(0).integers(0, 64, native.packed_bytes(kind, n, k), np.uint8)
    return native.Weight(kind, n, k, data)


def chain(kind: str, rows: int, team: native.Team, layers: int, int8: bool) -> tuple[native.Plan, native.Batch, int]:
    """`layers` linear records, each with its own memory; returns the plan, a batch, and the weights' bytes."""
    p = native.Program(max_rows=rows)
    x, y = p.buffer(K), p.buffer(N)
    weights = [random_weight(kind, N, K) for _ in range(layers)]
    for weight in weights:
        p.linear(x, weight, y, int8=int8)
    plan = p.build(team)
    plan.view(x)[:] = np.random.default_rng(1).standard_normal((rows, K))
    return plan, native.Batch(None, np.zeros(rows), np.arange(rows)), sum(w.data.nbytes for w in weights)


def decode(team: native.Team, rounds: int) -> None:
    """GB/s of one, four and sixteen rows for each kind."""
    words = np.ones(1 << 26, np.uint64)
    floor = 0.0
    print(f"{'kind':6} {'acts':5} {'GB/s B=1':>9} {'of floor':>9} {'t(4)/t(1)':>10} {'t(16)/t(1)':>11}")
    for kind in KINDS:
        for int8 in (True, False) if kind.startswith("Q") else (False,):
            layers = max(2, int(1.5e8 / native.packed_bytes(kind, N, K)))
            runs = []
            for rows in (1, 4, 16):
                plan, batch, size = chain(kind, rows, team, layers, int8)
                plan.step(batch)
                runs.append((best(lambda plan=plan, batch=batch: plan.step(batch), rounds), size))
            read = words.nbytes / best(lambda: library().transept_read(team.handle, words.ctypes.data, words.size), 3) / 1e9
            floor = max(floor, read)
            speed = runs[0][1] / runs[0][0] / 1e9
            print(
                f"{kind:6} {'int8' if int8 else 'fp32':5} {speed:9.1f} {speed / floor:9.0%} "
                f"{runs[1][0] / runs[0][0]:10.2f} {runs[2][0] / runs[0][0]:11.2f}"
            )
    print(f"memory reads {floor:.1f} GB/s with {team.threads} threads")


def prefill(team: native.Team, rounds: int) -> None:
    """GFLOP/s (GOP/s for int8) of 512 rows for each kind, beside torch."""
    import torch

    torch.set_num_threads(team.threads)
    a, b = torch.randn(512, K), torch.randn(N, K)
    flops = 2 * 512 * K * N / 1e9
    for kind in KINDS:
        for int8 in (True, False) if kind.startswith("Q") else (False,):
            plan, batch, _ = chain(kind, 512, team, 1, int8)
            plan.step(batch)
            ours = flops / best(lambda plan=plan, batch=batch: plan.step(batch), rounds)
            torch_speed = flops / best(lambda: a @ b.T, rounds)
            print(
                f"{kind:6} {'int8' if int8 else 'fp32':5} {ours:7.0f} GFLOP/s "
                f"  torch fp32 {torch_speed:5.0f}   ratio {ours / torch_speed:.2f}"
            )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    team = native.Team(args.threads)
    print(f"isa {native.isa()}, {args.threads} threads, weights {N} x {K}")
    decode(team, args.rounds)
    prefill(team, args.rounds)


if __name__ == "__main__":
    main()
