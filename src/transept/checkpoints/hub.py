"""Fetches a repository of the hub with `huggingface_hub` (extra [hub]): weights and their texts, never code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transept.core.errors import SourceError, nearest

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:/(?P<file>[A-Za-z0-9][\w.-]{0,200}\.gguf))?", re.ASCII)
_TEXT = re.compile(r"[\w.-]+\.(json|txt|model|jinja)|1_Pooling/config\.json", re.ASCII)
_WEIGHTS = (re.compile(r"(model|pytorch_model)[\w.-]*\.safetensors", re.ASCII), re.compile(r"pytorch_model[\w.-]*\.bin", re.ASCII))


@dataclass(frozen=True)
class Choice:
    """What to take from a repository, and the file that `load` opens ('' for the folder)."""

    files: tuple[str, ...]
    main: str


def looks_like_hub(name: str) -> bool:
    """Whether a name is `owner/model` or `owner/model/file.gguf`."""
    return _NAME.fullmatch(name) is not None


def choose(files: Iterable[str], wanted: str | None = None) -> Choice:
    """Which files of a repository to fetch: one GGUF by name, else safetensors with their texts, else .bin, else the only GGUF.

    Never a script, nor a path with folders other than the pooling configuration. Raises SourceError.
    """
    listed = sorted(files)
    gguf = [name for name in listed if re.fullmatch(r"[\w.-]+\.gguf", name, re.ASCII)]
    if wanted is not None:
        if wanted not in gguf:
            raise SourceError(f"the repository has no file {wanted}{nearest(wanted, gguf)}; it has {', '.join(gguf) or 'no GGUF file'}")
        return Choice((wanted,), wanted)
    for pattern in _WEIGHTS:
        weights = tuple(name for name in listed if pattern.fullmatch(name))
        if weights:
            return Choice(weights + tuple(name for name in listed if _TEXT.fullmatch(name)), "")
    if len(gguf) == 1:
        return Choice((gguf[0],), gguf[0])
    if gguf:
        raise SourceError(f"the repository has {len(gguf)} GGUF files, name one as owner/model/file: {', '.join(gguf)}")
    raise SourceError("the repository has no safetensors, .bin or GGUF weights")


def locate(name: str) -> Path | None:
    """Where the hub's own cache holds a name; None where it does not, or where the extra is not installed."""
    try:
        return _take(name, local=True, force=False)
    except SourceError:
        return None


def pull(name: str, *, force: bool = False) -> Path:
    """Fetch `owner/model` or `owner/model/file.gguf` into the hub's own cache and return the path to load. Raises SourceError."""
    return _take(name, local=False, force=force)


def _take(name: str, *, local: bool, force: bool) -> Path:
    match = _NAME.fullmatch(name)
    if match is None:
        raise SourceError(f"{name!r} is no hub id; one looks like owner/model or owner/model/file.gguf")
    repo, wanted = match["repo"], match["file"]
    try:
        import huggingface_hub as client
    except ImportError as err:
        raise SourceError(f"{repo} looks like a hub id, and fetching one needs the extra: pip install 'transept[hub]'") from err
    try:
        if local:
            folder = Path(client.snapshot_download(repo, local_files_only=True))
            listed = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            return folder / choose(listed, wanted).main
        siblings = client.HfApi().model_info(repo, timeout=20).siblings or []
        picked = choose((sibling.rfilename for sibling in siblings), wanted)
        return Path(client.snapshot_download(repo, allow_patterns=list(picked.files), force_download=force)) / picked.main
    except SourceError:
        raise
    except Exception as err:  # the client lets errors of its transport through, and changes that transport between versions
        said = str(err).strip().splitlines() or [type(err).__name__]
        raise SourceError(f"{repo} could not be fetched from the hub: {said[0]}") from err
