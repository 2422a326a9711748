"""Sources of samples: the protocol, and the plainest ones."""

from __future__ import annotations

from transept.core.batch import Batch, Draw, Sample, Source

__all__ = ["Batch", "Draw", "Sample", "Source"]
