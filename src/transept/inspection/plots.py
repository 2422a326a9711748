"""Pictures of what was seen, as PNG or SVG; matplotlib comes with the extra [plot] and is loaded when one is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transept.core.errors import InputError
from transept.core.shapes import Float, Tensor
from transept.inspection.attention import Map
from transept.inspection.latency import Breakdown

INK, PAPER, SCALE = "#1b1f24", "#ffffff", "viridis"


def maps(path: str | Path, found: Sequence[Map], rows: Sequence[str], columns: Sequence[str], title: str = "") -> Path:
    """Attention maps side by side, queries down and keys across; tokens are written where there is room for them."""
    panels = [(f"layer {one.layer} head {one.head}", one.weights[0]) for one in found]
    return _grid(path, panels, rows, columns, title)


def matrix(path: str | Path, values: Float[Tensor, "n m"], rows: Sequence[str], columns: Sequence[str], title: str = "") -> Path:
    """One matrix, such as a rollout or the similarity of positions."""
    return _grid(path, [("", values)], rows, columns, title)


def table(path: str | Path, cells: Sequence[Sequence[str]], shade: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str],
          title: str = "") -> Path:  # fmt: skip
    """Words in cells shaded by numbers from 0 to 1, such as a logit lens: layers upwards, tokens across."""
    figure, (axes,) = _figure(path, 1, (1.5 + 0.85 * len(columns), 1.2 + 0.3 * len(rows)))
    axes.imshow(list(shade), cmap=SCALE, vmin=0, vmax=1, aspect="auto", origin="lower")
    for y, line in enumerate(cells):
        for x, word in enumerate(line):
            axes.text(x, y, shown(word), ha="center", va="center", fontsize=7, color=PAPER if shade[y][x] < 0.6 else INK, parse_math=False)
    _ticks(axes, rows, columns)
    return _saved(figure, path, title)


def bars(path: str | Path, found: Breakdown, title: str = "") -> Path:
    """The parts of a forward pass, each with its share."""
    figure, (axes,) = _figure(path, 1, (6.4, 0.6 + 0.36 * len(found.parts)))
    shares = found.shares()
    parts = [*shares][::-1]
    axes.barh(parts, [1000 * found.parts[part] for part in parts], color="#31688e")
    for y, part in enumerate(parts):
        axes.text(1000 * found.parts[part], y, f" {100 * shares[part]:.1f} %", va="center", fontsize=8, color=INK)
    axes.set_xlabel(f"milliseconds for {found.tokens} tokens, each operation timed on its own")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    return _saved(figure, path, title)


def shown(token: str) -> str:
    """A token as a label: spaces and line ends visible, not too long."""
    text = token.replace("\n", "\u21b5").replace("\t", "\u2192").replace(" ", "\u00b7")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:14]


def _grid(path: str | Path, panels: Sequence[tuple[str, Tensor]], rows: Sequence[str], columns: Sequence[str], title: str) -> Path:
    if not panels:
        raise InputError("there is nothing to draw")
    side = min(6.0, max(1.6, 0.24 * max(len(rows), len(columns)))) if len(panels) < 7 else 1.4
    across = min(len(panels), 3) if len(panels) < 7 else next((n for n in (8, 9, 12, 6, 7) if len(panels) % n == 0), 8)
    down = -(-len(panels) // across)
    figure, every = _figure(path, len(panels), (0.9 + across * (side + 0.3), 0.9 + down * (side + 0.45)), across)
    named = side > 0.18 * max(len(rows), len(columns))
    for i, (axes, (label, values)) in enumerate(zip(every, panels, strict=True)):
        picture = axes.imshow(values.detach().float().cpu().numpy(), cmap=SCALE, interpolation="nearest")
        axes.set_title(label, fontsize=8)
        if named:
            _ticks(axes, rows if i % across == 0 else [""] * len(rows), columns)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        if len(panels) == 1:
            figure.colorbar(picture, ax=axes, shrink=0.8)
    return _saved(figure, path, title)


def _figure(path: str | Path, count: int, size: tuple[float, float], across: int = 1) -> tuple[Any, list[Any]]:
    """A figure with `count` axes that belongs to no window. Errors: InputError without matplotlib, or for another kind of file."""
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise InputError(f"a picture is written as .png or .svg, found {str(path)!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'transept[plot]'") from None
    figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
    grid = figure.add_gridspec(-(-count // across), across)
    return figure, [figure.add_subplot(grid[i // across, i % across]) for i in range(count)]


def _ticks(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), [shown(c) for c in columns], rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(rows)), [shown(r) for r in rows], fontsize=7, parse_math=False)


def _saved(figure: Any, path: str | Path, title: str) -> Path:
    if title:
        figure.suptitle(shown_title(title), fontsize=10, parse_math=False)
    with warnings.catch_warnings():
        # A token may hold letters that the font lacks: a box stands for them.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path, dpi=110, bbox_inches="tight")
    return Path(path)


def shown_title(text: str) -> str:
    """A title in one line."""
    line = " ".join(text.split())
    return line if len(line) <= 90 else line[:87] + "..."
