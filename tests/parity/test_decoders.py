"""Every decoder family, head and rotary scaling against transformers, from its own random tiny models, both ways."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor

from tests.parity.mirror import Mirror, mirror, next_token_loss
from transept.core.registry import all_families

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def llama(kind: Any = tf.LlamaConfig, **changes: Any) -> Any:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return kind(**{**sizes, **changes})


def gpt2(**changes: Any) -> Any:
    return tf.GPT2Config(**{"vocab_size": 96, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 3, **changes})


def gpt1(**changes: Any) -> Any:
    return tf.OpenAIGPTConfig(
        **{"vocab_size": 96, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 3, **changes}
    )


def neo(layers: int = 4, **changes: Any) -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_layers": layers, "num_heads": 4, "max_position_embeddings": 128, "window_size": 16}
    return tf.GPTNeoConfig(**{**sizes, "attention_types": [[["global", "local"], layers // 2]], **changes})


def opt(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 80,
        "max_position_embeddings": 128,
    }
    return tf.OPTConfig(**{**sizes, **changes})


def deepseek(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "qk_nope_head_dim": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 128,
    }
    return tf.DeepseekV3Config(**{**sizes, **changes})


CASES: dict[str, tuple[str, Any]] = {
    "gpt1": ("OpenAIGPTLMHeadModel", gpt1()),
    "gpt1, 8 layers": ("OpenAIGPTLMHeadModel", gpt1(n_layer=8)),
    "gpt2": ("GPT2LMHeadModel", gpt2()),
    "gpt2, untied": ("GPT2LMHeadModel", gpt2(tie_word_embeddings=False, n_inner=80, activation_function="relu")),
    "gpt2, 8 layers": ("GPT2LMHeadModel", gpt2(n_layer=8)),
    "gpt-neo": ("GPTNeoForCausalLM", neo()),
    "gpt-neo, untied, 8 layers": ("GPTNeoForCausalLM", neo(8, tie_word_embeddings=False, intermediate_size=80)),
    "opt": ("OPTForCausalLM", opt()),
    "opt, post-norm and narrow": ("OPTForCausalLM", opt(do_layer_norm_before=False, word_embed_proj_dim=32)),
    "opt, narrow and untied": ("OPTForCausalLM", opt(word_embed_proj_dim=32, tie_word_embeddings=False)),
    "opt, no bias, 8 layers": ("OPTForCausalLM", opt(num_hidden_layers=8, enable_bias=False, activation_function="gelu")),
    "llama, n_kv < n_heads": ("LlamaForCausalLM", llama()),
    "llama, mha": ("LlamaForCausalLM", llama(num_key_value_heads=4)),
    "llama, mqa": ("LlamaForCausalLM", llama(num_key_value_heads=1, head_dim=24)),
    "llama, tied": ("LlamaForCausalLM", llama(tie_word_embeddings=True)),
    "llama, biases": ("LlamaForCausalLM", llama(attention_bias=True, mlp_bias=True)),
    "llama, 8 layers": ("LlamaForCausalLM", llama(num_hidden_layers=8)),
    "llama, linear": ("LlamaForCausalLM", llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0})),
    "llama, dynamic": (
        "LlamaForCausalLM",
        llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, max_position_embeddings=32),
    ),
    "llama, llama3": ("LlamaForCausalLM", llama(rope_parameters=LLAMA3)),
    "llama, yarn": ("LlamaForCausalLM", llama(rope_parameters=YARN)),
    "llama, yarn with fields": (
        "LlamaForCausalLM",
        llama(rope_parameters={**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}),
    ),
    "mistral, window": ("MistralForCausalLM", llama(tf.MistralConfig, sliding_window=16)),
    "mistral, no window": ("MistralForCausalLM", llama(tf.MistralConfig, sliding_window=None)),
    "deepseek": ("DeepseekV3ForCausalLM", deepseek()),
    "deepseek, all dense": ("DeepseekV3ForCausalLM", deepseek(first_k_dense_replace=3, rope_interleave=False)),
    "deepseek, yarn": (
        "DeepseekV3ForCausalLM",
        deepseek(rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}, n_shared_experts=2),
    ),
    "deepseek, tied, 8 layers": ("DeepseekV3ForCausalLM", deepseek(num_hidden_layers=8, tie_word_embeddings=True, norm_topk_prob=False)),
}
HEADS: dict[str, tuple[str, Any]] = {
    "gpt1": ("OpenAIGPT", gpt1),
    "gpt2": ("GPT2", gpt2),
}


@pytest.fixture(autouse=True)
def one_thread(same_every_time: None) -> None:
    """Models this small lose more than they gain by a second thread."""
    torch.set_num_threads(1)


@functools.cache
def case(name: str) -> Mirror:
    architecture, config = CASES[name]
    return mirror(architecture, config)


every_case = pytest.mark.parametrize("name", CASES)
every_head = pytest.mark.parametrize("name", HEADS)


def near(ours: Tensor, theirs: Tensor, limit: float) -> None:
    assert ours.shape == theirs.shape
    assert theirs.abs().mean() > 0.01, "these numbers are too small to tell anything"
    off = (ours - theirs).abs().max().item()
    assert off <= limit, f"off by {off:.2e}, allowed {limit:.0e}"


def limit_of(m: Mirror) -> float:
    return 1e-4 if len(m.ours.model.stack.layers) > 6 else 1e-5


def gradients_agree(m: Mirror, theirs: Tensor, ours: Tensor) -> None:
    near(ours.detach(), theirs.detach(), 1e-5)
    pairs = m.gradients(theirs, ours)
    assert pairs
    # A gradient that is zero but for rounding (the bias of k moves all scores of a query alike) is held to the scale of the largest.
    floor = 1e-3 * max(other.norm() for _, other in pairs.values())
    for name, (mine, other) in pairs.items():
        off = (mine - other).norm() / other.norm().clamp(min=floor)
        assert off <= 1e-4, f"{name}: relative {off:.2e}"
    m.theirs.zero_grad(set_to_none=True)
    m.ours.model.zero_grad(set_to_none=True)


@every_case
def test_logits_and_last_states(name: str) -> None:
    m = case(name)
    ids = m.ids(2, 60)
    with torch.no_grad():
        theirs, ours = m.theirs(ids), m.ours.model(ids)
    near(ours.logits, theirs.logits, limit_of(m))


@every_case
def test_logits_of_a_padded_batch(name: str) -> None:
    """Rows padded on the right, as published models are trained."""
    m = case(name)
    if "dynamic" in name:
        pytest.skip("transformers stretches a padded batch by its longest row, so a row there depends on its neighbours")
    ids, mask = m.ids(3, 40), torch.ones(3, 40, dtype=torch.bool)
    mask[1, 25:] = False
    mask[2, 7:] = False
    with torch.no_grad():
        theirs, ours = m.theirs(ids, attention_mask=mask.long()).logits, m.ours.model(ids, mask=mask).logits
    near(ours[mask], theirs[mask], limit_of(m))


@every_case
def test_gradients_of_every_parameter(name: str) -> None:
    m = case(name)
    ids = m.ids(2, 60, seed=1)
    gradients_agree(m, next_token_loss(m.theirs(ids).logits, ids), next_token_loss(m.ours.model(ids).logits, ids))


@every_case
def test_64_greedy_tokens(name: str) -> None:
    m = case(name)
    prompt = m.ids(1, 20, seed=2)
    count = 64
    if "dynamic" in name:
        assert m.ours.context is not None
        count = m.ours.context - prompt.shape[1]
    expected = greedy(m, prompt, count)
    assert m.ours.generate(prompt, max_tokens=count, temperature=0.0, ignore_end=True).ids == expected


def greedy(m: Mirror, prompt: Tensor, count: int) -> list[int]:
    """transformers' own greedy search, kept from stopping early."""
    # its own configurations name end tokens, which min_new_tokens would forbid; and GPT-1 has no cache there
    m.theirs.generation_config = tf.GenerationConfig()
    options = {} if m.theirs.config.model_type == "openai-gpt" else {"use_cache": True}
    plain = tf.GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
    out = m.theirs.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=plain, **options)
    return out[0, prompt.shape[1] :].tolist()


@every_case
def test_transformers_loads_what_this_library_saves(name: str, tmp_path: Path) -> None:
    m = case(name)
    again = m.reloaded(tmp_path)
    ids = m.ids(2, 60, seed=3)
    same_weights(again, m.theirs)
    with torch.no_grad():
        near(again(ids).logits, m.theirs(ids).logits, 1e-6)


def same_weights(again: Any, before: Any) -> None:
    """Bit for bit, under the publisher's names."""
    expected = before.state_dict()
    found = again.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_head
def test_a_classifier_reads_the_last_real_token(name: str, tmp_path: Path) -> None:
    prefix, config = HEADS[name]
    m = mirror(f"{prefix}ForSequenceClassification", config(num_labels=5))
    ids, mask = m.ids(3, 30), torch.ones(3, 30, dtype=torch.bool)
    for row, length in enumerate((30, 21, 5)):
        mask[row, length:] = False
    ids[~mask] = m.theirs.config.pad_token_id
    theirs, ours = m.theirs(ids, attention_mask=mask.long()).logits, m.ours.model(ids, mask=mask).logits
    near(ours, theirs, 1e-5)
    again = m.reloaded(tmp_path)
    same_weights(again, m.theirs)
    with torch.no_grad():
        near(again(ids[:1]).logits, theirs[:1], 1e-6)
    labels = torch.tensor([4, 0, 2])
    gradients_agree(m, F.cross_entropy(theirs, labels), F.cross_entropy(ours, labels))


@every_head
def test_two_heads_score_tokens_and_choices(name: str, tmp_path: Path) -> None:
    prefix, config = HEADS[name]
    m = mirror(f"{prefix}DoubleHeadsModel", config())
    ids, column = m.ids(6, 25), torch.tensor([24, 20, 3, 9, 24, 11])
    theirs = m.theirs(ids.view(2, 3, 25), mc_token_ids=column.view(2, 3))
    ours = m.ours.model(ids, column=column)
    near(ours.logits, theirs.logits.flatten(0, 1), 1e-5)
    near(ours.choice, theirs.mc_logits.flatten(), 1e-5)
    last = m.ours.model(ids).choice
    assert torch.equal(last, m.ours.model(ids, column=torch.full((6,), 24)).choice)
    again = m.reloaded(tmp_path)
    same_weights(again, m.theirs)
    with torch.no_grad():
        near(again(ids.view(2, 3, 25), mc_token_ids=column.view(2, 3)).mc_logits, theirs.mc_logits, 1e-6)
    labels = torch.tensor([2, 1])

    def loss(logits: Tensor, choice: Tensor) -> Tensor:
        return F.cross_entropy(choice.view(2, 3), labels) + 0.5 * next_token_loss(logits.reshape(6, 25, -1), ids)

    gradients_agree(m, loss(theirs.logits, theirs.mc_logits), loss(ours.logits, ours.choice))


def test_every_published_decoder_form_has_a_mirror() -> None:
    tested = {architecture for architecture, _ in CASES.values()}
    tested |= {prefix + suffix for prefix, _ in HEADS.values() for suffix in ("ForSequenceClassification", "DoubleHeadsModel")}
    pages = [family for family in all_families() if family.name in ("gpt", "gpt_neo", "opt", "llama", "deepseek_v3")]
    assert len(pages) == 5
    published = {form.architecture for family in pages for form in family.published if not form.architecture.startswith("gguf:")}
    assert published == tested
