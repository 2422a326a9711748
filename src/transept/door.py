"""The public door: `load` gives one object that holds the network, its Spec and its tokenizer, and does the tasks; `save` writes it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transept.checkpoints import load as reader
from transept.checkpoints.save import form_for
from transept.checkpoints.save import save as write
from transept.core.errors import InputError, TokenizerError
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.data.text.template import messages
from transept.data.text.tokenizer import Tokenizer
from transept.inference import generation
from transept.inference.beam import beam_search
from transept.inference.generation import Generation, Piece, Usage
from transept.inference.sampling import Sampling
from transept.inspection.card import Card, card

Prompt = str | Sequence[int] | torch.Tensor


class Model:
    """A loaded model: `model` is the plain nn.Module, `spec` its numbers, `tokenizer` None where the source has none, `card` its costs."""

    def __init__(self, model: nn.Module, family: Family, form: Published | None, spec: Spec, tokenizer: Tokenizer | None = None, source: str = ""):
        self.model, self.family, self.form, self.spec = model, family, form, spec
        self.tokenizer, self.source = tokenizer, source

    @property
    def card(self) -> Card:
        """Parameters, FLOPs and cache bytes, counted from the network's own modules."""
        return card(self.model, self.spec, self.family.name)

    @property
    def context(self) -> int | None:
        """The longest input in tokens; None where there is no limit."""
        return getattr(self.spec, "context", None)

    def generate(self, prompt: Prompt, *, max_tokens: int = 64, stop: Sequence[str] = (), beams: int = 1, ignore_end: bool = False, **sampling: Any) -> Generation:
        """The continuation of a text or of ids; `sampling` are the fields of `Sampling` (temperature=0.0, top_k, top_p, min_p, seed, ...).

        Raises InputError where the prompt is longer than the context.
        """
        if beams > 1:
            return self._beam(prompt, max_tokens, beams, ignore_end)
        return generation.last(self.stream(prompt, max_tokens=max_tokens, stop=stop, ignore_end=ignore_end, **sampling))

    def stream(self, prompt: Prompt, *, max_tokens: int = 64, stop: Sequence[str] = (), ignore_end: bool = False, **sampling: Any) -> Iterator[Piece]:
        """The same, piece by piece as it comes: `for piece in m.stream(...): piece.text`."""
        ids = self.encode(prompt)
        steps = generation.steps(self._predictor(), ids, Sampling.checked(sampling), max_tokens=max_tokens, context=self.context)
        return generation.stream(steps, self._detokenizer(), prompt_tokens=len(ids), ends=() if ignore_end else self.ends, stop=stop)

    def chat(self, turns: str | Sequence[dict[str, Any]], *, system: str | None = None, **options: Any) -> Iterator[Piece]:
        """The assistant's answer to a prompt or to a list of {"role", "content"} messages, streamed; `options` are those of `stream`."""
        return self.stream(self.chat_ids(turns, system), **options)

    def chat_ids(self, turns: str | Sequence[dict[str, Any]], system: str | None = None) -> list[int]:
        """The tokens of a conversation in the model's own chat template, ready for the assistant's turn."""
        talk = messages(turns, system) if isinstance(turns, str) else list(turns)
        return self._tokenizer().encode_chat(talk, add_generation_prompt=True)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return () if self.tokenizer is None else tuple(self.tokenizer.eos_ids)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt as ids."""
        if isinstance(prompt, str):
            return self._tokenizer().encode(prompt)
        if isinstance(prompt, torch.Tensor):
            if prompt.ndim not in (1, 2) or (prompt.ndim == 2 and len(prompt) != 1):
                raise InputError(f"ids should have the shape [t] or [1 t], found {tuple(prompt.shape)}")
            return prompt.flatten().tolist()
        return [int(i) for i in prompt]

    def _beam(self, prompt: Prompt, max_tokens: int, beams: int, ignore_end: bool) -> Generation:
        ids, model = self.encode(prompt), self._predictor()
        generation.check_length(len(ids), self.context)
        room = max_tokens if self.context is None else min(max_tokens, self.context - len(ids))
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            cache = model.cache(1, len(ids) + room)
            first = generation.prefill(model, torch.tensor([ids], device=device), cache)[0]

            def advance(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
                cache.reorder(rows.to(device))
                return model.head(model.hidden(tokens[:, None].to(device), cache=cache)[:, -1]).cpu()

            best = beam_search(first.cpu(), advance, beams=beams, max_tokens=room, ends=() if ignore_end else self.ends)[0]
        new = list(best.ids)
        ended = bool(new) and new[-1] in self.ends and not ignore_end
        text = "" if self.tokenizer is None else self.tokenizer.decode(new[:-1] if ended else new)
        return Generation(text, new, "stop" if ended else "length", Usage(len(ids), len(new)))

    def _predictor(self) -> Any:
        if not (hasattr(self.model, "cache") and hasattr(self.model, "hidden")):
            raise InputError(f"a {self.family.name} model of this form predicts no next token; load its language-model form to generate")
        return self.model

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(f"{self.source or 'this model'} has no tokenizer: give token ids, or put a tokenizer.json beside its weights")
        return self.tokenizer

    def _detokenizer(self) -> generation.Detokenizer:
        return _Silent() if self.tokenizer is None else self.tokenizer.stream()


class _Silent:
    """Stands where there is no tokenizer: ids only."""

    def push(self, ids: int | Sequence[int], /) -> str:
        return ""

    def finish(self) -> str:
        return ""


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    ignore: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A model from a folder, a GGUF file, a bundled name or a hub id.

    `dtype` None keeps the stored type; `ignore` names configuration fields that you know to change nothing; `progress(done, total)` counts tensors.
    Raises SourceError, ConfigError, CheckpointError, MappingError, NumericsError or TokenizerError, each with the file, the field, and what was
    expected.
    """
    found = reader.describe(source, ignore)
    model = reader.load(found, dtype, device, progress)
    return Model(model, found.family, found.form, found.spec, tokenizer_of(found), str(source))


def tokenizer_of(source: reader.Source) -> Tokenizer | None:
    """The tokenizer that lies with a checkpoint; None where there is none."""
    if source.path.suffix == ".gguf":
        return Tokenizer.from_gguf(dict(source.metadata)) if "tokenizer.ggml.tokens" in source.metadata else None
    named = ("tokenizer.json", "vocab.json", "encoder.json", "vocab.txt")
    return Tokenizer.from_folder(source.path) if any((source.path / name).exists() for name in named) else None


def save(m: Model, folder: str | Path) -> Path:
    """Writes a folder that Hugging Face transformers loads as it is, and that `load` gives back with equal numbers."""
    form = form_for(m.family, m.spec, m.form)
    ends = list(m.ends)
    extra: dict[str, Any] = {}
    if m.tokenizer is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        m.tokenizer.save(folder)
        extra = {"bos_token_id": m.tokenizer.bos_id, "eos_token_id": (ends[0] if len(ends) == 1 else ends) or None, "pad_token_id": m.tokenizer.pad_id}
    return write(m.model, m.family, form, m.spec, folder, extra)
