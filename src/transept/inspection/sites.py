"""The places of a model that can be watched, by the names that people give them: attn[3].head[2], block[5], mlp[0].hidden, encoder.attn[1].

Found from the modules of a network alone, so a new family of the same blocks has its names without a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from transept.adapters.prune import attentions
from transept.blocks.alignment import After, Before
from transept.blocks.block import Block
from transept.blocks.embeddings import Embedding
from transept.blocks.encoder import EncoderEmbedding, Pool, SharedStack
from transept.blocks.feedforward import MLP, GatedMLP, MoE
from transept.blocks.latent import LatentAttention
from transept.blocks.recurrent import Recurrence
from transept.blocks.stack import Stack
from transept.core.errors import InputError, nearest

_HEAD = re.compile(r"\.head\[(\d+|\*)\]")


@dataclass(frozen=True)
class Site:
    """One named place: the module at `path` says `tap` there.

    A module that serves several layers says it once for each: this is number `use` of its `uses`. `heads` is 0 where the value has no
    heads, else their number, of which `group` share one of the value's; `head` is the one that is meant, None for all.
    """

    name: str
    path: str
    tap: str
    use: int = 0
    uses: int = 1
    heads: int = 0
    group: int = 1
    head: int | None = None


@dataclass(frozen=True)
class Layer:
    """One attention of a model: `kind` is self, encoder (that of an encoder-decoder's encoder) or cross."""

    kind: str
    index: int
    heads: int
    name: str
    path: str


def sites(model: nn.Module) -> dict[str, Site]:
    """Every place by its name, in the order of the call; a head's own places are found by `find`."""
    heads = attentions(model)
    found: list[Site] = []
    for path, module in model.named_modules():
        prefix = _prefix(path)
        if isinstance(module, Stack):
            found += [site for i, at in enumerate(_layers(module, path)) for site in _block(model, heads, prefix, i, *at)]
            found.append(Site(f"{prefix}hidden", path, "hidden"))
        elif isinstance(module, Recurrence):
            side = path.rpartition(".")[2]
            found.append(Site(f"{prefix}{'' if side == 'stack' else f'{side}.'}hidden", path, "hidden"))
        elif isinstance(module, Before | After):
            found.append(Site(f"{prefix}cross[0]", path, "weights", heads=1))
        elif isinstance(module, Embedding | EncoderEmbedding):
            found.append(Site(f"{prefix}embed", path, "embed"))
        elif isinstance(module, Pool):
            found.append(Site(f"{prefix}pooled", path, "pooled"))
    return {site.name: site for site in found}


def layers(model: nn.Module) -> list[Layer]:
    """Every attention, in order."""
    paired, found = any(site.startswith("encoder.") for site in sites(model)), []
    for site in sites(model).values():
        if site.tap == "weights" and not site.name.endswith(".weights"):
            kind = "cross" if "cross[" in site.name else "encoder" if paired and site.name.startswith("encoder.") else "self"
            found.append(Layer(kind, int(site.name.rpartition("[")[2][:-1]), site.heads, site.name, site.path))
    return found


def find(model: nn.Module, names: Iterable[str]) -> dict[str, Site]:
    """The places of these names; [*] stands for every number. Errors: InputError with the nearest name, or with the numbers there are."""
    known = sites(model)
    return {site.name: site for name in names for site in _found(known, name)}


def patterns(model: nn.Module) -> list[str]:
    """All names in short: attn[0..29], attn[0..29].head[0..8], ..."""
    known, lines = sites(model), []
    for shape, group in groupby(known.values(), lambda site: (re.sub(r"\[\d+\]", "[#]", site.name), site.heads)):
        lines.append((shape, [int(n) for site in group for n in re.findall(r"\[(\d+)\]", site.name)]))
    merged: dict[tuple[str, int], list[int]] = {}
    for shape, numbers in lines:
        merged.setdefault(shape, []).extend(numbers)
    out = []
    for (text, heads), numbers in merged.items():
        shown = text.replace("[#]", _span(numbers) if numbers else "")
        out += [shown] + ([_with_head(shown, f"[0..{heads - 1}]" if heads > 1 else "[0]")] if heads else [])
    return out


def _span(numbers: list[int]) -> str:
    return f"[{min(numbers)}..{max(numbers)}]" if min(numbers) < max(numbers) else f"[{numbers[0]}]"


def _with_head(name: str, number: str) -> str:
    """attn[3].q with a head: attn[3].head[2].q."""
    at = name.index("]") + 1
    return f"{name[:at]}.head{number}{name[at:]}"


def _found(known: Mapping[str, Site], name: str) -> Iterator[Site]:
    wanted = _HEAD.search(name)
    base = _HEAD.sub("", name, count=1).removesuffix(".weights")
    base = base if base in known else base.removeprefix("decoder.")
    pattern = re.compile(re.escape(base).replace(r"\[\*\]", r"\[\d+\]"))
    places = [site for label, site in known.items() if pattern.fullmatch(label)]
    if not places:
        raise InputError(_unknown(known, name, base))
    for site in places:
        if wanted is None:
            yield site
            continue
        if not site.heads:
            raise InputError(f"{site.name} has no heads, so there is no {name!r}")
        for head in range(site.heads) if wanted[1] == "*" else [int(wanted[1])]:
            if head >= site.heads:
                raise InputError(f"{site.name} has the heads 0 to {site.heads - 1}, not {head}")
            yield replace(site, name=_with_head(site.name, f"[{head}]"), head=head)


def _unknown(known: Mapping[str, Site], name: str, base: str) -> str:
    """The sentence about a name that is none."""
    part, _, rest = base.partition("[")
    alike = [label for label in known if label.partition("[")[0] == part]
    numbers = [int(label.partition("[")[2].partition("]")[0]) for label in alike if "[" in label]
    if numbers and rest and re.fullmatch(r"\d+\].*", rest) and int(rest.partition("]")[0]) > max(numbers):
        return f"{part} has the layers {min(numbers)} to {max(numbers)}, so there is no {name[:80]!r}"
    options = [*known, *(_with_head(label, f"[{h}]") for label, site in known.items() for h in range(site.heads))]
    return f"the model has nothing called {name[:80]!r} to watch{nearest(name[:80], options)}; the names are listed by transept.watchable"


def _prefix(path: str) -> str:
    """What stands before the names of a part: nothing in a decoder or an encoder alone."""
    words = path.split(".")[:-1]
    return "".join(f"{word}." for word in (words[1:] if words[:1] in (["decoder"], ["head"]) else words))


def _layers(stack: Stack, path: str) -> list[tuple[str, Block, int, int]]:
    """Each layer's path and block, its number among the uses of that block, and how many those are."""
    if isinstance(stack, SharedStack):
        groups: list[Any] = [[*stack.layers[group].named_children()] for group in stack.order]
        blocks = [
            (f"{path}.layers.{group}.{name}", block) for group, layer in zip(stack.order, groups, strict=True) for name, block in layer
        ]
    else:
        blocks = [(f"{path}.layers.{i}", block) for i, block in enumerate(stack.layers)]
    order = [where for where, _ in blocks]
    return [
        (where, block, order[:i].count(where), order.count(where)) for i, (where, block) in enumerate(blocks) if isinstance(block, Block)
    ]


def _block(model: nn.Module, heads: Mapping[str, Any], prefix: str, i: int, path: str, block: Block, use: int, uses: int) -> Iterator[Site]:
    """The places of one layer."""
    for name in block.order:
        where, module = f"{path}.{name}", block.get_submodule(name)
        here = Site(f"{prefix}{name}[{i}]", where, "weights", use, uses)
        if where in heads:
            yield from _attention(here, module)
        elif isinstance(module, MLP | GatedMLP):
            yield replace(here, name=f"{here.name}.hidden", tap="hidden")
        elif isinstance(module, MoE):
            yield replace(here, name=f"{here.name}.chosen", tap="chosen")
        yield replace(here, name=f"{prefix}block[{i}].{name}", path=path, tap=name)
    yield replace(here, name=f"{prefix}block[{i}]", path=path, tap=block.order[-1])


def _attention(here: Site, module: Any) -> Iterator[Site]:
    """Its weights, what each head reads, and what each head puts out before the output projection joins them."""
    count = module.spec.heads if isinstance(module, LatentAttention) else module.heads
    yield replace(here, heads=count)
    if not isinstance(module, LatentAttention):
        group = count // getattr(module, "kv_heads", count)
        for tap in ("q", "k", "v"):
            yield replace(here, name=f"{here.name}.{tap}", tap=tap, heads=count, group=1 if tap == "q" else group)
    yield replace(here, name=f"{here.name}.out", tap="heads", heads=count)
