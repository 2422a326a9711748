"""The logit lens: what a model would answer after each layer (nostalgebraist 2020): the stream, the last norm, the head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transept.blocks.encoder import Encoder, MaskedHead, PretrainHead
from transept.blocks.recurrent import RecurrentLM
from transept.blocks.seq2seq import EncoderDecoder
from transept.blocks.stack import Decoder, Stack
from transept.core.errors import InputError
from transept.core.shapes import Float, Int, Tensor
from transept.inspection.attention import called
from transept.inspection.sites import sites
from transept.inspection.watch import Watched, module_of, watch


@dataclass(frozen=True)
class Depth:
    """The answer at one depth: `layer` 0 is after the embedding, the last the model's own; `name` is the place in the stream."""

    layer: int
    name: str
    logits: Float[Tensor, "b t v"]

    def entropy(self) -> Float[Tensor, "b t"]:
        """How open the answer still is, in bits."""
        logs = self.logits.double().log_softmax(-1)
        return -(logs.exp() * logs).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.double))


def lens(m: Watched, ids: Int[Tensor, "b t"], *, source: Tensor | None = None, last: int | None = None) -> Iterator[Depth]:
    """The answers after each layer, one after another, at the last `last` positions or at all.

    Errors: InputError for a model without scores of a vocabulary.
    """
    module = module_of(m)
    trunk, places = trunk_of(module), sites(module)
    stack = getattr(trunk, "stack", None)
    depth = [int(name[6:-1]) for name in places if name.startswith("block[") and name.endswith("]")]
    names = [name for name in ("embed", *(f"block[{i}]" for i in depth[:-1])) if name in places] if isinstance(stack, Stack) else []
    keep = slice(None if last is None else -last, None)
    with torch.no_grad():
        if names:
            with watch(m, *names) as seen:
                out = called(m, ids, source)
            for i, name in enumerate(names):
                yield Depth(i, name, scores(trunk, trunk.stack.norm(seen[name][:, keep])))
        else:
            out = called(m, ids, source)
        yield Depth(len(names), "hidden", out.logits[:, keep])


def trunk_of(module: nn.Module) -> Any:
    """The part of a model that scores a vocabulary at every token. Errors: InputError where it has none."""
    trunk = module.decoder if isinstance(module, EncoderDecoder) else module
    masked = isinstance(trunk, Encoder) and isinstance(trunk.head, MaskedHead | PretrainHead)
    if not masked and not isinstance(trunk, Decoder | RecurrentLM):
        raise InputError(
            f"lens: this form of {type(module).__name__} scores no vocabulary, so there is no answer to read after each layer"
        )
    return trunk


def scores(trunk: Any, states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
    """What the head makes of some states."""
    found = trunk.head(states)
    return found if isinstance(found, Tensor) else found.logits
