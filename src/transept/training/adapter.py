"""Adapter folders: adapter_model.safetensors and adapter_config.json, as PEFT writes and reads them."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from transept.adapters import peft
from transept.checkpoints.atomic import atomic
from transept.checkpoints.load import read_json
from transept.checkpoints.safetensors import open_safetensors, write_safetensors
from transept.core.registry import Published
from transept.core.spec import Spec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(model: nn.Module, form: Published, spec: Spec, folder: str | Path, base: str = "") -> Path:
    """Writes what was learnt beside the base, and nothing of the base; `base` is the name or folder that readers should load under it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, record = peft.written(model, form, spec, base)
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    with atomic(folder / CONFIG) as out:
        out.write((json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    return folder


def load_adapter(model: nn.Module, form: Published, spec: Spec, folder: str | Path) -> nn.Module:
    """Puts a saved adapter, ours or PEFT's, beside the model's own weights, in place; returns the model in evaluation mode.

    Errors: SourceError, CheckpointError for damage or a tensor that fits nothing, ConfigError for a setting that is not known.
    """
    folder = Path(folder)
    record = read_json(folder / CONFIG)
    file = open_safetensors(folder / WEIGHTS)
    try:
        return peft.attach(model, form, spec, {key: file.read(key) for key in file.keys()}, record).eval()
    finally:
        file.close()
