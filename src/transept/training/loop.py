"""The loop: the only one. It knows no model and no task: an objective gives sums, the loop divides, steps, looks, saves and stops."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transept.core.batch import Batch, Draw
from transept.core.errors import ConfigError, NumericsError
from transept.training import generators, meter, state
from transept.training.batches import Ahead, Sampler, shares
from transept.training.judge import Judge
from transept.training.log import Log
from transept.training.optim import Mean, averaged, optimisers, parameters
from transept.training.ranks import Ranks
from transept.training.remat import recompute
from transept.training.resume import snapshot
from transept.training.run import Number, Run
from transept.training.schedules import factor
from transept.training.stop import Told, listening
from transept.training.update import Step, Updater, called, out_of_memory
from transept.training.view import View


@dataclass(frozen=True)
class Result:
    """How a run ended: updates made, the last look's figures, the best one, and the signal that stopped it (0: none)."""

    step: int
    seconds: float
    figures: dict[str, float]
    best: float | None
    signal: int
    why: str


class Loop:
    """One run of a `Run` in a folder (None: nothing is written)."""

    def __init__(self, run: Run, folder: Path | None = None, *, ranks: Ranks | None = None, view: View | None = None):
        self.run, self.folder, self.settings, self.view = run, folder, run.settings, view or View()
        self.ranks = ranks or Ranks()
        s = self.settings
        modules = [m for m in (run.model, run.objective) if isinstance(m, nn.Module)]
        self.named = parameters(*modules)
        self.device = next(iter(self.named.values())).device
        if s.steps <= 0 and s.minutes <= 0:
            raise ConfigError("a run needs an end: settings.steps or settings.minutes above 0")
        if s.deterministic:
            torch.use_deterministic_algorithms(True)
        if s.checkpointing:
            recompute(run.model)
        made = optimisers(self.named, s.optim, *modules)
        # Model and objective in one piece, so that a loss over a large vocabulary is computed in fewer passes.
        compute = torch.compile(called) if s.compile else called
        self.updater = Updater(run.model, run.objective, self.named, made, s.optim.clip, s.precision, self.ranks, self.device, compute)
        self.sampler = Sampler(run.train, s.loading, s.seed)
        self.means = [Mean(self.named, s.ema) for _ in range(1) if s.ema > 0 or s.average > 0]
        self.judge = Judge(run, self.ranks, self.device)
        self.step, self.elapsed, self.items, self.skipped, self.saved = 0, 0.0, 0, 0, -1
        self.cursor, self._seen = Draw(s.seed, 0, 0), 0
        self.micro = s.loading.micro or s.loading.batch
        self.pace = meter.Pace()
        self.log: Log | None = None
        self.random: Any = None
        self.frozen_hash: str | None = None
        self.lost = False
        self.last_save = time.monotonic()

    def train(self) -> Result:
        """Goes on to the end, or until told to stop; saves, and returns how it ended."""
        if self.folder is not None and self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.folder, self.step, self.settings.track)
        ahead = Ahead(self.sampler.batch, self.settings.loading.workers)
        try:
            with listening() as told, generators.apart(self.settings.seed, self.random):
                why = self._steps(ahead, told)
                if not told.signal and self.judge.looked != self.step:
                    self._look()
                self._save()
            return Result(self.step, self.elapsed, self.judge.figures, self.judge.best, told.signal, why)
        finally:
            ahead.close()
            self.view.close()
            if self.log is not None:
                self.log.close()

    def _steps(self, ahead: Ahead, told: Told) -> str:
        while True:
            if self.progress() >= 1.0:
                return "the end of the run"
            if self.ranks.agree(float(told.signal), self.device):
                told.signal = told.signal or 15
                return f"signal {told.signal}"
            if self.judge.tired():
                return f"no better figure in {self.settings.judging.patience} looks"
            self.advance(ahead)
            if self.settings.judging.every and self.step % self.settings.judging.every == 0:
                self._look()
            if self._due():
                self._save()

    def progress(self) -> Number:
        """How much of the run is over, 0 to 1: by updates or by time, whichever is nearer its end."""
        s = self.settings
        by_time = self.elapsed / (60 * s.minutes) if s.minutes > 0 else 0.0
        return min(max(self.step / s.steps if s.steps > 0 else 0.0, by_time), 1.0)

    def advance(self, ahead: Ahead) -> None:
        """One update, with what belongs to it: the schedule, the clock, the mean of the weights, the log."""
        begin = time.perf_counter()
        start, many, after = self.sampler.span(self.cursor)
        progress = self.progress()
        rate = factor(self.settings.schedule, self.step, progress)
        done = self._update(ahead, start, many, after, rate)
        self._guard(done)
        if done.applied:
            after_step = getattr(self.run.objective, "after_step", None)
            if after_step is not None:
                after_step(self.run.model)
            for mean in self.means:
                if self.settings.ema > 0 or progress >= 1 - self.settings.average:
                    mean.update()
        self.cursor, self.step = after, self.step + 1
        seconds = time.perf_counter() - begin
        self.elapsed = self.ranks.agree(self.elapsed + seconds, self.device)
        self.pace.add(self._seen, seconds)
        self.items += self._seen
        lr = rate * self.settings.optim.lr
        self._write(**done.means, lr=lr, norm=done.norm, count=done.count, seconds=round(seconds, 4))
        left = self.elapsed * (1 / max(self.progress(), 1e-9) - 1)
        facts = {"loss": done.means["loss"], "lr": float(lr), "memory": float(meter.memory(self.device)), "left": float(left)}
        self.view.update(self.step, float(self.progress()), facts, self.pace)

    def _update(self, ahead: Ahead, start: Draw, many: int, after: Draw, rate: Number) -> Step:
        """The update itself; where memory runs out, once more with the same samples in halves of the micro-batches."""
        following, more, _ = self.sampler.span(after)
        ahead.expect(self._pieces(start, many) + self._pieces(following, more))
        self.run.model.train()
        try:
            return self._tried(ahead, start, many, rate)
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e) or self.micro < 2 or self.ranks.world > 1:
                raise
        self.micro = max(1, min(self.micro, many) // 2)
        self._say(f"memory ran out; from here on {self.micro} samples at a time", "out_of_memory")
        return self._tried(ahead, start, many, rate)

    def _pieces(self, start: Draw, many: int) -> list[tuple[Draw, int]]:
        return shares(start, many, self.ranks.rank, self.ranks.world, self.micro)

    def _tried(self, ahead: Ahead, start: Draw, many: int, rate: Number) -> Step:
        self._seen = 0
        tally = self.updater.gradients(self._pieces(start, many), lambda piece: self._taken(ahead, piece), self.step)
        return self.updater.apply(tally, rate)

    def _taken(self, ahead: Ahead, piece: tuple[Draw, int]) -> Batch:
        batch = ahead.take(piece)
        self._seen += meter.elements(batch)
        watched = type(self.view) is not View
        if (watched or self.settings.compile) and not self.pace.items and not self.pace.most:
            # Once as it is: it counts FLOPs, and says in words what compiled code would not, such as a token that the vocabulary lacks.
            flops = meter.forward_flops(self.run.objective, self.run.model, batch, self.device, self.settings.precision)
            self.pace.per_item, self.pace.most = 3 * flops / max(meter.elements(batch), 1), meter.peak(self.device, self.settings.precision)
        return batch

    def _guard(self, done: Step) -> None:
        """Stops the run, or counts a skip, where the loss or the gradient was not finite; the weights have not moved."""
        self.skipped = 0 if done.applied else self.skipped + 1
        if done.applied:
            return
        what = f"the loss ({done.means['loss']}) or the gradient's norm ({done.norm}) of update {self.step} is not finite"
        self._say(f"{what}; the update is left out", "not_finite")
        if self.skipped > self.settings.guard.skips:
            self._save()
            raise NumericsError(f"{what}, {self.skipped} in a row; the weights are as they were before it")

    def _look(self) -> None:
        """Judges the held-out sources by the weights that will be kept."""
        with averaged(self.means):
            figures = self.judge.look(self.step)
        if figures:
            self._write(**figures)
            self._say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def _due(self) -> bool:
        s = self.settings.saving
        by_time = s.minutes > 0 and time.monotonic() - self.last_save >= 60 * s.minutes
        by_steps = (s.every and self.step % s.every == 0) or self.judge.best_step == self.step
        return bool(by_steps or self.ranks.agree(float(by_time), self.device))

    def _save(self) -> None:
        """Writes a checkpoint; where the disk is full or fails, says so and goes on: the one before stays."""
        if self.folder is None or self.saved == self.step:
            return
        found = snapshot(self)
        # Set in every process, so that all agree on whether this step still asks for a gathering of the state.
        self.saved, self.lost = self.step, False
        if self.ranks.first:
            try:
                state.save(self.folder / "checkpoints", found)
                state.prune(self.folder / "checkpoints", self.settings.saving.keep, self.judge.best_step)
            except OSError as e:
                self.lost = True
                self._say(f"step {self.step} could not be saved: {e.strerror or e}; the checkpoint before it stays", "not_saved")
        self.last_save = time.monotonic()
        self.ranks.wait()

    def _write(self, **facts: Any) -> None:
        if self.log is not None:
            self.log.write(self.step, **facts)

    def _say(self, text: str, event: str = "") -> None:
        if self.ranks.first:
            self.view.say(text)
        if event:
            self._write(event=event, text=text)
