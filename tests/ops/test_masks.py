"""The algebra of masks against double loops over positions: allow, covers, trim, reach, dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counts import count
from transept.ops.masks import PAD, Bound, Box, Causal, Full, Global, Mask, Positions, Window

Rule = Callable[[int, int], bool]
Pair = tuple[Mask, Rule]
MANY = settings(max_examples=count(2000))


def made(tree: Any) -> Pair:
    """A mask and its rule from a description: the run-time type checker draws random numbers, which a strategy must not."""
    match tree:
        case "full":
            return Full(), lambda i, j: True
        case "causal":
            return Causal(), lambda i, j: j <= i
        case int(size):
            return Window(size), lambda i, j: abs(i - j) < size
        case list(index):
            return Global(tuple(index)), lambda i, j: i in index or j in index
        case (word, left, right):
            (a, f), (b, g) = made(left), made(right)
            return (a & b, lambda i, j: f(i, j) and g(i, j)) if word == "and" else (a | b, lambda i, j: f(i, j) or g(i, j))
    raise AssertionError(tree)


LEAVES = st.one_of(st.sampled_from(["full", "causal"]), st.integers(1, 9), st.lists(st.integers(0, 14), min_size=1, max_size=3))
# Descriptions of masks of up to eight leaves.
MASKS = st.recursive(LEAVES, lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner), max_leaves=8)
CORNERS = st.tuples(st.integers(0, 8), st.integers(1, 7), st.integers(0, 8), st.integers(1, 7))


def box_of(corners: tuple[int, int, int, int]) -> Box:
    q0, t, k0, s = corners
    return Box(q0, t, k0, s)


def cells(box: Box) -> list[tuple[int, int]]:
    return [(i, j) for i in range(box.q0, box.q0 + box.t) for j in range(box.k0, box.k0 + box.s)]


@MANY
@given(MASKS, CORNERS)
def test_allow_is_the_rule(tree: Any, corners: tuple[int, int, int, int]) -> None:
    box = box_of(corners)
    mask, rule = made(tree)
    q, k = torch.arange(box.q0, box.q0 + box.t)[:, None], torch.arange(box.k0, box.k0 + box.s)[None]
    assert mask.allow(q, k).expand(box.t, box.s).flatten().tolist() == [rule(i, j) for i, j in cells(box)]


@MANY
@given(MASKS, CORNERS)
def test_covers_never_says_too_much(tree: Any, corners: tuple[int, int, int, int]) -> None:
    """True only if every pair of the box is allowed."""
    box = box_of(corners)
    mask, rule = made(tree)
    if mask.covers(box):
        assert all(rule(i, j) for i, j in cells(box))


@MANY
@given(CORNERS, st.integers(1, 9))
def test_covers_of_the_plain_rules_is_exact(corners: tuple[int, int, int, int], size: int) -> None:
    """For one rule, and for two joined by &, it says all that is so."""
    box = box_of(corners)
    plain = [made(tree) for tree in ("full", "causal", size, ("and", "causal", size))]
    for mask, rule in plain:
        assert mask.covers(box) == all(rule(i, j) for i, j in cells(box))


@MANY
@given(MASKS, CORNERS)
def test_trim_is_equal_on_the_box(tree: Any, corners: tuple[int, int, int, int]) -> None:
    box = box_of(corners)
    mask, rule = made(tree)
    trimmed = mask.trim(box)
    q, k = torch.arange(box.q0, box.q0 + box.t)[:, None], torch.arange(box.k0, box.k0 + box.s)[None]
    assert trimmed.allow(q, k).expand(box.t, box.s).flatten().tolist() == [rule(i, j) for i, j in cells(box)]
    assert not mask.covers(box) or trimmed == Full()


@MANY
@given(MASKS)
def test_nothing_behind_the_reach_is_allowed(tree: Any) -> None:
    """A ring cache keeps `reach` columns: no query may want an older one."""
    mask, rule = made(tree)
    reach = mask.reach()
    if reach is not None:
        assert not any(rule(i, j) for i in range(30) for j in range(i + 1) if i - j >= reach)


@MANY
@given(st.integers(1, 9), st.integers(1, 9))
def test_reach_of_windows_is_exact(a: int, b: int) -> None:
    assert (Causal() & Window(a)).reach() == a
    assert (Window(a) & Window(b)).reach() == min(a, b)
    assert (Window(a) | Window(b)).reach() == max(a, b)
    assert (Window(a) | Global((0,))).reach() is None
    assert Causal().reach() is None and Full().reach() is None


POSITIONS = st.lists(st.integers(-1, 9), min_size=1, max_size=6)


@MANY
@given(MASKS, st.lists(st.tuples(POSITIONS, POSITIONS), min_size=1, max_size=3))
def test_dense_is_the_rule_on_real_tokens(tree: Any, rows: list[tuple[list[int], list[int]]]) -> None:
    """Whatever the positions, in any order and with padding: True where both tokens are there and the rule allows it."""
    mask, rule = made(tree)
    t, s = min(len(q) for q, _ in rows), min(len(k) for _, k in rows)
    q = Positions(torch.tensor([r[0][:t] for r in rows]), None)
    k = Positions(torch.tensor([r[1][:s] for r in rows]), None)
    dense = Bound(mask, q, k).dense
    assert dense.shape == (len(rows), 1, t, s)
    for b, (qs, ks) in enumerate(rows):
        for i in range(t):
            for j in range(s):
                there = qs[i] != PAD and ks[j] != PAD
                assert bool(dense[b, 0, i, j]) == (there and rule(qs[i], ks[j]))


@MANY
@given(MASKS, CORNERS)
def test_short_cuts_agree_with_dense(tree: Any, corners: tuple[int, int, int, int]) -> None:
    """Where a bound mask says "everything" or "triangle", the dense boolean is that."""
    box = box_of(corners)
    mask, _ = made(tree)
    bound = Bound(mask, Positions.span(box.q0, box.t), Positions.span(box.k0, box.s))
    if bound.everything:
        assert bound.dense.all()
    if bound.triangle:
        assert torch.equal(bound.dense[0, 0], torch.ones(box.t, box.s).tril().bool())
    unknown = Bound(mask, Positions(bound.q.index, None), Positions(bound.k.index, None))
    assert torch.equal(bound.dense, unknown.dense) and not unknown.everything and not unknown.triangle


@MANY
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3), st.integers(0, 9))
def test_positions_count_the_real_tokens(rows: list[list[bool]], start: int) -> None:
    index = Positions.of(torch.tensor(rows), start).index.tolist()
    for row, found in zip(rows, index, strict=True):
        at = start
        for real, position in zip(row, found, strict=True):
            assert position == (at if real else PAD)
            at += real
