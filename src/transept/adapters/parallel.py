"""A finished model spread over processes: its weights cut up (FSDP2), or its heads and networks (tensor parallelism)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from transept.blocks.attention import Attention
from transept.blocks.feedforward import MLP, GatedMLP
from transept.core.errors import ConfigError


def mesh(tensor: int = 1) -> DeviceMesh:
    """All processes as a grid of data x tensor, the second axis `tensor` wide. Errors: ConfigError where that does not divide them."""
    world = torch.distributed.get_world_size()
    if world % tensor:
        raise ConfigError(f"{world} processes cannot stand in rows of {tensor}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, (world // tensor, tensor), mesh_dim_names=("data", "tensor"))


def shard(model: nn.Module, data: DeviceMesh) -> nn.Module:
    """Each process keeps its part of every weight, gradient and optimiser state; a layer's weights are gathered while it computes.

    The layers (the elements of lists of modules) are gathered one by one, the rest together. The model is changed in place.
    Source: Zhao et al. 2023, arXiv 2304.11277; torch.distributed.fsdp.fully_shard.
    """
    for stack in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for layer in stack:
            fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)
    return model


def split(model: nn.Module, tensor: DeviceMesh) -> nn.Module:
    """Attention by heads and feed-forward networks by hidden units: two sums over the processes in each layer, all else repeated.

    The model is changed in place. Errors: ConfigError where the heads are no multiple of the processes, or nothing can be split.
    Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3.
    """
    many, found = tensor.size(), 0
    for name, module in model.named_modules():
        plan = _plan(module, many, name)
        if plan:
            parallelize_module(module, tensor, plan)
            found += 1
    if not found:
        raise ConfigError(f"{type(model).__name__} has neither attention nor networks that this library knows to split")
    return model


def _plan(module: nn.Module, many: int, name: str) -> dict[str, Any]:
    if isinstance(module, Attention):
        if module.heads % many or module.kv_heads % many:
            raise ConfigError(f"{name} has {module.heads} heads and {module.kv_heads} key/value heads, which {many} processes cannot share")
        module.heads, module.kv_heads = module.heads // many, module.kv_heads // many
        return {**{n: ColwiseParallel() for n in ("q", "k", "v")}, "out": RowwiseParallel()}
    if isinstance(module, MLP | GatedMLP):
        gate = {"gate": ColwiseParallel()} if isinstance(module, GatedMLP) else {}
        return {**gate, "up": ColwiseParallel(), "down": RowwiseParallel()}
    return {}
