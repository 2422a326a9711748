"""How published configurations write what several families share: activations and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transept.core.errors import ConfigError, nearest
from transept.ops.activations import Act
from transept.ops.rotary import Dynamic, Layout, Linear, Llama3, RopeSpec, Scaling, Yarn

ACTS = {
    "relu": Act.RELU,
    "gelu": Act.GELU,
    "gelu_new": Act.GELU_TANH,
    "gelu_pytorch_tanh": Act.GELU_TANH,
    "gelu_fast": Act.GELU_TANH,
    "quick_gelu": Act.QUICK_GELU,
    "silu": Act.SILU,
    "swish": Act.SILU,
    "relu2": Act.RELU2,
    "tanh": Act.TANH,
}


def act(name: str) -> Act:
    """The activation of a published name; an unknown one is refused."""
    if name not in ACTS:
        raise ConfigError(f"the activation {name!r} is unknown{nearest(name, ACTS)}")
    return ACTS[name]


def act_name(value: Act) -> str:
    """The published name of an activation."""
    return next(name for name, a in ACTS.items() if a is value)


ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


def rope(config: Mapping[str, Any], dims: int, context: int, theta: float = 10000.0, layout: Layout = Layout.HALVES) -> RopeSpec:
    """Rotary positions from a configuration: `rope_parameters`, or the older `rope_theta` with `rope_scaling`."""
    r = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(r.pop("rope_theta", None) or config.get("rope_theta") or theta)
    part = float(r.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0)
    kind = r.pop("rope_type", None) or r.pop("type", None) or "default"
    r.pop("type", None)
    return RopeSpec(theta=base, dims=int(dims * part), layout=layout, scaling=_scaling(kind, r, context))


def _scaling(kind: str, r: dict[str, Any], context: int) -> Scaling | None:
    original = r.get("original_max_position_embeddings")
    known = {"factor", "original_max_position_embeddings"}
    match kind:
        case "default":
            made = None
        case "linear":
            made = Linear(factor=float(r["factor"]))
        case "dynamic" | "ntk":
            made = Dynamic(factor=float(r["factor"]), context=int(context))
        case "llama3":
            known |= {"low_freq_factor", "high_freq_factor"}
            made = Llama3(
                factor=float(r["factor"]),
                low=float(r["low_freq_factor"]),
                high=float(r["high_freq_factor"]),
                context=int(original or context),
            )
        case "yarn":
            known |= {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
            made = _yarn(r, int(original or context), context)
        case _:
            names = ("default", "linear", "dynamic", "llama3", "yarn")
            raise ConfigError(f"the rotary scaling {kind!r} is unknown{nearest(str(kind), names)}; known are {', '.join(names)}")
    extra = [name for name in r if name not in known and r[name] is not None]
    if extra:
        raise ConfigError(f"the rotary scaling {kind!r} has the unknown field {extra[0]!r}{nearest(extra[0], known)}")
    return made


def _yarn(r: Mapping[str, Any], original: int, context: int) -> Yarn:
    factor = float(r.get("factor") or context / original)
    attention = r.get("attention_factor")
    if attention is None:
        one, every = r.get("mscale"), r.get("mscale_all_dim")
        attention = mscale(factor, one) / mscale(factor, every) if one and every else mscale(factor, 1.0)
    fast, slow = float(r.get("beta_fast") or 32), float(r.get("beta_slow") or 1)
    return Yarn(factor=factor, context=original, fast=fast, slow=slow, attention=float(attention), truncate=bool(r.get("truncate", True)))


def mscale(factor: float, weight: float) -> float:
    """YaRN's temperature for a context stretched by `factor` (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_config(spec: RopeSpec) -> dict[str, Any]:
    """`rope_parameters` of a RopeSpec."""
    match spec.scaling:
        case None:
            scaling: dict[str, Any] = {"rope_type": "default"}
        case Linear(factor=factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Dynamic(factor=factor):
            scaling = {"rope_type": "dynamic", "factor": factor}
        case Llama3() as s:
            scaling = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low, "high_freq_factor": s.high,
                       "original_max_position_embeddings": s.context}
        case Yarn() as s:
            scaling = {"rope_type": "yarn", "factor": s.factor, "beta_fast": s.fast, "beta_slow": s.slow, "attention_factor": s.attention,
                       "truncate": s.truncate, "original_max_position_embeddings": s.context}
    return {"rope_theta": spec.theta, **scaling}
