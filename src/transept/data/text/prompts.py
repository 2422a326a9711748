"""Zero-, one- and few-shot prompting (Brown et al. 2020, section 2): examples in the prompt, no gradient. Lecture row 76."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transept.core.errors import InputError


@dataclass(frozen=True)
class Shots:
    """A task description with worked examples; `prompt` writes 0, 1 or k of them before the question.

    >>> task = Shots("Translate English to French:", [("sea otter", "loutre de mer"), ("cheese", "fromage")], arrow=" => ")
    >>> print(task.prompt("mint", shots=0))
    Translate English to French:
    mint =>
    >>> print(task.prompt("mint", shots=2))
    Translate English to French:
    sea otter => loutre de mer
    cheese => fromage
    mint =>

    `arrow` stands between a question and its answer, `between` between two examples. `seed` chooses which examples are shown and
    in which order (None: the first ones, as listed); a query that is itself an example is never shown with its answer.
    Errors: InputError for an empty field or for more shots than there are examples.
    """

    task: str
    examples: Sequence[tuple[str, str]] = ()
    arrow: str = "\n"
    between: str = "\n"

    def chosen(self, query: str, shots: int, seed: int | None = None) -> list[tuple[str, str]]:
        """The examples that `prompt` shows, in order."""
        others = [(question, answer) for question, answer in self.examples if question != query]
        if not 0 <= shots <= len(others):
            raise InputError(f"shots is {shots}; from 0 to {len(others)} examples are there besides the question itself")
        return others[:shots] if seed is None else random.Random(seed).sample(others, shots)

    def prompt(self, query: str, shots: int = 0, seed: int | None = None) -> str:
        """The exact prompt: task, `shots` examples, the query; nothing after the arrow's last visible character."""
        if not query:
            raise InputError("the query is empty; a question was expected")
        lines = [question + self.arrow + answer for question, answer in self.chosen(query, shots, seed)]
        asked = query + self.arrow
        head = [self.task] if self.task else []
        return self.between.join([*head, *lines, asked]).rstrip(" ")
