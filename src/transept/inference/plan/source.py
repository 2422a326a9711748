"""A checkpoint that can run in the native core: lowered when it is first asked to generate, opened as a module when somebody wants to see
it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from transept import native
from transept.blocks.stack import Decoder
from transept.checkpoints.load import Source, check
from transept.inference.plan.lower import NotLowered
from transept.inference.plan.runner import NativeModel
from transept.inference.plan.weights import weights_of


class Lowerable:
    """A decoder's checkpoint on a CPU. `open` loads the module; `native` is the lowered model, None where it has to run in torch, and
    `why` says why.

    Once the module was handed out its owner may change it, so from then on it alone is run.
    """

    def __init__(self, source: Source, load: Callable[[], nn.Module], *, fast: bool = False):
        self.source, self.load, self.fast = source, load, fast
        # A GGUF file's numbers are run as they are stored; its module, four times as large, is made only for who asks.
        self.module: nn.Module | None = None if source.path.suffix == ".gguf" else load()
        if self.module is None:
            check(source)
        self.opened = False
        self.why = "" if native.available() else native.why_not()
        self._native: NativeModel | None = None

    @staticmethod
    def fits(source: Source) -> bool:
        """Whether a checkpoint is a decoder at all."""
        return type(source.empty()) is Decoder

    def open(self) -> nn.Module:
        """The module, with its weights."""
        if self.module is None:
            self.module = self.load()
        self.opened, self._native = True, None
        return self.module

    def native(self) -> NativeModel | None:
        """The lowered model, made at the first asking."""
        if self.opened or self.why:
            return None
        if self._native is None:
            empty = self.source.empty() if self.module is None else self.module
            try:
                self._native = NativeModel(
                    empty, weights_of(self.module, self.source), context=getattr(self.source.spec, "context", None), fast=self.fast
                )
            except NotLowered as error:
                self.why = str(error)
        return self._native
