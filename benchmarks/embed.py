"""Sentence vectors beside onnxruntime and sentence-transformers, in interleaved rounds of one run; medians, ratios, and the GEMM floor.

    python benchmarks/embed.py MODEL POLARITY.tsv.xz [--rounds 7] [--threads 2] [--texts 128] [--json]

MODEL is the folder of all-MiniLM-L6-v2, POLARITY a table with a column `sentence`. All three read the same texts
with the same weights in float32, tokenising included, 32 texts to a batch, batches of like length. The floor is the time of the linear
layers' matrix products alone, over real tokens only. Needs sentence-transformers, onnxruntime and onnxscript beside the library.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import transept

BATCH = 32


def onnx(folder: Path, threads: int) -> Callable[[list[str]], np.ndarray]:
    """transformers' BertModel exported once and run by onnxruntime, with masked mean pooling and padding to a batch's longest."""
    import onnxruntime
    import transformers

    network = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.network(input_ids=ids, attention_mask=mask).last_hidden_state

    batch, length = torch.export.Dim("b", min=1, max=512), torch.export.Dim("t", min=2, max=512)
    example = (torch.randint(1000, 2000, (3, 17)), torch.ones(3, 17, dtype=torch.long))
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "model.onnx"
        shapes = ({0: batch, 1: length}, {0: batch, 1: length})
        torch.onnx.export(States(), example, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()

    def run(texts: list[str]) -> np.ndarray:
        out = np.empty((len(texts), network.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for at in range(0, len(order), BATCH):
            group = order[at : at + BATCH]
            rows = tokenizer.encode_batch([texts[i] for i in group])
            ids, mask = np.array([r.ids for r in rows]), np.array([r.attention_mask for r in rows])
            states = session.run(None, {names[0]: ids, names[1]: mask})[0]
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            out[group] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return out

    return run


def floor(m: transept.Model, texts: list[str]) -> Callable[[], None]:
    """The products of every linear layer of the encoder with as many rows as the texts have tokens, 32 texts at a time."""
    counts = [sum(len(m.encode(text)) for text in texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)]
    layers = [x for x in m.model.stack.modules() if isinstance(x, torch.nn.Linear)]
    inputs = {(n, x.in_features): torch.randn(n, x.in_features) for n in set(counts) for x in layers}

    def run() -> None:
        with torch.inference_mode():
            for n in counts:
                for x in layers:
                    torch.mm(inputs[n, x.in_features], x.weight.T)

    return run


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("polarity", type=Path)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--texts", type=int, default=128)
    p.add_argument("--json", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    from sentence_transformers import SentenceTransformer

    with lzma.open(args.polarity, "rt", encoding="utf-8") as file:
        header, *rows = (line.rstrip("\n").split("\t") for line in file)
        real = [row[header.index("sentence")] for row in rows]
    m, other, runtime = transept.load(args.model), SentenceTransformer(str(args.model), device="cpu"), onnx(args.model, args.threads)
    even = [text for text in real if 31 <= len(m.encode(text)) <= 33][:BATCH]
    found = {}
    for name, texts in (("32 sentences of 31 to 33 tokens", even), (f"{args.texts} mixed sentences", real[: args.texts])):
        bare = floor(transept.load(args.model), texts)
        runs: dict[str, Callable[[], object]] = {
            "transept": lambda texts=texts: m.embed(texts).numpy(),
            "onnxruntime": lambda texts=texts: runtime(texts),
            "sentence-transformers": lambda texts=texts: other.encode(texts, batch_size=BATCH, show_progress_bar=False),
            "gemm floor": bare,
        }
        first = {key: np.asarray(run()) for key, run in runs.items() if key != "gemm floor"}
        apart = max(float(np.abs(first["transept"] - v).max()) for v in first.values())
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(args.rounds):
            for key, run in runs.items():
                time.sleep(0.05)  # the threads of the one before stop spinning
                began = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - began)
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        ratios = {key: statistics.median(t / o for t, o in zip(seconds[key], seconds["transept"], strict=True)) for key in runs}
        found[name] = {"seconds": medians, "times as fast as": ratios, "largest difference": apart}
    record = {"threads": args.threads, "rounds": args.rounds, "load": os.getloadavg()[0], "batches": found}
    if args.json:
        print(json.dumps(record))
        return
    print(f"{args.threads} threads, {args.rounds} rounds, load {record['load']:.1f}")
    for name, row in found.items():
        print(f"{name} (largest difference {row['largest difference']:.1e})")
        for key, value in row["seconds"].items():
            print(f"  {key:22} {1000 * value:8.1f} ms   transept is {row['times as fast as'][key]:.2f}x as fast")


if __name__ == "__main__":
    main()
