"""Block formats against the gguf package's own decoders and encoders, to the bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as oracle_dequantize
from gguf.quants import quantize as oracle_quantize

from tests.counts import count
from tests.figures import record
from transept.checkpoints.quants import QUANTS, dequantize, quantize
from transept.core.errors import CheckpointError, NumericsError

BLOCK_KINDS = [kind for kind, form in QUANTS.items() if form.decode]
SPECIAL_HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE00]
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> None:
    mine, other = ours.numpy().reshape(-1), theirs.reshape(-1)
    assert mine.size == other.size
    assert np.array_equal(np.isnan(mine), np.isnan(other))
    numbers = ~np.isnan(other)
    assert np.array_equal(mine[numbers].view(np.uint32), other[numbers].view(np.uint32))


@pytest.mark.parametrize("kind", list(QUANTS))
def test_numbers_and_sizes_are_those_of_gguf(kind: str) -> None:
    theirs = gguf.GGMLQuantizationType[kind]
    assert QUANTS[kind].number == theirs.value
    assert (QUANTS[kind].length, QUANTS[kind].nbytes) == gguf.GGML_QUANT_SIZES[theirs]


@pytest.mark.reliability
@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_random_and_special_blocks_decode_to_the_same_bits(kind: str) -> None:
    form, blocks = QUANTS[kind], count(20_000)
    raw = np.random.default_rng(7).integers(0, 256, (blocks, form.nbytes), dtype=np.uint8)
    places = HALVES.get(kind, (0,))
    for row, first in enumerate(SPECIAL_HALVES * len(SPECIAL_HALVES)):
        second = SPECIAL_HALVES[row // len(SPECIAL_HALVES)]
        for at, half in zip(places, (first, second), strict=False):
            raw[row, at : at + 2] = np.frombuffer(half.to_bytes(2, "little"), np.uint8)
    with np.errstate(all="ignore"):
        theirs = oracle_dequantize(raw, gguf.GGMLQuantizationType[kind])
    same_bits(dequantize(kind, torch.from_numpy(raw)), theirs)
    record(f"L-2 decode {kind}", n_tried=blocks, n_ok=blocks, n_bad=0, worst_ms=None, seconds=None, seed=7)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_encoding_gives_the_same_bits(kind: str) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((count(20_000), 64)).astype(np.float32) * np.exp(rng.uniform(-30, 9, (count(20_000), 1))).astype(np.float32)
    rows[0] = 0
    rows[1] = 5
    rows[2, ::2] = 0.5
    with np.errstate(all="ignore"):
        theirs = oracle_quantize(rows, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantize(kind, torch.from_numpy(rows)).numpy(), theirs)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_kinds_keep_their_bits(kind: str) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(QUANTS[kind].dtype)
    assert torch.equal(dequantize(kind, quantize(kind, values)), values)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(CheckpointError, match="Q9_0.*nearest"):
        dequantize("Q9_0", torch.zeros(34, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="rows of"):
        dequantize("Q8_0", torch.zeros(33, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="hold 32 numbers"):
        dequantize("Q8_0", torch.zeros(34, dtype=torch.uint8), (2, 32))
    with pytest.raises(CheckpointError, match="multiple of 32"):
        quantize("Q8_0", torch.zeros(33))
    with pytest.raises(CheckpointError, match="only read"):
        quantize("Q6_K", torch.zeros(256))
    with pytest.raises(NumericsError, match="finite"):
        quantize("Q4_0", torch.full((32,), float("nan")))
