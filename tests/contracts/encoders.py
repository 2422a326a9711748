"""Every encoder in the registry under every one of its heads, with weights that make its results of order one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.decoders import initialised
from tests.laws.forms import held
from transept.blocks.bigbird import AskedEncoder
from transept.blocks.disentangled import RelativeTable
from transept.blocks.encoder import Encoder
from transept.blocks.longformer import LongEncoder
from transept.blocks.positions import Learned, NoPosition, Relative, Rotary, Sinusoidal
from transept.blocks.recurrent import BiLM
from transept.blocks.seq2seq import SourceEncoder
from transept.core.registry import Family, Published, all_families


@dataclass(frozen=True)
class Case:
    """A page, the published form whose head it wears (None: the page's own wiring), and one of its tiny specs."""

    family: Family
    form: Published | None
    tiny: str
    spec: Any

    def __str__(self) -> str:
        return "-".join((self.form.architecture if self.form else self.family.name, self.tiny.replace(" ", "")))

    def build(self) -> nn.Module:
        made = (self.form and self.form.build) or self.family.build
        return made(self.spec)


def is_encoder(case: Case) -> bool:
    """True where the wiring reads a text of tokens in both directions."""
    with torch.device("meta"):
        module = case.build()
    return isinstance(module, SourceEncoder | BiLM) or (isinstance(module, Encoder) and hasattr(case.spec, "vocab"))


@functools.cache
def cases() -> list[Case]:
    """Every tiny spec under the page's own head, and the last that each other published head can wear."""
    own = [Case(page, None, name, spec) for page in all_families() for name, spec in page.tiny.items()]
    others = []
    for page in all_families():
        for form in page.published:
            able = held(page, form) if form.build is not None and not form.architecture.startswith("gguf:") else {}
            if able:
                name, spec = [*able.items()][-1]
                others.append(Case(page, form, name, spec))
    return [case for case in own + others if is_encoder(case)]


every_encoder = pytest.mark.parametrize("case", cases(), ids=str)


@functools.lru_cache(maxsize=256)
def _built(case: str) -> nn.Module:
    found = next(c for c in cases() if str(c) == case)
    m = initialised(found.build(), gain=1.0)
    with torch.no_grad():
        for name, value in m.named_parameters():
            # T5 does not divide its scores; its queries are smaller from the start.
            if found.family.name == "t5" and name.endswith(".q.weight"):
                value.mul_(value.shape[0] ** -0.5)
    return m.eval()


def model(case: Case) -> nn.Module:
    """The tiny model in evaluation mode, made once per process; tests must not change it."""
    return _built(str(case))


def draw_ids(case: Case, seed: int, batch: int, length: int) -> Tensor:
    """Random ids; where the head needs a question and its end, the third token is the separator that ends it, and the fourth."""
    ids = torch.randint(4, case.spec.vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    if isinstance(model(case), LongEncoder | AskedEncoder):
        ids[:, 2:4] = case.spec.separator
    return ids


def results(m: nn.Module, ids: Tensor, **rest: Any) -> dict[str, Tensor]:
    """Every tensor of the result by its name, rows first; scores that stand for never are cut at -100."""
    out = vars(m(ids, **rest))
    return {
        name: value.transpose(0, 1).transpose(1, 2) if name == "layers" else value.clamp(min=-100) for name, value in out.items()
    }


def at_tokens(value: Tensor, ids: Tensor) -> bool:
    """True for a result that has something for each token."""
    return value.ndim > 1 and value.shape[:2] == ids.shape


def without_positions(m: nn.Module) -> nn.Module:
    """The same model without a sense of order: tables of positions at zero, no rotation, no sines."""
    for part in list(m.modules()):
        if isinstance(part, Learned | Relative | RelativeTable):
            with torch.no_grad():
                for table in part.parameters():
                    table.zero_()
        for name, child in list(part.named_children()):
            if isinstance(child, Sinusoidal):
                setattr(part, name, _Same())
            elif isinstance(child, Rotary):
                setattr(part, name, NoPosition())
    return m


class _Same(nn.Module):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x
