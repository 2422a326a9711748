"""Random stored weights whose meaning the `gguf` package gives, and a skip that says why where no core was compiled."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from transept import native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "the native core is there")
ISAS = [name for name in ("avx512", "avx2", "neon", "plain") if native.available() and native.isa(name)]
FLOATS = ("F32", "F16", "BF16")
QUANTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def block(kind: str) -> int:
    """Elements of one block of the kind."""
    return 1 if kind in FLOATS else GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def stored(rng: np.random.Generator, kind: str, n: int, k: int) -> tuple[native.Raw, np.ndarray]:
    """Random bytes of a kind with sound scales, and the float64 matrix that they mean."""
    if kind in FLOATS:
        values = rng.standard_normal((n, k), np.float32) / np.float32(k**0.5)
        made = native.raw(values, kind)
        if kind == "F32":
            return made, values.astype(np.float64)
        return made, dequantize(made.data.reshape(n, -1), GGMLQuantizationType[kind]).astype(np.float64)
    size, bytes_per = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (n * k // size, bytes_per), np.uint8)
    for at in HALVES[kind]:
        scale = rng.uniform(-0.02, 0.02, (len(data), 1)).astype(np.float16)
        data[:, at : at + 2] = scale.view(np.uint8)
    data = data.reshape(n, -1)
    return native.raw(data, kind, k), dequantize(data, GGMLQuantizationType[kind]).astype(np.float64)


def activations(rng: np.random.Generator, t: int, k: int) -> np.ndarray:
    """Rows of very different sizes, as residual streams have."""
    return (rng.standard_normal((t, k)) * rng.uniform(0.01, 30, (t, 1))).astype(np.float32)


def quantised(x: np.ndarray) -> np.ndarray:
    """What int8 activations by blocks of 32 mean, in float64: the larger extreme is at most 128 steps away, the other at most 127."""
    t, k = x.shape
    padded = np.zeros((t, -(-k // 32) * 32))
    padded[:, :k] = x
    parts = padded.reshape(t, -1, 32)
    ends = np.sort(np.concatenate((parts.max(-1, keepdims=True), -parts.min(-1, keepdims=True)), -1))
    scale = np.maximum(ends[..., 1:] / 128, ends[..., :1] / 127)
    scale = np.where(scale > 0, scale, 1)
    return (np.rint(parts / scale) * scale).reshape(t, -1)[:, :k]
