"""Whether a loaded model is its publisher's: token ids, logits and generated text, against transformers where it is installed, else
golden values."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transept.checkpoints.load import describe
from transept.core.errors import SourceError
from transept.door import Model, load

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1815, 3.14159 was not yet known to 2,000 digits; by 1873 it was known to 707.",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好，世界！ مرحبا 🙂",
)
NEW = 32
TOLERANCE = 1e-4
GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Check:
    """One row: what was compared, what was found, what the publisher's gives."""

    what: str
    found: str
    expected: str
    ok: bool


def verify(source: str) -> list[Check]:
    """The rows of one model. Raises SourceError where there is nothing to compare with."""
    expected = _golden(source) or reference(source)
    m = load(source, dtype=torch.float32)
    rows: list[Check] = []
    for i, text in enumerate(TEXTS):
        want = expected["texts"][i]
        ids = m.encode(text) if m.tokenizer is not None else want["ids"]
        rows.append(_row(f"ids of text {i + 1}", ids == want["ids"], f"{len(ids)} ids", f"{len(want['ids'])} ids"))
        with torch.inference_mode():
            logits = m.model(torch.tensor([want["ids"]])).logits[0]
        top, value = logits[-1].topk(len(want["top"]))
        worst = float((logits[-1][torch.tensor(want["top"])] - torch.tensor(want["values"])).abs().max())
        rows.append(
            _row(
                f"logits of text {i + 1}",
                worst <= TOLERANCE * max(1.0, abs(want["values"][0])),
                f"largest difference {worst:.1e}",
                f"at most {TOLERANCE:.0e} of the largest",
            )
        )
        agree = sum(int(a) == b for a, b in zip(logits.argmax(-1), want["argmax"], strict=True))
        rows.append(_row(f"top token at each position of text {i + 1}", agree == len(want["argmax"]), f"{agree}", f"{len(want['argmax'])}"))
        new = m.generate(want["ids"], max_tokens=NEW, ignore_end=True).ids
        rows.append(
            _row(
                f"{NEW} greedy tokens after text {i + 1}", new == want["greedy"], _same(new, want["greedy"]), f"{len(want['greedy'])} equal"
            )
        )
    return rows


def reference_values(model: Any, encode: Any) -> dict[str, Any]:
    """What the publisher's implementation gives for TEXTS: ids, the eight largest last logits, the top token everywhere, greedy
    continuation."""
    texts = []
    for text in TEXTS:
        ids = list(encode(text))
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
            greedy = model.generate(torch.tensor([ids]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, len(ids) :]
        top = logits[-1].topk(8)
        texts.append(
            {
                "ids": ids,
                "top": top.indices.tolist(),
                "values": top.values.tolist(),
                "argmax": logits.argmax(-1).tolist(),
                "greedy": greedy.tolist(),
            }
        )
    return {"texts": texts}


def _golden(source: str) -> dict[str, Any] | None:
    path = GOLDEN / f"{source}.json"
    return json.loads(path.read_text()) if path.name in {p.name for p in GOLDEN.glob("*.json")} else None


def reference(source: str) -> dict[str, Any]:
    """What transformers gives for a checkpoint. Raises SourceError where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise SourceError(
            f"there are no golden values for {source!r}, and transformers is not installed to compare with: pip install transformers"
        )
    import transformers

    found = describe(source)
    empty = found.empty()
    if not (hasattr(empty, "cache") and hasattr(empty, "hidden")):
        raise SourceError(f"{source} is a {found.form.architecture}, which continues no text; only what continues texts is compared")
    where: dict[str, Any] = {"gguf_file": found.path.name} if found.path.suffix == ".gguf" else {}
    folder = str(found.path.parent if where else found.path)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    except (OSError, ValueError, KeyError) as error:
        reason, kind = str(error).splitlines()[0][:120], found.form.architecture
        raise SourceError(f"{source}: transformers does not load {kind} as a causal language model ({reason})") from None
    mine = Model(empty, found.family, found.form, found.spec)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
        encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    except (OSError, ValueError):
        vocab, room = mine.spec.json()["vocab"], (mine.context or 512) - NEW
        encode = lambda text: [ord(c) % vocab for c in text][:room]  # noqa: E731
    return reference_values(model, encode)


def _row(what: str, ok: bool, found: str, expected: str) -> Check:
    return Check(what, found, expected, bool(ok))


def _same(a: list[int], b: list[int]) -> str:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{same} equal"
