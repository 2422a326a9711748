"""How the states of a text become one vector, as the folders of sentence encoders declare it (row 61)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from transept.checkpoints.atomic import atomic
from transept.core.errors import ConfigError, nearest
from transept.core.shapes import Bool, Float, Tensor

_LARGEST = 1 << 20
_PREFIX = "sentence_transformers.models."


class Summary(Enum):
    """Which states make the vector; the value is the word in published files."""

    MEAN = "pooling_mode_mean_tokens"
    FIRST = "pooling_mode_cls_token"
    MAX = "pooling_mode_max_tokens"
    LAST = "pooling_mode_lasttoken"


@dataclass(frozen=True)
class Pooling:
    """One vector for each row of states; `normalised` to length one; `limit` is the longest text in tokens it was trained for."""

    summary: Summary = Summary.MEAN
    normalised: bool = False
    limit: int | None = None

    def __call__(self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b d"]:
        """The vectors; padding takes no part."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        match self.summary:
            case Summary.MEAN:
                y = x.mean(1) if mask is None else (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            case Summary.FIRST:
                y = x[:, 0]
            case Summary.MAX:
                y = x.masked_fill(~real[..., None], float("-inf")).amax(1)
            case Summary.LAST:
                columns = torch.arange(x.shape[1], device=x.device) * real
                y = x[torch.arange(len(x), device=x.device), columns.amax(1)]
        return F.normalize(y, dim=-1) if self.normalised else y

    @staticmethod
    def of(folder: Path) -> Pooling | None:
        """What a folder declares in modules.json; None where it declares nothing. A part that is not known is refused."""
        if not (folder / "modules.json").is_file():
            return None
        parts = {str(part.get("type")).rpartition(".")[2]: folder / str(part.get("path")) for part in _read(folder / "modules.json", list)}
        unknown = sorted(set(parts) - {"Transformer", "Pooling", "Normalize"})
        if unknown or "Pooling" not in parts or folder.resolve() not in parts["Pooling"].resolve().parents:
            found = (
                f"the part {unknown[0]!r}{nearest(unknown[0], ('Pooling', 'Normalize'))}"
                if unknown
                else "no part Pooling inside the folder"
            )
            raise ConfigError(f"{folder / 'modules.json'} names {found}; Transformer, Pooling and Normalize were expected")
        chosen = _read(parts["Pooling"] / "config.json", dict)
        known = {summary.value: summary for summary in Summary}
        on = [name for name, value in chosen.items() if name.startswith("pooling_mode") and value]
        if len(on) != 1 or on[0] not in known:
            raise ConfigError(f"{parts['Pooling'] / 'config.json'} pools by {on or 'nothing'}; one of {', '.join(known)} was expected")
        beside = folder / "sentence_bert_config.json"
        longest = _read(beside, dict).get("max_seq_length") if beside.is_file() else None
        return Pooling(known[on[0]], "Normalize" in parts, longest)

    def write(self, folder: Path, dim: int) -> None:
        """The files that `of`, and the library that published them first, read."""
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if self.normalised else [])]
        modules = [{"idx": i, "name": str(i), "path": path, "type": f"{_PREFIX}{kind}"} for i, (path, kind) in enumerate(kinds)]
        (folder / "1_Pooling").mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": dim, **{summary.value: summary is self.summary for summary in Summary}}
        files = {
            "modules.json": modules,
            "1_Pooling/config.json": pooling,
            "sentence_bert_config.json": {"max_seq_length": self.limit, "do_lower_case": False},
        }
        for name, content in files.items():
            with atomic(folder / name) as out:
                out.write((json.dumps(content, indent=2) + "\n").encode())


def _read(path: Path, kind: type) -> Any:
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise ConfigError(f"{path} is not there, or longer than {_LARGEST} bytes")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON ({e})") from e
    if not isinstance(found, kind) or (kind is list and not all(isinstance(part, dict) for part in found)):
        raise ConfigError(f"{path} holds a {type(found).__name__}; a {kind.__name__} was expected")
    return found
