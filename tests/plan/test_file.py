"""Plan files: the same tokens without torch, and every damage, other version, machine or source is told and made again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import transept
from tests.counts import count
from transept import native
from transept.compiled import Compiled, PlanWarning, compile_model, load, places
from transept.core.errors import ConfigError, SourceError
from transept.core.registry import family
from transept.core.tap import listening
from transept.door import Model
from transept.inference.plan.file import PlanRefused, open_plan

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native core is not compiled here: {native.why_not()}")
SRC = str(Path(transept.__file__).parents[1])
PROMPT = [1, 2, 3, 4, 5]


def saved(folder: Path, name: str = "llama", size: str = "gqa", seed: int = 0) -> Path:
    """A tiny model of random numbers in a folder of transformers' form."""
    fam = family(name)
    torch.manual_seed(seed)
    model = fam.build(fam.tiny[size]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25)
    return transept.save(Model(model, fam, None, fam.tiny[size]), folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder and its plan file."""
    folder = saved(tmp_path_factory.mktemp("model"))
    return folder, compile_model(folder)


@pytest.fixture
def fresh(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy that a test may spoil."""
    folder = shutil.copytree(made[0], tmp_path / "model")
    return folder, folder / made[1].name


def tokens(folder: Path, **sampling: object) -> list[int]:
    return transept.door.load(folder).generate(PROMPT, max_tokens=20, **sampling).ids  # type: ignore[attr-defined]


def quiet(folder: Path, **options: object) -> object:
    """`load` where nothing is to be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanWarning)
        return load(folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8, "seed": 3, "top_k": 20, "min_p": 0.02}, {"temperature": 1.3, "seed": 2**40 + 1, "repetition_penalty": 1.3}],
)
def test_a_plan_file_says_what_its_model_says(made: tuple[Path, Path], sampling: dict[str, Any]) -> None:
    m = quiet(made[0])
    assert isinstance(m, Compiled)
    assert m.generate(PROMPT, max_tokens=20, **sampling).ids == tokens(made[0], **sampling)


@pytest.mark.parametrize(("name", "size"), [("gpt", "gpt2"), ("opt", "post")])
def test_other_families_too(tmp_path: Path, name: str, size: str) -> None:
    fam = family(name)
    folder = saved(tmp_path, name, size if size in fam.tiny else next(iter(fam.tiny)))
    before = tokens(folder)
    compile_model(folder)
    m = quiet(folder)
    assert isinstance(m, Compiled) and m.generate(PROMPT, max_tokens=20).ids == before


WITHOUT = """
import sys, transept
m = transept.load(sys.argv[1])
ids = m.generate([1, 2, 3, 4, 5], max_tokens=20).ids
sampled = m.generate([1, 2, 3, 4, 5], max_tokens=20, temperature=0.9, top_p=0.9, seed=5).ids
print('torch' in sys.modules, ids, sampled, sep='|')
"""


def test_no_torch_on_the_way(made: tuple[Path, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(made[0])], env={**os.environ, "PYTHONPATH": SRC}, capture_output=True, text=True, timeout=120
    )
    torch_there, greedy, sampled = done.stdout.strip().split("|")
    assert torch_there == "False", done.stderr
    assert json.loads(greedy) == tokens(made[0])
    assert json.loads(sampled) == tokens(made[0], temperature=0.9, top_p=0.9, seed=5)


def test_the_module_is_opened_for_who_asks(made: tuple[Path, Path]) -> None:
    m = quiet(made[0])
    assert isinstance(m, Compiled)
    plain = m.generate(PROMPT, max_tokens=20).ids
    assert m.card.parameters == sum(p.numel() for p in m.model.parameters())
    with torch.no_grad():
        m.model.head.weight.neg_()
    assert m.generate(PROMPT, max_tokens=20).ids != plain
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = m.no_such_name


def test_what_runs_from_its_plan_can_be_saved(made: tuple[Path, Path], tmp_path: Path) -> None:
    m = quiet(made[0])
    assert isinstance(m, Compiled)
    again = transept.door.load(transept.save(m, tmp_path / "again"))
    theirs = transept.door.load(made[0]).model.state_dict()
    assert theirs.keys() == again.model.state_dict().keys()
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in theirs.items())


def test_a_listener_hears_the_module(made: tuple[Path, Path]) -> None:
    heard: list[str] = []

    class Ear:
        def wants(self, owner: object, name: str) -> bool:
            return False

        def hear(self, owner: object, name: str, value: object) -> object:
            heard.append(name)
            return value

    m = quiet(made[0])
    assert isinstance(m, Compiled)
    with listening(Ear()):
        m.generate(PROMPT, max_tokens=2)
    assert heard


def test_a_plan_is_kept_only_where_the_user_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    assert isinstance(load(folder), Model) and not places(folder, False)[0].exists()
    assert isinstance(load(folder, keep_plan=True), Model) and places(folder, False)[0].exists()
    assert isinstance(quiet(folder), Compiled)
    assert isinstance(quiet(folder, fast=True), Model), "the plan of the exact mode is not that of int8 activations"
    monkeypatch.setenv("TRANSEPT_KEEP_PLAN", "1")
    load(folder, fast=True)
    assert isinstance(quiet(folder, fast=True), Compiled)
    assert isinstance(load(folder, keep_plan=False), Model)


def test_where_the_folder_cannot_be_written_the_cache_holds_it(
    made: tuple[Path, Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    path = compile_model(made[0])
    assert own_cache in path.parents and path.exists()


def rejected(folder: Path, plan: Path, words: str) -> None:
    """The damaged file is refused with these words, told, made again, and then good."""
    with pytest.raises(PlanRefused, match=words):
        open_plan(plan, sources(folder), fast=False)
    with pytest.warns(PlanWarning, match=f"{words}.*made again"):
        m = load(folder)
    assert isinstance(m, Model)
    again = quiet(folder)
    assert isinstance(again, Compiled) and again.generate(PROMPT, max_tokens=8).ids == m.generate(PROMPT, max_tokens=8).ids


def sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix != ".plan")


def rewritten(plan: Path, **changes: object) -> None:
    """The file with another header, its sha256 right."""
    data = plan.read_bytes()
    magic, version, length, zeros, _ = struct.unpack("<16sII8s32s", data[:64])
    old_start = -(-(64 + length) // 4096) * 4096
    text = json.dumps(json.loads(data[64 : 64 + length]) | changes).encode()
    head = struct.pack("<16sII8s32s", magic, version, len(text), zeros, hashlib.sha256(text).digest()) + text
    plan.write_bytes(head + bytes(-len(head) % 4096) + data[old_start:])


def test_another_version(fresh: tuple[Path, Path]) -> None:
    data = bytearray(fresh[1].read_bytes())
    data[16:20] = struct.pack("<I", 7)
    fresh[1].write_bytes(data)
    rejected(*fresh, "is of version 7, expected 1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": "sparc plain big-endian"}, "for the machine sparc"),
        ({"code": "0.0.9-feed"}, "by the code 0.0.9-feed"),
        ({"fast": True}, "with int8 activations True"),
        ({"max_rows": 0}, "damaged"),
        ({"max_rows": -5}, "damaged"),
        ({"widths": [1 << 40]}, "damaged"),
        ({"widths": []}, "damaged"),
        ({"labels": []}, "damaged"),
        ({"out": [99, 0, 8]}, "damaged"),
        ({"out": [0, 1 << 30, 8]}, "damaged"),
        ({"weights": []}, "damaged"),
        ({"caches": []}, "damaged"),
        ({"pieces": []}, "damaged"),
        ({"size": 1 << 60}, "bytes long"),
        ({"surplus": 1}, "surplus"),
        ({"records": {"at": -64, "nbytes": 64}}, "damaged"),
        ({"extra": {"at": 0, "nbytes": 1 << 50}}, "damaged"),
    ],
    ids=str,
)
def test_headers_that_lie(fresh: tuple[Path, Path], change: dict[str, object], words: str) -> None:
    rewritten(fresh[1], **change)
    with pytest.warns(PlanWarning, match=f"{words}.*made again"):
        load(fresh[0])
    assert isinstance(quiet(fresh[0]), Compiled)


def test_a_flipped_byte_anywhere(fresh: tuple[Path, Path]) -> None:
    folder, plan = fresh
    data, rng = plan.read_bytes(), random.Random(0)
    header = 64 + struct.unpack_from("<I", data, 20)[0]
    spots = [rng.randrange(len(data)) for _ in range(count(2000) - 20)] + [rng.randrange(header) for _ in range(20)]
    for at in spots:
        spoilt = bytearray(data)
        spoilt[at] ^= 1 << rng.randrange(8)
        plan.write_bytes(spoilt)
        with pytest.raises(PlanRefused, match="plan file"):
            open_plan(plan, sources(folder), fast=False)
    rejected(folder, plan, "plan file")


def test_a_truncated_file(fresh: tuple[Path, Path]) -> None:
    folder, plan = fresh
    data = plan.read_bytes()
    for size in (0, 1, 63, 64, 100, 4096, len(data) // 2, len(data) - 1):
        plan.write_bytes(data[:size])
        with pytest.raises(PlanRefused):
            open_plan(plan, sources(folder), fast=False)
    plan.write_bytes(data + b"\0")
    rejected(folder, plan, "bytes long, expected")


def test_a_changed_source(fresh: tuple[Path, Path]) -> None:
    folder, plan = fresh
    weights = folder / "model.safetensors"
    times, data = weights.stat(), bytearray(weights.read_bytes())
    data[-2] ^= 0x40  # one number, and neither length nor time tell of it
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    rejected(folder, plan, "model.safetensors: the file has changed")


def test_a_source_that_came_later(fresh: tuple[Path, Path]) -> None:
    (fresh[0] / "generation_config.json").write_text("{}")
    rejected(*fresh, "was made from config.json.*found config.json, generation_config.json")


def test_what_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="/nowhere/model"):
        compile_model("/nowhere/model")
    encoder = saved(tmp_path / "bert", "bert", next(iter(family("bert").tiny)))
    with pytest.raises(ConfigError, match="runs in torch"):
        compile_model(encoder)
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(SourceError, match="native core"):
        compile_model(tmp_path)
