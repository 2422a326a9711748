"""Floor 1: one declarative table per published form, read in both directions under eight laws.

Total, injective, anchored to whole keys, moving bits only, each op owning its inverse, pure, chosen by the architecture that a file
declares, behind one door. The vocabulary is complete in `table` (weights) and `fields` (configuration).
"""

from transept.mapping.fields import Derived, Field, Fields, Given
from transept.mapping.ops import Cat, Op, Reshape, SplitHeads, Stack, T, Unpair
from transept.mapping.table import Drop, Map, Row, Spare, Tied

__all__ = [
    "Cat",
    "Derived",
    "Drop",
    "Field",
    "Fields",
    "Given",
    "Map",
    "Op",
    "Reshape",
    "Row",
    "Spare",
    "SplitHeads",
    "Stack",
    "T",
    "Tied",
    "Unpair",
]
