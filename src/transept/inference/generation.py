"""Text, one token after another: the plain loop that every faster engine must equal (rows 82c-82e).

Nothing here needs torch: a model of the native core brings its own `advance`, any other is wrapped by `predict`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from transept.core.errors import InputError
from transept.inference.sampling import Sampling, choose

CHUNK = 512
"""Prompt tokens per prefill call."""


@runtime_checkable
class Detokenizer(Protocol):
    """Turns tokens into text piece by piece, never splitting a character."""

    def push(self, ids: int | Sequence[int], /) -> str:
        """The text that these tokens complete."""
        ...

    def finish(self) -> str:
        """What is left."""
        ...


@dataclass(frozen=True)
class Step:
    """One new token, its log-probability, and when it came (seconds on time.perf_counter)."""

    id: int
    logprob: float
    time: float


@dataclass
class Usage:
    """Tokens in, tokens out, and the seconds that each phase took."""

    prompt_tokens: int
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds and self.completion_tokens > 1 else 0.0


@dataclass
class Generation:
    """The answer: `ids` are the new tokens only; `finish_reason` is "stop" (an end token or a stop string) or "length"."""

    text: str
    ids: list[int]
    finish_reason: str
    usage: Usage
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """A part of a stream: the text that became certain with these tokens; the last piece carries the whole Generation."""

    text: str
    ids: tuple[int, ...] = ()
    final: Generation | None = None


def check_length(prompt: int, context: int | None) -> None:
    """Refuses a prompt that is empty or longer than the context, with both numbers; nothing is ever cut silently."""
    if prompt == 0:
        raise InputError("the prompt is empty: give at least one token")
    if context is not None and prompt > context:
        raise InputError(f"the prompt has {prompt} tokens, but the model's context is {context}: shorten it by {prompt - context}")


def steps(
    model: Any,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    max_tokens: int,
    context: int | None = None,
    rules: Any | None = None,
    chunk: int = CHUNK,
) -> Iterator[Step]:
    """New tokens one by one, until `max_tokens` or the end of the context; the caller stops at an end token.

    `model` is a `Predictor` or a lowered model, `rules` the `Rules` of an encoder-decoder's checkpoint.
    """
    check_length(len(ids), context)
    if max_tokens < 0:
        raise InputError(f"max_tokens should be 0 or more, found {max_tokens}")
    room = max_tokens if context is None else min(max_tokens, context - len(ids))
    generator = sampling.check().generator()
    advance = advancer(model, len(ids) + max(room, 0), chunk)
    seen = [int(i) for i in ids]
    if room <= 0:
        return
    logits = advance(seen)
    for i in range(room):
        if rules is not None:
            logits = rules.apply(logits[None], [seen], len(ids), room)[0]
        token, logprob = choose(logits, seen, sampling, generator)
        yield Step(token, logprob, time.perf_counter())
        if i + 1 < room:
            seen.append(token)
            logits = advance([token])


def advancer(model: Any, capacity: int, chunk: int = CHUNK) -> Callable[[Sequence[int]], Any]:
    """A function from the next tokens of one sequence to the logits [v] that follow them, over a cache of `capacity` columns.

    A lowered model has `advance` itself; every other one is a torch module with `hidden`, `cache` and `head`.
    """
    if hasattr(model, "advance"):
        return partial(model.advance, model.cache(1, capacity))
    from transept.inference.predict import advancer as in_torch

    return in_torch(model, capacity, chunk)


class StopScanner:
    """Finds stop strings in streamed text, also where they lie across tokens: text that might be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]):
        if any(not s for s in stop):
            raise InputError("a stop string is empty")
        self.stop = tuple(stop)
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met); the stop string itself is not shown."""
        if not self.stop:
            return text, False
        self.held += text
        hits = [i for i in (self.held.find(s) for s in self.stop) if i >= 0]
        if hits:
            shown, self.held = self.held[: min(hits)], ""
            return shown, True
        keep = max((n for s in self.stop for n in range(min(len(s) - 1, len(self.held)), 0, -1) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown, False

    def end(self) -> str:
        """What was held back and turned out to be plain text."""
        rest, self.held = self.held, ""
        return rest


def stream(
    tokens: Iterator[Step], detokenizer: Detokenizer, *, prompt_tokens: int, ends: Sequence[int], stop: Sequence[str] = ()
) -> Iterator[Piece]:
    """Steps as pieces of valid text; the last piece carries the Generation."""
    scanner, usage = StopScanner(stop), Usage(prompt_tokens)
    ids: list[int] = []
    logprobs: list[float] = []
    shown: list[str] = []
    reason, first, begin, waiting = "length", None, time.perf_counter(), []
    for step in tokens:
        ids.append(step.id)
        logprobs.append(step.logprob)
        waiting.append(step.id)
        usage.completion_tokens += 1
        if first is None:
            first, usage.prefill_seconds = step.time, step.time - begin
        usage.decode_seconds = step.time - first
        if step.id in ends:
            reason = "stop"
            break
        text, met = scanner.feed(detokenizer.push(step.id))
        if text:
            shown.append(text)
            yield Piece(text, tuple(waiting))
            waiting = []
        if met:
            reason = "stop"
            break
    rest = "" if reason == "stop" and not (ids and ids[-1] in ends) else _rest(scanner, detokenizer)
    shown.append(rest)
    yield Piece(rest, tuple(waiting), Generation("".join(shown), ids, reason, usage, logprobs))


def _rest(scanner: StopScanner, detokenizer: Detokenizer) -> str:
    text, met = scanner.feed(detokenizer.finish())
    return text if met else text + scanner.end()


def last(pieces: Iterator[Piece], show: Callable[[str], Any] | None = None) -> Generation:
    """The Generation at the end of a stream; `show` is called with each text on the way."""
    final = None
    for piece in pieces:
        if show is not None:
            show(piece.text)
        final = piece.final
    if final is None:
        raise InputError("the stream ended without a result")
    return final
