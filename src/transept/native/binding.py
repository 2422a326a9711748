"""The native core from Python: weights as stored, caches in pages, programs of records, steps. Needs numpy only; torch is never imported.

A `Program` is a flat list of records over buffers [rows, width] of float32. Every record reads and writes views (columns of a
buffer) for one *row set* of a step: 0 its tokens, 1 the selected tokens, 2 one row per sequence, 3 another set that the caller
describes (a strided stem's output). Letters: t rows of a step, d width, h heads, e head width, p pages.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transept.core.errors import ConfigError, InputError, nearest
from transept.native.library import library

KINDS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "BF16": 30,
    "VECTOR": 100,
}
CACHE_KINDS = {"F32": 0, "F16": 1, "Q8": 2}
ACTS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "quick_gelu": 5, "relu2": 6, "sigmoid": 7, "tanh": 8}
OPS = ("embed", "angles", "linear", "norm", "rotary", "append", "attend", "element", "route", "experts", "gather", "pool", "unfold")
ELEMENTS = {"copy": 0, "add": 1, "multiply": 2, "gate": 3, "softcap": 4}
SCORES = {"softmax": 0, "sigmoid": 1, "softmax_chosen": 2}
POOLS = {"mean": 0, "max": 1, "first": 2, "last": 3}
TOKENS, SELECTED, SEQUENCES, OTHER = range(4)
PAGE = 16
PANEL = 16


class CView(ctypes.Structure):
    """Columns of a buffer, as the core sees them; buffer -1 is none."""

    _fields_ = [("buffer", ctypes.c_int32), ("at", ctypes.c_int32)]


class CRecord(ctypes.Structure):
    """One record, as the core sees it: op, row set, views a b c and y, weights, integers, floats."""

    _fields_ = [
        ("op", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("a", CView),
        ("b", CView),
        ("c", CView),
        ("y", CView),
        ("w", ctypes.c_int32 * 4),
        ("i", ctypes.c_int32 * 12),
        ("f", ctypes.c_float * 4),
    ]


class CWeight(ctypes.Structure):
    """A weight's kind, shape and memory."""

    _fields_ = [("kind", ctypes.c_int32), ("n", ctypes.c_int32), ("k", ctypes.c_int32), ("data", ctypes.c_void_p)]


class CCache(ctypes.Structure):
    """A cache's shape and memory."""

    _fields_ = [(name, ctypes.c_int32) for name in ("kv_heads", "head", "vhead", "kind", "latent", "space", "pages")] + [
        ("data", ctypes.c_void_p)
    ]


class CRows(ctypes.Structure):
    """One row set of a step."""

    _fields_ = [("n", ctypes.c_int32), ("sequence", ctypes.c_void_p), ("position", ctypes.c_void_p), ("starts", ctypes.c_void_p)]


class CSpace(ctypes.Structure):
    """The page tables of one cache space."""

    _fields_ = [("table", ctypes.c_void_p), ("stride", ctypes.c_int32), ("length", ctypes.c_void_p)]


class CBatch(ctypes.Structure):
    """What one step computes."""

    _fields_ = [
        ("rows", CRows * 4),
        ("ids", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        ("select", ctypes.c_void_p),
        ("space", CSpace * 2),
        ("sequences", ctypes.c_int32),
    ]


def _fail() -> ConfigError:
    return ConfigError(f"The native core refused: {library().transept_error().decode()}.")


def _choose(table: dict[str, int], name: str, what: str) -> int:
    if name not in table:
        raise ConfigError(f"{what} {name!r} is unknown, expected one of {', '.join(table)}{nearest(name, table)}.")
    return table[name]


def memory(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed, page-aligned memory for weights or caches, on large pages where the system grants them."""
    block = mmap.mmap(-1, max(1, nbytes))
    if nbytes >= 1 << 21 and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without large pages serves the same bytes
    return np.frombuffer(block, np.uint8, nbytes)


@dataclass(frozen=True)
class Raw:
    """A matrix [n, k] in its file's own bytes: `data` uint8 of n rows."""

    kind: str
    n: int
    k: int
    data: NDArray[np.uint8]


def raw(data: Any, kind: str | None = None, k: int | None = None) -> Raw:
    """Name a matrix's bytes. Float arrays or tensors [n, k] become `kind` F32 (default), F16 or BF16.

    Stored bytes [n, bytes] need `kind` and `k`.

    Errors: ConfigError for an unknown kind or bytes that do not match it.
    """
    if str(getattr(data, "dtype", "")) == "torch.bfloat16":
        data, kind = data.float(), kind or "BF16"
    array = np.asarray(data)
    if k is not None:
        code = _choose(KINDS, kind or "", "The weight kind")
        rows = np.ascontiguousarray(array).view(np.uint8).reshape(array.shape[0], -1)
        if library().transept_raw_bytes(code, rows.shape[0], k) != rows.nbytes:
            raise ConfigError(f"A {kind} weight of {rows.shape[0]} x {k} has {rows.nbytes} bytes, expected another number.")
        return Raw(kind or "", rows.shape[0], k, rows.reshape(-1))
    kind = kind or {"float16": "F16"}.get(str(array.dtype), "F32")
    if kind not in ("F32", "F16", "BF16") or array.ndim != 2:
        raise ConfigError(f"A float matrix [n, k] can be stored as F32, F16 or BF16, found {array.ndim} dimensions and kind {kind!r}.")
    values = np.ascontiguousarray(array, np.float16 if kind == "F16" else np.float32)
    if kind == "BF16":
        bits = values.view(np.uint32)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Raw(kind, array.shape[0], array.shape[1], values.view(np.uint8).reshape(-1))


@dataclass(frozen=True)
class Weight:
    """A weight ready to run: packed panels, or a plain float table (kind VECTOR). `data` may lie in a mapped file."""

    kind: str
    n: int
    k: int
    data: NDArray[Any]


def vector(data: Any) -> Weight:
    """A plain float table [k] or [n, k]: norm weights, biases, frequencies, attention biases, small embeddings."""
    array = np.ascontiguousarray(data, np.float32)
    table = array.reshape(-1, array.shape[-1])
    return Weight("VECTOR", table.shape[0], table.shape[1], table)


def packed_bytes(kind: str, n: int, k: int) -> int:
    """How many bytes the packed panels of a matrix [n, k] take.

    Errors: ConfigError where the kind does not hold rows of k.
    """
    panel = library().transept_panel_bytes(_choose(KINDS, kind, "The weight kind"), k)
    if panel < 0:
        raise ConfigError(f"A {kind} weight cannot have rows of {k}.")
    return -(-n // PANEL) * panel


def pack(*parts: Raw, gated: bool = False) -> Weight:
    """Repack matrices of one kind and k into one weight: stacked (outputs side by side), or, gated, pairs (gate, up) interleaved by panel.

    All parts but the last must have a multiple of 16 outputs (all of them where gated).
    """
    kind, k = parts[0].kind, parts[0].k
    for part in parts:
        if (part.kind, part.k) != (kind, k):
            raise ConfigError(f"Stacked weights must agree: found {part.kind} with rows of {part.k} beside {kind} with rows of {k}.")
    for i, part in enumerate(parts):
        if part.n % PANEL and (gated or i + 1 < len(parts)):
            raise ConfigError(f"Stacked weights need outputs in multiples of {PANEL}, found {part.n}.")
    if gated and (len(parts) % 2 or any(a.n != b.n for a, b in zip(parts[::2], parts[1::2], strict=True))):
        raise ConfigError("Gated weights come in pairs of equal shape (gate, up).")
    panel, n = packed_bytes(kind, 1, k), sum(part.n for part in parts)
    out, at = memory(packed_bytes(kind, n, k)), 0
    for i, part in enumerate(parts):
        start = at + (i % 2) * panel if gated else at
        stride = panel * (2 if gated else 1)
        if library().transept_pack(
            KINDS[kind], part.n, k, part.data.ctypes.data, part.data.nbytes, out.ctypes.data + start, out.nbytes - start, stride
        ):
            raise _fail()
        if not gated or i % 2:
            at += packed_bytes(kind, part.n, k) * (2 if gated else 1)
    return Weight(kind, n, k, out)


class Cache:
    """One layer's keys and values in pages of 16 tokens: `data` uint8 [pages, page_bytes], so that a page is copied or kept as a row.

    `kind` F32, F16 or Q8 (int8, one scale per token and head). A latent cache keeps one vector of `head` per token whose first
    `vhead` columns are its values (multi-head latent attention, DeepSeek-V2). `space` 0 is a sequence's own pages, 1 its memory's.
    """

    def __init__(
        self, kv_heads: int, head: int, pages: int, *, vhead: int | None = None, kind: str = "F32", latent: bool = False, space: int = 0
    ) -> None:
        self.kv_heads, self.head, self.vhead, self.pages = kv_heads, head, vhead or head, pages
        self.kind, self.latent, self.space = kind, latent, space
        shape = CCache(kv_heads, head, self.vhead, _choose(CACHE_KINDS, kind, "The cache kind"), int(latent), space, pages, None)
        self.page_bytes = library().transept_cache_page_bytes(ctypes.byref(shape))
        if self.page_bytes <= 0 or pages < 0:
            raise ConfigError(f"A cache of {kv_heads} heads of {head} and {self.vhead} in space {space} is not one the native core holds.")
        self.data = memory(self.page_bytes * pages).reshape(pages, self.page_bytes)
        shape.data = self.data.ctypes.data
        self.shape = shape


class Team:
    """`threads` threads (the caller is one of them) that run the steps of any number of plans, one step at a time."""

    def __init__(self, threads: int) -> None:
        self._free = library().transept_team_free
        self.handle = library().transept_team_new(threads)
        if not self.handle:
            raise _fail()
        self.threads = threads

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._free(self.handle)


@dataclass(frozen=True)
class View:
    """Columns [at, at + width) of a buffer."""

    buffer: int
    at: int
    width: int

    def columns(self, at: int, width: int) -> View:
        """A narrower view inside this one."""
        if at < 0 or width < 1 or at + width > self.width:
            raise ConfigError(f"Columns {at}..{at + width} lie outside a view of {self.width}.")
        return View(self.buffer, self.at + at, width)


@dataclass
class Program:
    """Collects the records of a plan; each method adds one record and returns its output view. `rows` names the row set."""

    max_rows: int = 512
    records: list[CRecord] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    label: str = ""

    def buffer(self, width: int) -> View:
        """A new buffer [max_rows, width] of float32."""
        self.widths.append(width)
        return View(len(self.widths) - 1, 0, width)

    def _index(self, pool: list[Any], item: Any) -> int:
        for i, known in enumerate(pool):
            if known is item:
                return i
        pool.append(item)
        return len(pool) - 1

    def _add(
        self,
        op: str,
        rows: int,
        views: Sequence[View | None],
        w: Sequence[Weight | None] = (),
        i: Sequence[int] = (),
        f: Sequence[float] = (),
    ) -> View:
        record = CRecord(OPS.index(op), rows)
        for name, view in zip("abcy", views, strict=True):
            setattr(record, name, CView(view.buffer, view.at) if view else CView(-1, 0))
        for slot in range(4):
            weight = w[slot] if slot < len(w) else None
            record.w[slot] = -1 if weight is None else self._index(self.weights, weight)
        for slot, value in enumerate(i):
            record.i[slot] = int(value)
        for slot, number in enumerate(f):
            record.f[slot] = float(number)
        self.records.append(record)
        self.labels.append(self.label or op)
        out = views[3]
        if out is None:
            raise ConfigError(f"The record {self.label or op} names no output.")
        return out

    def embed(
        self, table: Weight, out: View, *, source: str = "ids", offset: int = 0, add: bool = False, scale: float = 1.0, rows: int = TOKENS
    ) -> View:
        """out [t d] = (out +) scale * table[number + offset]; `source` ids, positions or segments. Any weight kind, or a vector table."""
        code = _choose({"ids": 0, "positions": 1, "segments": 2}, source, "The embedding source")
        return self._add("embed", rows, (None, None, None, out), (table,), (code, offset, add), (scale,))

    def angles(self, inv_freq: Weight, out: View, *, scale: float = 1.0, rows: int = TOKENS) -> View:
        """out [t 2n] = scale * (cos(position * inv_freq), sin(position * inv_freq)); once per step and kind of rotary."""
        return self._add("angles", rows, (None, None, None, out), (inv_freq,), (), (scale,))

    def linear(
        self,
        x: View,
        weight: Weight,
        out: View,
        *,
        bias: Weight | None = None,
        act: str = "none",
        gated: bool = False,
        residual: View | None = None,
        alpha: float = 1.0,
        int8: bool = False,
        groups: int = 1,
        group_in: int = 0,
        group_out: int = 0,
        rows: int = TOKENS,
    ) -> View:
        """out = residual + alpha * act(x W + bias); gated: act(x W_gate + b) * (x W_up + b). `int8` quantises x by blocks of 32.

        With groups g, output columns g * group_out read input columns g * group_in (per-head matrices, absorbed latent attention).
        A gated weight comes from `pack(gate, up, gated=True)`; its bias from `gated_bias`.
        """
        ints = (_choose(ACTS, act, "The activation"), int8, gated, groups, group_out, group_in)
        return self._add("linear", rows, (x, residual, None, out), (weight, bias), ints, (alpha,))

    def norm(
        self,
        x: View,
        out: View,
        weight: Weight | None,
        bias: Weight | None = None,
        *,
        eps: float,
        layer: bool = False,
        count: int = 1,
        rows: int = TOKENS,
    ) -> View:
        """RMSNorm, or LayerNorm where `layer`, of `count` vectors lying side by side (heads). In place allowed."""
        return self._add("norm", rows, (x, None, None, out), (weight, bias), (layer, count, out.width // count), (eps,))

    def rotary(
        self, x: View, angles: View, *, heads: int, width: int | None = None, start: int = 0, interleaved: bool = False, rows: int = TOKENS
    ) -> View:
        """Rotate, in place, `width` columns from `start` of each head by the angles [t width] (half-split pairs, or neighbours)."""
        head = x.width // heads
        return self._add("rotary", rows, (x, angles, None, x), (), (heads, head, width or head - start, start, interleaved))

    def append(self, cache: Cache, k: View, v: View | None = None, *, rows: int = TOKENS) -> View:
        """Write keys [t h e] and values to the pages at each row's position. Latent: k the latent [t r], v the rotated key."""
        return self._add("append", rows, (k, v, None, k), (), (self._index(self.caches, cache),))

    def attend(
        self,
        cache: Cache,
        q: View,
        out: View,
        *,
        heads: int,
        scale: float,
        left: int = -1,
        right: int = 0,
        cap: float = 0.0,
        bias: Weight | None = None,
        bias_zero: int = 0,
        rows: int = TOKENS,
    ) -> View:
        """Softmax attention of q [t h e] over the cache; key j is seen by position i where i - left <= j <= i + right (-1: no limit).

        Causal: right=0; window w: left=w-1; all of a memory: right=-1. `cap` squashes scores by tanh; `bias` [heads n] is read at
        clamp(j - i + bias_zero). Writes [t h vhead].
        """
        ints = (self._index(self.caches, cache), heads, left, right, bias_zero)
        return self._add("attend", rows, (q, None, None, out), (bias,), ints, (scale, cap))

    def element(
        self,
        kind: str,
        a: View,
        out: View,
        b: View | Weight | None = None,
        *,
        act: str = "none",
        alpha: float = 1.0,
        count: int = 1,
        strides: tuple[int, int, int] = (0, 0, 0),
        rows: int = TOKENS,
    ) -> View:
        """copy: alpha * act(a); add: a + alpha * b; multiply: alpha * a * b; gate: act(a) * b; softcap: alpha * tanh(a / alpha).

        `count` pieces of out.width // count (or of `out.width` where strides are given) at the strides of a, b and out.
        """
        width = out.width if any(strides) else out.width // count
        a_step, b_step, y_step = strides if any(strides) else (width, width, width)
        ints = (_choose(ELEMENTS, kind, "The elementwise op"), width, count, a_step, b_step, y_step, _choose(ACTS, act, "The activation"))
        second = b if isinstance(b, View) else None
        return self._add("element", rows, (a, second, None, out), (b if isinstance(b, Weight) else None,), ints, (alpha,))

    def route(
        self,
        scores: View,
        out: View,
        *,
        top: int,
        score: str = "softmax",
        correction: Weight | None = None,
        groups: int = 1,
        keep: int = 1,
        best_two: bool = False,
        normalise: bool = False,
        scale: float = 1.0,
        eps: float = 0.0,
        rows: int = TOKENS,
    ) -> View:
        """Choose `top` experts per row: out [t 2 top] = their numbers, then their weights.

        Scores pass softmax, sigmoid, or softmax over the chosen; the choice adds `correction`, and sees only the `keep` best of
        `groups` (by best score, or the sum of the best two); weights are (divided by their sum + eps and) times `scale`.
        """
        ints = (scores.width, top, _choose(SCORES, score, "The router score"), groups, keep, normalise, best_two)
        return self._add("route", rows, (scores, None, None, out), (correction,), ints, (scale, eps))

    def experts(
        self,
        x: View,
        routing: View,
        up: Weight,
        down: Weight,
        out: View,
        *,
        experts: int,
        act: str,
        gated: bool = True,
        residual: View | None = None,
        bias_up: Weight | None = None,
        bias_down: Weight | None = None,
        int8: bool = False,
        rows: int = TOKENS,
    ) -> View:
        """out = residual + sum over the routed experts of weight * down(act(gate x) * up x); weights stacked over experts by `pack`."""
        ints = (experts, routing.width // 2, _choose(ACTS, act, "The activation"), int8, gated)
        return self._add("experts", rows, (x, routing, residual, out), (up, down, bias_up, bias_down), ints)

    def gather(self, x: View, out: View) -> View:
        """out [selected d] = x[select]: the rows whose logits are wanted."""
        return self._add("gather", SELECTED, (x, None, None, out), (), (out.width,))

    def pool(self, x: View, out: View, *, kind: str = "mean", source: int = TOKENS) -> View:
        """out [sequences d]: mean, max, first or last of each sequence's rows."""
        return self._add("pool", SEQUENCES, (x, None, None, out), (), (source, _choose(POOLS, kind, "The pooling"), out.width))

    def unfold(self, x: View, out: View, *, kernel: int, stride: int, pad: int, source: int = TOKENS, rows: int = OTHER) -> View:
        """out [frames kernel*c]: the windows of a one-dimensional convolution, zeros outside the sequence; a linear follows."""
        return self._add("unfold", rows, (x, None, None, out), (), (kernel, stride, pad, x.width, source))

    def build(self, team: Team, isa: str = "") -> Plan:
        """Check every record and allocate the buffers.

        Errors: ConfigError that names the record and what is wrong with it.
        """
        return Plan(self, team, isa)


def gated_bias(gate: Any, up: Any) -> Weight:
    """The bias of a gated linear [2n], in the order of its interleaved panels."""
    pair = np.stack([np.asarray(gate, np.float32).reshape(-1, PANEL), np.asarray(up, np.float32).reshape(-1, PANEL)], 1)
    return vector(pair.reshape(-1))


def exp_sum(x: NDArray[np.float32], most: float) -> float:
    """The sum over x [n] of exp(x - most); negative where $TRANSEPT_ISA names what does not run here."""
    x = np.ascontiguousarray(x, np.float32)
    return library().transept_exp_sum(_address(x), x.size, most)


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.__array_interface__["data"][0]


def _ints(values: ArrayLike | None) -> NDArray[np.int32] | None:
    return None if values is None else np.ascontiguousarray(values, np.int32)


def _starts(sequence: NDArray[np.int32] | None, edges: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Where each sequence's rows begin, and their end; None where they do not lie together."""
    if sequence is None or (sequence[1:] < sequence[:-1]).any():
        return None
    return edges if np.array_equal(sequence, edges[:-1]) else np.searchsorted(sequence, edges).astype(np.int32)


@dataclass(eq=False)
class Batch:
    """What one step computes: its tokens [t], each token's sequence slot and position, and each sequence's pages.

    Rows of one sequence lie together, in rising position. `tables` [sequences, pages] and `lengths` [sequences] (keys present,
    those of this step included; needed where attention is not causal) are for a sequence's own keys, the `memory_` pair for space 1.
    `select` are the rows whose logits are wanted; `other` describes row set 3 as (sequence, position). An array of int32 is not copied:
    who writes new pages into a table of his changes the step.
    """

    ids: ArrayLike | None
    sequence: ArrayLike
    position: ArrayLike
    _: KW_ONLY
    tables: ArrayLike | None = None
    select: ArrayLike | None = None
    lengths: ArrayLike | None = None
    memory_tables: ArrayLike | None = None
    memory_lengths: ArrayLike | None = None
    segments: ArrayLike | None = None
    other: tuple[ArrayLike, ArrayLike] | None = None
    sequences: int | None = None

    def __post_init__(self) -> None:
        seq, pos = np.ascontiguousarray(self.sequence, np.int32), np.ascontiguousarray(self.position, np.int32)
        table, memory_table = _ints(self.tables), _ints(self.memory_tables)
        count = self.sequences if self.sequences is not None else table.shape[0] if table is not None else int(seq.max(initial=-1)) + 1
        chosen, other_seq, other_pos = _ints(self.select), *((_ints(a) for a in self.other) if self.other else (None, None))
        if chosen is not None and chosen.size and (chosen.min() < 0 or chosen.max() >= seq.size):
            raise InputError(f"Selected rows {chosen.min()}..{chosen.max()} are not among the step's {seq.size} rows.")
        edges = np.arange(count + 1, dtype=np.int32)
        sets = (
            (seq, pos),
            (seq[chosen] if chosen is not None and chosen.size else None, pos[chosen] if chosen is not None and chosen.size else None),
            (edges[:-1], None),
            (other_seq, other_pos),
        )
        sizes = (seq.size, 0 if chosen is None else chosen.size, count, 0 if other_seq is None else other_seq.size)
        per_token = {"ids": _ints(self.ids), "segments": _ints(self.segments), "position": pos}
        for name, array in per_token.items():
            if array is not None and array.size != seq.size:
                raise InputError(f"A step of {seq.size} rows came with {array.size} {name}.")
        for name, array in (("table", table), ("table", memory_table)):
            if array is not None and (array.ndim != 2 or array.shape[0] != count):
                raise InputError(f"A page {name} of shape {array.shape} does not fit {count} sequences.")
        length, memory_length = _ints(self.lengths), _ints(self.memory_lengths)
        if any(a is not None and a.size != count for a in (length, memory_length)):
            raise InputError(f"Lengths must be given for each of the {count} sequences.")
        starts = [_starts(s, edges) for s, _ in sets]
        self.moving = (per_token["ids"], pos, chosen, sets[SELECTED][1])
        self.keep = (sets, starts, per_token, table, memory_table, chosen, length, memory_length)
        rows = [CRows(n, _address(s), _address(p), _address(at)) for n, (s, p), at in zip(sizes, sets, starts, strict=True)]
        spaces = [
            CSpace(_address(t), 0 if t is None else t.shape[1], _address(n)) for t, n in ((table, length), (memory_table, memory_length))
        ]
        self.shape = CBatch(
            (CRows * 4)(*rows), _address(per_token["ids"]), _address(per_token["segments"]), _address(chosen), (CSpace * 2)(*spaces), count
        )

    def move(self, ids: Sequence[int], position: Sequence[int]) -> None:
        """Other ids and positions for the same rows [t]: the next step of sequences that are described already."""
        tokens, at, chosen, selected = self.moving
        if tokens is None:
            raise InputError("A step without ids cannot be moved on.")
        tokens[:], at[:] = ids, position
        if selected is not None and chosen is not None:
            selected[:] = at[chosen]


class Plan:
    """A checked program with its buffers; `step` runs it for a batch and `read` shows a buffer."""

    def __init__(self, program: Program, team: Team, isa: str = "") -> None:
        self.program, self.team, core = program, team, library()
        self._free, self._step = core.transept_plan_free, core.transept_step
        records = (CRecord * len(program.records))(*program.records)
        weights = (CWeight * len(program.weights))(*[CWeight(KINDS[w.kind], w.n, w.k, w.data.ctypes.data) for w in program.weights])
        weight_bytes = (ctypes.c_int64 * len(program.weights))(*[w.data.nbytes for w in program.weights])
        caches = (CCache * len(program.caches))(*[c.shape for c in program.caches])
        cache_bytes = (ctypes.c_int64 * len(program.caches))(*[c.data.nbytes for c in program.caches])
        widths = (ctypes.c_int32 * len(program.widths))(*program.widths)
        self.handle = core.transept_plan_new(
            records,
            len(records),
            weights,
            weight_bytes,
            len(weights),
            caches,
            cache_bytes,
            len(caches),
            widths,
            len(widths),
            program.max_rows,
            team.handle,
            isa.encode(),
        )
        if not self.handle:
            raise _fail()
        self.buffers = [self._buffer(i, width) for i, width in enumerate(program.widths)]

    def _buffer(self, i: int, width: int) -> NDArray[np.float32]:
        stride = ctypes.c_int64()
        start = library().transept_buffer(self.handle, i, ctypes.byref(stride))
        flat = np.ctypeslib.as_array(ctypes.cast(start, ctypes.POINTER(ctypes.c_float)), (self.program.max_rows, stride.value))
        return flat[:, :width]

    def step(self, batch: Batch, seconds: NDArray[np.float64] | None = None) -> None:
        """Run every record for the batch; `seconds` [records] takes up the time of each.

        Errors: InputError where a token, position, page or row does not fit; nothing has run then.
        """
        if self._step(self.handle, ctypes.byref(batch.shape), _address(seconds)):
            raise InputError(f"The native core refused the step: {library().transept_error().decode()}.")

    def view(self, view: View, n: int | None = None) -> NDArray[np.float32]:
        """The first n rows of a view [n, width], live: the next step overwrites them, and inputs are written through it.

        Valid while the plan lives.
        """
        return self.buffers[view.buffer][:n, view.at : view.at + view.width]

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._free(self.handle)
