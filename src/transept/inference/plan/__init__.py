"""A finished model becomes a flat plan of a dozen operations, run by the native core: one call a step."""

from __future__ import annotations

from transept.inference.plan.lower import NotLowered, lower
from transept.inference.plan.runner import NativeModel, NativeRunner
from transept.inference.plan.source import Lowerable
from transept.inference.plan.weights import ModuleWeights, StoredWeights, Weights

__all__ = ["Lowerable", "ModuleWeights", "NativeModel", "NativeRunner", "NotLowered", "StoredWeights", "Weights", "lower"]
