"""What a block says of itself: the traits that tell one filling of a slot from another, read by `repr` and by `transept diff`."""

from __future__ import annotations


class Traits:
    """Mix-in for nn.Modules: `traits` names what the class name alone does not say."""

    def traits(self) -> dict[str, object]:
        """Trait -> value; numbers that repeat the Spec carry the Spec's names."""
        return {}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.traits().items())
