"""The engine: takes in requests at any time, moves all on by one step, and keeps the fault of one from the others (rows 82c-82e)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transept.core.errors import InputError, NumericsError, TranseptError
from transept.inference.engine.scheduler import Limits, Scheduler, Task, Work
from transept.inference.engine.speculate import MOST, Clock, Drafter, Lookup
from transept.inference.generation import Detokenizer, Generation, StopScanner, Usage, check_length
from transept.inference.rows import Row, Runner
from transept.inference.sampling import Sampling, choose, log_sum_exp

Processor = Callable[[Sequence[int], Any], Any]
"""(all tokens so far, logits [v] as a tensor) -> logits."""

Logits = NDArray[np.float32]

Top = tuple[tuple[int, float], ...]
"""The most probable tokens of one place with their log-probabilities."""


class RequestError(TranseptError):
    """Something went wrong inside one request; the others were not touched."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: ids in, `n` continuations out.

    `ends` are the ids that end an answer, `stop` the strings; `top` says how many alternatives with their log-probabilities are wanted
    per token; `grammar` makes a fresh grammar for each continuation; `processors` may change the logits. Continuation i is drawn with the
    seed + i.
    """

    prompt: Sequence[int]
    max_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    ends: Sequence[int] = ()
    stop: Sequence[str] = ()
    n: int = 1
    top: int = 0
    priority: int = 0
    tenant: str = ""
    grammar: Callable[[], Any] | None = None
    processors: Sequence[Processor] = ()
    speculate: bool = True


@dataclass(frozen=True)
class Event:
    """News of continuation `index`: text that became certain, with its tokens; the last one carries the whole Generation, or the error."""

    index: int
    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[Top, ...] = ()
    final: Generation | None = None
    error: TranseptError | None = None

    @property
    def over(self) -> bool:
        """True if nothing follows."""
        return self.final is not None or self.error is not None


@dataclass(frozen=True)
class Handle:
    """A request in the engine: one id per continuation."""

    ids: tuple[int, ...]


class Choice:
    """One continuation on its way: draws its tokens from their logits and makes text of them."""

    def __init__(self, ask: Ask, index: int, room: int, detokenizer: Detokenizer | None, sink: Callable[[Event], None]):
        self.ask, self.index, self.room, self.sink = ask, index, room, sink
        seed = ask.sampling.seed
        self.sampling = ask.sampling if seed is None or not index else ask.sampling.replace(seed=(seed + index) % 2**63)
        self.generator = self.sampling.generator()
        self.detokenizer, self.scanner = detokenizer, StopScanner(ask.stop)
        self.grammar = None if ask.grammar is None else ask.grammar()
        self.tokens = [int(i) for i in ask.prompt]
        self.drafter: Drafter | None = None
        self.reason = self.text = ""
        self.out = Generation("", [], "length", Usage(len(self.tokens)))
        self.waiting: list[tuple[int, float, Top]] = []
        self.begin, self.first = time.perf_counter(), 0.0

    def emit(self, raw: Logits) -> int:
        """The next token from the model's logits [v], chosen as the plain loop chooses it, under the processors and the grammar."""
        scores = self._constrained(raw) if self.ask.processors or self.grammar is not None else raw
        seen = self.tokens if self.sampling.repetition_penalty != 1.0 else ()
        token, logprob = choose(scores, seen, self.sampling, self.generator)
        if scores is not raw:
            logprob = float(raw[token]) - log_sum_exp(raw)
        if self.grammar is not None and token not in self.ask.ends:
            self.grammar.advance(token)
        self._note(token, logprob, raw)
        return token

    def _constrained(self, raw: Logits) -> Logits:
        from transept.inference.engine.grammar import constrain

        if np.isnan(raw).any():
            raise NumericsError("the model's logits hold NaN: its weights or its input are damaged")
        return constrain(raw, self.tokens, self.ask.processors, self.grammar)

    def _note(self, token: int, logprob: float, raw: Logits) -> None:
        top: Top = ()
        if self.ask.top:
            best, mass = np.argpartition(raw, -min(self.ask.top, len(raw)))[-self.ask.top :], log_sum_exp(raw)
            top = tuple((int(i), float(raw[i]) - mass) for i in best[np.argsort(-raw[best], kind="stable")])
        now, usage = time.perf_counter(), self.out.usage
        if not usage.completion_tokens:
            self.first, usage.prefill_seconds = now, now - self.begin
        usage.completion_tokens += 1
        usage.decode_seconds = now - self.first
        self.tokens.append(token)
        self.out.ids.append(token)
        self.out.logprobs.append(logprob)
        self.waiting.append((token, logprob, top))
        self._read(token)

    def _read(self, token: int) -> None:
        if token in self.ask.ends:
            self.reason = "stop"
            return
        text, met = self.scanner.feed(self.detokenizer.push(token) if self.detokenizer is not None else "")
        self.text += text
        if met:
            self.reason = "met"
        elif self.grammar is not None and self.grammar.done:
            self.reason = "stop"
        elif len(self.out.ids) >= self.room:
            self.reason = "length"

    def tell(self) -> None:
        """Hands on what became certain, and the end of it."""
        if self.reason in ("stop", "length"):
            text, met = self.scanner.feed(self.detokenizer.finish() if self.detokenizer is not None else "")
            self.text += text if met else text + self.scanner.end()
        if not (self.text or self.reason or self.detokenizer is None):
            return
        ids, logprobs, top = zip(*self.waiting, strict=True) if self.waiting else ((), (), ())
        self.out.text += self.text
        self.out.finish_reason = {"met": "stop"}.get(self.reason, self.reason or "length")
        event = Event(self.index, self.text, ids, logprobs, top, self.out if self.reason else None)
        self.text, self.waiting = "", []
        self.sink(event)


class Engine:
    """Continuous batching over a paged cache; one thread at a time may call it (`AsyncEngine` is for many).

    `model` is a decoder of the house, or any Runner; `context` the longest sequence; `tokenizer` makes what turns ids into text
    (`m.tokenizer.stream`), without one there are ids only; `drafter` makes what guesses for a request, None switches guessing off. With
    `deterministic` a request's bits do not depend on the others.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: int | None = None,
        limits: Limits | None = None,
        deterministic: bool = True,
        tokenizer: Callable[[], Detokenizer] | None = None,
        drafter: Callable[[], Drafter] | None = Lookup,
    ):
        self.limits = (limits or Limits()).check()
        self.context, self.tokenizer, self.drafter = context, tokenizer, drafter
        if not isinstance(model, Runner):
            from transept.inference.engine.runner import TorchRunner

            model = TorchRunner(model, pages=self.limits.pages, page=self.limits.page, context=context, deterministic=deterministic)
        self.runner: Runner = model
        self.scheduler = Scheduler(self.limits)
        self.choices: dict[int, Choice] = {}
        self.next, self.clock = 0, Clock()
        self.counts = {
            "steps": 0,
            "computed_tokens": 0,
            "generated_tokens": 0,
            "guessed_tokens": 0,
            "confirmed_tokens": 0,
            "failed_requests": 0,
        }

    def room(self, ask: Ask) -> int:
        """How many new tokens the request may get; refuses one that cannot be served, whatever else runs. Safe in any thread."""
        check_length(len(ask.prompt), self.context)
        ask.sampling.check()
        for name, value, least in (("max_tokens", ask.max_tokens, 0), ("n", ask.n, 1), ("top", ask.top, 0)):
            if value < least:
                raise InputError(f"{name} should be {least} or more, found {value}")
        room = ask.max_tokens if self.context is None else min(ask.max_tokens, self.context - len(ask.prompt))
        held = self.limits.pages * self.limits.page
        if len(ask.prompt) + room > held:
            raise InputError(f"the request may reach {len(ask.prompt) + room} tokens, but the engine's cache holds {held}")
        return room

    def add(
        self, ask: Ask, sink: Callable[[Event], None] | None = None, tokenizer: Callable[[], Detokenizer] | None = None
    ) -> Handle:
        """Takes in a request; `sink` is called with each Event in the thread of `step`, `tokenizer` stands in for the engine's own.

        Errors: InputError.
        """
        room, sink, tokenizer = self.room(ask), sink or (lambda event: None), tokenizer or self.tokenizer
        made = [Choice(ask, i, room, None if tokenizer is None else tokenizer(), sink) for i in range(ask.n)]
        ids = tuple(range(self.next, self.next + ask.n))
        self.next += ask.n
        try:
            for id, choice in zip(ids, made, strict=True):
                self._enter(id, choice, room, None if id == ids[0] else ids[0])
        except BaseException:
            # All of a request or nothing: a continuation that the scheduler does not know would fail every step.
            self.cancel(Handle(ids))
            raise
        return Handle(ids)

    def cancel(self, handle: Handle | int) -> None:
        """Ends a request or one continuation, at once and without an Event; what is over already is ignored."""
        for id in (handle,) if isinstance(handle, int) else handle.ids:
            self.choices.pop(id, None)
            self.scheduler.release(id)

    @property
    def busy(self) -> bool:
        """True while a request is not over."""
        return bool(self.choices)

    def step(self) -> bool:
        """Moves every request on as far as the limits allow; False where there was nothing to do."""
        self._guess()
        plan = self.scheduler.schedule()
        if not plan:
            return False
        self.counts["steps"] += 1
        self.counts["computed_tokens"] += sum(len(work.tokens) for work in plan)
        self.runner.prepare([pair for work in plan for pair in work.copies], [page for work in plan for page in work.fresh])
        began = time.perf_counter()
        results = list(self._compute(plan))
        if all(len(work.tokens) == 1 + work.guessed for work in plan):
            self.clock.seen(sum(len(work.tokens) for work in plan), time.perf_counter() - began)
        for work, logits in results:
            if isinstance(logits, TranseptError):
                self._fail(work.id, logits)
            else:
                self._take(work, logits)
        return True

    def run(self, asks: Iterable[Ask]) -> list[list[Generation | TranseptError]]:
        """The results of some requests, each with its continuations, when all are over."""
        asks, results = list(asks), {}

        def sink(i: int) -> Callable[[Event], None]:
            return lambda event: results.update({(i, event.index): event.final or event.error}) if event.over else None

        for i, ask in enumerate(asks):
            self.add(ask, sink(i))
        while self.busy:
            self.step()
        return [[results[i, j] for j in range(ask.n)] for i, ask in enumerate(asks)]

    def abort(self, error: TranseptError) -> None:
        """Ends every request with this error, and forgets all pages."""
        choices, self.choices, self.scheduler = self.choices, {}, Scheduler(self.limits)
        for id, choice in choices.items():
            self._report(id, choice, error)

    # --- inside a step ---

    def _enter(self, id: int, choice: Choice, room: int, after: int | None) -> None:
        """Queues one continuation; it starts when the one `after` which it comes has computed the prompt, whose pages it then shares."""
        ask = choice.ask
        if room == 0:
            choice.reason = "length"
            self._told(id, choice)
            return
        if self.drafter is not None and ask.speculate:
            choice.drafter = self.drafter()
            choice.drafter.push(choice.tokens)
        most = len(choice.tokens) + room
        self.scheduler.add(Task(id=id, tokens=list(choice.tokens), most=most, priority=ask.priority, tenant=ask.tenant, after=after))
        self.choices[id] = choice

    def _guess(self) -> None:
        guessing = [
            (id, choice)
            for id, choice in self.choices.items()
            if choice.drafter is not None and (task := self.scheduler.tasks[id]).running and task.lacking == 1
        ]
        if not guessing:
            return
        rows = sum(task.running for task in self.scheduler.tasks.values())
        costs, step = self.clock.costs(rows, MOST), self.clock.step(rows) / rows
        for id, choice in guessing:
            try:
                self.scheduler.tasks[id].draft = tuple(choice.drafter.propose(costs, step)) if choice.drafter is not None else ()
            except Exception as error:
                self._fail(id, _typed(error, "its drafter"))

    def _compute(self, plan: list[Work], part: bool = False) -> Iterator[tuple[Work, Logits | TranseptError]]:
        """The logits of each work; where the step fails it is halved until only the culprit is left."""
        rows = [Row(work.tokens, work.start, work.pages, work.guessed + 1 if work.last else 0) for work in plan]
        try:
            logits = _array(self.runner.step(rows))
            logits = logits.copy() if part else logits
        except Exception as error:
            if len(plan) == 1:
                yield plan[0], _typed(error, "its forward pass")
                return
            half = len(plan) // 2
            yield from self._compute(plan[:half], part=True)
            yield from self._compute(plan[half:], part=True)
            return
        at = 0
        for work, row in zip(plan, rows, strict=True):
            yield work, logits[at : at + row.logits]
            at += row.logits

    def _take(self, work: Work, logits: Logits) -> None:
        choice = self.choices.get(work.id)
        if choice is None:
            return
        new: list[int] = []
        try:
            for i, row in enumerate(logits):
                new.append(choice.emit(row))
                if choice.reason or i == work.guessed or work.tokens[len(work.tokens) - work.guessed + i] != new[-1]:
                    break
            if choice.drafter is not None:
                choice.drafter.push(new)
                if work.guessed:
                    choice.drafter.judged(work.guessed, len(new) - 1)
        except Exception as error:
            self._fail(work.id, _typed(error, "choosing its token"))
            return
        self.counts["generated_tokens"] += len(new)
        self.counts["guessed_tokens"] += work.guessed
        self.counts["confirmed_tokens"] += max(0, len(new) - 1)
        self.scheduler.advance(work, new)
        if new:
            self._told(work.id, choice)

    def _told(self, id: int, choice: Choice) -> None:
        try:
            choice.tell()
        except Exception as error:
            self._fail(id, _typed(error, "handing on its text"))
            return
        if choice.reason:
            self.cancel(id)

    def _fail(self, id: int, error: TranseptError) -> None:
        choice = self.choices.pop(id, None)
        self.scheduler.release(id, keep=False)
        if choice is not None:
            self._report(id, choice, error)

    def _report(self, id: int, choice: Choice, error: TranseptError) -> None:
        self.counts["failed_requests"] += 1
        try:
            choice.sink(Event(choice.index, error=error))
        except Exception:
            # Its reader is gone: there is nobody left to tell.
            self.choices.pop(id, None)


def _array(logits: Any) -> Logits:
    """Logits as an array, wherever they lie."""
    return np.asarray(logits.float().cpu() if hasattr(logits, "cpu") else logits, np.float32)


def _typed(error: Exception, where: str) -> TranseptError:
    return (
        error
        if isinstance(error, TranseptError)
        else RequestError(f"the request failed in {where}: {type(error).__name__}: {str(error)[:300]}")
    )
