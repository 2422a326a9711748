"""What of a finished model is trained: all of it, low-rank updates, biases, or its head (rows 84a-84c)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from transept.adapters import lora as low_rank
from transept.adapters.lora import Lora
from transept.core.errors import ConfigError, nearest
from transept.core.registry import Family
from transept.core.spec import Spec


class Tune(Enum):
    """The word after --tune."""

    FULL = "full"
    LORA = "lora"
    BITFIT = "bitfit"
    HEAD = "head"


@dataclass(frozen=True)
class Tuned:
    """How many numbers are trained, of how many."""

    trained: int
    total: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters are trained ({100 * self.trained / self.total:.2f} %)"


def tune(model: nn.Module, how: Tune | str, *, lora: Lora | None = None, heads: Sequence[str] = ("head",)) -> Tuned:
    """Freezes what is not trained, in place. `heads` names the modules that are new to the task and are trained in any way.

    FULL trains all; LORA puts `lora` (its defaults) beside the targets; BITFIT trains every bias (Ben Zaken et al. 2021, arXiv 2106.10199,
    section 2); HEAD the heads alone, a probe of what the frozen model knows. Raises ConfigError for another word or a head that is not
    there.
    """
    words = [t.value for t in Tune]
    if not isinstance(how, Tune) and how not in words:
        raise ConfigError(f"--tune is one of {', '.join(words)}, found {how!r}{nearest(how, words)}")
    how = Tune(how)
    known = dict(model.named_modules())
    for name in heads:
        if name not in known:
            raise ConfigError(f"the model has no module {name!r}{nearest(name, known)}")
    if how is Tune.LORA:
        low_rank.add(model, lora or Lora())
    else:
        model.requires_grad_(how is Tune.FULL)
    if how is Tune.BITFIT:
        for name, p in model.named_parameters():
            p.requires_grad_(name.rpartition(".")[2].endswith("bias"))
    for name in heads:
        for p in known[name].parameters():
            p.requires_grad_(True)
    return Tuned(sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters()))


def under(model: nn.Module, family: Family, architecture: str, spec: Spec) -> tuple[nn.Module, tuple[str, ...]]:
    """The body of a trained model under another head of its family, and the names of the parameters that are new.

    `architecture` names the published form, `spec` its numbers (the model's own, with `labels` where the head has classes). What both have
    under one name and in one shape is copied.
    """
    form = family.form(architecture)
    made = (form.build or family.build)(spec)
    known = model.state_dict()
    fresh = []
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name in known and known[name].shape == tensor.shape:
                tensor.copy_(known[name])
            else:
                fresh.append(name)
    return made.train(model.training), tuple(fresh)


def dropped(model: nn.Module, share: float) -> nn.Module:
    """The model with every dropout of it at this share; pages are published without, since it is a matter of training."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    return model


def normal(model: nn.Module, std: float = 0.02, generator: torch.Generator | None = None) -> nn.Module:
    """Every matrix drawn from N(0, std^2), every bias zero, norms left alone: how BERT and GPT begin (Radford et al. 2018, section 4.1)."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(std=std, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
    return model
