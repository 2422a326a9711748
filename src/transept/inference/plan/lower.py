"""From modules to records: one table says how each block lowers; no family is named in it.

A block that is not in the table cannot be lowered (`NotLowered` names it), and the model runs in torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import singledispatch

import numpy as np
from torch import nn

from transept import native
from transept.blocks.attention import Attention
from transept.blocks.block import Block, Post, Pre
from transept.blocks.embeddings import Embedding, Scale, TokenEmbedding
from transept.blocks.encoder import Encoder, EncoderEmbedding, SharedStack
from transept.blocks.feedforward import MLP, GatedMLP, MoE
from transept.blocks.heads import Head, Projected, TiedHead
from transept.blocks.latent import LatentAttention
from transept.blocks.norms import LayerNorm, NoNorm, RMSNorm
from transept.blocks.positions import Learned, NoPosition, Rotary
from transept.blocks.stack import Decoder, Stack
from transept.core.errors import TranseptError
from transept.inference.plan.weights import Weights
from transept.native import View
from transept.native.binding import PANEL, SELECTED, TOKENS
from transept.ops.activations import Act
from transept.ops.masks import Causal, Full, Mask, Window
from transept.ops.rotary import Layout, RopeSpec, frequencies

ACTS = {Act.RELU: "relu", Act.GELU: "gelu", Act.GELU_TANH: "gelu_tanh", Act.QUICK_GELU: "quick_gelu", Act.SILU: "silu", Act.RELU2: "relu2",
        Act.TANH: "tanh"}


class NotLowered(TranseptError):
    """A block that the native core has no records for; the sentence names it."""


@dataclass
class Lowering:
    """What the table's functions share: the program, the names and numbers of the modules, the caches, and buffers used again by every
    layer. `caches` is None where each layer has a cache of its own; layers that keep nothing from step to step share one of each shape.
    """

    program: native.Program
    weights: Weights
    names: dict[int, str]
    pages: int
    fast: bool
    cache_kind: str = "F32"
    scratch: dict[tuple[str, int], View] = field(default_factory=dict)
    packed: dict[tuple[str, ...], native.Weight] = field(default_factory=dict)
    caches: dict[tuple[int, int], native.Cache] | None = None
    angles: dict[RopeSpec, View] = field(default_factory=dict)
    rows: int = TOKENS

    def buffer(self, what: str, width: int) -> View:
        """The buffer for `what` of that width, the same one for every layer."""
        key = (what, width)
        if key not in self.scratch:
            self.scratch[key] = self.program.buffer(width)
        return self.scratch[key]

    def name(self, module: nn.Module) -> str:
        """The module's path in the model."""
        return self.names[id(module)]

    def raw(self, module: nn.Module, leaf: str = "weight") -> native.Raw:
        """A matrix as stored."""
        return self.weights.matrix(f"{self.name(module)}.{leaf}")

    def vector(self, module: nn.Module, leaf: str) -> native.Weight | None:
        """A plain float parameter, or None where the module has none."""
        return native.vector(self.weights.floats(f"{self.name(module)}.{leaf}")) if getattr(module, leaf, None) is not None else None

    def pack(self, *modules: nn.Module, gated: bool = False) -> native.Weight:
        """The weights of modules, side by side and packed once, however many layers share them."""
        key = tuple(self.name(m) for m in modules)
        if key not in self.packed:
            self.packed[key] = native.pack(*(self.raw(m) for m in modules), gated=gated)
        return self.packed[key]

    def cache(self, kv_heads: int, head_dim: int) -> native.Cache:
        """The keys and values of one layer."""
        if self.caches is None:
            return native.Cache(kv_heads, head_dim, self.pages, kind=self.cache_kind)
        if (kv_heads, head_dim) not in self.caches:
            self.caches[kv_heads, head_dim] = native.Cache(kv_heads, head_dim, self.pages, kind=self.cache_kind)
        return self.caches[kv_heads, head_dim]

    def int8(self, weight: native.Weight) -> bool:
        """Whether this weight meets activations of 8 bits."""
        return self.fast and weight.kind.startswith("Q")

    def linear(self, module: nn.Module, x: View, out: View, *, act: str = "none", residual: View | None = None) -> View:
        """out = residual + act(x W + bias)."""
        weight = self.pack(module)
        self.program.label = self.name(module)
        return self.program.linear(
            x, weight, out, bias=self.vector(module, "bias"), act=act, residual=residual, int8=self.int8(weight), rows=self.rows
        )

    def stacked(self, modules: list[nn.Module], x: View, what: str) -> list[View]:
        """Several matrices that read the same input: one record where their forms agree, else one each."""
        raws = [self.raw(m) for m in modules]
        alike = all((r.kind, r.k) == (raws[0].kind, raws[0].k) for r in raws) and not any(r.n % PANEL for r in raws[:-1])
        biases = [getattr(m, "bias", None) is not None for m in modules]
        if not alike or any(biases) != all(biases):
            return [self.linear(m, x, self.buffer(f"{what}{i}", r.n)) for i, (m, r) in enumerate(zip(modules, raws, strict=True))]
        weight, out = self.pack(*modules), self.buffer(what, sum(r.n for r in raws))
        bias = native.vector(np.concatenate([self.weights.floats(f"{self.name(m)}.bias") for m in modules])) if all(biases) else None
        self.program.label = self.name(modules[0])
        self.program.linear(x, weight, out, bias=bias, int8=self.int8(weight), rows=self.rows)
        starts = np.cumsum([0] + [r.n for r in raws])
        return [out.columns(int(at), r.n) for at, r in zip(starts, raws, strict=False)]


def lower(
    model: nn.Module, weights: Weights, *, pages: int, max_rows: int, fast: bool = False
) -> tuple[native.Program, View]:
    """The program of a decoder and the view of its logits [selected, vocabulary].

    `fast` multiplies quantised weights with activations rounded to 8 bits by blocks of 32 and keeps keys and values in 16; else both are
    float32. Raises NotLowered.
    """
    names = {id(m): n for n, m in model.named_modules()}
    p = Lowering(native.Program(max_rows), weights, names, pages, fast, "F16" if fast else "F32")
    if not isinstance(model, Decoder):
        raise NotLowered(f"a {type(model).__name__} has no records in the native core's table; it runs in torch")
    x = _embed(model.embed, p)
    _blocks(model.stack, x, p)
    chosen = p.program.gather(x, p.buffer("chosen", x.width))
    p.rows = SELECTED
    return p.program, _head(model.head, _norm(model.stack.norm, chosen, chosen, p), p)


def lower_encoder(model: nn.Module, weights: Weights, *, pages: int, max_rows: int, fast: bool = False) -> tuple[native.Program, View]:
    """The program of an encoder and the view of its last states [t d], before the head. Raises NotLowered."""
    names = {id(m): n for n, m in model.named_modules()}
    p = Lowering(native.Program(max_rows), weights, names, pages, fast, caches={})
    if not isinstance(model, Encoder):
        raise NotLowered(f"a {type(model).__name__} has no records in the native core's table; it runs in torch")
    x = _read(model.embed, p)
    _blocks(model.stack, x, p)
    return p.program, _norm(model.stack.norm, x, x, p)


def _blocks(stack: Stack, x: View, p: Lowering) -> None:
    if isinstance(stack, SharedStack):
        layers = [layer for group in stack.order for layer in stack.layers[group].children()]
    elif type(stack) is Stack:
        layers = list(stack.layers)
    else:
        raise NotLowered(f"a {type(stack).__name__} is not in the native core's table")
    for layer in layers:
        if not isinstance(layer, Block):
            raise NotLowered(f"{p.name(layer)} is a {type(layer).__name__}, which the native core's table lacks")
        _block(layer, x, p)


def _read(embed: nn.Module, p: Lowering) -> View:
    """An encoder's first states. Its tables stay as they lie: rows are copied, not multiplied."""
    if type(embed) is not EncoderEmbedding or not (embed.position is None or isinstance(embed.position, Learned)):
        raise NotLowered(f"the embedding {type(embed).__name__} is not in the native core's table")
    x = p.buffer("stream", embed.tokens.weight.shape[1])
    position = embed.position
    offset = 0 if position is None else position.offset
    for source, table in (("ids", embed.tokens), ("segments", embed.segments), ("positions", position)):
        if table is not None:
            p.program.label = p.name(table)
            rows = native.vector(p.weights.floats(f"{p.name(table)}.weight"))
            p.program.embed(rows, x, source=source, offset=offset if source == "positions" else 0, add=source != "ids")
    x = _norm(embed.norm, x, x, p)
    if embed.project is None:
        return x
    if not isinstance(embed.project, nn.Linear):
        raise NotLowered(f"the embedding's {type(embed.project).__name__} is not in the native core's table")
    return p.linear(embed.project, x, p.buffer("raised stream", embed.project.out_features))


def _embed(embed: nn.Module, p: Lowering) -> View:
    if not isinstance(embed, Embedding) or not isinstance(embed.tokens, TokenEmbedding) or not _plain(embed):
        raise NotLowered(f"the embedding {type(embed).__name__} is not in the native core's table")
    vocab, dim = embed.tokens.weight.shape
    scale = embed.project.factor if isinstance(embed.project, Scale) else 1.0
    x = p.buffer("stream", dim)
    p.program.label = p.name(embed.tokens)
    p.program.embed(p.pack(embed.tokens), x, scale=scale)
    if isinstance(embed.project, nn.Linear):
        x = p.linear(embed.project, x, p.buffer("stream", embed.project.out_features))
    if isinstance(embed.position, Learned):
        p.program.label = p.name(embed.position)
        p.program.embed(
            native.vector(p.weights.floats(f"{p.name(embed.position)}.weight")),
            x,
            source="positions",
            offset=embed.position.offset,
            add=True,
        )
    return x


def _plain(embed: Embedding) -> bool:
    norm = getattr(embed, "norm", None)
    known = embed.project is None or isinstance(embed.project, (nn.Linear, Scale))
    return known and (norm is None or isinstance(norm, NoNorm)) and (embed.position is None or isinstance(embed.position, Learned))


def _block(block: Block, x: View, p: Lowering) -> None:
    for name in block.order:
        f, norm, rule = block.branch(name)
        if isinstance(rule, Pre):
            into(f, _norm(norm, x, p.buffer("normed", x.width), p), x, p)
        elif isinstance(rule, Post):
            into(f, x, x, p)
            _norm(norm, x, x, p)
        else:
            raise NotLowered(f"{p.name(block)} joins {name} by {type(rule).__name__}, which the native core's table lacks")


def _norm(norm: nn.Module, x: View, out: View, p: Lowering) -> View:
    if isinstance(norm, NoNorm):
        return x
    if not isinstance(norm, (LayerNorm, RMSNorm)):
        raise NotLowered(f"{p.name(norm)} is a {type(norm).__name__}, which the native core's table lacks")
    p.program.label = p.name(norm)
    layer = isinstance(norm, LayerNorm)
    return p.program.norm(
        x, out, p.vector(norm, "weight"), p.vector(norm, "bias") if layer else None, eps=norm.eps or 0.0, layer=layer, rows=p.rows
    )


@singledispatch
def into(f: nn.Module, x: View, stream: View, p: Lowering) -> None:
    """stream += f(x): the table, by the class of the block."""
    raise NotLowered(f"{p.name(f)} is a {type(f).__name__}, which the native core's table lacks")


@into.register
def _mlp(f: MLP, x: View, stream: View, p: Lowering) -> None:
    hidden = p.linear(f.up, x, p.buffer("hidden", f.up.out_features), act=ACTS[f.act])
    p.linear(f.down, hidden, stream, residual=stream)


@into.register
def _gated(f: GatedMLP, x: View, stream: View, p: Lowering) -> None:
    hidden = p.buffer("hidden", f.up.out_features)
    gate, up = p.raw(f.gate), p.raw(f.up)
    if gate.kind == up.kind and gate.n % PANEL == 0:
        weight = p.pack(f.gate, f.up, gated=True)
        bias = (
            None
            if f.up.bias is None
            else native.gated_bias(p.weights.floats(f"{p.name(f.gate)}.bias"), p.weights.floats(f"{p.name(f.up)}.bias"))
        )
        p.program.label = p.name(f)
        p.program.linear(x, weight, hidden, bias=bias, act=ACTS[f.act], gated=True, int8=p.int8(weight))
    else:
        p.linear(f.gate, x, hidden)
        raised = p.linear(f.up, x, p.buffer("raised", f.up.out_features))
        p.program.element("gate", hidden, hidden, raised, act=ACTS[f.act])
    p.linear(f.down, hidden, stream, residual=stream)


@into.register
def _experts(f: MoE, x: View, stream: View, p: Lowering) -> None:
    if not isinstance(f.shared, GatedMLP):
        raise NotLowered(f"{p.name(f)} has a shared {type(f.shared).__name__}, which the native core's table lacks")
    route, spec, name = f.router, f.router.spec, p.name(f.experts)
    p.program.label = p.name(route)
    scores = p.program.linear(x, native.pack(native.raw(p.weights.floats(f"{p.name(route)}.weight"))), p.buffer("scores", spec.experts))
    routing = p.buffer("routing", 2 * spec.chosen)
    p.program.route(scores, routing, top=spec.chosen, score="sigmoid", correction=p.vector(route, "correction"), groups=spec.groups,
                    keep=spec.top_groups, best_two=True, normalise=spec.normalise, scale=spec.scale, eps=1e-20)  # fmt: skip
    gate, up, down = (p.weights.floats(f"{name}.{leaf}") for leaf in ("gate", "up", "down"))
    if gate.shape[1] % PANEL or down.shape[1] % PANEL:
        raise NotLowered(f"{name} has widths that are no multiple of {PANEL}; it runs in torch")
    pairs = [native.raw(matrix) for e in range(spec.experts) for matrix in (gate[e], up[e])]
    packed, lowered = native.pack(*pairs, gated=True), native.pack(*(native.raw(matrix) for matrix in down))
    into(f.shared, x, stream, p)
    p.program.label = name
    p.program.experts(x, routing, packed, lowered, stream, experts=spec.experts, act=ACTS[f.experts.act], residual=stream)


@into.register
def _attention(f: Attention, x: View, stream: View, p: Lowering) -> None:
    q, k, v = p.stacked([f.q, f.k, f.v], x, "qkv")
    _turn(f.position, ((q, f.heads), (k, f.kv_heads)), p)
    left, right = _reach(f.mask)
    cache = p.cache(f.kv_heads, f.head_dim)
    p.program.label = p.name(f)
    p.program.append(cache, k, v)
    y = p.program.attend(cache, q, p.buffer("heads", f.heads * f.head_dim), heads=f.heads, scale=f.scale, left=left, right=right)
    p.linear(f.out, y, stream, residual=stream)


@into.register
def _latent(f: LatentAttention, x: View, stream: View, p: Lowering) -> None:
    s = f.spec
    if s.kv_rank % PANEL or s.value % PANEL:
        raise NotLowered(f"{p.name(f)} has widths {s.kv_rank} and {s.value} that are no multiples of {PANEL}; it runs in torch")
    c_q = _norm(f.q_norm, p.linear(f.q_down, x, p.buffer("c_q", s.q_rank)), p.buffer("c_q", s.q_rank), p)
    c_kv = _norm(f.kv_norm, p.linear(f.kv_down, x, p.buffer("c_kv", s.kv_rank)), p.buffer("c_kv", s.kv_rank), p)
    q_c, q_r = p.linear(f.q_up, c_q, p.buffer("q_c", s.heads * s.nope)), p.linear(f.q_rope, c_q, p.buffer("q_r", s.heads * s.rope))
    k_r = p.linear(f.k_rope, x, p.buffer("k_r", s.rope))
    _turn(f.position, ((q_r, s.heads), (k_r, 1)), p)
    # W^UK is absorbed into the query: q^C k^C = (q^C W^UK) c^KV, so that the cache holds c^KV and k^R only.
    w_uk = p.weights.floats(f"{p.name(f.k_up)}.weight").reshape(s.heads, s.nope, s.kv_rank).transpose(0, 2, 1)
    absorbed = native.pack(native.raw(w_uk.reshape(-1, s.nope)))
    p.program.label = p.name(f)
    latent = p.program.linear(q_c, absorbed, p.buffer("latent", s.heads * s.kv_rank), groups=s.heads, group_in=s.nope, group_out=s.kv_rank)
    width = s.kv_rank + s.rope
    q = p.buffer("q", s.heads * width)
    p.program.element("copy", latent, q.columns(0, s.kv_rank), count=s.heads, strides=(s.kv_rank, 0, width))
    p.program.element("copy", q_r, q.columns(s.kv_rank, s.rope), count=s.heads, strides=(s.rope, 0, width))
    cache = native.Cache(1, width, p.pages, vhead=s.kv_rank, kind=p.cache_kind, latent=True)
    p.program.append(cache, c_kv, k_r)
    left, right = _reach(f.mask)
    o = p.program.attend(cache, q, p.buffer("latent", s.heads * s.kv_rank), heads=s.heads, scale=f.scale, left=left, right=right)
    w_uv = native.pack(native.raw(p.weights.floats(f"{p.name(f.v_up)}.weight")))
    y = p.program.linear(o, w_uv, p.buffer("heads", s.heads * s.value), groups=s.heads, group_in=s.kv_rank, group_out=s.value)
    p.linear(f.out, y, stream, residual=stream)


def _turn(position: NoPosition, parts: tuple[tuple[View, int], ...], p: Lowering) -> None:
    if type(position) is NoPosition:
        return
    if not isinstance(position, Rotary):
        raise NotLowered(f"positions by {type(position).__name__} are not in the native core's table")
    spec = position.spec
    if spec not in p.angles:
        turn, factor = frequencies(spec, 1)
        p.program.label = "angles"
        p.angles[spec] = p.program.angles(native.vector(turn.numpy()), p.program.buffer(spec.dims), scale=factor)
    for view, heads in parts:
        p.program.rotary(view, p.angles[spec], heads=heads, width=spec.dims, interleaved=spec.layout is Layout.PAIRS)


def _reach(mask: Mask) -> tuple[int, int]:
    """(how far left, how far right) a query sees; -1 is no limit."""
    known: dict[Mask, tuple[int, int]] = {Full(): (-1, -1), Causal(): (-1, 0)}
    window = mask.reach()
    if window is not None:
        known |= {Causal() & Window(window): (window - 1, 0), Window(window): (window - 1, window - 1)}
    if mask not in known:
        raise NotLowered(f"the mask {mask} is not in the native core's table")
    return known[mask]


def _head(head: nn.Module, x: View, p: Lowering) -> View:
    if isinstance(head, Projected):
        return _head(head.head, p.linear(head.project, x, p.buffer("narrowed", _width(head.project))), p)
    owner = head.source[0] if isinstance(head, TiedHead) else head
    if not isinstance(owner, (TokenEmbedding, Head)):
        raise NotLowered(f"the head {type(head).__name__} is not in the native core's table")
    return p.linear(owner, x, p.buffer("logits", owner.weight.shape[0]))


def _width(linear: nn.Module) -> int:
    if not isinstance(linear, nn.Linear):
        raise NotLowered(f"a projection by {type(linear).__name__} is not in the native core's table")
    return linear.out_features
