"""Character language models on Shakespeare.

    transept train recipes.gpt:shakespeare --minutes 3
    transept train recipes.gpt:shakespeare --minutes 15 --set dim=192 --set layers=6 --set heads=3 --set ffn=768 --set context=256 \
        --set compile=true        # wants a C++ compiler

Measured on 2 cores with AVX2 in float32, seed 0: 1.517 nats per character on the whole held-out tenth after 3 minutes of training (1,695
updates; 1.536 on a busier machine that made 1,261), 1.495 after 15. Not yet measured: 30 minutes.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import torch
from torch import nn

from transept.adapters.tune import dropped
from transept.blocks.attention import Attention
from transept.blocks.block import Block, Branch, Pre
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.feedforward import MLP
from transept.blocks.heads import Head
from transept.blocks.norms import RMSNorm
from transept.blocks.positions import Normed, Rotary
from transept.blocks.stack import Decoder
from transept.data.source import Windows, find
from transept.ops.activations import Act
from transept.ops.masks import Causal as Below
from transept.ops.rotary import RopeSpec
from transept.training.objectives.causal import Causal
from transept.training.run import Judging, Loading, Optim, Run, Schedule, Settings, Shape

WHERE = "github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt"


def decoder(vocab: int, dim: int, layers: int, heads: int, ffn: int) -> Decoder:
    """Rotary positions, normalised q and k, squared ReLU, no biases; each branch ends in zeros, so a layer begins as nothing."""

    def layer() -> Block:
        attn = Attention(dim, heads, heads, dim // heads, mask=Below(), position=Normed(Rotary(RopeSpec(theta=10000.0, dims=dim // heads))))
        mlp = MLP(dim, ffn, Act.RELU2, bias=False)
        nn.init.zeros_(attn.out.weight)
        nn.init.zeros_(mlp.down.weight)
        return Block(attn=Branch(attn, RMSNorm(dim), Pre()), mlp=Branch(mlp, RMSNorm(dim), Pre()))

    head = Head(dim, vocab)
    nn.init.zeros_(head.weight)
    return Decoder(Embedding(TokenEmbedding(vocab, dim)), [layer() for _ in range(layers)], RMSNorm(dim), head)


class Characters:
    """A character is a token; the table is the sorted set of those in the text."""

    def __init__(self, text: str):
        self.table = sorted(set(text))
        self.number = {c: i for i, c in enumerate(self.table)}

    def encode(self, text: str) -> torch.Tensor:
        """The characters' numbers [n]."""
        return torch.tensor([self.number[c] for c in text], dtype=torch.long)

    def decode(self, ids: list[int]) -> str:
        """The characters of the numbers."""
        return "".join(self.table[i] for i in ids)


def read(path: Path) -> str:
    """A text file, plain or compressed by xz."""
    return lzma.open(path, "rt", encoding="utf-8").read() if path.suffix == ".xz" else path.read_text(encoding="utf-8")


@torch.no_grad()
def write_on(model: nn.Module, prompt: torch.Tensor, many: int, context: int, seed: int = 0, temperature: float = 0.8) -> list[int]:
    """`many` characters drawn one by one, each given the `context` before it."""
    gen, ids = torch.Generator().manual_seed(seed), prompt[None]
    for _ in range(many):
        logits = model(ids[:, -context:]).logits[:, -1] / temperature
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=gen)), 1)
    return ids[0].tolist()


def shakespeare(*, data: str = "", dim: int = 128, layers: int = 4, heads: int = 2, ffn: int = 512, context: int = 128, batch: int = 12,
                dropout: float = 0.0, seed: int = 0) -> Run:  # fmt: skip
    """Next character; the whole last tenth of the text is held out, in windows of the training length. Measure: nats per character."""
    text = read(Path(data) if data else find("tinyshakespeare/input.txt.xz", WHERE))
    characters = Characters(text)
    cut = int(0.9 * len(text))
    train, held = characters.encode(text[:cut]), characters.encode(text[cut:])
    torch.manual_seed(seed)
    vocab = len(characters.table)
    model = dropped(decoder(vocab, dim, layers, heads, ffn), dropout)

    def finish(model: nn.Module, folder: Path) -> str:
        (folder / "characters.json").write_text(json.dumps(characters.table), encoding="utf-8")
        return characters.decode(write_on(model, characters.encode("ROMEO:\n"), 400, context))

    optim = Optim(lr=5e-3, betas=(0.8, 0.95), decay=0.0, muon=0.02, momentum=0.9, clip=0.0)
    settings = Settings(
        steps=2000, seed=seed, loading=Loading(batch=batch), optim=optim,
        schedule=Schedule(shape=Shape.LINEAR, warmup=0.02, floor=0.0), judging=Judging(every=500, source="held-out"),
    )  # fmt: skip
    return Run(model, Causal(), Windows(train, context, vocab=vocab), settings, eval={"held-out": Windows(held, context, context)},
               finish=finish)  # fmt: skip
