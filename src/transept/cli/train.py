"""`transept train`, `transept compare` and `transept check training`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transept.core.errors import ConfigError, InputError, SourceError, TranseptError, nearest

if TYPE_CHECKING:
    from transept.training.loop import Loop, Result
    from transept.training.ranks import Ranks
    from transept.training.run import Run

ABOUT = "run.json"


def options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of the three commands."""
    sub = command("train", "Train by a recipe; without --out into a new folder below runs/.")
    sub.add_argument("recipe", nargs="?", help="MODULE:FUNCTION such as recipes.gpt:shakespeare, or FILE.py:FUNCTION")
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting by its dotted name; repeatable")
    sub.add_argument("--minutes", type=float, default=None, metavar="M", help="end after so many minutes of training, in place of steps")
    sub.add_argument("--tune", choices=("full", "lora", "bitfit", "head"), help="what is trained, in recipes that tune a model")
    sub.add_argument("--out", default=None, metavar="FOLDER", help="the run's folder")
    sub.add_argument("--resume", default=None, metavar="FOLDER", help="go on with the run in this folder, by its own recipe")
    sub.add_argument("--force", action="store_true", help="go on although the recipe has changed")
    sub.add_argument("--dry-run", action="store_true", help="print settings, shapes, memory and time, and train nothing")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="processor threads (default: torch's own)")
    sub.add_argument("--parallel", choices=("data", "fsdp", "tensor"), default="data",
                     help="under torchrun: the model on each process, its weights cut up, or its heads and networks")  # fmt: skip
    sub = command("compare", "Two runs side by side: what differs in their settings, and their curves.", table=True)
    sub.add_argument("a")
    sub.add_argument("b")
    sub = command("check", "Try the promises of a part of the library on this machine.", table=True)
    sub.add_argument("part", choices=("training",))
    sub.add_argument("--share", type=float, default=0.05, help="the share of the full counts to run (default 0.05; 1 takes minutes)")
    sub.add_argument("--seed", type=int, default=0)


def recipe(name: str) -> Callable[..., Run]:
    """The recipe function that a user named. Errors: SourceError for a module or file that is not there, ConfigError for a name in it."""
    where, colon, function = name.rpartition(":")
    if not colon:
        raise ConfigError(f"a recipe is named MODULE:FUNCTION, found {name!r}")
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    found: Any = getattr(module, function, None)
    if not callable(found):
        names = [n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__ and n[0] != "_"]
        raise ConfigError(f"{where} has no recipe {function!r}{nearest(function, names)}; it has {', '.join(names)}")
    return found  # pyright: ignore[reportReturnType]


def _file(path: Path) -> Any:
    if not path.is_file():
        raise SourceError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"transept_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _module(where: str) -> Any:
    """A module below the working folder or, for the recipes that come with the source, beside it."""
    for root in (Path.cwd(), Path(__file__).parents[3]):
        if root.joinpath(*where.split(".")).with_suffix(".py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module(where)
    raise SourceError(f"there is no module {where} here or in the checkout that the library runs from; a file is FILE.py:FUNCTION")


def train(args: argparse.Namespace) -> int:
    """Trains; 0 at the end, 143 or 130 when told to stop (the state is saved)."""
    import torch

    from transept.training.ranks import joined
    from transept.training.run import call

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    name, changes = _asked(args)
    if args.minutes is not None:
        changes += [f"minutes={args.minutes}", "steps=0"]
    if args.tune is not None:
        changes.append(f"tune={args.tune}")
    run = call(recipe(name), changes, name)
    if args.dry_run:
        return _dry(run)
    if args.out is not None and args.resume is None and _begun(Path(args.out)):
        raise InputError(f"{args.out} holds a run already; go on with --resume {args.out}, or name another folder")
    with joined() as ranks:
        folder = Path(args.resume or args.out or _new(name))
        folder.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"recipe": name, "changes": changes, **run.record()}, indent=1)
        return _train(run, folder, about, args, ranks)


def _asked(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The recipe and its changes: the line's own, after those that a resumed run was begun with."""
    if args.resume is None:
        if args.recipe is None:
            raise ConfigError("name a recipe such as recipes.gpt:shakespeare, or a run to go on with: --resume FOLDER")
        return args.recipe, list(args.set)
    about = Path(args.resume) / ABOUT
    if not about.is_file():
        raise SourceError(f"{args.resume} holds no run: there is no {about}")
    stored = json.loads(about.read_text(encoding="utf-8"))
    return args.recipe or stored["recipe"], [*stored["changes"], *args.set]


def _begun(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() or (folder / "log.jsonl").is_file()


def _new(name: str) -> Path:
    """The first folder runs/RECIPE-N that is free."""
    stem = name.removeprefix("recipes.").replace(":", "-").replace("/", "-").removesuffix(".py")
    number = 1
    while Path("runs", f"{stem}-{number}").exists():
        number += 1
    return Path("runs", f"{stem}-{number}")


def _train(run: Run, folder: Path, about: str, args: argparse.Namespace, ranks: Ranks) -> int:
    from transept.training.loop import Loop
    from transept.training.resume import restore
    from transept.training.view import View, view

    ranks = _spread(run, ranks, args.parallel)
    loop = Loop(run, folder, ranks=ranks, view=view() if ranks.first else View())
    if args.resume is not None:
        for text in restore(loop, folder, args.force):
            print(f"passed over: {text}", file=sys.stderr)
    if ranks.first:
        (folder / ABOUT).write_text(about, encoding="utf-8")
    begin = time.perf_counter()
    result = loop.train()
    said = _kept(loop, result, folder)
    if ranks.first:
        _end(loop, result, folder, said, time.perf_counter() - begin)
        if loop.lost:
            raise SourceError(f"the state of step {result.step} could not be saved below {folder}; the checkpoint before it stays")
    return 128 + result.signal if result.signal else 0


def _spread(run: Run, ranks: Ranks, how: str) -> Ranks:
    """The model spread over the processes in the way that was asked for; who sees which share of the data."""
    if ranks.world == 1 or how == "data":
        return ranks
    from transept.adapters.parallel import mesh, shard, split

    if how == "fsdp":
        shard(run.model, mesh()["data"])
        return ranks
    split(run.model, mesh(ranks.world)["tensor"])
    return dataclasses.replace(ranks, rank=0, world=1)


def _kept(loop: Loop, result: Result, folder: Path) -> str:
    """Writes model.safetensors with the weights that are kept (their mean, where there is one), and returns the recipe's last words.

    Every process must ask; a model that is spread over several is gathered, and says nothing.
    """
    from transept.checkpoints.safetensors import write_safetensors
    from transept.training.optim import averaged
    from transept.training.ranks import sharded, whole

    run = loop.run
    run.model.eval()
    if result.signal:
        return ""
    with averaged(loop.means):
        weights = {name: whole(t.detach()) for name, t in run.model.state_dict().items()}
        if not loop.ranks.first:
            return ""
        write_safetensors(folder / "model.safetensors", weights)
        spread = any(sharded(p) for p in run.model.parameters())
        return run.finish(run.model, folder) if run.finish is not None and not spread else ""


def _end(loop: Loop, result: Result, folder: Path, said: str, seconds: float) -> None:
    """The last words: a sample, figures, the curve, and how to go on."""
    from transept.training.log import curve

    run, settings = loop.run, loop.run.settings
    line = {"recipe": run.recipe, "seed": settings.seed, "step": result.step, "minutes": round(result.seconds / 60, 2),
            "items": loop.items, "figures": result.figures, "best": result.best, "why": result.why}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(line, indent=1), encoding="utf-8")
    if said:
        print(said)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in result.figures.items())
    print(f"\n{run.recipe}: {result.why} at step {result.step}, {result.seconds / 60:.2f} minutes of training ({seconds:.0f} s in all), "
          f"seed {settings.seed}{': ' + figures if figures else ''}")  # fmt: skip
    picture = curve(folder)
    print(f"curve: {picture}" if picture else "curve: needs matplotlib; pip install 'transept[plot]'")
    longer = f"--minutes {2 * settings.minutes:g}" if settings.minutes else f"--set steps={2 * settings.steps}"
    print(f"go on: transept train --resume {folder} {longer if not result.signal else ''}".rstrip())


def _dry(run: Run) -> int:
    """Settings by dotted name, shapes, and what one update took: measured, not applied."""
    from transept.training import meter
    from transept.training.loop import Loop
    from transept.training.run import dotted

    for name, value in {**run.arguments, **dotted(run.settings.json())}.items():
        print(f"{name} = {value}")
    loop = Loop(run)
    start, many, _ = loop.sampler.span(loop.cursor)
    micro = min(loop.micro, many)
    batch = loop.sampler.batch(start, micro)
    every, trained = (sum(p.numel() for p in ps) for ps in (run.model.parameters(), loop.named.values()))
    print(f"\nmodel: {every:,} parameters, {trained:,} trained")
    for name, tensor in batch.items():
        print(f"batch: {name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    begin = time.perf_counter()
    loop.updater.gradients([(start, micro)], lambda piece: batch, 0)
    seconds = (time.perf_counter() - begin) * -(-many // micro)
    copies = 5 if run.settings.ema or run.settings.average else 4
    held, most = 4 * (every + (copies - 1) * trained), meter.memory(loop.device)
    print(f"memory: {held / 2**20:,.0f} MiB of weights, gradients and optimiser; {most / 2**20:,.0f} MiB of the process at most so far")
    steps, minutes = run.settings.steps, run.settings.minutes
    end = f"{seconds * steps / 60:.1f} minutes for {steps}" if steps else f"the run ends after {minutes} minutes"
    print(f"time: about {seconds:.2f} s an update, {end}")
    return 0


def compare(args: argparse.Namespace) -> int:
    """Settings that differ, then loss by step and held-out figures of both."""
    from transept.training.compare import compared

    a, b = Path(args.a), Path(args.b)
    found = compared(a, b)
    if args.json:
        print(json.dumps(found))
        return 0
    for name, (left, right) in found["settings"].items():
        print(f"{name}: {left} | {right}")
    if not found["settings"]:
        print("the settings are the same")
    width = max(len(str(a)), len(str(b)), 12)
    for title in ("loss", "figures"):
        print(f"\n{title:24s} {a!s:>{width}s} {b!s:>{width}s}")
        for key, (left, right) in found[title].items():
            print(f"{key!s:24s} {_number(left):>{width}s} {_number(right):>{width}s}")
    return 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def check(args: argparse.Namespace) -> int:
    """Runs the invariants of training; 0 if all held."""
    from transept.evaluation.invariants import CHECKS

    rows: list[dict[str, Any]] = []
    for name, trial in CHECKS.items():
        begin = time.perf_counter()
        try:
            tried, bad = trial(args.share, args.seed)
        except TranseptError as e:
            tried, bad = 1, [str(e)]
        seconds = round(time.perf_counter() - begin, 1)
        rows.append({"check": name, "tried": tried, "bad": len(bad), "first": bad[0] if bad else "", "seconds": seconds})
        if not args.json:
            print(f"{'ok  ' if not bad else 'FAIL'}  {name}: {tried:,} tried, {len(bad)} bad, {seconds} s{_first(bad)}", flush=True)
    if args.json:
        print(json.dumps(rows))
    return 0 if not any(row["bad"] for row in rows) else 1


def _first(bad: Sequence[str]) -> str:
    return f"; the first: {bad[0]}" if bad else ""
