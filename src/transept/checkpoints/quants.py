"""The block formats of GGUF tensors: decoding to float32 and, for the plain ones, encoding.

Each decoder takes blocks as uint8 [n, block bytes] and fills float32 [n, block length]. The layouts are those that ggml's ggml-common.h
declares; every sum keeps the order of ggml's reference so that results agree with it to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from transept.core.errors import CheckpointError, NumericsError, nearest

Blocks = np.ndarray
CHUNK = 1 << 17


def _half(blocks: Blocks, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Blocks, out: np.ndarray) -> None:
    """Bytes [n, g, w] to numbers [n, g, 2, w]: the low halves first."""
    np.bitwise_and(packed, 15, out=out[:, :, 0], casting="unsafe")
    np.right_shift(packed, 4, out=out[:, :, 1], casting="unsafe")


def _q8_0(blocks: Blocks, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _q4(blocks: Blocks, start: int, out: np.ndarray) -> None:
    _nibbles(blocks[:, None, start:], out.reshape(len(blocks), 1, 2, 16))


def _q4_0(blocks: Blocks, out: np.ndarray) -> None:
    _q4(blocks, 2, out)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: Blocks, out: np.ndarray) -> None:
    _q4(blocks, 4, out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5(blocks: Blocks, start: int, out: np.ndarray) -> None:
    """Four low bits from the nibbles at start + 4, the fifth from 32 bits at `start`."""
    _q4(blocks, start + 4, out)
    high = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    out += high << 4


def _q5_0(blocks: Blocks, out: np.ndarray) -> None:
    _q5(blocks, 2, out)
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: Blocks, out: np.ndarray) -> None:
    _q5(blocks, 4, out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q2_k(blocks: Blocks, out: np.ndarray) -> None:
    n = len(blocks)
    scales = blocks[:, :16]
    quads = blocks[:, 16:80].reshape(n, 2, 1, 32)
    grid = out.reshape(n, 2, 4, 32)
    np.bitwise_and(quads >> np.array([0, 2, 4, 6], np.uint8)[:, None], 3, out=grid, casting="unsafe")
    grid = out.reshape(n, 16, 16)
    grid *= (_half(blocks, 80) * (scales & 15))[:, :, None]
    grid -= (_half(blocks, 82) * (scales >> 4))[:, :, None]


def _q3_k(blocks: Blocks, out: np.ndarray) -> None:
    n = len(blocks)
    low = (blocks[:, None, 96:104] >> np.array([0, 4], np.uint8)[:, None]).reshape(n, 16) & 15
    high = (blocks[:, None, 104:108] >> np.array([0, 2, 4, 6], np.uint8)[:, None]).reshape(n, 16) & 3
    scales = (low | high << 4).astype(np.float32) - 32
    quads = blocks[:, 32:96].reshape(n, 2, 1, 32)
    grid = out.reshape(n, 2, 4, 32)
    np.bitwise_and(quads >> np.array([0, 2, 4, 6], np.uint8)[:, None], 3, out=grid, casting="unsafe")
    bits = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]
    # A set high bit means that nothing is taken off.
    out -= ((~bits & 1) << 2).reshape(n, 256)
    grid = out.reshape(n, 16, 16)
    grid *= (_half(blocks, 108) * scales)[:, :, None]


def _scales_k(packed: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and eight 6-bit minima from 12 bytes, each [n, 8]."""
    low, mid, top = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([low & 63, top & 15 | low >> 2 & 48], axis=1)
    least = np.concatenate([mid & 63, top >> 4 | mid >> 2 & 48], axis=1)
    return scale, least


def _apply_k(blocks: Blocks, grid: np.ndarray) -> None:
    """q -> d * scale * q - dmin * min, by groups of 32."""
    scale, least = _scales_k(blocks[:, 4:16])
    grid *= (_half(blocks, 0) * scale)[:, :, None]
    grid -= (_half(blocks, 2) * least)[:, :, None]


def _q4_k(blocks: Blocks, out: np.ndarray) -> None:
    n = len(blocks)
    _nibbles(blocks[:, 16:].reshape(n, 4, 32), out.reshape(n, 4, 2, 32))
    _apply_k(blocks, out.reshape(n, 8, 32))


def _q5_k(blocks: Blocks, out: np.ndarray) -> None:
    n = len(blocks)
    _nibbles(blocks[:, 48:].reshape(n, 4, 32), out.reshape(n, 4, 2, 32))
    grid = out.reshape(n, 8, 32)
    grid += (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    _apply_k(blocks, grid)


def _q6_k(blocks: Blocks, out: np.ndarray) -> None:
    n = len(blocks)
    _nibbles(blocks[:, :128].reshape(n, 2, 64), out.reshape(n, 2, 2, 64))
    pairs = blocks[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    grid = out.reshape(n, 2, 4, 32)
    grid += (pairs & 3) << 4
    grid -= 32
    scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8) * _half(blocks, 208)
    groups = out.reshape(n, 16, 16)
    groups *= scale[:, :, None]


def _encode_halves(*columns: np.ndarray) -> list[np.ndarray]:
    return [column.astype(np.float16).view(np.uint8) for column in columns]


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _to_q8_0(rows: np.ndarray) -> np.ndarray:
    d = np.abs(rows).max(axis=1, keepdims=True) / 127
    scaled = rows * _inverse(d)
    size = np.abs(scaled)
    floor = np.floor(size)
    # Half away from zero, by comparing the rest: adding one half first would itself round.
    q = np.copysign(floor + (size - floor >= 0.5), scaled)
    return np.concatenate([*_encode_halves(d), q.astype(np.int8).view(np.uint8)], axis=1)


def _pack_q4(q: np.ndarray) -> np.ndarray:
    small = q.astype(np.uint8).clip(0, 15)
    return small[:, :16] | small[:, 16:] << 4


def _to_q4_0(rows: np.ndarray) -> np.ndarray:
    extreme = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    d = extreme / -8
    return np.concatenate([*_encode_halves(d), _pack_q4(np.trunc(rows * _inverse(d) + np.float32(8.5)))], axis=1)


def _to_q4_1(rows: np.ndarray) -> np.ndarray:
    least = rows.min(axis=1, keepdims=True)
    d = (rows.max(axis=1, keepdims=True) - least) / 15
    return np.concatenate([*_encode_halves(d, least), _pack_q4(np.trunc((rows - least) * _inverse(d) + np.float32(0.5)))], axis=1)


@dataclass(frozen=True)
class Quant:
    """One stored kind: its number in GGUF, the elements and bytes of a block, and how a block is decoded and encoded."""

    number: int
    length: int
    nbytes: int
    decode: Callable[[Blocks, np.ndarray], None] | None = None
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    dtype: torch.dtype = torch.float32


QUANTS: dict[str, Quant] = {
    "F32": Quant(0, 1, 4),
    "F16": Quant(1, 1, 2, dtype=torch.float16),
    "BF16": Quant(30, 1, 2, dtype=torch.bfloat16),
    "F64": Quant(28, 1, 8, dtype=torch.float64),
    "I8": Quant(24, 1, 1, dtype=torch.int8),
    "I16": Quant(25, 1, 2, dtype=torch.int16),
    "I32": Quant(26, 1, 4, dtype=torch.int32),
    "I64": Quant(27, 1, 8, dtype=torch.int64),
    "Q4_0": Quant(2, 32, 18, _q4_0, _to_q4_0),
    "Q4_1": Quant(3, 32, 20, _q4_1, _to_q4_1),
    "Q5_0": Quant(6, 32, 22, _q5_0),
    "Q5_1": Quant(7, 32, 24, _q5_1),
    "Q8_0": Quant(8, 32, 34, _q8_0, _to_q8_0),
    "Q2_K": Quant(10, 256, 84, _q2_k),
    "Q3_K": Quant(11, 256, 110, _q3_k),
    "Q4_K": Quant(12, 256, 144, _q4_k),
    "Q5_K": Quant(13, 256, 176, _q5_k),
    "Q6_K": Quant(14, 256, 210, _q6_k),
}
KIND_OF_NUMBER = {quant.number: kind for kind, quant in QUANTS.items()}


def quant(kind: str) -> Quant:
    """The description of a stored kind; CheckpointError with the nearest name where there is none."""
    if kind not in QUANTS:
        raise CheckpointError(f"the stored kind is {kind!r}, expected one of {', '.join(QUANTS)}{nearest(kind, QUANTS)}")
    return QUANTS[kind]


def dequantize(kind: str, raw: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """Stored bytes to numbers.

    raw: uint8 [..., bytes per row], a row being a whole number of blocks. Returns `shape`, or [..., row length]: float32 for block
    kinds, their own dtype for plain ones. Bit-exact with ggml's reference decoders.
    """
    form = quant(kind)
    if raw.dtype != torch.uint8 or not raw.ndim or raw.shape[-1] % form.nbytes:
        found = f"{raw.dtype} {list(raw.shape)}"
        raise CheckpointError(f"the raw bytes of a {kind} tensor are {found}, expected uint8 in rows of a multiple of {form.nbytes}")
    if shape is None:
        shape = (*raw.shape[:-1], raw.shape[-1] // form.nbytes * form.length)
    count = raw.numel() // form.nbytes * form.length
    if math.prod(shape) != count:
        raise CheckpointError(f"the raw bytes of a {kind} tensor hold {count} numbers, expected {list(shape)}")
    if form.decode is None:
        return raw.contiguous().view(-1).view(form.dtype).reshape(shape)
    blocks = raw.contiguous().numpy().reshape(-1, form.nbytes)
    result = torch.empty(shape, dtype=torch.float32)
    out = result.numpy().reshape(-1, form.length)
    # Pieces that stay in the processor's cache: several passes over a whole matrix would each go to memory.
    step = CHUNK // form.length
    with np.errstate(all="ignore"):
        for at in range(0, len(blocks), step):
            form.decode(blocks[at : at + step], out[at : at + step])
    return result


def quantize(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """Numbers to stored bytes, uint8 [..., bytes per row], for F32, F16, BF16, Q8_0, Q4_0 and Q4_1.

    tensor: float [..., row length]. CheckpointError for a kind that is only read or a row that is no whole number of blocks; NumericsError
    for a value that is not finite in a block kind.
    """
    form = quant(kind)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.ndim == 0 or tensor.shape[-1] % form.length:
        raise CheckpointError(f"the tensor's shape is {list(tensor.shape)}, expected rows of a multiple of {form.length} for {kind}")
    if form.decode is None:
        return tensor.to(form.dtype).view(torch.uint8)
    if form.encode is None:
        writable = ", ".join(name for name, q in QUANTS.items() if q.decode is None or q.encode)
        raise CheckpointError(f"the kind to write is {kind}, which is only read, expected one of {writable}")
    rows = tensor.to(torch.float32).numpy().reshape(-1, form.length)
    if not np.isfinite(rows).all():
        raise NumericsError(f"a tensor to be stored as {kind} holds values that are not finite, expected finite numbers")
    out = np.empty((len(rows), form.nbytes), np.uint8)
    step = CHUNK // form.length
    with np.errstate(all="ignore"):
        for at in range(0, len(rows), step):
            out[at : at + step] = form.encode(rows[at : at + step])
    return torch.from_numpy(out.reshape(*tensor.shape[:-1], -1))
