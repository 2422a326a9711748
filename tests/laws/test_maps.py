"""The laws of the name maps (total, injective, anchored, bits only, each op its own inverse, pure), for every form of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.counts import count
from tests.laws.forms import Memory, bits, forms, held, numbers, same, shapes
from transept.core.errors import ConfigError, MappingError, TranseptError
from transept.core.registry import Family, Published, by_architecture, family
from transept.mapping import Cat, Drop, Map, Reshape, Row, SplitHeads, Stack, T, Tied, Unpair

every_form = pytest.mark.parametrize(("page", "form"), forms(), ids=lambda v: getattr(v, "architecture", None) or v.name)


# --- whole maps --------------------------------------------------------------------------------------------------------------------------


@every_form
def test_every_form_holds_a_tiny_spec(page: Family, form: Published) -> None:
    """Otherwise the tests below would say nothing of it."""
    print(f"{form.architecture} holds {list(held(page, form))} of {list(page.tiny)}")
    assert held(page, form)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_native_to_foreign_and_back(page: Family, form: Published, dtype: torch.dtype) -> None:
    """The same bits come back; what is written is the same numbers, each once (and tied copies); what was given is not changed."""
    for spec in held(page, form).values():
        named = shapes(page, form, spec)
        native = numbers(named, dtype)
        kept = {key: tensor.clone() for key, tensor in native.items()}
        foreign = form.names.save(native, spec)
        same(native, kept)
        assert all(tensor.is_contiguous() for tensor in foreign.values())
        read = {key for bond in form.names.bonds(spec) for key in bond.foreign}
        assert read <= set(foreign)
        assert torch.equal(bits(native.values()), bits(foreign[key] for key in read))
        given_ = {key: tensor.clone() for key, tensor in foreign.items()}
        same(dict(form.names.load(Memory(foreign), spec, named)), native)
        same(foreign, given_)


@every_form
def test_foreign_to_native_and_back(page: Family, form: Published) -> None:
    """A published file, read and written, is the same file."""
    for spec in held(page, form).values():
        named = shapes(page, form, spec)
        written = form.names.save(numbers(named), spec)
        read = {key for bond in form.names.bonds(spec) for key in bond.foreign}
        foreign = numbers({key: tuple(written[key].shape) for key in sorted(read)})
        native = dict(form.names.load(Memory(foreign), spec, named))
        assert {key: tuple(tensor.shape) for key, tensor in native.items()} == named
        again = form.names.save(native, spec)
        same({key: again[key] for key in read}, foreign)


@every_form
def test_every_key_counts(page: Family, form: Published) -> None:
    """Total, key by key: without any one of its keys a file is refused, and with one more key beside any of them too, each time by
    its name.
    """
    spec = next(iter(held(page, form).values()))
    named = shapes(page, form, spec)
    written = form.names.save(numbers(named), spec)
    for key in written:
        less = {k: t for k, t in written.items() if k != key}
        try:
            loaded = dict(form.names.load(Memory(less), spec, named))
        except MappingError as error:
            assert repr(key) in str(error)
        else:
            # Only a tied copy may be missing: then nothing is lost.
            same(loaded, dict(form.names.load(Memory(written), spec, named)))
            assert key in {tie.foreign for tie in form.names.ties} | {spare.foreign for spare in form.names.spares}
    for key in list(written)[:: max(1, len(written) // 20)]:
        more = {**written, f"{key}_2": torch.zeros(1)}
        with pytest.raises(MappingError) as caught:
            dict(form.names.load(Memory(more), spec, named))
        assert repr(f"{key}_2") in str(caught.value)


@every_form
def test_whole_keys_only(page: Family, form: Published) -> None:
    """Anchored: a key that merely contains a known one is not that one."""
    spec = next(iter(held(page, form).values()))
    named = shapes(page, form, spec)
    written = form.names.save(numbers(named), spec)
    key = next(iter(written))
    for other in (f"x.{key}", f"{key}.x", key.upper()):
        renamed = {other if k == key else k: t for k, t in written.items()}
        with pytest.raises(MappingError):
            dict(form.names.load(Memory(renamed), spec, named))


@every_form
def test_configuration_goes_round(page: Family, form: Published) -> None:
    """For every tiny spec that the form holds: written, read, written is the same configuration."""
    for spec in held(page, form).values():
        config = form.fields.write(spec)
        assert form.fields.write(spec.replace(**form.fields.read(config))) == config


# --- ops ---------------------------------------------------------------------------------------------------------------------------------

SMALL = st.integers(1, 5)
OPS = settings(max_examples=count(300))


def holds_both_ways(op: Any, foreign: list[Tensor]) -> list[Tensor]:
    """Foreign to native to foreign and once more; gives the native tensors."""
    kept = [t.clone() for t in foreign]
    native = op.load(foreign, None)
    back = op.save(native, None)
    assert len(back) == len(foreign) and all(torch.equal(a, b) for a, b in zip(back, foreign, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(op.load(back, None), native, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(foreign, kept, strict=True))
    assert torch.equal(bits(native), bits(foreign))
    return native


def count_up(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@OPS
@given(rows=SMALL, columns=SMALL)
def test_transpose(rows: int, columns: int) -> None:
    x = count_up(rows, columns)
    (y,) = holds_both_ways(T(), [x])
    assert all(y[j, i] == x[i, j] for i in range(rows) for j in range(columns))


@OPS
@given(sizes=st.lists(SMALL, min_size=1, max_size=4), other=SMALL, dim=st.integers(0, 1))
def test_cat(sizes: list[int], other: int, dim: int) -> None:
    x = count_up(*((sum(sizes), other) if dim == 0 else (other, sum(sizes))))
    native = holds_both_ways(Cat(lambda s: sizes, dim), [x])
    at = 0
    for size, part in zip(sizes, native, strict=True):
        assert part.shape[dim] == size
        for i in range(size):
            assert torch.equal(part.select(dim, i), x.select(dim, at + i))
        at += size


@OPS
@given(heads=SMALL, sizes=st.lists(SMALL, min_size=1, max_size=3), columns=SMALL)
def test_split_heads(heads: int, sizes: list[int], columns: int) -> None:
    x = count_up(heads * sum(sizes), columns)
    native = holds_both_ways(SplitHeads(lambda s: heads, lambda s: sizes), [x])
    for n, (size, part) in enumerate(zip(sizes, native, strict=True)):
        for h in range(heads):
            for i in range(size):
                assert torch.equal(part[h * size + i], x[h * sum(sizes) + sum(sizes[:n]) + i])


@OPS
@given(parts=SMALL, rows=SMALL, columns=SMALL)
def test_stack(parts: int, rows: int, columns: int) -> None:
    x = [count_up(rows, columns) + 1000 * n for n in range(parts)]
    (y,) = holds_both_ways(Stack(), x)
    assert y.shape[0] == parts and all(torch.equal(y[n], x[n]) for n in range(parts))


@OPS
@given(heads=SMALL, half=st.integers(1, 8), columns=st.integers(0, 4))
def test_unpair(heads: int, half: int, columns: int) -> None:
    """Row 2i of each head (layout PAIRS) goes to row i, row 2i + 1 to row i + e/2 (HALVES); biases, which have no columns, alike."""
    x = count_up(heads * 2 * half, columns) if columns else count_up(heads * 2 * half)
    (y,) = holds_both_ways(Unpair(lambda s: heads), [x])
    for h in range(heads):
        for i in range(half):
            start = h * 2 * half
            assert torch.equal(y[start + i], x[start + 2 * i]) and torch.equal(y[start + half + i], x[start + 2 * i + 1])


@OPS
@given(shape=st.lists(SMALL, min_size=1, max_size=4), data=st.data())
def test_reshape(shape: list[int], data: st.DataObject) -> None:
    other = data.draw(st.permutations(shape))
    x = count_up(*shape)
    (y,) = holds_both_ways(Reshape(lambda s: other, lambda s: shape), [x])
    assert list(y.shape) == list(other) and torch.equal(y.flatten(), x.flatten())


# --- faults ------------------------------------------------------------------------------------------------------------------------------


def refused(kind: type[TranseptError], *words: str) -> Any:
    """The block raises exactly this typed error, in one sentence with all of the words."""

    class Refused:
        def __enter__(self) -> None: ...

        def __exit__(self, found: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
            assert found is kind, f"expected {kind.__name__}, found {found}: {error}"
            missing = [word for word in words if word not in str(error)]
            assert not missing, f"{error} does not say {missing}"
            assert "\n" not in str(error)
            return True

    return Refused()


def checkpoint(name: str, architecture: str, tiny: str) -> tuple[Published, Any, dict[str, tuple[int, ...]], dict[str, Tensor]]:
    page = family(name)
    form, spec = page.form(architecture), page.tiny[tiny]
    named = shapes(page, form, spec)
    return form, spec, named, form.names.save(numbers(named), spec)


def llama(change: Callable[[dict[str, Tensor]], Any], tiny: str = "gqa") -> None:
    form, spec, named, foreign = checkpoint("llama", "LlamaForCausalLM", tiny)
    change(foreign)
    dict(form.names.load(Memory(foreign), spec, named))


Q = "model.layers.1.self_attn.q_proj.weight"


def test_sound_checkpoints_load() -> None:
    llama(lambda file: None)
    llama(lambda file: file.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    llama(lambda file: file.update({"lm_head.weight": file["model.embed_tokens.weight"].clone()}), "tied")


def test_an_extra_key() -> None:
    with refused(MappingError, "'model.layers.2.self_attn.q_proj.weight'", "unknown"):
        llama(lambda file: file.update({"model.layers.2.self_attn.q_proj.weight": file[Q]}))


def test_a_missing_key() -> None:
    with refused(MappingError, "lacks", repr(Q)):
        llama(lambda file: file.pop(Q))


def test_a_misspelt_key() -> None:
    with refused(MappingError, repr(Q), "nearest", "'model.layers.1.self_attn.q_prj.weight'"):
        llama(lambda file: file.update({"model.layers.1.self_attn.q_prj.weight": file.pop(Q)}))


def test_a_wrong_shape() -> None:
    with refused(MappingError, Q, "(32, 16)", "(32, 32)"):
        llama(lambda file: file.update({Q: file[Q][:, :16]}))


def test_a_shape_that_an_op_cannot_move() -> None:
    form, spec, named, foreign = checkpoint("llama", "gguf:llama", "gqa")
    foreign["blk.0.attn_q.weight"] = foreign["blk.0.attn_q.weight"][:31]
    with refused(MappingError, "blk.0.attn_q.weight", "(31, 32)", "stack.layers.0.attn.q.weight"):
        dict(form.names.load(Memory(foreign), spec, named))


def test_two_rows_reading_one_key() -> None:
    with refused(MappingError, "more than one row", "reads", "'x'"):
        Map(Row("a", "x"), Row("b", "x"), index={})
    with refused(MappingError, "more than one row", "writes", "'a'"):
        Map(Row("a", "x"), Row("a", "y"), index={})
    with refused(MappingError, "more than one row", "writes", "'a'"):
        Map(Row(("a", "a"), "x", Cat(lambda s: (1, 1))), index={})


def test_two_rows_that_meet_only_at_some_sizes() -> None:
    table = Map(Row("a.{l}", "x.{l}"), Row("b", "x.2"), index={"l": range})
    assert len(table.bonds(2)) == 3
    with refused(MappingError, "more than one row", "'x.2'"):
        table.bonds(3)


def test_a_row_with_an_unknown_index() -> None:
    with refused(MappingError, "a.{layr}", "{layr}", "nearest", "'layer'"):
        Map(Row("a.{layr}", "x.{layr}"), index={"layer": range})
    with refused(MappingError, "x.{e}"):
        Map(Row("a", "x.{e}", Stack()), index={"l": range})
    with refused(MappingError, "y.{k}"):
        Map(Row("a", "x"), Drop("y.{k}"), index={})
    with refused(MappingError, "y.{k}"):
        Map(Row("a", "x"), Tied("a", "y.{k}"), index={})


def test_a_native_parameter_unfilled() -> None:
    form, spec, named, foreign = checkpoint("llama", "LlamaForCausalLM", "gqa")
    with refused(MappingError, "no row", "'stack.layers.0.attn.q_norm.weight'", "nearest"):
        dict(form.names.load(Memory(foreign), spec, {**named, "stack.layers.0.attn.q_norm.weight": (8,)}))
    named.pop("stack.norm.weight")
    with refused(MappingError, "does not have", "'stack.norm.weight'"):
        dict(form.names.load(Memory(foreign), spec, named))


def test_a_tied_head_with_other_numbers() -> None:
    def other(file: dict[str, Tensor]) -> None:
        file["lm_head.weight"] = file["model.embed_tokens.weight"].clone()
        file["lm_head.weight"][3, 5] += 1

    with refused(MappingError, "'lm_head.weight'", "'model.embed_tokens.weight'", "differ"):
        llama(other, "tied")


def test_a_missing_expert() -> None:
    form, spec, named, foreign = checkpoint("deepseek_v3", "DeepseekV3ForCausalLM", "moe")
    foreign.pop("model.layers.2.mlp.experts.5.up_proj.weight")
    with refused(MappingError, "lacks", "'model.layers.2.mlp.experts.5.up_proj.weight'"):
        dict(form.names.load(Memory(foreign), spec, named))


def test_one_expert_too_many() -> None:
    form, spec, named, foreign = checkpoint("deepseek_v3", "DeepseekV3ForCausalLM", "moe")
    foreign["model.layers.2.mlp.experts.8.up_proj.weight"] = foreign["model.layers.2.mlp.experts.7.up_proj.weight"]
    with refused(MappingError, "unknown", "'model.layers.2.mlp.experts.8.up_proj.weight'"):
        dict(form.names.load(Memory(foreign), spec, named))


def test_an_expert_of_another_shape() -> None:
    form, spec, named, foreign = checkpoint("deepseek_v3", "DeepseekV3ForCausalLM", "moe")
    key = "model.layers.2.mlp.experts.5.up_proj.weight"
    foreign[key] = foreign[key][:3]
    with refused(MappingError, "model.layers.2.mlp.experts.", "stack.layers.2.mlp.experts.up"):
        dict(form.names.load(Memory(foreign), spec, named))


def test_saving_a_model_with_other_parameters() -> None:
    form, spec, named, _ = checkpoint("llama", "LlamaForCausalLM", "gqa")
    native = numbers(named)
    with refused(MappingError, "'stack.norm.wieght'", "nearest", "'stack.norm.weight'"):
        form.names.save({**native, "stack.norm.wieght": torch.ones(32)}, spec)
    native.pop("stack.norm.weight")
    with refused(MappingError, "lacks", "'stack.norm.weight'"):
        form.names.save(native, spec)


def read_llama(**changes: Any) -> dict[str, Any]:
    page = family("llama")
    form = page.form("LlamaForCausalLM")
    config = {**form.fields.write(page.tiny["gqa"]), **changes}
    return form.fields.read({name: value for name, value in config.items() if value is not ...})


def test_sound_configurations_are_read() -> None:
    read_llama()
    read_llama(
        use_cache=True, torch_dtype="bfloat16", pretraining_tp=1, architectures=["LlamaForCausalLM"], some_new_switch=False, other=None
    )
    read_llama(logit_softcapping=0.0)


def test_an_unknown_field_that_might_change_the_arithmetic() -> None:
    with refused(ConfigError, "'final_logit_softcapping'", "30.0"):
        read_llama(final_logit_softcapping=30.0)
    with refused(ConfigError, "'atention_bias'", "nearest", "'attention_bias'"):
        read_llama(atention_bias=True)


def test_a_missing_field() -> None:
    with refused(ConfigError, "lacks", "'hidden_size'"):
        read_llama(hidden_size=...)
    with refused(ConfigError, "lacks", "'vocab_size'", "nearest", "'vocab_sise'"):
        page = family("llama").form("LlamaForCausalLM")
        config = page.fields.write(family("llama").tiny["gqa"])
        config["vocab_sise"] = config.pop("vocab_size")
        page.fields.read(config, ignore=("vocab_sise",))


def test_an_unknown_activation() -> None:
    with refused(ConfigError, "'sliu'", "nearest", "'silu'"):
        read_llama(hidden_act="sliu")


def test_an_unknown_rotary_scaling() -> None:
    with refused(ConfigError, "'yarm'", "nearest", "'yarn'"):
        read_llama(rope_parameters={"rope_type": "yarm", "factor": 4.0, "rope_theta": 10000.0})
    with refused(ConfigError, "'yarn'", "'beta_fats'", "nearest", "'beta_fast'"):
        read_llama(rope_parameters={"rope_type": "yarn", "factor": 4.0, "beta_fats": 3, "rope_theta": 10000.0})


def test_an_unknown_architecture() -> None:
    with refused(ConfigError, "'LlamaForCausalML'", "nearest", "'LlamaForCausalLM'"):
        by_architecture("LlamaForCausalML")
    with refused(ConfigError, "nearest", "'LlamaForCausalLM'"):
        family("llama").form("LlamaForCausal")
    with refused(ConfigError, "'lama'", "nearest", "'llama'"):
        family("lama")


@pytest.mark.parametrize("value", ["64", -1, 0, 3.5, [4], {"a": 1}, True, 10**30], ids=repr)
@pytest.mark.parametrize(
    "name", ["hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "head_dim"]
)
def test_fields_of_the_wrong_kind_raise_typed_errors_only(name: str, value: Any) -> None:
    """Whatever stands in a field, nothing but a typed error leaves the reading and checking of a Spec."""
    page = family("llama")
    try:
        page.spec.checked(read_llama(**{name: value}))
    except ConfigError as error:
        assert "\n" not in str(error)
