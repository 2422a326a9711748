"""Other shapes in which the same checkpoints are published: without a root, with old buffers, tied the other way, as GGUF."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import transept
from tests.parity.mirror import Mirror, mirror
from tests.parity.test_decoders import case, deepseek, gpt1, gpt2, near, opt
from transept.core.errors import ConfigError, MappingError


def rewritten(m: Mirror, folder: Path, change: dict[str, Tensor]) -> Path:
    """A copy of the checkpoint's folder with other tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((m.folder / "config.json").read_bytes())
    save_file({name: t.contiguous() for name, t in change.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored(m: Mirror) -> dict[str, Tensor]:
    return load_file(m.folder / "model.safetensors")


def same_logits(m: Mirror, folder: Path) -> None:
    ids = m.ids(1, 30)
    with torch.no_grad():
        near(transept.load(folder).model(ids).logits, m.ours.model(ids).logits, 1e-6)


@pytest.mark.parametrize("name", ["gpt1", "gpt2"])
def test_gpt_without_its_root_and_with_old_mask_buffers(name: str, tmp_path: Path) -> None:
    m = case(name)
    tensors = {key.removeprefix("transformer."): t for key, t in stored(m).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    same_logits(m, rewritten(m, tmp_path, tensors))


def test_opt_without_the_word_model(tmp_path: Path) -> None:
    m = case("opt, post-norm and narrow")
    tensors = {key.removeprefix("model."): t for key, t in stored(m).items()}
    assert all(key.startswith("decoder.") for key in tensors)
    same_logits(m, rewritten(m, tmp_path, tensors))


def test_a_tied_head_stored_under_either_name_or_both(tmp_path: Path) -> None:
    m = case("gpt2")
    tensors = stored(m)
    table = tensors.pop("transformer.wte.weight")
    same_logits(m, rewritten(m, tmp_path / "head", {**tensors, "lm_head.weight": table}))
    same_logits(m, rewritten(m, tmp_path / "both", {**tensors, "transformer.wte.weight": table, "lm_head.weight": table.clone()}))
    with pytest.raises(MappingError, match="should repeat"):
        transept.load(rewritten(m, tmp_path / "differ", {**tensors, "transformer.wte.weight": table, "lm_head.weight": table + 1}))


def test_deepseek_s_prediction_layer_is_left_out(tmp_path: Path) -> None:
    m = case("deepseek")
    tensors = stored(m)
    for key in [k for k in tensors if k.startswith("model.layers.2.")]:
        tensors[key.replace("layers.2", "layers.3")] = tensors[key].clone()
    for name in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"):
        tensors[f"model.layers.3.{name}.weight"] = torch.zeros(4)
    same_logits(m, rewritten(m, tmp_path / "one", tensors))
    tensors["model.layers.4.enorm.weight"] = torch.zeros(4)
    with pytest.raises(MappingError, match="unknown key 'model.layers.4.enorm.weight'"):
        transept.load(rewritten(m, tmp_path / "two", tensors))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_from_gguf(tied: bool, kind: str, tmp_path: Path) -> None:
    """Written by the gguf package under llama.cpp's names: matrices [out, in], q, k, v in one."""
    m = case("gpt2") if tied else mirror("GPT2LMHeadModel", gpt2(tie_word_embeddings=False))
    c, path = m.theirs.config, tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.n_positions)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_inner or 4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    packed = gguf.GGMLQuantizationType[kind]
    for key, tensor in stored(m).items():
        if ".c_" in key and tensor.dim() == 2:
            tensor = tensor.T
        name_there = names.get_name(key.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
        assert name_there is not None, key
        array = tensor.contiguous().numpy()
        if array.ndim == 2:
            writer.add_tensor(name_there, gguf.quantize(array, packed), raw_dtype=packed)
        else:
            writer.add_tensor(name_there, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = m.ids(2, 40)
    with torch.no_grad():
        ours = transept.load(path, dtype=torch.float32).model(ids).logits
        near(ours, m.theirs(ids).logits, {"F32": 1e-5, "F16": 2e-2, "Q8_0": 0.3}[kind])


def test_configurations_that_would_change_the_arithmetic_are_refused() -> None:
    from transept.models.text import deepseek_v3
    from transept.models.text import gpt as page
    from transept.models.text import opt as opt_page

    gpt2_fields = page.FAMILY.form("GPT2LMHeadModel").fields
    for changed in ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"add_cross_attention": True}):
        config = {**case("gpt2").theirs.config.to_dict(), **changed}
        with pytest.raises(ConfigError, match=next(iter(changed))):
            gpt2_fields.read(config)
    with pytest.raises(ConfigError, match="_remove_final_layer_norm"):
        opt_page.FIELDS.read({**opt().to_dict(), "_remove_final_layer_norm": True})
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        deepseek_v3.FIELDS.read({**deepseek().to_dict(), "num_key_value_heads": 2})
    with pytest.raises(ConfigError, match="quantization_config"):
        deepseek_v3.FIELDS.read({**deepseek().to_dict(), "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ConfigError, match="afn"):
        page.FAMILY.form("OpenAIGPTLMHeadModel").fields.read({**gpt1().to_dict(), "afn": "tanh"})


def test_a_form_refuses_a_spec_that_it_cannot_say() -> None:
    from transept.models.text.gpt import FAMILY, TINY

    for form, tiny in (("GPT2LMHeadModel", "gpt1"), ("GPT2LMHeadModel", "gpt3"), ("OpenAIGPTLMHeadModel", "gpt2")):
        with pytest.raises(ConfigError, match="always has"):
            FAMILY.form(form).fields.write(TINY[tiny])
