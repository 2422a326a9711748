"""Which samples an update sees: a pure function of three integers, the same however the batch is split."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from transept.core.batch import Batch, Draw, Source, mixed
from transept.core.errors import ConfigError
from transept.training.run import Loading, Order


class Sampler:
    """The order of a source's samples in each epoch, and the batches along it.

    The cursor is a `Draw`: seed, epoch, index of the next sample in that epoch's order.
    """

    def __init__(self, source: Source, settings: Loading, seed: int):
        if len(source) == 0:
            raise ConfigError("the training data has no sample; expected at least one")
        self.source, self.settings, self.seed = source, settings, seed
        self._orders: OrderedDict[int, Sequence[int]] = OrderedDict()

    def order(self, epoch: int) -> Sequence[int]:
        """The numbers of the samples in the order of that epoch."""
        if epoch not in self._orders:
            self._orders[epoch] = _MAKERS[self.settings.order](self.source, self.settings.batch, mixed("order", self.seed, epoch))
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def span(self, cursor: Draw) -> tuple[Draw, int, Draw]:
        """The next batch as (where it begins, how many samples, where the one after it begins); an epoch's last batch may be short."""
        length = len(self.order(cursor.epoch))
        if cursor.index >= length:
            cursor = Draw(cursor.seed, cursor.epoch + 1, 0)
            length = len(self.order(cursor.epoch))
        many = min(self.settings.batch, length - cursor.index)
        return cursor, many, cursor.at(many)

    def batch(self, begin: Draw, many: int) -> Batch:
        """The collated samples at places begin .. begin + many - 1."""
        order = self.order(begin.epoch)
        samples = [self.source[int(order[begin.index + i])] for i in range(many)]
        return self.source.collate(samples, begin)


def shares(begin: Draw, many: int, rank: int, world: int, micro: int) -> list[tuple[Draw, int]]:
    """This process's contiguous share of a batch, cut into micro-batches of at most `micro` samples."""
    low, high = many * rank // world, many * (rank + 1) // world
    return [(begin.at(at), min(micro, high - at)) for at in range(low, high, micro)]


class Ahead:
    """Prepares batches in threads before they are asked for; with 0 workers, at the asking. What comes out is the same."""

    def __init__(self, make: Callable[[Draw, int], Batch], workers: int):
        self.make = make
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="transept-data") if workers else None
        self.waiting: dict[tuple[Draw, int], Future[Any]] = {}

    def expect(self, pieces: Sequence[tuple[Draw, int]]) -> None:
        """Begins to prepare these pieces."""
        if self.pool is not None:
            for piece in pieces:
                if piece not in self.waiting:
                    self.waiting[piece] = self.pool.submit(self.make, *piece)

    def take(self, piece: tuple[Draw, int]) -> Batch:
        """One piece, prepared."""
        future = self.waiting.pop(piece, None)
        return self.make(*piece) if future is None else future.result()

    def close(self) -> None:
        """Lets the threads go."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


def _shuffled(source: Source, batch: int, seed: int) -> Sequence[int]:
    return _numbers(torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)))


def _sequential(source: Source, batch: int, seed: int) -> Sequence[int]:
    return range(len(source))


def _bucketed(source: Source, batch: int, seed: int, pool: int = 64) -> Sequence[int]:
    """Shuffled; each pool of 64 batches sorted by length, its batches shuffled again: little padding, and no fixed order."""
    lengths = getattr(source, "lengths", None)
    if lengths is None:
        raise ConfigError(f"{type(source).__name__} tells no lengths, which the order BUCKETED needs")
    length = torch.as_tensor(lengths)
    gen = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(source), generator=gen)
    pieces: list[torch.Tensor] = []
    for part in order.split(pool * batch):
        pieces += part[torch.argsort(length[part], stable=True)].split(batch)
    # A short batch can only be the last of the epoch, or every later one would begin elsewhere.
    full, short = [p for p in pieces if len(p) == batch], [p for p in pieces if len(p) < batch]
    return _numbers(torch.cat([full[i] for i in torch.randperm(len(full), generator=gen).tolist()] + short))


def _tiled(source: Source, batch: int, seed: int) -> Sequence[int]:
    """Every `length`-th sample from a drawn first one on, shuffled: no element is seen twice before all were seen once."""
    length = getattr(source, "length", None)
    if not isinstance(length, int) or getattr(source, "stride", 1) != 1:
        raise ConfigError(f"the order TILED needs windows of one length, one beginning at each element; {type(source).__name__} has none")
    gen = torch.Generator().manual_seed(seed)
    first = int(torch.randint(min(length, len(source)), (), generator=gen))
    return _numbers(first + length * torch.randperm((len(source) - 1 - first) // length + 1, generator=gen))


def _numbers(order: torch.Tensor) -> Sequence[int]:
    """Eight bytes a number, and no tensor at each look."""
    return array("q", order.numpy().tobytes())


_MAKERS: dict[Order, Callable[..., Sequence[int]]] = {
    Order.SHUFFLED: _shuffled,
    Order.SEQUENTIAL: _sequential,
    Order.BUCKETED: _bucketed,
    Order.TILED: _tiled,
}
