"""State dicts of torch.save: read alike by torch, hostile pickles refused by name, lying zips refused."""

from __future__ import annotations

import ast
import io
import json
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.fuzz_child import run_child
from tests.checkpoints.mutants import bin_seeds, rezip, unzip
from tests.checkpoints.pickles import CALLS, GOOD_TAIL, PICKLES, bundle, call, tensor
from tests.figures import record
from transept.checkpoints.statepickle import NAMES
from transept.checkpoints.torchbin import open_torchbin
from transept.core.errors import CheckpointError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES += [torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


def saved(state: Any, path: Path, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def test_state_dicts_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    net = torch.nn.TransformerEncoderLayer(8, 2, 16)
    state = net.state_dict()
    state["tied"] = state["linear1.weight"]
    state["turned"] = torch.arange(12).view(3, 4).T
    state["part"] = torch.arange(12)[4:8]
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    state["scalar"] = torch.tensor(2.5)
    state["empty"] = torch.zeros(0, 3)
    for dtype in DTYPES:
        state[str(dtype)] = torch.tensor([0, 1, 1, 0]).to(dtype)
    path = saved(state, tmp_path / "m.bin")
    theirs = torch.load(path, weights_only=True)
    file = open_torchbin(path)
    assert file.keys() == list(theirs)
    for key, expected in theirs.items():
        ours = file.read(key)
        assert (ours.dtype, ours.shape, file.info(key).shape) == (expected.dtype, expected.shape, tuple(expected.shape))
        assert ours.numel() == 0 or ours.stride() == expected.stride()
        assert torch.equal(ours.contiguous().reshape(-1).view(torch.uint8), expected.detach().contiguous().reshape(-1).view(torch.uint8))


def test_nested_tables_are_flattened_and_plain_values_kept(tmp_path: Path) -> None:
    plain = {"step": 3, "lr": 0.5, "name": "x", "none": None, "e": {}, "groups": [{"lr": 1}]}
    file = open_torchbin(saved({"model": {"w": torch.ones(2)}, "betas": (0.9, 1), **plain}, tmp_path / "m.pt"))
    assert file.keys() == ["model.w"]
    assert file.metadata == {"betas": [0.9, 1], **plain}


def test_the_hand_written_frame_is_good(tmp_path: Path) -> None:
    # Otherwise every refusal below could be for another reason.
    path = tmp_path / "m.bin"
    path.write_bytes(bundle(b"\x80\x02" + tensor(GOOD_TAIL)))
    assert torch.equal(open_torchbin(path).read("a"), torch.load(path, weights_only=True)["a"])


@pytest.mark.reliability
@pytest.mark.serial
def test_hostile_pickles_are_refused_and_do_nothing(tmp_path: Path) -> None:
    out, seconds = run_child("pickles", 0, tmp_path)
    wrong = out["untyped"] + out["unhelpful"] + out["disputed"]
    figures = {"worst_ms": round(out["worst_ms"], 1), "seconds": round(seconds, 1)}
    record("X-1 hostile pickles", n_tried=len(PICKLES), n_ok=out["refused"], n_bad=len(wrong) + out["accepted"] - 2, **figures)
    record("X-2 hostile pickles: watched events", n_tried=len(PICKLES), n_ok=len(PICKLES), n_bad=len(out["events"]), **figures)
    assert wrong == [] and out["events"] == []
    assert out["refused"] == len(PICKLES) >= 120
    assert out["worst_ms"] < 1000


@pytest.mark.parametrize("module, name", CALLS[:12])
def test_a_refused_name_is_named(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / "m.bin").write_bytes(bundle(b"\x80\x02" + call(module, name)))
    with pytest.raises(CheckpointError, match=rf"'{module}\.{name}'"):
        open_torchbin(tmp_path / "m.bin")


def test_every_opcode_outside_the_list_is_refused(tmp_path: Path) -> None:
    known = set(b"(}])tXKMJGNqrhjcQRbsuae.") | {0x85, 0x86, 0x87, 0x88, 0x89, 0x8A}
    for opcode in pickletools.opcodes:
        if ord(opcode.code) not in known:
            (tmp_path / "m.bin").write_bytes(bundle(b"\x80\x02}" + opcode.code.encode("latin-1") + b"."))
            with pytest.raises(CheckpointError, match="the opcode"):
                open_torchbin(tmp_path / "m.bin")


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_refused(tmp_path: Path, protocol: int) -> None:
    path = saved({"a": torch.ones(1)}, tmp_path / "m.bin", pickle_protocol=protocol) if protocol > 1 else tmp_path / "m.bin"
    if protocol < 2:
        path.write_bytes(bundle(b"(dp0\n." if protocol == 0 else b"}."))
    with pytest.raises(CheckpointError, match="protocol"):
        open_torchbin(path)


def zip_lies() -> dict[str, tuple[bytes, str]]:
    raw = bundle(b"\x80\x02" + tensor(GOOD_TAIL))
    records = unzip(raw)
    at = raw.index(b"PK\1\2")
    end = raw.index(b"PK\5\6")

    def patch(place: int, value: bytes) -> bytes:
        return raw[:place] + value + raw[place + len(value) :]

    twice = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(twice, "w") as file:
        for name in ("m/data.pkl", "m/data.pkl", "m/version"):
            file.writestr(name, b"}.")
    old = io.BytesIO()
    torch.save({"a": torch.ones(1)}, old, _use_new_zipfile_serialization=False)
    data = raw.index(bytes(24))
    return {
        "compressed": (rezip(records, zipfile.ZIP_DEFLATED), "compressed"),
        "bomb of 1000x": (rezip(OrderedDict({**records, "m/data/0": bytes(10_000_000)}), zipfile.ZIP_DEFLATED), "compressed"),
        "wrong CRC of the storage": (patch(data, b"\1"), "CRC-32 of record 'm/data/0'"),
        "wrong CRC of the pickle": (patch(raw.index(b"\x80\x02}") + 2, b"]"), "CRC-32 of record 'm/data.pkl'"),
        "encrypted": (patch(at + 8, b"\1"), "not encrypted"),
        "folder attribute": (patch(at + 38, b"\x10"), "attributes 0x"),
        "size of 4 GB": (patch(at + 20, b"\xfe\xff\xff\xff" * 2), "local header"),
        "zip64 mark without a field": (patch(at + 20, b"\xff" * 8), "expected"),
        "local header elsewhere": (patch(at + 42, b"\x07\0\0\0"), "expected"),
        "two disks": (patch(end + 4, b"\1"), "one disk"),
        "a million entries": (patch(end + 8, b"\xfe\xff\xfe\xff"), "number of zip records"),
        "directory beyond the file": (patch(end + 16, b"\xfe\xff\xff\x7f"), "zip directory"),
        "comment": (raw[:-2] + b"\1\0x", "cut off or carries"),
        "bytes behind": (raw + b"x", "cut off or carries"),
        "bytes in front": (b"MZ" + raw, "magic"),
        "two zips": (raw + raw, "expected"),
        "record twice": (twice.getvalue(), "in the zip twice"),
        "two pickles": (rezip(OrderedDict({**records, "n/data.pkl": b"}."})), "2 records"),
        "stray record": (rezip(OrderedDict({**records, "x": b""})), "the record 'x'"),
        "TorchScript": (rezip(OrderedDict({**records, "m/code/a.py": b""})), "plain state dict"),
        "big-endian": (rezip(OrderedDict({**records, "m/byteorder": b"big"})), "byteorder"),
        "no version": (rezip(OrderedDict((k, v) for k, v in records.items() if k != "m/version")), "version"),
        "old format": (old.getvalue(), "torch before 1.6"),
        "old tar": (bytes(257) + b"ustar\0" + bytes(249), "torch before 1.6"),
        "json": (json.dumps({"a": 1}).encode(), "magic"),
        "empty zip": (rezip(OrderedDict()), "magic"),
        "one byte": (b"P", "magic"),
    }


def test_lying_zips_are_refused(tmp_path: Path) -> None:
    lies = zip_lies()
    for name, (raw, message) in lies.items():
        (tmp_path / "m.bin").write_bytes(raw)
        with pytest.raises(CheckpointError) as caught:
            file = open_torchbin(tmp_path / "m.bin")
            file.read("a")
        assert message in str(caught.value), name
        assert "expected" in str(caught.value), name
    record("L-4", n_tried=len(lies), n_ok=len(lies), n_bad=0)


def test_sparse_and_quantized_tensors_are_refused(tmp_path: Path) -> None:
    path = saved({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.bin")
    with pytest.raises(CheckpointError, match="_rebuild_sparse_tensor"):
        open_torchbin(path)
    path = saved(torch.nn.Linear(2, 2), tmp_path / "module.bin")
    with pytest.raises(CheckpointError, match="torch.nn.modules.linear.Linear"):
        open_torchbin(path)


def test_the_list_of_names_is_short_and_torch_writes_no_other() -> None:
    assert len(NAMES) <= 24
    for raw in bin_seeds():
        program = next(data for name, data in unzip(raw).items() if name.endswith("data.pkl"))
        used = {argument for opcode, argument, _ in pickletools.genops(program) if opcode.name == "GLOBAL"}
        assert used <= NAMES


def test_no_source_file_can_run_data() -> None:
    """X-5: no pickle, marshal or shelve, no eval, exec, compile or __import__, no torch.load in the package."""
    root = Path(__file__).parents[2] / "src" / "transept"
    banned = {"pickle", "cPickle", "_pickle", "dill", "marshal", "shelve", "joblib"}
    found = []
    files = sorted(root.rglob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}:{node.lineno} {name}" for name in names if name.split(".")[0] in banned]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "torch.jit.load"):
                    found.append(f"{path.name}:{node.lineno} {called}")
    record("X-5", n_tried=len(files), n_ok=len(files) - len(found), n_bad=len(found))
    assert files and found == []
