"""The commands that print tables: pull, list, card, verify, diff; each also as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def pull(args: argparse.Namespace) -> int:
    """Fetches a model and prints where it lies."""
    from transept.checkpoints.pull import pull as fetch
    from transept.cli.progress import loading

    with loading(args.name, "bytes") as progress:
        path = fetch(args.name, force=args.force, progress=progress)
    print(json.dumps({"name": args.name, "path": str(path)}) if args.json else f"{args.name} is at {path}")
    return 0


def list(args: argparse.Namespace) -> int:
    """What can be pulled, what is here, and the families."""
    from transept.checkpoints.pull import catalogue, locate
    from transept.core.registry import all_families

    families = [{"family": f.name, "sizes": [*f.sizes], "forms": [p.architecture for p in f.published]} for f in all_families()]
    pages = {f["family"] for f in families}
    models = [
        {
            "name": e.name,
            "architecture": e.architecture,
            "bytes": e.size,
            "licence": e.licence,
            "path": _text(locate(e.name)),
            "loads": e.architecture in pages,
        }
        for e in catalogue()
    ]
    if args.json:
        print(json.dumps({"models": models, "families": families}))
        return 0
    rows = [
        (
            m["name"],
            m["architecture"] if m["loads"] else f"{m['architecture']} (no page yet)",
            _bytes(m["bytes"]),
            m["licence"],
            _yes(m["path"]),
        )
        for m in models
    ]
    table(("model", "family", "size", "licence", "here"), rows)
    print()
    table(("family", "published sizes"), [(f["family"], ", ".join(f["sizes"])) for f in families])
    return 0


def card(args: argparse.Namespace) -> int:
    """The costs of a model, from its configuration alone."""
    from transept.checkpoints.load import describe
    from transept.core.registry import size, sizes
    from transept.inspection.card import card as count

    if not Path(args.model).exists() and (args.model in sizes() or any(label.startswith(f"{args.model}-") for label in sizes())):
        family, spec = size(args.model)
        import torch

        with torch.device("meta"):
            model = family.build(spec)
    else:
        source = describe(args.model)
        family, spec, model = source.family, source.spec, source.empty()
    c = count(model, spec, family.name)
    length = args.length or min(c.context or 512, 4096)
    record = {
        **asdict(c),
        "length": length,
        "flops": c.flops(length),
        "cache_bytes_per_token_2": sum(c.cache) * 2,
        "cache_bytes_2": c.cache_bytes(length),
    }
    if args.json:
        print(json.dumps({**record, "spec": spec.json()}))
        return 0
    rows = [("family", c.family), ("parameters", f"{c.parameters:,}")]
    if c.active != c.parameters:
        rows.append(("active per token", f"{c.active:,}"))
    rows += [(f"  {name}", f"{n:,} ({100 * n / c.parameters:.1f} %)") for name, n in c.groups.items()]
    rows += [
        ("weights", f"{_bytes(4 * c.parameters)} in float32, {_bytes(2 * c.parameters)} in bfloat16"),
        (f"FLOPs of {length} tokens", f"{c.flops(length):.4g} = 2 ({length} x {c.linear:,} + {length}^2 x {c.attention:,})"),
        ("cache per token", f"{sum(c.cache) * 2:,} bytes in 2-byte numbers"),
        (f"cache of {length} tokens", _bytes(c.cache_bytes(length))),
        ("context", f"{c.context:,} tokens" if c.context else "no limit"),
    ]
    table(("", ""), rows)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compares with the publisher's own implementation; exit 0 only if every row holds."""
    from transept.evaluation.verify import verify as check

    rows = check(args.model)
    if args.json:
        print(json.dumps({"model": args.model, "ok": all(r.ok for r in rows), "rows": [asdict(r) for r in rows]}))
    else:
        table(("check", "found", "expected", ""), [(r.what, r.found, r.expected, "ok" if r.ok else "DIFFERS") for r in rows])
    return 0 if all(r.ok for r in rows) else 1


def diff(args: argparse.Namespace) -> int:
    """The real differences of two families, and nothing else."""
    from transept.core.registry import size
    from transept.inspection.diff import diff as compare

    lines = compare(size(args.a), size(args.b))
    if args.json:
        print(json.dumps({"a": args.a, "b": args.b, "differences": [asdict(line) for line in lines]}))
    else:
        table(("", args.a, args.b), [(d.where, d.left, d.right) for d in lines])
    return 0


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell; plain text, so that it pipes."""
    cells = [[str(c) for c in row] for row in ([header] if any(header) else []) + [*rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def _bytes(n: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _text(path: object) -> str | None:
    return None if path is None else str(path)
