"""Weights of any finished model in 4 or 8 bits, in blocks of 32 (rows 82d, 129): rounded to the nearest, or so that the outputs move least.

The forms are ggml's: Q8_0 is d * q, Q4_0 is d * (q - 8), Q4_1 is d * q + m; d and m are float16, one of each per block. Error-minimising
rounding is GPTQ (Frantar et al. 2023, arXiv 2210.17323): columns are rounded one after another, each one's error being taken off those
that follow, as far as the inputs of a calibration text are correlated; each block's scale is searched for the least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transept.blocks.embeddings import TokenEmbedding
from transept.blocks.feedforward import Experts
from transept.blocks.heads import Head
from transept.core.errors import ConfigError, InputError, NumericsError, nearest
from transept.core.shapes import Float, Tensor

BLOCK = 32
BITS = {"int8": "Q8_0", "int4": "Q4_1"}
_SHRINKS = tuple(1 - i / 40 for i in range(16))
_DAMP = 0.01


@dataclass(frozen=True)
class Coded:
    """A parameter in a stored form: `data` uint8 [..., bytes of a row], the blocks of a row one behind the other."""

    kind: str
    data: Tensor


@dataclass(frozen=True)
class Form:
    """The numbers that a block can hold: q from `low` to `high`, times d, plus m where `shifted`."""

    low: int
    high: int
    shifted: bool

    def value(self, q: Tensor, d: Tensor, m: Tensor) -> Tensor:
        """What codes mean, in the order of ggml's arithmetic."""
        return q * d + m if self.shifted else q * d

    def code(self, w: Tensor, d: Tensor, m: Tensor) -> Tensor:
        """The nearest codes."""
        rest = w - m if self.shifted else w
        return torch.where(d == 0, torch.zeros_like(rest), rest / d).round().clamp(self.low, self.high)

    def widest(self, w: Float[Tensor, "n 32"]) -> tuple[Tensor, Tensor]:
        """The scale and shift [n 1] that just reach the extremes of each block."""
        if self.shifted:
            least = w.amin(-1, keepdim=True)
            return (w.amax(-1, keepdim=True) - least) / (self.high - self.low), least
        if -self.low == self.high:
            return w.abs().amax(-1, keepdim=True) / self.high, torch.zeros_like(w[:, :1])
        return w.gather(-1, w.abs().argmax(-1, keepdim=True)) / self.low, torch.zeros_like(w[:, :1])

    def fit(self, w: Float[Tensor, "n 32"], importance: Float[Tensor, "32"]) -> tuple[Tensor, Tensor]:
        """The scale and shift [n 1], as float16 holds them, with the least weighted squared error over a search."""
        d, m = self.widest(w)
        middle = m + d * (self.high - self.low) / 2
        best = torch.full_like(d, float("inf"))
        found, shift = d.clone(), m.clone()
        for shrink in _SHRINKS:
            scale, low = _half(d * shrink), _half(middle + (m - middle) * shrink) if self.shifted else m
            error = ((self.value(self.code(w, scale, low), scale, low) - w) ** 2 * importance).sum(-1, keepdim=True)
            better = error < best
            best, found, shift = torch.where(better, error, best), torch.where(better, scale, found), torch.where(better, low, shift)
        return found, shift


FORMS = {"Q8_0": Form(-127, 127, False), "Q4_0": Form(-8, 7, False), "Q4_1": Form(0, 15, True)}


def quantize(
    model: nn.Module,
    kind: str = "int4",
    *,
    calibrate: Callable[[nn.Module], Any] | None = None,
    embedding: str = "Q8_0",
    only: Callable[[str], bool] = lambda name: True,
) -> dict[str, Coded]:
    """Rounds the matrices of a model in place and returns their stored forms by parameter name; vectors and position tables stay.

    `kind` is int8, int4, Q8_0, Q4_0 or Q4_1; token tables and heads get `embedding`. Without `calibrate` each number is rounded to the
    nearest; `calibrate(model)` runs the model over a text of its kind, and the matrices that it meets are rounded by GPTQ. `only` chooses
    by name. Rows that are no multiple of 32 stay as they are. Raises ConfigError, InputError, NumericsError.
    """
    form, table = (_form(BITS.get(name, name)) for name in (kind, embedding))
    chosen = {name: p for name, p in model.named_parameters() if only(name)}
    owners = {f"{prefix}.{leaf}" if prefix else leaf: module for prefix, module in model.named_modules() for leaf in module._parameters}
    seen = _inputs(model, {name.rpartition(".")[0] for name in chosen}, calibrate) if calibrate is not None else {}
    out: dict[str, Coded] = {}
    with torch.no_grad():
        for name, p in chosen.items():
            owner = owners[name]
            if p.ndim < 2 or p.shape[-1] % BLOCK or not isinstance(owner, (nn.Linear, TokenEmbedding, Experts)):
                continue
            which = table if isinstance(owner, (TokenEmbedding, Head)) else form
            rows = p.detach().float().cpu().reshape(-1, p.shape[-1])
            if not torch.isfinite(rows).all():
                raise NumericsError(f"the parameter {name!r} holds numbers that are not finite, so it cannot be rounded")
            inner = seen.get(name.rpartition(".")[0])
            coded = _nearest(which, rows) if inner is None else _careful(FORMS[which], rows, inner)
            data = pack(which, *coded)
            p.copy_(unpack(which, data).reshape(p.shape))
            out[name] = Coded(which, data.reshape(*p.shape[:-1], -1))
    if not out:
        raise ConfigError("the model has no matrix with rows of a multiple of 32, so there is nothing to round")
    return out


Codes = tuple[Float[Tensor, "n 32"], Float[Tensor, "n 1"], Float[Tensor, "n 1"]]


def _form(kind: str) -> str:
    if kind not in FORMS:
        raise ConfigError(f"the form to round to is {kind!r}, expected one of {', '.join((*BITS, *FORMS))}{nearest(kind, (*BITS, *FORMS))}")
    return kind


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _nearest(kind: str, rows: Float[Tensor, "r k"]) -> Codes:
    """Codes, scales and shifts of all blocks, as ggml's reference rounds them: by the scale before it becomes float16."""
    form, w = FORMS[kind], rows.reshape(-1, BLOCK)
    d, m = form.widest(w)
    inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    if kind == "Q8_0":
        scaled = w * inverse
        size = scaled.abs()
        q = torch.copysign(size.floor() + (size - size.floor() >= 0.5), scaled)
    else:
        q = ((w - m) * inverse + (0.5 if form.shifted else 0.5 - form.low)).trunc().clamp(0, 15) + form.low
    return q, _half(d), _half(m)


def _careful(form: Form, rows: Float[Tensor, "r k"], inner: Float[Tensor, "k k"]) -> Codes:
    """GPTQ, from the products of the inputs."""
    upper = _factor(inner)
    work = rows.clone()
    blocks: list[Codes] = []
    for start in range(0, work.shape[1], BLOCK):
        span = slice(start, start + BLOCK)
        part, local = work[:, span].clone(), upper[span, span]
        d, m = form.fit(part, local.diagonal() ** -2)
        q, errors = torch.empty_like(part), torch.empty_like(part)
        for j in range(BLOCK):
            column = part[:, j : j + 1]
            q[:, j : j + 1] = form.code(column, d, m)
            errors[:, j : j + 1] = (column - form.value(q[:, j : j + 1], d, m)) / local[j, j]
            part[:, j + 1 :] -= errors[:, j : j + 1] * local[j, j + 1 :]
        work[:, start + BLOCK :] -= errors @ upper[span, start + BLOCK :]
        blocks.append((q, d, m))
    q, d, m = (torch.stack([block[i] for block in blocks], 1).flatten(0, 1) for i in range(3))
    return q, d, m


def _factor(inner: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The upper Cholesky factor of the inverse of X^T X, damped as in the paper; an input that never came counts as one."""
    h = inner.double()
    at = h.diagonal()
    at[at == 0] = 1.0
    at += _DAMP * at.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _inputs(model: nn.Module, names: set[str], calibrate: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """X^T X [k k] of every linear module that the calibration meets; modules that read the same input share it only in value."""
    found: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hear(module: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0].detach().float().reshape(-1, given[0].shape[-1]).cpu()
            found[name] = found[name].addmm_(x.T, x) if name in found else x.T @ x

        return hear

    hooks = [
        module.register_forward_pre_hook(listen(name))
        for name, module in model.named_modules()
        if name in names and isinstance(module, nn.Linear) and module.in_features % BLOCK == 0
    ]
    try:
        with torch.no_grad():
            calibrate(model)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise InputError("the calibration ran no linear layer of the model: it should call the model on a text of its kind")
    return found


def pack(kind: str, q: Float[Tensor, "n 32"], d: Float[Tensor, "n 1"], m: Float[Tensor, "n 1"]) -> Tensor:
    """Codes, scales and shifts as stored blocks, uint8 [n, bytes of a block]."""
    form = FORMS[kind]
    heads = [x.half().contiguous().view(torch.uint8) for x in ((d, m) if form.shifted else (d,))]
    if kind == "Q8_0":
        return torch.cat((*heads, q.to(torch.int8).view(torch.uint8)), 1)
    small = (q - form.low).to(torch.uint8)
    return torch.cat((*heads, small[:, :16] | small[:, 16:] << 4), 1)


def unpack(kind: str, data: Tensor) -> Float[Tensor, "n 32"]:
    """The numbers of stored blocks."""
    form = FORMS[kind]
    heads = 4 if form.shifted else 2
    d, m = (data[:, at : at + 2].contiguous().view(torch.float16).float() for at in (0, heads - 2))
    body = data[:, heads:]
    q = body.contiguous().view(torch.int8).float() if kind == "Q8_0" else torch.cat((body & 15, body >> 4), 1).float() + form.low
    return form.value(q, d, m)


def sizes(model: nn.Module, coded: Mapping[str, Coded]) -> tuple[int, int]:
    """(bytes stored, bytes in float32) of a model's parameters."""
    stored = sum(coded[name].data.numel() if name in coded else 4 * p.numel() for name, p in model.named_parameters())
    return stored, sum(4 * p.numel() for p in model.parameters())
