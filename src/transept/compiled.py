"""Start again at once: a decoder's lowered plan kept in a file beside the model, and the object that answers from it without torch.

`load` and `save` are the public door: `load` takes the plan file where there is a good one, and else opens the model
(`transept.door`); `save` writes either.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transept import native
from transept.checkpoints.find import find, parts
from transept.checkpoints.pull import cache_dir
from transept.core.errors import ConfigError, SourceError
from transept.core.tap import listened
from transept.data.text.tokenizer import Tokenizer
from transept.inference import generation
from transept.inference.engine.engine import Ask
from transept.inference.generation import Generation, Piece
from transept.inference.plan.file import Maker, PlanFile, PlanRefused, describe, open_plan, write
from transept.inference.plan.steps import Loop, Steps
from transept.inference.sampling import Sampling
from transept.talk import Talk

if TYPE_CHECKING:
    from transept.checkpoints.quantized import Stored
    from transept.door import Model

Progress = Callable[[int, int], None]


class PlanWarning(UserWarning):
    """A plan file could not be used, or not be kept."""


class Compiled(Talk):
    """A decoder that generates from its plan file. Whatever else a `Model` has (`model`, `spec`, `card`, ...) opens the checkpoint in
    torch; from then on that is what runs.
    """

    def __init__(self, plan: PlanFile, path: Path, source: str, *, threads: int | None = None):
        self.plan, self.path, self.source = plan, path, source
        self.context = plan.context
        known = plan.extra.get("tokenizer")
        try:
            self.tokenizer = None if known is None else Tokenizer(**known)
            self._ends = tuple(int(i) for i in plan.extra["ends"])
            self._loop = Loop(Steps(plan.program, plan.out, threads=threads), context=plan.context)
        except (TypeError, KeyError, ValueError, ConfigError) as error:
            raise PlanRefused(f"the plan file {plan.path} is damaged: {str(error)[:200]}") from error
        self._opened: Model | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self._ends

    def generate(self, prompt: Any, *, beams: int = 1, **options: Any) -> Generation:
        """The continuation of a text or of ids; the options are those of `Model.generate`."""
        if beams != 1 or any(options.get(name) is not None for name in ("penalty", "early")):
            return self.open().generate(prompt, beams=beams, **options)
        return generation.last(self.stream(prompt, **{k: v for k, v in options.items() if k not in ("penalty", "early")}))

    def stream(
        self, prompt: Any, *, max_tokens: int = 64, stop: Sequence[str] = (), ignore_end: bool = False, **sampling: Any
    ) -> Iterator[Piece]:
        """The same, piece by piece as it comes."""
        if self._opened is not None or listened():
            return self.open().stream(prompt, max_tokens=max_tokens, stop=stop, ignore_end=ignore_end, **sampling)
        ids, ends = self.encode(prompt), () if ignore_end else self.ends
        ask = Ask(prompt=ids, max_tokens=max_tokens, sampling=Sampling.checked(sampling), ends=ends, stop=stop)
        return self._loop.stream(ask, None if self.tokenizer is None else self.tokenizer.stream)

    def open(self) -> Model:
        """The whole model, in torch."""
        if self._opened is None:
            from transept.door import load as open_model

            self._opened = open_model(self.path, fast=self.plan.header.fast)
        return self._opened

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}")
        return getattr(self.open(), name)


def load(
    source: str | Path,
    dtype: Any = None,
    device: Any = None,
    *,
    ignore: Sequence[str] = (),
    fast: bool = False,
    keep_plan: bool | None = None,
    progress: Progress | None = None,
) -> Model | Compiled:
    """A model from a folder, a GGUF file, a bundled name or a hub id.

    Where `compile_model` left a plan file, a decoder answers from it without torch; a file that does not fit is told of and made again.
    `keep_plan` leaves one at the first use (default: the environment's TRANSEPT_KEEP_PLAN=1); False neither writes nor reads one. The
    other arguments and the errors are those of `transept.door.load`.
    """
    plain = str(dtype or "torch.float32") == "torch.float32" and str(device or "cpu") == "cpu" and not ignore and native.available()
    keep = os.environ.get("TRANSEPT_KEEP_PLAN") == "1" if keep_plan is None else keep_plan
    path = find(source, progress)
    found = next((p for p in places(path, fast) if p.is_file()), None) if plain and keep_plan is not False else None
    if found is not None:
        try:
            return Compiled(open_plan(found, parts(path), fast=fast), path, str(source))
        except PlanRefused as refused:
            warnings.warn(f"{refused}; it is made again", PlanWarning, stacklevel=2)
            keep = True
    from transept.door import load as open_model

    model = open_model(path, dtype, device, ignore=ignore, fast=fast, progress=progress)
    model.source = str(source)
    if keep and plain:
        try:
            keep_as_plan(model, path, fast)
        except (ConfigError, OSError) as error:
            warnings.warn(f"no plan file was kept of {source}: {error}", PlanWarning, stacklevel=2)
    return model


def save(m: Model | Compiled, folder: str | Path, *, coded: Mapping[str, Stored] | None = None) -> Path:
    """Writes a folder that Hugging Face transformers loads as it is, and that `load` gives back with equal numbers; returns its path.

    With the `coded` parameters that `adapters.quantize` returned, the folder holds these bytes, and only `load` reads it. Raises what
    `transept.door.save` raises.
    """
    from transept.door import save as write_model

    return write_model(m.open() if isinstance(m, Compiled) else m, folder, coded=coded)


def compile_model(source: str | Path, *, fast: bool = False, out: Path | None = None, progress: Progress | None = None) -> Path:
    """Lowers a decoder, writes its plan file and returns its path: `out`, or beside the model, or in the cache.

    Raises ConfigError where the model is not one that the native core runs whole, SourceError where there is no native core.
    """
    if not native.available():
        raise SourceError(f"a plan is packed by the native core, which is not there: {native.why_not()}")
    from transept.door import load as open_model

    path = find(source, progress)
    return keep_as_plan(open_model(path, fast=fast, progress=progress), path, fast, out)


def keep_as_plan(model: Model, path: Path, fast: bool, out: Path | None = None) -> Path:
    """Writes the plan file of an opened decoder; raises ConfigError where it runs in torch."""
    lowered = model.lowered()
    if not isinstance(lowered, Loop):
        raise ConfigError(f"{path} runs in torch: {model.why_not() or 'it predicts no next token'}")
    steps, tokenizer = lowered.runner, model.tokenizer
    known = None if tokenizer is None else {
        "source": tokenizer.source, "names": tokenizer.named, "eos_ids": list(tokenizer.eos_ids), "chat_template": tokenizer.chat_template,
        "context": tokenizer.context, "where": tokenizer.where,
    }  # fmt: skip
    maker = Maker(model.family.name, model.context, fast, describe(parts(path)), {"tokenizer": known, "ends": list(model.ends)})
    beside, cached = places(path, fast)
    target = out or (beside if os.access(beside.parent, os.W_OK) else cached)
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, steps.program, steps.out, maker)
    return target


def places(path: Path, fast: bool) -> tuple[Path, Path]:
    """Where a model's plan file may lie: beside it, and in the cache."""
    ending = ".fast.plan" if fast else ".plan"
    name = f"{path.stem}{ending}" if path.is_file() else f"transept{ending}"
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return (path.parent if path.is_file() else path) / name, cache_dir() / "plans" / f"{key}-{name}"
