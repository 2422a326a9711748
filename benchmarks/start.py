"""From the process's start to its first token, and the most memory it held: a plan file beside transformers, in one run.

    python benchmarks/start.py [MODEL] [--rounds 5] [--prompt TEXT]

MODEL is a GGUF file or a bundled name (default smollm2-135m-instruct). Each process loads the model, reads the prompt and ends with the
first token; the processes take turns. `first` is the start that lowers the model and keeps its plan, `again` each later one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from transept.checkpoints.find import find
from transept.compiled import places

OURS = "import sys, transept; m = transept.load(sys.argv[1], keep_plan=True); print(m.generate(sys.argv[2], max_tokens=1).ids)"
OPENED = "import sys, transept; m = transept.load(sys.argv[1], keep_plan=False); print(m.generate(sys.argv[2], max_tokens=1).ids)"
THEIRS = """
import sys, os
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name = os.path.split(sys.argv[1])
t = AutoTokenizer.from_pretrained(folder, gguf_file=name)
m = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
ids = t(sys.argv[2], return_tensors="pt")
print(m.generate(**ids, max_new_tokens=1, do_sample=False)[0, ids["input_ids"].shape[1]:].tolist())
"""


def once(code: str, *arguments: str) -> tuple[float, float, str]:
    """Seconds, MiB at most, and what the process printed last."""
    began = time.perf_counter()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    out = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a process ended with {process.returncode}: {code[:80]}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024, out.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args()
    path = find(args.model)
    places(path, False)[0].unlink(missing_ok=True)
    arguments = (str(path), args.prompt)
    first = once(OURS, *arguments)
    kinds = {"again": OURS, "without a plan file": OPENED, "transformers": THEIRS}
    taken: dict[str, list[tuple[float, float, str]]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind, code in kinds.items():
            taken[kind].append(once(code, *arguments))
    # the plan was this measurement's own: the next `load` of the model is not to answer from it
    places(path, False)[0].unlink(missing_ok=True)
    if len({out for runs in taken.values() for _, _, out in runs}) != 1:
        raise SystemExit(f"the first tokens differ: { {kind: runs[0][2] for kind, runs in taken.items()} }")
    size = path.stat().st_size / 2**20
    seconds = {kind: statistics.median(run[0] for run in runs) for kind, runs in taken.items()}
    memory = {kind: statistics.median(run[1] for run in runs) for kind, runs in taken.items()}
    print(f"{'':22}{'median s':>10}{'spread s':>16}{'MiB':>8}")
    print(f"{'first':22}{first[0]:>10.2f}{'':>16}{first[1]:>8.0f}")
    for kind, runs in taken.items():
        spread = f"{min(r[0] for r in runs):.2f} to {max(r[0] for r in runs):.2f}"
        print(f"{kind:22}{seconds[kind]:>10.2f}{spread:>16}{memory[kind]:>8.0f}")
    record = {
        "model": args.model, "rounds": args.rounds, "file_mib": size, "first_seconds": first[0], "seconds": seconds, "memory_mib": memory,
        "faster_than_transformers": seconds["transformers"] / seconds["again"],
        "memory_of_transformers": memory["again"] / memory["transformers"], "memory_above_file_mib": memory["again"] - size,
    }  # fmt: skip
    print(
        f"start {record['faster_than_transformers']:.1f} times as fast as transformers; memory {record['memory_of_transformers']:.3f} of"
        f" its, the file's {size:.0f} MiB and {record['memory_above_file_mib']:.0f} more"
    )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
