"""Where a model lies: a path, a bundled name or a hub id, and which files it is made of. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transept.checkpoints import pull
from transept.core.errors import SourceError, nearest

Progress = Callable[[int, int], None]
_PARTS = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")


def find(source: str | Path, progress: Progress | None = None) -> Path:
    """The folder or GGUF file that `source` names: a path that exists, else a bundled name or hub id, fetched if need be."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        path = path.parent
    if not path.exists():
        if str(source).startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors", ".bin"):
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise SourceError(f"there is no file or folder {path}{nearest(path.name, there)}")
        path = pull.locate(str(source)) or pull.pull(str(source), progress=progress)
    return _only_gguf(path) if path.is_dir() and not (path / "config.json").exists() else path


def parts(path: Path) -> list[Path]:
    """The files that say what the model at a path is, in the order of their names: the GGUF file, or all of a folder's that may matter."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.iterdir() if p.is_file() and p.suffix in _PARTS and not p.name.startswith("."))


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        what = f"{len(found)} .gguf files" if found else "neither config.json nor a .gguf file"
        raise SourceError(f"{folder} holds {what}; name a folder with config.json, or one .gguf file")
    return found[0]
