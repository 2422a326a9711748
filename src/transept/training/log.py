"""What a run writes down: one JSON line per update and event, extras on request, and the curve as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transept.checkpoints.atomic import atomic
from transept.core.errors import ConfigError
from transept.training.run import Track
from transept.training.update import plain

NAME = "log.jsonl"


class Log:
    """Appends lines to log.jsonl; a resumed run first drops what came after the step that it goes on from."""

    def __init__(self, folder: Path, step: int, track: Track | None = None):
        self.path = folder / NAME
        kept = [line for line in read(self.path) if line.get("step", 0) <= step and not line.get("end")] if self.path.exists() else []
        with atomic(self.path) as out:
            out.writelines(_line(line) for line in kept)
        self.tracker = None if track is None else _tracker(track, folder)
        self.file = open(self.path, "ab")  # noqa: SIM115

    def write(self, step: int, **facts: Any) -> None:
        """One line; it reaches the file at once, and the tracker if it holds figures."""
        facts = {"step": step, **{name: plain(value) for name, value in facts.items()}}
        try:
            self.file.write(_line(facts))
            self.file.flush()
        except OSError:
            # A full disk must not end the training that its log describes.
            pass
        if self.tracker is not None:
            self.tracker.log({name: value for name, value in facts.items() if isinstance(value, int | float) and name != "step"}, step)

    def close(self) -> None:
        """The lines are on the disk when this returns."""
        try:
            os.fsync(self.file.fileno())
            self.file.close()
        except OSError:
            pass
        if self.tracker is not None:
            self.tracker.close()


def _line(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts).encode() + b"\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a crash cut short is left out."""
    return list(_lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


@dataclass(frozen=True)
class Tracker:
    """Where figures go besides the log: `log` takes one step's, `close` sends what is still held back."""

    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


def _tracker(track: Track, folder: Path) -> Tracker:
    """The tracker of that name. Errors: ConfigError where its package is missing."""
    try:
        return _TRACKERS[track](folder)
    except ImportError as e:
        raise ConfigError(f"track={track.name} needs the package {track.value}; pip install 'transept[track]'") from e


def _tensorboard(folder: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    return Tracker(lambda figures, step: [writer.add_scalar(name, value, step) for name, value in figures.items()], writer.close)


def _trackio(folder: Path) -> Tracker:
    import trackio  # pyright: ignore[reportMissingImports]

    trackio.init(project="transept", name=folder.name)
    return Tracker(lambda figures, step: trackio.log(figures, step=step), trackio.finish)


def _wandb(folder: Path) -> Tracker:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(project="transept", name=folder.name, dir=str(folder))
    return Tracker(lambda figures, step: run.log(figures, step=step), run.finish)


_TRACKERS = {Track.TENSORBOARD: _tensorboard, Track.TRACKIO: _trackio, Track.WANDB: _wandb}


def curve(folder: Path) -> Path | None:
    """curve.png: the loss of each update and each look at held-out data; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [line for line in read(folder / NAME) if isinstance(line.get("loss"), float)]
    figure, axis = plt.subplots(figsize=(7, 4.5))
    axis.plot([line["step"] for line in lines], [line["loss"] for line in lines], alpha=0.35, label="training, each update")
    smooth = list(_smooth([line["loss"] for line in lines]))
    axis.plot([line["step"] for line in lines], smooth, label="training, smoothed")
    looks: dict[str, list[tuple[int, float]]] = {}
    for line in read(folder / NAME):
        for name, value in line.items():
            if name.endswith(".loss") and isinstance(value, float):
                looks.setdefault(name.removesuffix(".loss"), []).append((line["step"], value))
    for name, points in looks.items():
        axis.plot(*zip(*points, strict=True), "o-", label=name)
    axis.set_xlabel("update")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path = folder / "curve.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _smooth(values: list[float], share: float = 0.05) -> Iterator[float]:
    mean, weight = 0.0, 0.0
    for value in values:
        mean, weight = mean * (1 - share) + value * share, weight * (1 - share) + share
        yield mean / weight
