"""What rounding costs: perplexity, and mean KL to float32 of the same stored weights, on real text in windows of 512 tokens.

    python benchmarks/quality.py [MODEL.gguf] [--tokens 20480] [--threads 2] [--text FILE.txt.xz]      our modes beside llama.cpp's
    python benchmarks/quality.py ... --keep FILE.json      writes the sums after each window, and goes on from there in the next run
    python benchmarks/quality.py [MODEL.gguf] --round Q4_0 [--calibrate 8192]                          nearest beside GPTQ

The reference is the module in float32 with the numbers that the file stores. The text's first part calibrates, what follows is measured.
llama.cpp runs where `import llama_cpp` works, on the same file and tokens, with its own defaults. Each engine sees each window by itself.
How much two engines differ is told with 1.96 standard errors over windows.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import transept
from transept.adapters.quantize import quantize
from transept.checkpoints.find import find
from transept.checkpoints.load import Source, describe
from transept.door import load
from transept.inference.plan import NativeRunner, StoredWeights
from transept.inference.rows import Row

WINDOW = 512
TEXT = Path(__file__).parents[2] / "shared" / "data" / "gutenberg15" / "books.txt.xz"
Engine = Callable[[np.ndarray], np.ndarray]
"""Ids [t] to the logits [t v] behind each of them."""


def ours(source: Source, threads: int, fast: bool) -> Engine:
    """The native core on the file's stored numbers."""
    runner = NativeRunner(source.empty(), StoredWeights(source), pages=WINDOW // 16, fast=fast, threads=threads, max_rows=WINDOW)
    pages = tuple(range(WINDOW // 16))
    return lambda ids: runner.run([Row(tuple(ids.tolist()), 0, pages, len(ids))])


def llama_cpp(path: Path, threads: int) -> Engine | None:
    """llama.cpp on the same file; None where it is not installed."""
    try:
        from llama_cpp import Llama  # type: ignore[import-not-found]  # a peer, installed by who compares
    except ImportError:
        return None
    model = Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)

    def run(ids: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(ids.tolist())
        return np.array(model.scores[: len(ids)], np.float32)

    return run


def module(network: torch.nn.Module) -> Engine:
    """The module in float32."""

    @torch.inference_mode()
    def run(ids: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(ids)[None]).logits[0].numpy()

    return run


class Score:
    """Sums over tokens: negative log-likelihood of the next one, KL from the reference, and how often both prefer the same token."""

    def __init__(self, **kept: Any) -> None:
        self.nll = self.same = self.seconds = 0.0
        self.tokens = self.scored = 0
        self.kls: list[float] = []
        vars(self).update(kept)

    def add(self, logits: np.ndarray, want: torch.Tensor, ids: np.ndarray, seconds: float) -> None:
        """One window; `want` are the reference's log-probabilities [t v]."""
        found = torch.from_numpy(logits).log_softmax(-1)
        self.kls.append(float((want.exp() * (want - found)).sum(-1).double().sum()) / len(ids))
        self.nll -= float(found[:-1].gather(1, torch.from_numpy(ids[1:, None])).double().sum())
        self.same += float((found.argmax(-1) == want.argmax(-1)).sum())
        self.tokens, self.scored, self.seconds = self.tokens + len(ids), self.scored + len(ids) - 1, self.seconds + seconds

    def record(self) -> dict[str, float]:
        """Perplexity, mean KL, agreement, tokens per second."""
        return {
            "perplexity": float(np.exp(self.nll / self.scored)), "kl": float(np.mean(self.kls)), "same_token": self.same / self.tokens,
            "tokens": self.tokens, "rate": self.tokens / self.seconds,
        }  # fmt: skip


def windows(m: Any, path: Path, skip: int, tokens: int) -> Iterator[np.ndarray]:
    """Windows of the text's ids, behind the first `skip` tokens."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        ids = np.array(m.encode(file.read(6 * (skip + tokens))), np.int64)
    if len(ids) < skip + tokens:
        raise SystemExit(f"{path} gives {len(ids)} tokens, expected at least {skip + tokens}")
    for at in range(skip, skip + tokens - WINDOW + 1, WINDOW):
        yield ids[at : at + WINDOW]


def rounded(path: Path, kind: str, threads: int, calibrate: Callable[[torch.nn.Module], Any] | None) -> Engine:
    """The model rounded anew, saved, loaded, and run from its stored numbers."""
    m = load(path)
    began = time.perf_counter()
    coded = quantize(m.model, kind, calibrate=calibrate)
    print(f"rounded to {kind} {'by GPTQ' if calibrate else 'to the nearest'} in {time.perf_counter() - began:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        transept.save(m, folder, coded=coded)
        return ours(describe(folder), threads, False)


def engines(args: argparse.Namespace, path: Path, m: Any) -> dict[str, Engine]:
    """What is compared."""
    if args.round:

        def calibrate(model: torch.nn.Module) -> None:
            for ids in windows(m, args.text, 0, args.calibrate):
                model(torch.from_numpy(ids)[None])

        return {f"{args.round} nearest": rounded(path, args.round, args.threads, None),
                f"{args.round} GPTQ": rounded(path, args.round, args.threads, calibrate)}  # fmt: skip
    source = describe(path)
    found: dict[str, Engine | None] = {
        "ours, exact": ours(source, args.threads, False),
        "ours, int8 activations": ours(source, args.threads, True),
        "llama.cpp": llama_cpp(path, args.threads),
    }
    if found["llama.cpp"] is None:
        print("llama.cpp is not installed here (pip install llama-cpp-python), so it is not measured")
    return {name: engine for name, engine in found.items() if engine is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--round", default="", metavar="KIND")
    parser.add_argument("--calibrate", type=int, default=8192)
    parser.add_argument("--keep", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, to go on later from --keep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = find(args.model)
    m = load(path)
    compared = engines(args, path, m)
    reference = module(m.model)
    scores = {name: Score() for name in ("float32", *compared)}
    if args.keep and args.keep.exists():
        scores = {name: Score(**kept) for name, kept in json.loads(args.keep.read_text()).items()}
    until = time.monotonic() + args.seconds
    for number, ids in enumerate(windows(m, args.text, args.calibrate, args.tokens)):
        if number < len(scores["float32"].kls) or time.monotonic() > until:
            continue
        want = torch.empty(0)
        for name, engine in {"float32": reference, **compared}.items():
            began = time.perf_counter()
            logits = engine(ids)
            taken = time.perf_counter() - began
            if name == "float32":
                want = torch.from_numpy(logits).log_softmax(-1)
            scores[name].add(logits, want, ids, taken)
        if args.keep:
            args.keep.write_text(json.dumps({name: vars(score) for name, score in scores.items()}))
        if number % 8 == 0:
            so_far = {name: round(score.record()["kl"], 6) for name, score in scores.items()}
            print(f"mean KL after {scores['float32'].tokens} tokens: {so_far}", flush=True)
    print(f"{'':24}{'perplexity':>12}{'mean KL':>12}{'same token':>12}{'tokens/s':>10}")
    for name, score in scores.items():
        r = score.record()
        print(f"{name:24}{r['perplexity']:>12.4f}{r['kl']:>12.6f}{100 * r['same_token']:>11.2f}%{r['rate']:>10.0f}")
    for name in compared:
        if "llama.cpp" in scores and name != "llama.cpp":
            apart = np.array(scores[name].kls) - np.array(scores["llama.cpp"].kls)
            error = 1.96 * apart.std(ddof=1) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
            print(f"mean KL of {name} less that of llama.cpp: {apart.mean():+.6f} (+- {error:.6f})")
    print(json.dumps({"model": args.model, "text": args.text.name, "window": WINDOW} | {n: s.record() for n, s in scores.items()}))


if __name__ == "__main__":
    main()
