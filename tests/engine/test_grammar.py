"""Grammars: what an answer under one looks like, and what a grammar may not cost."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.contracts.decoders import model
from tests.engine.cases import case_of
from transept.core.errors import InputError
from transept.data.text.stream import byte_alphabet
from transept.inference.engine import Ask, Engine, GrammarCompiler, Limits
from transept.inference.generation import Generation
from transept.inference.sampling import Sampling

CASE = ("llama", "gqa")
END = 95
LETTERS = {letter: i for i, letter in enumerate(letter for letter, byte in byte_alphabet().items() if 32 <= byte < 127)}


def source() -> dict[str, object]:
    """A tokenizer of 95 printable bytes, of which the last id, "~", ends an answer."""
    native = Tokenizer(models.BPE(vocab=LETTERS, merges=[]))
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    native.decoder = decoders.ByteLevel()
    native.add_special_tokens(["<|end|>"])
    return json.loads(native.to_str())


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    found = source()
    assert found["added_tokens"][0]["id"] == END
    return GrammarCompiler(found, [END])


def answers(grammar: object, seeds: int, most: int = 60) -> list[tuple[Generation, str]]:
    letters = {i: letter.replace("\u0120", " ") for letter, i in LETTERS.items()}
    engine = Engine(model(case_of(*CASE)), context=64, limits=Limits(pages=32, page=8, rows=4, budget=16))
    asks = [
        Ask(prompt=[1, 2], max_tokens=most, ends=(END,), grammar=grammar, sampling=Sampling(temperature=1.0, seed=s)) for s in range(seeds)
    ]
    found = [g for (g,) in engine.run(asks)]
    assert all(isinstance(g, Generation) for g in found), found
    return [(g, "".join(letters[i] for i in g.ids if i != END)) for g in found]


def test_json_follows_its_schema(compiler: GrammarCompiler) -> None:
    """A model of random weights, drawn at random: every finished answer is JSON of the schema."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    found = answers(compiler.schema(schema), 12)
    finished = [text for g, text in found if g.finish_reason == "stop"]
    assert len(finished) == 12
    for text in finished:
        value = json.loads(text)
        assert set(value) == {"a", "b"} and isinstance(value["a"], bool) and value["b"] in ("x", "yy")


def test_answers_match_their_pattern(compiler: GrammarCompiler) -> None:
    found = answers(compiler.regex("[a-c]{2,5}-[0-9]+x"), 8)
    assert any(g.finish_reason == "stop" for g, _ in found)
    assert all(re.fullmatch("[a-c]{2,5}-[0-9]+x", text) for g, text in found if g.finish_reason == "stop")


def test_logprobs_are_the_models_own(compiler: GrammarCompiler) -> None:
    """A forced token is not certain to the model: what is reported is its own probability."""
    (g, text), *_ = answers(compiler.regex("abc"), 1)
    assert text == "abc" and max(g.logprobs) < -0.01


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "grammar", "words"),
    [
        ("schema", "{", "not valid JSON"),
        ("schema", {"type": "nothing of the kind"}, "not usable"),
        ("schema", nested(100), "nested at most"),
        ("schema", {"enum": ["x" * 40] * 10_000}, "at most 65536 characters"),
        ("schema", {"$ref": "http://example.org/schema"}, "not usable"),
        ("regex", "(", "not usable"),
        ("regex", "a" * 100_000, "at most 65536 characters"),
        ("lark", "start: nothing", "not usable"),
    ],
)
def test_what_is_no_grammar_is_refused(compiler: GrammarCompiler, kind: str, grammar: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        getattr(compiler, kind)(grammar)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*c", "([a-z]+)*d", "(x+x+)+y", "(.*a){200}"])
def test_patterns_that_back_track_elsewhere_cost_nothing_here(compiler: GrammarCompiler, pattern: str) -> None:
    made = compiler.regex(pattern)()
    for _ in range(20):
        allowed = made.mask(96)
        assert allowed.any()
        made.advance(int(allowed.nonzero()[0]))
        if made.done:
            break


def test_an_automaton_that_explodes_ends_its_request_only(compiler: GrammarCompiler) -> None:
    """What passes compilation and grows too large in a step fails its own request, typed."""
    engine = Engine(model(case_of(*CASE)), context=64, limits=Limits(pages=32, page=8, rows=4, budget=16))
    wild = Ask(prompt=[1, 2], max_tokens=20, ends=(END,), grammar=compiler.regex("(a{1000}){1000}"))
    (bad,), (good,) = engine.run([wild, Ask(prompt=[1, 2], max_tokens=20)])
    assert isinstance(bad, InputError) and "grammar failed" in str(bad)
    assert isinstance(good, Generation) and len(good.ids) == 20
