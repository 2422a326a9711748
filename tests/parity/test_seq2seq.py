"""Encoder-decoders against transformers, from its own random tiny models, both ways; greedy and beam search give the same ids."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor

import transept
from tests.counts import count
from tests.parity.mirror import Mirror, mirror
from tests.parity.test_decoders import gpt2, gradients_agree, llama, near
from transept.core.errors import InputError
from transept.core.registry import family

SIZES = {"vocab_size": 96, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 64}


def marian(**changes: Any) -> Any:
    ids = {"pad_token_id": 3, "eos_token_id": 0, "forced_eos_token_id": 0, "decoder_start_token_id": 3}
    return tf.MarianConfig(**{**SIZES, **ids, "activation_function": "swish", "scale_embedding": True, **changes})


def bart(**changes: Any) -> Any:
    return tf.BartConfig(**{**SIZES, **changes})


def t5(**changes: Any) -> Any:
    sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 24, "d_ff": 80, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 12,
             "relative_attention_max_distance": 24, "decoder_start_token_id": 0}
    return tf.T5Config(**{**sizes, **changes})


V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES: dict[str, tuple[str, Any]] = {
    "marian": ("MarianMTModel", marian()),
    "marian, uneven": (
        "MarianMTModel",
        marian(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=72, activation_function="relu"),
    ),
    "bart": ("BartForConditionalGeneration", bart()),
    "bart, forced": ("BartForConditionalGeneration", bart(forced_bos_token_id=0, scale_embedding=True, encoder_layers=3)),
    "t5": ("T5ForConditionalGeneration", t5()),
    "t5, v1.1": ("T5ForConditionalGeneration", t5(**V11, num_decoder_layers=1)),
    "t5, gated silu": ("T5ForConditionalGeneration", t5(feed_forward_proj="gated-silu")),
}
# Random models of these forms say one token again and again, and never an end.
LOOPS = ("t5, v1.1", "t5, gated silu")
every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def case(name: str) -> Mirror:
    m = mirror(*CASES[name])
    if name == "t5, v1.1":
        # Published files of this form score by a table of their own; a model that transformers 5 makes from a configuration never does.
        m.theirs.lm_head.weight = torch.nn.Parameter(torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) / 8)
        m.theirs.save_pretrained(m.folder)
        m.ours = transept.load(m.folder)
    return m


def batch(m: Mirror, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sources of 11, 19 and 5 tokens padded on the right, their mask, and targets."""
    mask = torch.arange(19)[None] < torch.tensor([[11], [19], [5]])
    return m.ids(3, 19, seed).where(mask, m.theirs.config.pad_token_id), mask, m.ids(3, 13, seed + 1)


@every_case
def test_logits_and_the_encoder(name: str) -> None:
    m = case(name)
    source, mask, target = batch(m)
    with torch.no_grad():
        theirs = m.theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target)
        ours = m.ours.model(target, source=source, source_mask=mask)
        plain = m.ours.model(target, source=source[1:2])
        alone = m.theirs(input_ids=source[1:2].expand(3, -1), decoder_input_ids=target).logits
    near(ours.logits, theirs.logits, 1e-5)
    near(ours.encoded[mask], theirs.encoder_last_hidden_state[mask], 1e-5)
    near(plain.logits, alone, 1e-5)


@every_case
def test_gradients_of_every_parameter(name: str) -> None:
    m = case(name)
    source, mask, target = batch(m, seed=2)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())

    theirs = m.theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits
    gradients_agree(m, loss(theirs), loss(m.ours.model(target, source=source, source_mask=mask).logits))


@every_case
def test_transformers_loads_what_this_library_saves(name: str, tmp_path: Path) -> None:
    m = case(name)
    again = m.reloaded(tmp_path)
    source, mask, target = batch(m, seed=4)
    inputs = {"input_ids": source, "attention_mask": mask.long(), "decoder_input_ids": target}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, m.theirs(**inputs).logits)
    assert transept.load(tmp_path).rules == m.ours.rules
    assert again.generation_config.decoder_start_token_id == m.ours.rules.start


def theirs_ids(m: Mirror, source: Tensor, tokens: int, **options: Any) -> list[int]:
    """transformers' own answer to one source [1 s]: new tokens only, padding after the end cut.

    Both sides are told the same end tokens: those of the configuration, and more that random models meet.
    """
    begin = 1 if m.theirs.config.is_encoder_decoder else source.shape[1]
    with torch.no_grad():
        out = m.theirs.generate(source, attention_mask=torch.ones_like(source), do_sample=False, max_new_tokens=tokens, **options)
    ids = out[0, begin:].tolist()
    cut = next((i + 1 for i, token in enumerate(ids) if token in m.ours.ends), len(ids))
    return ids[:cut]


def ending(m: Mirror) -> Mirror:
    """The mirror with end tokens that its random weights do produce: every third of those in its free answers."""
    if not vars(m).get("ended"):
        met = {i for seed in range(4) for i in m.ours.generate(m.ids(1, 9, 50 + seed), max_tokens=14, beams=3, ignore_end=True).ids[3:]}
        ends = sorted({*m.ours.ends, *sorted(met)[::3]})
        m.ours.rules = m.ours.rules.replace(ends=tuple(ends))
        m.theirs.generation_config.eos_token_id = ends
        vars(m)["ended"] = True
    return m


@every_case
def test_greedy_gives_the_same_ids(name: str) -> None:
    m, ended = searched(name), 0
    for seed in range(count(50)):
        source, tokens = m.ids(1, 5 + seed % 14, seed), 8 + 5 * (seed % 7)
        expected = theirs_ids(m, source, tokens, num_beams=1)
        found = m.ours.generate(source, max_tokens=tokens, temperature=0.0)
        assert found.ids == expected, seed
        ended += found.finish_reason == "stop"
    assert ended or name in LOOPS, "no answer met an end token, so this says little"


PLANS = list(itertools.product((1.0, 0.0, 2.0, 0.6, -1.0), (False, True, "never")))


def searches_agree(m: Mirror, total: int, tokens: int, **options: Any) -> int:
    """Searches with four beams under every length penalty and way of ending; returns how many answers met an end token."""
    ended = 0
    for i in range(total):
        penalty, early = PLANS[i % len(PLANS)]
        prompt = m.ids(1, 5 + i % 14, 100 + i)
        expected = theirs_ids(m, prompt, tokens, num_beams=4, length_penalty=penalty, early_stopping=early, **options)
        found = m.ours.generate(prompt, max_tokens=tokens, beams=4, penalty=penalty, early=early)
        assert found.ids == expected, (i, penalty, early)
        ended += found.finish_reason == "stop"
    return ended


@every_case
def test_beam_search_gives_the_same_ids(name: str) -> None:
    assert searches_agree(searched(name), count(150), 12) or name in LOOPS


RULES: dict[str, dict[str, Any]] = {
    "no trigram twice": {"no_repeat_ngram_size": 3},
    "no token twice": {"no_repeat_ngram_size": 1},
    "not so short": {"min_length": 9},
    "forbidden words": {"bad_words_ids": [[5], [7, 8], [11]], "renormalize_logits": True},
    "forced": {"forced_bos_token_id": 17, "forced_eos_token_id": 0},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_published_rules_are_kept(rules: dict[str, Any], tmp_path: Path) -> None:
    """A generation configuration beside the weights says which tokens are forced or forbidden, as the translation models' own does."""
    m = case("marian")
    published = tf.GenerationConfig(decoder_start_token_id=3, eos_token_id=0, pad_token_id=3, num_beams=3, length_penalty=1.3, **rules)
    m.theirs.save_pretrained(tmp_path)
    published.save_pretrained(tmp_path)
    ours, theirs = transept.load(tmp_path), tf.MarianMTModel.from_pretrained(tmp_path)
    assert ours.rules.beams == 3
    transept.save(ours, tmp_path / "again")
    assert transept.load(tmp_path / "again").rules == ours.rules
    for seed, beams in itertools.product(range(count(30)), (1, 3)):
        source = m.ids(1, 9, seed)
        options: dict[str, Any] = {"num_beams": beams} if beams == 1 else {}
        options |= {"attention_mask": torch.ones_like(source), "do_sample": False, "max_new_tokens": 15}
        expected = theirs.generate(source, **options)[0, 1:].tolist()
        expected = expected[: expected.index(0) + 1] if 0 in expected else expected
        assert ours.generate(source, max_tokens=15, beams=beams).ids == expected, (seed, beams)


DECODERS: dict[str, tuple[str, Any]] = {
    "gpt2": ("GPT2LMHeadModel", gpt2(eos_token_id=[5, 9])),
    "llama": ("LlamaForCausalLM", llama(eos_token_id=7)),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_alone_is_searched_alike(name: str) -> None:
    ended = searches_agree(ending(mirror(*DECODERS[name])), count(150), 14, pad_token_id=3)
    assert ended, "no search met an end token, so this says little"


@functools.cache
def searched(name: str) -> Mirror:
    return ending(mirror(*CASES[name]))


def test_a_batch_is_searched_as_each_alone() -> None:
    """Sources of unlike length in one padded batch; rows that end leave it."""
    m = case("bart").ours
    rows = [m.encode(case("bart").ids(1, 3 + 2 * i, i)) for i in range(5)]
    for beams in (1, 4):
        plan = m._plan(8, beams)
        together = [g.ids for g in m._search(rows, plan, 5)]
        assert together == [m._search([row], plan, 1)[0].ids for row in rows]
        assert together == [g.ids for g in m._search(rows, plan, 3)]
        assert together[3] == m.generate(rows[3], max_tokens=8, beams=beams).ids


def test_bart_classifies_by_its_last_end_token(tmp_path: Path) -> None:
    m = mirror("BartForSequenceClassification", bart(num_labels=5))
    ids, mask = m.ids(3, 15), torch.arange(15)[None] < torch.tensor([[15], [11], [6]])
    ids[torch.arange(3), mask.sum(1) - 1] = 2
    ids = ids.where(mask, 1)
    theirs, ours = m.theirs(input_ids=ids, attention_mask=mask.long()).logits, m.ours.model(ids, mask=mask).logits
    near(ours, theirs, 1e-5)
    with torch.no_grad():
        assert torch.equal(m.reloaded(tmp_path)(input_ids=ids).logits, m.theirs(input_ids=ids).logits)
    labels = torch.tensor([4, 0, 2])
    gradients_agree(m, F.cross_entropy(theirs, labels), F.cross_entropy(ours, labels))
    with pytest.raises(InputError, match="end token 2"):
        m.ours.model(m.ids(1, 5))


def test_the_encoder_of_t5_alone(tmp_path: Path) -> None:
    m = mirror("T5EncoderModel", t5(**V11))
    source, mask, _ = batch(m)
    with torch.no_grad():
        theirs, ours = m.theirs(input_ids=source, attention_mask=mask.long()).last_hidden_state, m.ours.model(source, mask=mask).hidden
        assert torch.equal(m.reloaded(tmp_path)(input_ids=source).last_hidden_state, m.theirs(input_ids=source).last_hidden_state)
    near(ours[mask], theirs[mask], 1e-5)


def test_a_file_without_the_heads_own_table_is_read_from_the_other() -> None:
    """transformers 5 leaves the table of T5 v1.1's head out, where it equals that of the tokens."""
    m = mirror("T5ForConditionalGeneration", t5(**V11))
    assert not vars(m.ours.spec)["tied"]
    source, mask, target = batch(m)
    with torch.no_grad():
        theirs = m.theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits
        near(m.ours.model(target, source=source, source_mask=mask).logits / 8, theirs / 8, 1e-5)


@pytest.mark.parametrize(("page", "name", "parameters"), [
    ("bart", "bart-base", 139_420_416), ("bart", "bart-large", 406_291_456), ("t5", "t5-small", 60_506_624), ("t5", "t5-base", 222_903_552),
    ("t5", "flan-t5-small", 76_961_152),
])
def test_sizes_have_their_published_number_of_parameters(page: str, name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in family(page).build(family(page).sizes[name]).parameters()) == parameters


def test_the_2017_base_model_has_64_million_numbers() -> None:
    """Counted as in a file that also stores the two tables of sines, 1024 positions each."""
    page = family("transformer")
    with torch.device("meta"):
        ours = sum(p.numel() for p in page.build(page.sizes["transformer-base"]).parameters())
        config = tf.MarianConfig(vocab_size=37000, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
                                 pad_token_id=0, decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
                                 max_position_embeddings=1024)
        theirs = sum(p.numel() for p in tf.MarianMTModel(config).parameters())
    assert ours + 2 * 1024 * 512 == theirs == 64_131_072
