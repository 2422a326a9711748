"""The copy-memory task: what was shown must be said again after a lag (rows 2, 3). Writes docs/copy_memory.png and docs/copy_memory.json.

    python recipes/copy_memory.py [--lags 4 8 16 32 64] [--steps 2000]

Three symbols of eight, then `lag` blanks, then a signal; from there on the three are to be said in order. A guess is right one time in
eight. All models are as wide and see as many examples; one core, about seven minutes for everything. Expected: the RNN is a guess at lag
64; the others say everything, or nearly.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from transept.models.text import gpt, gru, lstm, rnn

SYMBOLS, SHOWN, BLANK, SIGNAL = 8, 3, 8, 9
VOCAB = 10
DOCS = Path(__file__).parents[1] / "docs"


def examples(batch: int, lag: int, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [b SHOWN+lag+SHOWN] and the symbols to be said at the last SHOWN columns."""
    shown = torch.randint(SYMBOLS, (batch, SHOWN), generator=gen)
    blanks, rest = torch.full((batch, lag - 1), BLANK), torch.full((batch, SHOWN), BLANK)
    rest[:, 0] = SIGNAL
    return torch.cat((shown, blanks, rest), 1), shown


def models(lag: int) -> dict[str, Callable[[], nn.Module]]:
    """Each model 64 wide; the skip-RNN's stride divides the steps between a symbol and its repetition (else the two stand in
    different lanes, and nothing gets across)."""
    span = SHOWN + lag - 1
    spec = rnn.RecurrentSpec(vocab=VOCAB, dim=64, width=64, layers=1)
    stride = max(k for k in range(1, span) if span % k == 0)
    attention = gpt.TINY["gpt2"].replace(vocab=VOCAB, dim=64, heads=4, ffn=128, context=2 * SHOWN + lag)
    return {
        "RNN": lambda: rnn.build(spec),
        "skip-RNN": lambda: rnn.build(spec.replace(stride=stride)),
        "GRU": lambda: remembering(gru.build(spec), span),
        "LSTM": lambda: remembering(lstm.build(spec), span),
        "attention": lambda: gpt.build(attention),
    }


def remembering(model: nn.Module, span: int) -> nn.Module:
    """Gates that begin as slow as the task: biases of log U(1, span), for the GRU's update and the LSTM's forget gate, and minus that for
    the LSTM's input gate (Tallec and Ollivier 2018, arXiv 1804.11188).
    """
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("bias_ih_l0"):
                gates = bias.view(-1, 64)
                slow = torch.empty(64).uniform_(1, max(span - 1, 2)).log()
                if len(gates) == 4:
                    gates[0] = -slow
                gates[1] = slow
    return model


def train(model: nn.Module, lag: int, steps: int, seed: int) -> float:
    """Accuracy on fresh examples after `steps` batches of 32 by Adam."""
    gen = torch.Generator().manual_seed(seed)
    optim = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 5e-3, total_steps=steps)
    for _ in range(steps):
        ids, target = examples(32, lag, gen)
        loss = F.cross_entropy(model(ids).logits[:, -SHOWN:].flatten(0, 1), target.flatten())
        optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        schedule.step()
    with torch.no_grad():
        ids, target = examples(512, lag, gen)
        return (model(ids).logits[:, -SHOWN:].argmax(-1) == target).float().mean().item()


def plot(table: dict[str, dict[int, float]], path: Path) -> None:
    """Accuracy by lag."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for (name, rows), mark in zip(table.items(), "osv^D", strict=True):
        axis.semilogx(list(rows), list(rows.values()), f"{mark}-", base=2, label=name, alpha=0.8)
    axis.axhline(1 / SYMBOLS, color="k", linestyle=":", label="a guess")
    axis.set_xticks(list(next(iter(table.values()))), [str(n) for n in next(iter(table.values()))])
    axis.set_xlabel("lag (steps between what is shown and the signal)")
    axis.set_ylabel("share of symbols said right")
    axis.set_ylim(0, 1.05)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lags", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    table: dict[str, dict[int, float]] = {}
    for lag in options.lags:
        for name, make in models(lag).items():
            torch.manual_seed(options.seed)
            begin = time.process_time()
            found = train(make(), lag, options.steps, options.seed)
            table.setdefault(name, {})[lag] = found
            print(f"lag {lag:3d}  {name:10s} {found:6.1%}  {time.process_time() - begin:5.1f} s", flush=True)
    options.out.joinpath("copy_memory.json").write_text(json.dumps({"steps": options.steps, "accuracy": table}, indent=2) + "\n")
    plot(table, options.out / "copy_memory.png")


if __name__ == "__main__":
    main()
