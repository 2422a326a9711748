"""BLEU as sacrebleu counts it (Post 2018, arXiv 1804.08771), with the signature that says how (rows 7, 8, 39)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transept.core.errors import ConfigError, InputError
from transept.door import Model


@dataclass(frozen=True)
class Bleu:
    """The score in per cent and sacrebleu's signature."""

    score: float
    signature: str


def bleu(found: Sequence[str], *references: Sequence[str]) -> Bleu:
    """The corpus BLEU of translations against one or more lists of references. Raises ConfigError without the extra `eval`."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as e:
        raise ConfigError("BLEU is counted by sacrebleu, which is not here: pip install 'transept[eval]'") from e
    for other in references:
        if len(other) != len(found) or not found:
            raise InputError(f"there are {len(found)} translations and {len(other)} references; as many were expected, and one at least")
    metric = BLEU()
    return Bleu(float(metric.corpus_score(list(found), [list(r) for r in references]).score), str(metric.get_signature()))


def evaluate(m: Model, sources: Sequence[str], references: Sequence[str], beams: int | None = None,
             progress: Callable[[int, int], None] | None = None) -> Bleu:  # fmt: skip
    """The BLEU of a model's translations."""
    found = m.translate(list(sources), beams=beams, progress=progress)
    return bleu(found if isinstance(found, list) else [found], references)
