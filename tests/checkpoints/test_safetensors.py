"""The safetensors reader and writer against the safetensors package, and named lies."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from transept.checkpoints.safetensors import DTYPES, open_safetensors, write_safetensors
from transept.checkpoints.tensorfile import TensorFile, TensorInfo, Tensors
from transept.core.errors import CheckpointError


def make(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of any stored kind with bits that are not all zero."""
    dtype = DTYPES[kind]
    raw = torch.arange(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.int64) % (2 if kind == "BOOL" else 251)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat_a, flat_b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return a.numel() == 0 or torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8))


FORMS = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4))


@given(st.dictionaries(st.text(min_size=1, max_size=12), FORMS))
def test_written_files_equal_those_of_the_package(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, tuple[str, list[int]]]
) -> None:
    chosen.pop("__metadata__", None)
    tensors = {}
    for name, (kind, shape) in chosen.items():
        if name.encode("utf-8", "replace").decode() == name:
            tensors[name] = make(kind, tuple(shape))
    path = tmp_path_factory.mktemp("st") / "m.safetensors"
    write_safetensors(path, tensors, {"format": "pt"})
    assert path.read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})
    file = open_safetensors(path)
    assert set(file.keys()) == set(tensors)
    assert file.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert same(file.read(name), tensor)
        assert file.info(name) == TensorInfo(name, tuple(tensor.shape), tensor.dtype, chosen[name][0])


def test_save_load_save_is_byte_identical(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(2).bfloat16(), "c": torch.tensor([True, False])}
    write_safetensors(tmp_path / "one", tensors, {"z": "1", "a": "2"})
    file = open_safetensors(tmp_path / "one")
    assert isinstance(file, TensorFile)
    write_safetensors(tmp_path / "two", file, file.metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_tensors_outlive_the_file_and_never_write_to_it(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_safetensors(path, {"a": torch.ones(1000)})
    before = path.read_bytes()
    file = open_safetensors(path)
    tensor = file.read("a")
    file.close()
    tensor += 1
    write_safetensors(path, {"a": torch.zeros(1000)})
    assert torch.equal(tensor, torch.full((1000,), 2.0))
    assert path.read_bytes() != before
    with pytest.raises(CheckpointError, match="closed"):
        file.read("a")


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((3 - len(header)) % 8)
    path = tmp_path / "m"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0))
    assert open_safetensors(path).read("a").tolist() == [1.5, -2.0]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    infos = {"a": TensorInfo("a", (2,), torch.float32, "F32"), "b": TensorInfo("b", (2,), torch.float32, "F32")}

    def interrupted(key: str) -> torch.Tensor:
        if key == "b":
            raise KeyboardInterrupt
        return torch.zeros(2)

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, Tensors(infos, interrupted))
    with pytest.raises(CheckpointError, match="declared"):
        write_safetensors(path, Tensors(infos, lambda key: torch.zeros(3)))
    with pytest.raises(CheckpointError, match="complex128"):
        write_safetensors(path, {"a": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="__metadata__"):
        write_safetensors(path, {"__metadata__": torch.zeros(2)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **extra: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}


LIES: dict[str, tuple[Any, str]] = {
    "unknown dtype": ({"a": entry("F33")}, "dtype of tensor 'a'"),
    "number as dtype": ({"a": entry(3)}, "dtype of tensor 'a'"),
    "negative dimension": ({"a": entry(shape=[-2])}, "shape of tensor 'a'"),
    "true as dimension": ({"a": entry(shape=[True])}, "shape of tensor 'a'"),
    "fraction as dimension": ({"a": entry(shape=[2.0])}, "shape of tensor 'a'"),
    "product overflows": ({"a": entry(shape=[2**33, 2**33])}, "shape of tensor 'a'"),
    "product wraps to the truth": ({"a": entry(shape=[2**62, 4, 2])}, "shape of tensor 'a'"),
    "huge beside an empty dimension": ({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, "shape of tensor 'a'"),
    "rank of 1000": ({"a": entry(shape=[1] * 1000)}, "shape of tensor 'a'"),
    "offsets beyond the end": ({"a": entry(shape=[4], offsets=[0, 16])}, "the file"),
    "offsets of 2^63": ({"a": entry(offsets=[2**63 - 8, 2**63])}, "data_offsets of tensor 'a'"),
    "negative offsets": ({"a": entry(offsets=[-8, 0])}, "data_offsets of tensor 'a'"),
    "reversed offsets": ({"a": entry(offsets=[8, 0])}, "data_offsets of tensor 'a'"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, "data_offsets of tensor 'a'"),
    "overlap": ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "data_offsets of tensor 'b'"),
    "hole": ({"a": entry(shape=[1], offsets=[4, 8])}, "data_offsets of tensor 'a'"),
    "bytes left over": ({"a": entry(shape=[1], offsets=[0, 4])}, "the file"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, "header of tensor 'a'"),
    "extra field": ({"a": entry(code="x")}, "header of tensor 'a'"),
    "entry that is a list": ({"a": [1]}, "header of tensor 'a'"),
    "metadata that is a list": ({"__metadata__": [], "a": entry()}, "__metadata__"),
    "metadata with a number": ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__"),
    "truth value of 7": ({"a": entry("BOOL", [8])}, "tensor 'a'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_by_name(tmp_path: Path, lie: str) -> None:
    header, field = LIES[lie]
    text = json.dumps(header).encode()
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes([7] * 8))
    with pytest.raises(CheckpointError) as caught:
        file = open_safetensors(path)
        file.read("a")
    assert "lie.safetensors" in str(caught.value)
    assert f"{field} is" in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b'{"a"',
        struct.pack("<Q", 9) + b'{"a":NaN}',
        struct.pack("<Q", 14) + b'{"a":1,"a":[]}',
        struct.pack("<Q", 12) + b'{"\\ud800":1}',
        struct.pack("<Q", 7) + b'{"\xff":1}',
        struct.pack("<Q", 200_006) + b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        struct.pack("<Q", 10_006) + b'{"a":' + b"1" * 10_000 + b"}",
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors.*expected"):
        open_safetensors(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", "pipe", ".", "nul\0"):
        with pytest.raises(CheckpointError, match="expected"):
            open_safetensors(tmp_path / name)
    write_safetensors(tmp_path / "m", {"weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="nearest: 'weight'"):
        open_safetensors(tmp_path / "m").read("weigth")
