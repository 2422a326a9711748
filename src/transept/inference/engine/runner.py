"""One step of the engine on a model: rows of tokens in, logits out, keys and values in pages (rows 82c, 82d).

A `Runner` is all that the engine knows of how logits are made. `TorchRunner` runs every decoder of the house as it is: its attention finds
a `Paged` slot where another cache would be.

In the deterministic mode a token's bits do not depend on its neighbours, on chunking, on the prefix cache or on preemption. Three things
see to it: every token is a batch row of its own, in calls of a few fixed numbers of rows (`SIZES`) that were found to give equal bits on
this model and machine (`probe`); its keys are padded to a multiple of `SPAN` columns, whose tail adds exact zeros; and what the model
multiplies by a matrix inside, such as the rows of one expert, is cut into calls of these sizes too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from transept.blocks.cache import Cache, Room
from transept.blocks.stack import Decoder
from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor
from transept.inference.rows import Row
from transept.ops.masks import PAD, Positions

SPAN = 64
SIZES = (4, 8, 16, 32, 64)
BASE = 16


@dataclass
class Call:
    """What the slots need to know of one call of the model: where b x t new columns go, and what each of the b rows reads.

    `write` are the flat numbers of the new columns that are real, `where` their columns in the pool; `table` [b c] are pages, [1 c] where
    all rows read the same sequence; `columns` is how many of a row's columns are handed out.
    """

    write: Int[Tensor, "n"]
    where: Int[Tensor, "n"]
    table: Int[Tensor, "u c"]
    columns: int


class Paged:
    """One layer's keys and values in pages [pages, page, heads, width]; fits where a Slot is expected."""

    def __init__(self, k: Float[Tensor, "n p k e"], v: Float[Tensor, "n p k f"], calls: list[Call]):
        self.k, self.v, self.calls = k, v, calls

    def append(self, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Writes the new columns into their pages; returns for each row the columns of its own sequence."""
        call = self.calls[-1]
        return _through(self.k, k, call), _through(self.v, v, call)

    def reorder(self, rows: Tensor) -> None:
        """Not known here: sequences are told apart by their page tables."""
        raise InputError("a paged cache has no rows to reorder")

    def truncate(self, length: int) -> None:
        """Not known here: what a row may read is said by its page table and position."""
        raise InputError("a paged cache has no common length to go back to")

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def _through(pool: Tensor, new: Float[Tensor, "b k t e"], call: Call) -> Float[Tensor, "b k s e"]:
    columns = new.transpose(1, 2).flatten(0, 1)
    pool.flatten(0, 1).index_copy_(0, call.where, columns if len(call.write) == len(columns) else columns[call.write])
    read = pool[call.table].flatten(1, 2)[:, : call.columns].transpose(1, 2)
    return read.expand(new.shape[0], -1, -1, -1)


class PagedCache(Cache):
    """The cache of one call: says where its tokens stand and which columns each row sees."""

    def __init__(self, slots: Sequence[Mapping[str, Paged]], first: Int[Tensor, "b"] | int, seen: Positions):
        super().__init__(slots, 1)
        self.first, self.seen = first, seen

    def next(self) -> int | Tensor:
        return self.first

    def extend(self, new: Positions) -> Positions:
        return self.seen


class Tiles(TorchFunctionMode):
    """While it is on, a matrix product with a number of rows that is not among `sizes` is computed in calls of those that are."""

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        self.sizes = tuple(sizes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, *rest = args
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) in self.sizes:
            return func(*args, **(kwargs or {}))
        parts = [func(_padded(flat[at : at + size], size), *rest, **(kwargs or {})) for at, size in cut(len(flat), self.sizes)]
        y = torch.cat(parts) if parts else func(flat, *rest, **(kwargs or {}))
        return y[: len(flat)].reshape(*x.shape[:-1], -1)


def cut(n: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(begin, size) of calls that cover n rows, only the last of them longer than what is left: 21 of (4, 8, 16) is 16 + 8."""
    at = 0
    while at < n:
        left = n - at
        size = min((s for s in sizes if s >= left), default=max(sizes))
        # A size of which less than half would be used is not worth it where a smaller one does the first part.
        smaller = max((s for s in sizes if s <= left), default=size)
        size = smaller if 4 * left <= 3 * size else size
        yield at, size
        at += size


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:])))


@dataclass(frozen=True)
class _Piece:
    """A run of tokens of one row, from `at` on, and which of its hidden states (from the run's end) are wanted."""

    row: Row
    at: int
    length: int

    @property
    def start(self) -> int:
        return self.row.start + self.at


class TorchRunner:
    """Runs a decoder on any device of torch; `pages` of `page` tokens besides the empty page 0.

    Errors: InputError where the model is no decoder of the house or a page does not divide 64.
    """

    def __init__(self, model: torch.nn.Module, *, pages: int, page: int = 16, context: int | None = None, deterministic: bool = True):
        if not isinstance(model, Decoder):
            raise InputError(f"the engine runs decoders, found {type(model).__name__}; use the plain loop for other models")
        if SPAN % page:
            raise InputError(f"a page should have 1, 2, 4, 8, 16, 32 or {SPAN} tokens, found {page}")
        self.model, self.page = model, page
        weight = next(model.parameters())
        self.device = weight.device
        self.calls: list[Call] = []
        shapes = model.stack.cache(Room(1, 0, weight.dtype, weight.device)).slots
        # One tensor per layer: a stacked one would be copied whole where a layer is picked out of it.
        self.slots = [{name: self._slot(slot, pages + 1) for name, slot in slots.items()} for slots in shapes]
        self.sizes: tuple[int, ...] = ()
        if deterministic:
            self.sizes = self.probe(context)

    def _slot(self, like: Any, pages: int) -> Paged:
        k, v = (x.new_zeros(pages, self.page, x.shape[1], x.shape[3]) for x in (like.k, like.v))
        return Paged(k, v, self.calls)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(slot.nbytes for slots in self.slots for slot in slots.values())

    @torch.inference_mode()
    def prepare(self, copies: Sequence[tuple[int, int]], fresh: Sequence[int]) -> None:
        """Copies pages (from, to) in this order, then clears the fresh ones, so that nothing of a former owner can be read, not even a
        NaN.
        """
        cleared = torch.tensor(fresh, dtype=torch.long, device=self.device)
        for pool in (x for slots in self.slots for slot in slots.values() for x in (slot.k, slot.v)):
            for source, target in copies:
                pool[target] = pool[source]
            if fresh:
                pool.index_fill_(0, cleared, 0.0)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> Float[Tensor, "n v"]:
        """Writes the columns of all rows and returns the wanted logits, row after row."""
        first, wanted = 0, {}
        for row in rows:
            wanted |= {(id(row), len(row.tokens) - row.logits + i): first + i for i in range(row.logits)}
            first += row.logits
        places: list[int] = []
        states: list[Tensor] = []
        for pieces, size in self._calls(rows):
            hidden = self._hidden(pieces, size).flatten(0, 1)
            flat = [(id(piece.row), piece.at + i) for piece in pieces for i in range(piece.length)]
            taken = [(i, wanted[token]) for i, token in enumerate(flat) if token in wanted]
            if taken:
                states.append(hidden[[i for i, _ in taken]])
                places += [place for _, place in taken]
        if not states:
            return torch.empty(0, 0)
        order = torch.tensor(places, device=self.device).argsort()
        return self._tiled(self.model.head, torch.cat(states)[order])

    def _calls(self, rows: Sequence[Row]) -> Iterator[tuple[list[_Piece], int]]:
        """The pieces of each call of the model, all of one length, and the number of batch rows; 0 for as many as there are pieces."""
        if self.sizes:
            # Whole calls of one sequence first: they read its pages once for all their rows.
            single = [_Piece(row, at, 1) for row in rows for at in range(len(row.tokens))]
            alone = [row for row in rows if len(row.tokens) >= max(self.sizes)]
            full = {id(row): len(row.tokens) // max(self.sizes) * max(self.sizes) for row in alone}
            ordered = [p for p in single if p.at < full.get(id(p.row), 0)] + [p for p in single if p.at >= full.get(id(p.row), 0)]
            yield from ((ordered[at : at + size], size) for at, size in cut(len(ordered), self.sizes))
            return
        lengths: dict[int, list[_Piece]] = {}
        for row in rows:
            lengths.setdefault(len(row.tokens), []).append(_Piece(row, 0, len(row.tokens)))
        for length, pieces in lengths.items():
            # Short runs share a call; long ones of many sequences would gather all their columns at once.
            group = max(1, BASE // length)
            yield from ((pieces[at : at + group], 0) for at in range(0, len(pieces), group)) if length > 1 else ((pieces, 0),)

    def _hidden(self, pieces: list[_Piece], size: int) -> Float[Tensor, "b t d"]:
        """The last states of one call: a row for each piece, in the deterministic mode as many as `size`."""
        length, spare = pieces[0].length, max(0, size - len(pieces))
        ids = torch.tensor([piece.row.tokens[piece.at : piece.at + length] for piece in pieces] + [(0,) * length] * spare)
        start = torch.tensor([piece.start for piece in pieces] + [PAD] * spare)
        end = int(start.max()) + length
        columns = -(-end // SPAN) * SPAN if size else end
        self.calls[:] = [self._call(pieces, start, length, columns)]
        if len(pieces) == 1 and not size:
            cache = PagedCache(self.slots, pieces[0].start, Positions.span(0, columns, self.device))
            return self.model.hidden(ids.to(self.device), cache=cache)
        real, column = start[:, None] != PAD, torch.arange(columns)
        seen = torch.where(real & (column < start[:, None] + length), column, PAD)
        cache = PagedCache(self.slots, start.to(self.device), Positions(seen.to(self.device), None))
        mask = real.expand(-1, length).to(self.device)
        return self._tiled(lambda x: self.model.hidden(x, mask=mask, cache=cache), ids.to(self.device))

    def _call(self, pieces: list[_Piece], start: Int[Tensor, "b"], length: int, columns: int) -> Call:
        same = all(piece.row is pieces[0].row for piece in pieces)
        width = -(-columns // self.page)
        pages = [piece.row.pages[:width] for piece in (pieces[:1] if same else pieces)]
        table = torch.tensor(
            [[*row, *[0] * (width - len(row))] for row in pages] + ([] if same else [[0] * width] * (len(start) - len(pieces)))
        )
        at = (start[: len(pieces), None] + torch.arange(length)).flatten()
        write = torch.arange(len(at))
        owner = torch.zeros_like(write) if same else write // length
        where = table[owner, at // self.page] * self.page + at % self.page
        return Call(write.to(self.device), where.to(self.device), table.to(self.device), columns)

    def _tiled(self, compute: Any, x: Tensor) -> Tensor:
        if not self.sizes:
            return compute(x)
        with Tiles(self.sizes):
            return compute(x)

    @torch.inference_mode()
    def probe(self, context: int | None) -> tuple[int, ...]:
        """The sizes of calls that give the bits of a call of 16 rows on this model and machine, tried on one sequence of at most 64
        tokens.
        """
        held = next(iter(self.slots[0].values())).k.shape[0] - 1
        length = min(max(SIZES), held * self.page, context or max(SIZES))
        row = Row(tuple(i % 8 for i in range(length)), 0, tuple(range(1, -(-length // self.page) + 1)), length)
        found: dict[int, Tensor] = {}
        for size in SIZES:
            self.sizes = (size,)
            found[size] = self.step([row])
        self.prepare((), row.pages)
        return tuple(size for size in SIZES if torch.equal(found[size], found[BASE]))
