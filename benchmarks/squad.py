"""SQuAD by transformers under the recipe of this library's own run: the same first weights, rows, batches, rates and epochs.

    python -m benchmarks.squad [--epochs 3] [--out runs/squad-transformers]

Their model, their loss, their schedule, torch's AdamW; only the prepared rows and the questions at the end are ours. Writes what
`python -m recipes.results` shows beside `recipes.squad:minilm`: exact match, F1, updates, minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import transept
from recipes.squad import divided, minilm
from recipes.text import WHERE, Tuning
from transept.core.batch import Draw
from transept.data.source import find
from transept.evaluation.squad import evaluate, read
from transept.training.batches import Sampler


def main() -> None:
    from transformers import BertForQuestionAnswering, get_linear_schedule_with_warmup

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/squad-transformers"))
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    run = minilm(epochs=args.epochs, seed=args.seed)
    s = run.settings
    with tempfile.TemporaryDirectory() as folder:
        first = Tuning("minilm", "BertForQuestionAnswering", (), "full", seed=args.seed)
        model = BertForQuestionAnswering.from_pretrained(first.save(Path(folder)))
    halves = [[w for w in model.parameters() if (w.ndim > 1) == wide] for wide in (True, False)]
    groups = [{"params": halves[0], "weight_decay": s.optim.decay}, {"params": halves[1], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, s.optim.lr, s.optim.betas, s.optim.eps)
    rates = get_linear_schedule_with_warmup(adam, int(s.schedule.warmup * s.steps), s.steps)
    sampler, cursor, seconds = Sampler(run.train, s.loading, s.seed), Draw(s.seed, 0, 0), 0.0
    torch.manual_seed(args.seed)
    model.train()
    for step in range(s.steps):
        begin, many, cursor = sampler.span(cursor)
        began = time.perf_counter()
        b = sampler.batch(begin, many)
        out = model(input_ids=b["ids"], attention_mask=b.get("mask"), token_type_ids=b["segments"],
                    start_positions=b["start"], end_positions=b["end"])  # fmt: skip
        adam.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.optim.clip)
        adam.step()
        rates.step()
        seconds += time.perf_counter() - began
        if step % 20 == 0:
            left = seconds / (step + 1) * (s.steps - step - 1) / 60
            print(f"step {step} of {s.steps}, loss {out.loss.item():.4f}, {seconds / 60:.1f} minutes, {left:.1f} left", flush=True)
    first.model.load_state_dict(_ours(model.eval(), first))
    held = divided(read(str(find("squad-dev/dev-v1.1.json.xz", WHERE))))[1]
    figures = {**evaluate(first.loaded, held), "questions": len(held)}
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"recipe": "transformers by recipes.squad:minilm", "step": s.steps, "minutes": seconds / 60, "seed": args.seed}
    for name, facts in (("result", result), ("test", figures)):
        (args.out / f"{name}.json").write_text(json.dumps(facts, indent=1))
    print(figures, result)


def _ours(theirs: torch.nn.Module, first: Tuning) -> dict[str, torch.Tensor]:
    """Their weights under our names, through the loading door."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        first.tokenizer.save(Path(folder))
        return transept.load(folder).look().state_dict()


if __name__ == "__main__":
    main()
