"""Attention that computes the blocks worth computing and no others (rows 43-50): the fast path of `attend` for sparse masks.

A mask's parts are of a few shapes, and each has its way. Bands and lists of blocks: each block of queries attends to the key blocks that
its rule names. Columns that all see: gathered once, laid behind the keys. Rows that see all: computed by themselves. A comb: positions are
sorted by their remainder, so that it becomes plain attention within each class; its softmax is joined with that of the rest by their sums
of exponentials.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from transept.core.shapes import Bool, Float, Int, Tensor
from transept.ops.masks import PAD, And, Bound, Causal, Columns, Full, Mask, Positions, Rows, Spans, Window, once
from transept.ops.patterns import Every

TILE = 128
STRIP = 32
"""How many of the columns that all see make one block: few, since of the last block before a query most are often not seen."""
SHORTEST = 512
"""Keys from which on a sparse plan can pay."""
WORTH = 0.6
"""The share of all pairs above which the dense way is as fast."""


@dataclass(frozen=True)
class Shapes:
    """A mask's parts by their shape; `band` holds what is computed block by block."""

    band: tuple[Mask, ...]
    columns: tuple[Mask, ...]
    rows: tuple[Mask, ...]
    comb: Every | None

    @staticmethod
    def of(mask: Mask) -> Shapes | None:
        """The parts of a mask, None where one has no sparse form."""
        band: list[Mask] = []
        columns: list[Mask] = []
        rows: list[Mask] = []
        combs: list[Every] = []
        for part in mask.parts():
            atoms = part.atoms()
            comb = _comb(atoms)
            if any(isinstance(atom, Rows) for atom in atoms):
                rows.append(part)
            elif comb is not None:
                combs.append(comb)
            elif any(isinstance(atom, Every) for atom in atoms):
                return None
            else:
                (columns if any(isinstance(atom, Columns) for atom in atoms) else band).append(part)
        return Shapes(tuple(band), tuple(columns), tuple(rows), combs[0] if combs else None) if len(combs) < 2 else None


def _comb(atoms: tuple[Mask, ...]) -> Every | None:
    """A comb within simple bounds is a comb with those bounds counted in its steps."""
    combs = [atom for atom in atoms if isinstance(atom, Every)]
    if len(combs) != 1:
        return None
    step, inner = combs[0].step, combs[0].inner
    for atom in atoms:
        if isinstance(atom, Causal):
            inner = And(Causal(), inner) if inner != Full() else atom
        elif isinstance(atom, Window):
            inner = And(inner, Window(-(-atom.size // step)))
        elif not isinstance(atom, (Every, Full)):
            return None
    return Every(step, inner)


@dataclass(frozen=True)
class Plan:
    """What to compute: for each block of `tile` queries its key blocks and their mask (None: all of it); `columns` stand behind the keys
    as more blocks, `strip` of them in each; `rows` are computed by themselves under `rows_mask`; `comb` is attention within the classes of
    `step`."""

    tile: int
    strip: int
    tiles: tuple[tuple[tuple[int, ...], Bool[Tensor, "_ 1 _ _"] | None], ...]
    columns: Int[Tensor, "c"]
    rows: Int[Tensor, "r"]
    rows_mask: Bool[Tensor, "_ 1 r s"] | None
    step: int
    comb: Bound | None


def worth(mask: Bound) -> Plan | None:
    """The plan of a mask if it saves work; None where the dense way is as good. Made once for all layers that share the mask."""
    if len(mask.k) < SHORTEST or len(mask.q) < TILE or mask.q.index.is_meta or mask.k.document is not None:
        return None
    return once(mask.memo, "plan", lambda: plan(mask, mask.mask.grain() or TILE, WORTH))


def plan(mask: Bound, tile: int, share: float = 1.0) -> Plan | None:
    """The plan with blocks of `tile`; None where the mask has no sparse form, or needs more than `share` of all pairs."""
    shapes = Shapes.of(mask.mask)
    if shapes is None or (shapes.comb is not None and not _aligned(mask)):
        return None
    q, k = mask.q.index, mask.k.index
    columns, rows = _chosen(shapes.columns, Columns, k), _chosen(shapes.rows, Rows, q)
    strip = min(tile, STRIP)
    spans = Spans.of(q, tile), _joined(Spans.of(k, tile), Spans.of(k[:, columns], strip) if len(columns) else None)
    near, whole = _maps(shapes, q, k, tile, spans)
    first = -(-k.shape[1] // tile)
    area = (int(near[:, :first].sum()) * tile + int(near[:, first:].sum()) * strip) * tile + len(rows) * k.shape[1]
    area += q.shape[1] * k.shape[1] // shapes.comb.step if shapes.comb else 0
    if area > share * q.shape[1] * k.shape[1]:
        return None
    maker = _Maker(shapes, (q, k, columns), tile, strip, _shifts(shapes, mask, tile))
    tiles = tuple(maker.tile(i, near[i], whole[i]) for i in range(len(near)))
    rows_mask = Bound(mask.mask, Positions(q[:, rows], None), mask.k).dense if len(rows) else None
    step, comb = (shapes.comb.step, _class_bound(mask, shapes.comb)) if shapes.comb else (1, None)
    return Plan(tile, strip, tiles, columns, rows, rows_mask, step, comb)


def _chosen(parts: tuple[Mask, ...], kind: type[Columns] | type[Rows], index: Tensor) -> Int[Tensor, "c"]:
    """The columns that such a rule names in any row of the batch."""
    rules = [atom for part in parts for atom in part.atoms() if isinstance(atom, kind)]
    found = torch.zeros(index.shape[1], dtype=torch.bool, device=index.device)
    for rule in rules:
        found |= (rule.chosen(index) & (index != PAD)).any(0)
    return found.nonzero()[:, 0]


def _joined(a: Spans, b: Spans | None) -> Spans:
    return a if b is None else Spans(torch.cat((a.low, b.low)), torch.cat((a.high, b.high)))


def _maps(shapes: Shapes, q: Tensor, k: Tensor, tile: int, spans: tuple[Spans, Spans]) -> tuple[Bool[Tensor, "m n"], Bool[Tensor, "m n"]]:
    """Which pairs of blocks may hold an allowed pair, and which hold allowed pairs only; the blocks of columns come last."""
    rows, keys = spans
    first = -(-k.shape[1] // tile)
    near = torch.zeros(len(rows.low), len(keys.low), dtype=torch.bool, device=q.device)
    whole = near.clone()
    for part in shapes.band:
        near[:, :first] |= part.blocks(rows, keys)[:, :first]
        whole[:, :first] |= part.whole(rows, keys)[:, :first]
    for part in shapes.columns:
        near[:, first:] |= part.blocks(rows, keys)[:, first:]
        rest = [atom.whole(rows, keys)[:, first:] for atom in part.atoms() if not isinstance(atom, Columns)]
        if len(k) == 1 and len(shapes.columns) == 1:
            whole[:, first:] |= functools.reduce(torch.logical_and, rest, torch.ones_like(whole[:, first:]))
    for part in shapes.band:
        whole[:, first:] &= ~part.blocks(rows, keys)[:, first:]
    real = (rows.low <= rows.high)[:, None] & (keys.low <= keys.high)
    full = _full(q, tile)[:, None] & torch.cat((_full(k, tile), near.new_ones(len(keys.low) - first)))
    return near & real, whole & full & (shapes.comb is None)


def _full(index: Int[Tensor, "b t"], tile: int) -> Bool[Tensor, "m"]:
    """True where a block has a token in every column of every row; the last block may be short."""
    missing = F.pad((index == PAD).any(0), (0, -index.shape[1] % tile))
    return ~missing.view(-1, tile).any(1)


def _shifts(shapes: Shapes, mask: Bound, tile: int) -> bool:
    """True if the mask of two blocks depends on how far apart they are only."""
    rules = (*shapes.band, *((shapes.comb,) if shapes.comb else ()))
    period = math.lcm(*(rule.period() for rule in rules))
    return period > 0 and tile % period == 0 and mask.q.first is not None and mask.q.first == mask.k.first


@dataclass
class _Maker:
    """Makes the masks of blocks, each kind once where they only shift."""

    shapes: Shapes
    index: tuple[Tensor, Tensor, Tensor]
    size: int
    strip: int
    shifts: bool
    made: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def tile(self, i: int, near: Tensor, whole: Tensor) -> tuple[tuple[int, ...], Bool[Tensor, "b 1 t s"] | None]:
        """The key blocks of one block of queries, those without an allowed pair dropped, and the mask over them."""
        q, k, columns = self.index
        first = -(-k.shape[1] // self.size)
        rows = q[:, i * self.size : (i + 1) * self.size]
        ids, masks, full = [], [], whole.tolist()
        for j in near.nonzero()[:, 0].tolist():
            at = j * self.size if j < first else (j - first) * self.strip
            keys = k[:, at : at + self.size] if j < first else k[:, columns[at : at + self.strip]]
            if full[j]:
                allowed = rows.new_ones(1, rows.shape[1], keys.shape[1], dtype=torch.bool)
            elif self.shifts and j < first:
                key = (j - i, rows.shape[1], keys.shape[1])
                allowed = once(self.made, key, lambda keys=keys: _allowed(self.shapes, rows[:, :, None], keys[:, None, :], True))
            else:
                allowed = _allowed(self.shapes, rows[:, :, None], keys[:, None, :], j < first)
            if full[j] or allowed.any():
                ids.append(j)
                masks.append(allowed)
        if all(full[j] for j in ids):
            return tuple(ids), None
        batch = max(len(m) for m in masks)
        return tuple(ids), torch.cat([m.expand(batch, -1, -1) for m in masks], 2)[:, None]


def _allowed(shapes: Shapes, q: Tensor, k: Tensor, banded: bool) -> Bool[Tensor, "b t s"]:
    """The pairs that this shape computes: no pair is counted in two."""
    band = torch.zeros(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool, device=q.device)
    for part in shapes.band:
        band = band | part.allow(q, k)
    if not banded:
        columns = torch.zeros_like(band)
        for part in shapes.columns:
            columns = columns | part.allow(q, k)
        band = columns & ~band
    if shapes.comb is not None:
        band = band & ~shapes.comb.allow(q, k)
    return band & (k != PAD) & (q != PAD)


def _aligned(mask: Bound) -> bool:
    """True if column i stands at position i, or at none: what sorting by remainder needs."""
    if len(mask.q) != len(mask.k):
        return False
    if mask.q.first is not None and mask.k.first is not None:
        return mask.q.first == mask.k.first == 0
    at = torch.arange(len(mask.q), device=mask.q.index.device)
    return all(bool(((x.index == at) | (x.index == PAD)).all()) for x in (mask.q, mask.k))


def _class_bound(mask: Bound, comb: Every) -> Bound:
    """The comb's own rule laid over the classes: row (b, c) counts the steps of remainder c."""
    if mask.q.first is not None and mask.k.first is not None and len(mask.q) % comb.step == 0:
        where = Positions.span(0, len(mask.q) // comb.step, mask.q.index.device)
        return Bound(comb.inner, where, where)
    rows = [torch.where(x.index == PAD, PAD, x.index // comb.step) for x in (mask.q, mask.k)]
    q, k = (
        Positions(_classes(F.pad(x, (0, -x.shape[1] % comb.step), value=PAD)[:, None, :, None], comb.step)[:, 0, :, 0], None) for x in rows
    )
    return Bound(comb.inner, q, k)


def _classes(x: Tensor, step: int) -> Tensor:
    """[b h t e] -> [b*step h t/step e]: positions of one remainder side by side."""
    return x.unflatten(2, (-1, step)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _unclasses(x: Tensor, step: int) -> Tensor:
    """The inverse of `_classes`."""
    return x.unflatten(0, (-1, step)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def attend_plan(
    q: Float[Tensor, "b h t e"], k: Float[Tensor, "b k s e"], v: Float[Tensor, "b k s f"], found: Plan, scale: float
) -> Float[Tensor, "b h t f"]:
    """Attention by a plan, equal to the dense way under the plan's mask."""
    if found.comb is None:
        y = _tiles(q, k, v, found, scale)
    elif all(not ids for ids, _ in found.tiles):
        y = _comb_alone(q, k, v, found, found.comb, scale)
    else:
        y = _joint(q, k, v, found, found.comb, scale)
    if found.rows_mask is not None:
        seers = _fused(q[:, :, found.rows], k, v, found.rows_mask, scale)
        y = y.index_copy(2, found.rows, seers)
    return y


def _fused(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=grouped)


def _blocks(x: Tensor, found: Plan) -> list[Tensor]:
    """The keys' blocks, then those of the gathered columns. Splitting, unlike slicing, has a gradient of linear cost."""
    blocks = list(x.split(found.tile, 2))
    return blocks + (list(x.index_select(2, found.columns).split(found.strip, 2)) if len(found.columns) else [])


def _tiles(q: Tensor, k: Tensor, v: Tensor, found: Plan, scale: float) -> Tensor:
    keys, values = _blocks(k, found), _blocks(v, found)
    out = []
    for rows, (ids, allowed) in zip(q.split(found.tile, 2), found.tiles, strict=True):
        if not ids:
            out.append(rows.new_zeros(*rows.shape[:3], v.shape[3]))
            continue
        out.append(_fused(rows, torch.cat([keys[j] for j in ids], 2), torch.cat([values[j] for j in ids], 2), allowed, scale))
    return torch.cat(out, 2)


def _padded(x: Tensor, step: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[2] % step))


def _comb_alone(q: Tensor, k: Tensor, v: Tensor, found: Plan, bound: Bound, scale: float) -> Tensor:
    t = q.shape[2]
    q, k, v = (_classes(_padded(x, found.step), found.step) for x in (q, k, v))
    inner = worth(bound)
    if inner is not None:
        y = attend_plan(q, k, v, inner, scale)
    else:
        y = _fused(q, k, v, None if bound.everything or bound.triangle else _spread(bound, len(q)), scale, causal=bound.triangle)
    return _unclasses(y, found.step)[:, :, :t]


def _spread(bound: Bound, rows: int) -> Bool[Tensor, "b 1 t s"]:
    """The dense mask of the classes, repeated for every row of the batch where they share it."""
    dense = bound.dense
    return dense if len(dense) in (1, rows) else dense.repeat(rows // len(dense), 1, 1, 1)


def _joint(q: Tensor, k: Tensor, v: Tensor, found: Plan, bound: Bound, scale: float) -> Tensor:
    """Two softmaxes over disjoint keys joined into one over all."""
    y, mass = _tiles_weighed(q, k, v, found, scale)
    classes = [_classes(_padded(x, found.step), found.step) for x in (q, k, v)]
    inner = worth(bound)
    if inner is not None and inner.comb is None and inner.rows_mask is None:
        pair = _tiles_weighed(classes[0], classes[1], classes[2], inner, scale)
    else:
        pair = _weighed(classes[0], classes[1], classes[2], None if bound.everything else _spread(bound, len(classes[0])), scale)
    comb, comb_mass = (_unclasses(x, found.step)[:, :, : q.shape[2]] for x in pair)
    total = torch.logaddexp(mass, comb_mass).clamp(min=torch.finfo(mass.dtype).min)
    return y * (mass - total).exp() + comb * (comb_mass - total).exp()


def _tiles_weighed(q: Tensor, k: Tensor, v: Tensor, found: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """The blocks of a plan, and each query's sum of exponentials."""
    keys, values = _blocks(k, found), _blocks(v, found)
    parts = []
    for rows, (ids, allowed) in zip(q.split(found.tile, 2), found.tiles, strict=True):
        if ids:
            parts.append(_weighed(rows, torch.cat([keys[j] for j in ids], 2), torch.cat([values[j] for j in ids], 2), allowed, scale))
        else:
            parts.append((rows.new_zeros(*rows.shape[:3], v.shape[3]), rows.new_full((*rows.shape[:3], 1), float("-inf"))))
    y, mass = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return y, mass


def _weighed(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of the sum of exponentials of each query; -inf where it may attend to nothing."""
    group = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        return _weighed_fused(q, k, v, allowed, scale)
    b, h, t, e = q.shape
    scores = (q * scale).reshape(b, h // group, group * t, e) @ k.transpose(-1, -2)
    scores = scores.view(b, h, t, -1)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    mass = scores.logsumexp(-1, keepdim=True)
    weights = (scores - mass.clamp(min=torch.finfo(mass.dtype).min)).exp()
    return (weights.view(b, h // group, group * t, -1) @ v).view(b, h, t, -1), mass


def _weighed_fused(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The same where no gradient is asked for: torch's fused kernel keeps the sums for itself, but gives them here."""
    added = None if allowed is None else torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, float("-inf"))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    y, mass = fused(q, k, v, attn_mask=added, scale=scale)
    mass = mass[..., None].to(q.dtype)
    return y, mass if allowed is None else mass.masked_fill(~allowed.any(-1, keepdim=True), float("-inf"))
