"""Dropout against its definition: the share of zeros, what the others become, their gradients, and torch's module where it serves."""

from __future__ import annotations

import copy

import pytest
import torch

from transept.blocks.dropout import Dropout


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(400, 1001), (7, 3, 65536)])
def test_the_share_of_zeros_and_what_the_others_become(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.full(shape, 3.0, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    zero = y == 0
    # Each of the four numbers of a draw, so that none sees another range than the others.
    for part in (zero.flatten()[i::4] for i in range(4)):
        assert abs(part.float().mean().item() - p) <= 5 * (p * (1 - p) / part.numel()) ** 0.5 + 2**-17
    assert torch.allclose(y[~zero], torch.tensor(3 / (1 - p)), rtol=2**-14)
    assert x.grad is not None and torch.equal(x.grad == 0, zero) and torch.allclose(x.grad * 3, y.detach())


def test_neighbours_and_calls_do_not_know_of_each_other() -> None:
    torch.manual_seed(1)
    drop, n = Dropout(0.3), 1 << 20
    first, second = ((drop(torch.ones(n)) == 0).float() for _ in range(2))
    for a, b in ((first, second), *((first[:-k], first[k:]) for k in (1, 2, 3, 4, 5))):
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1].item()) < 5 / n**0.5


def test_a_seed_gives_the_same_zeros_and_a_model_at_rest_none() -> None:
    drop, x = Dropout(0.4), torch.randn(5, 6, 7)
    torch.manual_seed(2)
    first = drop(x)
    torch.manual_seed(2)
    assert torch.equal(drop(x), first) and not torch.equal(drop(x), first)
    assert torch.equal(copy.deepcopy(drop).eval()(x), x)
    assert drop(x.to(torch.bfloat16)).dtype is torch.bfloat16
    assert drop(x[:0]).shape == (0, 6, 7)
    for p in (0.0, 1.0):
        assert torch.equal(Dropout(p)(x), x * (1 - p))
