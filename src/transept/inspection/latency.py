"""Where the time of one forward pass goes: qkv, scores, softmax, reshape, feed-forward (Wang et al. 2021, arXiv 2012.09852, figure 2;
row 41).

Every operation of torch is timed as it runs, and belongs to the module that called it. The fused attention kernel is taken apart for that
into its equation's steps, so the parts sum to more than a plain pass takes; both are told.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transept.adapters.prune import attentions
from transept.blocks.alignment import After, Before, Blind
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.encoder import EncoderEmbedding
from transept.blocks.feedforward import MLP, GatedMLP, MoE
from transept.blocks.norms import LayerNorm, RMSNorm
from transept.blocks.positions import NoPosition
from transept.blocks.recurrent import Cell
from transept.core.errors import InputError
from transept.core.shapes import Int, Tensor
from transept.inspection.attention import called
from transept.inspection.watch import Watched, module_of

PARTS = ("embedding", "qkv", "positions", "scores", "softmax", "values", "attention", "reshape", "output", "ffn", "recurrence", "norm",
         "head", "other")  # fmt: skip
_MOVES = frozenset(
    "view _unsafe_view reshape transpose permute expand clone contiguous unsqueeze squeeze cat stack split split_with_sizes slice select t "
    "index gather scatter copy_ as_strided unbind constant_pad_nd repeat index_select alias detach repeat_interleave unflatten narrow "
    "_to_copy slice_scatter select_scatter index_put index_put_ new_empty flip roll".split()
)
_RECORDS = {"embed": "embedding", "angles": "positions", "rotary": "positions", "append": "reshape", "gather": "reshape",
            "unfold": "reshape", "attend": "attention", "norm": "norm", "route": "ffn", "experts": "ffn"}  # fmt: skip
_PRODUCTS = frozenset(("bmm", "mm", "matmul", "baddbmm", "addmm"))
_SOFT = frozenset(("_softmax", "_safe_softmax", "logsumexp", "exp", "amax", "nan_to_num"))


@dataclass(frozen=True)
class Breakdown:
    """`seconds` is a plain pass; `parts` the seconds of each part where every operation is timed on its own, all of PARTS that occur."""

    tokens: int
    seconds: float
    parts: Mapping[str, float]
    engine: str = "torch"

    @property
    def apart(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())

    def shares(self) -> dict[str, float]:
        """Each part's share of their sum."""
        return {part: took / self.apart for part, took in self.parts.items()}


def breakdown(m: Watched, ids: Int[Tensor, "b t"], *, source: Tensor | None = None, runs: int = 3) -> Breakdown:
    """The parts of one forward pass, averaged over `runs` passes behind one that warms up; the plain pass is the median of as many."""
    if runs < 1:
        raise InputError(f"runs: at least one is needed, found {runs}")
    module = module_of(m)
    with torch.no_grad():
        plain = [_timed(lambda: called(module, ids, source)) for _ in range(runs + 1)][1:]
        twin = _twin(module)
        with _Clock() as clock, _attributed(twin, clock):
            for run in range(runs + 1):
                if run == 1:
                    clock.parts.clear()
                called(twin, ids, source)
    parts = {part: clock.parts[part] / runs for part in PARTS if clock.parts[part]}
    return Breakdown(ids.numel(), sorted(plain)[runs // 2], parts)


def of_records(labels: Sequence[str], operations: Sequence[str], seconds: Sequence[float], tokens: int) -> Breakdown:
    """The parts of a step of the native core, whose records were timed: its attention is one operation, with scores, softmax and values."""
    parts: dict[str, float] = defaultdict(float)
    for label, operation, took in zip(labels, operations, seconds, strict=True):
        parts[_of_record(label, operation)] += took
    return Breakdown(tokens, sum(seconds), {part: parts[part] for part in PARTS if parts[part]}, "native")


def _of_record(label: str, operation: str) -> str:
    words = label.split(".")
    if operation in _RECORDS:
        return _RECORDS[operation]
    if "mlp" in words:
        return "ffn"
    if operation != "linear":
        return "other"
    return ("output" if words[-1] == "out" else "qkv") if {"attn", "cross"}.intersection(words) else "head"


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _twin(module: nn.Module) -> nn.Module:
    """The same network around the same weights: what is hung on its modules, no other user of them meets."""
    shared = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(value): value for value in shared})


@contextmanager
def _attributed(module: nn.Module, clock: _Clock) -> Iterator[None]:
    """Within this context the clock knows which part of the network is at work."""
    hooks = []
    for path, part in _labels(module).items():
        inner = module.get_submodule(path)
        hooks.append(inner.register_forward_pre_hook(lambda *_, part=part: clock.enter(part)))
        hooks.append(inner.register_forward_hook(lambda *_: clock.leave(), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _labels(module: nn.Module) -> dict[str, str]:
    """The part that each module's own operations belong to; the innermost counts."""
    found: dict[str, str] = {}
    for path, inner in module.named_modules():
        if isinstance(inner, Embedding | EncoderEmbedding | TokenEmbedding):
            found[path] = "embedding"
        elif isinstance(inner, MLP | GatedMLP | MoE):
            found[path] = "ffn"
        elif isinstance(inner, Cell):
            found[path] = "recurrence"
        elif path.rpartition(".")[2] == "head":
            found[path] = "head"
        elif isinstance(inner, LayerNorm | RMSNorm) and not _below(path, found, ("embedding", "ffn", "head")):
            found[path] = "norm"
    for path, inner in attentions(module).items():
        found[path] = "attention"
        for name, child in inner.named_children():
            part = "output" if name == "out" else "positions" if isinstance(child, NoPosition) else "qkv"
            found[f"{path}.{name}"] = part
    for path, inner in module.named_modules():
        if isinstance(inner, After | Before | Blind):
            found[path] = "attention"
    return found


def _below(path: str, found: Mapping[str, str], parts: Sequence[str]) -> bool:
    words = path.split(".")
    return any(found.get(".".join(words[:n])) in parts for n in range(1, len(words)))


class _Clock(TorchDispatchMode):
    """Times each operation and books it to the part at work."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.soft = False

    def enter(self, part: str) -> None:
        """A module of this part begins."""
        self.stack.append(part)
        if part == "attention":
            self.soft = False

    def leave(self) -> None:
        """It ends."""
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            return self._apart(*args, **(kwargs or {}))
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.parts[self._part(name)] += time.perf_counter() - begin
        return out

    def _part(self, name: str) -> str:
        part = self.stack[-1] if self.stack else "other"
        if part != "attention" or name.startswith("_scaled_dot_product"):
            return part
        if name in _MOVES:
            return "reshape"
        if name in _PRODUCTS:
            part, self.soft = ("values" if self.soft else "scores"), False
            return part
        self.soft = self.soft or name in _SOFT
        return "softmax" if self.soft else "scores"

    def _apart(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *, attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """softmax(q k^T * scale + mask) v, step by step (Vaswani et al. 2017, eq. 1)."""
        begin = time.perf_counter()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        moved = time.perf_counter()
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        if attn_mask is not None:
            scores = scores + attn_mask if attn_mask.is_floating_point() else scores.masked_fill(~attn_mask, float("-inf"))
        scored = time.perf_counter()
        weights = torch.nan_to_num(scores.softmax(-1))
        softened = time.perf_counter()
        out = weights @ v
        done = time.perf_counter()
        for part, took in (
            ("reshape", moved - begin),
            ("scores", scored - moved),
            ("softmax", softened - scored),
            ("values", done - softened),
        ):
            self.parts[part] += took if part != "reshape" or group > 1 else 0.0
        return out.transpose(1, 2).contiguous().transpose(1, 2), scores.new_zeros(scores.shape[:-1])
