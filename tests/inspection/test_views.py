"""Rollout, lens, interventions, positions, latency and pictures, each against its definition; and the two commands."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import transept
from tests.inspection.test_watch import logits, made
from transept.blocks.positions import Learned, Relative
from transept.blocks.stack import Stack
from transept.cli.main import main
from transept.core.errors import InputError
from transept.core.registry import family
from transept.door import Model
from transept.inspection import plots
from transept.inspection.attention import called, distance, kinds, maps, rolled, rollout
from transept.inspection.interventions import ablated, divergence, importance_of_heads, probabilities, traced
from transept.inspection.latency import PARTS, breakdown, of_records
from transept.inspection.lens import lens
from transept.inspection.positions import similarity


def test_rollout_is_the_product_by_hand() -> None:
    """Abnar and Zuidema's recursion in numpy, on random stochastic matrices and on a model."""
    gen = torch.Generator().manual_seed(0)
    given = [torch.rand(1, 3, 6, 6, generator=gen).softmax(-1) for _ in range(4)]
    total = np.eye(6)
    for layer in given:
        mixed = 0.5 * layer[0].mean(0).double().numpy() + 0.5 * np.eye(6)
        total = (mixed / mixed.sum(-1, keepdims=True)) @ total
    assert np.abs(rollout(given)[0].double().numpy() - total).max() <= 1e-6
    module, ids, _ = made("llama", "gqa")
    every = [torch.stack([one.weights for one in maps(module, ids, layer=i)], 1) for i in range(2)]
    assert (rolled(module, ids) - rollout(every)).abs().max() <= 1e-6 and (rolled(module, ids).sum(-1) - 1).abs().max() <= 1e-5
    assert (rolled(module, ids, layer=0) - rollout(every[:1])).abs().max() <= 1e-6
    assert not rolled(module, ids).triu(1).any()


def test_kinds_and_distance() -> None:
    module, ids, source = made("t5")
    assert kinds(module) == ["self", "encoder", "cross"] and kinds(made("bert")[0]) == ["self"] and kinds(made("lstm")[0]) == []
    sizes = {kind: maps(module, ids, source=source, kind=kind)[0].weights.shape[1:] for kind in kinds(module)}
    assert sizes == {"self": (9, 9), "encoder": (7, 7), "cross": (9, 7)}
    with pytest.raises(InputError, match="no attention of the kind 'cross'"):
        maps(*made("bert")[:2], kind="cross")
    with pytest.raises(InputError, match="it has no attention"):
        maps(*made("lstm")[:2])
    eye = torch.eye(5)[None]
    assert distance(eye) == 0 and distance(eye.roll(1, -1)[:, 1:, :]) >= 1 and distance(torch.full((1, 2, 2), 0.5)) == 0.5


@pytest.mark.parametrize("name", ["llama", "gpt", "bert", "albert", "deberta", "t5", "bart", "deepseek_v3", "lstm", "sparse", "opt"])
def test_the_last_layer_of_the_lens_is_the_model(name: str) -> None:
    """Bit for bit; and each layer before is what the model says without the layers above."""
    module, ids, source = made(name)
    depths = list(lens(module, ids, source=source))
    assert torch.equal(depths[-1].logits, logits(module, ids, source)) and depths[-1].name == "hidden"
    assert [d.layer for d in depths] == [*range(len(depths))]
    if name in ("llama", "gpt", "bert", "t5", "bart", "deepseek_v3", "opt"):
        for depth in depths[:-1]:
            shorter = copy.deepcopy(module)
            stack = (shorter.decoder if hasattr(shorter, "decoder") else shorter).stack
            assert isinstance(stack, Stack)
            stack.layers = nn.ModuleList([*stack.layers][: depth.layer])
            assert (depth.logits - logits(shorter, ids, source)).abs().max() <= 1e-5
    short = list(lens(module, ids, source=source, last=2))
    assert (short[-1].logits - depths[-1].logits[:, -2:]).abs().max() <= 1e-6 and len(short) == len(depths)
    chance = depths[-1].logits[0, 0].double().softmax(-1)
    assert abs(float(depths[-1].entropy()[0, 0]) + float((chance * chance.log2()).sum())) <= 1e-9


def test_a_model_without_words_has_no_lens() -> None:
    page = family("bert")
    form = next(form for form in page.published if form.architecture == "BertModel")
    module = form.build(page.tiny["two"])
    with pytest.raises(InputError, match="scores no vocabulary"):
        list(lens(module, torch.ones(1, 3, dtype=torch.long)))


def test_ablation_and_its_measures() -> None:
    module, ids, _ = made("llama", "gqa")
    before, after = ablated(module, ids, [])
    assert before is after
    before, after = ablated(module, ids, ["attn[0].head[1]"])
    bits = divergence(before.logits, after.logits)
    p, q = before.logits.double().softmax(-1), after.logits.double().softmax(-1)
    assert (bits - F.kl_div(q.log(), p, reduction="none").sum(-1) / math.log(2)).abs().max() <= 1e-9 and bits.max() > 0
    scores = importance_of_heads(module, ids, ["attn[0].head[1]", "attn[1].head[3]"])
    assert abs(scores["attn[0].head[1]"] - float(bits[:, -1].mean())) <= 1e-9 and len(scores) == 2
    chances = probabilities(before.logits, ids)
    for b, t in ((b, t) for b in range(2) for t in range(8)):
        assert abs(float(chances[b, t]) - float(p[b, t, ids[b, t + 1]])) <= 1e-12


def test_tracing_finds_where_a_difference_lies() -> None:
    """The texts differ at one token: before it nothing carries the difference, in the first layer that token alone carries all of it."""
    module, ids, _ = made("llama", "gqa")
    given, taken = ids[:1], ids[:1].clone()
    taken[0, 5] = (taken[0, 5] + 7) % 96
    effects = traced(module, given, taken, lambda out: out.logits[0, -1, 11])
    assert effects.shape == (2, 9) and not effects[:, :5].any()
    assert abs(float(effects[-1, -1]) - 1) <= 1e-6 and not effects[-1, :-1].any()
    assert effects[0, 5] != 0 and effects[0, 6:].abs().sum() > 0


def naive(rows: Tensor) -> Tensor:
    rows = rows.detach().double()
    return torch.tensor([[float(a @ b / (a.norm() * b.norm())) for b in rows] for a in rows])


@pytest.mark.parametrize("name", ["bert", "gpt", "opt", "llama", "deepseek_v3", "roformer", "transformer", "t5", "deberta", "lstm"])
def test_positions(name: str) -> None:
    module, _, _ = made(name)
    found = similarity(module, 12)
    matrix = found.matrix
    assert found.told and (matrix.shape == (12, 12) or name == "lstm")
    if found.kind == "learned":
        table = next(m for m in module.modules() if isinstance(m, Learned))
        assert (matrix - naive(table.weight[table.offset :][:12])).abs().max() <= 1e-5
    elif found.kind == "rotary":
        dims, theta = next(m.spec for m in module.modules() if hasattr(getattr(m, "spec", None), "theta")).dims, 10000.0
        theta = next(m.spec for m in module.modules() if hasattr(getattr(m, "spec", None), "theta")).theta
        rates = [theta ** (-2 * k / dims) for k in range(dims // 2)]
        expected = [[sum(math.cos((i - j) * r) for r in rates) / len(rates) for j in range(12)] for i in range(12)]
        assert (matrix - torch.tensor(expected)).abs().max() <= 1e-4
    elif found.kind == "sinusoidal":
        rates = [10000 ** (-2 * k / 32) for k in range(16)]
        expected = [[sum(math.cos((i - j) * r) for r in rates) / len(rates) for j in range(12)] for i in range(12)]
        assert (matrix - torch.tensor(expected)).abs().max() <= 1e-5
    elif name == "t5":
        table = next(m for m in module.modules() if isinstance(m, Relative))
        rows = table.weight.detach().mean(1)
        near = [float(rows[table.spec.buckets // 2 + 1]), float(rows[0]), float(rows[1])]
        assert (torch.stack([matrix[3, 4], matrix[3, 3], matrix[3, 2]]) - torch.tensor(near)).abs().max() <= 1e-6
    elif name == "deberta":
        assert (matrix.diagonal() - 1).abs().max() <= 1e-5 and matrix[0, 1] == matrix[5, 6] and matrix.abs().max() <= 1.00001
    else:
        assert name == "lstm" and found.kind == "none" and not matrix.numel()
    with pytest.raises(InputError, match="at least one"):
        similarity(module, 0)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "deepseek_v3", "lstm", "longformer"])
def test_latency_is_taken_apart(name: str) -> None:
    """Every part has a name of the list, the shares sum to one, and the model and its bits are as before."""
    module, ids, source = made(name)
    plain = logits(module, ids, source)
    found = breakdown(module, ids, source=source, runs=1)
    assert set(found.parts) <= set(PARTS) and [*found.parts] == [part for part in PARTS if part in found.parts]
    assert abs(sum(found.shares().values()) - 1) <= 1e-9 and found.seconds > 0 and found.tokens == ids.numel()
    wanted = (
        {"recurrence", "head"}
        if name == "lstm"
        else {"qkv", "scores", "softmax", "values", "reshape", "output", "ffn", "norm", "embedding"}
    )
    assert wanted <= set(found.parts)
    assert torch.equal(logits(module, ids, source), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    with pytest.raises(InputError, match="runs"):
        breakdown(module, ids, runs=0)


def test_what_is_timed_is_what_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention taken apart gives the fused kernel's numbers: the clock's own call of the model ends in the same logits."""
    import transept.inspection.latency as latency

    for name, tiny in (("llama", "gqa"), ("bert", "two"), ("t5", "")):
        module, ids, source = made(name, tiny)
        seen: list[Tensor] = []

        def noted(*args: Any, seen: list[Tensor] = seen) -> Any:
            out = called(*args)
            seen.append(out.logits)
            return out

        monkeypatch.setattr(latency, "called", noted)
        breakdown(module, ids, source=source, runs=1)
        assert len(seen) == 4 and all((a - seen[0]).abs().max() <= 1e-5 for a in seen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.serving import tiny

    return tiny.decoder(tmp_path_factory.mktemp("seen") / "tiny")


def test_records_of_the_native_core_have_parts(folder: Path) -> None:
    """Every record of a lowered decoder belongs to a part that its name says."""
    from transept.native.binding import OPS

    lowered: Any = transept.load(folder).lowered()
    program = lowered.runner.program
    operations = [OPS[record.op] for record in program.records]
    found = of_records(program.labels, operations, [1.0] * len(operations), 4)
    assert found.engine == "native" and found.apart == len(operations) and "other" not in found.parts
    linear = [label for label, op in zip(program.labels, operations, strict=True) if op == "linear"]
    assert found.parts["output"] == sum(label.endswith("attn.out") for label in linear) == 2
    assert found.parts["attention"] == 2 and found.parts["ffn"] >= 4 and found.parts["head"] == 1 and found.parts["qkv"] >= 2


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = main(line)
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_tells_and_draws(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    m: Model = transept.load(folder)
    ids = torch.tensor([m.encode("A quick fox.")])
    code, out, _ = run(capsys, "inspect", str(folder), "A quick fox.", "--layer", "1", "--head", "2", "--json")
    (one,) = json.loads(out)["maps"]
    assert code == 0 and (torch.tensor(one["weights"]) - maps(m, ids, layer=1, head=2)[0].weights[0]).abs().max() <= 1e-6
    for view, suffix in (
        ((), ".png"),
        (("--layer", "0"), ".svg"),
        (("--rollout",), ".png"),
        (("--lens",), ".svg"),
        (("--positions",), ".png"),
    ):
        target = tmp_path / f"picture{suffix}"
        code, out, err = run(capsys, "inspect", str(folder), "A $quick$ fox \u4e09.", *view, "--png", str(target))
        assert code == 0 and str(target) in out and not err, err
        begun = target.read_bytes()
        assert begun.startswith(b"\x89PNG\r\n") if suffix == ".png" else b"<svg" in begun[:2000]
        target.unlink()
    code, out, _ = run(capsys, "inspect", str(folder), "--names")
    assert code == 0 and "attn[0..1].head[0..3]" in out.splitlines()
    code, out, _ = run(capsys, "inspect", str(folder), "A fox", "--off", "attn[0]", "--off", "attn[1].head[2]", "--json")
    record = json.loads(out)
    assert code == 0 and record["divergence"] > 0 and len(record["after"]) == 5
    code, _, err = run(capsys, "inspect", str(folder), "A fox", "--off", "atn[0]")
    assert code == 1 and "nearest: 'attn[0]'" in err
    code, _, err = run(capsys, "inspect", str(folder), "A fox", "--png", "picture.gif")
    assert code == 1 and ".png or .svg" in err
    code, _, err = run(capsys, "inspect", str(folder), "A fox", "--target", "b")
    assert code == 1 and "encoder-decoders" in err


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_profile_prints_the_parts(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, engine: str) -> None:
    target = tmp_path / "bars.png"
    more = ("--torch",) if engine == "torch" else ()
    code, out, _ = run(capsys, "profile", str(folder), "--tokens", "12", "--runs", "2", "--json", "--png", str(target), *more)
    record = json.loads(out)
    assert code == 0 and record["engine"] == engine and record["tokens"] == 12 and target.read_bytes().startswith(b"\x89PNG")
    assert abs(sum(part["share"] for part in record["parts"]) - 1) < 1e-6
    names = {part["part"] for part in record["parts"]}
    assert {"qkv", "ffn", "norm", "output"} <= names and ("attention" if engine == "native" else "softmax") in names
    code, out, _ = run(capsys, "profile", str(folder), "A fox", "--runs", "1", *more)
    assert code == 0 and "one pass over" in out
    code, _, err = run(capsys, "profile", str(folder), "--tokens", "5000")
    assert code == 1 and "1024" in err


def test_pictures_without_matplotlib_say_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install 'transept\\[plot\\]'"):
        plots.matrix(tmp_path / "a.png", torch.eye(2), ["a", "b"], ["a", "b"])
