"""The GGUF reader and writer against the gguf package, and named lies."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.checkpoints.mutants import gguf_file, gguf_parts, gguf_seeds, text
from transept.checkpoints.gguf import open_gguf, write_gguf
from transept.checkpoints.quants import QUANTS
from transept.checkpoints.tensorfile import TensorFile
from transept.core.errors import CheckpointError


def agrees(path: Path) -> None:
    """Every tensor and every metadata entry as the gguf package reads them."""
    file, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert file.keys() == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info, ours = file.info(tensor.name), file.read(tensor.name)
        assert info.kind == tensor.tensor_type.name
        assert info.shape == tuple(reversed(tensor.shape.tolist())) == tuple(ours.shape)
        whole = tensor.tensor_type.name[0] == "I" or tensor.tensor_type.name == "F64"
        values = tensor.data if whole else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.numpy() if whole else ours.to(torch.float32).numpy(), values)
        assert file.raw(tensor.name).numpy().tobytes() == tensor.data.tobytes()
    named = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == named


def test_files_of_the_package_are_read_alike(tmp_path: Path) -> None:
    for number, raw in enumerate(gguf_seeds(tmp_path)):
        (tmp_path / f"{number}.gguf").write_bytes(raw)
        agrees(tmp_path / f"{number}.gguf")
        assert isinstance(open_gguf(tmp_path / f"{number}.gguf"), TensorFile)


def test_written_files_are_read_alike(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t.{kind}": torch.randn(4, 64, generator=generator) for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")}
    tensors["half"] = torch.randn(3, generator=generator).half()
    metadata = {"a": "x", "n": 3, "neg": -5, "big": 2**40, "f": 0.5, "b": True}
    metadata |= {"l": [1, -2], "w": ["é", ""], "fl": [0.25], "bl": [True, False]}
    write_gguf(tmp_path / "m.gguf", metadata, tensors, {name: name[2:] for name in tensors if name != "half"})
    agrees(tmp_path / "m.gguf")
    assert open_gguf(tmp_path / "m.gguf").metadata == metadata
    assert open_gguf(tmp_path / "m.gguf").read("half").dtype == torch.float16


@pytest.mark.parametrize("kind", list(QUANTS))
def test_every_kind_is_read_from_a_file(tmp_path: Path, kind: str) -> None:
    form = QUANTS[kind]
    raw = np.random.default_rng(2).integers(0, 60, 2 * 2 * form.nbytes, dtype=np.uint8).tobytes()
    (tmp_path / "m.gguf").write_bytes(gguf_file([], [["w", [2 * form.length, 2], form.number, 0]], raw))
    agrees(tmp_path / "m.gguf")


def test_nested_arrays_keep_their_shape(tmp_path: Path) -> None:
    entries, tensors, data = gguf_parts()
    (tmp_path / "m.gguf").write_bytes(gguf_file(entries, tensors, data[:228]))
    assert open_gguf(tmp_path / "m.gguf").metadata["pairs"] == [[1, 2]]


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


ENTRY_LIES: dict[str, tuple[bytes | str, int, bytes, str]] = {
    "string of 2^64 - 1": ("k", 8, struct.pack("<Q", 2**64 - 1), "'k' is"),
    "array of 2^60": ("k", 9, array(4, 2**60), "length of 'k'"),
    "array of 2^60 arrays": ("k", 9, array(9, 2**60), "length of 'k'"),
    "array of 2^61 - 1 strings": ("k", 9, array(8, 2**61 - 1), "length of 'k'"),
    "array nested 40 deep": ("k", 9, array(9, 1) * 40 + array(4, 0), "nested 5 deep"),
    "array of an unknown type": ("k", 9, array(13, 0), "element type of 'k'"),
    "unknown type": ("k", 13, b"\0" * 8, "type of 'k'"),
    "truth value of 2": ("k", 7, b"\2", "a truth value of 2"),
    "truth value of 3 in an array": ("k", 9, array(7, 2, b"\0\3"), "a truth value of 3"),
    "text that is no UTF-8": ("k", 8, text(b"\xff\xfe"), "UTF-8"),
    "key that is no UTF-8": (b"\xff", 4, b"\0" * 4, "UTF-8"),
    "empty key": ("", 4, b"\0" * 4, "empty or seen before"),
    "repeated key": ("n", 4, b"\0" * 4, "empty or seen before"),
    "key of 70,000 bytes": ("k" * 70_000, 4, b"\0" * 4, "at most 65535"),
    **{
        f"alignment {n}": ("general.alignment", 4, struct.pack("<I", n), "general.alignment is")
        for n in (0, 1, 4, 13, 33, 2**21, 2**31, 2**32 - 1)
    },
    "alignment as int64": ("general.alignment", 11, struct.pack("<q", 32), "type of 'general.alignment'"),
    "alignment as text": ("general.alignment", 8, text("32"), "type of 'general.alignment'"),
}


@pytest.mark.parametrize("lie", ENTRY_LIES)
def test_lies_of_the_metadata_are_refused(tmp_path: Path, lie: str) -> None:
    key, kind, value, message = ENTRY_LIES[lie]
    entries, tensors, data = gguf_parts()
    refused(tmp_path, gguf_file([*entries, (key, kind, value)], tensors, data[:228]), message)


def refused(folder: Path, raw: bytes, message: str) -> None:
    path = folder / "lie.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    assert "lie.gguf" in str(caught.value)
    assert message in str(caught.value)
    assert "expected" in str(caught.value)


TENSOR_LIES: dict[str, tuple[list[object], str]] = {
    "empty dimension": (["x", [0], 0, 0], "2^63 - 1 elements"),
    "product of 2^64": (["x", [2**32, 2**32], 0, 0], "2^63 - 1 elements"),
    "product that wraps": (["x", [2**63, 2, 4], 0, 0], "2^63 - 1 elements"),
    "rank 5": (["x", [1] * 5, 0, 0], "rank of tensor 'x'"),
    "unknown kind": (["x", [8], 99, 0], "kind of tensor 'x'"),
    "removed kind": (["x", [32], 4, 0], "kind of tensor 'x'"),
    "row of no whole block": (["x", [33], 8, 0], "multiple of 32 for Q8_0"),
    "K row of no whole block": (["x", [32], 12, 0], "multiple of 256 for Q4_K"),
    "offset beyond the end": (["x", [8], 0, 2**20], "offset of tensor 'x'"),
    "offset of 2^64 - 1": (["x", [8], 0, 2**64 - 1], "offset of tensor 'x'"),
    "unaligned offset": (["x", [8], 0, 230], "offset of tensor 'x'"),
    "overlap": (["x", [8], 0, 128], "offset of tensor"),
    "size beyond the end": (["x", [2**40], 0, 256], "bytes long"),
    "repeated name": (["w", [8], 0, 256], "a second time"),
    "name that is no UTF-8": ([b"\xff", [8], 0, 256], "UTF-8"),
    "name of 300 bytes": (["x" * 300, [8], 0, 256], "at most 255"),
}


@pytest.mark.parametrize("lie", TENSOR_LIES)
def test_lies_of_the_tensor_table_are_refused(tmp_path: Path, lie: str) -> None:
    tensor, message = TENSOR_LIES[lie]
    entries, tensors, data = gguf_parts()
    refused(tmp_path, gguf_file(entries, [*tensors, tensor], data), message)


HEAD_LIES: dict[str, tuple[dict[str, int], str]] = {
    "other magic": ({"magic": 0x46554746}, "magic is"),
    "version 1": ({"version": 1}, "version is 1"),
    "version 4": ({"version": 4}, "version is 4"),
    "big-endian": ({"version": 0x03000000}, "big-endian"),
    "2^64 - 1 tensors": ({"tensors": 2**64 - 1}, "the tensor count is"),
    "2^60 entries": ({"entries": 2**60}, "the metadata count is"),
    "one tensor more": ({"tensors": 4}, "expected"),
    "one tensor less": ({"tensors": 2}, "bytes long"),
    "one entry more": ({"entries": 7}, "expected"),
    "one entry less": ({"entries": 5}, "expected"),
    "rank of 2^32 - 1": ({"rank": 2**32 - 1}, "rank of tensor"),
}


@pytest.mark.parametrize("lie", HEAD_LIES)
def test_lies_of_the_head_are_refused(tmp_path: Path, lie: str) -> None:
    head, message = HEAD_LIES[lie]
    entries, tensors, data = gguf_parts()
    refused(tmp_path, gguf_file(entries, tensors, data[:228], head), message)


@pytest.mark.parametrize("size", [0, 100, 227, 257, 300])
def test_data_cut_short_or_followed_by_more_is_refused(tmp_path: Path, size: int) -> None:
    entries, tensors, data = gguf_parts()
    refused(tmp_path, gguf_file(entries, tensors, (data + data)[:size]), "bytes long")


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for metadata, tensors, kinds in [
        ({"k": None}, {}, None),
        ({"k": [1, "a"]}, {}, None),
        ({"k": 2**64}, {}, None),
        ({}, {"w": torch.zeros(2, dtype=torch.complex64)}, None),
        ({}, {"w": torch.zeros(256)}, {"w": "Q6_K"}),
        ({}, {"w": torch.zeros(33)}, {"w": "Q8_0"}),
        ({}, {"w": torch.zeros(0)}, None),
        ({}, {"w" * 300: torch.zeros(1)}, None),
    ]:
        with pytest.raises(CheckpointError, match="expected"):
            write_gguf(path, metadata, tensors, kinds)
    assert not path.exists()
