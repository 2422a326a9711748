"""Recurrent encoder-decoders, with and without attention (rows 7, 8): the attention from which the transformer's came."""

from __future__ import annotations

import torch
from torch import nn

from transept.blocks.cache import Cache, Memory
from transept.blocks.recurrent import Carried, Cell, Recurrence, checked, follow
from transept.blocks.seq2seq import Reader
from transept.blocks.stack import Decoder
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.core.tap import peek
from transept.ops.masks import PAD, Positions


class BiEncoder(Reader):
    """A recurrence from each side; a token's states of both stand side by side, [b s 2n] (Bahdanau et al. 2014, section 3.2)."""

    def __init__(self, embed: nn.Module, forwards: Recurrence, backwards: Recurrence):
        super().__init__()
        self.embed, self.forwards, self.backwards = embed, forwards, backwards

    def encode(self, source: Int[Tensor, "b s"], mask: Bool[Tensor, "_ _"] | None = None) -> Memory:
        """The states of the source's tokens; padding has none."""
        checked(source, mask)
        x = self.embed(source)
        left, _ = self.forwards(x, mask)
        right, _ = self.backwards(x.flip(1), None if mask is None else mask.flip(1))
        where = Positions.span(0, source.shape[1], source.device) if mask is None else Positions.of(mask)
        return Memory(torch.cat((left[-1], right[-1].flip(1)), -1), where, source)


class Dot(nn.Module):
    """score(h, m) = h W m (Luong et al. 2015, eq. 8, "general")."""

    def __init__(self, width: int, memory: int):
        super().__init__()
        self.w = nn.Linear(memory, width, bias=False)

    def forward(self, h: Float[Tensor, "b t n"], memory: Float[Tensor, "b s m"]) -> Float[Tensor, "b t s"]:
        return h @ self.w(memory).transpose(1, 2)


class Additive(nn.Module):
    """score(h, m) = v tanh(W h + U m) (Bahdanau et al. 2014, appendix A.1.2)."""

    def __init__(self, width: int, memory: int):
        super().__init__()
        self.w, self.u = nn.Linear(width, width, bias=False), nn.Linear(memory, width, bias=False)
        self.v = nn.Linear(width, 1, bias=False)

    def forward(self, h: Float[Tensor, "b t n"], memory: Float[Tensor, "b s m"]) -> Float[Tensor, "b t s"]:
        return self.v((self.w(h)[:, :, None] + self.u(memory)[:, None]).tanh())[..., 0]


class Blind(nn.Module):
    """No attention: all that the decoder knows of the source is the state it begins with (Sutskever et al. 2014)."""

    def forward(self, cell: Recurrence, x: Tensor, state: Tensor, memory: Memory, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, ends = cell(x, mask, begin=[(state,)])
        return outputs[-1], ends[-1][0]


class After(nn.Module):
    """Attention after the recurrence: h~ = tanh(W [c; h]) with c read by the new h (Luong et al. 2015, eq. 5); all steps at once."""

    def __init__(self, score: nn.Module, width: int, memory: int):
        super().__init__()
        self.score, self.combine = score, nn.Linear(width + memory, width, bias=False)

    def forward(self, cell: Recurrence, x: Tensor, state: Tensor, memory: Memory, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, ends = cell(x, mask, begin=[(state,)])
        context, found = aligned(self.score, outputs[-1], memory)
        peek(self, "weights", lambda heads=None: found[:, None])
        return self.combine(torch.cat((context, outputs[-1]), -1)).tanh(), ends[-1][0]


class Before(nn.Module):
    """Attention before each step: the cell reads [y; c] with c read by the state so far (Bahdanau et al. 2014, eq. 4-6)."""

    def __init__(self, score: nn.Module, width: int, memory: int):
        super().__init__()
        self.score, self.combine = score, nn.Linear(width + memory, width, bias=False)

    def forward(self, cell: Recurrence, x: Tensor, state: Tensor, memory: Memory, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out, every = [], []
        for i, x_t in enumerate(x.split(1, 1)):
            context, found = aligned(self.score, state[:, None], memory)
            outputs, ends = cell(torch.cat((x_t, context), -1), None, begin=[(state,)])
            new = ends[-1][0]
            state = new if mask is None else torch.where(mask[:, i, None], new, state)
            out.append(self.combine(torch.cat((context, outputs[-1]), -1)).tanh())
            every.append(found)
        peek(self, "weights", lambda heads=None: torch.cat(every, 1)[:, None])
        return torch.cat(out, 1), state


def aligned(score: nn.Module, h: Float[Tensor, "b t n"], memory: Memory) -> tuple[Float[Tensor, "b t m"], Float[Tensor, "b t s"]]:
    """What the states h look at in the memory, and how much at each token; nothing where a row has no token."""
    states = memory.states.expand(len(h), -1, -1)
    real = (memory.positions.index != PAD)[:, None]
    weights = torch.nan_to_num(score(h, states).masked_fill(~real, float("-inf")).softmax(-1))
    return weights @ states, weights


class AlignedDecoder(Decoder):
    """tokens, one recurrent layer, attention in its slot, head; it begins with what the encoder's two ends say."""

    def __init__(self, embed: nn.Module, cell: Cell, attend: nn.Module, bridge: nn.Linear, head: nn.Module):
        # A Decoder by its calls; its parts are others, so only the module itself is made.
        nn.Module.__init__(self)
        self.embed, self.cell, self.attend, self.bridge, self.head = embed, Recurrence([cell]), attend, bridge, head

    def hidden(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, cache: Cache | None = None, memory: Memory | None = None
    ) -> Float[Tensor, "b t d"]:
        """The states from which the next tokens are scored."""
        checked(ids, mask)
        if memory is None:
            raise InputError("this model reads a source beside its input: give source=, or a cache that holds one")
        slot = None if cache is None else cache.slots[0]["state"]
        before = slot.state[0] if isinstance(slot, Carried) and slot.state is not None else self.begin(memory).expand(len(ids), -1)
        y, state = self.attend(self.cell, self.embed(ids), before, memory, mask)
        if cache is not None and isinstance(slot, Carried):
            slot.carry((state,), ids.shape[1])
            follow(cache, ids, mask)
        return y

    def begin(self, memory: Memory) -> Float[Tensor, "b n"]:
        """tanh(W [last state from the left; last state from the right])."""
        left, right = memory.states.chunk(2, -1)
        columns = torch.arange(left.shape[1], device=left.device)
        real = (memory.positions.index != PAD).expand(len(left), -1)
        last, first = (columns * real).amax(1), columns.where(real, columns[-1]).amin(1)
        rows = torch.arange(len(left), device=left.device)
        return self.bridge(torch.cat((left[rows, last], right[rows, first]), -1)).tanh()

    def cache(self, batch: int, capacity: int = 64) -> Cache:
        """An empty cache for `batch` rows."""
        return Cache([{"state": Carried()}], batch)
