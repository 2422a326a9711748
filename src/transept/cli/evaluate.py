"""`transept eval`: how good a model is at a task, on files that you have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transept.core.errors import InputError, nearest


def options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The command's options."""
    sub = command("eval", "How good a model is at a task, on files that you have.", table=True)
    sub.add_argument("task", choices=("perplexity", "glue", "squad", "bleu", "kshot"))
    sub.add_argument("model", nargs="+", help="a folder, GGUF file, bundled name or hub id; for glue TASK=MODEL, as many as you have")
    sub.add_argument(
        "--data", nargs="+", required=True, metavar="PATH",
        help="perplexity: a text; glue: its folder; squad: its JSON; bleu: sources and references; kshot: examples and questions (tsv)",
    )  # fmt: skip
    sub.add_argument("--limit", type=int, default=None, metavar="N", help="the first N rows only (perplexity: characters)")
    sub.add_argument("--shots", type=int, default=4, metavar="K", help="examples in each prompt of kshot (default 4)")
    sub.add_argument("--words", nargs="+", default=["0=negative", "1=positive"], metavar="CLASS=WORD", help="how kshot says the classes")
    sub.add_argument("--beams", type=int, default=None, metavar="K", help="beams of bleu (default: the checkpoint's own)")
    sub.add_argument("--seed", type=int, default=0)


def evaluate(args: argparse.Namespace) -> int:
    """Runs one task and prints its figures."""
    rows = {"perplexity": _perplexity, "glue": _glue, "squad": _squad, "bleu": _bleu, "kshot": _kshot}[args.task](args)
    if args.json:
        print(json.dumps({"task": args.task, "model": args.model, **rows}))
        return 0
    from transept.cli.tables import table

    if args.task == "glue":
        from transept.evaluation.glue import COLUMNS

        names = [*COLUMNS, "average"]
        table(("", *names), [(who, *(f"{line[n]:.1f}" if n in line else "-" for n in names)) for who, line in rows.items()])
    else:
        table(("", ""), [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in rows.items()])
    return 0


def _opened(source: str) -> Any:
    import transept

    return transept.load(source)


def _load(args: argparse.Namespace) -> Any:
    if len(args.model) != 1:
        raise InputError(f"{args.task} judges one model, found {len(args.model)}")
    return _opened(args.model[0])


def _perplexity(args: argparse.Namespace) -> dict[str, Any]:
    from transept.cli.progress import loading
    from transept.evaluation.perplexity import evaluate as measure

    text = "".join(_text(path) for path in args.data)[: args.limit]
    with loading("windows", "windows") as progress:
        found = measure(_load(args), text, progress=progress)
    return {"perplexity": found.perplexity, "bits per byte": found.bits_per_byte, "tokens": found.tokens, "bytes": found.bytes}


def _glue(args: argparse.Namespace) -> dict[str, Any]:
    from transept.evaluation import glue

    mine: dict[str, float] = {}
    for given in args.model:
        name, equals, source = given.partition("=")
        if not equals:
            raise InputError(f"for glue a model is given as TASK=MODEL, found {given!r}; the tasks are {', '.join(glue.TASKS)}")
        glue.task(name)
        for column, figures in glue.evaluate(_opened(source), args.data[0], name, args.limit).items():
            mine[column] = next(iter(figures.values()))
    table: dict[str, dict[str, float]] = {"yours (dev)": mine}
    table |= {f"{who} (test)": {str(c): x for c, x in zip(glue.COLUMNS, line, strict=True)} for who, line in glue.PRINTED.items()}
    return {who: {**line, **({} if (mean := glue.average(line)) is None else {"average": mean})} for who, line in table.items()}


def _squad(args: argparse.Namespace) -> dict[str, Any]:
    from transept.cli.progress import loading
    from transept.evaluation import squad

    questions = [q for path in args.data for q in squad.read(path)][: args.limit]
    with loading("questions", "questions") as progress:
        found = squad.evaluate(_load(args), questions, progress)
    beside = {who: f"{em} / {f1}" for who, (em, f1) in squad.PRINTED.items()}
    return {"exact match": found["exact"], "F1": found["f1"], "questions": len(questions), **beside}


def _bleu(args: argparse.Namespace) -> dict[str, Any]:
    from transept.cli.progress import loading
    from transept.evaluation.bleu import evaluate as measure

    if len(args.data) != 2:
        raise InputError(f"bleu needs two files, sources and references, line by line; found {len(args.data)}")
    sources, references = ([line for line in _text(path).splitlines()][: args.limit] for path in args.data)
    with loading("sentences", "sentences") as progress:
        found = measure(_load(args), sources, references, args.beams, progress)
    return {"BLEU": found.score, "signature": found.signature, "sentences": len(sources)}


def _kshot(args: argparse.Namespace) -> dict[str, Any]:
    from transept.cli.progress import loading
    from transept.evaluation.kshot import Wording
    from transept.evaluation.kshot import evaluate as measure

    if len(args.data) != 2:
        raise InputError(f"kshot needs two files, examples and questions, of lines TEXT<tab>CLASS; found {len(args.data)}")
    examples, asked = (_labelled(path) for path in args.data)
    words = dict(pair.split("=", 1) for pair in args.words if "=" in pair)
    with loading("questions", "questions") as progress:
        found = measure(_load(args), examples, asked[: args.limit], Wording(words), args.shots, args.seed, progress)
    return {"accuracy": found, "shots": args.shots, "questions": len(asked[: args.limit]), "seed": args.seed}


def _text(path: str) -> str:
    """A text file, plain, .xz or .gz."""
    import gzip
    import lzma

    if not Path(path).is_file():
        there = [p.name for p in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
        raise InputError(f"there is no file {path}{nearest(Path(path).name, there)}")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 at byte {e.start}") from e


def _labelled(path: str) -> list[tuple[str, str]]:
    """Rows of text and class; a first row that says `label` is a header."""
    rows = [line.split("\t") for line in _text(path).splitlines()]
    bad = next((i for i, row in enumerate(rows, 1) if len(row) != 2), None)
    if bad is not None:
        raise InputError(f"{path}:{bad}: {len(rows[bad - 1])} columns were found where text and class were expected")
    return [(row[0], row[1]) for row in rows if row[1] != "label"]
