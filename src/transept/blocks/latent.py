"""Multi-head latent attention, by equations 37-47 of DeepSeek-V3 (arXiv 2412.19437; row 82b): only c^KV and k^R are cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from transept.blocks.attention import merge, split
from transept.blocks.cache import Dense, Room, Slot
from transept.blocks.context import Context
from transept.blocks.norms import RMSNorm
from transept.blocks.positions import Rotary
from transept.blocks.traits import Traits
from transept.core.shapes import Float, Tensor
from transept.core.spec import Spec
from transept.core.tap import peek, tap
from transept.ops.attention import attend, weights
from transept.ops.masks import Bound, Mask


@dataclass(frozen=True, kw_only=True)
class LatentSpec(Spec):
    """Widths: `q_rank` of c^Q, `kv_rank` of c^KV, `nope` and `rope` of a head's two parts, `value` of v^C; `eps` of the two norms."""

    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    eps: float


class LatentAttention(Traits, nn.Module):
    """Attention through a low-rank latent: prefill expands keys and values, decoding absorbs W^UK and W^UV into the query and the output.
    """

    READ = ("k_up", "v_up")
    """The linear maps whose weights decoding reads without calling them, so that nothing may be put around them."""

    def __init__(self, dim: int, spec: LatentSpec, *, mask: Mask, position: Rotary, scale: float):
        super().__init__()
        self.spec, self.mask, self.position, self.scale = spec, mask, position, scale
        s = spec
        self.q_down = nn.Linear(dim, s.q_rank, bias=False)  # W^DQ
        self.q_norm = RMSNorm(s.q_rank, s.eps)
        self.q_up = nn.Linear(s.q_rank, s.heads * s.nope, bias=False)  # W^UQ
        self.q_rope = nn.Linear(s.q_rank, s.heads * s.rope, bias=False)  # W^QR
        self.kv_down = nn.Linear(dim, s.kv_rank, bias=False)  # W^DKV
        self.kv_norm = RMSNorm(s.kv_rank, s.eps)
        self.k_rope = nn.Linear(dim, s.rope, bias=False)  # W^KR
        self.k_up = nn.Linear(s.kv_rank, s.heads * s.nope, bias=False)  # W^UK
        self.v_up = nn.Linear(s.kv_rank, s.heads * s.value, bias=False)  # W^UV
        self.out = nn.Linear(s.heads * s.value, dim, bias=False)  # W^O

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context) -> Float[Tensor, "b t d"]:
        c_q = self.q_norm(self.q_down(x))  # eq. 37
        q_c = split(self.q_up(c_q), self.spec.heads)  # eq. 38
        c_kv = self.kv_norm(self.kv_down(x))[:, None]  # eq. 41
        q_r, k_r = self.position(split(self.q_rope(c_q), self.spec.heads), split(self.k_rope(x), 1), ctx)  # eq. 39, 43
        absorb = ctx.slot is not None and x.shape[1] < ctx.seen.index.shape[1]
        if ctx.slot is not None:
            c_kv, k_r = ctx.slot.append(c_kv, k_r, ctx.positions)
        mask = ctx.bind(self.mask, c_kv.shape[2])
        peek(self, "weights", partial(self._weights, q_c, q_r, c_kv, k_r, mask))
        compute = self._absorbed if absorb else self._expanded
        return self.out(merge(tap(self, "heads", compute(q_c, q_r, c_kv, k_r, mask))))  # eq. 47

    def _expand(self, q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor) -> tuple[Tensor, Tensor]:
        k_c = split(self.k_up(c_kv[:, 0]), self.spec.heads)  # eq. 42
        q = torch.cat((q_c, q_r), -1)  # eq. 40
        k = torch.cat((k_c, k_r.expand(-1, self.spec.heads, -1, -1)), -1)  # eq. 44
        return q, k

    def _weights(
        self, q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, mask: Bound, heads: Sequence[int] | None = None
    ) -> Float[Tensor, "b g t s"]:
        return weights(*self._expand(q_c, q_r, c_kv, k_r), mask=mask, scale=self.scale, heads=heads)

    def _expanded(
        self,
        q_c: Float[Tensor, "b h t e"],
        q_r: Float[Tensor, "b h t o"],
        c_kv: Float[Tensor, "b 1 s r"],
        k_r: Float[Tensor, "b 1 s o"],
        mask: Bound,
    ) -> Float[Tensor, "b h t f"]:
        q, k = self._expand(q_c, q_r, c_kv, k_r)
        v_c = split(self.v_up(c_kv[:, 0]), self.spec.heads)  # eq. 45
        return attend(q, k, v_c, mask=mask, scale=self.scale)  # eq. 46

    def _absorbed(
        self,
        q_c: Float[Tensor, "b h t e"],
        q_r: Float[Tensor, "b h t o"],
        c_kv: Float[Tensor, "b 1 s r"],
        k_r: Float[Tensor, "b 1 s o"],
        mask: Bound,
    ) -> Float[Tensor, "b h t f"]:
        """The same scores as one-head attention over the latent: q^C k^C = (q^C W^UK) c^KV."""
        w_uk = self.k_up.weight.unflatten(0, (self.spec.heads, -1))
        w_uv = self.v_up.weight.unflatten(0, (self.spec.heads, -1))
        q = torch.cat((torch.einsum("bhte,her->bhtr", q_c, w_uk), q_r), -1)
        o = attend(q, torch.cat((c_kv, k_r), -1), c_kv, mask=mask, scale=self.scale)
        return torch.einsum("bhtr,hfr->bhtf", o, w_uv)

    def slot(self, room: Room) -> Slot:
        """One head of c^KV and k^R: kv_rank + rope numbers per token."""
        return Dense(room, 1, self.spec.kv_rank, self.spec.rope)

    def traits(self) -> dict[str, object]:
        return dict(vars(self.spec))
