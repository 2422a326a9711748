"""Every benchmark beside its peers, one after the other: writes the measured part of docs/results.md and docs/decode.png.

    python benchmarks/run.py [NAME ...]          `make bench` runs all; named ones replace their own section only

A section is the command, its date and machine, and what it printed. Needs the extra `[bench]`; where a peer is missing the section says so.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
DATA = Path(os.environ.get("TRANSEPT_DATA", ROOT.parent / "shared" / "data"))
SCRIPTS: dict[str, tuple[str, ...]] = {
    "decode": ("decode.py", "decode", "batch", "prefill", "--json", "{json}"),
    "long": ("decode.py", "long", "--rounds", "2"),
    "engine": ("engine.py",),
    "start": ("start.py",),
    "quality": ("quality.py",),
    "embed": ("embed.py", "{minilm}", str(DATA / "sentence-polarity" / "test.tsv.xz")),
    "train": ("train.py",),
    "load": ("load.py",),
    "watching": ("watching.py",),
}
TITLES = {
    "decode": "Decoding, prompts and batches beside llama.cpp and transformers",
    "long": "Decoding behind 4,000 tokens",
    "engine": "Many requests, a shared prefix, guesses",
    "start": "From the process's start to the first token",
    "quality": "What rounding costs: perplexity and KL",
    "embed": "Sentence vectors beside onnxruntime and sentence-transformers",
    "train": "Training steps beside transformers and a plain loop",
    "load": "Sixteen clients at once, streaming, beside llama.cpp's servers",
    "watching": "Watching, and not watching",
}


def machine() -> str:
    """The processor as the system names it, and how many of its cores this process may use."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {allowed} cores, {platform.machine()}"


def section(name: str, text: str, command: str) -> None:
    """Puts a section into the page, in the place of its older self."""
    head = f"<!-- {name} -->"
    made = f"`{command}`, {time.strftime('%Y-%m-%d')}, {machine()}:"
    body = f"{head}\n### {TITLES[name]}\n\n{made}\n\n```\n{text.rstrip().lstrip(chr(10))}\n```\n<!-- end {name} -->\n"
    page = PAGE.read_text() if PAGE.exists() else "# Results\n"
    old = re.compile(f"{re.escape(head)}.*?<!-- end {name} -->\n", re.DOTALL)
    if "\n## Speed\n" not in page:
        page = page.rstrip() + "\n\n## Speed\n\nWritten by `make bench`; each ratio is of one run.\n"
    PAGE.write_text(old.sub(lambda _: body, page) if old.search(page) else page.rstrip() + "\n\n" + body)


def plot(found: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    """Bars of tokens a second, one panel for each measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), layout="constrained", squeeze=False)
    for axis, (what, result) in zip(axes[0], found.items(), strict=True):
        rows = result["rows"]
        labels = sorted(rows, key=lambda label: rows[label]["per second"])
        colours = ["tab:blue" if label.startswith("transept") else "0.65" for label in labels]
        values = [rows[label]["per second"] for label in labels]
        spread = [[rows[n]["per second"] - rows[n]["low"] for n in labels], [rows[n]["high"] - rows[n]["per second"] for n in labels]]
        axis.barh(labels, values, xerr=spread, color=colours, error_kw={"lw": 0.8})
        axis.set_title(what)
        axis.set_xlabel("tokens/s")
    figure.savefig(ROOT / "docs" / "decode.png", dpi=90)


def main() -> None:
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "decode.json"
        for name in sys.argv[1:] or SCRIPTS:
            script, *arguments = SCRIPTS[name]
            if "{minilm}" in arguments:
                from transept.checkpoints.pull import pull

                arguments[arguments.index("{minilm}")] = str(pull("minilm"))
            command = [str(kept) if a == "{json}" else a for a in arguments]
            print(f"== {name}", flush=True)
            program = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script), *command]
            done = subprocess.run(program, capture_output=True, text=True)
            print(done.stdout, flush=True)
            if done.returncode:
                failed.append(name)
                print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)
                continue
            section(name, done.stdout, f"python benchmarks/run.py {name}")
        if kept.exists():
            plot(json.loads(kept.read_text())["results"])
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
