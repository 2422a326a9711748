"""Tokens a second of SmolLM2-135M beside llama.cpp, transformers and the memory's speed, in interleaved rounds of one run.

    python benchmarks/decode.py [decode|prefill|batch|long ...] [--threads 2] [--rounds 5] [--json FILE]

decode: one row after 100 tokens, 64 more; long: 32 after 4,000, which are computed once, beside the speed after 100; batch: 16 rows;
prefill: 512 tokens. Files of other precisions are made from the published Q4_1 file (benchmarks/variants.py) and kept in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from peers import Peer, rounds, spread
from variants import write

from transept.checkpoints.pull import cache_dir, pull

KINDS = ("Q4_1", "Q4_0", "Q8_0", "BF16")
HOW: dict[str, dict[str, int]] = {
    "decode": {"context": 100, "tokens": 64},
    "long": {"context": 4000, "tokens": 32},
    "batch": {"rows": 16, "context": 32, "tokens": 32},
    "prefill": {"context": 512},
}
PER_SECOND = {"prefill": 512}
LONG = ("transept Q4_1", "transept BF16", "llama.cpp Q4_1", "llama.cpp BF16")
"""Who is measured behind 4,000 tokens: these alone take most of a minute to compute them."""


def files() -> dict[str, Path]:
    """The published file and its variants."""
    found = pull("smollm2-135m-instruct")
    folder = cache_dir() / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    return {kind: found if kind in found.name else write(found, kind, folder / f"smollm2.{kind}.gguf") for kind in KINDS}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("what", nargs="*", default=list(HOW), choices=[*HOW, []])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    p.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    paths, peers = files(), {}
    for kind in args.kinds:
        for name in ("transept", "transept exact", "llama.cpp"):
            if name not in args.without and (name != "transept exact" or kind == "Q4_1"):
                peers[f"{name} {kind}"] = Peer(name, paths[kind], args.threads)
    for name in ("transformers fp32", "transformers bf16"):
        if "transformers" not in args.without:
            peers[name] = Peer(name, paths["Q4_1"], args.threads)
    reader = next(peer for label, peer in peers.items() if label.startswith("transept"))
    record = {"date": time.strftime("%Y-%m-%d"), "threads": args.threads, "rounds": args.rounds, "load": os.getloadavg()[0], "results": {}}
    for do in args.what:
        bandwidth = reader.ask("read")
        chosen = {label: peer for label, peer in peers.items() if do != "long" or label in LONG}
        seconds = rounds(chosen, args.rounds, "decode" if do == "long" else do, **HOW[do])
        near = rounds(chosen, args.rounds, "decode", **HOW["decode"]) if do == "long" else {}
        print(f"\n{do}: {HOW[do]}; memory reads {bandwidth:.1f} GB/s with {args.threads} threads")
        rows = {}
        for label, values in seconds.items():
            median, low, high = spread([PER_SECOND.get(do, 1) / value for value in values])
            kind = label.rpartition(" ")[2]
            floor = bandwidth * 1e9 / paths[kind].stat().st_size if kind in paths and do == "decode" else None
            rows[label] = {"per second": median, "low": low, "high": high, "share of floor": floor and median / floor}
            share = f"{median / floor:6.0%} of what the file's bytes allow" if floor else ""
            if label in near:
                rows[label]["lost"] = lost = 1 - spread(near[label])[0] / spread(values)[0]
                share = f"{lost:6.0%} slower than after 100 tokens"
            print(f"  {label:22} {median:8.1f} tokens/s ({low:.1f} to {high:.1f}) {share}")
        record["results"][do] = {"GB/s": bandwidth, "rows": rows}
    for peer in peers.values():
        peer.close()
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
