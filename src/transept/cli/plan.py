"""`transept plan`, `transept compile` and `transept doctor`: what runs in the native core, how it is kept, and what this machine lacks."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transept.cli.tables import _bytes, table

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "asimdhp", "i8mm")
_OPTIONAL = (
    ("torch", "only decoders with a plan file answer; nothing can be trained, opened or compiled"),
    ("tokenizers", "text cannot be turned into tokens"),
    ("llguidance", "answers cannot be held to a grammar"),
    ("huggingface_hub", "models cannot be fetched from the hub by owner/name"),
    ("matplotlib", "no curves are drawn"),
)


def options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands of this file."""
    sub = command("plan", "The records that a model becomes in the native core: op, shape, bytes, FLOPs, share of time.", table=True)
    sub.add_argument("model", help="a folder, GGUF file, bundled name or hub id")
    sub.add_argument("--fast", action="store_true", help="multiply quantised weights with activations rounded to 8 bits")
    sub.add_argument("--length", type=int, default=None, metavar="L", help="tokens before the one that is timed (default 128)")
    sub.add_argument("--all", action="store_true", help="each record, not one line for all layers")
    sub = command("compile", "Keep the lowered plan of a decoder in a file, so that it answers at once and without torch.", table=True)
    sub.add_argument("model", help="a folder, GGUF file, bundled name or hub id")
    sub.add_argument("--fast", action="store_true", help="the plan for activations rounded to 8 bits")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE", help="another place than beside the model")
    command("doctor", "What this machine has and lacks, and what is lost without it.", table=True)


def plan(args: argparse.Namespace) -> int:
    """Prints a model's plan; exit 1 where it has none."""
    from transept import native
    from transept.core.errors import ConfigError, InputError, SourceError
    from transept.door import load
    from transept.inference.plan.steps import Loop, cores
    from transept.inference.plan.table import bandwidth, estimated, grouped, lines, measured

    if not native.available():
        raise SourceError(f"a plan is packed by the native core, which is not there: {native.why_not()}")
    m = load(args.model, fast=args.fast)
    most = (m.context or 1 << 15) - 1
    length = min(128, most) if args.length is None else args.length
    if not 1 <= length <= most:
        raise InputError(f"--length should be between 1 and {most}, which is what the model's context leaves, found {length}")
    lowered = m.lowered()
    if lowered is None:
        raise ConfigError(f"{args.model} runs in torch: {m.why_not()}")
    steps = lowered.runner if isinstance(lowered, Loop) else lowered
    found, rate = lines(steps.program, length), bandwidth(cores())
    if isinstance(lowered, Loop):
        (found, seconds), how = measured(lowered.runner, found, length), "measured"
    else:
        found, seconds, how = estimated(found, rate), None, "estimated from bytes and FLOPs"
    nbytes, flops = sum(line.nbytes for line in found), sum(line.flops for line in found)
    shown = found if args.all else grouped(found)
    record = {
        "model": args.model, "length": length, "share": how, "bytes": nbytes, "flops": flops, "bandwidth": rate, "seconds": seconds,
        "floor_seconds": nbytes / rate, "threads": cores(), "isa": native.isa(), "records": [asdict(line) for line in shown],
    }  # fmt: skip
    if args.json:
        print(json.dumps(record))
        return 0
    rows = [
        (line.op, f"{line.count}x" if line.count > 1 else "", line.label, line.shape, _bytes(line.nbytes), f"{line.flops:,}",
         f"{100 * line.share:.1f} %") for line in shown
    ]  # fmt: skip
    table(("op", "", "of", "shape", "bytes", "FLOPs", "time"), rows)
    print(f"one token after {length}: {len(found)} records, {_bytes(nbytes)}, {flops:,} FLOPs; time {how}")
    if seconds is not None:
        print(f"{1000 * seconds:.2f} ms on {cores()} threads ({native.isa()}); its bytes alone take {1000 * nbytes / rate:.2f} ms "
              f"at the {rate / 1e9:.1f} GB/s measured here: {100 * nbytes / rate / seconds:.0f} % of that floor")  # fmt: skip
    return 0


def keep(args: argparse.Namespace) -> int:
    """Writes the plan file and says where it lies."""
    from transept.cli.progress import loading
    from transept.compiled import compile_model

    with loading(args.model) as progress:
        path = compile_model(args.model, fast=args.fast, out=args.out, progress=progress)
    size = path.stat().st_size
    if args.json:
        print(json.dumps({"model": args.model, "path": str(path), "bytes": size}))
    else:
        print(f"{path} ({_bytes(size)})")
    return 0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked for, what was found, and what is lost (empty where nothing is)."""

    what: str
    found: str
    lost: str = ""


def doctor(args: argparse.Namespace) -> int:
    """What this machine has; exit 0 whatever is missing, since everything but the speed still works."""
    findings = [*_processor(), *_core(), *_packages()]
    if args.json:
        print(json.dumps([asdict(f) for f in findings]))
    else:
        table(("", "found", "lost without it"), [(f.what, f.found, f.lost or "-") for f in findings])
    return 0


def _processor() -> list[Finding]:
    from transept.inference.plan.steps import cores
    from transept.inference.plan.table import bandwidth

    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _flags()
    quick = {"avx2", "fma"} <= set(flags) or "asimd" in flags
    slow = "" if quick or not flags else "neither AVX2 nor NEON: the native core runs its plain, slow kernels"
    late = f"more threads than cores: each step waits for the last one (TRANSEPT_THREADS is best {there} here)"
    busy = late if cores() > there else ""
    return [
        Finding("processor", f"{platform.machine()}, {' '.join(flags) or 'features unknown'}", slow),
        Finding("threads", f"{cores()} on {there} cores", busy),
        Finding("memory", f"read at {bandwidth(min(cores(), there)) / 1e9:.1f} GB/s"),
    ]


def _flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return [flag for flag in _FLAGS if flag in line.split()]


def _core() -> list[Finding]:
    from transept import native
    from transept.native.build import compiler

    cxx, there = compiler(), native.available()
    without = "" if cxx or there else "the native core cannot be compiled here"
    if there:
        return [Finding("compiler", cxx or "none", without), Finding("native core", f"runs with {native.isa()}")]
    lost = "models run in torch, several times slower, and no plan file can be used"
    return [Finding("compiler", cxx or "none", without), Finding("native core", native.why_not(), lost)]


def _packages() -> list[Finding]:
    found: list[Finding] = []
    for name, lost in _OPTIONAL:
        if importlib.util.find_spec(name) is None:
            found.append(Finding(name, "not installed", lost))
        else:
            found.append(Finding(name, _version(name)))
    if shutil.which("nvidia-smi") is None:
        found.append(Finding("GPU", "none seen", "models run on the processor"))
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


COMMANDS: dict[str, Callable[[Any], int]] = {"plan": plan, "compile": keep, "doctor": doctor}
