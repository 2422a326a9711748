"""Two runs side by side: what differs in what defined them, and how they went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transept.core.errors import SourceError
from transept.training.log import NAME, read
from transept.training.run import dotted

Pair = tuple[Any, Any]


def compared(a: Path, b: Path, points: int = 12) -> dict[str, dict[str, Pair]]:
    """"settings" that differ, the training "loss" at up to `points` steps that both reached, and the last held-out "figures"; each
    name -> (a's, b's). Errors: SourceError for a folder that holds no run.
    """
    one, two = (dotted(_about(folder)) for folder in (a, b))
    names = [*one, *(name for name in two if name not in one)]
    settings = {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}
    logs = [read(folder / NAME) for folder in (a, b)]
    losses = [{line["step"]: line["loss"] for line in log if isinstance(line.get("loss"), float)} for log in logs]
    common = sorted(set(losses[0]) & set(losses[1]))
    chosen = common[:: max(1, len(common) // points)] if common else []
    looks = [_figures(log) for log in logs]
    keys = [*looks[0], *(key for key in looks[1] if key not in looks[0])]
    return {
        "settings": settings,
        "loss": {f"step {step}": (losses[0][step], losses[1][step]) for step in chosen},
        "figures": {key: (looks[0].get(key), looks[1].get(key)) for key in keys},
    }


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file() or not (folder / NAME).is_file():
        raise SourceError(f"{folder} holds no run: {path.name} or {NAME} is missing")
    found = json.loads(path.read_text(encoding="utf-8"))
    return {key: found.get(key) for key in ("recipe", "arguments", "settings", "samples", "parameters")}


def _figures(log: list[dict[str, Any]]) -> dict[str, float]:
    last: dict[str, float] = {}
    for line in log:
        if "loss" not in line and "event" not in line:
            last.update({key: value for key, value in line.items() if key != "step" and isinstance(value, float)})
    return last
