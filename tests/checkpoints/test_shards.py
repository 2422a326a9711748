"""Checkpoints in several files: read back, read by transformers' own rule of names, and lying indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from transept.checkpoints.shards import open_sharded, write_sharded
from transept.core.errors import CheckpointError

TENSORS = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
INDEX = "model.safetensors.index.json"


def test_shards_hold_what_was_written(tmp_path: Path) -> None:
    paths = write_sharded(tmp_path, TENSORS, max_bytes=90)
    assert [path.name for path in paths] == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    for name, shard in index["weight_map"].items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / shard)[name], TENSORS[name])
    for source in (tmp_path, tmp_path / INDEX):
        file = open_sharded(source)
        assert sorted(file.keys()) == sorted(TENSORS)
        assert all(torch.equal(file.read(key), TENSORS[key]) and file.info(key).shape == (10,) for key in TENSORS)
        file.close()


def test_what_fits_one_file_has_no_index(tmp_path: Path) -> None:
    assert write_sharded(tmp_path, TENSORS) == [tmp_path / "model.safetensors"]
    with pytest.raises(CheckpointError, match="no index"):
        open_sharded(tmp_path)


def test_torch_shards_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    where = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    file = open_sharded(tmp_path)
    assert torch.equal(file.read("a"), torch.ones(2))
    assert torch.equal(file.read("b"), torch.zeros(3))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"t0": "model-00009-of-00003.safetensors"}, "missing from the folder"),
        ({"t0": "../model-00001-of-00003.safetensors"}, "plain name"),
        ({"t0": "/etc/passwd.bin"}, "plain name"),
        ({"t0": "C:\\x.bin"}, "plain name"),
        ({"t0": "a\0.bin"}, "plain name"),
        ({"t0": INDEX}, "plain name"),
        ({"t0": 3}, "plain name"),
        ({"t0": "model-00003-of-00003.safetensors"}, "as weight_map promises"),
        ({"t9": "model-00003-of-00003.safetensors"}, "absent"),
        ({"t0": None}, "plain name"),
    ],
)
def test_lying_indexes_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_sharded(tmp_path, TENSORS, max_bytes=90)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"].update(change)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_sharded(tmp_path)


def test_strays_and_doubles_are_refused(tmp_path: Path) -> None:
    paths = write_sharded(tmp_path, TENSORS, max_bytes=90)
    safetensors.torch.save_file({**safetensors.torch.load_file(paths[2]), "t0": torch.ones(1)}, paths[2])
    with pytest.raises(CheckpointError, match="'t0' is in two shards"):
        open_sharded(tmp_path)
    safetensors.torch.save_file({"t4": torch.ones(1), "stray": torch.ones(1)}, paths[2])
    with pytest.raises(CheckpointError, match="'stray'.*not in weight_map"):
        open_sharded(tmp_path)


DAMAGED = ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": "x.bin", "a": "y.bin"}}']


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_indexes_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="expected"):
        open_sharded(tmp_path / INDEX)
