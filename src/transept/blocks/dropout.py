"""Dropout (Srivastava et al. 2014, section 4): while a model learns, a number is zero with chance p, the others grow by 1 / (1 - p)."""

from __future__ import annotations

import torch
from torch import nn

from transept.core.shapes import Float, Tensor

_STEPS = 1 << 16


class Dropout(nn.Dropout):
    """torch's dropout; on a CPU four numbers share one draw of the generator, which is what takes its time there (p in steps of 2^-16)."""

    def forward(self, x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The numbers that stay, scaled; all of them, as they are, where the model does not learn."""
        zeros = round(self.p * _STEPS)
        if not self.training or zeros in (0, _STEPS) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        # From the lowest integer: by default no draw is negative, and each fourth number would see half of its range.
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[: x.numel()]
        stay = (draws.view(x.shape) >= zeros - _STEPS // 2).to(x.dtype).mul_(_STEPS / (_STEPS - zeros))
        return x * stay
