"""A checkpoint that can run in the native core: lowered when it is first asked to generate, opened as a module when somebody wants to see
it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from transept import native
from transept.blocks.encoder import Encoder
from transept.blocks.stack import Decoder
from transept.checkpoints.load import Source, check
from transept.inference.plan.lower import NotLowered
from transept.inference.plan.runner import NativeEncoder, NativeModel, NativeRunner
from transept.inference.plan.weights import weights_of

MOST = 1024  # tokens of one step of an encoder: enough rows to work at the speed of the arithmetic


class Lowerable:
    """A decoder's or an encoder's checkpoint on a CPU. `open` loads the module; `native` is the lowered model, None where it has to run
    in torch, and `why` says why.

    Once the module was handed out its owner may change it, so from then on it alone is run.
    """

    def __init__(self, source: Source, load: Callable[[], nn.Module], *, fast: bool = False):
        self.source, self.load, self.fast = source, load, fast
        # A GGUF file's numbers are run as they are stored; its module, four times as large, is made only for who asks.
        self.module: nn.Module | None = None if source.stored else load()
        if self.module is None:
            check(source)
        self.opened = False
        self.why = "" if native.available() else native.why_not()
        self._native: NativeModel | NativeEncoder | None = None

    @staticmethod
    def fits(source: Source) -> bool:
        """Whether a checkpoint is of a kind that may lower at all."""
        return type(source.empty()) in (Decoder, Encoder)

    def open(self) -> nn.Module:
        """The module, with its weights."""
        module = self.look()
        self.opened, self._native = True, None
        return module

    def look(self) -> nn.Module:
        """The module for who only looks at it."""
        if self.module is None:
            self.module = self.load()
        return self.module

    def native(self) -> NativeModel | NativeEncoder | None:
        """The lowered model, made at the first asking."""
        if self.opened or self.why:
            return None
        if self._native is None:
            try:
                self._native = self._lower(self.source.empty() if self.module is None else self.module)
            except NotLowered as error:
                self.why = str(error)
        return self._native

    def runner(self, pages: int) -> NativeRunner | None:
        """An engine's runner over so many pages and one more, which padding may write; None where the model has to run in torch."""
        if self.opened or self.why:
            return None
        model = self.source.empty() if self.module is None else self.module
        try:
            return NativeRunner(model, weights_of(self.module, self.source), pages=pages + 1, fast=self.fast)
        except NotLowered as error:
            self.why = str(error)
            return None

    def _lower(self, model: nn.Module) -> NativeModel | NativeEncoder:
        weights, context = weights_of(self.module, self.source), getattr(self.source.spec, "context", None)
        if isinstance(model, Encoder):
            # The head is the module's own, so an encoder's module is kept.
            return NativeEncoder(model, weights, fast=self.fast, max_rows=max(MOST, context or MOST))
        return NativeModel(model, weights, context=context, fast=self.fast)
