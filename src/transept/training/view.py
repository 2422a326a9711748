"""What a person sees of a run while it goes: a live line where there is a terminal, a plain one every few seconds where there is none."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from transept.training.meter import Pace


class View:
    """Shows nothing; the base of those that do."""

    def update(self, step: int, progress: float, facts: dict[str, float], pace: Pace) -> None:
        """After each update: `facts` are loss, lr, memory and seconds left."""

    def say(self, text: str) -> None:
        """Something that happened."""

    def close(self) -> None:
        """The run is over."""


def sentence(step: int, facts: dict[str, float], pace: Pace) -> str:
    """One line with what there is to know."""
    share = f" | {pace.share:.0%} of peak" if pace.share else ""
    left = f" | {_clock(facts['left'])} left" if facts.get("left", 0) > 0 else ""
    return (f"step {step} | loss {facts['loss']:.4f} | lr {facts['lr']:.2e} | {pace.rate:,.0f} tokens/s{share} | "
            f"{facts['memory'] / 2**20:,.0f} MiB{left}")  # fmt: skip


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"


class Lines(View):
    """A plain line at most every `seconds`."""

    def __init__(self, out: TextIO | None = None, seconds: float = 5.0):
        self.out, self.seconds, self.last = out or sys.stderr, seconds, 0.0

    def update(self, step: int, progress: float, facts: dict[str, float], pace: Pace) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            self.say(f"{progress:4.0%} | {sentence(step, facts, pace)}")

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)


class Live(View):
    """A bar that stays in its place, with what happened above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.description}"))
        self.bar: Any = Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.start()
        self.task = self.bar.add_task("", total=1.0)

    def update(self, step: int, progress: float, facts: dict[str, float], pace: Pace) -> None:
        self.bar.update(self.task, completed=progress, description=sentence(step, facts, pace))

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bar.stop()


def view() -> View:
    """The live line for a terminal, plain lines for a file or a pipe."""
    return Live() if sys.stderr.isatty() else Lines()
