"""Tiny models of random weights in folders, as a server finds them, and a server of them in a thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

import transept
from tests.contracts.decoders import initialised
from tests.serving.wire import ASK
from transept.core.registry import Published, family
from transept.data.text.bpe import train_bpe
from transept.door import Model
from transept.serving.limits import Limits
from transept.serving.shelf import Settings

TEXT = "The quick brown fox jumps over the lazy dog. A man, a plan, a canal: Panama! Pack my box with five dozen jugs.\n" * 8
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,!?", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"))
HEADS = {"fill": "BertForMaskedLM", "classify": "BertForSequenceClassification", "answer": "BertForQuestionAnswering"}


def decoder(folder: Path, context: int = 1024, seed: int = 0) -> Path:
    """A LLaMA of two layers with a byte-level vocabulary of 320 tokens and a chat template."""
    torch.manual_seed(seed)
    tokenizer = train_bpe(TEXT, vocab=320, specials=("<|im_end|>", "<|im_start|>"))
    tokenizer.chat_template = TEMPLATE
    page = family("llama")
    spec = page.tiny["gqa"].replace(vocab=tokenizer.vocab_size, context=context)
    transept.save(Model(initialised(page.build(spec)), page, None, spec, tokenizer), folder)
    return folder


def encoder(folder: Path, architecture: str) -> Path:
    """A BERT of two layers over letters, with the head of this architecture."""
    torch.manual_seed(0)
    page = family("bert")
    form = next(form for form in page.published if form.architecture == architecture)
    spec = page.tiny["two"].replace(labels=("no", "yes")) if architecture == HEADS["classify"] else page.tiny["two"]
    folder.mkdir()
    model = initialised(built(form, page, spec))
    transept.save(Model(model, page, form, spec), folder)
    (folder / "vocab.txt").write_text("\n".join((*WORDS, *(f"[unused{i}]" for i in range(spec.vocab - len(WORDS))))) + "\n")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "tokenizer_class": "BertTokenizer", **names}))
    return folder


def built(form: Published, page: Any, spec: Any) -> torch.nn.Module:
    return (form.build or page.build)(spec)


def settings(root: Path, *, encoders: bool = False, limits: dict[str, int] | None = None, **rest: Any) -> Settings:
    """Settings for the tiny models in `root`, which are made there."""
    models = [decoder(root / "tiny")] + ([encoder(root / name, head) for name, head in HEADS.items()] if encoders else [])
    return Settings(models=tuple(str(m) for m in models), limits=Limits(limits), **{"context": None, "pages": 256, "rows": 8, **rest})


def at_rest(app: Any) -> None:
    """Nothing is under way: no place, no task of the engine, no page held."""
    desk = app.state.desk
    assert desk.gate.requests == desk.gate.tokens == 0 and not desk.gate.by_tenant
    for book in desk.shelf.books.values():
        assert book.users == 0
        if book.served is not None and book.served.engine is not None:
            engine = book.served.engine.engine
            assert not book.served.engine.open and not engine.choices and not engine.scheduler.tasks
            assert engine.scheduler.pages.available == engine.scheduler.pages.total and not engine.scheduler.pages.held


def settle(app: Any) -> None:
    """Waits until nothing is under way, at most a minute; then it must be so."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            at_rest(app)
            return
        except AssertionError:
            time.sleep(0.02)
    at_rest(app)


def post(address: str, path: str = "/v1/chat/completions", body: Any = None, **rest: Any) -> httpx.Response:
    """One request."""
    return httpx.post(address + path, json=ASK if body is None else body, timeout=120, **rest)


@contextmanager
def spawned(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, address) of `transept serve` in a process of its own, when it is ready; killed at the end if it still runs."""
    line = [sys.executable, "-m", "transept.cli.main", "serve", str(folder), "--port", "0", "--pages", "256", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first.startswith("Transept at http://"), first + process.stdout.read()
        address = first.split()[-1]
        while httpx.get(f"{address}/ready", timeout=60).status_code != 200:
            time.sleep(0.05)
        yield process, address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
