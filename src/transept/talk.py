"""What every loaded language model does with text, whoever computes its logits. Needs no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from transept.core.errors import InputError, TokenizerError
from transept.data.text.template import messages
from transept.data.text.tokenizer import Tokenizer
from transept.inference.generation import Detokenizer, Piece


class Talk(ABC):
    """Prompts to ids, conversations to streams; `stream` is the model's own."""

    tokenizer: Tokenizer | None
    source: str

    @abstractmethod
    def stream(
        self, prompt: Any, *, max_tokens: int = 64, stop: Sequence[str] = (), ignore_end: bool = False, **sampling: Any
    ) -> Iterator[Piece]:
        """The continuation of a text or of ids, piece by piece as it comes."""

    @property
    @abstractmethod
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""

    def chat(self, turns: str | Sequence[dict[str, Any]], *, system: str | None = None, **options: Any) -> Iterator[Piece]:
        """The assistant's answer to a prompt or to a list of {"role", "content"} messages, streamed; `options` are those of `stream`."""
        return self.stream(self.chat_ids(turns, system), **options)

    def chat_ids(self, turns: str | Sequence[dict[str, Any]], system: str | None = None) -> list[int]:
        """The tokens of a conversation in the model's own chat template, ready for the assistant's turn."""
        talk = messages(turns, system) if isinstance(turns, str) else list(turns)
        return self._tokenizer().encode_chat(talk, add_generation_prompt=True)

    def encode(self, prompt: Any) -> list[int]:
        """A prompt as ids: a text, a list of ids, or an array or tensor [t] or [1 t]."""
        if isinstance(prompt, str):
            return self._tokenizer().encode(prompt)
        if hasattr(prompt, "ndim"):
            if prompt.ndim not in (1, 2) or (prompt.ndim == 2 and len(prompt) != 1):
                raise InputError(f"ids should have the shape [t] or [1 t], found {tuple(prompt.shape)}")
            return prompt.reshape(-1).tolist()
        return [int(i) for i in prompt]

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.source or 'this model'} has no tokenizer: give token ids, or put a tokenizer.json beside its weights"
            )
        return self.tokenizer

    def _detokenizer(self) -> Detokenizer:
        return _Silent() if self.tokenizer is None else self.tokenizer.stream()


class _Silent:
    """Stands where there is no tokenizer: ids only."""

    def push(self, ids: int | Sequence[int], /) -> str:
        return ""

    def finish(self) -> str:
        return ""
