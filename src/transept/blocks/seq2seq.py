"""An encoder reads a source, a decoder writes beside it (rows 37-39): whatever the source is, tokens, pictures or recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transept.blocks.block import Block
from transept.blocks.cache import Cache, Memory
from transept.blocks.encoder import SpanOutput, States
from transept.blocks.heads import Head, at
from transept.blocks.stack import Decoder, Output, Stack, Trunk, context
from transept.core.errors import InputError
from transept.core.shapes import Bool, Float, Int, Tensor


class Reader(nn.Module):
    """What reads a source, of whatever kind, and gives what the decoder looks at."""

    def encode(self, source: Tensor, mask: Bool[Tensor, "_ _"] | None = None) -> Memory:
        """The memory of a source; `mask` is True where it is real."""
        raise NotImplementedError


class SourceEncoder(Reader):
    """embed, blocks, norm: every token of the source sees every other (row 37)."""

    def __init__(self, embed: nn.Module, layers: Sequence[Block], norm: nn.Module):
        super().__init__()
        self.embed = embed
        self.stack = Stack(layers, norm)

    def forward(self, ids: Int[Tensor, "b s"], *, mask: Bool[Tensor, "b s"] | None = None) -> Output | States:
        """The last states of every token; `mask` is True at real ones."""
        return States(self.states(ids, mask=mask))

    def states(self, ids: Int[Tensor, "b s"], *, mask: Bool[Tensor, "b s"] | None = None) -> Float[Tensor, "b s d"]:
        """The same, by themselves."""
        return self.encode(ids, mask).states

    def encode(self, source: Int[Tensor, "b s"], mask: Bool[Tensor, "_ _"] | None = None) -> Memory:
        """The same, as a memory for cross-attention."""
        ctx = context(source, mask, None)
        return Memory(self.stack(self.embed(source, ctx.positions.index), ctx), ctx.positions, source)


class HeadedSource(SourceEncoder):
    """The same under a head that reads every token's state (T5's token classifier)."""

    def __init__(self, embed: nn.Module, layers: Sequence[Block], norm: nn.Module, head: nn.Module):
        super().__init__(embed, layers, norm)
        self.head = head

    def forward(self, ids: Int[Tensor, "b s"], *, mask: Bool[Tensor, "b s"] | None = None) -> Output:
        """What the head makes of the last states."""
        return self.head(self.states(ids, mask=mask))


@dataclass
class Seq2SeqStates(States):
    """The decoder's last states beside what the encoder made of the source."""

    encoded: Float[Tensor, "#b s m"]


@dataclass
class Seq2SeqOutput(Output):
    """The decoder's result beside what the encoder made of the source."""

    encoded: Float[Tensor, "#b s m"]


class BareEncoderDecoder(nn.Module):
    """A decoder whose cross-attention looks at what an encoder made of a source (Vaswani et al. 2017, figure 1; rows 38, 39)."""

    def __init__(self, encoder: Reader, decoder: Trunk):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        *,
        source: Tensor | None = None,
        source_mask: Bool[Tensor, "c s"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Seq2SeqStates | Seq2SeqOutput:
        """Last states of the target's tokens `ids`, each seeing the earlier ones and all of `source`.

        `source` has as many rows as `ids`, or one for all; `source_mask` and `mask` are True at real tokens. A cache keeps what it was
        given first: later calls may leave the source out. Raises InputError where there is no source, or another than the cache holds.
        """
        memory = self.remember(source, source_mask, cache)
        return Seq2SeqStates(self.decoder.hidden(ids, mask=mask, cache=cache, memory=fitting(memory, len(ids))), memory.states)

    def remember(self, source: Tensor | None, mask: Bool[Tensor, "b s"] | None, cache: Cache | None) -> Memory:
        """What the source says, from the cache where it is there."""
        known = None if cache is None else cache.memory
        if known is None:
            if source is None:
                raise InputError("an encoder-decoder reads a source beside its target: give source=, or a cache that holds one")
            known = self.encode(source, mask)
            if cache is not None:
                cache.memory = known
        elif source is not None and not (known.source is not None and torch.equal(source, known.source)):
            raise InputError("this cache holds the memory of another source; a new source needs a new cache")
        return known

    def encode(self, source: Tensor, mask: Bool[Tensor, "_ _"] | None = None) -> Memory:
        """What the encoder makes of a source."""
        return self.encoder.encode(source, mask)


class EncoderDecoder(BareEncoderDecoder):
    """The same with a head over the vocabulary, which writes token by token."""

    def __init__(self, encoder: Reader, decoder: Decoder):
        super().__init__(encoder, decoder)
        self.decoder: Decoder = decoder

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        *,
        source: Tensor | None = None,
        source_mask: Bool[Tensor, "c s"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Seq2SeqOutput:
        """The states, and their scores of the vocabulary."""
        found = super().forward(ids, source=source, source_mask=source_mask, mask=mask, cache=cache)
        return Seq2SeqOutput(logits=self.decoder.head(found.hidden), hidden=found.hidden, encoded=found.encoded)

    def cache(self, batch: int, capacity: int = 64) -> Cache:
        """An empty cache of the decoder for `batch` rows."""
        return self.decoder.cache(batch, capacity)

    def given(self, source: Tensor, mask: Bool[Tensor, "b s"] | None = None) -> Conditioned:
        """The decoder alone, its source read: a predictor of the next token like any other."""
        return Conditioned(self.decoder, self.encode(source, mask))


class Conditioned:
    """A decoder that has read its source: what generation works on, as on a decoder that needs none."""

    def __init__(self, decoder: Decoder, memory: Memory):
        self.decoder, self.memory = decoder, memory
        self.head: Callable[[Tensor], Tensor] = decoder.head

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.memory.states.device

    def hidden(self, ids: Int[Tensor, "b t"], *, cache: Cache | None = None) -> Float[Tensor, "b t d"]:
        """The last states of some tokens that follow those in the cache."""
        memory = self.memory if cache is None or cache.memory is None else cache.memory
        return self.decoder.hidden(ids, cache=cache, memory=fitting(memory, len(ids)))

    def cache(self, batch: int, capacity: int = 64) -> Cache:
        """An empty cache for `batch` rows, as many as the source has (or one source for all)."""
        cache = self.decoder.cache(batch, capacity)
        cache.memory = fitting(self.memory, batch)
        return cache


def fitting(memory: Memory, batch: int) -> Memory:
    """The memory, if it has `batch` rows or one for all."""
    if len(memory) not in (1, batch):
        raise InputError(f"the source has {len(memory)} rows, but the target has {batch}: give as many, or one source for all")
    return memory


class SentenceHead(nn.Module):
    """out(tanh(dense(x))): classes of a whole text from one state (Lewis et al. 2019, section 3.1)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.out = Head(dim, classes, bias=True)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        return self.out(self.dense(x).tanh())


class TextEncoderDecoder(nn.Module):
    """Reads one text on both sides, the decoder moved one column to the right behind a `start` token; its head reads every state (Lewis et
    al. 2019, sections 3.1 and 3.2).
    """

    def __init__(self, encoder: SourceEncoder, decoder: Decoder, start: int):
        super().__init__()
        self.encoder, self.decoder, self.start = encoder, decoder, start

    @property
    def head(self) -> nn.Module:
        """What reads the decoder's states."""
        return self.decoder.head

    def forward(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, segments: Int[Tensor, "b t"] | None = None
    ) -> Output | SpanOutput:
        """What the head makes of the decoder's last states."""
        return self.head(self.states(ids, mask=mask, segments=segments))

    def states(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, segments: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """The decoder's last states, before the head; a second segment is refused."""
        return self.both(ids, mask, segments)[0]

    def both(
        self, ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None, segments: Int[Tensor, "b t"] | None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"]]:
        """The last states of the decoder and of the encoder."""
        if segments is not None and not segments.is_meta and segments.any():
            raise InputError("the input has a second segment, but this model has no segments")
        memory = self.encoder.encode(ids, mask)
        target = torch.cat((torch.full_like(ids[:, :1], self.start), ids[:, :-1]), 1)
        return self.decoder.hidden(target, memory=memory), memory.states


class SentenceEncoderDecoder(TextEncoderDecoder):
    """Scores the classes of a text by the decoder's state at the last `end` token."""

    def __init__(self, encoder: SourceEncoder, decoder: Decoder, end: int, start: int):
        super().__init__(encoder, decoder, start)
        self.end = end

    def forward(
        self, ids: Int[Tensor, "b t"], *, mask: Bool[Tensor, "b t"] | None = None, segments: Int[Tensor, "b t"] | None = None
    ) -> Seq2SeqOutput:
        """Classes of each row. Raises InputError where a row has no end token."""
        ended = (ids == self.end).long()
        if not ids.is_meta and not bool(ended.any(1).all()):
            raise InputError(f"each text should hold the end token {self.end}, by whose state it is classified")
        hidden, encoded = self.both(ids, mask, segments)
        where = ids.shape[1] - 1 - ended.flip(1).argmax(1)
        return Seq2SeqOutput(logits=self.head(at(hidden, where)), hidden=hidden, encoded=encoded)
