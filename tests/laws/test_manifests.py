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
# Parameters as the publishers and the lectures' table state them, and of DeepSeek-V3 those without the layer that predicts a token further.
PARAMETERS = {
    "openai-gpt": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "gpt-neo-125m": 125_198_592,
    "opt-125m": 125_239_296,
    "llama-7b": 6_738_415_616,
    "Llama-2-70b-hf": 68_976_648_192,
    "DeepSeek-V3": 671_026_404_352,
    "bert-base-uncased": 110_106_428,
    "bert-large-uncased": 336_226_108,
    "roberta-base": 124_697_433,
    "electra-small-discriminator": 13_549_057,
    "deberta-base": 138_601_728,
    "t5-small": 60_506_624,
    "flan-t5-small": 76_961_152,
    "bart-base": 139_420_416,
}
# The same without what stands above the body: the lectures' table counts these two so.
BODIES = {"distilbert-base-uncased": 66_362_880, "albert-base-v2": 11_683_584 - 768 * 769}
# What a file may hold that no model of ours needs, by the end of the key, or by its beginning: DeepSeek-V3's extra layer, DeBERTa's own
# pre-training.
UNREAD = (".attn.bias", ".attn.attention.bias", ".attn.attention.masked_bias", ".rotary_emb.inv_freq", "embeddings.position_ids",
          "EncDecAttention.relative_attention_bias.weight", "embed_positions.weight")  # fmt: skip
BESIDE = {"DeepSeek-V3": "model.layers.61.", "deberta-base": ("lm_predictions.", "mask_predictions."),
          "deberta-v3-base": ("lm_predictions.", "mask_predictions.")}  # fmt: skip


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
    assert len(NAMES) >= 36
    for name in NAMES:
        m = manifest(name)
        assert m["how"].startswith(("READ", "RECONSTRUCTED")) and len(m["tensors"]) > 25


@pytest.mark.parametrize("name", NAMES)
def test_the_map_is_total_and_fits_the_shapes(name: str) -> None:
    """From config.json to a Spec to a module on the meta device; every key read or dropped by name; every parameter filled at its
    shape and dtype; and what is written is the list again."""
    m = manifest(name)
    _, form, spec, module = opened(m)
    file = tensors(m)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    native = dict(form.names.load(Memory(once(file, form, spec)), spec, shapes))
    assert {key: tuple(value.shape) for key, value in native.items()} == shapes
    file = {respelled(key, form): value for key, value in file.items()}
    root = form.names.root(set(file), spec)
    here, there = form.names.bonds(spec, root), form.names.bonds(spec)
    named = {new: old for a, b in zip(here, there, strict=True) for old, new in zip(a.foreign, b.foreign, strict=True)}
    written = form.names.save(native, spec)
    assert set(named) <= set(written)
    for new, old in named.items():
        assert written[new].shape == file[old].shape and written[new].dtype == file[old].dtype, new
    left = set(file) - set(named.values()) - set(form.names.tied(spec, root))
    assert all(key.endswith(UNREAD) or key.startswith(BESIDE.get(name, "-")) for key in left), sorted(left)[:3]
    count = sum(p.numel() for p in module.parameters())
    assert count == m.get("parameters", count) == PARAMETERS.get(name, count)
    body = sum(p.numel() for key, p in module.named_parameters() if not key.startswith("head."))
    assert body == BODIES.get(name, body)


def respelled(key: str, form: Published) -> str:
    """The key as later files of the form spell it."""
    for old, new in form.names.older:
        key = key.removesuffix(old) + new if key.endswith(old) else key
    return key


def once(file: dict[str, Tensor], form: Published, spec: Any) -> dict[str, Tensor]:
    """The tensors without those that repeat another: a map compares the copies' numbers, and there are none on the meta device."""
    root = form.names.root(set(file), spec)
    owner = {native: bond.foreign[0] for bond in form.names.bonds(spec, root) for native in bond.native}
    twice = {key: owner[native] for key, native in form.names.tied(spec, root).items() if key in file and owner[native] in file}
    assert all(file[key].shape == file[first].shape for key, first in twice.items())
    return {key: value for key, value in file.items() if key not in twice}


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
