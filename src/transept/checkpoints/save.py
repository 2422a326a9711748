"""The way out: a folder that transformers, and so every server built on it, loads as it is; `load` alone for what nobody published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transept.checkpoints.atomic import atomic
from transept.checkpoints.load import dumps
from transept.checkpoints.quantized import Stored, write_quantized
from transept.checkpoints.shards import write_sharded
from transept.core.errors import ConfigError
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.mapping.own import own


def form_for(family: Family, spec: Spec, loaded: Published | None = None) -> Published:
    """The form in which a model is written: the one it was loaded from if that is a folder's, else the first published one that can say
    its Spec; a family that nobody published has the library's own."""
    if loaded is not None and not loaded.architecture.startswith("gguf:"):
        return loaded
    if not family.published:
        return own(family)
    for form in family.published:
        if not form.architecture.startswith("gguf:") and form.build is None and _says(form, family, spec):
            return form
    raise ConfigError(f"no published form of the family {family.name} can say this Spec")


def save(model: nn.Module, family: Family, form: Published, spec: Spec, folder: str | Path, extra: Mapping[str, Any] | None = None,
         coded: Mapping[str, Stored] | None = None) -> Path:  # fmt: skip
    """Writes config.json and the weights (sharded above 5 GB) in a published form; `extra` adds inert fields such as bos_token_id.

    With `coded`, the stored forms of some parameters, the weights lie in the form of `checkpoints.quantized`, which only `load` reads.

    Each file appears whole or not at all, the configuration last. Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    native = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    said: dict[str, Any] = {}
    if coded is None:
        weights = form.names.save(native, spec)
        write_sharded(folder, weights, metadata={"format": "pt"})
    else:
        weights, said = native, write_quantized(folder, native, coded)
    kind = max(weights.values(), key=torch.Tensor.numel).dtype
    config = {
        **(extra or {}),
        **form.fields.write(spec),
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "dtype": str(kind).removeprefix("torch."),
        **said,
    }
    with atomic(folder / "config.json") as out:
        out.write(dumps(config).encode())
    return folder


def _says(form: Published, family: Family, spec: Spec) -> bool:
    try:
        return family.spec.checked(form.fields.read(form.fields.write(spec))) == spec
    except ConfigError:
        return False
