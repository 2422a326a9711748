"""The few activation functions of the field (rows 20-22)."""

from __future__ import annotations

from enum import Enum

import torch.nn.functional as F

from transept.core.shapes import Tensor


class Act(Enum):
    """An activation, named as its paper names it; call it on a tensor of any shape."""

    RELU = "relu"
    GELU = "x Phi(x)"
    GELU_TANH = "x Phi(x), tanh form"
    QUICK_GELU = "x sigmoid(1.702 x)"
    SILU = "x sigmoid(x)"
    RELU2 = "relu(x)^2"
    TANH = "tanh"

    def __call__(self, x: Tensor) -> Tensor:
        match self:
            case Act.RELU:
                return F.relu(x)
            case Act.GELU:
                return F.gelu(x)
            case Act.GELU_TANH:
                return F.gelu(x, approximate="tanh")
            case Act.QUICK_GELU:
                return x * (1.702 * x).sigmoid()
            case Act.SILU:
                return F.silu(x)
            case Act.RELU2:
                return F.relu(x).square()
            case Act.TANH:
                return x.tanh()
