"""What a checkpoint publishes about how its text is made: where it begins and ends, which tokens are forced or forbidden, how wide it is
searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from transept.core.errors import ConfigError, InputError
from transept.core.shapes import Float, Tensor
from transept.core.spec import Spec


class Early(Enum):
    """When a beam search with enough finished beams ends."""

    FIRST = True
    LIKELY = False
    NEVER = "never"


@dataclass(frozen=True, kw_only=True)
class Rules(Spec):
    """Token ids and numbers of a published generation configuration; the defaults forbid nothing.

    `start` is the decoder's first token where an encoder reads the prompt; `first` and `final` are forced as the first and as the last
    possible new token; `banned` are words that never occur; no end before `least` new tokens; no sequence of `unrepeated` tokens twice;
    `beams`, `penalty` and `early` are those of `Plan`, `most` the number of new tokens where the caller gives none.
    """

    start: int | None = None
    ends: tuple[int, ...] = ()
    pad: int | None = None
    first: int | None = None
    final: int | None = None
    banned: tuple[tuple[int, ...], ...] = ()
    least: int = 0
    unrepeated: int = 0
    renormed: bool = False
    beams: int = 1
    penalty: float = 1.0
    early: Early = Early.LIKELY
    most: int | None = None

    @staticmethod
    def read(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Rules:
        """The rules in a checkpoint's configuration, or, where there is one, in its generation configuration; ids of the start, the end
        and padding that this lacks are taken from the other. Errors: ConfigError where a field is not what it should be."""
        both = {k: v for k, v in (generation or config).items() if v is not None}
        for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
            if config.get(name) is not None:
                both.setdefault(name, config[name])
        encoder = bool(config.get("is_encoder_decoder"))
        values = {
            "start": both.get("decoder_start_token_id", both.get("bos_token_id")) if encoder else None,
            "ends": tuple(_list(both.get("eos_token_id"))),
            "pad": both.get("pad_token_id"),
        }
        # Lengths in these files count the decoder's first token; for a decoder alone they count the prompt too, so there they say nothing.
        if encoder:
            values |= {
                "first": both.get("forced_bos_token_id"),
                "final": next(iter(_list(both.get("forced_eos_token_id"))), None),
                "banned": tuple(tuple(word) for word in both.get("bad_words_ids") or ()),
                "least": max(0, (both.get("min_length") or 0) - 1),
                "unrepeated": both.get("no_repeat_ngram_size") or 0,
                "renormed": bool(both.get("renormalize_logits")),
                "beams": both.get("num_beams") or 1,
                "penalty": float(both.get("length_penalty", 1.0)),
                "early": _early(both.get("early_stopping", False)),
                "most": both["max_length"] - 1 if both.get("max_length") else None,
            }
        return Rules.checked(values)

    def ids(self) -> dict[str, Any]:
        """The token ids that a model's configuration holds."""
        ends: int | list[int] | None = None if not self.ends else self.ends[0] if len(self.ends) == 1 else list(self.ends)
        said = {"eos_token_id": ends, "pad_token_id": self.pad, "decoder_start_token_id": self.start, "forced_bos_token_id": self.first,
                "forced_eos_token_id": self.final}
        return {name: value for name, value in said.items() if value is not None}

    def write(self) -> dict[str, Any]:
        """The generation configuration of an encoder-decoder that says the same; what was not published is left out."""
        said = {
            "bad_words_ids": [list(word) for word in self.banned] or None,
            "min_length": self.least + 1 if self.least else None,
            "no_repeat_ngram_size": self.unrepeated or None,
            "renormalize_logits": self.renormed or None,
            "num_beams": self.beams if self.beams > 1 else None,
            "length_penalty": self.penalty if self.penalty != 1.0 else None,
            "early_stopping": self.early.value or None,
            "max_length": None if self.most is None else self.most + 1,
        }
        return self.ids() | {name: value for name, value in said.items() if value is not None}

    def apply(self, scores: Float[Tensor, "n v"], rows: Sequence[Sequence[int]], prompt: int, room: int) -> Float[Tensor, "n v"]:
        """The scores of the next token of each row, -inf where these rules forbid it.

        `rows` are all tokens of each row so far, the first `prompt` of them given; `room` is how many new ones there may be in all.
        """
        new = len(rows[0]) - prompt
        if new + 1 == room and self.final is not None:
            return _only(scores, self.final)
        if new == 0 and self.first is not None:
            return _only(scores, self.first)
        forbidden = [[*self._banned(row), *self._repeated(row), *(self.ends if new < self.least else ())] for row in rows]
        if any(forbidden):
            scores = scores.clone()
            for i, tokens in enumerate(forbidden):
                scores[i, tokens] = float("-inf")
        return scores.log_softmax(-1) if self.renormed else scores

    def _banned(self, row: Sequence[int]) -> list[int]:
        return [word[-1] for word in self.banned if len(word) == 1 or tuple(row[1 - len(word) :]) == word[:-1]]

    def _repeated(self, row: Sequence[int]) -> list[int]:
        n = self.unrepeated
        if not n or len(row) + 1 < n:
            return []
        last = list(row[len(row) + 1 - n :])
        return [row[i + n - 1] for i in range(len(row) - n + 1) if list(row[i : i + n - 1]) == last]


def start_of(rules: Rules, family: str) -> int:
    """The decoder's first token; a checkpoint that names none is refused."""
    if rules.start is None:
        raise InputError(f"this {family} checkpoint names no decoder_start_token_id, so it is not known how its answers begin")
    return rules.start


def _only(scores: Tensor, token: int) -> Tensor:
    out = torch.full_like(scores, float("-inf"))
    out[:, token] = 0.0
    return out


def _list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _early(value: Any) -> Early:
    for kind in Early:
        if kind.value == value:
            return kind
    raise ConfigError(f"the field 'early_stopping' should be true, false or 'never', found {value!r}")
