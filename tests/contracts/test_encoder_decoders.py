"""One contract for every encoder-decoder (rows 7, 8, 18, 32, 35, 37-39, 123)."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn

import transept
from tests.contracts.decoders import Hears, draw_ids, initialised
from tests.counts import count
from transept.blocks.alignment import BiEncoder
from transept.blocks.attention import Attention
from transept.blocks.cross import CrossAttention
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.norms import NoNorm
from transept.blocks.positions import Sinusoidal
from transept.blocks.seq2seq import EncoderDecoder, SourceEncoder
from transept.checkpoints.save import form_for
from transept.core.errors import InputError
from transept.core.registry import family
from transept.core.tap import listening
from transept.door import Model
from transept.inference.rules import Rules
from transept.models.text import transformer
from transept.ops.relative import BucketSpec, buckets
from transept.ops.rotary import Layout

NEAR = 3e-6
CASES = [(page, tiny) for page in ("transformer", "bart", "t5", "seq2seq") for tiny in family(page).tiny]
EXAMPLES = settings(max_examples=count(40))
SEEDS = st.integers(0, 2**31)
_MODELS: dict[tuple[str, str], nn.Module] = {}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c))


def model(case: tuple[str, str]) -> nn.Module:
    page = family(case[0])
    if case not in _MODELS:
        m = initialised(page.build(page.tiny[case[1]]), gain=1.0)
        with torch.no_grad():
            for name, value in m.named_parameters():
                # T5 does not divide its scores; its queries are smaller from the start.
                if case[0] == "t5" and name.endswith(".q.weight"):
                    value.mul_(value.shape[0] ** -0.5)
        _MODELS[case] = m.eval()
    return _MODELS[case]


def vocab(case: tuple[str, str]) -> int:
    return vars(family(case[0]).tiny[case[1]])["vocab"]


def run(m: nn.Module, ids: Tensor, **rest: object) -> Tensor:
    with torch.no_grad():
        return m(ids, **rest).logits


@every_case
def test_weights_go_round(case: tuple[str, str], tmp_path: Path) -> None:
    """Saved as a folder and loaded: the same family, the same Spec, the same bits, the same results."""
    page, m = family(case[0]), model(case)
    spec = page.tiny[case[1]]
    form = form_for(page, spec)
    rules = Rules(start=3, ends=(5,), beams=2, most=9)
    transept.save(Model(m, page, form, spec, rules=rules), tmp_path)
    again = transept.load(tmp_path)
    assert again.family is page and again.spec == spec and again.form is form and again.rules == rules
    ids = draw_ids(9, (2, 7), vocab(case))
    assert torch.equal(run(again.model, ids, source=ids), run(m, ids, source=ids))


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    off = (found - expected).abs().max().item()
    assert off <= NEAR * max(1.0, expected.std().item()), f"off by {off:.2e}"


@every_case
@EXAMPLES
@given(seed=SEEDS, batch=st.integers(1, 3), length=st.integers(1, 14), sources=st.integers(1, 12), chunk=st.integers(1, 5))
def test_cached_equals_uncached(case: tuple[str, str], seed: int, batch: int, length: int, sources: int, chunk: int) -> None:
    """In chunks with a cache, the source given once, against one call: relative positions too (row 35)."""
    m = model(case)
    ids, source = draw_ids(seed, (batch, length), vocab(case)), draw_ids(seed + 1, (batch, sources), vocab(case))
    cache = m.cache(batch, 1)
    parts = [run(m, part, source=source if i == 0 else None, cache=cache) for i, part in enumerate(ids.split(chunk, 1))]
    near(torch.cat(parts, 1), run(m, ids, source=source))


@every_case
@EXAMPLES
@given(seed=SEEDS, rows=st.lists(st.integers(1, 12), min_size=1, max_size=4), left=st.booleans(), length=st.integers(1, 10))
def test_padding_of_the_source_changes_nothing(case: tuple[str, str], seed: int, rows: list[int], left: bool, length: int) -> None:
    """Each row of a batch, its source padded on either side, gives what it gives alone (row 18)."""
    m, width = model(case), max(rows) + 2
    source, ids = draw_ids(seed, (len(rows), width), vocab(case)), draw_ids(seed + 1, (len(rows), length), vocab(case))
    starts = [width - real if left else 0 for real in rows]
    mask = torch.tensor([[at <= i < at + real for i in range(width)] for at, real in zip(starts, rows, strict=True)])
    y, cache = run(m, ids, source=source, source_mask=mask), m.cache(len(rows))
    near(torch.cat([run(m, one, source=source, source_mask=mask, cache=cache) for one in ids.split(1, 1)], 1), y)
    for i, (at, real) in enumerate(zip(starts, rows, strict=True)):
        near(y[i : i + 1], run(m, ids[i : i + 1], source=source[i : i + 1, at : at + real]))


@every_case
@EXAMPLES
@given(seed=SEEDS, length=st.integers(2, 12), left=st.integers(0, 4), right=st.integers(0, 4))
def test_padding_of_the_target_changes_nothing(case: tuple[str, str], seed: int, length: int, left: int, right: int) -> None:
    m = model(case)
    source, ids = draw_ids(seed, (1, 7), vocab(case)), draw_ids(seed + 1, (1, left + length + right), vocab(case))
    mask = torch.tensor([[False] * left + [True] * length + [False] * right])
    y = run(m, ids, source=source, mask=mask)[:, left : left + length]
    near(y, run(m, ids[:, left : left + length], source=source))


@every_case
@EXAMPLES
@given(seed=SEEDS, length=st.integers(2, 12), data=st.data())
def test_later_targets_change_nothing_but_every_source_token_counts(
    case: tuple[str, str], seed: int, length: int, data: st.DataObject
) -> None:
    m, words = model(case), vocab(case)
    cut = data.draw(st.integers(1, length - 1))
    source, ids = draw_ids(seed, (1, 6), words), draw_ids(seed + 1, (1, length), words)
    changed = ids.clone()
    changed[:, cut:] = (ids[:, cut:] + 1) % words
    y = run(m, ids, source=source)
    assert torch.equal(y[:, :cut], run(m, changed, source=source)[:, :cut])
    other = source.clone()
    other[0, data.draw(st.integers(0, 5))] += 1
    assert (run(m, ids, source=other % words)[:, 0] - y[:, 0]).abs().max() > 1e-4


@every_case
def test_one_source_serves_every_row(case: tuple[str, str]) -> None:
    m = model(case)
    source, ids = draw_ids(0, (1, 9), vocab(case)), draw_ids(1, (4, 6), vocab(case))
    expected = run(m, ids, source=source.expand(4, -1))
    near(run(m, ids, source=source), expected)
    cache = m.cache(4)
    near(torch.cat([run(m, one, source=source, cache=cache) for one in ids.split(1, 1)], 1), expected)


@every_case
@EXAMPLES
@given(seed=SEEDS, rows=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_reordered_cache_equals_recomputation(case: tuple[str, str], seed: int, rows: list[int]) -> None:
    """Beam search over several sources: each row takes its source along."""
    m, words = model(case), vocab(case)
    source, mask = draw_ids(seed, (3, 8), words), torch.arange(8)[None] < torch.tensor([[8], [5], [2]])
    ids, more = draw_ids(seed + 1, (3, 5), words), draw_ids(seed + 2, (len(rows), 2), words)
    cache, chosen = m.cache(3), torch.tensor(rows)
    run(m, ids, source=source, source_mask=mask, cache=cache)
    cache.reorder(chosen)
    y = torch.cat([run(m, more[:, i : i + 1], cache=cache) for i in range(2)], 1)
    near(y, run(m, torch.cat((ids[chosen], more), 1), source=source[chosen], source_mask=mask[chosen])[:, 5:])


@every_case
def test_teacher_forced_loss_equals_step_by_step(case: tuple[str, str]) -> None:
    """Training sees all targets at once, inference one after another; the loss is the same (row 123)."""
    m = model(case)
    source, ids = draw_ids(3, (3, 8), vocab(case)), draw_ids(4, (3, 11), vocab(case))
    at_once = F.cross_entropy(run(m, ids[:, :-1], source=source).flatten(0, 1), ids[:, 1:].flatten())
    predictor, losses = m.given(source), []
    cache = predictor.cache(3)
    with torch.no_grad():
        for i in range(10):
            logits = predictor.head(predictor.hidden(ids[:, i : i + 1], cache=cache)[:, -1])
            losses.append(F.cross_entropy(logits, ids[:, i + 1]))
    assert abs(torch.stack(losses).mean().item() - at_once.item()) <= 1e-6 * max(1.0, at_once.item())


@every_case
def test_the_memory_is_read_once_per_cache(case: tuple[str, str]) -> None:
    """With a cache the source is encoded once and its keys and values are projected once, however many tokens follow."""
    m, calls = copy.deepcopy(model(case)), []
    for part in m.modules():
        if isinstance(part, CrossAttention):
            part.k.register_forward_hook(lambda *_: calls.append("k"))
        if isinstance(part, SourceEncoder):
            part.stack.register_forward_hook(lambda *_: calls.append("encode"))
        if isinstance(part, BiEncoder):
            part.forwards.register_forward_hook(lambda *_: calls.append("encode"))
    source, cache = draw_ids(0, (2, 7), vocab(case)), m.cache(2)
    for i in range(4):
        run(m, draw_ids(i, (2, 1), vocab(case)), source=source, cache=cache)
    layers = sum(isinstance(part, CrossAttention) for part in m.modules())
    assert calls.count("k") == layers and calls.count("encode") == 1


@every_case
def test_cross_attention_can_be_watched(case: tuple[str, str]) -> None:
    """The maps from target to source are heard, sum to one over the real tokens, and listening changes no bit."""
    m, ids = model(case), draw_ids(0, (2, 5), vocab(case))
    source, mask = draw_ids(1, (2, 7), vocab(case)), torch.arange(7)[None] < torch.tensor([[7], [4]])
    quiet, ear = run(m, ids, source=source, source_mask=mask), Hears()
    with listening(ear):
        assert torch.equal(run(m, ids, source=source, source_mask=mask), quiet)
    maps = [value for owner, name, value in ear.heard if name == "weights" and isinstance(owner, CrossAttention)]
    assert len(maps) == sum(isinstance(part, CrossAttention) for part in m.modules())
    for w in maps:
        assert w.shape[2:] == (5, 7)
        assert torch.allclose(w.sum(-1), torch.ones(()), atol=1e-5)
        assert w[1, :, :, 4:].abs().max() == 0


@every_case
def test_every_parameter_learns(case: tuple[str, str]) -> None:
    m = copy.deepcopy(model(case)).train()
    out = m(draw_ids(0, (3, 9), vocab(case)), source=draw_ids(1, (3, 8), vocab(case)))
    out.logits.log_softmax(-1)[..., 0].sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name.endswith(".k.bias") or parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


@every_case
def test_what_does_not_fit_is_refused(case: tuple[str, str]) -> None:
    m = model(case)
    source, ids = draw_ids(0, (3, 6), vocab(case)), draw_ids(1, (2, 4), vocab(case))
    with pytest.raises(InputError, match="source="):
        m(ids)
    with pytest.raises(InputError, match="3 rows, but the target has 2"):
        m(ids, source=source)
    cache = m.cache(2)
    m(ids, source=source[:2], cache=cache)
    with pytest.raises(InputError, match="another source"):
        m(ids, source=source[1:], cache=cache)
    # Under the tests' run-time check of shapes its own error may come first.
    with pytest.raises((InputError, TypeCheckError), match="mask"):
        m(ids, source=source[:2], source_mask=torch.ones(2, 5, dtype=torch.bool))


@EXAMPLES
@given(seed=SEEDS, order=st.permutations(range(9)))
def test_an_encoder_without_positions_does_not_see_order(seed: int, order: list[int]) -> None:
    """Permuting the source permutes the states; the sinusoid is what ends that (rows 31, 37)."""
    spec = transformer.TINY["2017"]
    tokens = TokenEmbedding(spec.vocab, spec.dim)
    plain = initialised(SourceEncoder(Embedding(tokens), [transformer.encoder_layer(spec) for _ in range(2)], NoNorm()), gain=1.0).eval()
    ids = draw_ids(seed, (1, 9), spec.vocab)
    with torch.no_grad():
        near(plain(ids[:, order]).hidden, plain(ids).hidden[:, order])
        if order != sorted(order) and len(set(ids[0].tolist())) == 9:
            placed = model(("transformer", "2017")).encoder
            assert (placed(ids[:, order]).hidden - placed(ids).hidden[:, order]).abs().max() > 1e-3


def wave(layout: Layout, positions: Tensor, dim: int = 64) -> Tensor:
    return Sinusoidal(dim, layout)(torch.zeros(1, len(positions), dim), positions[None])[0]


@pytest.mark.parametrize("layout", Layout)
def test_sinusoidal_positions_have_their_three_properties(layout: Layout) -> None:
    """Each position is unique, equal steps are equally far apart wherever they are taken, and no position is too far (row 32)."""
    p = wave(layout, torch.arange(2000))
    gap = torch.cdist(p, p) + 1e3 * torch.eye(2000)
    assert gap.min() > 0.1
    for step in (1, 7, 100):
        distance = (p[step:] - p[:-step]).norm(dim=1)
        assert (distance - distance.mean()).abs().max() < 1e-4
    assert wave(layout, torch.tensor([10**6])).isfinite().all()


def test_both_layouts_of_the_sinusoid_are_the_papers_formula() -> None:
    rows = [[f(p / 10000 ** (2 * i / 64)) for i in range(32) for f in (math.sin, math.cos)] for p in range(50)]
    naive = torch.tensor(rows)
    pairs, halves = wave(Layout.PAIRS, torch.arange(50)), wave(Layout.HALVES, torch.arange(50))
    assert (pairs - naive).abs().max() < 1e-6
    assert (halves - torch.cat((naive[:, 0::2], naive[:, 1::2]), 1)).abs().max() < 1e-6


@pytest.mark.parametrize("both", [True, False])
def test_buckets_of_distance_are_exact_near_and_logarithmic_far(both: bool) -> None:
    """Half of a side's buckets hold one distance each; beyond, wider and wider ones; all far distances share the last (row 35)."""
    spec = BucketSpec(buckets=32, distance=128, both=both)
    side = 16 if both else 32
    found = buckets(torch.arange(-400, 1), spec).flip(0).tolist()
    assert found[: side // 2] == list(range(side // 2))
    assert found == sorted(found) and set(found[128:]) == {side - 1} and max(found) == side - 1
    ahead = buckets(torch.arange(1, 401), spec).tolist()
    assert ahead == ([16 + b for b in found[1:]] if both else [0] * 400)
    for far in range(side // 2, 128):
        grown = side // 2 + math.log(far / (side // 2)) / math.log(128 / (side // 2)) * (side // 2)
        assert abs(found[far] - math.floor(grown)) <= (1 if abs(grown - round(grown)) < 1e-5 else 0)


def test_the_relative_table_is_held_once_per_stack() -> None:
    m = model(("t5", "2019"))
    tables = [name for name in m.state_dict() if "position" in name]
    assert tables == [f"{side}.stack.layers.0.attn.position.weight" for side in ("encoder", "decoder")]
    assert isinstance(m, EncoderDecoder)
    assert all(part.position.bias is not None for part in m.modules() if isinstance(part, Attention))
