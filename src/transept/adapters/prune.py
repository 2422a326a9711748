"""Are all heads needed? Masking heads of any model, scoring them, and taking them out (Michel et al. 2019, arXiv 1905.10650; row 16)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from transept.core.errors import InputError, nearest
from transept.core.shapes import Float, Tensor
from transept.core.tap import Listener, listening

Heads = Mapping[str, Sequence[int]]
"""The name of an attention module in its model -> numbers of heads."""

# The projections whose rows are divided among the query heads, and among the key/value heads; what a module lacks is passed over.
_QUERY_ROWS = ("q", "q_up", "q_rope", "k_up", "v_up", "q_position", "k_position")
_KEY_ROWS = ("k", "v")


def attentions(model: nn.Module) -> dict[str, Any]:
    """Every attention module by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(getattr(m, "out", None), nn.Linear) and _count(m) > 0}


def importance(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Float[Tensor, "h"]]:
    """Of each head the mean of |dL/dg|, g being a gate on its output that is 1 (eq. 2); each of `losses` computes one loss of the model.

    The model's own gradients are left as they are.
    """
    layers = attentions(model)
    open_ = {
        name: torch.ones(_count(m), requires_grad=True, dtype=m.out.weight.dtype, device=m.out.weight.device) for name, m in layers.items()
    }
    total = {name: torch.zeros_like(gate) for name, gate in open_.items()}
    listener, count = _Gates(model, open_), 0
    for loss in losses:
        with listening(listener):
            value = loss()
        for name, grad in zip(open_, torch.autograd.grad(value, list(open_.values()), allow_unused=True), strict=True):
            total[name] += 0 if grad is None else grad.abs()
        count += 1
    if not count:
        raise InputError("the importance of heads needs at least one loss")
    return {name: score.detach() / count for name, score in total.items()}


def weakest(scores: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """The `count` heads of least importance, scores brought to length one in each layer (section 4.3); every layer keeps its best."""
    shares = {name: score / score.norm().clamp(min=1e-12) for name, score in scores.items()}
    flat = sorted((float(s), name, i) for name, share in shares.items() for i, s in enumerate(share) if i != int(share.argmax()))
    if count > len(flat):
        raise InputError(f"{count} heads were to go, but only {len(flat)} can while every layer keeps one")
    chosen: dict[str, list[int]] = {}
    for _, name, i in flat[:count]:
        chosen.setdefault(name, []).append(i)
    return {name: sorted(chosen[name]) for name in scores if name in chosen}


@contextmanager
def masked(model: nn.Module, heads: Heads) -> Iterator[None]:
    """Within this context the named heads give zeros; the model itself is not changed."""
    with listening(gates(model, heads)):
        yield


def gates(model: nn.Module, heads: Heads) -> Listener:
    """What has to listen so that the named heads give zeros."""
    closed = {}
    for name, module in _checked(model, heads).items():
        closed[name] = torch.ones(_count(module), device=module.out.weight.device)
        closed[name][list(heads[name])] = 0.0
    return _Gates(model, closed)


def prune(model: nn.Module, heads: Heads) -> nn.Module:
    """A copy of the model without the named heads: smaller matrices, and what the masked model computes.

    Where the heads that stay no longer share keys and values evenly, each gets its own. Raises InputError where a layer would keep
    none, or where a table of positions gives each head its own numbers.
    """
    pruned = copy.deepcopy(model)
    for name, module in _checked(pruned, heads).items():
        gone = set(heads[name])
        kept = [i for i in range(_count(module)) if i not in gone]
        if not kept:
            raise InputError(f"all {_count(module)} heads of {name} were to go; a layer keeps at least one")
        if any(True for _ in getattr(module, "position", nn.Identity()).parameters()):
            raise InputError(f"the heads of {name} have their own numbers in a table of positions; they can be masked, not pruned")
        _take_out(module, kept)
    return pruned


class _Gates:
    """Hears each layer's heads and multiplies them by its gates."""

    def __init__(self, model: nn.Module, gates: Mapping[str, Tensor]):
        self.gates = {id(model.get_submodule(name)): gate for name, gate in gates.items()}

    def wants(self, owner: object, name: str) -> bool:
        return False

    def hear(self, owner: object, name: str, value: Any) -> Any:
        gate = self.gates.get(id(owner)) if name == "heads" else None
        return value if gate is None else value * gate.to(value.dtype)[:, None, None]


def _checked(model: nn.Module, heads: Heads) -> dict[str, Any]:
    known = attentions(model)
    for name, numbers in heads.items():
        if name not in known:
            raise InputError(f"the model has no attention {name!r}{nearest(name, known)}")
        bad = [i for i in numbers if not 0 <= i < _count(known[name])]
        if bad:
            raise InputError(f"{name} has the heads 0 to {_count(known[name]) - 1}, not {bad[0]}")
    return {name: known[name] for name in heads}


def _count(module: nn.Module) -> int:
    heads = getattr(module, "heads", None) or getattr(getattr(module, "spec", None), "heads", 0)
    return heads if isinstance(heads, int) else 0


def _take_out(module: Any, kept: list[int]) -> None:
    heads, key_heads = _count(module), getattr(module, "kv_heads", 0)
    keys = kept
    if key_heads and key_heads != heads:
        groups = [i // (heads // key_heads) for i in kept]
        staying = sorted(set(groups))
        keys = staying if len({groups.count(g) for g in staying}) == 1 else groups
    for name in _QUERY_ROWS:
        _keep_rows(module, name, heads, kept)
    for name in _KEY_ROWS:
        _keep_rows(module, name, key_heads, keys)
    weight = module.out.weight
    module.out.weight = nn.Parameter(weight.unflatten(1, (heads, -1))[:, kept].flatten(1).detach().clone(), weight.requires_grad)
    module.out.in_features = module.out.weight.shape[1]
    if hasattr(module, "heads"):
        module.heads, module.kv_heads = len(kept), len(keys)
    else:
        module.spec = module.spec.replace(heads=len(kept))


def _keep_rows(module: Any, name: str, heads: int, kept: list[int]) -> None:
    linear = getattr(module, name, None)
    if not isinstance(linear, nn.Linear):
        return
    for leaf in ("weight", "bias"):
        value = getattr(linear, leaf)
        if value is not None:
            setattr(linear, leaf, nn.Parameter(value.unflatten(0, (heads, -1))[kept].flatten(0, 1).detach().clone(), value.requires_grad))
    linear.out_features = linear.weight.shape[0]
