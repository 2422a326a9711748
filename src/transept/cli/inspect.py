"""`transept inspect` and `transept profile`: a model opened on a text, and where its time goes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transept.core.errors import InputError

if TYPE_CHECKING:
    from transept.core.shapes import Tensor
    from transept.door import Model
    from transept.inspection.latency import Breakdown

TEXT = "The animal did not cross the street because it was too tired."


def options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Both commands with their options."""
    inspect = command("inspect", "See inside: attention, logit lens, rollout, positions, heads taken out.", table=True)
    profile = command("profile", "Where the time of one pass goes: qkv, scores, softmax, reshape, feed-forward.", table=True)
    inspect.add_argument("model", help="a folder, GGUF file, bundled name or hub id")
    inspect.add_argument("text", nargs="?", default=TEXT, help="what it reads (default: a sentence whose 'it' stands for something)")
    inspect.add_argument("--target", default=None, help="what an encoder-decoder wrote (default: its own answer)")
    inspect.add_argument(
        "--kind", choices=("self", "encoder", "cross"), default=None, help="which attention (default: cross where there is any)"
    )
    inspect.add_argument("--layer", type=int, default=None, metavar="N", help="one layer (default: all)")
    inspect.add_argument("--head", type=int, default=None, metavar="N", help="one head (default: all)")
    view = inspect.add_mutually_exclusive_group()
    view.add_argument("--lens", action="store_true", help="what the model would answer after each layer")
    view.add_argument("--rollout", action="store_true", help="attention through all layers")
    view.add_argument("--positions", action="store_true", help="how alike two positions are")
    view.add_argument(
        "--off", action="append", default=[], metavar="HEAD", help="take out attn[3].head[2], or a whole attn[3]; may be repeated"
    )
    view.add_argument("--names", action="store_true", help="what can be watched in this model")
    profile.add_argument("model", help="a folder, GGUF file, bundled name or hub id")
    profile.add_argument("text", nargs="?", default=None, help="what it reads (default: --tokens many)")
    profile.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="how many tokens it reads where no text is given (default 128)"
    )
    profile.add_argument("--runs", type=int, default=5, metavar="N", help="passes to average (default 5)")
    profile.add_argument("--torch", action="store_true", help="time torch, also where the native core runs the model")
    for sub in (inspect, profile):
        sub.add_argument("--png", default=None, metavar="FILE", help="draw it: a .png or .svg file")


def inspect(args: argparse.Namespace) -> int:
    """Prints one view of what happens inside."""
    from transept.cli.tables import table
    from transept.inspection.sites import patterns

    m = _opened(args.model)
    if args.names:
        print(json.dumps({"model": args.model, "names": patterns(m.look())}) if args.json else "\n".join(patterns(m.look())))
        return 0
    if args.positions:
        record, lines = _positions(m, args)
    else:
        ids, source = _read(m, args.text, args.target)
        view = _lens if args.lens else _rollout if args.rollout else _off if args.off else _attention
        record, lines = view(m, args, ids, source)
    if args.json:
        print(json.dumps({"model": args.model, **record}))
    else:
        table(lines[0], lines[1:])
        if args.png:
            print(f"drawn in {args.png}")
    return 0


def profile(args: argparse.Namespace) -> int:
    """Prints where the time of one pass goes."""
    from transept.cli.tables import table

    if args.runs < 1 or args.tokens < 1:
        raise InputError(f"--runs and --tokens should be 1 or more, found {args.runs} and {args.tokens}")
    m = _opened(args.model)
    found = _native(m, args) or _timed(m, args)
    if args.png:
        from transept.inspection.plots import bars

        bars(args.png, found, f"{args.model}: one pass over {found.tokens} tokens ({found.engine})")
    shares = found.shares()
    if args.json:
        parts = [{"part": part, "seconds": took, "share": shares[part]} for part, took in found.parts.items()]
        print(
            json.dumps(
                {
                    "model": args.model,
                    "engine": found.engine,
                    "tokens": found.tokens,
                    "runs": args.runs,
                    "seconds": found.seconds,
                    "apart": found.apart,
                    "parts": parts,
                }
            )
        )
        return 0
    table(("part", "ms", "share"), [(part, f"{1000 * took:.3f}", f"{100 * shares[part]:.1f} %") for part, took in found.parts.items()])
    core = "the native core" if found.engine == "native" else "torch"
    plain = f"one pass over {found.tokens} tokens takes {1000 * found.seconds:.2f} ms in {core}"
    print(plain if found.engine == "native" else f"{plain}; its operations one by one {1000 * found.apart:.2f} ms")
    return 0


def _opened(name: str) -> Model:
    from transept.cli.progress import loading
    from transept.door import load

    with loading(name) as progress:
        return load(name, progress=progress)


def _read(m: Model, text: str, target: str | None) -> tuple[Tensor, Tensor | None]:
    """The ids of a text, and those of the source where an encoder-decoder writes beside it."""
    from transept.blocks.seq2seq import EncoderDecoder
    from transept.inference.generation import check_length
    from transept.inference.rules import start_of
    from transept.inspection.attention import batch_of

    ids, module = m.encode(text), m.look()
    check_length(len(ids), m.context)
    if not isinstance(module, EncoderDecoder):
        if target is not None:
            raise InputError(f"--target is for encoder-decoders; {m.source} is a {m.family.name} and reads one text")
        return batch_of(ids, module), None
    written = m.encode(target) if target is not None else m.generate(ids, max_tokens=32).ids
    return batch_of([start_of(m.rules, m.family.name), *written], module), batch_of(ids, module)


def _words(m: Model, ids: Tensor | None) -> list[str]:
    """Tokens as text, or their numbers where there is no tokenizer."""
    if ids is None:
        return []
    row = ids[0].tolist()
    return [str(i) for i in row] if m.tokenizer is None else [m.tokenizer.decode([i], skip_specials=False) for i in row]


def _attention(m: Model, args: argparse.Namespace, ids: Tensor, source: Tensor | None) -> tuple[dict[str, Any], list[Sequence[Any]]]:
    from transept.inspection import attention, plots

    kind = args.kind or ("self" if source is None else "cross")
    found = attention.maps(m, ids, source=source, kind=kind, layer=args.layer, head=args.head)
    queries = _words(m, source if kind == "encoder" else ids)
    keys = _words(m, ids if kind == "self" else source)
    if args.png:
        plots.maps(args.png, found, queries, keys, args.text)
    maps = [{"layer": one.layer, "head": one.head, "name": one.name, "weights": one.weights[0].tolist()} for one in found]
    lines: list[Sequence[Any]] = [("head", "looks away", "from", "to", "weight")]
    for one in found:
        weights = one.weights[0].clone()
        if len(found) > 1 and kind != "cross" and len(keys) > 2:
            # Of many heads the one pair that tells most: not a token with itself, nor with the first, where idle heads look.
            weights.fill_diagonal_(0)[:, 0] = 0
        best = weights.max(-1)
        strongest = best.values.argsort(descending=True)[: len(queries) if len(found) == 1 else 1].sort().values.tolist()
        for i in strongest:
            pair = plots.shown(queries[i]), plots.shown(keys[int(best.indices[i])])
            lines.append((one.name, f"{attention.distance(one.weights):.1f}", *pair, f"{float(best.values[i]):.3f}"))
    return {"kind": kind, "queries": queries, "keys": keys, "maps": maps}, lines


def _rollout(m: Model, args: argparse.Namespace, ids: Tensor, source: Tensor | None) -> tuple[dict[str, Any], list[Sequence[Any]]]:
    from transept.inspection import attention, plots

    kind = args.kind or ("self" if source is None else "encoder")
    values = attention.rolled(m, ids, source=source, kind=kind, layer=args.layer)[0]
    words = _words(m, source if kind == "encoder" else ids)
    if args.png:
        plots.matrix(args.png, values, words, words, f"rollout: {args.text}")
    lines: list[Sequence[Any]] = [("token", "comes from")]
    for word, row in zip(words, values, strict=True):
        best = row.topk(min(3, len(row)))
        lines.append(
            (
                plots.shown(word),
                ", ".join(
                    f"{plots.shown(words[i])} {100 * p:.0f} %" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ),
            )
        )
    return {"kind": kind, "tokens": words, "rollout": values.tolist()}, lines


def _lens(m: Model, args: argparse.Namespace, ids: Tensor, source: Tensor | None) -> tuple[dict[str, Any], list[Sequence[Any]]]:
    from transept.inspection import plots
    from transept.inspection.lens import lens

    words = _words(m, ids)[-12:]
    depths = []
    for depth in lens(m, ids, source=source, last=12):
        best = depth.logits[0].softmax(-1).max(-1)
        depths.append(
            {
                "layer": depth.layer,
                "name": depth.name,
                "guesses": _words(m, best.indices[None]),
                "p": best.values.tolist(),
                "entropy": depth.entropy()[0].tolist(),
            }
        )
    if args.png:
        plots.table(args.png, [d["guesses"] for d in depths], [d["p"] for d in depths], [d["name"] for d in depths], words, args.text)
    lines: list[Sequence[Any]] = [("after", *(plots.shown(w) for w in words))]
    return {"tokens": words, "layers": depths}, lines + [(d["name"], *(plots.shown(w) for w in d["guesses"])) for d in depths]


def _off(m: Model, args: argparse.Namespace, ids: Tensor, source: Tensor | None) -> tuple[dict[str, Any], list[Sequence[Any]]]:
    from transept.inspection.interventions import ablated, divergence

    if args.png:
        raise InputError("--png draws attention, --rollout, --lens and --positions; there is no picture of --off")
    before, after = (getattr(out, "logits", None) for out in ablated(m, ids, args.off, source))
    if before is None or after is None or before.ndim != 3:
        raise InputError("--off compares the guesses of a model that scores a vocabulary, which this one does not")
    bits = divergence(before[0, -1], after[0, -1])
    lines: list[Sequence[Any]] = [("", "next", "chance")]
    record: dict[str, Any] = {"off": args.off, "divergence": float(bits)}
    for name, logits in (("with all", before), ("without", after)):
        best = logits[0, -1].softmax(-1).topk(5)
        words = _words(m, best.indices[None])
        record["before" if logits is before else "after"] = [{"token": w, "p": p} for w, p in zip(words, best.values.tolist(), strict=True)]
        lines += [(name, repr(w), f"{p:.4f}") for w, p in zip(words, best.values.tolist(), strict=True)]
    return record, [*lines, ("apart", f"{float(bits):.4f} bits", "")]


def _positions(m: Model, args: argparse.Namespace) -> tuple[dict[str, Any], list[Sequence[Any]]]:
    from transept.inspection import plots
    from transept.inspection.positions import similarity

    found = similarity(m)
    names = [str(i) for i in range(len(found.matrix))]
    if args.png:
        plots.matrix(args.png, found.matrix, names, names, f"{found.kind}: {found.told}")
    middle = len(names) // 2
    lines: list[Sequence[Any]] = [(found.kind, found.told)]
    lines += [(f"{middle} and {i}", f"{float(found.matrix[middle, i]):.3f}") for i in range(len(names))]
    return {"kind": found.kind, "told": found.told, "similarity": found.matrix.tolist()}, lines


def _native(m: Model, args: argparse.Namespace) -> Breakdown | None:
    """The native core's own clock, where it runs the model."""
    import numpy as np

    from transept.inference.plan.steps import Loop
    from transept.inference.rows import Row
    from transept.inspection.latency import of_records
    from transept.native.binding import OPS

    lowered = None if args.torch else m.lowered()
    if not isinstance(lowered, Loop):
        return None
    ids = m.encode(args.text) if args.text else _filler(m, args.tokens)
    state, program = lowered.cache(1, len(ids)), lowered.runner.program
    row, seconds = Row(tuple(ids), 0, state.pages, 1), np.zeros(len(program.records))
    lowered.runner.run([row])
    for _ in range(args.runs):
        lowered.runner.run([row], seconds)
    return of_records(program.labels, [OPS[record.op] for record in program.records], (seconds / args.runs).tolist(), len(ids))


def _timed(m: Model, args: argparse.Namespace) -> Breakdown:
    from transept.blocks.seq2seq import EncoderDecoder
    from transept.inspection.attention import batch_of
    from transept.inspection.latency import breakdown

    module = m.look()
    if args.text:
        ids, source = _read(m, args.text, None)
    else:
        ids = batch_of(_filler(m, args.tokens), module)
        source = ids if isinstance(module, EncoderDecoder) else None
    return breakdown(m, ids, source=source, runs=args.runs)


def _filler(m: Model, count: int) -> list[int]:
    """Tokens to be computed with, whatever they mean."""
    from transept.inference.generation import check_length

    check_length(count, m.context)
    vocab = getattr(m.spec, "vocab", 2)
    return [(7 * i + 11) % vocab for i in range(count)]


COMMANDS = {"inspect": inspect, "profile": profile}
