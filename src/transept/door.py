"""The public door: `load` gives one object that holds the network, its Spec and its tokenizer, and does the tasks; `save` writes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transept.blocks.seq2seq import BareEncoderDecoder, EncoderDecoder
from transept.checkpoints import load as reader
from transept.checkpoints.atomic import atomic
from transept.checkpoints.quantized import Stored
from transept.checkpoints.save import form_for
from transept.checkpoints.save import save as write
from transept.core.errors import InputError
from transept.core.registry import Family, Published
from transept.core.spec import Spec
from transept.core.tap import listened
from transept.data.text.tokenizer import Tokenizer, present
from transept.inference import generation, tasks
from transept.inference.batches import by_length, padded
from transept.inference.beam import Plan, search
from transept.inference.engine.engine import Ask
from transept.inference.generation import Generation, Piece, Usage
from transept.inference.plan import Lowerable, NativeEncoder, NativeModel, NativeRunner
from transept.inference.pooling import Pooling
from transept.inference.rules import Early, Rules, start_of
from transept.inference.sampling import Sampling
from transept.inspection.card import Card, card
from transept.talk import Talk

Prompt = str | Sequence[int] | torch.Tensor


class Model(Talk):
    """A loaded model: `model` is the plain nn.Module, `spec` its numbers, `tokenizer` None where the source has none, `card` its costs.

    A decoder on a CPU generates in the native core until `model` is first asked for; from then on the module that you hold, and may
    change, is what runs.
    """

    def __init__(
        self,
        model: nn.Module | Lowerable,
        family: Family,
        form: Published | None,
        spec: Spec,
        tokenizer: Tokenizer | None = None,
        source: str = "",
        rules: Rules | None = None,
        pooling: Pooling | None = None,
    ):
        self._model, self.family, self.form, self.spec = model, family, form, spec
        self.tokenizer, self.source, self.rules = tokenizer, source, rules or Rules()
        self.pooling = pooling

    @property
    def model(self) -> nn.Module:
        """The network as a plain module."""
        return self._model.open() if isinstance(self._model, Lowerable) and not listened() else self.look()

    def look(self) -> nn.Module:
        """The network for who watches it and does not change it: the native core goes on generating."""
        return self._model.look() if isinstance(self._model, Lowerable) else self._model

    @property
    def card(self) -> Card:
        """Parameters, FLOPs and cache bytes, counted from the network's own modules."""
        module = self._model.source.empty() if isinstance(self._model, Lowerable) else self._model
        return card(module, self.spec, self.family.name)

    @property
    def context(self) -> int | None:
        """The longest input in tokens; None where there is no limit."""
        return getattr(self.spec, "context", None)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 64,
        stop: Sequence[str] = (),
        beams: int = 1,
        penalty: float | None = None,
        early: bool | str | None = None,
        ignore_end: bool = False,
        **sampling: Any,
    ) -> Generation:
        """The continuation of a text or of ids, or what an encoder-decoder answers to them.

        `sampling` are the fields of `Sampling` (temperature=0.0, top_k, top_p, min_p, seed, ...); with more than one of the `beams` the
        most probable answer is searched, its score divided by its length to the power `penalty`, until `early` says so (True, False or
        "never"). Raises InputError where the prompt is longer than the context.
        """
        if beams != 1:
            if stop or Sampling.checked(sampling).replace(seed=None) != Sampling():
                raise InputError("beam search takes the most probable answer: it knows no temperature, no filters and no stop strings")
            return self._search([self.encode(prompt)], self._plan(max_tokens, beams, penalty, early, ignore_end), 1)[0]
        return generation.last(self.stream(prompt, max_tokens=max_tokens, stop=stop, ignore_end=ignore_end, **sampling))

    def stream(
        self, prompt: Prompt, *, max_tokens: int = 64, stop: Sequence[str] = (), ignore_end: bool = False, **sampling: Any
    ) -> Iterator[Piece]:
        """The same, piece by piece as it comes: `for piece in m.stream(...): piece.text`."""
        ids, chosen, ends = self.encode(prompt), Sampling.checked(sampling), () if ignore_end else self.ends
        if isinstance(lowered := self.lowered(), NativeModel):
            ask = Ask(prompt=ids, max_tokens=max_tokens, sampling=chosen, ends=ends, stop=stop)
            return lowered.stream(ask, None if self.tokenizer is None else self.tokenizer.stream)
        model, begin = self._predictor(), ids
        if isinstance(model, EncoderDecoder):
            generation.check_length(len(ids), self.context)
            with torch.no_grad():
                model = model.given(torch.tensor([ids], device=next(model.parameters()).device))
            begin = [start_of(self.rules, self.family.name)]
        rules = None if self.rules.start is None else self.rules
        steps = generation.steps(model, begin, chosen, max_tokens=max_tokens, context=self.context, rules=rules)
        return generation.stream(steps, self._detokenizer(), prompt_tokens=len(ids), ends=ends, stop=stop)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.rules.ends if self.tokenizer is None else tuple(self.tokenizer.eos_ids)

    def translate(
        self,
        texts: str | Sequence[str],
        *,
        beams: int | None = None,
        max_tokens: int | None = None,
        truncate: bool = False,
        batch: int = 32,
        progress: Callable[[int, int], None] | None = None,
        **search: Any,
    ) -> str | list[str]:
        """The translation of a text, or of each of a list: what an encoder-decoder writes when it has read them.

        `beams`, and in `search` penalty= and early=, are the checkpoint's own where they are not given; max_tokens is the checkpoint's,
        else twice the source and 20. A list goes through in batches of like length. `progress(done, total)` counts texts. Raises InputError
        for an empty text, and for one that is too long unless `truncate` is set, which warns of what it cut.
        """
        if not isinstance(self.model, EncoderDecoder):
            raise InputError(f"a {self.family.name} model of this form does not translate: it writes no target beside a source")
        many = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(many):
            if not text.strip():
                raise InputError(f"text {i} is empty")
        rows = tasks.within([self.encode(text) for text in many], self.context, truncate, len(self._tokenizer().after))
        found = self._search(rows, self._plan(max_tokens, self.rules.beams if beams is None else beams, **search), batch, progress)
        return found[0].text if isinstance(texts, str) else [g.text for g in found]

    def _plan(
        self, max_tokens: int | None, beams: int, penalty: float | None = None, early: bool | str | None = None, ignore_end: bool = False
    ) -> Callable[[int], Plan]:
        """The search for a prompt of a given length."""
        rules = self.rules
        stop = rules.early if early is None else Early(early)
        ends = () if ignore_end else self.ends

        def plan(length: int) -> Plan:
            most = rules.most or 2 * length + 20 if max_tokens is None else max_tokens
            given = 1 if isinstance(self.model, EncoderDecoder) else length
            room = most if self.context is None else min(most, self.context - given)
            # One beam goes on as greedy decoding does: to its first end.
            return Plan(beams=beams, max_tokens=room, ends=ends, penalty=rules.penalty if penalty is None else penalty,
                        early=Early.FIRST if beams == 1 else stop, rules=rules)

        return plan

    def _search(
        self, rows: list[list[int]], plan: Callable[[int], Plan], batch: int, progress: Callable[[int, int], None] | None = None
    ) -> list[Generation]:
        """The best continuation of each row; sources of an encoder-decoder go in batches of like length, other prompts one by one."""
        for row in rows:
            generation.check_length(len(row), self.context)
        out: dict[int, Generation] = {}
        for group in by_length(rows, batch if isinstance(self.model, EncoderDecoder) else 1):
            ids, mask = padded([rows[i] for i in group], next(self.model.parameters()).device)
            with torch.inference_mode():
                model, begin = self._predictor(), ids
                if isinstance(model, EncoderDecoder):
                    model, begin = model.given(ids, mask), torch.full((len(ids), 1), start_of(self.rules, self.family.name))
            chosen = plan(ids.shape[1])
            for i, beams in zip(group, search(model, begin, chosen), strict=True):
                out[i] = self._finished(list(beams[0].ids), len(rows[i]), chosen.ends)
            if progress is not None:
                progress(len(out), len(rows))
        return [out[i] for i in range(len(rows))]

    def _finished(self, new: list[int], prompt: int, ends: tuple[int, ...]) -> Generation:
        ended = bool(new) and new[-1] in ends
        text = "" if self.tokenizer is None else self.tokenizer.decode(new[:-1] if ended else new)
        return Generation(text, new, "stop" if ended else "length", Usage(prompt, len(new)))

    def _predictor(self) -> Any:
        if not (hasattr(self.model, "cache") and (hasattr(self.model, "hidden") or isinstance(self.model, EncoderDecoder))):
            raise InputError(f"a {self.family.name} model of this form predicts no next token; load its language-model form to generate")
        return self.model

    def _reader(self) -> tasks.Reader:
        """What reads texts for the tasks."""
        return lowered if isinstance(lowered := self.lowered(), NativeEncoder) else self.model

    def lowered(self) -> NativeModel | NativeEncoder | None:
        """The model in the native core, where it runs there and nobody listens to its insides."""
        return self._model.native() if isinstance(self._model, Lowerable) and not listened() else None

    def runner(self, pages: int) -> nn.Module | NativeRunner:
        """What an engine runs whose cache has so many pages of 16 tokens: the native core where the decoder lowers, else the module."""
        lowered = self._model.runner(pages) if isinstance(self._model, Lowerable) else None
        return self.model if lowered is None else lowered

    def why_not(self) -> str:
        """Why the model does not run in the native core; empty where it does."""
        if not isinstance(self._model, Lowerable):
            return "it is no decoder or encoder on a CPU in float32"
        return "" if self.lowered() is not None else self._model.why or "its module was opened"

    def embed(
        self, texts: str | Sequence[str], *, truncate: bool = False, batch: int = 32, progress: Callable[[int, int], None] | None = None
    ) -> torch.Tensor:
        """A vector for each text [n d], pooled and normalised as the checkpoint declares; the mean of the last states where it declares
        nothing.

        Raises InputError for an empty text, and for one that is too long unless `truncate` is set, which warns of what it cut.
        """
        pooling = self.pooling or Pooling()
        many = [texts] if isinstance(texts, str) else texts
        return tasks.embed(
            self._reader(), self._tokenizer(), many, pooling, limit=self.limit, truncate=truncate, batch=batch, progress=progress
        )

    @property
    def limit(self) -> int | None:
        """The longest text in tokens that `embed` reads whole; None where there is no limit."""
        limits = [n for n in (self.context, self.pooling and self.pooling.limit) if n is not None]
        return min(limits) if limits else None

    def fill_mask(self, text: str, *, top: int = 5) -> list[list[tasks.Fill]]:
        """The likeliest words for each mask in the text, such as "Paris is the [MASK] of France."."""
        return tasks.fill_mask(self._reader(), self._tokenizer(), text, top=top, limit=self.context)

    def classify(self, texts: str | Sequence[str | tuple[str, str]], *, truncate: bool = False, batch: int = 32) -> list[tasks.Label]:
        """The class of each text, or of each pair (first, second)."""
        many = [texts] if isinstance(texts, str) else texts
        return tasks.classify(self._reader(), self._tokenizer(), many, self.labels, limit=self.context, truncate=truncate, batch=batch)

    def tag(self, text: str) -> list[tasks.Tag]:
        """The class of each word of a text, with the characters where it stands."""
        return tasks.tag(self._reader(), self._tokenizer(), text, self.labels, limit=self.context)

    def answer(self, question: str, context: str, *, stride: int = 128) -> tasks.Answer:
        """The span of the context that answers the question; a long context is read in windows that overlap by `stride` tokens."""
        return tasks.answer(self._reader(), self._tokenizer(), question, context, limit=self.context, stride=stride)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes that this model scores."""
        return getattr(self.spec, "labels", ())


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    ignore: Sequence[str] = (),
    fast: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A model from a folder, a GGUF file, a bundled name or a hub id.

    `dtype` None keeps the stored type; `ignore` names configuration fields that you know to change nothing; `fast` lets the native core
    multiply quantised weights with activations rounded to 8 bits; `progress(done, total)` counts tensors. Raises SourceError,
    ConfigError, CheckpointError, MappingError, NumericsError or TokenizerError, each with the file, the field, and what was expected.
    """
    found = reader.describe(source, ignore)
    native = torch.device(device or "cpu").type == "cpu" and dtype in (None, torch.float32) and Lowerable.fits(found)
    opened = partial(reader.load, found, dtype, device, progress)
    model = Lowerable(found, opened, fast=fast) if native else opened()
    return Model(model, found.family, found.form, found.spec, tokenizer_of(found), str(source), rules_of(found), pooling_of(found))


def rules_of(source: reader.Source) -> Rules:
    """What a checkpoint's configurations say about generation."""
    beside = source.path / "generation_config.json"
    return Rules.read(source.config, reader.read_json(beside) if source.path.is_dir() and beside.exists() else {})


def pooling_of(source: reader.Source) -> Pooling | None:
    """How a sentence encoder's folder says that states become a vector."""
    return Pooling.of(source.path) if source.path.is_dir() else None


def tokenizer_of(source: reader.Source) -> Tokenizer | None:
    """The tokenizer that lies with a checkpoint; None where there is none."""
    if source.path.suffix == ".gguf":
        return Tokenizer.from_gguf(dict(source.metadata)) if "tokenizer.ggml.tokens" in source.metadata else None
    return Tokenizer.from_folder(source.path) if present(source.path) else None


def save(m: Model, folder: str | Path, *, coded: Mapping[str, Stored] | None = None) -> Path:
    """Writes a folder that Hugging Face transformers loads as it is, and that `load` gives back with equal numbers. A family that nobody
    published, such as a recurrent network, is written under this library's own names, which only `load` reads.

    With the `coded` parameters that `adapters.quantize` returned, the folder holds these bytes, and only `load` reads it.
    """
    form = form_for(m.family, m.spec, m.form)
    ends = list(m.ends)
    # Readers of an encoder-decoder put its padding into its table, so there "none" is said too.
    two_sided = {"is_encoder_decoder": True, "pad_token_id": None} if isinstance(m.model, BareEncoderDecoder) else {}
    extra: dict[str, Any] = two_sided | m.rules.ids()
    if m.tokenizer is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        m.tokenizer.save(folder)
        extra |= {
            "bos_token_id": m.tokenizer.bos_id,
            "eos_token_id": (ends[0] if len(ends) == 1 else ends) or None,
            "pad_token_id": m.tokenizer.pad_id,
        }
    written = write(m.model, m.family, form, m.spec, folder, extra, coded)
    if m.pooling is not None:
        m.pooling.write(written, getattr(m.spec, "dim", 0))
    if m.rules.start is not None:
        with atomic(written / "generation_config.json") as out:
            out.write(reader.dumps(m.rules.write()).encode())
    return written
