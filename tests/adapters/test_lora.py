"""Low-rank adapters against PEFT, both ways through files; merging; what is trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from tests.parity.mirror import Mirror, mirror
from transept.adapters.lora import ATTENTION, Lora, adapted, add, merge
from transept.adapters.tune import Tune, dropped, normal, tune, under
from transept.blocks.heads import Head, TiedHead
from transept.core.errors import CheckpointError, ConfigError, InputError
from transept.core.registry import family
from transept.training.adapter import load_adapter, save_adapter
from transept.training.objectives.causal import Causal

LLAMA = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "max_position_embeddings": 40}  # fmt: skip
BERT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 40, "num_labels": 3}  # fmt: skip


def made(name: str) -> Mirror:
    match name:
        case "llama":
            return mirror("LlamaForCausalLM", tf.LlamaConfig(**LLAMA))
        case "tied":
            return mirror("LlamaForCausalLM", tf.LlamaConfig(**LLAMA, tie_word_embeddings=True))
        case "gpt2":
            return mirror("GPT2LMHeadModel", tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=40))
        case _:
            return mirror("BertForSequenceClassification", tf.BertConfig(**BERT))


def stirred(model: nn.Module) -> nn.Module:
    """Adapters that do something: no A or B is zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name.lower():
                p.normal_(std=0.15)
    return model


def rank4(*targets: str) -> Lora:
    return Lora(rank=4, alpha=8.0, targets=targets)


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


OURS = [
    ("llama", rank4("*.attn.q", "*.attn.v")),
    ("llama", rank4(*ATTENTION, "*.mlp.*", "embed.tokens", "head")),
    ("llama", Lora(rank=3, alpha=5.0, stabilised=True, targets=("stack.layers.0.attn.k",))),
    ("tied", rank4("*.mlp.down", "embed.tokens")),
    ("tied", rank4("*.attn.q", "head")),
    ("gpt2", rank4("*.mlp.up")),
    ("gpt2", rank4("*.attn.q", "*.attn.v", "*.attn.out")),
    ("bert", rank4("*.attn.q", "*.attn.v")),
]


@pytest.mark.parametrize(("name", "lora"), OURS)
def test_peft_loads_ours(name: str, lora: Lora, tmp_path: Path) -> None:
    m = made(name)
    model, ids = m.ours.model, m.ids(2, 9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untouched = model(ids).logits
    add(model, lora)
    # What is new begins as nothing.
    close(model(ids).logits, untouched, 0)
    if name == "bert":
        tune_head(model)
    stirred(model)
    assert m.ours.form is not None
    save_adapter(model, m.ours.form, m.ours.spec, tmp_path / "adapter", "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(m.theirs, str(tmp_path / "adapter")).eval()
    found = model(ids).logits
    close(found, theirs(ids).logits)
    assert (found - untouched).abs().max() > 1e-2
    # And this library reads its own file on a fresh copy of the base.
    again = made(name).ours
    assert again.form is not None
    close(load_adapter(again.model, again.form, again.spec, tmp_path / "adapter")(ids).logits, found, 1e-6)
    head = {key for key in before if name == "bert" and key.startswith("head.out")}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items() if key not in head)


def tune_head(model: Any) -> None:
    """The classes' own map is trained beside the adapter."""
    with torch.no_grad():
        for p in model.head.out.parameters():
            p.requires_grad_(True)
            p.normal_()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"r": 4, "target_modules": ["k_proj", "down_proj"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
        ("tied", {"r": 4, "target_modules": ["embed_tokens", "o_proj"]}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("bert", {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_dropout": 0.1}),
    ],
)
def test_we_load_theirs(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Equal logits, equal loss to 1e-6, and equal gradients of A and B."""
    m = made(name)
    ids = m.ids(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = stirred(peft.get_peft_model(m.theirs, peft.LoraConfig(**config))).eval()
        theirs.save_pretrained(str(tmp_path / "adapter"))
    assert m.ours.form is not None
    model = load_adapter(m.ours.model, m.ours.form, m.ours.spec, tmp_path / "adapter")
    close(model(ids).logits, theirs(ids).logits)
    if name == "bert":
        return
    found, out = Causal()(model, {"ids": ids}), theirs(ids, labels=ids)
    close(found.loss / found.count, out.loss, 1e-6)
    (found.loss / found.count).backward()
    out.loss.backward()
    wanted = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    mine = {key: part for key, part in adapted(model).items()}
    # Joined matrices share one A there, whose gradient is the sum of ours.
    total = sum(part.lora_b.grad.abs().sum() for part in mine.values() if part.lora_b.grad is not None)
    close(torch.as_tensor(total), torch.stack([g.abs().sum() for key, g in wanted.items() if "_B" in key]).sum(), 1e-4)


@pytest.mark.parametrize(("name", "lora"), OURS)
def test_merged_is_unmerged(name: str, lora: Lora) -> None:
    m = made(name)
    model, ids = stirred(add(m.ours.model, lora)), m.ids(3, 8)
    adapted_logits = model(ids).logits
    done = merge(model, {"ids": ids})
    close(model(ids).logits, adapted_logits)
    assert done.difference == float((model(ids).logits - adapted_logits).detach().abs().max()) <= 1e-5
    assert not adapted(model)
    # A tied head that would have changed with the table, or beside it, now has its own.
    loose = name == "tied" and ("embed.tokens" in lora.targets or "head" in lora.targets)
    assert done.untied == (("head",) if loose else ())
    assert isinstance(model.get_submodule("head"), Head) if loose else name != "tied" or isinstance(model.get_submodule("head"), TiedHead)


def test_merged_model_of_tied_embeddings_is_saved_and_loaded(tmp_path: Path) -> None:
    import transept

    m = made("tied")
    model, ids = stirred(add(m.ours.model, rank4("embed.tokens"))), m.ids(2, 7)
    wanted = model(ids).logits
    assert merge(model, {"ids": ids}).untied == ("head",)
    m.ours.spec = m.ours.spec.replace(tied=False)
    transept.save(m.ours, tmp_path / "merged")
    theirs: Any = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    close(theirs(ids).logits, wanted)


def test_what_is_trained() -> None:
    """Row 84c: only biases and the head have gradients; the frozen head alone; and the counts that are printed."""
    page = family("bert")
    spec = page.tiny["labels"]
    model, fresh = under(page.build(page.tiny["two"]), page, "BertForSequenceClassification", spec.replace(heads=4))
    assert {name.partition(".")[0] for name in fresh} == {"head"}
    ids = torch.randint(96, (2, 6))
    for how in Tune:
        again, _ = under(model, page, "BertForSequenceClassification", spec.replace(heads=4))
        found = tune(again, how, lora=Lora(rank=2))
        again(ids).logits.sum().backward()
        with_grad = {name for name, p in again.named_parameters() if p.grad is not None}
        assert found.trained == sum(p.numel() for n, p in again.named_parameters() if n in with_grad)
        body = {name for name in with_grad if not name.startswith("head.")}
        match how:
            case Tune.FULL:
                assert found.trained == found.total
            case Tune.BITFIT:
                assert body == {n for n, _ in again.named_parameters() if n.endswith(".bias") and not n.startswith("head.")}
                assert "are trained" in str(found)
            case Tune.LORA:
                assert body and all(name.endswith(("lora_a", "lora_b")) for name in body)
            case Tune.HEAD:
                assert body == set()
        assert {n for n in with_grad if n.startswith("head.")} == {n for n, _ in again.named_parameters() if n.startswith("head.")}
    with pytest.raises(ConfigError, match="nearest: 'bitfit'"):
        tune(model, "bitfits")
    with pytest.raises(ConfigError, match="no module 'haed'.*head"):
        tune(model, "head", heads=("haed",))
    assert all(m.p == 0.3 for m in dropped(model, 0.3).modules() if isinstance(m, nn.Dropout))
    weight = normal(model, 0.5).get_parameter("stack.layers.0.mlp.up.weight")
    assert abs(float(weight.detach().std()) - 0.5) < 0.05


def test_base_is_bit_identical_after_training() -> None:
    m = made("llama")
    model = add(m.ours.model, rank4(*ATTENTION)).train()
    before = {key: value.clone() for key, value in m.ours.model.state_dict().items() if "lora" not in key}
    optim = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        found = Causal()(model, {"ids": m.ids(4, 12)})
        losses.append(float(found.loss.detach() / found.count))
        optim.zero_grad()
        (found.loss / found.count).backward()
        optim.step()
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(value, m.ours.model.state_dict()[key]) for key, value in before.items())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    m = made("llama")
    with pytest.raises(ConfigError, match=r"attn.qq.*nearest"):
        add(m.ours.model, rank4("stack.layers.0.attn.qq"))
    with pytest.raises(ConfigError, match="rank"):
        add(m.ours.model, Lora(rank=0))
    with pytest.raises(InputError, match="no adapter"):
        merge(m.ours.model, {"ids": m.ids(1, 3)})
    latent = family("deepseek_v3")
    with pytest.raises(InputError, match="read without a call"):
        add(latent.build(next(iter(latent.tiny.values()))), rank4("*.k_up"))
    add(m.ours.model, rank4("*.attn.q"))
    with pytest.raises(InputError, match="already"):
        add(m.ours.model, rank4("*.attn.q"))
    assert m.ours.form is not None
    folder = save_adapter(m.ours.model, m.ours.form, m.ours.spec, tmp_path / "adapter")
    record = json.loads((folder / "adapter_config.json").read_text())
    for change, match in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "regular expression"),
        ({"r": 5}, "rank 5"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**record, **change}))
        fresh = made("llama").ours
        assert fresh.form is not None
        with pytest.raises((ConfigError, CheckpointError), match=match):
            load_adapter(fresh.model, fresh.form, fresh.spec, folder)
    (folder / "adapter_config.json").write_text(json.dumps(record))
    other = made("gpt2").ours
    assert other.form is not None
    with pytest.raises(CheckpointError, match="stands beside no matrix"):
        load_adapter(other.model, other.form, other.spec, folder)
