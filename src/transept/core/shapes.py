"""The legend of dimension letters, and the array types that carry them in signatures.

    b  batch                    d  model width              c  channels
    t  query length             e  head width               f  frames
    s  key length               v  vocabulary               p  patches
    h  heads                    n  routed experts           r  low rank
    k  key/value heads          x  chosen experts

The annotations are checked in the test suite (jaxtyping with beartype) and cost nothing in production.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor"]
