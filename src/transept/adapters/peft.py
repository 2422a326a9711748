"""Adapters in PEFT's file format, both ways (row 84b): published names by the family's own map, A and B as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transept.adapters.lora import Adapted, Lora, LoraEmbedding, adapted, put, wrapped
from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.heads import TiedHead
from transept.core.errors import CheckpointError, ConfigError, nearest
from transept.core.registry import Published
from transept.core.shapes import Tensor
from transept.core.spec import Spec
from transept.mapping.ops import Cat, T

ROOT = "base_model.model."
WEIGHT = ".weight"

# What changes no arithmetic of a trained adapter. Everything else must be unset, or is refused.
_INERT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "megatron_core",
    "runtime_config", "qalora_group_size", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "init_lora_weights", "loftq_config", "ensure_weight_tying",
}  # fmt: skip
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"}
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Place:
    """One published weight matrix and the native modules that it is made of; `ops` move the rows of B."""

    foreign: str
    native: tuple[str, ...]
    ops: tuple[Any, ...] = ()


def places(model: nn.Module, form: Published, spec: Spec) -> Iterator[Place]:
    """Every matrix of the published form that an adapter could stand beside; tied heads under their published names."""
    for bond in form.names.bonds(spec):
        if len(bond.foreign) == 1 and bond.foreign[0].endswith(WEIGHT) and all(n.endswith(WEIGHT) for n in bond.native):
            moves = tuple(op for op in bond.ops if not isinstance(op, T))
            yield Place(_stem(bond.foreign[0]), tuple(map(_stem, bond.native)), moves)
    tables = {f"{name}{WEIGHT}": m for name, m in model.named_modules() if isinstance(m, TokenEmbedding)}
    for foreign, native in form.names.tied(spec).items():
        for name, module in model.named_modules():
            if isinstance(module, TiedHead) and module.source[0] is tables.get(native) and not re.search("embed|shared", foreign):
                yield Place(_stem(foreign), (name,))


def written(model: nn.Module, form: Published, spec: Spec, base: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of adapter_model.safetensors and the record of adapter_config.json; `base` names the model that was adapted.

    Matrices that are published joined (GPT-2's q, k and v) are written joined: as one A where all share it, else with a higher rank.
    Heads that were trained beside the adapter are written whole. Raises ConfigError where nothing is adapted or the map cannot say it.
    """
    parts, tensors = adapted(model), dict[str, Tensor]()
    ranks, alphas, whole = dict[str, int](), dict[str, float](), set[str]()
    if not parts:
        raise ConfigError("the model has no adapter to write")
    left = set(parts)
    for place in places(model, form, spec):
        some = [parts.get(name) for name in place.native]
        if any(some):
            a, b, scale = _joined(model, place, some, spec)
            infix = "lora_embedding_{}" if isinstance(some[0], LoraEmbedding) else "lora_{}.weight"
            tensors |= {f"{ROOT}{place.foreign}.{infix.format(n)}": t.detach().contiguous() for n, t in (("A", a), ("B", b))}
            ranks[place.foreign], alphas[place.foreign] = len(a), scale * len(a)
            left -= set(place.native)
    if left:
        raise ConfigError(f"the published form {form.architecture} has no matrix for the adapted {sorted(left)[0]!r}")
    for foreign, tensor in _trained(model, form, spec, parts):
        tensors[f"{ROOT}{foreign}"] = tensor.detach().contiguous()
        whole.add(_stem(foreign))
    rank, alpha = max(ranks.values()), max(alphas.values())
    record = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks), "lora_dropout": _dropout(parts),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank}, "bias": "none", "use_rslora": False,
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha}, "modules_to_save": sorted(whole) or None,
        "base_model_name_or_path": base, "inference_mode": True, "task_type": None,
        "fan_in_fan_out": any(isinstance(op, T) for bond in form.names.bonds(spec) for op in bond.ops if _stem(bond.foreign[0]) in ranks),
    }  # fmt: skip
    return tensors, record


def attach(model: nn.Module, form: Published, spec: Spec, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> nn.Module:
    """Puts a published adapter beside the model's matrices, in place; returns the model.

    Raises ConfigError for a setting whose arithmetic is not known here, CheckpointError for a tensor that fits no module or not its shape.
    """
    _check(record)
    left = dict(tensors)
    for place in places(model, form, spec):
        found = {n: left.pop(f"{ROOT}{place.foreign}.{key}", None) for n, key in _keys(model, place).items()}
        if found["A"] is None and found["B"] is None:
            continue
        if found["A"] is None or found["B"] is None:
            raise CheckpointError(f"the adapter has one of A and B for {place.foreign}, but not both")
        _attach_one(model, place, found["A"], found["B"], spec, record)
    known = {foreign: bond for bond in form.names.bonds(spec) for foreign in bond.foreign}
    for key, tensor in left.items():
        # Beside an adapted token table PEFT may write the table itself.
        foreign = key.removeprefix(ROOT).replace(".base_layer.", ".")
        bond = known.get(foreign)
        if bond is None or len(bond.foreign) != 1:
            raise CheckpointError(f"the adapter's tensor {key!r} stands beside no matrix of this model{nearest(foreign, known)}")
        _set_whole(model, bond.native, bond.load([tensor], spec), key)
    return model


def _joined(model: nn.Module, place: Place, some: Sequence[Adapted | None], spec: Spec) -> tuple[Tensor, Tensor, float]:
    """A, B and the factor of a published matrix from those of its parts; a part without an adapter adds nothing."""
    real = [m for m in some if m is not None]
    if any(not isinstance(op, Cat) for op in place.ops) and len(some) > 1:
        raise ConfigError(f"{place.foreign} is joined from its parts in a way that an adapter cannot follow")
    scale = real[0].scale_ab
    if len(some) == 1:
        return real[0].lora_a, _through(place, [real[0].lora_b], spec, save=True)[0], scale
    if all(m is not None and torch.equal(m.lora_a, real[0].lora_a) and m.scale_ab == scale for m in some):
        return real[0].lora_a, _through(place, [m.lora_b for m in real], spec, save=True)[0], scale
    total, at, blocks = sum(len(m.lora_a) for m in real), 0, []
    for m, name in zip(some, place.native, strict=True):
        block = real[0].lora_b.new_zeros(model.get_parameter(f"{name}{WEIGHT}").shape[0], total)
        if m is not None:
            block[:, at : at + len(m.lora_a)] = m.lora_b.detach() * (m.scale_ab / scale)
            at += len(m.lora_a)
        blocks.append(block)
    return torch.cat([m.lora_a for m in real]), _through(place, blocks, spec, save=True)[0], scale


def _attach_one(model: nn.Module, place: Place, a: Tensor, b: Tensor, spec: Spec, record: Mapping[str, Any]) -> None:
    rank = _pattern(record.get("rank_pattern") or {}, place.foreign, record.get("r", 8))
    alpha = float(_pattern(record.get("alpha_pattern") or {}, place.foreign, record.get("lora_alpha", 8)))
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or len(a) != rank:
        raise CheckpointError(f"A {list(a.shape)} and B {list(b.shape)} of {place.foreign} should have the rank {rank} in common")
    lora = Lora(rank=len(a), alpha=alpha, dropout=float(record.get("lora_dropout", 0.0)), stabilised=bool(record.get("use_rslora")))
    for name, rows in zip(place.native, _through(place, [b], spec, save=False), strict=True):
        made = wrapped(model, name, model.get_submodule(name), lora)
        assert_shape(place.foreign, "A", made.lora_a, a)
        assert_shape(place.foreign, "B", made.lora_b, rows)
        with torch.no_grad():
            made.lora_a.copy_(a)
            made.lora_b.copy_(rows)
        put(model, name, made)


def assert_shape(foreign: str, which: str, expected: Tensor, found: Tensor) -> None:
    """CheckpointError where the two differ in shape."""
    if expected.shape != found.shape:
        raise CheckpointError(f"{which} of {foreign} has the shape {list(found.shape)}, expected {list(expected.shape)}")


def _set_whole(model: nn.Module, names: Sequence[str], parts: Sequence[Tensor], key: str) -> None:
    for name, part in zip(names, parts, strict=True):
        mine = model.get_parameter(name)
        assert_shape(key, "the tensor", mine, part)
        with torch.no_grad():
            mine.copy_(part)


def _through(place: Place, parts: list[Tensor], spec: Spec, *, save: bool) -> list[Tensor]:
    for op in reversed(place.ops) if save else place.ops:
        parts = op.save(parts, spec) if save else op.load(parts, spec)
    return parts


def _keys(model: nn.Module, place: Place) -> dict[str, str]:
    table = isinstance(model.get_submodule(place.native[0]), TokenEmbedding)
    return {n: f"lora_embedding_{n}" if table else f"lora_{n}{WEIGHT}" for n in "AB"}


def _trained(model: nn.Module, form: Published, spec: Spec, parts: Mapping[str, Adapted]) -> Iterator[tuple[str, Tensor]]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and name.rpartition(".")[2] not in ("lora_a", "lora_b")}
    for bond in form.names.bonds(spec):
        if all(name in named for name in bond.native):
            yield from zip(bond.foreign, bond.save([named.pop(name) for name in bond.native], spec), strict=True)
    if named:
        raise ConfigError(f"{sorted(named)[0]!r} is trained beside the adapter, but is a part only of a published matrix")


def _dropout(parts: Mapping[str, Adapted]) -> float:
    return max(float(m.dropout_a.p) for m in parts.values())


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _pattern(table: Mapping[str, Any], foreign: str, default: Any) -> Any:
    for name, value in table.items():
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise ConfigError(f"the pattern {name!r} is a regular expression; only names of modules, or their ends, are read")
        name = name.removeprefix("^")
        if foreign == name or foreign.endswith(f".{name}"):
            return value
    return default


def _check(record: Mapping[str, Any]) -> None:
    if record.get("peft_type") != "LORA":
        raise ConfigError(f"adapter_config.json has peft_type {record.get('peft_type')!r}; 'LORA' was expected")
    if record.get("bias", "none") != "none":
        raise ConfigError(f"adapter_config.json has bias {record['bias']!r}; 'none' was expected")
    if record.get("init_lora_weights", True) not in _STARTS:
        raise ConfigError(f"adapter_config.json has init_lora_weights {record['init_lora_weights']!r}, which changes the base")
    for name, value in record.items():
        # A default such as "megatron.core" or {} changes nothing either.
        if name not in _INERT and name not in _READ and value not in (None, False, {}, [], ""):
            raise ConfigError(f"adapter_config.json sets {name!r} to {value!r}, which is not known here{nearest(name, _READ)}")
