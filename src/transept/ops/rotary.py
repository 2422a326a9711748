"""Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 15 and 34; row 36) in both published layouts, with the published scalings.

Each pair of a head's numbers is turned by position * frequency, so a score depends on the difference of two positions only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from transept.core.shapes import Float, Int, Tensor
from transept.core.spec import Spec


class Layout(Enum):
    """Which numbers form a pair: PAIRS are neighbours (RoFormer, GPT-J, DeepSeek), HALVES are i and i + e/2 (LLaMA as published by its
    library)."""

    PAIRS = "2i, 2i+1"
    HALVES = "i, i+e/2"


@dataclass(frozen=True, kw_only=True)
class Linear(Spec):
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Dynamic(Spec):
    """NTK-aware base that grows with the length of the call beyond `context` (the "dynamic" form; `factor` as published)."""

    factor: float
    context: int


@dataclass(frozen=True, kw_only=True)
class Llama3(Spec):
    """LLaMA-3.1's scaling: long wavelengths divided by `factor`, short ones kept, a smooth ramp between the two."""

    factor: float
    low: float
    high: float
    context: int


@dataclass(frozen=True, kw_only=True)
class Yarn(Spec):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): a ramp between interpolation and extrapolation, and `attention`, a factor on cos and
    sin."""

    factor: float
    context: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float = 1.0
    truncate: bool = True


Scaling = Linear | Dynamic | Llama3 | Yarn


@dataclass(frozen=True, kw_only=True)
class RopeSpec(Spec):
    """Base `theta`, number of rotated dims at the front of each head, layout, and the scaling or None."""

    theta: float
    dims: int
    layout: Layout = Layout.HALVES
    scaling: Scaling | None = None


def frequencies(spec: RopeSpec, length: int) -> tuple[Float[Tensor, "r"], float]:
    """The dims/2 frequencies in radians per position for a call that reaches position length - 1, and the factor on cos and sin."""
    exponent = torch.arange(0, spec.dims, 2, dtype=torch.float32) / spec.dims
    plain = 1.0 / spec.theta**exponent
    match spec.scaling:
        case None:
            return plain, 1.0
        case Linear(factor=factor):
            return plain / factor, 1.0
        case Dynamic(factor=factor, context=context):
            grown = factor * max(length, context) / context - (factor - 1)
            return 1.0 / (spec.theta * grown ** (spec.dims / (spec.dims - 2))) ** exponent, 1.0
        case Llama3() as scaling:
            return _llama3(plain, scaling), 1.0
        case Yarn() as scaling:
            return _yarn(plain, spec, scaling), scaling.attention
    raise TypeError(spec.scaling)


def _llama3(plain: Tensor, s: Llama3) -> Tensor:
    wavelength = 2 * math.pi / plain
    smooth = (s.context / wavelength - s.low) / (s.high - s.low)
    blended = (1 - smooth) * plain / s.factor + smooth * plain
    scaled = torch.where(wavelength > s.context / s.low, plain / s.factor, plain)
    between = (wavelength >= s.context / s.high) & (wavelength <= s.context / s.low)
    return torch.where(between, blended, scaled)


def _yarn(plain: Tensor, spec: RopeSpec, s: Yarn) -> Tensor:
    def dim_of(turns: float) -> float:
        return spec.dims * math.log(s.context / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dim_of(s.fast), dim_of(s.slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dims - 1)
    ramp = ((torch.arange(spec.dims // 2, dtype=torch.float32) - low) / (max(high - low, 0.001))).clamp(0, 1)
    return plain / s.factor * ramp + plain * (1 - ramp)


def angles(
    positions: Int[Tensor, "b t"], spec: RopeSpec, length: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "b 1 t r"], Float[Tensor, "b 1 t r"]]:
    """cos and sin of position * frequency, computed in float32, for the r = dims/2 pairs."""
    turn, factor = frequencies(spec, length)
    theta = positions[:, None, :, None].float() * turn.to(positions.device)
    return (theta.cos() * factor).to(dtype), (theta.sin() * factor).to(dtype)


def rotate(
    x: Float[Tensor, "b h t e"], cos: Float[Tensor, "#b 1 t r"], sin: Float[Tensor, "#b 1 t r"], layout: Layout
) -> Float[Tensor, "b h t e"]:
    """Turns the first 2r numbers of each head; the rest pass through."""
    r = cos.shape[-1]
    turned, rest = x[..., : 2 * r], x[..., 2 * r :]
    if layout is Layout.HALVES:
        a, b = turned[..., :r], turned[..., r:]
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((y, rest), -1) if rest.shape[-1] else y
