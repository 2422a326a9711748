"""The encoder-decoders under other heads, and under none, against transformers; which of its architectures are read, and which are not."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import processors
from torch import Tensor

import transept
from tests.cli.test_tasks import words
from tests.parity.mirror import Mirror, mirror
from tests.parity.test_seq2seq import V11, bart, gradients_agree, marian, near, t5
from transept.core.errors import InputError
from transept.core.registry import family

LABELS = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
CASES: dict[str, tuple[str, Any]] = {
    "bart": ("BartModel", bart(scale_embedding=True)),
    "marian": ("MarianModel", marian(activation_function="relu")),
    "t5": ("T5Model", t5()),
    "t5, v1.1": ("T5Model", t5(**V11)),
    "t5, the encoder": ("T5EncoderModel", t5(**V11)),
    "bart, classes of a text": ("BartForSequenceClassification", bart(**LABELS)),
    "t5, classes of a text": ("T5ForSequenceClassification", t5(**LABELS, eos_token_id=2)),
    "t5, classes of tokens": ("T5ForTokenClassification", t5(**LABELS, **V11)),
    "bart, answers": ("BartForQuestionAnswering", bart(encoder_layers=3)),
    "t5, answers": ("T5ForQuestionAnswering", t5(decoder_start_token_id=5)),
}
every_case = pytest.mark.parametrize("name", CASES)
NAMES = {"logits": "logits", "start": "start_logits", "end": "end_logits", "hidden": "last_hidden_state",
         "encoded": "encoder_last_hidden_state"}  # fmt: skip


@functools.cache
def case(name: str) -> Mirror:
    return mirror(*CASES[name])


def results(m: Mirror, seed: int = 0) -> list[tuple[str, Tensor, Tensor]]:
    """(name, ours, theirs) of rows of 15, 11 and 6 tokens, each ended by the token that classifiers read; at the real tokens."""
    ids, mask = m.ids(3, 15, seed), torch.arange(15)[None] < torch.tensor([[15], [11], [6]])
    ids[torch.arange(3), mask.sum(1) - 1] = 2
    ids = ids.where(mask, 0)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if m.cls.__name__ in ("BartModel", "MarianModel", "T5Model"):
        target = m.ids(3, 9, seed + 1)
        ours, theirs = m.ours.model(target, source=ids, source_mask=mask), m.theirs(**inputs, decoder_input_ids=target)
    else:
        ours, theirs = m.ours.model(ids, mask=mask), m.theirs(**inputs)
    found = [(name, getattr(ours, name), theirs[there]) for name, there in NAMES.items() if hasattr(ours, name) and there in theirs]
    assert found
    return [(name, a[mask], b[mask]) if a.shape[:2] == mask.shape else (name, a, b) for name, a, b in found]


@every_case
def test_results_are_equal(name: str) -> None:
    with torch.no_grad():
        for what, ours, theirs in results(case(name)):
            assert theirs.std() > 0.1, what
            near(ours, theirs, 1e-5)


@every_case
def test_gradients_of_every_parameter(name: str) -> None:
    m = mirror(*CASES[name])
    loss, our_loss = torch.ones(()), torch.ones(())
    for what, ours, theirs in results(m, seed=2):
        pull = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(len(what)))
        loss, our_loss = loss + (pull * theirs).mean(), our_loss + (pull * ours).mean()
    gradients_agree(m, loss, our_loss)


@every_case
def test_transformers_loads_what_this_library_saves(name: str, tmp_path: Path) -> None:
    m = case(name)
    transept.save(m.ours, tmp_path)
    again, info = m.cls.from_pretrained(tmp_path, output_loading_info=True)
    # Marian's table of sines is worked out on both sides.
    assert all("embed_positions" in key and name == "marian" for key in info["missing_keys"]) and not info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), m.theirs.state_dict().values(), strict=True))
    if "classes" in name:
        assert m.ours.labels == ("no", "yes", "maybe") and again.config.id2label == LABELS["id2label"]


def test_what_the_heads_refuse() -> None:
    for name in ("bart, classes of a text", "t5, classes of a text"):
        with pytest.raises(InputError, match="end token 2"):
            case(name).ours.model(case(name).ids(1, 5))
    with pytest.raises(InputError, match="second segment"):
        case("bart, answers").ours.model(case("bart, answers").ids(1, 5), segments=torch.ones(1, 5, dtype=torch.long))
    for name, call in (("bart", lambda m: m.translate("a dog")), ("bart", lambda m: m.generate([5, 6])), ("t5", lambda m: m.stream([5]))):
        with pytest.raises(InputError, match="form"):
            call(case(name).ours)


def tasked(folder: Path, architecture: str, make: Any) -> tuple[Any, Any, Any]:
    """(ours, theirs, their tokenizer) of a random model that has a tokenizer with BERT's marks, [SEP] being its end, and one segment."""
    made = words(folder, "bert")
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", marks)
    named = {} if architecture.endswith("QuestionAnswering") else LABELS
    m = mirror(architecture, make(vocab_size=len(made), eos_token_id=3, pad_token_id=0, **named))
    made.save_pretrained(m.folder)
    return transept.load(m.folder), m.theirs, made


TEXTS = ["the house is small", "a dog", "ein Hund rennt in the street of Paris ."]


@pytest.mark.parametrize(("architecture", "make"), [("BartForSequenceClassification", bart), ("T5ForSequenceClassification", t5)])
def test_classes_of_texts_and_pairs(architecture: str, make: Any, tmp_path: Path) -> None:
    ours, theirs, tok = tasked(tmp_path, architecture, make)
    for texts in (TEXTS, [(text, "das Haus") for text in TEXTS]):
        for text, found in zip(texts, ours.classify(texts), strict=True):
            ids = torch.tensor([tok(text).input_ids if isinstance(text, str) else tok(*text).input_ids])
            chances = theirs(input_ids=ids).logits[0].softmax(-1)
            assert abs(found.score - chances.max().item()) < 1e-5 and found.label == ("no", "yes", "maybe")[int(chances.argmax())]


@pytest.mark.parametrize(("architecture", "make"), [("BartForQuestionAnswering", bart), ("T5ForQuestionAnswering", t5)])
def test_answers_are_where_transformers_scores_them(architecture: str, make: Any, tmp_path: Path) -> None:
    ours, theirs, tok = tasked(tmp_path, architecture, make)
    question, context = "a dog", "the house is small in the street of Paris"
    row = tok(question, context, return_offsets_mapping=True)
    out = theirs(input_ids=torch.tensor([row["input_ids"]]))
    inside = [i for i, text in enumerate(row.sequence_ids()) if text == 1]
    best = max(((out.start_logits[0, i] + out.end_logits[0, j]).item(), i, j) for i in inside for j in inside if i <= j < i + 30)
    found = ours.answer(question, context)
    assert (found.start, found.end) == (row["offset_mapping"][best[1]][0], row["offset_mapping"][best[2]][1])


def test_tags_and_vectors_of_t5(tmp_path: Path) -> None:
    ours, theirs, tok = tasked(tmp_path / "tags", "T5ForTokenClassification", t5)
    best = theirs(input_ids=torch.tensor([tok("the house").input_ids])).logits[0].argmax(-1)
    assert ours.tag("the house")[0].label == ("no", "yes", "maybe")[int(best[1])]
    ours, theirs, tok = tasked(tmp_path / "vectors", "T5EncoderModel", t5)
    for text, found in zip(TEXTS, ours.embed(TEXTS), strict=True):
        assert (found - theirs(input_ids=torch.tensor([tok(text).input_ids])).last_hidden_state[0].mean(0)).abs().max() < 1e-5


PAGES = {"bert": "bert", "roberta": "roberta", "xlm_roberta": "roberta", "distilbert": "distilbert", "albert": "albert",
         "electra": "electra", "deberta": "deberta", "deberta_v2": "deberta", "roformer": "roformer", "longformer": "longformer",
         "big_bird": "bigbird", "t5": "t5", "bart": "bart", "marian": "transformer"}  # fmt: skip
@pytest.mark.parametrize("module", PAGES)
def test_every_architecture_of_transformers_is_read(module: str) -> None:
    page = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    kinds = {name: getattr(page, name) for name in page.__all__ if "retrained" not in name and "PreTrainedModel" not in name}
    theirs = {name for name, kind in kinds.items() if issubclass(kind, tf.PreTrainedModel)}
    assert len(theirs) >= 3 and theirs <= {form.architecture for form in family(PAGES[module]).published}


@pytest.mark.parametrize(("architecture", "make"), [("BartForCausalLM", bart), ("MarianForCausalLM", marian)])
def test_the_decoder_alone(architecture: str, make: Any, tmp_path: Path) -> None:
    """Its file's attention to a source is never used; transformers draws it anew when it reads what is saved, and says the same."""
    changes = {"is_decoder": True, "is_encoder_decoder": False, "forced_eos_token_id": None}
    m = mirror(architecture, make(**changes, scale_embedding=True, decoder_ffn_dim=72))
    ids, mask = m.ids(3, 15), torch.arange(15)[None] < torch.tensor([[15], [11], [6]])
    with torch.no_grad():
        near(m.ours.model(ids, mask=mask).logits[mask], m.theirs(input_ids=ids, attention_mask=mask.long()).logits[mask], 1e-5)
        transept.save(m.ours, tmp_path)
        again, info = m.cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"] and all("encoder_attn" in key or "embed_positions" in key for key in info["missing_keys"])
        near(again.eval()(input_ids=ids).logits, m.theirs(input_ids=ids).logits, 1e-5)
    options = {"attention_mask": torch.ones(1, 4, dtype=torch.long), "max_new_tokens": 12, "do_sample": False}
    expected = m.theirs.generate(ids[:1, :4], **options)[0, 4:].tolist()
    found = m.ours.generate(ids[:1, :4], max_tokens=12).ids
    assert found == expected[: len(found)] and len(found) > 3
