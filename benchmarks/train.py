"""Training steps of one GPT-2, from the same weights on the same batches: transformers, a plain loop in the manner of nanoGPT, and ours.

    python benchmarks/train.py [--threads 2] [--rounds 5] [--size char|small|bpe] [--eager]

Prints tokens per second of each, the ratios, and the loss of each after the same updates. The plain loop is written here from the
published description: fused q, k, v, torch's attention, tied head, AdamW, clipping; float32 everywhere, as this library's own loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from transept.core.batch import Draw
from transept.data.source import Windows
from transept.models.text import gpt
from transept.training.batches import Ahead, Sampler
from transept.training.loop import Loop
from transept.training.objectives.causal import Causal
from transept.training.run import Loading, Optim, Run, Schedule, Settings, Shape

SIZES = {"char": (65, 128, 4, 4, 256, 16), "small": (8192, 384, 6, 6, 256, 4), "bpe": (50257, 256, 4, 4, 256, 4)}
NAMES = {"out": "attn.out", "up": "mlp.up", "down": "mlp.down", "norm1": "attn_norm", "norm2": "mlp_norm"}
OPTIM = Optim(lr=3e-4, betas=(0.9, 0.95), decay=0.1, clip=1.0)


class PlainLayer(nn.Module):
    """One layer: norm, attention, norm, network, each added to the stream."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Plain(nn.Module):
    """GPT-2 in one page."""

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, context: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.layers = nn.ModuleList([PlainLayer(dim, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.tokens.weight)


def copied(plain: Plain, ours: nn.Module) -> Plain:
    """The plain model with our weights."""
    own = dict(ours.named_parameters())
    with torch.no_grad():
        plain.tokens.weight.copy_(own["embed.tokens.weight"])
        plain.positions.weight.copy_(own["embed.position.weight"])
        for kind in ("weight", "bias"):
            getattr(plain.norm, kind).copy_(own[f"stack.norm.{kind}"])
            for i, layer in enumerate(plain.layers):
                at = f"stack.layers.{i}."
                getattr(layer.qkv, kind).copy_(torch.cat([own[f"{at}attn.{n}.{kind}"] for n in "qkv"]))
                for mine, theirs in NAMES.items():
                    getattr(getattr(layer, mine), kind).copy_(own[f"{at}{theirs}.{kind}"])
    return plain


def transformers_model(spec: gpt.GPTSpec, ours: nn.Module) -> nn.Module:
    """transformers' GPT-2 with our weights, through the family's own map."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=spec.vocab, n_positions=spec.context, n_embd=spec.dim, n_layer=spec.layers, n_head=spec.heads,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    theirs = GPT2LMHeadModel(config)
    weights = gpt.FAMILY.form("GPT2LMHeadModel").names.save({n: t.detach() for n, t in ours.state_dict().items()}, spec)
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    return theirs


Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def stepper(model: nn.Module, loss: Loss, batches: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """One update as anybody would write it."""
    halves = [[p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    groups = [{"params": halves[0], "weight_decay": OPTIM.decay}, {"params": halves[1], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, OPTIM.lr, OPTIM.betas)

    def step() -> float:
        found = loss(model, batches())
        adam.zero_grad(set_to_none=True)
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        adam.step()
        return found.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10, help="updates in a round")
    parser.add_argument("--size", choices=SIZES, default="char")
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vocab, dim, layers, heads, context, batch = SIZES[options.size]
    torch.manual_seed(0)
    spec = gpt.GPTSpec(vocab=vocab, dim=dim, layers=layers, heads=heads, ffn=4 * dim, context=context)
    source = Windows(torch.randint(vocab, (100_000,)), context)
    loading = Loading(batch=batch)

    def stream() -> Callable[[], torch.Tensor]:
        sampler, state = Sampler(source, loading, 0), [Draw(0, 0, 0)]

        def take() -> torch.Tensor:
            begin, many, state[0] = sampler.span(state[0])
            return sampler.batch(begin, many)["ids"]

        return take

    first = gpt.build(spec)
    start = {name: t.clone() for name, t in first.state_dict().items()}

    def ours(compiled: bool) -> Callable[[], float]:
        model = gpt.build(spec)
        model.load_state_dict(start)
        settings = Settings(steps=10**6, compile=compiled, loading=loading, optim=OPTIM, schedule=Schedule(shape=Shape.CONSTANT, warmup=1))
        loop, losses = Loop(Run(model, Causal(), source, settings)), []
        loop._write = lambda **facts: losses.append(facts["loss"])  # type: ignore[method-assign]
        ahead = Ahead(loop.sampler.batch, 0)

        def step() -> float:
            loop.advance(ahead)
            return losses[-1]

        return step

    def plain_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def their_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        # Their own loss: they shift the labels themselves, so both see the same window of `context` tokens.
        return F.cross_entropy(model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())

    racers = {
        "transformers GPT2LMHeadModel": stepper(transformers_model(spec, first), their_loss, stream()),
        "plain loop": stepper(copied(Plain(vocab, dim, layers, heads, context), first), plain_loss, stream()),
        "transept": ours(compiled=True),
    }
    if options.eager:
        racers["transept, not compiled"] = ours(compiled=False)
    speeds: dict[str, list[float]] = {name: [] for name in racers}
    last: dict[str, float] = {}
    for step in racers.values():
        for _ in range(3):
            step()
    for _ in range(options.rounds):
        for name, step in racers.items():
            begin = time.perf_counter()
            for _ in range(options.updates):
                last[name] = step()
            speeds[name].append(options.updates * batch * context / (time.perf_counter() - begin))
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    mine = middle["transept"]
    for name, found in middle.items():
        print(f"{name:32s} {found:10,.0f} tokens/s   ours is {mine / found:.2f}x   loss {last[name]:.5f}")
    print(json.dumps({"size": options.size, "threads": options.threads, "tokens_per_second": middle, "loss": last}))


if __name__ == "__main__":
    main()
