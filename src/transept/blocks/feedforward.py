"""Feed-forward networks: plain, gated, and a mixture of experts (rows 19-22, 82b)."""

from __future__ import annotations

import torch
from torch import nn

from transept.blocks.context import Context
from transept.blocks.traits import Traits
from transept.core.shapes import Float, Tensor
from transept.core.tap import tap
from transept.ops.activations import Act
from transept.ops.routing import RouteSpec, route


class MLP(Traits, nn.Module):
    """down(act(up(x))) (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, dim: int, ffn: int, act: Act, bias: bool = True):
        super().__init__()
        self.act = act
        self.up = nn.Linear(dim, ffn, bias=bias)
        self.down = nn.Linear(ffn, dim, bias=bias)

    def forward(self, x: Float[Tensor, "... d"], ctx: Context | None = None) -> Float[Tensor, "... d"]:
        return self.down(tap(self, "hidden", self.act(self.up(x))))

    def traits(self) -> dict[str, object]:
        return {"act": self.act.name, "bias": self.up.bias is not None}


class GatedMLP(Traits, nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6; SwiGLU where act is SILU)."""

    def __init__(self, dim: int, ffn: int, act: Act, bias: bool = False):
        super().__init__()
        self.act = act
        self.gate = nn.Linear(dim, ffn, bias=bias)
        self.up = nn.Linear(dim, ffn, bias=bias)
        self.down = nn.Linear(ffn, dim, bias=bias)

    def forward(self, x: Float[Tensor, "... d"], ctx: Context | None = None) -> Float[Tensor, "... d"]:
        return self.down(tap(self, "hidden", self.act(self.gate(x)) * self.up(x)))

    def traits(self) -> dict[str, object]:
        return {"act": self.act.name, "bias": self.up.bias is not None}


class Router(Traits, nn.Module):
    """Scores each expert for each token in float32 at least; `correction` balances the choice without entering the weights.

    Source: arXiv 2412.19437, eq. 15 and 16.
    """

    def __init__(self, dim: int, spec: RouteSpec):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.experts, dim).normal_(std=0.02))
        self.correction = nn.Buffer(torch.zeros(spec.experts))

    def forward(self, x: Float[Tensor, "m d"]) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = nn.functional.linear(x.to(wide), self.weight.to(wide))
        return route(logits, self.correction.to(wide), self.spec)

    def traits(self) -> dict[str, object]:
        return dict(vars(self.spec))


class Experts(nn.Module):
    """n gated feed-forward networks of the same shape, their weights stacked."""

    def __init__(self, experts: int, dim: int, ffn: int, act: Act):
        super().__init__()
        self.act = act
        self.gate = nn.Parameter(torch.empty(experts, ffn, dim).normal_(std=0.02))
        self.up = nn.Parameter(torch.empty(experts, ffn, dim).normal_(std=0.02))
        self.down = nn.Parameter(torch.empty(experts, dim, ffn).normal_(std=0.02))

    def forward(self, x: Float[Tensor, "m d"], expert: int) -> Float[Tensor, "m d"]:
        """The output of one expert."""
        hidden = self.act(nn.functional.linear(x, self.gate[expert])) * nn.functional.linear(x, self.up[expert])
        return nn.functional.linear(hidden, self.down[expert])


# An expert is given a multiple of this many rows. A matrix product of few rows runs another kernel with another order of summing,
# so without it a token's last bits would depend on how many later tokens chose the same expert.
TILE = 8


class MoE(nn.Module):
    """shared(x) + the weighted sum of the chosen experts (arXiv 2412.19437, eq. 12)."""

    def __init__(self, router: Router, experts: Experts, shared: nn.Module):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context | None = None) -> Float[Tensor, "b t d"]:
        flat = x.reshape(-1, x.shape[-1])
        chosen, weight = self.router(flat)
        chosen = tap(self, "chosen", chosen)
        # Each token's experts are added in the order of their numbers, so its sum does not depend on its neighbours.
        y = torch.zeros_like(flat)
        for expert in torch.unique(chosen).tolist():
            token, rank = torch.where(chosen == expert)
            rows = flat[token]
            if len(flat) > 1:
                rows = nn.functional.pad(rows, (0, 0, 0, -len(token) % TILE))
            part = self.experts(rows, expert)[: len(token)] * weight[token, rank, None].to(x.dtype)
            y = y.index_add(0, token, part)
        return y.view_as(x) + self.shared(x)
