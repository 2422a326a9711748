"""The scheduler and its pages against a simple model: a memory that records what each column was computed from (E-3 of the plan)."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from tests.counts import count
from tests.figures import record
from transept.core.errors import InputError
from transept.inference.engine.pages import Pages, chain
from transept.inference.engine.scheduler import Limits, Scheduler, Task, Work


def follows(tenant: str, tokens: list[int]) -> int:
    """The token that a deterministic model would choose; prefixes of one tenant's requests often agree, so that pages are shared."""
    return hash((tenant, tuple(tokens[-5:]), len(tokens))) % 5


class Oracle:
    """A fake model and the simplest account of what must be true."""

    def __init__(self, seed: int, limits: Limits):
        self.random = random.Random(seed)
        self.limits, self.scheduler = limits, Scheduler(limits)
        self.memory: dict[tuple[int, int], object] = {}
        self.prompts: dict[int, list[int]] = {}
        self.late: list[Work] = []
        self.seen: Counter[str] = Counter()
        self.next = 0

    def add(self) -> None:
        rng, room = self.random, self.limits.pages * self.limits.page
        tenant = rng.choice("aab")
        tokens = [rng.randrange(2) if rng.random() < 0.1 else 1 for _ in range(rng.randint(1, max(1, room - 1)))]
        most = rng.randint(len(tokens) + 1, len(tokens) + 12)
        lead = rng.choice([None, None, self.next - 1])
        task = Task(id=self.next, tokens=list(tokens), most=most, priority=rng.choice([0, 0, 0, 1, 2]), tenant=tenant, after=lead)
        if self.scheduler.pages.needed(most) > self.limits.pages:
            with pytest.raises(InputError, match="cache holds"):
                self.scheduler.add(task)
            self.seen["refused"] += 1
            return
        self.scheduler.add(task)
        self.prompts[self.next] = tokens
        self.next += 1

    def guess(self) -> None:
        for task in self.scheduler.tasks.values():
            if task.running and task.lacking == 1 and self.random.random() < 0.3:
                draft, tokens = [], list(task.tokens)
                for _ in range(self.random.randint(1, 5)):
                    right = follows(task.tenant, tokens)
                    draft.append(right if self.random.random() < 0.7 else right + 1)
                    tokens.append(draft[-1])
                task.draft = tuple(draft)

    def step(self) -> None:
        before = {id: (task.preempted, task.running) for id, task in self.scheduler.tasks.items()}
        self.guess()
        plan = self.scheduler.schedule()
        self.seen["preempted"] += sum(task.preempted - before[id][0] for id, task in self.scheduler.tasks.items())
        self.check_plan(plan)
        for source, target in (pair for work in plan for pair in work.copies):
            self.seen["copied"] += 1
            for at in range(self.limits.page):
                self.memory[target, at] = self.memory.get((source, at))
        for page in (page for work in plan for page in work.fresh):
            for at in range(self.limits.page):
                self.memory[page, at] = None
        for work in plan:
            self.compute(work, before[work.id][1])
        if plan and self.random.random() < 0.1:
            self.late.append(self.random.choice(plan))

    def check_plan(self, plan: list[Work]) -> None:
        size, pages = self.limits.page, self.scheduler.pages
        assert sum(len(work.tokens) for work in plan) <= self.limits.budget
        assert len(plan) <= len(self.scheduler.running) <= self.limits.rows
        assert not self.scheduler.tasks or plan, "there are requests, but nothing moves"
        assert len({work.id for work in plan}) == len(plan)
        written = [page for work in plan for page in work.pages[work.start // size :]]
        assert len(set(written)) == len(written), "two requests write one page"
        assert all(pages.held[page] == 1 and page not in pages.key_of for page in written), "a shared page is written"

    def compute(self, work: Work, ran: bool) -> None:
        """Writes the columns, reads back all that the request would attend to, and tells what follows."""
        task, size = self.scheduler.tasks[work.id], self.limits.page
        tokens = task.tokens[: work.start] + list(work.tokens)
        if not ran and work.start:
            self.seen["prefix hit"] += 1
        for at in range(work.start, len(tokens)):
            self.memory[work.pages[at // size], at % size] = (task.tenant, tuple(tokens[: at + 1]))
        for at in range(len(tokens)):
            assert self.memory[work.pages[at // size], at % size] == (task.tenant, tuple(tokens[: at + 1])), (
                "a column of somebody else is read"
            )
        new: list[int] = []
        if work.last:
            known = task.tokens
            while True:
                new.append(follows(task.tenant, [*known, *new]))
                done = len(known) + len(new) == task.most
                if done or len(new) > work.guessed or work.tokens[len(work.tokens) - work.guessed + len(new) - 1] != new[-1]:
                    break
            self.seen["confirmed"] += len(new) - 1
        self.scheduler.advance(work, new)
        if len(task.tokens) == task.most:
            self.check_text(task)
            self.scheduler.release(work.id, keep=self.random.random() < 0.9)
            self.seen["finished"] += 1

    def check_text(self, task: Task) -> None:
        """No token lost, none doubled."""
        expected = list(self.prompts[task.id])
        while len(expected) < task.most:
            expected.append(follows(task.tenant, expected))
        assert task.tokens == expected

    def check_pages(self) -> None:
        pages = self.scheduler.pages
        tables = Counter(page for task in self.scheduler.tasks.values() for page in task.pages)
        assert tables == Counter(pages.held), "the counts of who holds a page are off"
        every = [*pages.free, *pages.idle, *pages.held]
        assert sorted(every) == list(range(1, pages.total + 1)), "a page is lost or doubled"
        assert set(pages.idle) <= set(pages.key_of) and not set(pages.free) & set(pages.key_of)
        assert {page: key for key, page in pages.page_of.items()} == pages.key_of
        assert all(task.running or not task.pages for task in self.scheduler.tasks.values())

    def act(self) -> None:
        rng = self.random
        if rng.random() < 0.25 and len(self.scheduler.tasks) < 12:
            self.add()
        if rng.random() < 0.04 and self.next:
            # Dead and unknown ids too, and the same one twice.
            id = rng.randrange(self.next + 2)
            for _ in range(rng.choice([1, 2])):
                self.scheduler.release(id, keep=rng.random() < 0.5)
            self.seen["released"] += 1
        if self.late and rng.random() < 0.5:
            work = self.late.pop()
            task = self.scheduler.tasks.get(work.id)
            if task is None or task.computed != work.start:
                kept = None if task is None else list(task.tokens)
                self.scheduler.advance(work, [99])
                assert task is None or task.tokens == kept
                self.seen["late"] += 1
        self.step()


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_random_steps_keep_every_page_and_token() -> None:
    """Adding, cancelling twice, unknown ids, late results, guesses, preemption, prefix hits, copies, eviction: in each step every column
    that a request reads is its own, and every page is in exactly one place.
    """
    total, done, seen, began = count(100_000), 0, Counter(), time.perf_counter()
    seed = 0
    while done < total:
        rng = random.Random(seed)
        rows = rng.randint(1, 5)
        limits = Limits(
            pages=rng.randint(2, 14), page=rng.choice([1, 2, 4]), rows=rows, budget=rows + rng.randint(0, 12), ageing=rng.randint(1, 20)
        )
        oracle = Oracle(seed, limits)
        for _ in range(min(500, total - done)):
            oracle.act()
            oracle.check_pages()
            done += 1
        for id in list(oracle.scheduler.tasks):
            oracle.scheduler.release(id)
        assert oracle.scheduler.pages.available == limits.pages
        seen += oracle.seen
        seed += 1
    for what in ("preempted", "prefix hit", "copied", "finished", "released", "late", "confirmed", "refused"):
        assert seen[what] >= total // 2000, f"{what} hardly ever happened: {dict(seen)}"
    record("E-3 scheduler", n_tried=total, n_ok=total, n_bad=0, seconds=time.perf_counter() - began, seed=0)


def drain(scheduler: Scheduler, steps: int) -> list[int]:
    """The ids in the order in which they finish."""
    over: list[int] = []
    for _ in range(steps):
        for work in scheduler.schedule():
            scheduler.advance(work, [1] if work.last else [])
        for task in [t for t in scheduler.tasks.values() if len(t.tokens) >= t.most]:
            over.append(task.id)
            scheduler.release(task.id)
    return over


def task(id: int, prompt: int = 4, new: int = 4, **rest: object) -> Task:
    return Task(id=id, tokens=[id] * prompt, most=prompt + new, **rest)


def test_a_light_tenant_does_not_wait_for_a_heavy_one() -> None:
    """64 long requests of one tenant, then 8 short ones of eight others: those end before more than a few of the 64."""
    scheduler = Scheduler(Limits(pages=64, page=4, rows=8, budget=16))
    for i in range(64):
        scheduler.add(task(i, prompt=20, new=8, tenant="heavy"))
    assert len(drain(scheduler, 80)) > 8
    for i in range(8):
        scheduler.add(task(100 + i, tenant=f"light {i}"))
    over = drain(scheduler, 600)
    assert set(range(100, 108)) <= set(over) and len(scheduler.tasks) == 0
    assert sum(id < 64 for id in over[: max(over.index(100 + i) for i in range(8))]) <= 8


def test_low_priority_is_not_starved() -> None:
    """A stream of urgent requests that never ends: a request of lower priority starts after `ageing` steps per level, as stated."""
    limits = Limits(pages=16, page=4, rows=1, budget=8, ageing=10)
    scheduler = Scheduler(limits)
    scheduler.add(task(0, priority=0))
    started = None
    for step in range(200):
        scheduler.add(task(1 + step, new=1, priority=2))
        for work in scheduler.schedule():
            scheduler.advance(work, [1] if work.last else [])
            if work.id == 0 and started is None:
                started = step
        for t in [t for t in scheduler.tasks.values() if len(t.tokens) >= t.most]:
            scheduler.release(t.id)
    assert started is not None and started <= 2 * limits.ageing + 2


def test_higher_priority_takes_the_row() -> None:
    scheduler = Scheduler(Limits(pages=8, page=4, rows=1, budget=8))
    scheduler.add(task(0, new=8))
    drain(scheduler, 2)
    scheduler.add(task(1, priority=1))
    assert drain(scheduler, 30) == [1, 0]


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(InputError, match="may reach 9 tokens, but the engine's cache holds 8"):
        Scheduler(Limits(pages=2, page=4, rows=1, budget=8)).add(task(0, prompt=4, new=5))


def test_what_does_not_fit_now_waits() -> None:
    scheduler = Scheduler(Limits(pages=2, page=4, rows=2, budget=8))
    for i in range(4):
        scheduler.add(task(i))
    assert drain(scheduler, 60) == [0, 1, 2, 3]


def test_tenants_do_not_share_prefixes() -> None:
    assert chain("a", [1, 2, 3, 4], 2)[0] != chain("b", [1, 2, 3, 4], 2)[0]
    assert chain("a", [1, 2, 3, 4], 2) == chain("a", [1, 2, 3, 4, 5], 2)
    assert chain("a", [1, 2, 3, 4], 2)[1] != chain("a", [9, 2, 3, 4], 2)[1]


def test_the_longest_unused_prefix_is_given_away_first() -> None:
    pages = Pages(3, 2)
    taken = [pages.take() for _ in range(3)]
    for page, key in zip(taken, (b"a", b"b", b"c"), strict=True):
        pages.register(page, key)
    for page in taken:
        pages.drop([page])
    pages.share(pages.match([b"a"]))
    pages.drop(pages.match([b"a"]))
    assert pages.take() == taken[1] and pages.match([b"a"]) and not pages.match([b"b"])
