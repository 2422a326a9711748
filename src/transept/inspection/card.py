"""What a model costs, counted from its modules on the meta device: parameters, FLOPs, cache bytes (rows 13, 82d, 129)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from transept.blocks.attention import Attention
from transept.blocks.block import Block
from transept.blocks.cache import Room
from transept.blocks.feedforward import Experts, MoE, Router
from transept.blocks.heads import TiedHead
from transept.blocks.latent import LatentAttention
from transept.core.spec import Spec


@dataclass(frozen=True)
class Card:
    """The counts of one model.

    `parameters` in all, `active` those that one token meets; multiply-adds of one token: `linear` in matrices (the BLE^2 part, with B
    = L = 1) and `attention` per token looked at (the BL^2 E part, divided by B and L^2; full attention over L tokens); `cache` numbers
    per token and layer kept for decoding.
    """

    family: str
    parameters: int
    active: int
    linear: int
    attention: int
    cache: tuple[int, ...]
    context: int | None
    groups: dict[str, int]

    def flops(self, length: int, batch: int = 1) -> int:
        """Floating-point operations of one forward pass over `length` tokens; every pair counted, masked or not."""
        return 2 * batch * (length * self.linear + length * length * self.attention)

    def cache_bytes(self, length: int, width: int = 2) -> int:
        """Bytes of a full cache of `length` tokens at `width` bytes per number."""
        return sum(self.cache) * length * width


def card(model: nn.Module, spec: Spec, family: str) -> Card:
    """The card of a model, on the meta device or with weights."""
    linear = attention = active = 0
    skipped: set[int] = set()
    for module in model.modules():
        if isinstance(module, MoE):
            route = module.router.spec
            one = sum(p[0].numel() for p in module.experts.parameters())
            linear += route.chosen * one + module.router.weight.numel()
            active += route.chosen * one - route.experts * one
            skipped |= {id(module.router), id(module.experts)}
        elif isinstance(module, nn.Linear):
            linear += module.weight.numel()
        elif isinstance(module, TiedHead):
            linear += module.source[0].weight.numel()
        elif isinstance(module, (Router, Experts)) and id(module) not in skipped:
            linear += sum(p.numel() for p in module.parameters())
        elif isinstance(module, Attention):
            attention += 2 * module.heads * module.head_dim
        elif isinstance(module, LatentAttention):
            attention += module.spec.heads * (module.spec.nope + module.spec.rope + module.spec.value)
    parameters = sum(p.numel() for p in model.parameters())
    return Card(family, parameters, parameters + active, linear, attention, _cache(model), getattr(spec, "context", None), _groups(model))


def _cache(model: nn.Module) -> tuple[int, ...]:
    """Numbers per token that each block's slots keep, read from slots made for one token."""
    room = Room(batch=1, capacity=1, dtype=torch.float16, device=torch.device("meta"))
    return tuple(sum(_numbers(slot) for slot in block.slots(room).values()) for block in model.modules() if isinstance(block, Block))


def _numbers(slot: object) -> int:
    return sum(getattr(slot, side).shape[1] * getattr(slot, side).shape[3] for side in ("k", "v"))


def _groups(model: nn.Module) -> dict[str, int]:
    """Parameters by part: embeddings, attention, feed-forward, norms, head."""
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        label = next((w for w in words if w in ("embed", "attn", "cross", "mlp", "head")), "other")
        label = (
            "norm"
            if any("norm" in w for w in words)
            else {"embed": "embedding", "attn": "attention", "mlp": "feed-forward"}.get(label, label)
        )
        groups[label] = groups.get(label, 0) + parameter.numel()
    return groups
