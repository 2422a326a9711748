"""Recurrent cells and language models against torch's kernels and the lecture's equations (rows 2-8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transept.blocks.recurrent import Cell, GRUCell, LSTMCell, RNNCell, Skip
from transept.core.errors import InputError
from transept.core.registry import family
from transept.core.tap import listening

CELLS: dict[str, tuple[type[Cell], type[nn.RNNBase]]] = {"rnn": (RNNCell, nn.RNN), "lstm": (LSTMCell, nn.LSTM), "gru": (GRUCell, nn.GRU)}
LMS = [(name, tiny) for name in ("rnn", "lstm", "gru") for tiny in ("two", "skip")]


def states(cell: Any, batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(s) for s in cell.empty(torch.zeros(batch, 1, 1)))


@pytest.mark.parametrize("name", CELLS)
def test_the_equations_are_torch_s_kernel(name: str) -> None:
    """In float64, where 1e-6 leaves no room for a wrong gate, and in float32; with gradients."""
    kind, theirs = CELLS[name]
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        torch.manual_seed(1)
        cell = kind(12, 20).to(dtype)
        oracle = theirs(12, 20, batch_first=True).to(dtype)
        oracle.load_state_dict(cell.kernel.state_dict())
        x, before = torch.randn(3, 17, 12, dtype=dtype), tuple(s.to(dtype) for s in states(cell, 3))
        begin = tuple(s[None] for s in before)
        expected, last = oracle(x, begin if len(begin) == 2 else begin[0])
        for way in (cell.forward, cell.reference):
            y, end = way(x, before)
            assert (y - expected).abs().max() <= limit
            assert all((a - b[0]).abs().max() <= limit for a, b in zip(end, last if len(end) == 2 else (last,), strict=True))
        grads = [torch.autograd.grad(way(x, before)[0].square().sum(), list(cell.parameters())) for way in (cell.forward, cell.reference)]
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("stride", [2, 3, 8])
def test_skip_connections_are_the_stride_k_recurrence(name: str, stride: int) -> None:
    torch.manual_seed(2)
    skip = Skip(CELLS[name][0](10, 16), stride)
    for length in (1, stride - 1, stride, 21):
        x, before = torch.randn(2, length, 10), states(skip, 2)
        (y, end), (expected, last) = skip(x, before), skip.reference(x, before)
        assert (y - expected).abs().max() <= 1e-6
        assert all((a - b).abs().max() <= 1e-6 for a, b in zip(end, last, strict=True))
    cut = torch.cat([skip(x[:, :10], before)[0], skip(x[:, 10:], skip(x[:, :10], before)[1])[0]], 1)
    assert (cut - skip(x, before)[0]).abs().max() <= 1e-6
    assert (Skip(skip.cell, 1)(x)[0] - skip.cell(x)[0]).abs().max() <= 1e-6


def test_lstm_gate_cases_exactly() -> None:
    """i = 0, f = 1: the cell keeps what it had, to the bit; i = 1, f = 0: it takes the new value (row 4). Also through the biases of a
    real layer.
    """
    torch.manual_seed(3)
    c, new, o = torch.randn(4, 9), torch.randn(4, 9).tanh(), torch.rand(4, 9)
    zero, one = torch.zeros(4, 9), torch.ones(4, 9)
    assert torch.equal(LSTMCell.gated((zero, one, o), new, c)[1], c)
    assert torch.equal(LSTMCell.gated((one, zero, o), new, c)[1], new)
    cell = LSTMCell(5, 9)
    with torch.no_grad():
        for keep in (True, False):
            for bias in (cell.kernel.bias_ih_l0, cell.kernel.bias_hh_l0):
                bias.zero_()
            cell.kernel.bias_ih_l0[:9] = -200.0 if keep else 200.0
            cell.kernel.bias_ih_l0[9:18] = 200.0 if keep else -200.0
            x = torch.randn(4, 30, 5)
            _, (_, end) = cell(x, (torch.zeros(4, 9), c))
            if keep:
                assert torch.equal(end, c)
            else:
                h = cell(x[:, :-1], (torch.zeros(4, 9), c))[1][0]
                g = (F.linear(x[:, -1], cell.kernel.weight_ih_l0) + F.linear(h, cell.kernel.weight_hh_l0))[:, 18:27].tanh()
                assert (end - g).abs().max() <= 1e-6


@pytest.mark.parametrize(("name", "tiny"), LMS)
def test_a_recurrent_language_model_keeps_the_contract(name: str, tiny: str) -> None:
    """Causality to the bit, chunks = whole, padding anywhere changes nothing, the cache can be reordered, every parameter learns."""
    page = family(name)
    torch.manual_seed(4)
    m = page.build(page.tiny[tiny]).eval()
    ids = torch.randint(96, (3, 23))
    with torch.no_grad():
        whole = m(ids)
        assert whole.logits.shape == (3, 23, 96) and torch.equal(m.head(whole.hidden), whole.logits)
        assert (m(ids[:, :9]).logits - whole.logits[:, :9]).abs().max() <= 1e-6
        cache = m.cache(3)
        parts = torch.cat([m(part, cache=cache).logits for part in ids.split([1, 6, 2, 14], 1)], 1)
        assert (parts - whole.logits).abs().max() <= 1e-6 and cache.length == 23 and cache.nbytes > 0
        cache.reorder(torch.tensor([2, 0, 2, 1]))
        after = m(ids[:1, :3].expand(4, -1), cache=cache).logits
        alone = m(torch.cat((ids[[2, 0, 2, 1]], ids[:1, :3].expand(4, -1)), 1)).logits[:, 23:]
        assert (after - alone).abs().max() <= 1e-6
        mask = torch.ones(3, 23, dtype=torch.bool)
        mask[0, :5] = mask[1, 20:] = mask[2, 4:9] = False
        cache = m.cache(3)
        padded = torch.cat([m(ids[:, at], mask=mask[:, at], cache=cache).logits for at in (slice(0, 4), slice(4, 23))], 1)
        for row in range(3):
            assert (padded[row, mask[row]] - m(ids[row : row + 1, mask[row]]).logits[0]).abs().max() <= 1e-6
        with pytest.raises(InputError, match="go back"):
            cache.truncate(7)
    for bad in (torch.zeros(1, 0, dtype=torch.long), torch.tensor([[96]])):
        with pytest.raises(InputError):
            m(bad)
    F.cross_entropy(m(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in m.parameters())


def test_elmo_is_two_lstms_that_never_meet() -> None:
    page = family("elmo")
    torch.manual_seed(5)
    m = page.build(page.tiny["two"]).eval()
    ids = torch.randint(96, (2, 12))
    with torch.no_grad():
        out, x = m(ids), m.embed(ids)
        stacks = []
        for side, flip in ((m.forwards, False), (m.backwards, True)):
            oracle = nn.LSTM(32, 32, 2, batch_first=True)
            named = {
                key.replace("_l0", f"_l{i}"): value
                for i, layer in enumerate(side.layers)
                for key, value in layer.kernel.state_dict().items()
            }
            oracle.load_state_dict(named)
            y, _ = oracle(x.flip(1) if flip else x)
            stacks.append(y.flip(1) if flip else y)
        assert (out.hidden - torch.cat(stacks, -1)).abs().max() <= 1e-6
        other = ids.clone()
        other[:, 7] = (other[:, 7] + 1) % 96
        changed = m(other)
        assert torch.equal(changed.logits[:, :7], out.logits[:, :7]) and torch.equal(changed.backward[:, 8:], out.backward[:, 8:])
        assert not torch.equal(changed.logits[:, 7:], out.logits[:, 7:])
        mask = torch.arange(12) < torch.tensor([[12], [8]])
        assert (m(ids, mask=mask).layers[:, 1, :8] - m(ids[1:, :8]).layers[:, 0]).abs().max() <= 1e-6
    loss = F.cross_entropy(m(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + F.cross_entropy(
        m(ids).backward[:, 1:].flatten(0, 1), ids[:, :-1].flatten()
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters())


def seq2seq_by_hand(m: Any, look: str, ids: Tensor, source: Tensor) -> tuple[Tensor, Tensor | None]:
    """One row, one step, one source token at a time, from the papers' equations."""
    enc, dec = m.encoder, m.decoder
    x = enc.embed(source[None])
    left, _ = enc.forwards.layers[0].reference(x)
    right, _ = enc.backwards.layers[0].reference(x.flip(1))
    h = torch.cat((left, right.flip(1)), -1)[0]
    s = dec.bridge(torch.cat((left[0, -1], right[0, -1]))).tanh()[None]
    cell, out, maps = dec.cell.layers[0], [], []
    for y in dec.embed(ids[None])[0]:
        if look == "none":
            (s,) = cell.step(y[None], (s,))
            out.append(s[0])
            continue
        if look == "luong":
            (s,) = cell.step(y[None], (s,))
        score = dec.attend.score
        if look == "bahdanau":
            e = torch.stack([(score.v.weight @ (score.w.weight @ s[0] + score.u.weight @ h_j).tanh())[0] for h_j in h])
        else:
            e = torch.stack([s[0] @ score.w.weight @ h_j for h_j in h])
        a = e.exp() / e.exp().sum()
        c = sum(a_j * h_j for a_j, h_j in zip(a, h, strict=True))
        if look == "bahdanau":
            (s,) = cell.step(torch.cat((y, c))[None], (s,))
        out.append((dec.attend.combine.weight @ torch.cat((c, s[0]))).tanh())
        maps.append(a)
    return dec.head(torch.stack(out)), torch.stack(maps) if maps else None


@pytest.mark.parametrize("look", ["none", "bahdanau", "luong"])
def test_sequence_to_sequence_with_and_without_attention(look: str) -> None:
    """Equal to the equations; alignment weights are heard; steps with a cache = all at once; padding of either side changes nothing."""
    page = family("seq2seq")
    torch.manual_seed(6)
    m = page.build(page.tiny[look]).eval()
    ids, source = torch.randint(96, (3, 7)), torch.randint(96, (3, 9))
    heard: list[Tensor] = []

    class Ear:
        def wants(self, owner: object, name: str) -> bool:
            return name == "weights"

        def hear(self, owner: object, name: str, value: Any) -> Any:
            if name == "weights":
                heard.append(value)
            return value

    with torch.no_grad(), listening(Ear()):
        whole = m(ids, source=source)
    assert bool(heard) == (look != "none")
    with torch.no_grad():
        for row in range(3):
            expected, maps = seq2seq_by_hand(m, look, ids[row], source[row])
            assert (whole.logits[row] - expected).abs().max() <= 1e-5
            if maps is not None:
                assert (heard[0][row, 0] - maps).abs().max() <= 1e-5
        cache = m.cache(3)
        steps = torch.cat(
            [m(part, source=source if i == 0 else None, cache=cache).logits for i, part in enumerate(ids.split([1, 4, 2], 1))], 1
        )
        assert (steps - whole.logits).abs().max() <= 1e-6
        source_mask = torch.ones(3, 9, dtype=torch.bool)
        source_mask[0, 6:] = source_mask[1, :3] = False
        mask = torch.arange(7) < torch.tensor([[7], [7], [4]])
        padded = m(ids, source=source, source_mask=source_mask, mask=mask).logits
        for row in range(3):
            alone = m(ids[row : row + 1, mask[row]], source=source[row : row + 1, source_mask[row]]).logits
            assert (padded[row, mask[row]] - alone[0]).abs().max() <= 1e-6
    F.cross_entropy(m(ids, source=source).logits.flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters())
    with pytest.raises(InputError, match="source"):
        m(ids)
