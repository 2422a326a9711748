"""Compiles the native core: called by the package's build, or by hand as `python -m transept.native.build`; never by a user's request."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transept.core.errors import SourceError

CORE = Path(__file__).parent / "core"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
COMMON = ("api", "check", "pack", "plan", "team", "kernels_plain")
AVX2 = ["-O3", "-mavx2", "-mfma", "-mf16c"]
NEON = {"kernels_neon": ["-O3", "-march=armv8.2-a+dotprod"]}
ISA = {
    "x86_64": {"kernels_avx2": AVX2, "kernels_avx512": [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))]},
    "aarch64": NEON,
    "arm64": NEON,
}


def source_hash() -> str:
    """Twelve hex digits that change whenever a source of the core, or the way it is compiled, changes."""
    digest = hashlib.sha256(repr((FLAGS, COMMON, ISA)).encode())
    for path in sorted(CORE.iterdir()):
        if path.suffix in (".h", ".inl", ".cpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def library_name(sanitize: bool = False) -> str:
    """The file name of the shared library of these sources on this machine."""
    return f"transept_native-{platform.machine().lower()}-{source_hash()}{'-sanitize' if sanitize else ''}.so"


def cache_dir() -> Path:
    """Where a core built by hand is kept when the package's own folder cannot be written."""
    root = os.environ.get("TRANSEPT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "transept") / "native"


def compiler() -> str | None:
    """The C++ compiler to use: $CXX, else g++, clang++ or c++ on the path; None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"The native core did not compile: {' '.join(command[:1] + command[-3:])} said {done.stderr.strip()[-600:]!r}.")


def link(
    target: Path, units: Mapping[str | Path, Sequence[str]], extra: Sequence[str] = (), cxx: str | None = None, shared: bool = True
) -> None:
    """Compile each unit (a name in the core's folder, or a file) with its flags and link them into `target`, whole or not at all.

    Errors: SourceError where there is no compiler or it refuses the sources.
    """
    cxx = cxx or compiler()
    if cxx is None:
        raise SourceError("No C++ compiler was found: install g++ or clang++, or set CXX; without it the torch executor serves.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        sources = [CORE / f"{unit}.cpp" if isinstance(unit, str) else unit for unit in units]
        objects = [str(Path(folder) / f"{i}.o") for i in range(len(sources))]
        jobs = [
            pool.submit(_run, [cxx, *FLAGS, *flags, *extra, f"-I{CORE}", "-c", str(source), "-o", out])
            for source, flags, out in zip(sources, units.values(), objects, strict=True)
        ]
        for job in jobs:
            job.result()
        checked = any(flag.startswith("-fsanitize") for flag in extra)
        alone = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" and not checked else []
        made = Path(folder) / target.name
        _run([cxx, *(["-shared"] if shared else []), "-pthread", *alone, *extra, *objects, "-o", str(made)])
        part = target.with_suffix(f".{os.getpid()}.part")
        shutil.copy(made, part)
        os.replace(part, target)


def units() -> dict[str | Path, Sequence[str]]:
    """The core's sources on this machine, each with the flags of its own."""
    common: dict[str | Path, Sequence[str]] = {name: [] for name in COMMON}
    return common | ISA.get(platform.machine().lower(), {})


def build(out_dir: Path | str | None = None, sanitize: bool = False) -> Path:
    """Compile the core into `out_dir` (the package's own folder where none is given) and return the library's path.

    Errors: SourceError where there is no compiler or it refuses the sources.
    """
    out = Path(out_dir) if out_dir is not None else Path(__file__).parent
    target = out / library_name(sanitize)
    if target.exists():
        return target
    link(target, units(), SANITIZE if sanitize else [])
    for stale in out.glob(f"transept_native-*{'-sanitize' if sanitize else ''}.so"):
        if stale != target and stale.stem.endswith("-sanitize") == sanitize:
            stale.unlink(missing_ok=True)  # a library of older sources would never be opened again
    return target


def main() -> int:
    """Build from the command line: `python -m transept.native.build [--sanitize] [--out DIR]`; prints the library's path."""
    parser = argparse.ArgumentParser(prog="python -m transept.native.build", description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitisers")
    parser.add_argument("--out", type=Path, default=None, help="folder for the library (default: the package's own)")
    args = parser.parse_args()
    print(build(args.out, args.sanitize))
    return 0


if __name__ == "__main__":
    sys.exit(main())
