"""Who computes what in the next step: a pure function of the scheduler's state, with no tensor, no clock and no randomness in it (rows
82c, 82d).

A request waits until it is admitted, then computes its tokens in chunks under a budget per step, then one token (or a guess of several)
per step. Each request that decodes gets its token in every step in which it keeps its pages; what is left of the budget goes to prompts.

Order of admission: rank, which is the priority, raised by one for every `ageing` steps in which no request of the same tenant and
priority was admitted; then the tenant that was admitted longest ago; then arrival. So a tenant's oldest request of a priority lower by n
overtakes newcomers after n * `ageing` steps, and keeps its rank while it runs; among equals it is admitted after at most one admission of
each other tenant. No request waits for ever while running ones finish.

Preemption gives a request's pages back and lets it compute again later; its tokens are never lost. It happens to the running request of
the least rank, among equals the youngest, when another needs a page; to one of a rank below the priority of one that waits; and to the
latest of a tenant that runs at least two more requests of a priority than the tenant of one that waits. The oldest request of the highest
rank is never preempted for pages, so there is always progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transept.core.errors import InputError
from transept.inference.engine.pages import Key, Pages, chain


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of an engine: `pages` of `page` tokens, at most `rows` running requests, `budget` tokens per step, priority + 1 per `ageing`
    steps.
    """

    pages: int = 256
    page: int = 16
    rows: int = 16
    budget: int = 128
    ageing: int = 64

    def check(self) -> Limits:
        """Itself, if its numbers make sense."""
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"{name} should be 1 or more, found {value}")
        if self.budget < self.rows:
            raise InputError(f"a budget of {self.budget} tokens per step is less than one for each of {self.rows} rows")
        return self


@dataclass(kw_only=True)
class Task:
    """One sequence: its tokens so far, of which the first `computed` have their columns in `pages`; `draft` guesses the next ones."""

    id: int
    tokens: list[int]
    most: int
    priority: int = 0
    tenant: str = ""
    after: int | None = None
    draft: tuple[int, ...] = ()
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    running: bool = False
    rank: int = 0
    arrival: int = 0
    since: int = 0
    registered: int = 0
    preempted: int = 0

    @property
    def lacking(self) -> int:
        """Tokens whose columns are not computed yet; 1 where the request decodes."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Work:
    """What one sequence does in a step: the columns of `tokens` from position `start` on.

    `pages` is its page table up to the last of them; those in `fresh` are to be cleared and (from, to) in `copies` to be copied first;
    `guessed` of the tokens are a draft; `last` is True where the logits that follow are wanted.
    """

    id: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    fresh: tuple[int, ...]
    copies: tuple[tuple[int, int], ...]
    guessed: int
    last: bool


class Scheduler:
    """`add` and `release` requests at any time; `schedule` says what the next step computes, `advance` what came of it."""

    def __init__(self, limits: Limits):
        self.limits = limits.check()
        self.pages = Pages(limits.pages, limits.page)
        self.tasks: dict[int, Task] = {}
        self.steps = self.arrivals = self.admissions = self.preempted = 0
        self.admitted: dict[str, int] = {}
        self.served: dict[tuple[str, int], int] = {}
        self.fed: dict[str, int] = {}

    def add(self, task: Task) -> None:
        """Takes in a request; one that could not fit into all pages together is refused."""
        if task.id in self.tasks:
            raise InputError(f"the request id {task.id} is in use")
        if not task.tokens:
            raise InputError("the prompt is empty: give at least one token")
        room = self.limits.pages * self.limits.page
        if self.pages.needed(task.most) > self.limits.pages:
            raise InputError(f"the request may reach {task.most} tokens, but the engine's cache holds {room}")
        self.arrivals += 1
        task.arrival, task.since, task.rank = self.arrivals, self.steps, task.priority
        self.tasks[task.id] = task

    def release(self, id: int, keep: bool = True) -> None:
        """The request is over, for whatever reason: its pages come back; an id that is not there is ignored.

        With keep=False what its pages contain is not offered to others.
        """
        task = self.tasks.pop(id, None)
        if task is None:
            return
        self._vacate(task, keep)
        if all(other.tenant != task.tenant for other in self.tasks.values()):
            self.admitted.pop(task.tenant, None)
            self.fed.pop(task.tenant, None)
            self.served = {who: step for who, step in self.served.items() if who[0] != task.tenant}

    def schedule(self) -> list[Work]:
        """The next step; empty where nothing can be done."""
        self.steps += 1
        plan: dict[int, Work] = {}
        self._decode(plan)
        self._admit(plan)
        self._prefill(plan)
        return list(plan.values())

    def advance(self, work: Work, new: Sequence[int]) -> None:
        """The work is done and gave these tokens (none for a chunk inside a prompt); the late result of a dead or preempted request is
        ignored.
        """
        task = self.tasks.get(work.id)
        if task is None or not task.running or task.computed != work.start:
            return
        # Of a draft only as many columns count as were right: one less than the new tokens.
        task.computed += len(work.tokens) - work.guessed + max(0, len(new) - 1)
        task.tokens += new
        task.draft = ()
        self._register(task)

    @property
    def running(self) -> list[Task]:
        """Running requests, the most important first."""
        return sorted((t for t in self.tasks.values() if t.running), key=_importance)

    @property
    def waiting(self) -> list[Task]:
        """Waiting requests in the order of their admission."""
        return sorted((t for t in self.tasks.values() if not t.running), key=self._turn)

    # --- one step ---

    def _decode(self, plan: dict[int, Work]) -> None:
        ready = [task for task in self.running if task.lacking == 1]
        spare = self.limits.budget - len(ready)
        for task in ready:
            guess = task.draft[: max(0, min(spare, task.most - len(task.tokens) - 1))]
            if guess and self.pages.needed(len(task.tokens) + len(guess)) - len(task.pages) > self.pages.available:
                guess = ()
            if task.running and self._place(task, (task.tokens[-1], *guess), len(guess), plan):
                spare -= len(guess)

    def _prefill(self, plan: dict[int, Work]) -> None:
        left = self.limits.budget - sum(len(work.tokens) for work in plan.values())
        hungry = [task for task in self.running if task.id not in plan]
        for task in sorted(hungry, key=lambda t: (-t.rank, self.fed.get(t.tenant, 0), t.arrival)):
            chunk = tuple(task.tokens[task.computed : task.computed + left])
            if chunk and task.running and self._place(task, chunk, 0, plan):
                left -= len(chunk)
                self.fed[task.tenant] = self.steps

    def _place(self, task: Task, tokens: tuple[int, ...], guessed: int, plan: dict[int, Work]) -> bool:
        """Puts the work into the plan if the pages can be had; otherwise the request itself is preempted."""
        fresh, copies = [], []
        end = task.computed + len(tokens)
        for at in range(task.computed // self.pages.size, self.pages.needed(end)):
            if at < len(task.pages) and self._owned(task.pages[at]):
                continue
            page = self._take(task, plan)
            if page is None:
                # What was just taken goes back with everything else.
                self._preempt(task, plan)
                return False
            if at < len(task.pages):
                copies.append((task.pages[at], page))
                self.pages.drop([task.pages[at]])
                task.pages[at] = page
            else:
                fresh.append(page)
                task.pages.append(page)
        table = tuple(task.pages[: self.pages.needed(end)])
        last = end == len(task.tokens) + guessed
        plan[task.id] = Work(task.id, task.computed, tokens, table, tuple(fresh), tuple(copies), guessed, last)
        return True

    def _owned(self, page: int) -> bool:
        """True if the page may be written to; where nothing is left for a copy, the only one that holds it takes it out of the prefixes
        instead.
        """
        if self.pages.shared(page) and not self.pages.available and self.pages.held[page] == 1:
            self.pages.forget(page)
        return not self.pages.shared(page)

    def _take(self, task: Task, plan: dict[int, Work]) -> int | None:
        """A page for the task, if need be from the least important running request below it."""
        while (page := self.pages.take()) is None:
            victim = self.running[-1]
            if _importance(victim) <= _importance(task):
                return None
            self._preempt(victim, plan)
        return page

    # --- admission ---

    def _turn(self, task: Task) -> tuple[int, int, int]:
        return -self._aged(task), self.admitted.get(task.tenant, 0), task.arrival

    def _aged(self, task: Task) -> int:
        last = max(task.since, self.served.get((task.tenant, task.priority), 0))
        return task.rank + (self.steps - last) // self.limits.ageing

    def _admit(self, plan: dict[int, Work]) -> None:
        """Admits in order until the first that does not fit: none is overtaken because it is large."""
        while True:
            # A follower waits until the one that it shares its prompt with has computed it.
            ready = [
                t
                for t in self.waiting
                if t.after is None or (lead := self.tasks.get(t.after)) is None or (lead.running and lead.lacking <= 1)
            ]
            if not ready or not self._make_room(ready[0], plan):
                return
            self._enter(ready[0])

    def _make_room(self, task: Task, plan: dict[int, Work]) -> bool:
        """True if there is a row and pages for the task, where it is owed them at the cost of others."""
        known = self.pages.match(self._prefix(task))
        lacking = self.pages.needed(len(task.tokens) + 1) - len(known) + (1 if len(known) * self.pages.size == len(task.tokens) else 0)
        lacking = min(lacking, self.limits.pages - len(known))
        resting = sum(page in self.pages.idle for page in known)
        running, victims = self.running, []
        gain = self.pages.available - resting
        while len(running) - len(victims) >= self.limits.rows or gain < lacking:
            victim = self._victim(task, [t for t in running if t not in victims])
            if victim is None:
                return False
            victims.append(victim)
            gain += sum(self.pages.held[page] == 1 and page not in known for page in victim.pages)
        for victim in victims:
            self._preempt(victim, plan)
        return True

    def _victim(self, task: Task, running: list[Task]) -> Task | None:
        below = [t for t in running if t.rank < task.priority]
        if below:
            return below[-1]
        equals = [t for t in running if t.priority == task.priority]
        own = sum(t.tenant == task.tenant for t in running)
        rich = [t for t in equals if sum(o.tenant == t.tenant for o in running) >= own + 2]
        return max(rich, key=lambda t: (sum(o.tenant == t.tenant for o in running), t.arrival), default=None)

    def _prefix(self, task: Task) -> list[Key]:
        task.keys = chain(task.tenant, task.tokens, self.pages.size, task.keys)
        return task.keys

    def _enter(self, task: Task) -> None:
        self.admissions += 1
        self.admitted[task.tenant] = self.admissions
        task.running, task.rank = True, self._aged(task)
        self.served[task.tenant, task.priority] = self.steps
        task.pages = self.pages.match(self._prefix(task))
        task.registered = len(task.pages)
        self.pages.share(task.pages)
        # The last token is always computed, for its logits; where its page is shared, that page is copied before.
        task.computed = min(len(task.pages) * self.pages.size, len(task.tokens) - 1)

    # --- the end of holding pages ---

    def _preempt(self, task: Task, plan: dict[int, Work]) -> None:
        plan.pop(task.id, None)
        self._vacate(task, keep=True)
        task.running, task.computed, task.draft = False, 0, ()
        task.since, task.preempted = self.steps, task.preempted + 1
        self.preempted += 1

    def _vacate(self, task: Task, keep: bool) -> None:
        """The only place where a request's pages go back."""
        self.pages.drop(task.pages, keep)
        task.pages = []

    def _register(self, task: Task) -> None:
        full = task.computed // self.pages.size
        if full > task.registered:
            self._prefix(task)
            for at in range(task.registered, full):
                self.pages.register(task.pages[at], task.keys[at])
            task.registered = full


def _importance(task: Task) -> tuple[int, int]:
    """Sorts the most important first: the highest rank, then the earliest arrival."""
    return -task.rank, task.arrival
