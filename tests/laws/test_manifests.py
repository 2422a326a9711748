"""The lists of what published checkpoints hold, against the maps: total and shape-correct both ways, without a weight."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.forms import Memory
from transept.core.errors import MappingError
from transept.core.registry import Family, Published, by_architecture

FOLDER = Path(__file__).parents[1] / "manifests"
NAMES = sorted(path.name.removesuffix(".json.xz") for path in FOLDER.glob("*.json.xz"))
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# Parameters as the publishers state them, and of DeepSeek-V3 those without the layer that predicts a token further.
PARAMETERS = {
    "openai-gpt": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "gpt-neo-125m": 125_198_592,
    "opt-125m": 125_239_296,
    "llama-7b": 6_738_415_616,
    "Llama-2-70b-hf": 68_976_648_192,
    "DeepSeek-V3": 671_026_404_352,
}
# What a file may hold that no model of ours needs, by the end of the key; the last is DeepSeek-V3's extra layer.
UNREAD = (".attn.bias", ".attn.attention.bias", ".attn.attention.masked_bias", ".rotary_emb.inv_freq")


def manifest(name: str) -> dict[str, Any]:
    return json.loads(lzma.decompress((FOLDER / f"{name}.json.xz").read_bytes()))


def tensors(m: dict[str, Any]) -> dict[str, Tensor]:
    """Each tensor of the list, on the meta device; quantised ones by the shape that they have when read."""
    return {key: torch.empty(shape, dtype=DTYPES.get(kind, torch.float32), device="meta") for key, shape, kind in m["tensors"]}


def opened(m: dict[str, Any]) -> tuple[Family, Published, Any, torch.nn.Module]:
    family, form = by_architecture(m["architecture"])
    config = dict(m["config"])
    if m["architecture"].startswith("gguf:"):
        listed = {key: shape for key, shape, _ in m["tensors"]}
        arch = config.pop("general.architecture")
        config = {key.removeprefix(f"{arch}."): value for key, value in config.items()}
        config |= {"vocab_size": listed["token_embd.weight"][0], "tied": "output.weight" not in listed}
    spec = family.spec.checked(form.fields.read(config))
    with torch.device("meta"):
        module = (form.build or family.build)(spec)
    return family, form, spec, module


def test_there_are_enough_of_them() -> None:
    """At least twelve published checkpoints, each saying whether its list was read from a file or reconstructed."""
    assert len(NAMES) >= 12
    for name in NAMES:
        m = manifest(name)
        assert m["how"].startswith(("READ", "RECONSTRUCTED")) and len(m["tensors"]) > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_map_is_total_and_fits_the_shapes(name: str) -> None:
    """From config.json to a Spec to a module on the meta device; every key read or dropped by name; every parameter filled at its
    shape and dtype; and what is written is the list again."""
    m = manifest(name)
    _, form, spec, module = opened(m)
    file = tensors(m)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    native = dict(form.names.load(Memory(file), spec, shapes))
    assert {key: tuple(value.shape) for key, value in native.items()} == shapes
    root = form.names.root(set(file), spec)
    here, there = form.names.bonds(spec, root), form.names.bonds(spec)
    respelled = {new: old for a, b in zip(here, there, strict=True) for old, new in zip(a.foreign, b.foreign, strict=True)}
    written = form.names.save(native, spec)
    assert set(respelled) <= set(written)
    for new, old in respelled.items():
        assert written[new].shape == file[old].shape and written[new].dtype == file[old].dtype, new
    left = set(file) - set(respelled.values())
    assert all(key.endswith(UNREAD) or (name == "DeepSeek-V3" and key.startswith("model.layers.61.")) for key in left), sorted(left)[:3]
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS.get(name, sum(p.numel() for p in module.parameters()))


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "Llama-2-7b-hf", "Mistral-7B-v0.1", "SmolLM2-135M-Instruct.gguf"])
def test_a_list_with_a_fault_is_refused(name: str) -> None:
    """One key gone, one key more, one dimension off: each refused by the key's name."""
    m = manifest(name)
    _, form, spec, module = opened(m)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    file = tensors(m)
    key = next(k for k in sorted(file) if k.endswith(".weight") and file[k].dim() == 2)
    less = {k: v for k, v in file.items() if k != key}
    more = {**file, f"{key}.extra": file[key]}
    wrong = {**file, key: torch.empty(file[key].shape[0] + 1, file[key].shape[1], device="meta")}
    for bad in (less, more, wrong):
        with pytest.raises(MappingError) as caught:
            dict(form.names.load(Memory(bad), spec, shapes))
        assert key in str(caught.value)


def test_the_configuration_written_back_says_the_same() -> None:
    """Every published configuration, read into a Spec, written and read again, gives that Spec."""
    for name in NAMES:
        family, form, spec, _ = opened(manifest(name))
        assert family.spec.checked(form.fields.read(form.fields.write(spec))) == spec, name
