"""The table of results: one row for each run, with its figures, seed and minutes.

    python -m recipes.results                        # the rows of every run in runs/
    python -m recipes.results --run sentiment squad  # trains what begins so and is not there yet, one after another, then the rows
    python -m recipes.results --run all              # everything: about 7 hours on 2 cores
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TRANSLATE, SENTIMENT, GPT1 = "recipes.translation", "recipes.sentiment:minilm", "recipes.gpt1_auxiliary"
SHAKESPEARE = ["recipes.gpt:shakespeare", "--set=layers=6", "--set=context=256", "--set=compile=true"]
RUNS = {
    "shakespeare-3": ["recipes.gpt:shakespeare", "--minutes=3"],
    "shakespeare-15": [*SHAKESPEARE, "--minutes=15", "--set=dim=192", "--set=heads=3", "--set=ffn=768"],
    "shakespeare-30": [*SHAKESPEARE, "--minutes=30", "--set=dim=256", "--set=heads=4", "--set=ffn=1024"],
    "translation-20": [f"{TRANSLATE}:transformer", "--minutes=20"],
    "translation-60": [f"{TRANSLATE}:transformer", "--minutes=60", "--set=layers=4", "--set=dropout=0.25"],
    "translation-paper-20": [f"{TRANSLATE}:transformer", "--minutes=20", "--set=order=post"],
    "translation-gru-20": [f"{TRANSLATE}:recurrent", "--minutes=20"],
    "translation-gru-blind-20": [f"{TRANSLATE}:recurrent", "--minutes=20", "--set=look=blind"],
    "sentiment-full": [SENTIMENT, "--set=tune=full"],
    "sentiment-bitfit": [SENTIMENT, "--set=tune=bitfit", "--set=epochs=10", "--set=average=0.1"],
    "sentiment-lora": [SENTIMENT, "--set=tune=lora"],
    "sentiment-head": [SENTIMENT, "--set=tune=head"],
    "sentiment-student": ["recipes.sentiment:distilled", "--set=teacher=runs/sentiment-full/model"],
    "squad": ["recipes.squad:minilm"],
    "sts": ["recipes.paraphrase:sts"],
    "sts-apart": ["recipes.paraphrase:apart"],
    "ner": ["recipes.ner:minilm"],
    "bert-summed": ["recipes.bert:tiny", "--minutes=20"],
    "bert-turns": ["recipes.bert:tiny", "--minutes=20", "--set=alternating=true"],
    "electra": ["recipes.bert:electra", "--minutes=20"],
    "smollm2": ["recipes.smollm2_lora:instructions"],
    "gpt1": [f"{GPT1}:pretrain", "--minutes=10"],
    "gpt1-without": [f"{GPT1}:classify", "--set=base=runs/gpt1", "--set=weight=0.0"],
    "gpt1-with": [f"{GPT1}:classify", "--set=base=runs/gpt1", "--set=weight=0.5"],
    "lstm": ["recipes.lstm:novels", "--minutes=15"],
    "lstm-gpt": ["recipes.lstm:gpt", "--minutes=15"],
    "llama": ["recipes.llama:novels", "--minutes=15"],
    "in-context": ["recipes.in_context:skills", "--minutes=5"],
}


def row(folder: Path) -> list[str]:
    """Recipe, what was changed, test figures (or those of the last look), updates, minutes, seed."""
    result, about = _read(folder / "result.json"), _read(folder / "run.json")
    figures = _read(folder / "test.json") or result.get("figures", {})
    said = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items())
    changes = " ".join(change for change in about.get("changes", []) if not change.startswith(("steps=0", "base=", "teacher=")))
    return [str(result["recipe"]), changes, said, str(result["step"]), f"{result['minutes']:.1f}", str(result["seed"])]


def train(name: str) -> None:
    """Runs the recipe of that name into runs/NAME, or goes on with one that was stopped; nothing where it has ended."""
    folder = Path("runs") / name
    if str(_read(folder / "result.json").get("why", "signal")).startswith("signal"):
        where = ["--resume", str(folder)] if (folder / "run.json").is_file() else [*RUNS[name], "--out", str(folder)]
        print(f"\n{name}: transept train {' '.join(where)}", flush=True)
        subprocess.run([sys.executable, "-m", "transept.cli.main", "train", *where], check=False)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME", help=f"all, or beginnings of: {', '.join(RUNS)}")
    wanted = tuple(parser.parse_args().run)
    for name in RUNS:
        if "all" in wanted or name.startswith(wanted):
            train(name)
    header = ["recipe", "changes", "figures", "updates", "minutes", "seed"]
    rows = [row(path.parent) for path in sorted(Path("runs").glob("*/result.json"))]
    for cells in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
