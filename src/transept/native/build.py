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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transept.core.errors import SourceError

CORE = Path(__file__).parent / "core"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
COMMON = ("api", "check", "pack", "plan", "team", "kernels_plain")
ISA = {
    "x86_64": {"kernels_avx2": ["-O3", "-mavx2", "-mfma", "-mf16c"]},
    "aarch64": {"kernels_neon": ["-O3", "-march=armv8.2-a+dotprod+fp16"]},
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


def build(out_dir: Path | str | None = None, sanitize: bool = False) -> Path:
    """Compile the core into `out_dir` (the package's own folder where none is given) and return the library's path.

    Errors: SourceError where there is no compiler or it refuses the sources.
    """
    out = Path(out_dir) if out_dir is not None else Path(__file__).parent
    target = out / library_name(sanitize)
    if target.exists():
        return target
    cxx = compiler()
    if cxx is None:
        raise SourceError("No C++ compiler was found: install g++ or clang++, or set CXX; without it the torch executor serves.")
    out.mkdir(parents=True, exist_ok=True)
    units = {name: [] for name in COMMON} | ISA.get(platform.machine().lower(), {})
    extra = SANITIZE if sanitize else []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = {name: str(Path(folder) / f"{name}.o") for name in units}
        jobs = [
            pool.submit(_run, [cxx, *FLAGS, *flags, *extra, "-c", str(CORE / f"{name}.cpp"), "-o", objects[name]])
            for name, flags in units.items()
        ]
        for job in jobs:
            job.result()
        made = Path(folder) / target.name
        _run(
            [
                cxx,
                "-shared",
                "-pthread",
                *([] if sanitize else ["-static-libstdc++", "-static-libgcc"]),
                *extra,
                *objects.values(),
                "-o",
                str(made),
            ]
        )
        part = target.with_suffix(f".{os.getpid()}.part")
        shutil.copy(made, part)
        os.replace(part, target)
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
