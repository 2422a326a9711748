"""From a running loop to its state and back, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from transept.checkpoints.safetensors import tensor_bytes
from transept.core.batch import Draw
from transept.core.errors import CheckpointError, ConfigError
from transept.core.shapes import Tensor
from transept.training import generators, state
from transept.training.ranks import sharded, whole
from transept.training.run import dotted

if TYPE_CHECKING:
    from transept.training.loop import Loop

FREE = ("settings.steps", "settings.minutes", "settings.track", "settings.saving.", "settings.loading.workers")
"""What may change between a run and its continuation without being forced: its end, and what leaves the numbers alone."""


def snapshot(loop: Loop) -> state.State:
    """Everything a run goes on from: weights, optimisers, means, generators, cursor, clock, and what defines it. Every process must ask."""
    tensors, rest = state.flatten(o.state_dict() for o in loop.updater.optimisers)
    random, numbers = generators.state()
    facts = {"step": loop.step, "cursor": list(loop.cursor), "elapsed": loop.elapsed, "items": loop.items, "micro": loop.micro,
             "skipped": loop.skipped, "optim": rest, "judge": loop.judge.facts(), "means": [m.count for m in loop.means],
             "random": numbers, "frozen": frozen(loop), "record": loop.run.record()}  # fmt: skip
    groups = {"model": kept(loop), "optim": tensors, "random": random}
    for mean in loop.means:
        groups["mean"] = mean.weights
    return state.State(facts, {g: {name: whole(t.detach()) for name, t in ts.items()} for g, ts in groups.items()})


def restore(loop: Loop, folder: Path, force: bool = False) -> list[str]:
    """Takes the newest sound state of a run's folder into a fresh loop; returns a sentence for each damaged one that was passed over.

    Errors: CheckpointError where there is none, ConfigError where the recipe has changed and `force` is not given.
    """
    found, refused = state.latest(folder / "checkpoints")
    if found is None:
        raise CheckpointError(f"{folder} holds no whole checkpoint to go on from{': ' + '; '.join(refused) if refused else ''}")
    differences = changed(found.facts["record"], json.loads(json.dumps(loop.run.record())))
    if differences and not force:
        raise ConfigError(f"the recipe has changed since {folder} was saved: {'; '.join(differences)}; --force goes on all the same")
    if found.facts["frozen"] != frozen(loop):
        raise ConfigError(f"the weights that are not trained differ from those that {folder} was trained on")
    _fill(kept(loop), found.tensors["model"], folder)
    _refill(loop.updater.optimisers, state.unflatten(found.tensors["optim"], found.facts["optim"]))
    for mean, many in zip(loop.means, found.facts["means"], strict=False):
        mean.count = many
        held = found.tensors.get("mean", {})
        mean.weights = {name: _like(p, held[name].clone()) for name, p in loop.named.items() if name in held}
    loop.random = found.tensors["random"], found.facts["random"]
    loop.judge.restore(found.facts["judge"])
    for name in ("step", "elapsed", "items", "micro", "skipped"):
        setattr(loop, name, found.facts[name])
    if any(d.startswith("settings.loading.micro") for d in differences):
        loop.micro = loop.settings.loading.micro or loop.settings.loading.batch
    loop.cursor = Draw(*found.facts["cursor"])
    loop.saved = loop.step
    return refused


def kept(loop: Loop) -> dict[str, Tensor]:
    """The tensors that a run changes: what is trained and every buffer, of the model and of the objective; not what is frozen."""
    idle = {name for name, p in loop.run.model.named_parameters() if not p.requires_grad}
    found = {name: t for name, t in loop.run.model.state_dict().items() if name not in idle}
    if isinstance(loop.run.objective, nn.Module):
        found |= {f"objective.{name}": t for name, t in loop.run.objective.state_dict().items()}
    return found


def frozen(loop: Loop) -> str:
    """The sha256 over the model's parameters that are not trained, "" where all are: a continuation must stand on the same ones."""
    idle = [(name, p) for name, p in sorted(loop.run.model.named_parameters()) if not p.requires_grad]
    if not idle:
        return ""
    if loop.frozen_hash is None:
        digest = hashlib.sha256()
        for name, p in idle:
            digest.update(name.encode() + b"\0")
            digest.update(tensor_bytes(whole(p)))
        loop.frozen_hash = digest.hexdigest()
    return loop.frozen_hash


def changed(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What defines the run and differs, as "name: was X, is Y"."""
    was, now = dotted(stored), dotted(present)
    return [f"{name}: was {was.get(name)!r}, is {now.get(name)!r}" for name in (*was, *(n for n in now if n not in was))
            if was.get(name) != now.get(name) and not name.startswith(FREE)]  # fmt: skip


def _fill(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    missing, unknown = sorted(set(into) - set(tensors)), sorted(set(tensors) - set(into))
    if missing or unknown:
        raise CheckpointError(f"{folder} was saved from another model: it lacks {missing[:3]} and has {unknown[:3]} beside")
    with torch.no_grad():
        for name, t in into.items():
            if t.shape != tensors[name].shape:
                raise CheckpointError(f"{folder} holds {name} of shape {list(tensors[name].shape)}, the model's is {list(t.shape)}")
            t.copy_(_like(t, tensors[name].to(t.dtype)))


def _refill(optimisers: list[torch.optim.Optimizer], states: list[dict[str, Any]]) -> None:
    """The optimisers' own state, under the settings of the present run."""
    for optimiser, stored in zip(optimisers, states, strict=True):
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimiser.param_groups]
        params = [p for group in optimiser.param_groups for p in group["params"]]
        for place, values in stored["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == params[place].shape:
                    values[name] = _like(params[place], value)
        optimiser.load_state_dict(stored)
        for group, own in zip(optimiser.param_groups, settings, strict=True):
            group.update(own)


def _like(place: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor cut up as `place` is."""
    if not sharded(place):
        return tensor.to(place.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(place, DTensor):
        raise CheckpointError(f"a tensor of type {type(place).__name__} cannot be filled")
    return distribute_tensor(tensor.to(place.device), place.device_mesh, place.placements)
