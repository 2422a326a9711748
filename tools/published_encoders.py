"""The published configurations of encoders and encoder-decoders, for tools/manifests.py: (config.json, what its file has besides)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Tensors = dict[str, tuple[list[int], str]]
Config = dict[str, Any]
Quirk = Callable[[Tensors], Tensors]

_RATES: Config = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02}
_BASE: Config = {**_RATES, "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                 "num_hidden_layers": 12, "max_position_embeddings": 512}  # fmt: skip
_LARGE: Config = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
_SMALL: Config = {"embedding_size": 128, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}


def _of(architecture: str, model_type: str, *parts: Config, **rest: Any) -> Config:
    config: Config = {"architectures": [architecture], "model_type": model_type}
    for part in parts:
        config |= part
    return config | rest


def _bert(*parts: Config, **rest: Any) -> Config:
    more = {"layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30522, "gradient_checkpointing": False}
    return _of("BertForPreTraining", "bert", _BASE, *parts, more, position_embedding_type="absolute", use_cache=True, **rest)


def _roberta(architecture: str, model_type: str, **rest: Any) -> Config:
    more = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "layer_norm_eps": 1e-5, "type_vocab_size": 1, "vocab_size": 50265}
    return _of(architecture, model_type, _BASE, more, **{"max_position_embeddings": 514, **rest})


def _electra(architecture: str) -> Config:
    more = {"summary_activation": "gelu", "summary_last_dropout": 0.1, "summary_type": "first", "summary_use_proj": True}
    return _of(architecture, "electra", _BASE, _SMALL, more, layer_norm_eps=1e-12, pad_token_id=0, type_vocab_size=2, vocab_size=30522,
               position_embedding_type="absolute")  # fmt: skip


def _deberta(architecture: str, model_type: str, **rest: Any) -> Config:
    more = {"layer_norm_eps": 1e-7, "max_relative_positions": -1, "pad_token_id": 0, "pooler_dropout": 0, "pooler_hidden_act": "gelu",
            "pooler_hidden_size": 768, "position_biased_input": False, "relative_attention": True, "type_vocab_size": 0}  # fmt: skip
    return _of(architecture, model_type, _BASE, more, **rest)


def _sides(layers: int, heads: int, ffn: int) -> Config:
    both = {"layers": layers, "attention_heads": heads, "ffn_dim": ffn, "layerdrop": 0.0}
    return {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}


def _bart(architecture: str, dim: int, layers: int, heads: int, vocab: int, **rest: Any) -> Config:
    more = {"activation_dropout": 0.1, "activation_function": "gelu", "attention_dropout": 0.1, "bos_token_id": 0, "dropout": 0.1,
            "classifier_dropout": 0.0, "d_model": dim, "decoder_start_token_id": 2, "eos_token_id": 2, "init_std": 0.02,
            "is_encoder_decoder": True, "max_position_embeddings": 1024, "num_hidden_layers": layers, "pad_token_id": 1,
            "scale_embedding": False, "add_bias_logits": False, "add_final_layer_norm": False, "normalize_before": False,
            "normalize_embedding": True}  # fmt: skip
    return _of(architecture, "bart", _sides(layers, heads, 4 * dim), more, vocab_size=vocab, **rest)


_T5: Config = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 512,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "n_positions": 512, "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0,
    "relative_attention_num_buckets": 32, "vocab_size": 32128,
    "task_specific_params": {"translation_en_to_de": {"early_stopping": True, "max_length": 300, "num_beams": 4,
                                                      "prefix": "translate English to German: "}},
}  # fmt: skip
_FLAN: Config = {**_T5, "d_ff": 1024, "num_heads": 6, "num_layers": 8, "num_decoder_layers": 8, "feed_forward_proj": "gated-gelu",
                 "relative_attention_max_distance": 128, "tie_word_embeddings": False, "use_cache": True}  # fmt: skip
_OPUS: Config = {
    "architectures": ["MarianMTModel"], "model_type": "marian", "activation_dropout": 0.0, "activation_function": "swish",
    "add_bias_logits": False, "add_final_layer_norm": False, "attention_dropout": 0.0, "bad_words_ids": [[58100]], "bos_token_id": 0,
    "classif_dropout": 0.0, "d_model": 512, "decoder_start_token_id": 58100, "dropout": 0.1, "eos_token_id": 0, "init_std": 0.02,
    "is_encoder_decoder": True, "max_length": 512, "max_position_embeddings": 512, "normalize_before": False, "normalize_embedding": False,
    "num_beams": 6, "num_hidden_layers": 6, "pad_token_id": 58100, "scale_embedding": True, "static_position_embeddings": True,
    "vocab_size": 58101, **_sides(6, 8, 2048),
}  # fmt: skip


# --- what the published files have that the class does not write
# ---------------------------------------------------------------------------


def first_spelling(tensors: Tensors) -> Tensors:
    """The first BERT files: a norm's weight and bias are gamma and beta, and the head repeats the table of words."""
    out = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for key, value in tensors.items() if key != "cls.predictions.decoder.bias"}  # fmt: skip
    return out | {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"]}


def position_ids(tensors: Tensors) -> Tensors:
    """Files of transformers 3 and 4: the positions 0, 1, ... as a buffer of the embeddings."""
    found = next(key for key in tensors if key.endswith("embeddings.position_embeddings.weight"))
    key = found.replace("position_embeddings.weight", "position_ids")
    return tensors | {key: ([1, tensors[found][0][0]], "I64")}


def unused_table(tensors: Tensors) -> Tensors:
    """The first T5 files: a table of distances for cross-attention, which never used it."""
    table = tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return tensors | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": table}


def own_head(tensors: Tensors) -> Tensors:
    """T5 v1.1's files: the scores have a table of their own, which transformers 5 ties, and the first table stands under three names."""
    table = tensors["shared.weight"]
    return tensors | {name: table for name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}


def pretraining_heads(tensors: Tensors) -> Tensors:
    """The publisher's files: two heads of its own pre-training, which no class of transformers reads."""
    dim = tensors["deberta.embeddings.LayerNorm.weight"][0][0]
    vocab = tensors["deberta.embeddings.word_embeddings.weight"][0][0]
    head: Tensors = {"lm_predictions.lm_head.bias": ([vocab], "F32")}
    for name in ("dense", "LayerNorm"):
        shape = [dim, dim] if name == "dense" else [dim]
        for stem in ("lm_predictions.lm_head", "mask_predictions"):
            head |= {f"{stem}.{name}.weight": (shape, "F32"), f"{stem}.{name}.bias": ([dim], "F32")}
    return tensors | head | {"mask_predictions.classifier.weight": ([1, dim], "F32"), "mask_predictions.classifier.bias": ([1], "F32")}


def rooted_deberta(tensors: Tensors) -> Tensors:
    """The publisher's files: the body under the name deberta, and heads of its own pre-training, which no class of transformers reads."""
    return pretraining_heads({f"deberta.{key}": value for key, value in tensors.items()})


def every_copy(tensors: Tensors) -> Tensors:
    """Files of transformers 3: the table of words under each of its names."""
    table = next(value for key, value in tensors.items() if key.endswith("shared.weight"))
    root = "model." if "model.shared.weight" in tensors else ""
    copies = {f"{root}{side}.embed_tokens.weight": table for side in ("encoder", "decoder")}
    return tensors | copies | ({"lm_head.weight": table} if "final_logits_bias" in tensors else {})


def plain(tensors: Tensors) -> Tensors:
    """As the class writes it."""
    return tensors


ENCODERS: dict[str, tuple[Config, Quirk]] = {
    "bert-base-uncased": (_bert(), first_spelling),
    "bert-large-uncased": (_bert(_LARGE), first_spelling),
    "roberta-base": (_roberta("RobertaForMaskedLM", "roberta"), position_ids),
    "distilbert-base-uncased": (
        _of("DistilBertForMaskedLM", "distilbert", activation="gelu", attention_dropout=0.1, dim=768, dropout=0.1, hidden_dim=3072,
            initializer_range=0.02, max_position_embeddings=512, n_heads=12, n_layers=6, pad_token_id=0, qa_dropout=0.1,
            seq_classif_dropout=0.2, sinusoidal_pos_embds=False, tie_weights_=True, vocab_size=30522),
        plain),
    "albert-base-v2": (
        _of("AlbertForMaskedLM", "albert", _BASE, attention_probs_dropout_prob=0, hidden_dropout_prob=0, bos_token_id=2, eos_token_id=3,
            classifier_dropout_prob=0.1, down_scale_factor=1, embedding_size=128, gap_size=0, hidden_act="gelu_new", inner_group_num=1,
            layer_norm_eps=1e-12, net_structure_type=0, num_hidden_groups=1, num_memory_blocks=0, pad_token_id=0, type_vocab_size=2,
            vocab_size=30000),
        position_ids),
    "electra-small-discriminator": (_electra("ElectraForPreTraining"), position_ids),
    "electra-small-generator": (_electra("ElectraForMaskedLM"), position_ids),
    "deberta-base": (_deberta("DebertaModel", "deberta", pos_att_type="c2p|p2c", padding_idx=0, vocab_size=50265), rooted_deberta),
    "deberta-v3-base": (
        _deberta("DebertaV2Model", "deberta-v2", position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
                 pos_att_type="p2c|c2p", vocab_size=128100),
        rooted_deberta),
    "roformer_chinese_base": (
        _of("RoFormerForMaskedLM", "roformer", _BASE, embedding_size=768, layer_norm_eps=1e-12, max_position_embeddings=1536,
            pad_token_id=0, rotary_value=False, type_vocab_size=2, vocab_size=50000, eos_token_id=102, gradient_checkpointing=False),
        plain),
    "longformer-base-4096": (
        _roberta("LongformerForMaskedLM", "longformer", attention_window=[512] * 12, attention_mode="longformer", sep_token_id=2,
                 ignore_attention_mask=False, max_position_embeddings=4098, gradient_checkpointing=False),
        position_ids),
    "bigbird-roberta-base": (
        _of("BigBirdForPreTraining", "big_bird", _BASE, attention_type="block_sparse", block_size=64, bos_token_id=1, eos_token_id=2,
            gradient_checkpointing=False, hidden_act="gelu_new", layer_norm_eps=1e-12, max_position_embeddings=4096, num_random_blocks=3,
            pad_token_id=0, rescale_embeddings=False, sep_token_id=66, type_vocab_size=2, use_bias=True, vocab_size=50358),
        position_ids),
    "t5-small": (_T5, unused_table),
    "flan-t5-small": (_FLAN, own_head),
    "bart-base": (_bart("BartModel", 768, 6, 12, 50265, early_stopping=True, no_repeat_ngram_size=3, num_beams=4,
                        gradient_checkpointing=False), every_copy),
    "bart-large-cnn": (_bart("BartForConditionalGeneration", 1024, 12, 16, 50264, force_bos_token_to_be_generated=True,
                             forced_bos_token_id=0, forced_eos_token_id=2, output_past=True, early_stopping=True, length_penalty=2.0,
                             max_length=142, min_length=56, no_repeat_ngram_size=3, num_beams=4), every_copy),
    "bart-large-mnli": (_bart("BartForSequenceClassification", 1024, 12, 16, 50265, output_past=False, forced_eos_token_id=2,
                              id2label={"0": "contradiction", "1": "neutral", "2": "entailment"},
                              label2id={"contradiction": 0, "entailment": 2, "neutral": 1}), every_copy),
    "opus-mt-en-de": (_OPUS, every_copy),
}  # fmt: skip
