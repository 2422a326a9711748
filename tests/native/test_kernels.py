"""The kernels of every instruction set against each other by a program of its own (compare.cpp): under the sanitisers, with AVX-512
emulated where the processor lacks it, and for ARM under an emulator where one is installed."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.counts import FULL
from transept.native.build import AVX2, COMMON, ISA, NEON, SANITIZE, compiler, link

HERE = Path(__file__).parent
MACHINE = platform.machine().lower()
EMULATED = [*AVX2, "-DTRANSEPT_EMULATED", "-Wno-psabi", "-include", str(HERE / "emulated.h")]
pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler is installed")
Units = Mapping[str | Path, Sequence[str]]


def compare(
    program: Path, units: Units, extra: Sequence[str], rounds: int, cxx: str | None = None, runner: Sequence[str] = ()
) -> list[str]:
    """The instruction sets that agree with each other after `rounds` rounds of random shapes."""
    link(program, units, extra, cxx, shared=False)
    done = subprocess.run([*runner, str(program), str(rounds)], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert all(int(numbers) > 10_000 for _, numbers, _ in found)
    return [name for name, _, _ in found]


def test_sanitised(tmp_path: Path) -> None:
    """A lean build, for every run of the tests: one unit for all but the kernels, no plain kernels, nothing optimised."""
    parts = [f"{name}.cpp" for name in COMMON if name != "kernels_plain"] + [str(HERE / "compare.cpp")]
    (tmp_path / "whole.cpp").write_text("".join(f'#include "{part}"\n' for part in parts))
    units: dict[str | Path, Sequence[str]] = {tmp_path / "whole.cpp": ["-DTRANSEPT_EMULATED"]}
    if MACHINE == "x86_64":
        units |= {"kernels_avx2": AVX2, "kernels_avx512": EMULATED}
    else:
        units |= ISA.get(MACHINE, {"kernels_plain": []})
    found = compare(tmp_path / "compare", units, [*SANITIZE, "-O0", "-g0"], 10)
    assert found == ["avx512", "avx2"] if MACHINE == "x86_64" else found


@pytest.mark.skipif(not FULL, reason="compiles the core for two more processors (minutes); runs with TRANSEPT_FULL=1")
def test_every_set_against_the_plain_kernels(tmp_path: Path) -> None:
    common: dict[str | Path, Sequence[str]] = {HERE / "compare.cpp": [], **{name: [] for name in COMMON}}
    if MACHINE == "x86_64":
        units = common | {"api": ["-DTRANSEPT_EMULATED"], "kernels_avx2": AVX2, "kernels_avx512": [*EMULATED, "-O2"]}
        assert compare(tmp_path / "x86", units, [], 3000) == ["avx512", "avx2", "plain"]
    cxx, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if cxx is None or emulator is None:
        pytest.skip("no compiler for ARM (aarch64-linux-gnu-g++) or no emulator of it (qemu-aarch64) is installed")
    assert compare(tmp_path / "arm", common | NEON, ["-static"], 300, cxx, [emulator]) == ["neon", "plain"]
