"""Sparse attention computes what the dense mask says: values, gradients, and the blocks that a mask names, at many shapes (rows 43-50)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.counts import FULL
from transept.ops.attention import attend, reference
from transept.ops.masks import PAD, Bound, Causal, Full, Global, Mask, PerHead, Positions, Spans, Window
from transept.ops.patterns import Dilated, Every, Fixed, Listed, Marked, Random, Segment, Strided, Summary
from transept.ops.sparse import attend_plan, plan, worth

C = Causal()
LISTED = Listed(16, ((0, 3), (1,), (0, 1, 2, 12), (3,), (), (5, 6), (0, 12), (7,), (8, 1), (9,), (10, 11), (0,), tuple(range(13))))
MASKS: dict[str, Mask] = {
    "window": Window(9),
    "causal window": C & Window(20),
    "longformer": Window(9) | Global((0, 5)),
    "causal with global": C & (Window(10) | Global((0,))),
    "bigbird": Window(24) | Global((0, 1, 2, 77)) | Random(16, 3, 13, 1),
    "strided": Strided(12),
    "causal strided": C & Strided(12),
    "fixed": Fixed(12, 3),
    "causal fixed": C & Fixed(12, 2),
    "dilated": Dilated(5, 3),
    "causal dilated": C & Dilated(5, 3),
    "dilated with global": Dilated(5, 3) | Global((0,)),
    "listed": LISTED,
}
# (rows, length, heads, kv_heads, block, padding)
SHAPES = [
    (1, 208, 2, 2, 16, None),
    (2, 192, 4, 2, 16, None),
    (2, 200, 4, 1, 32, None),
    (1, 97, 3, 3, 8, None),
    (2, 192, 2, 2, 16, "right"),
    (3, 130, 4, 2, 16, "right"),
    (2, 77, 4, 4, 32, "right"),
    (2, 208, 2, 1, 16, "left"),
    (3, 150, 4, 4, 16, "left"),
    (1, 64, 2, 2, 64, None),
    (2, 33, 2, 2, 16, "empty"),
    (1, 205, 8, 2, 24, None),
]


def positions(rows: int, length: int, padding: str | None) -> Positions:
    if padding is None:
        return Positions.span(0, length)
    real = torch.ones(rows, length, dtype=torch.bool)
    if padding == "empty":
        real[1] = False
    else:
        short = length // 3
        real[1, : short if padding == "left" else None] = False if padding == "left" else True
        if padding == "right":
            real[1, length - short :] = False
    return Positions.of(real)


def inputs(rows: int, length: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(rows, h, length, 16, generator=gen, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    return q, k, v


def slow(mask: Mask, q: int, k: int) -> bool:
    """The patterns again, one pair at a time, from the papers' words."""
    match mask:
        case Full():
            return True
        case Causal():
            return k <= q
        case Window(size=n):
            return abs(q - k) < n
        case Global(index=index):
            return q in index or k in index
        case Strided(stride=n):
            return abs(q - k) < n or (q - k) % n == 0
        case Fixed(stride=n, summary=c):
            return q // n == k // n or k % n in range(n - c, n)
        case Dilated(size=n, step=d):
            return abs(q - k) % d == 0 and abs(q - k) // d < n
        case Listed(block=n, table=table):
            return k // n in table[q // n]
        case Random():
            return slow(mask.parts()[0], q, k)
    parts = [slow(part, q, k) for part in (getattr(mask, "left"), getattr(mask, "right"))]  # noqa: B009
    return all(parts) if type(mask).__name__ == "And" else any(parts)


@pytest.mark.parametrize("name", MASKS)
def test_a_pattern_is_what_its_paper_says(name: str) -> None:
    n = 90
    where = Positions.span(0, n)
    dense = Bound(MASKS[name], where, where).dense[0, 0]
    assert dense.tolist() == [[slow(MASKS[name], q, k) for k in range(n)] for q in range(n)]


# each pattern at all twelve shapes at full counts, at three of them otherwise, so that every shape and every pattern is met
CASES = [(name, shape) for i, name in enumerate(MASKS) for j, shape in enumerate(SHAPES) if FULL or (i + j) % 4 == 0]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_sparse_equals_dense(name: str, shape: tuple[int, int, int, int, int, str | None]) -> None:
    rows, length, heads, kv_heads, tile, padding = shape
    where = positions(rows, length, padding)
    mask = Bound(MASKS[name], where, where)
    found = plan(mask, tile, math.inf)
    if found is None:
        assert padding == "left" and any(isinstance(a, Every) for p in MASKS[name].parts() for a in p.atoms()), "only these have no plan"
        return
    q, k, v = inputs(rows, length, heads, kv_heads)
    expected = reference(q, k, v, mask=mask, scale=0.25)
    y = attend_plan(q, k, v, found, 0.25)
    assert (y - expected).abs().max() <= 1e-5
    with torch.no_grad():
        assert (attend_plan(q, k, v, found, 0.25) - expected).abs().max() <= 1e-5
    gen = torch.Generator().manual_seed(1)
    pull = torch.randn(y.shape, generator=gen)
    for mine, other in zip(
        torch.autograd.grad((y * pull).sum(), (q, k, v)), torch.autograd.grad((expected * pull).sum(), (q, k, v)), strict=True
    ):
        assert (mine - other).abs().max() <= 1e-5


@pytest.mark.parametrize("name", [n for n in MASKS if not any(isinstance(a, Every) for p in MASKS[n].parts() for a in p.atoms())])
@pytest.mark.parametrize(("tile", "padding"), [(8, None), (16, None), (24, "right"), (16, "left")])
def test_blocks_never_miss_a_pair(name: str, tile: int, padding: str | None) -> None:
    """`blocks` is True wherever the dense mask has a pair, `whole` only where it has all; alone and unpadded, a band's blocks are exact."""
    mask, where = MASKS[name], positions(2, 192, padding)
    dense = Bound(mask, where, where).dense.expand(len(where.index), 1, -1, -1)[:, 0]
    spans = Spans.of(where.index, tile)
    tiles = dense.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))
    some, every = tiles.any(4).any(2).any(0), tiles.all(4).all(2).all(0)
    near, whole = mask.blocks(spans, spans), mask.whole(spans, spans)
    assert not (some & ~near).any()
    if padding is None:
        assert not (whole & ~every).any()
    if padding is None and (isinstance(mask, Window | Listed) or name == "causal window"):
        assert torch.equal(some, near)


def test_the_plan_holds_the_exact_blocks() -> None:
    """No block of the plan is without an allowed pair, and the pairs of all blocks together are the mask."""
    for name in ("window", "longformer", "bigbird", "causal fixed", "listed"):
        where = Positions.span(0, 208)
        mask = Bound(MASKS[name], where, where)
        found = plan(mask, 16, math.inf)
        assert found is not None
        seen = torch.zeros(208, 208, dtype=torch.long)
        for i, (ids, allowed) in enumerate(found.tiles):
            at = 0
            for j in ids:
                columns = torch.arange(208)[j * 16 : (j + 1) * 16] if j < 13 else found.columns[(j - 13) * 16 : (j - 12) * 16]
                part = torch.ones(16, len(columns), dtype=torch.bool) if allowed is None else allowed[0, 0, :, at : at + len(columns)]
                assert part.any()
                seen[i * 16 : (i + 1) * 16, columns] += part
                at += len(columns)
        dense = mask.dense[0, 0].clone()
        seen[found.rows] = dense[found.rows] = 1
        assert torch.equal(seen, dense.long())


def test_attend_takes_the_sparse_way_by_itself() -> None:
    where = Positions.span(0, 1024)
    q, k, v = inputs(1, 1024, 2, 1)
    for mask in (C & Window(100), C & Fixed(128, 8), C & Strided(64), Dilated(20, 4), Window(60) | Global((0,))):
        bound = Bound(mask, where, where)
        assert worth(bound) is not None
        assert (attend(q, k, v, mask=bound, scale=0.25) - reference(q, k, v, mask=bound, scale=0.25)).abs().max() <= 1e-5
    assert worth(Bound(Full(), where, where)) is None
    assert worth(Bound(Window(900), where, where)) is None


def test_a_rule_for_each_head() -> None:
    """Strided and fixed heads beside each other (Child et al. 2019, eq. 9)."""
    where = Positions.span(0, 640)
    mask = Bound(PerHead((C & Window(32), C & Every(32), C & Segment(64), C & Summary(64, 4))), where, where)
    q, k, v = inputs(2, 640, 4, 2)
    y = attend(q, k, v, mask=mask, scale=0.25)
    assert (y - reference(q, k, v, mask=mask, scale=0.25)).abs().max() <= 1e-5
    assert mask.dense.shape == (1, 4, 640, 640)


def test_marked_tokens_differ_by_row() -> None:
    flags = torch.zeros(2, 1100, dtype=torch.bool)
    flags[0, :3] = flags[1, [0, 400, 401, 1099]] = True
    where = Positions.of(torch.arange(1100) < torch.tensor([[1100], [900]]))
    mask = Bound(Window(20) | Marked(flags), where, where)
    q, k, v = inputs(2, 1100, 2, 2)
    assert worth(mask) is not None
    y = attend(q, k, v, mask=mask, scale=0.25)
    assert (y - reference(q, k, v, mask=mask, scale=0.25)).abs().max() <= 1e-5
    assert mask.dense[0, 0, 300].nonzero().flatten().tolist() == [0, 1, 2, *range(281, 320)]
    assert mask.dense[1, 0, 100].nonzero().flatten().tolist() == [0, *range(81, 120), 400, 401]


@pytest.mark.parametrize("stride", [4, 8])
def test_two_steps_reach_every_earlier_token(stride: int) -> None:
    """The two heads of strided and of fixed attention composed connect each token with all earlier ones (Child et al. 2019, section 4.2).

    For the fixed form this holds of the keys of earlier segments through their summaries; the paper's A^(1) covers the rest.
    """
    n = 64
    where = Positions.span(0, n)

    def of(mask: Mask) -> Tensor:
        return Bound(mask, where, where).dense[0, 0].float()

    earlier = of(C)
    strided = of(C & Every(stride)) @ of(C & Window(stride))
    assert torch.equal(strided > 0, earlier > 0)
    fixed = of(C & (Segment(stride) | Summary(stride, 1)))
    two = (fixed @ fixed) > 0
    assert torch.equal(two, earlier > 0)


def test_random_blocks_are_drawn_once_by_their_seed() -> None:
    one, two = Random(8, 3, 20, seed=5), Random(8, 3, 20, seed=5)
    assert one.parts() == two.parts() and one.parts() != Random(8, 3, 20, seed=6).parts()
    (listed,) = one.parts()
    assert isinstance(listed, Listed) and all(len(set(row)) == 3 and max(row) < 20 for row in listed.table)
    assert PAD == -1
