"""What a recipe returns: a model, an objective, data, and settings that can be changed by name and stored as JSON."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from transept.core.errors import ConfigError, nearest
from transept.core.spec import Spec
from transept.training.objective import Objective, Source


class Shape(Enum):
    """How the learning rate goes after its warm-up, from 1 to `floor`."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "warm-up, stable, decay"


class Precision(Enum):
    """What the forward and backward pass are computed in; the weights are float32 either way."""

    FP32 = "float32"
    BF16 = "bfloat16"


class Order(Enum):
    """How an epoch visits its samples: shuffled, in turn, shuffled in groups of about one length (the source tells lengths), or as tiles.

    Tiles are for a source with a sample at every element, each `length` elements long: an epoch covers the data once, side by side,
    and begins elsewhere than the one before.
    """

    SHUFFLED = "shuffled"
    SEQUENTIAL = "sequential"
    BUCKETED = "bucketed"
    TILED = "tiled"


class Track(Enum):
    """Where figures go besides the log file; each needs its package (extra `track`)."""

    TENSORBOARD = "tensorboard"
    TRACKIO = "trackio"
    WANDB = "wandb"


Number = int | float


@dataclass(frozen=True, kw_only=True)
class Optim(Spec):
    """AdamW; where `muon` is above 0, Muon at that rate for the matrices of the layers.

    Sources: Loshchilov and Hutter 2017, arXiv 1711.05101 (norms and biases do not decay); Jordan et al. 2024, "Muon".
    """

    lr: Number = 3e-4
    betas: tuple[Number, Number] = (0.9, 0.95)
    eps: Number = 1e-8
    decay: Number = 0.1
    muon: Number = 0.0
    momentum: Number = 0.95
    muon_decay: Number = 0.0
    newton_schulz: int = 5
    clip: Number = 1.0
    """The largest norm of the gradient; 0 leaves it as it is."""


@dataclass(frozen=True, kw_only=True)
class Schedule(Spec):
    """The learning rate's factor: up in `warmup` steps (below 1: that share of the run), then `shape` down to `floor`.

    `decay` is the share of the run over which warm-up-stable-decay comes down (Hu et al. 2024, arXiv 2404.06395).
    """

    shape: Shape = Shape.COSINE
    warmup: Number = 0.01
    floor: Number = 0.1
    decay: Number = 0.2


@dataclass(frozen=True, kw_only=True)
class Loading(Spec):
    """How many samples an update sees (`batch`, over all processes), how many at a time (`micro`; None: all its share), in which order."""

    batch: int = 32
    micro: int | None = None
    order: Order = Order.SHUFFLED
    workers: int = 0
    """Threads that prepare batches ahead; they change nothing but the time."""


@dataclass(frozen=True, kw_only=True)
class Judging(Spec):
    """When the held-out sources are looked at and what is best: `metric` of `source`, lower or `higher`.

    `patience` looks without a better one end the run; 0 never does.
    """

    every: int = 0
    source: str = "eval"
    metric: str = "loss"
    higher: bool = False
    patience: int = 0
    batch: int = 64


@dataclass(frozen=True, kw_only=True)
class Saving(Spec):
    """A checkpoint every `every` steps (0: at the end and when told to stop) and every `minutes`; `keep` newest stay, and the best."""

    every: int = 0
    minutes: Number = 0.0
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class Guard(Spec):
    """What a loss or gradient that is not finite does: ends the run, or is skipped up to `skips` times in a row."""

    skips: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings(Spec):
    """Everything about a run that is a number: typed, changed by dotted name, stored with the result."""

    steps: int = 0
    minutes: Number = 0.0
    """The run ends at `steps` or after `minutes`, whichever comes first; 0 does not count. The schedule follows the nearer end."""
    seed: int = 0
    precision: Precision = Precision.FP32
    compile: bool = False
    checkpointing: bool = False
    """Activations of each layer are computed again in the backward pass instead of kept."""
    ema: Number = 0.0
    """The decay of an exponential mean of the weights; 0 keeps none."""
    average: Number = 0.0
    """The last share of the run whose weights are averaged; 0 averages none."""
    log_every: int = 10
    deterministic: bool = False
    track: Track | None = None
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    loading: Loading = field(default_factory=Loading)
    judging: Judging = field(default_factory=Judging)
    saving: Saving = field(default_factory=Saving)
    guard: Guard = field(default_factory=Guard)


Measure = Callable[[nn.Module], Mapping[str, float]]
Finish = Callable[[nn.Module, Path], str]


@dataclass
class Run:
    """A training run, ready to start.

    `eval` are held-out sources by name, judged by `eval_objective` (the objective itself where it is None); `measure` adds figures of its
    own at each look (BLEU, accuracy by generation). `finish` is called with the trained model and the run's folder: it may write files,
    and returns what the reader should see last, such as a sample.
    """

    model: nn.Module
    objective: Objective
    train: Source
    settings: Settings = field(default_factory=Settings)
    eval: Mapping[str, Source] = field(default_factory=dict)
    eval_objective: Objective | None = None
    measure: Measure | None = None
    finish: Finish | None = None
    recipe: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What defines the run, as JSON: the recipe, its arguments, all settings, and the model's tensors by shape."""
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        count = sum(p.numel() for p in self.model.parameters())
        return {"recipe": self.recipe, "arguments": dict(self.arguments), "settings": self.settings.json(),
                "samples": len(self.train), "parameters": count, "shapes": shapes}  # fmt: skip


def override(settings: Spec, changes: Mapping[str, str | Any]) -> Any:
    """The same settings with values by dotted name, each held to its declared type.

    Values may be text, as from a command line. Errors: ConfigError for an unknown name, with the nearest, or a value of another type.
    """
    record = settings.json()
    names = dotted(record)
    for name, value in changes.items():
        if name not in names:
            raise ConfigError(f"there is no setting {name!r}{nearest(name, names)}; see them all with --dry-run")
        *path, last = name.split(".")
        place = record
        for part in path:
            place = place[part]
        place[last] = literal(value) if isinstance(value, str) else value
    return type(settings).from_json(record)


def dotted(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested record by its dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            leaves.update(dotted(value, f"{prefix}{name}."))
        elif name != "kind":
            leaves[prefix + name] = value
    return leaves


def literal(text: str) -> Any:
    """A number, truth value, None or list as Python writes it; anything else is the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def call(recipe: Callable[..., Run], changes: Sequence[str], name: str = "") -> Run:
    """The Run of a recipe function with changes such as "dim=256" or "optim.lr=3e-4": the recipe's own parameters by their names, all else
    by the settings' dotted names.

    Errors: ConfigError for a change without '=', an unknown name (with the nearest of both), or a value of another type.
    """
    parameters = inspect.signature(recipe).parameters
    hints = typing.get_type_hints(recipe)
    own: dict[str, Any] = {}
    rest: dict[str, str] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"a change is written NAME=VALUE, found {change!r}")
        if key in parameters:
            own[key] = _fits(literal(value), hints.get(key, object), key)
        else:
            rest[key] = value
    run = recipe(**own)
    known = [*parameters, *dotted(run.settings.json())]
    for key in rest:
        if key not in known:
            raise ConfigError(f"neither the recipe nor its settings have {key!r}{nearest(key, known)}; see them all with --dry-run")
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    arguments = {key: v if isinstance(v, str | int | float | bool | None) else str(v) for key, v in {**defaults, **own}.items()}
    return dataclasses.replace(run, settings=override(run.settings, rest), recipe=name or run.recipe, arguments=arguments)


def _fits(value: Any, hint: Any, name: str) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if str in kinds and not isinstance(value, str) and not any(kind is type(value) for kind in kinds):
        return str(value)
    if object not in kinds and not any(type(value) is kind for kind in kinds):
        raise ConfigError(f"{name!r} should be {' or '.join(getattr(k, '__name__', str(k)) for k in kinds)}, found {value!r}")
    return value
