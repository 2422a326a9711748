"""The state of a run on disk: whole or not at all, and proved before it is used.

A checkpoint is a folder of safetensors files, a JSON file, and a manifest with the sha256 of each. It is written under a hidden name,
every file fsynced, and renamed when all of it is on the disk. Which one is the latest is found by verifying, never by name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transept.checkpoints.atomic import sync_folder
from transept.checkpoints.safetensors import open_safetensors, pieces
from transept.core.errors import CheckpointError
from transept.core.shapes import Tensor

MANIFEST = "manifest.json"
FACTS = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_LARGEST_TEXT = 64 << 20


@dataclass
class State:
    """Everything a run goes on from: numbers as JSON, tensors by group ("model", "optim", "mean", "random")."""

    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def step(self) -> int:
        """Updates that were made."""
        return int(self.facts["step"])


class Disk:
    """The file operations that a save consists of, each a method: tests put one in its place that records them, or fails."""

    def mkdir(self, path: Path) -> None:
        """Makes a folder that must not be there yet."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Opens a new file for writing; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, handle: int, data: memoryview) -> int:
        """Writes some of `data`; returns how many bytes went."""
        return os.write(handle, data)

    def sync(self, handle: int) -> None:
        """The file's bytes are on the disk when this returns."""
        os.fsync(handle)

    def sync_folder(self, path: Path) -> None:
        """The folder's names are on the disk when this returns."""
        sync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a folder its name in one step."""
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        """Removes a folder and what is in it."""
        shutil.rmtree(path)

    def put(self, path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """A new file with these bytes, on the disk when this returns; its size and sha256."""
        handle, digest, size = self.create(path), hashlib.sha256(), 0
        try:
            for part in parts:
                view = memoryview(part)
                digest.update(view)
                size += len(view)
                while len(view):
                    view = view[self.write(handle, view[: 64 << 20]) :]
            self.sync(handle)
        finally:
            os.close(handle)
        return {"size": size, "sha256": digest.hexdigest()}


def save(folder: Path, state: State, disk: Disk | None = None) -> Path:
    """Writes one checkpoint below `folder` and returns its path. Errors: OSError where the disk is full or fails; what was there stays."""
    disk = disk or Disk()
    folder.mkdir(parents=True, exist_ok=True)
    need = sum(t.numel() * t.element_size() for group in state.tensors.values() for t in group.values()) + (1 << 20)
    if shutil.disk_usage(folder).free < need:
        raise OSError(errno.ENOSPC, f"a checkpoint needs {need >> 20} MiB", str(folder))
    final = folder / f"step-{state.step:08d}"
    part = folder / f".{final.name}.{os.getpid()}.part"
    if part.exists():
        disk.remove(part)
    if final.exists():
        try:
            # The same step of the same run holds the same bits: a sound one stays, so that there is no moment without it.
            verify(final)
            return final
        except CheckpointError:
            disk.remove(final)
    disk.mkdir(part)
    try:
        files = {f"{group}.safetensors": disk.put(part / f"{group}.safetensors", pieces(part / group, tensors))
                 for group, tensors in state.tensors.items()}  # fmt: skip
        files[FACTS] = disk.put(part / FACTS, [_text(state.facts)])
        body = _text({"step": state.step, "files": files})
        disk.put(part / MANIFEST, [hashlib.sha256(body).hexdigest().encode() + b"\n" + body])
        disk.sync_folder(part)
        disk.rename(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    disk.sync_folder(folder)
    return final


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=True).encode()


def manifest(path: Path) -> dict[str, Any]:
    """The proved manifest of a checkpoint. Errors: CheckpointError for one that is missing, or differs from its own sha256."""
    head, _, body = _bytes(path / MANIFEST).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != head:
        raise CheckpointError(f"{path / MANIFEST} does not have the sha256 that its first line states")
    return json.loads(body)


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _LARGEST_TEXT:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {_LARGEST_TEXT}")
        return path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file has the size and sha256 it states. Errors: CheckpointError."""
    found = manifest(path)
    for name, stated in found["files"].items():
        if Path(name).name != name:
            raise CheckpointError(f"{path / MANIFEST} names the file {name!r}, expected a name without a folder")
        try:
            size = (path / name).stat().st_size
            if size != stated["size"]:
                raise CheckpointError(f"{path / name} has {size} bytes, its manifest states {stated['size']}")
            with open(path / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise CheckpointError(f"{path / name} cannot be read: {e.strerror}") from e
        if digest != stated["sha256"]:
            raise CheckpointError(f"{path / name} differs from the sha256 in its manifest: at least one byte has changed")
    return found


def load(path: Path) -> State:
    """A checkpoint, proved and read. Errors: CheckpointError for any byte that differs from what was written."""
    found = verify(path)
    facts = json.loads(_bytes(path / FACTS))
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in found["files"]:
        if name != FACTS:
            file = open_safetensors(path / name)
            tensors[name.removesuffix(".safetensors")] = {key: file.read(key) for key in file.keys()}
            file.close()
    return State(facts, tensors)


def listed(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder whose manifest is sound, newest first by the step that it states."""
    found: list[tuple[int, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.fullmatch(path.name) and path.is_dir():
            try:
                found.append((int(manifest(path)["step"]), path))
            except CheckpointError:
                continue
    return sorted(found, reverse=True)


def latest(folder: Path) -> tuple[State | None, list[str]]:
    """The newest checkpoint that is whole, and one sentence for each newer one that is not."""
    refused: list[str] = []
    if folder.is_dir():
        sound = {path for _, path in listed(folder)}
        for path in sorted(folder.iterdir()):
            if _NAME.fullmatch(path.name) and path not in sound:
                refused.append(f"{path / MANIFEST} is missing or damaged")
    for _, path in listed(folder):
        try:
            return load(path), refused
        except CheckpointError as e:
            refused.append(str(e))
    return None, refused


def prune(folder: Path, keep: int, best: int | None, disk: Disk | None = None) -> None:
    """Removes all but the `keep` newest checkpoints and the best, and what dead writers left; always after a newer one is on the disk."""
    disk = disk or Disk()
    sound = listed(folder)
    for path in folder.glob(".step-*.part"):
        disk.remove(path)
    for step, path in sound[max(keep, 1) :]:
        if step != best:
            # Hidden first: half a folder must not look like a checkpoint.
            gone = path.with_name(f".{path.name}.old.part")
            disk.rename(path, gone)
            disk.remove(gone)


def flatten(states: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[Any]]:
    """The state dicts of optimisers as (tensors by name, the rest as JSON)."""
    tensors: dict[str, Tensor] = {}
    rest: list[Any] = []
    for i, state in enumerate(states):
        plain: dict[str, Any] = {}
        for key, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{i}.{key}.{name}"] = value
                else:
                    plain.setdefault(str(key), {})[name] = value
        rest.append({"groups": state["param_groups"], "plain": plain})
    return tensors, rest


def unflatten(tensors: Mapping[str, Tensor], rest: list[Any]) -> list[dict[str, Any]]:
    """What `flatten` took apart."""
    states = [{"state": {int(k): dict(v) for k, v in one["plain"].items()}, "param_groups": one["groups"]} for one in rest]
    for key, value in tensors.items():
        i, place, name = key.split(".", 2)
        states[int(i)]["state"].setdefault(int(place), {})[name] = value.clone()
    return states
