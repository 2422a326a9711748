"""Every decoder in the registry, with weights that make its logits of order one, for tests that hold for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transept.blocks.recurrent import RecurrentLM
from transept.blocks.stack import Decoder
from transept.core.registry import Family, all_families

Case = tuple[Family, str]


def is_decoder(family: Family) -> bool:
    """True for a page whose wiring gives a Decoder, or its recurrent forerunner."""
    with torch.device("meta"):
        return any(isinstance(family.build(tiny), Decoder | RecurrentLM) for tiny in family.tiny.values())


@functools.cache
def cases() -> list[Case]:
    """Every decoder with every entry of its `tiny`; pages named by --family are among them."""
    return [(family, name) for family in all_families() if is_decoder(family) for name in family.tiny]


def every_decoder(test: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the test for each case, given as (family, name of its tiny spec).

    A family that cannot take part says why in its page: `exempt={"test_name": reason}`, or "test_name[tiny]" for one of its specs.
    """

    @functools.wraps(test)
    def run(case: Case, *args: Any, **rest: Any) -> None:
        family, tiny = case
        reason = family.exempt.get(test.__name__) or family.exempt.get(f"{test.__name__}[{tiny}]")
        if reason:
            pytest.skip(f"{family.name} {tiny}: {reason}")
        test(case, *args, **rest)

    return pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case[0].name}-{case[1]}")(run)


@functools.lru_cache(maxsize=128)
def built(name: str, tiny: str, wide: bool) -> nn.Module:
    """The tiny model of a case in evaluation mode, made once per process; tests must not change it."""
    family = next(family for family, _ in cases() if family.name == name)
    module = family.build(family.tiny[tiny])
    # A recurrence has no residual stream to keep its states large.
    narrow = 1.25 if isinstance(module, RecurrentLM) else 0.5
    return (initialised(module, gain=1.0).double() if wide else initialised(module, gain=narrow)).eval()


def model(case: Case, wide: bool = False) -> nn.Module:
    """The case's model: in float32, or `wide`, in float64 with larger weights, where rounding can hide no error of logic."""
    return built(case[0].name, case[1], wide)


def spec(case: Case) -> Any:
    """The case's Spec."""
    return case[0].tiny[case[1]]


def initialised(module: nn.Module, gain: float = 0.5) -> nn.Module:
    """Random weights, always the same: matrices of standard deviation gain/sqrt(inputs), so that logits are of order one, gains
    near one, biases and buffers that matter."""
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in sorted(module.state_dict(keep_vars=True).items()):
            noise = torch.randn(value.shape, generator=gen)
            if value.dim() >= 2:
                value.copy_(gain * noise / value.shape[-1] ** 0.5)
            else:
                value.copy_(0.1 * noise + (1.0 if name.endswith("norm.weight") else 0.0))
    return module


def draw_ids(seed: int, shape: Sequence[int], vocab: int) -> Tensor:
    """Random token ids."""
    return torch.randint(vocab, tuple(shape), generator=torch.Generator().manual_seed(seed))


class Hears:
    """A tap listener that wants everything, keeps the names, and lets every value pass."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, str, Any]] = []

    def wants(self, owner: object, name: str) -> bool:
        return True

    def hear(self, owner: object, name: str, value: Any) -> Any:
        self.heard.append((owner, name, value))
        return value
