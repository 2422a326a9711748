"""Recurrent cells and stacks (rows 2-6): torch's kernels, with the equations beside them under the same signature as the readable
reference.

A cell's `forward` and its `reference` take states x [b t d] and what came before, and give every h_t [b t n] and what to carry on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from transept.blocks.cache import Cache
from transept.blocks.dropout import Dropout
from transept.blocks.stack import Output
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.core.tap import tap
from transept.ops.masks import Positions

State = tuple[Tensor, ...]
"""What a cell carries on, each [b n]: h, and c of an LSTM; [b k n] of a cell that looks k steps back."""


class Cell(nn.Module):
    """Base of the cells: one of torch's recurrent kernels of one layer, one direction."""

    def __init__(self, kernel: nn.RNNBase, states: int):
        super().__init__()
        self.kernel, self.states = kernel, states
        self.width = kernel.hidden_size

    def empty(self, x: Float[Tensor, "b t d"]) -> State:
        """The state before the first step: zeros."""
        return tuple(x.new_zeros(len(x), self.width) for _ in range(self.states))

    def forward(
        self, x: Float[Tensor, "b t d"], state: State | None = None, lengths: Int[Tensor, "b"] | None = None
    ) -> tuple[Float[Tensor, "b t n"], State]:
        """All h_t and the last state; with `lengths`, the rest of each row is padding and its outputs are zero."""
        begin = tuple(s[None].contiguous() for s in (self.empty(x) if state is None else state))
        given = begin if self.states > 1 else begin[0]
        if lengths is None:
            y, end = self.kernel(x, given)
        else:
            packed, end = self.kernel(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False), given)
            y, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        return y, tuple(s[0] for s in (end if self.states > 1 else (end,)))

    def reference(self, x: Float[Tensor, "b t d"], state: State | None = None) -> tuple[Float[Tensor, "b t n"], State]:
        """The same from the equations, a step at a time."""
        state, out = self.empty(x) if state is None else state, []
        for x_t in x.unbind(1):
            state = self.step(x_t, state)
            out.append(state[0])
        return torch.stack(out, 1), state

    def step(self, x: Float[Tensor, "b d"], state: State) -> State:
        """The equations of one step."""
        raise NotImplementedError

    def _sums(self, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """W_i x + b_i and W_h h + b_h, one part for each gate."""
        (w_i, w_h, b_i, b_h), linear = self.kernel.all_weights[0], nn.functional.linear
        return linear(x, w_i, b_i).split(self.width, -1), linear(h, w_h, b_h).split(self.width, -1)


class RNNCell(Cell):
    """t_h = W_h h + b_h, t_x = W_i x + b_i, h' = tanh(t_h + t_x) (row 2)."""

    def __init__(self, dim: int, width: int):
        super().__init__(nn.RNN(dim, width, batch_first=True), 1)

    def step(self, x: Float[Tensor, "b d"], state: State) -> State:
        (t_x,), (t_h,) = self._sums(x, state[0])
        return ((t_h + t_x).tanh(),)


class LSTMCell(Cell):
    """c' = f c + i g and h' = o tanh(c'), with the gates i, f, o (Hochreiter and Schmidhuber 1997; row 4)."""

    def __init__(self, dim: int, width: int):
        super().__init__(nn.LSTM(dim, width, batch_first=True), 2)

    def step(self, x: Float[Tensor, "b d"], state: State) -> State:
        (i, f, g, o), (i_h, f_h, g_h, o_h) = self._sums(x, state[0])
        return self.gated(((i + i_h).sigmoid(), (f + f_h).sigmoid(), (o + o_h).sigmoid()), (g + g_h).tanh(), state[1])

    @staticmethod
    def gated(gates: tuple[Tensor, Tensor, Tensor], new: Tensor, c: Tensor) -> State:
        """h' and c' by the gates i, f, o: with i = 0 and f = 1 the cell keeps c, with i = 1 and f = 0 it takes the new value."""
        i, f, o = gates
        c = f * c + i * new
        return o * c.tanh(), c


class GRUCell(Cell):
    """h' = (1 - z) n + z h with n = tanh(W x + r (U h + b)) (Cho et al. 2014; row 6)."""

    def __init__(self, dim: int, width: int):
        super().__init__(nn.GRU(dim, width, batch_first=True), 1)

    def step(self, x: Float[Tensor, "b d"], state: State) -> State:
        (r, z, n), (r_h, z_h, n_h) = self._sums(x, state[0])
        r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
        n = (n + r * n_h).tanh()
        return ((1 - z) * n + z * state[0],)


class Skip(nn.Module):
    """Skip connections through time: h_t follows h_{t-k} instead of h_{t-1}, so a memory is k times fewer steps old (row 3).

    The steps of one remainder modulo k are a sequence of their own; all of them go through the kernel at once.
    """

    def __init__(self, cell: Cell, stride: int):
        super().__init__()
        self.cell, self.stride, self.width, self.states = cell, stride, cell.width, cell.states

    def empty(self, x: Float[Tensor, "b t d"]) -> State:
        """The states before the first k steps: zeros [b k n]."""
        return tuple(x.new_zeros(len(x), self.stride, self.width) for _ in range(self.states))

    def forward(
        self, x: Float[Tensor, "b t d"], state: State | None = None, lengths: Int[Tensor, "b"] | None = None
    ) -> tuple[Float[Tensor, "b t n"], State]:
        """As a cell's; the state holds the latest k steps, the oldest first."""
        b, t, k = len(x), x.shape[1], self.stride
        count = torch.full((b,), t) if lengths is None else lengths.cpu()
        begin = self.empty(x) if state is None else state
        short = -t % k
        lanes = nn.functional.pad(x, (0, 0, 0, short)).unflatten(1, (-1, k)).transpose(1, 2).flatten(0, 1)
        steps = ((count[:, None] - torch.arange(k) + k - 1) // k).clamp(min=0).flatten()
        y, end = self.cell(lanes, tuple(s.flatten(0, 1) for s in begin), steps.clamp(min=1))
        moved = (steps > 0).to(x.device)[:, None]
        y = y * moved[..., None]
        kept = [torch.where(moved, new, old.flatten(0, 1)).unflatten(0, (b, k)) for new, old in zip(end, begin, strict=True)]
        # the lane of the next step comes first
        turn = (torch.arange(k)[None] + count[:, None]) % k
        rows = turn[..., None].to(x.device).expand(b, k, self.width)
        return y.unflatten(0, (b, k)).transpose(1, 2).flatten(1, 2)[:, :t], tuple(s.gather(1, rows) for s in kept)

    def reference(self, x: Float[Tensor, "b t d"], state: State | None = None) -> tuple[Float[Tensor, "b t n"], State]:
        """The same from the equations."""
        past, out = list(zip(*(s.unbind(1) for s in (self.empty(x) if state is None else state)), strict=True)), []
        for x_t in x.unbind(1):
            past.append(self.cell.step(x_t, past[-self.stride]))
            out.append(past[-1][0])
        return torch.stack(out, 1), tuple(torch.stack(s, 1) for s in zip(*past[-self.stride :], strict=True))

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class Carried:
    """The slot of a recurrent layer: its latest state, and nothing of what led there."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.seen = 0

    def append(self, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        raise InputError("a recurrent layer keeps a state, not keys and values")

    def carry(self, state: State, steps: int) -> None:
        """Takes the state after `steps` more columns."""
        self.state, self.seen = tuple(s.detach() for s in state), self.seen + steps

    def reorder(self, rows: Int[Tensor, "c"]) -> None:
        self.state = None if self.state is None else tuple(s[rows] for s in self.state)

    def truncate(self, length: int) -> None:
        if 0 < length < self.seen:
            raise InputError(f"a recurrent state cannot go back from {self.seen} columns to {length}: what it forgot is gone")
        if length == 0:
            self.state, self.seen = None, 0

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else sum(s.nbytes for s in self.state)


class Recurrence(nn.Module):
    """Recurrent layers one above the other, with dropout between them."""

    def __init__(self, layers: Sequence[Cell | Skip], dropout: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
        begin: Sequence[State] | None = None,
    ) -> tuple[list[Float[Tensor, "b t n"]], list[State]]:
        """Every layer's outputs and last states. Columns with mask False are passed over: no state moves there, and outputs are zero."""
        order = None if mask is None else (~mask).long().argsort(dim=1, stable=True)
        lengths = None if mask is None else mask.sum(1)
        outputs, ends = [], []
        for i, layer in enumerate(cast(Iterable[Cell | Skip], self.layers)):
            slot = None if cache is None else cache.slots[i]["state"]
            before = begin[i] if begin is not None else slot.state if isinstance(slot, Carried) else None
            x, end = _passed_over(layer, self.dropout(x) if i else x, before, order, lengths)
            outputs.append(x)
            ends.append(end)
            if isinstance(slot, Carried):
                slot.carry(end, x.shape[1])
        outputs[-1] = tap(self, "hidden", x)
        return outputs, ends


def _passed_over(layer: Cell | Skip, x: Tensor, state: State | None, order: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, State]:
    """A layer on the real columns alone, which are moved to the front and back again."""
    if order is None or lengths is None:
        return layer(x, state)
    before = layer.empty(x) if state is None else state
    front = x.gather(1, order[..., None].expand_as(x))
    y, end = layer(front, before, lengths.clamp(min=1))
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    back = order.argsort(dim=1)[..., None].expand_as(y)
    some = lengths > 0
    kept = tuple(torch.where(some.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(end, before, strict=True))
    return (y * real[..., None]).gather(1, back), kept


class RecurrentLM(nn.Module):
    """embed, recurrent layers, head: predicts the next token from a state of fixed size (row 4)."""

    def __init__(self, embed: nn.Module, stack: Recurrence, head: nn.Module):
        super().__init__()
        self.embed, self.stack, self.head = embed, stack, head

    def forward(self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, cache: Cache | None = None) -> Output:
        """Logits and last states of every token; `mask` is True at real tokens, `cache` remembers what came before."""
        hidden = self.hidden(ids, mask=mask, cache=cache)
        return Output(logits=self.head(hidden), hidden=hidden)

    def hidden(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, cache: Cache | None = None
    ) -> Float[Tensor, "b t d"]:
        """The last layer's states."""
        checked(ids, mask)
        outputs, _ = self.stack(self.embed(ids), mask, cache)
        if cache is not None:
            follow(cache, ids, mask)
        return outputs[-1]

    def cache(self, batch: int, capacity: int = 64) -> Cache:
        """An empty cache for `batch` rows; it never grows."""
        return Cache([{"state": Carried()} for _ in self.stack.layers], batch)


def follow(cache: Cache, ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None) -> None:
    """Counts the columns of a call in a cache."""
    start = cache.next()
    if mask is None and isinstance(start, int):
        cache.extend(Positions.span(start, ids.shape[1], ids.device))
    else:
        cache.extend(Positions.of(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, start))


def checked(ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None) -> None:
    """Refuses an empty input and a mask of another shape."""
    if ids.shape[1] == 0:
        raise InputError("the input is empty: a model needs at least one token")
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"the mask has the shape {tuple(mask.shape)}, but the input has {tuple(ids.shape)}")


@dataclass
class BiOutput(Output):
    """A bidirectional language model's result: `logits` of the next token, `backward` of the one before, `layers` all states, the token
    vectors first [m b t 2n]."""

    backward: Float[Tensor, "b t v"]
    layers: Float[Tensor, "m b t w"]


class BiLM(nn.Module):
    """One recurrence reads from the left, one from the right, with one embedding and one head; their states side by side are features
    (row 5).
    """

    def __init__(self, embed: nn.Module, forwards: Recurrence, backwards: Recurrence, head: nn.Module):
        super().__init__()
        self.embed, self.forwards, self.backwards, self.head = embed, forwards, backwards, head

    def forward(self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None) -> BiOutput:
        """Logits of both directions; no state of one direction knows a token of the other side."""
        checked(ids, mask)
        x = self.embed(ids)
        left, _ = self.forwards(x, mask)
        right, _ = self.backwards(x.flip(1), None if mask is None else mask.flip(1))
        right = [y.flip(1) for y in right]
        layers = torch.stack([torch.cat((x, x), -1), *(torch.cat(pair, -1) for pair in zip(left, right, strict=True))])
        return BiOutput(logits=self.head(left[-1]), hidden=layers[-1], backward=self.head(right[-1]), layers=layers)


class Mix(nn.Module):
    """gamma * sum_j softmax(w)_j h_j: what a task makes of all layers (Peters et al. 2018, eq. 1)."""

    def __init__(self, layers: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, layers: Float[Tensor, "m b t w"]) -> Float[Tensor, "b t w"]:
        return self.gamma * torch.einsum("m,mbtw->btw", self.weight.softmax(0), layers)
