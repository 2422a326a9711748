"""GPT-1's two stages: a language model on novels, then film reviews classified with and without its loss kept (L3 = L2 + lambda L1); rows
71, 73, 84a.

    transept train recipes.gpt1_auxiliary:pretrain --minutes 10 --out runs/gpt1
    transept train recipes.gpt1_auxiliary:classify --set base=runs/gpt1 --set weight=0.0
    transept train recipes.gpt1_auxiliary:classify --set base=runs/gpt1 --set weight=0.5
    python -m recipes.results --run gpt1                      # all three, and the table; 2 cores

Measured, seed 0, 2 cores with AVX2: the language model's perplexity on held-out reviews goes from 912 to 196 with lambda 0.5 and to 1,258
without; accuracy 70.0 and 73.1 % (one standard error is 1.4). On novels, which neither reads while it is tuned, it goes from 188 to 640 and
to 306: the loss that is kept is that of the reviews.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from recipes.text import collate, last_words, settings, table
from recipes.text import novels as books
from transept.adapters.tune import dropped, normal
from transept.blocks.block import Order
from transept.blocks.heads import TiedHead
from transept.blocks.stack import Decoder
from transept.checkpoints.safetensors import open_safetensors
from transept.core.errors import InputError
from transept.data.source import Samples, Windows
from transept.evaluation.perplexity import foresee
from transept.models.text import gpt
from transept.models.text.gpt import GPTSpec
from transept.training.judge import measure
from transept.training.objectives.auxiliary import Auxiliary
from transept.training.objectives.causal import Causal
from transept.training.run import Judging, Loading, Optim, Run, Schedule, Settings, Shape

VOCAB, CONTEXT = 4000, 128


def spec(vocab: int, dim: int, layers: int, classes: int | None = None) -> GPTSpec:
    """GPT-1's order of norms at a small size."""
    return GPTSpec(vocab=vocab, dim=dim, layers=layers, heads=4, ffn=4 * dim, context=CONTEXT, order=Order.POST, classes=classes)


def pretrain(*, dim: int = 192, layers: int = 4, batch: int = 32, lr: float = 1e-3, seed: int = 0) -> Run:
    """The next byte pair on fifteen novels."""
    tokenizer, train, held, _ = books(VOCAB)
    torch.manual_seed(seed)
    model = dropped(normal(gpt.build(spec(tokenizer.vocab_size, dim, layers))), 0.1)
    chosen = Settings(
        steps=3000, seed=seed, loading=Loading(batch=batch), optim=Optim(lr=lr, betas=(0.9, 0.98), decay=0.01),
        schedule=Schedule(shape=Shape.COSINE, warmup=0.05, floor=0.02), judging=Judging(every=500, source="held-out"),
    )  # fmt: skip
    return Run(model, Causal(), Windows(torch.cat(train), CONTEXT), chosen, eval={"held-out": Windows(torch.cat(held), CONTEXT, CONTEXT)})


def classify(*, base: str = "", weight: float = 0.5, dim: int = 192, layers: int = 4, epochs: int = 3, batch: int = 32, lr: float = 3e-4,
             seed: int = 0) -> Run:  # fmt: skip
    """Two classes from the last token's state. Figures: accuracy, and the language model's perplexity on held-out novels and reviews."""
    tokenizer, _, held, _ = books(VOCAB)
    torch.manual_seed(seed)
    # The extract token at the end is one that the language model never saw, so it is learnt with the task (section 3.3 of the paper).
    extract = tokenizer.vocab_size
    model = normal(gpt.build_classifier(spec(extract + 1, dim, layers, classes=2)))
    if not (Path(base) / "model.safetensors").is_file():
        raise InputError(f"{base or 'base'} holds no model.safetensors: give the folder of a run of :pretrain by --set base=")
    file = open_safetensors(Path(base) / "model.safetensors")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in file.keys():
                known = file.read(name)
                (tensor[: len(known)] if name == "embed.tokens.weight" else tensor).copy_(known)
    file.close()
    dropped(model, 0.1)

    def rows(split: str) -> Samples:
        found = table(f"sentence-polarity/{split}.tsv.xz")
        texts = [tokenizer.encode(r["sentence"], specials=False)[: CONTEXT - 1] for r in found]
        made = [{"ids": [*ids, extract], "labels": int(r["label"])} for ids, r in zip(texts, found, strict=True)]
        return Samples(made, collate, [len(row["ids"]) for row in made])

    train, dev, test = rows("train"), rows("dev"), rows("test")
    reviews = [i for row in test.samples for i in row["ids"][:-1]]
    tail = torch.cat(held).tolist()

    def lm(trained: nn.Module, ids: list[int]) -> float:
        words = Decoder(trained.embed, list(trained.stack.layers), trained.stack.norm, TiedHead(trained.embed.tokens))  # type: ignore[arg-type]
        nats, count = foresee(words.eval(), ids, context=CONTEXT)
        return math.exp(nats / count)

    first = lm(model.eval(), tail), lm(model.eval(), reviews)
    objective = Auxiliary(TiedHead(model.embed.tokens), weight)  # type: ignore[arg-type]

    def finish(trained: nn.Module, folder: Path) -> str:
        found = measure(objective, trained, test)
        return last_words(folder, {
            "lambda": weight, "accuracy": 100 * found["accuracy"], "novels before": first[0], "novels after": lm(trained, tail),
            "reviews before": first[1], "reviews after": lm(trained, reviews),
        })  # fmt: skip

    return Run(model, objective, train, settings(len(train), lr, epochs, batch, seed, "accuracy", True), eval={"dev": dev}, finish=finish)
