"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): half of BERT's layers, no segments, no pooler. Row 64."""

from __future__ import annotations

from typing import Any

from transept.blocks.encoder import Pool
from transept.core.registry import Family
from transept.mapping import Field, Given
from transept.models.encoders import House, Kind, bare, both, choice, classes, layer, masked, mlm, rows, span, wired
from transept.models.published import act, act_name
from transept.models.text.bert import CLASSIFIER, EMBED, POSITIONS, QA, BertSpec, parts
from transept.ops.activations import Act

build = wired(parts, mlm)


def relu(s: BertSpec) -> Pool:
    """The pooler of its classifiers."""
    return Pool(s.dim, Act.RELU)


def _size(vocab: int, dim: int, layers: int, heads: int, context: int = 512, **rest: Any) -> BertSpec:
    sizes = {"vocab": vocab, "width": dim, "dim": dim, "layers": layers, "heads": heads, "ffn": 4 * dim, "context": context}
    return BertSpec(**{**sizes, "segments": 0, **rest})


SIZES = {
    "distilbert-base": _size(30522, 768, 6, 12),
    "distilbert-base-cased": _size(28996, 768, 6, 12),
    "distilbert-base-multilingual-cased": _size(119547, 768, 6, 12),
}
TINY = {"two": _size(96, 32, 2, 4, 64), "labels": _size(96, 32, 2, 2, 64, labels=("no", "yes", "maybe"))}

LAYERS = layer(
    ("attn.q", "attention.q_lin"),
    ("attn.k", "attention.k_lin"),
    ("attn.v", "attention.v_lin"),
    ("attn.out", "attention.out_lin"),
    ("attn_norm", "sa_layer_norm"),
    ("mlp.up", "ffn.lin1"),
    ("mlp.down", "ffn.lin2"),
    ("mlp_norm", "output_layer_norm"),
    foreign="{root}transformer.layer.{l}",
)
FIELDS = (
    ("vocab", "vocab_size"),
    ("dim", "dim"),
    ("layers", "n_layers"),
    ("heads", "n_heads"),
    ("ffn", "hidden_dim"),
    ("context", "max_position_embeddings"),
    Field("act", "activation", Act.GELU, load=act, save=act_name),
    Given("width", lambda c: c["dim"]),
    Given("segments", lambda c: 0),
)
_ROW = (*both("head.pool", "pre_classifier"), *CLASSIFIER)
KINDS = (
    Kind("DistilBertForMaskedLM", mlm, masked("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight")),
    Kind("DistilBertModel", bare),
    Kind("DistilBertForSequenceClassification", rows(relu), _ROW, labelled=True),
    Kind("DistilBertForTokenClassification", classes, CLASSIFIER, labelled=True),
    Kind("DistilBertForQuestionAnswering", span, QA),
    Kind("DistilBertForMultipleChoice", choice(relu), _ROW),
)
DISTILBERT = House(
    "distilbert",
    "distilbert.",
    rows=(*EMBED, POSITIONS, *LAYERS),
    fields=FIELDS,
    fixed={"tie_word_embeddings": True},
    # How the position table was first filled, and the rates of dropout.
    inert=("sinusoidal_pos_embds", "tie_weights_", "qa_dropout", "seq_classif_dropout"),
)

FAMILY = Family(
    name="distilbert",
    spec=BertSpec,
    build=build,
    sizes=SIZES,
    tiny=TINY,
    published=DISTILBERT.forms(parts, KINDS),
    source="https://arxiv.org/abs/1910.01108",
)
