"""Finds and opens the compiled core; never compiles it."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

from transept.core.errors import SourceError
from transept.native.build import cache_dir, library_name

ABI = 2


def _places() -> list[Path]:
    override = os.environ.get("TRANSEPT_NATIVE_LIBRARY")
    return [Path(override)] if override else [Path(__file__).parent / library_name(), cache_dir() / library_name()]


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("TRANSEPT_NATIVE") == "0":
        return None, "TRANSEPT_NATIVE=0 turns the native core off"
    path = next((p for p in _places() if p.is_file()), None)
    if path is None:
        return None, f"no native core was compiled for this {platform.machine()} machine (python -m transept.native.build compiles it)"
    try:
        core = ctypes.CDLL(str(path))
        if core.transept_abi() != ABI:
            return None, f"the native core {path.name} speaks interface {core.transept_abi()}, expected {ABI}"
    except (OSError, AttributeError) as error:
        return None, f"the native core {path.name} could not be opened ({error})"
    _declare(core)
    return core, ""


def _declare(core: ctypes.CDLL) -> None:
    pointer, i32, i64, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
    signatures = {
        "transept_error": (text, []),
        "transept_isa": (text, [text]),
        "transept_raw_bytes": (i64, [i32, i64, i64]),
        "transept_panel_bytes": (i64, [i32, i64]),
        "transept_pack": (i32, [i32, i64, i64, pointer, i64, pointer, i64, i64]),
        "transept_cache_page_bytes": (i64, [pointer]),
        "transept_team_new": (pointer, [i32]),
        "transept_team_free": (None, [pointer]),
        "transept_plan_new": (pointer, [pointer, i32, pointer, pointer, i32, pointer, pointer, i32, pointer, i32, i32, pointer, text]),
        "transept_plan_free": (None, [pointer]),
        "transept_step": (i32, [pointer, pointer, pointer]),
        "transept_buffer": (pointer, [pointer, i32, pointer]),
        "transept_exp_sum": (ctypes.c_double, [pointer, i32, ctypes.c_float]),
        "transept_read": (ctypes.c_uint64, [pointer, pointer, i64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(core, name)
        function.restype, function.argtypes = result, arguments


def available() -> bool:
    """Whether the native core can run here."""
    return _open()[0] is not None


def why_not() -> str:
    """Why the native core cannot run here; empty where it can."""
    return _open()[1]


def library() -> ctypes.CDLL:
    """The opened core.

    Errors: SourceError saying why there is none.
    """
    core, reason = _open()
    if core is None:
        raise SourceError(f"The native core is not there: {reason}.")
    return core


def isa(wanted: str = "") -> str:
    """The instruction set that steps will use: avx512, avx2, neon or plain; empty where `wanted` does not run here.

    Without `wanted` it is the best that runs here, or what $TRANSEPT_ISA names.
    """
    return library().transept_isa(wanted.encode()).decode()
