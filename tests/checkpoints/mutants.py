"""Damaged weight files: seeds that the published packages wrote, and valid containers of them with one lie each."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch

NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 31, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
U64 = [n for n in NUMBERS if n >= 0]
JUNK: list[Any] = [None, True, 1.5, 1e300, "", "3", "F32", [], {}, [[1]], {"a": 1}, [None], *NUMBERS, 2**70]


# Bytes of any container


def damage(rng: random.Random, raw: bytes, other: bytes, head: int) -> bytes:
    """Flips, insertions, deletions, tails and concatenations; `head` is where the payload begins, which flips leave alone."""
    at = rng.randrange(head)
    cut = rng.randint(1, 9)
    ways: list[Callable[[], bytes]] = [
        lambda: raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :],
        lambda: raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :],
        lambda: raw[:at] + rng.randbytes(cut) + raw[at:],
        lambda: raw[:at] + raw[at + cut :],
        lambda: raw + rng.randbytes(rng.randint(1, 64)),
        lambda: raw + other,
        lambda: other[: rng.randrange(len(other))] + raw,
        lambda: raw[: rng.randrange(len(raw))],
        lambda: raw[:at] + raw[at : at + cut] * 2 + raw[at + cut :],
        lambda: raw[:at] + b"\xff" * 8 + raw[at + 8 :],
    ]
    return rng.choice(ways)()


# safetensors


def safetensors_seeds() -> list[bytes]:
    """Two small files by the safetensors package."""
    one = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False]), "c": torch.arange(5, dtype=torch.int64)}
    two = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(), "é": torch.zeros(0, 2), "s": torch.tensor(1.5)}
    return [safetensors.torch.save(one, {"format": "pt"}), safetensors.torch.save(two)]


def safetensors_mutant(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with one lie."""
    raw = rng.choice(seeds)
    size = struct.unpack("<Q", raw[:8])[0]
    if rng.random() < 0.35:
        return damage(rng, raw, rng.choice(seeds), 8 + size)
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    lies: list[Callable[[], Any]] = [
        lambda: entry.update(dtype=rng.choice([*JUNK, "F16", "I64", "BOOL", "F8_E4M3", "f32", "F32 ", "Q4_0", "F128"])),
        lambda: entry.update(shape=rng.choice(JUNK)),
        lambda: entry["shape"].append(rng.choice(JUNK)),
        lambda: entry.update(shape=[rng.choice(NUMBERS) for _ in range(rng.randint(0, 5))]),
        lambda: entry.update(shape=[1] * rng.randint(1, 3000)),
        lambda: entry.update(data_offsets=rng.choice(JUNK)),
        lambda: entry.update(data_offsets=[rng.choice(NUMBERS), rng.choice(NUMBERS)]),
        lambda: entry["data_offsets"].reverse(),
        lambda: entry["data_offsets"].append(0),
        lambda: entry.update(data_offsets=[n + rng.choice([-8, -4, -1, 1, 4, 8]) for n in entry["data_offsets"]]),
        lambda: entry.update(data_offsets=header[rng.choice(names)]["data_offsets"]),
        lambda: entry.pop(rng.choice(list(entry))),
        lambda: entry.update(extra=rng.choice(JUNK)),
        lambda: header.update({name: rng.choice(JUNK)}),
        lambda: header.pop(name),
        lambda: header.update({"new": dict(entry)}),
        lambda: header.update({"__metadata__": rng.choice(JUNK)}),
        lambda: header.update({"__metadata__": {"k": rng.choice(JUNK)}}),
    ]
    text_lies: list[Callable[[bytes], bytes]] = [
        lambda text: text[:-1] + b"," + json.dumps({name: entry}).encode()[1:],
        lambda text: b" " + text,
        lambda text: b"[" + text + b"]",
        lambda text: text + b"\0" * 8,
        lambda text: text[:-1] + b',"deep":' + b"[" * 3000 + b"]" * 3000 + b"}",
        lambda text: text[:-1] + b',"deep":' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
        lambda text: text.replace(b"0", b"NaN", 1),
        lambda text: text.replace(b"[0,", b"[-0,", 1),
        lambda text: text.replace(b"[0,", b"[0.0,", 1),
        lambda text: text.replace(b"0", b"1" * 5000, 1),
        lambda text: text.replace(b'"F', b'"\\ud800F', 1),
        lambda text: text.replace(b'"dtype"', b'"dtype":"F32","dtype"', 1),
        lambda text: b"{}" + b" " * 6,
        lambda text: b"",
        lambda text: text.replace(name.encode(), b"\xff\xfe", 1),
    ]
    if rng.random() < 0.6:
        rng.choice(lies)()
        text = json.dumps(header, separators=(",", ":")).encode()
    else:
        text = rng.choice(text_lies)(json.dumps(header, separators=(",", ":")).encode())
    told = rng.choice([*U64, len(text) + 1, len(text) - 1, len(text) + 8, 10**8, 10**8 + 1]) if rng.random() < 0.15 else len(text)
    return struct.pack("<Q", max(told, 0)) + text + data


# GGUF


def gguf_seeds(folder: Path) -> list[bytes]:
    """Two small files by the gguf package."""
    found = []
    for number in range(2):
        writer = gguf.GGUFWriter(folder / "seed.gguf", "llama")
        writer.add_uint32("llama.block_count", 2)
        writer.add_string("general.name", "séed")
        writer.add_float32("eps", 1e-5)
        writer.add_bool("yes", True)
        writer.add_array("tokens", ["a", "bc", "é"])
        writer.add_array("types", [1, 2, 3])
        rng = np.random.default_rng(number)
        writer.add_tensor("h", rng.standard_normal((2, 16)).astype(np.float16))
        kind = gguf.GGMLQuantizationType.Q8_0 if number else gguf.GGMLQuantizationType.Q4_1
        rows = rng.standard_normal((8, 32), dtype=np.float32)
        writer.add_tensor("q", gguf.quants.quantize(rows, kind), raw_dtype=kind)
        # Last and a multiple of the alignment, so that no cut of the file can take padding alone.
        writer.add_tensor("w", rng.standard_normal((4, 8), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append((folder / "seed.gguf").read_bytes())
    return found


def text(value: bytes | str) -> bytes:
    """A GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def gguf_file(
    entries: list[tuple[Any, int, bytes]], tensors: list[list[Any]], data: bytes, head: dict[str, int] | None = None, align: int = 32
) -> bytes:
    """A GGUF file from (key, type, raw value) entries and [name, dims, kind, offset] tensors, each written as given, true or not."""
    told = {"magic": 0x46554747, "version": 3, "tensors": len(tensors), "entries": len(entries), **(head or {})}
    out = struct.pack("<IIQQ", told["magic"], told["version"], told["tensors"], told["entries"])
    for key, kind, value in entries:
        out += text(key) + struct.pack("<I", kind) + value
    for name, dims, kind, offset in tensors:
        out += text(name) + struct.pack("<I", told.get("rank", len(dims))) + b"".join(struct.pack("<Q", n) for n in dims)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % align) + data


def gguf_parts() -> tuple[list[tuple[Any, int, bytes]], list[list[Any]], bytes]:
    """A true description of a small file, for telling lies about."""
    entries: list[tuple[Any, int, bytes]] = [
        ("general.architecture", 8, text("llama")),
        ("n", 4, struct.pack("<I", 3)),
        ("yes", 7, b"\1"),
        ("list", 9, struct.pack("<IQ", 5, 2) + struct.pack("<2i", 1, -1)),
        ("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bb")),
        ("pairs", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 2) + b"\1\2"),
    ]
    tensors: list[list[Any]] = [["w", [8, 4], 0, 0], ["h", [16], 1, 128], ["q", [32, 2], 8, 160]]
    return entries, tensors, np.random.default_rng(1).integers(0, 100, 256, dtype=np.uint8).tobytes()


def gguf_mutant(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with one lie."""
    if rng.random() < 0.35:
        raw = rng.choice(seeds)
        return damage(rng, raw, rng.choice(seeds), raw.index(text("w")) + 41)
    entries, tensors, data = gguf_parts()
    head: dict[str, int] = {}
    tensor = rng.choice(tensors)
    place = rng.randrange(len(entries))
    key, kind, value = entries[place]
    size = rng.choice(U64)
    nest = rng.randint(2, 40)
    lies: list[Callable[[], Any]] = [
        lambda: head.update(tensors=size),
        lambda: head.update(entries=size),
        lambda: head.update(rank=rng.choice([0, 1, 2, 3, 4, 5, 8, 2**31, 2**32 - 1])),
        lambda: head.update(version=rng.choice([0, 1, 2, 3, 4, 0x03000000, 2**31])),
        lambda: head.update(magic=rng.choice([0, 0x47475546, 0x46554746])),
        lambda: tensor.__setitem__(1, [rng.choice(U64) for _ in range(rng.randint(0, 5))]),
        lambda: tensor[1].append(rng.choice(U64)),
        lambda: tensor.__setitem__(1, tensor[1][::-1]),
        lambda: tensor.__setitem__(2, rng.randint(0, 45)),
        lambda: tensor.__setitem__(2, 2**32 - 1),
        lambda: tensor.__setitem__(3, size),
        lambda: tensor.__setitem__(3, tensor[3] + rng.choice([1, 2, 4, 8, 16, 32, 64])),
        lambda: tensor.__setitem__(3, max(0, tensor[3] - rng.choice([1, 2, 4, 8, 16, 32, 64]))),
        lambda: tensor.__setitem__(0, rng.choice(["", "w", "x" * 300, "\0", "é"])),
        lambda: tensor.__setitem__(0, b"\xff\xfe"),
        lambda: tensors.append(list(tensor)),
        lambda: tensors.remove(tensor),
        lambda: entries.append(entries[place]),
        lambda: entries.__setitem__(place, (key, rng.choice([*range(14), 2**32 - 1]), value)),
        lambda: entries.__setitem__(place, (rng.choice(["", "n", "k" * 70000, b"\xff"]), kind, value)),
        lambda: entries.append(("bad", 8, struct.pack("<Q", size) + b"abc")),
        lambda: entries.append(("bad", 9, struct.pack("<IQ", rng.randint(0, 14), size) + b"\1" * rng.randint(0, 64))),
        lambda: entries.append(("bad", 9, struct.pack("<IQ", 9, 1) * nest + struct.pack("<IQ", 4, 0))),
        lambda: entries.append(("bad", 9, struct.pack("<IQ", 9, size))),
        lambda: entries.append(("bad", 7, bytes([rng.randrange(256)]))),
        lambda: entries.append(("general.alignment", 4, struct.pack("<I", rng.choice([0, 1, 8, 13, 32, 64, 2**20, 2**31])))),
        lambda: entries.append(("general.alignment", rng.choice([0, 8, 9, 10]), struct.pack("<QQ", 4, 64))),
        lambda: entries.append(("inf", 6, struct.pack("<I", rng.choice([0x7F800000, 0x7FC00001])))),
    ]
    rng.choice(lies)()
    return gguf_file(entries, tensors, data[: rng.choice([256, 256, 256, 255, 228, 0])], head)


# torch.save


def bin_seeds() -> list[bytes]:
    """Two small files by torch.save."""
    layer = torch.nn.Linear(3, 2)
    one = layer.state_dict()
    model = {"p": torch.nn.Parameter(torch.ones(2)), "t": torch.arange(6).view(2, 3).T}
    two = {"model": model, "step": 3, "lr": 0.1, "name": "n", "l": [1]}
    found = []
    for state in (one, two):
        out = io.BytesIO()
        torch.save(state, out)
        found.append(out.getvalue())
    return found


def unzip(raw: bytes) -> OrderedDict[str, bytes]:
    """The records of a zip."""
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        return OrderedDict((name, file.read(name)) for name in file.namelist())


def rezip(records: OrderedDict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of `records` whose sizes and sums are true."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in records.items():
            file.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


OPCODES = b"().01]}FIJKLMNPQRSTUVXabcdeghijlopqrstu" + bytes(range(0x80, 0x97))


def bin_mutant(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with one lie: in the pickle (with a true CRC around it), in the zip's own fields, or in any byte."""
    raw = rng.choice(seeds)
    way = rng.random()
    if way < 0.2:
        return damage(rng, raw, rng.choice(seeds), len(raw))
    records = unzip(raw)
    pickle = next(name for name in records if name.endswith("data.pkl"))
    data = next(name for name in records if name.endswith("data/0"))
    if way < 0.75:
        program = records[pickle]
        at = rng.randrange(2, len(program))
        swapped = program[:at] + bytes([rng.choice(OPCODES)]) + program[at + 1 :]
        records[pickle] = damage(rng, program, program, len(program)) if way < 0.5 else swapped
        return rezip(records)
    if way < 0.85:
        lies: list[Callable[[], Any]] = [
            lambda: records.pop(rng.choice(list(records))),
            lambda: records.update({data: records[data] + b"\0" * rng.randint(1, 9)}),
            lambda: records.update({data: records[data][:-1]}),
            lambda: records.update({rng.choice(["../x", "/x", "other/data.pkl", pickle + "x", "archive/code/x.py"]): b"1"}),
            lambda: records.update({pickle.replace("data.pkl", "byteorder"): rng.choice([b"big", b"", b"little\0"])}),
            lambda: records.move_to_end(pickle),
        ]
        rng.choice(lies)()
        return rezip(records, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    whole = bytearray(rezip(records) if rng.random() < 0.5 else raw)
    start = rng.choice([i for i in range(len(whole) - 3) if whole[i : i + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7")])
    field = start + rng.choice([0, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 38, 42, 48])
    width = rng.choice([1, 2, 4, 8])
    whole[field : field + width] = rng.choice([bytes(width), b"\xff" * width, rng.randbytes(width), b"\1" + bytes(width - 1)])
    return bytes(whole)
