"""Feeds damaged files to one reader in a process of its own: limited memory, a watch on what the interpreter does, an outside opinion.

Run as `python -m tests.checkpoints.fuzz_child READER MUTANTS SEED FOLDER`; prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
import torch

from tests.checkpoints import mutants
from tests.checkpoints.pickles import PICKLES, bundle
from transept.checkpoints.gguf import open_gguf
from transept.checkpoints.safetensors import open_safetensors
from transept.checkpoints.torchbin import open_torchbin
from transept.core.errors import CheckpointError

WATCHED = ("exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename")
WATCHED += ("os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "shutil.", "subprocess.", "socket.", "ctypes.")
WATCHED += ("pickle.", "marshal.", "code.")
MARGIN = 64 << 20
ROOT = Path(__file__).parents[2]


@dataclass
class Watch:
    """What the interpreter did while `armed`."""

    armed: bool = False
    events: list[str] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event.startswith(WATCHED) or (event == "open" and (arguments[1] not in ("r", "rb") or arguments[2] & (os.O_WRONLY | os.O_RDWR))):
            self.events.append(f"{event} {arguments!r}"[:200])


@dataclass
class Outcome:
    """The figures of one run; every list should stay empty."""

    tried: int = 0
    refused: int = 0
    accepted: int = 0
    worst_ms: float = 0.0
    untyped: list[str] = field(default_factory=list)
    disputed: list[str] = field(default_factory=list)
    unhelpful: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, row-major."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def by_safetensors(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    with safetensors.safe_open(path, "pt") as file:
        return {key: (tuple(file.get_tensor(key).shape), bits(file.get_tensor(key))) for key in file.keys()}


def by_gguf(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        with np.errstate(all="ignore"):
            plain = tensor.tensor_type.name in ("F16", "BF16", "F64") or tensor.tensor_type.name[0] == "I"
            values = tensor.data if plain else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (tuple(reversed(tensor.shape.tolist())), values.tobytes())
    return found


def by_torch(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    found: dict[str, tuple[tuple[int, ...], bytes]] = {}

    def visit(prefix: str, table: dict[Any, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, torch.Tensor):
                found[f"{prefix}{key}"] = (tuple(value.shape), bits(value))
            elif isinstance(value, dict):
                visit(f"{prefix}{key}.", value)

    visit("", torch.load(path, map_location="cpu", weights_only=True))
    return found


READERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], Callable[[random.Random, list[bytes]], bytes]]] = {
    "safetensors": (open_safetensors, by_safetensors, mutants.safetensors_mutant),
    "gguf": (open_gguf, by_gguf, mutants.gguf_mutant),
    "bin": (open_torchbin, by_torch, mutants.bin_mutant),
}


def seeds_of(reader: str, folder: Path) -> list[bytes]:
    """The two small good files of a format."""
    return {"safetensors": mutants.safetensors_seeds, "gguf": lambda: mutants.gguf_seeds(folder), "bin": mutants.bin_seeds}[reader]()


class Trial:
    """One reader under watch."""

    def __init__(self, reader: str, folder: Path) -> None:
        self.reader, self.oracle, self.mutate = READERS[reader]
        self.path = folder / f"mutant.{reader}"
        self.watch = Watch()
        self.outcome = Outcome()
        sys.addaudithook(self.watch.hook)

    def load(self) -> dict[str, tuple[tuple[int, ...], bytes]]:
        file = self.reader(self.path)
        try:
            return {key: (file.info(key).shape, bits(file.read(key))) for key in file.keys()}
        finally:
            file.close()

    def limited(self, size: int) -> tuple[Any, BaseException | None, float]:
        """load() with address space for 2x file + 64 MiB more than now, as (result, error, milliseconds of processor time)."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MARGIN + 2 * size, resource.RLIM_INFINITY))
        begin = time.process_time()
        self.watch.armed = True
        try:
            found, error = self.load(), None
        except BaseException as caught:
            found, error = None, caught
        self.watch.armed = False
        spent = (time.process_time() - begin) * 1000
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return found, error, spent

    def feed(self, raw: bytes, label: str) -> bool:
        """Loads one file and books the outcome; whether it was accepted."""
        self.path.write_bytes(raw)
        found, error, spent = self.limited(len(raw))
        out = self.outcome
        out.tried += 1
        out.worst_ms = max(out.worst_ms, spent)
        if error is None:
            out.accepted += 1
            try:
                if self.oracle(self.path) != found:
                    out.disputed.append(f"{label}: read differently by the other package")
            except Exception as caught:
                out.disputed.append(f"{label}: refused by the other package: {caught!r}"[:300])
            return True
        if not isinstance(error, CheckpointError):
            out.untyped.append(f"{label}: {error!r}"[:300])
        elif "mutant." not in str(error) or "expected" not in str(error):
            out.unhelpful.append(f"{label}: {error}"[:300])
        out.refused += 1
        return False


def main(reader: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Truncations at every offset, then `count` mutants; for the reader "pickles", each hostile pickle once."""
    torch.set_num_threads(1)
    hostile = reader == "pickles"
    reader = "bin" if hostile else reader
    seeds = seeds_of(reader, folder)
    trial = Trial(reader, folder)
    for raw in seeds:
        # Once unwatched, so that torch and numpy have made what they make on first use.
        trial.path.write_bytes(raw)
        trial.load()
        trial.oracle(trial.path)
    for number, raw in enumerate(seeds):
        if not trial.feed(raw, f"seed {number}"):
            raise SystemExit(f"the good seed {number} was refused")
    cut_accepted = 0
    for name, body in PICKLES.items() if hostile else ():
        if trial.feed(bundle(b"\x80\x02" + body), name):
            trial.outcome.disputed.append(f"{name}: accepted")
    if hostile:
        return {**asdict(trial.outcome), "events": trial.watch.events}
    for number, raw in enumerate(seeds):
        for size in range(len(raw)):
            cut_accepted += trial.feed(raw[:size], f"seed {number} cut to {size}")
    cut = trial.outcome.tried - len(seeds)
    rng = random.Random(seed)
    for number in range(count):
        trial.feed(trial.mutate(rng, seeds), f"mutant {number}")
    trial.outcome.events = trial.watch.events
    return {**asdict(trial.outcome), "cut": cut, "cut_accepted": cut_accepted, "mutants": count}


def run_child(reader: str, count: int, folder: Path | str, seed: int = 0) -> tuple[dict[str, Any], float]:
    """main() in a process of its own, as (figures, seconds); AssertionError with its last words where that process dies."""
    command = [sys.executable, "-m", "tests.checkpoints.fuzz_child", reader, str(count), str(seed), str(folder)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"the reader's process ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - begin


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
