"""What an answer may look like: a grammar says at each step which tokens may come next (row 82e).

Grammars are compiled by llguidance (Lark grammars, JSON schemas, regular expressions; an Earley parser over derivatives of regular
expressions, so that no pattern can back-track). Work is bounded by its own counters, not by a clock, and sizes are checked first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from transept.core.errors import InputError
from transept.core.shapes import Bool, Tensor

LONGEST = 65536
DEEPEST = 64


@runtime_checkable
class Grammar(Protocol):
    """The state of one answer under a grammar."""

    def mask(self, vocab: int) -> Bool[Tensor, "v"]:
        """True at each of `vocab` tokens that may come next."""
        ...

    def advance(self, token: int) -> None:
        """This token came."""
        ...

    @property
    def done(self) -> bool:
        """True if the answer is complete and nothing may follow."""
        ...


class Guided:
    """An llguidance matcher as a Grammar."""

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def mask(self, vocab: int) -> Bool[Tensor, "v"]:
        with _boundary():
            bits = self.matcher.compute_bitmask()
        self._check()
        # numpy's unpacking takes a hundredth of what shifting in torch takes, and a server needs one mask for every token.
        allowed = np.zeros(vocab, np.bool_)
        found = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:vocab]
        allowed[: len(found)] = found
        return torch.from_numpy(allowed)

    def advance(self, token: int) -> None:
        with _boundary():
            self.matcher.consume_token(token)
        self._check()

    @property
    def done(self) -> bool:
        return self.matcher.is_stopped()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise InputError(f"the grammar failed: {self.matcher.get_error()[:300]}")


class GrammarCompiler:
    """Compiles grammars for one vocabulary: `source` is a tokenizer.json mapping, `ends` the ids that end an answer.

    Each method returns a function that makes a fresh Grammar, as `Ask.grammar` takes it; safe in any thread, and best not on an event loop.
    Errors: InputError where a grammar is too long, too deep, invalid, or its automaton grows too large.
    """

    def __init__(self, source: Mapping[str, Any], ends: Sequence[int], vocab: int | None = None):
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        self.matcher, self.limits = (
            LLMatcher,
            LLParserLimits(
                verbose_errors=False,
                initial_lexer_fuel=1_000_000,
                step_lexer_fuel=200_000,
                step_max_items=50_000,
                max_lexer_states=20_000,
                max_grammar_size=100_000,
            ),
        )
        with _boundary():
            self.tokenizer = LLTokenizer(json.dumps(source), n_vocab=vocab, eos_token=list(ends))

    def schema(self, schema: Mapping[str, Any] | str) -> Callable[[], Grammar]:
        """Answers are JSON texts that the schema accepts."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        _bounded(text)
        _shallow(text)
        with _boundary():
            return self._compiled(self.matcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False}))

    def json(self) -> Callable[[], Grammar]:
        """Answers are JSON objects of any kind."""
        return self.schema({"type": "object"})

    def regex(self, pattern: str) -> Callable[[], Grammar]:
        """Answers match the pattern from beginning to end."""
        _bounded(pattern)
        with _boundary():
            return self._compiled(self.matcher.grammar_from_regex(pattern))

    def lark(self, grammar: str) -> Callable[[], Grammar]:
        """Answers are words of a grammar in llguidance's dialect of Lark."""
        _bounded(grammar)
        with _boundary():
            return self._compiled(self.matcher.grammar_from_lark(grammar))

    def _compiled(self, grammar: str) -> Callable[[], Grammar]:
        first = self.matcher(self.tokenizer, grammar, log_level=0, limits=self.limits)
        # The first mask is where an automaton that explodes is found out: before the request is taken, not in a step.
        trial = first.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()
        if trial.is_error():
            raise InputError(f"the grammar is not usable: {trial.get_error()[:300]}")
        return lambda: Guided(first.deep_copy())


def constrain(
    logits: NDArray[np.float32], tokens: Sequence[int], processors: Sequence[Callable[[Sequence[int], Any], Any]], grammar: Grammar | None
) -> NDArray[np.float32]:
    """What the processors make of the logits [v] that follow the tokens, and -inf where the grammar allows nothing."""
    scores = torch.from_numpy(logits)
    for process in processors:
        scores = process(tokens, scores)
    if grammar is not None:
        scores = scores.masked_fill(~grammar.mask(len(scores)), float("-inf"))
    return scores.numpy()


def _bounded(text: str) -> None:
    if len(text) > LONGEST:
        raise InputError(f"a grammar has at most {LONGEST} characters, found {len(text)}")


def _shallow(text: str) -> None:
    try:
        level = [json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"the schema is not valid JSON: {str(error)[:200]}") from None
    for _ in range(DEEPEST + 1):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise InputError(f"a schema is nested at most {DEEPEST} deep")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


@contextmanager
def _boundary() -> Iterator[None]:
    """Failures of the native code become typed; its panics are no Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, InputError):
        raise
    except BaseException as error:
        raise InputError(f"the grammar is not usable: {type(error).__name__}: {str(error)[:300]}") from None
