"""Every loss against the one that transformers computes from the same weights and tensors, to 1e-6."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from tests.parity.mirror import Mirror, mirror
from transept.blocks.heads import TiedHead
from transept.training.objective import Sum
from transept.training.objectives.auxiliary import Auxiliary
from transept.training.objectives.causal import Causal, answer
from transept.training.objectives.classification import Choice, Classification, Tokens
from transept.training.objectives.distillation import Distillation
from transept.training.objectives.losses import IGNORE, negative_log, stacked
from transept.training.objectives.masked import Masked
from transept.training.objectives.pairs import NextSentence
from transept.training.objectives.pretraining import Summed, Turns
from transept.training.objectives.regression import Alike, Regression
from transept.training.objectives.replaced import Replaced, detection
from transept.training.objectives.seq2seq import Seq2Seq, shifted
from transept.training.objectives.span import Span

BERT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
THREE = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}


def bert(architecture: str, **more: Any) -> Mirror:
    return mirror(architecture, tf.BertConfig(**BERT, **more))


def padded(m: Mirror, rows: int = 4, t: int = 12) -> dict[str, Tensor]:
    """Ids, mask and segments of rows of unlike length."""
    mask = torch.arange(t) < torch.tensor([t, t - 3, t - 5, t][:rows])[:, None]
    return {"ids": m.ids(rows, t), "mask": mask, "segments": (torch.arange(t) >= 5).long().expand(rows, t).contiguous()}


def theirs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"ids": "input_ids", "mask": "attention_mask", "segments": "token_type_ids"}
    return {names[name]: value.long() for name, value in batch.items() if name in names}


def chosen(ids: Tensor, each: int, mask: Tensor | None = None, seed: int = 1) -> Tensor:
    """Labels of `each` random columns of every row."""
    score = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    if mask is not None:
        score = score.masked_fill(~mask, -1.0)
    return torch.full_like(ids, IGNORE).scatter(1, score.topk(each).indices, ids.gather(1, score.topk(each).indices))


def mean(found: Sum) -> Tensor:
    return found.loss / found.count


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_next_token(smoothing: float) -> None:
    m = mirror("GPT2LMHeadModel", tf.GPT2Config(**GPT))
    batch = {key: value for key, value in padded(m).items() if key != "segments"}
    labels = batch["ids"].masked_fill(~batch["mask"], IGNORE)
    out = m.theirs(**theirs(batch), labels=labels)
    expected = out.loss if smoothing == 0 else LabelSmoother(smoothing)(out, labels, shift_labels=True)
    close(mean(Causal(smoothing=smoothing)(m.ours.model, batch)), expected)


def test_answers_only() -> None:
    m = mirror("LlamaForCausalLM", tf.LlamaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                 intermediate_size=48, max_position_embeddings=40))  # fmt: skip
    texts = [m.ids(1, n, n)[0].tolist() for n in (9, 7, 11)]
    batch = stacked([answer(text[:4], text[4:]) for text in texts])
    labels = batch["ids"].masked_fill(~batch["mask"], IGNORE)
    labels[:, :4] = IGNORE
    close(mean(Causal()(m.ours.model, batch)), m.theirs(**theirs(batch), labels=labels).loss)


@pytest.mark.parametrize("sparse", [False, True])
def test_masked_words(sparse: bool) -> None:
    m = bert("BertForMaskedLM")
    batch = padded(m)
    labels = chosen(batch["ids"], 3, batch["mask"])
    labels[0] = IGNORE
    found = Masked(sparse)(m.ours.model, {**batch, "labels": labels})
    out = m.theirs(**theirs(batch), labels=labels)
    close(mean(found), out.loss)
    right, count = found.metrics["accuracy"]
    assert (int(right), int(count)) == (int((out.logits.argmax(-1) == labels).sum()), 9)


@pytest.mark.parametrize("sparse", [False, True])
def test_masked_words_and_next_sentence(sparse: bool) -> None:
    m = bert("BertForPreTraining")
    batch = padded(m)
    labels, follows = chosen(batch["ids"], 3, batch["mask"]), torch.tensor([0, 1, 1, 0])
    whole = {**batch, "labels": labels, "next": follows}
    out = m.theirs(**theirs(batch), labels=labels, next_sentence_label=follows)
    close(mean(Summed(sparse)(m.ours.model, whole)), out.loss)
    turns = Turns(sparse)
    words = F.cross_entropy(out.prediction_logits.flatten(0, 1), labels.flatten())
    pairs = F.cross_entropy(out.seq_relationship_logits, follows)
    for expected in (words, pairs, words):
        close(mean(turns(m.ours.model, whole)), expected)
        turns.after_step(m.ours.model)


def test_next_sentence() -> None:
    m = bert("BertForNextSentencePrediction")
    batch, follows = padded(m), torch.tensor([0, 1, 1, 0])
    close(mean(NextSentence()(m.ours.model, {**batch, "next": follows})), m.theirs(**theirs(batch), labels=follows).loss)


def test_replaced_tokens() -> None:
    m = mirror("ElectraForPreTraining", tf.ElectraConfig(**BERT, embedding_size=32))
    batch = padded(m)
    replaced = torch.rand(batch["ids"].shape) < 0.3
    out = m.theirs(**theirs(batch), labels=replaced.long())
    losses = detection(m.ours.model(**batch_call(batch)).logits, replaced)
    close(losses[batch["mask"]].mean(), out.loss)


def test_generator_and_discriminator() -> None:
    """With every row of one length and as many masks: 50 times transformers' detection loss plus its masked-word loss."""
    m, g = mirror("ElectraForPreTraining", tf.ElectraConfig(**BERT, embedding_size=32)), bert("BertForMaskedLM")
    true = m.ids(4, 12)
    labels = chosen(true, 3)
    read = torch.where(labels == IGNORE, true, 3)
    found = Replaced(g.ours.model)(m.ours.model, {"ids": read, "labels": labels, "noise": torch.rand(4, 12)})
    guess = g.theirs(read, labels=labels)
    # What the generator drew is not known here, but the loss must be that of one of the possible texts: find it by the noise of the batch.
    close(found.metrics["mlm"] / 4, guess.loss)
    share, count = found.metrics["replaced"]
    assert 0 < int(share) <= 12 and int(count) == 48
    noise = torch.rand(4, 12, generator=torch.Generator().manual_seed(5))
    chances = guess.logits.softmax(-1).cumsum(-1)
    text = torch.where(labels == IGNORE, true, (chances < noise[..., None] * chances[..., -1:]).sum(-1))
    again = Replaced(g.ours.model)(m.ours.model, {"ids": read, "labels": labels, "noise": noise})
    close(mean(again), guess.loss + 50 * m.theirs(text, labels=(text != true).long()).loss)


def batch_call(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("ids", "mask", "segments")}


@pytest.mark.parametrize(
    ("architecture", "objective", "more", "ours", "labels"),
    [
        ("BertForSequenceClassification", Classification(), THREE, "labels", torch.tensor([0, 2, 1, 1])),
        ("BertForSequenceClassification", Regression(), {"num_labels": 1}, "scores", torch.tensor([0.5, 4.0, -1.0, 2.5])),
        ("BertForTokenClassification", Tokens(), THREE, "labels", torch.randint(3, (4, 12)).masked_fill(torch.rand(4, 12) < 0.3, IGNORE)),
    ],
)  # fmt: skip
def test_classes(architecture: str, objective: Any, more: dict[str, Any], ours: str, labels: Tensor) -> None:
    m = bert(architecture, **more)
    batch = padded(m)
    if labels.dim() == 2:
        labels = labels.masked_fill(~batch["mask"], IGNORE)
    close(mean(objective(m.ours.model, {**batch, ours: labels})), m.theirs(**theirs(batch), labels=labels).loss)


def test_choice() -> None:
    m = bert("BertForMultipleChoice")
    batch, labels = padded(m), torch.tensor([1, 0])
    out = m.theirs(**{name: value.view(2, 2, -1) for name, value in theirs(batch).items()}, labels=labels)
    close(mean(Choice()(m.ours.model, {**batch, "labels": labels})), out.loss)


def test_span() -> None:
    m = bert("BertForQuestionAnswering")
    batch = padded(m)
    start, end = torch.tensor([2, 0, 5, 99]), torch.tensor([4, 0, 6, 99])
    found = Span()(m.ours.model, {**batch, "start": start, "end": end})
    total = torch.zeros(())
    for i in range(3):
        row = {name: value[i : i + 1, batch["mask"][i]] for name, value in batch.items()}
        total += m.theirs(**theirs(row), start_positions=start[i : i + 1], end_positions=end[i : i + 1]).loss
    # The last row's answer is beyond the row: it adds nothing to the sum, and transformers leaves it out of the mean.
    close(found.loss / 3, total / 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sequence_to_sequence(smoothing: float) -> None:
    config = tf.MarianConfig(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, dropout=0.0,
                             decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40,
                             pad_token_id=95, decoder_start_token_id=95, eos_token_id=0)  # fmt: skip
    m = mirror("MarianMTModel", config)
    source, target = m.ids(3, 9), m.ids(3, 7, 1)
    batch = stacked([shifted(source[i, : 9 - i].tolist(), target[i, : 7 - 2 * i].tolist(), 95, 0) for i in range(3)])
    mask = batch["source_mask"].long()
    out = m.theirs(input_ids=batch["source"], attention_mask=mask, decoder_input_ids=batch["ids"], labels=batch["labels"])
    found = Seq2Seq(smoothing)(m.ours.model, batch)
    close(mean(found), out.loss if smoothing == 0 else LabelSmoother(smoothing)(out, batch["labels"]))
    close(found.metrics["nll"] / found.count, out.loss)


def test_teacher_forcing_is_the_loss_of_one_token_after_another() -> None:
    """Row 123: all columns at once, or the decoder fed one token at a time through its cache."""
    m = mirror("MarianMTModel", tf.MarianConfig(vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                                decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
                                                max_position_embeddings=40, pad_token_id=95, decoder_start_token_id=95))  # fmt: skip
    source, target = m.ids(1, 9)[0].tolist(), m.ids(1, 7, 1)[0].tolist()
    batch = stacked([shifted(source, target, 95, 0)])
    total, model = torch.zeros(()), m.ours.model.given(batch["source"])
    cache = model.cache(1)
    for token, label in zip(batch["ids"][0], batch["labels"][0], strict=True):
        scores = model.head(model.hidden(token.view(1, 1), cache=cache))[0, 0]
        total -= scores.log_softmax(-1)[label]
    torch.testing.assert_close(Seq2Seq(0.0)(m.ours.model, batch).loss, total, atol=1e-5, rtol=1e-6)


def test_auxiliary() -> None:
    """L3 by transformers' two models of the same body, row by row."""
    config = tf.OpenAIGPTConfig(**GPT, pad_token_id=0, **THREE)
    m = mirror("OpenAIGPTForSequenceClassification", config)
    rows = [m.ids(1, n, n)[0] for n in (9, 7, 11)]
    labels = torch.tensor([2, 0, 1])
    batch = stacked([{"ids": row.tolist(), "labels": int(label)} for row, label in zip(rows, labels, strict=True)])
    model: Any = m.ours.model
    found = Auxiliary(TiedHead(model.embed.tokens), 0.5)(model, batch)
    words = tf.OpenAIGPTLMHeadModel(m.theirs.config).eval()
    words.transformer = m.theirs.transformer
    words.lm_head.weight = m.theirs.transformer.tokens_embed.weight
    expected = torch.zeros(())
    for row, label in zip(rows, labels, strict=True):
        expected += m.theirs(row[None], labels=label[None]).loss + 0.5 * words(row[None], labels=row[None]).loss
    close(mean(found), expected / 3)


def test_alike_is_the_squared_error_of_cosines() -> None:
    m = bert("BertModel")
    batch = padded(m)
    states = m.theirs(**theirs(batch)).last_hidden_state
    pooled = [states[i][batch["mask"][i]].mean(0) for i in range(4)]
    scores = torch.tensor([0.9, 0.1])
    expected = sum((F.cosine_similarity(pooled[2 * i], pooled[2 * i + 1], dim=0) - scores[i]) ** 2 for i in range(2)) / 2
    close(mean(Alike()(m.ours.model, {**batch, "scores": scores})), torch.as_tensor(expected))


@pytest.mark.parametrize("tokens", [False, True])
def test_distillation(tokens: bool) -> None:
    """Against torch's own divergence, row by row without padding."""
    kind, more = ("BertForTokenClassification" if tokens else "BertForSequenceClassification"), THREE
    teacher, student = bert(kind, **more), bert(kind, **more, classifier_dropout=0.0)
    student.ours.model.load_state_dict({n: v * 0.9 + 0.01 for n, v in student.ours.model.state_dict().items()})
    batch = padded(teacher)
    labels = torch.randint(3, (4, 12)) if tokens else torch.tensor([0, 2, 1, 1])
    if tokens:
        labels = labels.masked_fill(~batch["mask"], IGNORE)
    found = Distillation(teacher.ours.model, 3.0, soft=0.7, hard=0.2, states=0.1)(student.ours.model, {**batch, "labels": labels})
    expected = torch.zeros(())
    for i in range(4):
        real = batch["mask"][i]
        row = {name: value[i : i + 1, real] for name, value in batch_call(batch).items()}
        ours, master = student.ours.model(**row), teacher.ours.model(**row)
        s, t, want = (x[0] if tokens else x for x in (ours.logits, master.logits, labels[i : i + 1, real] if tokens else labels[i : i + 1]))
        soft = F.kl_div((s / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean") * 9
        turned = 1 - F.cosine_similarity(ours.hidden[0], master.hidden[0]).mean()
        expected += 0.7 * soft + 0.2 * F.cross_entropy(s, want) + 0.1 * turned
    torch.testing.assert_close(mean(found), expected / 4, atol=1e-5, rtol=1e-5)


def test_negative_log_is_torch_row_by_row() -> None:
    logits, labels = torch.randn(3, 4, 7, requires_grad=True), torch.randint(7, (3, 4))
    labels[0, 1] = IGNORE
    found = negative_log(logits, labels, 0.2)
    for i in range(3):
        for j in range(4):
            want = torch.zeros(()) if labels[i, j] == IGNORE else F.cross_entropy(logits[i, j], labels[i, j], label_smoothing=0.2)
            close(found[i, j], want)
