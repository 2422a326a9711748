"""Optimisers, schedules and means of weights against torch's and transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from transept.core.errors import ConfigError
from transept.training.optim import Mean, Muon, averaged, optimisers, orthogonal, parameters
from transept.training.run import Optim, Schedule, Shape
from transept.training.schedules import factor

STEPS, WARM = 50, 7


def theirs(make, **options) -> list[float]:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimiser, WARM, **options)
    found = []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    "shape,make,options",
    [
        (Shape.COSINE, get_cosine_schedule_with_warmup, {"num_training_steps": STEPS}),
        (Shape.LINEAR, get_linear_schedule_with_warmup, {"num_training_steps": STEPS}),
        (Shape.WSD, get_wsd_schedule, {"num_training_steps": STEPS, "num_decay_steps": 10, "decay_type": "linear"}),
    ],
    ids=["cosine", "linear", "wsd"],
)
def test_schedules_are_those_of_transformers_at_every_step(shape, make, options) -> None:
    wanted = theirs(make, **options)
    # Of the 43 steps after warm-up the last 10 come down.
    schedule = Schedule(shape=shape, warmup=WARM, floor=0.0, decay=10 / (STEPS - WARM))
    found = [factor(schedule, step, step / STEPS) for step in range(STEPS)]
    assert found[WARM:] == pytest.approx(wanted[WARM:], abs=1e-9)
    # Warm-up begins one step higher: theirs leaves the first update out.
    assert found[: WARM - 1] == pytest.approx(wanted[1:WARM], abs=1e-9)


def test_a_schedule_by_time_goes_the_same_way() -> None:
    schedule = Schedule(shape=Shape.COSINE, warmup=0.1, floor=0.2)
    assert factor(schedule, 999, 0.05) == pytest.approx(0.5)
    assert factor(schedule, 999, 0.1) == pytest.approx(1.0)
    assert factor(schedule, 999, 0.55) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factor(schedule, 999, 1.0) == pytest.approx(0.2)


def net() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.ModuleList([nn.Linear(8, 12), nn.LayerNorm(12)])
    return nn.ModuleDict({"embed": nn.Embedding(5, 8), "layers": layers, "head": nn.Linear(12, 5)})


def test_norms_and_biases_do_not_decay_and_muon_takes_the_layers_matrices() -> None:
    model = net()
    named = parameters(model)
    adam, muon = optimisers(named, Optim(muon=0.01, decay=0.3), model)
    decays = {id(p): group["weight_decay"] for group in adam.param_groups for p in group["params"]}
    for name, p in named.items():
        if name == "layers.0.weight":
            assert muon.param_groups[0]["params"] == [p] and id(p) not in decays
        else:
            assert decays[id(p)] == (0.3 if p.ndim > 1 else 0.0), name


def test_muon_in_bfloat16_is_torchs_and_in_float32_nearly() -> None:
    for dtype, tolerance in ((torch.bfloat16, 1e-6), (torch.float32, 2e-2)):
        torch.manual_seed(0)
        # One matrix of each shape, so that both multiply the same products.
        ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 16), (24, 8), (16, 16))]
        other = [nn.Parameter(p.detach().clone()) for p in ours]
        mine = Muon(ours, lr=0.02, momentum=0.9, decay=0.1, dtype=dtype)
        torchs = torch.optim.Muon(other, lr=0.02, momentum=0.9, weight_decay=0.1)
        for _ in range(5):
            for p, q in zip(ours, other, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            mine.step()
            torchs.step()
        for p, q in zip(ours, other, strict=True):
            assert (p - q).abs().max() <= tolerance * (1 if dtype is torch.bfloat16 else 0.2)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    found = torch.linalg.svdvals(orthogonal(torch.randn(3, 20, 9), 5, torch.float32))
    assert found.min() > 0.3 and found.max() < 1.3


@pytest.mark.parametrize("shape", [(3, 20, 80), (2, 96, 32), (2, 16, 31), (1, 12, 12)])
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_newton_schulz_is_its_iteration_in_float64(shape: tuple[int, int, int], spread: float) -> None:
    x = torch.randn(shape[0], shape[1], 2) @ torch.randn(shape[0], 2, shape[2]) + spread * torch.randn(shape)
    y = x.double() / torch.linalg.matrix_norm(x.double(), keepdim=True)
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y - 4.7750 * (square @ y) + 2.0315 * (square @ square @ y)
    assert (orthogonal(x, 5, torch.float32) - y).norm() <= 2e-4 * y.norm()


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ConfigError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_means_of_weights_are_torchs_and_leave_the_trained_ones_alone(decay: float) -> None:
    model = net()
    kind = {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(decay)} if decay else {}
    reference = torch.optim.swa_utils.AveragedModel(model, **kind)
    mean = Mean(parameters(model), decay)
    for step in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if decay and step < 11:
            # Until 1 / count is below 1 - decay an exponential mean is a plain one; torch's begins at once.
            mean.update()
            if step == 10:
                for name, p in reference.module.named_parameters():
                    p.data.copy_(mean.weights[name])
                reference.n_averaged += 1
            continue
        mean.update()
        reference.update_parameters(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with averaged([mean]):
        for (name, p), q in zip(model.named_parameters(), reference.module.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-6), name
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
