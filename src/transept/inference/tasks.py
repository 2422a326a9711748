"""What a trained model is asked for (rows 53, 58-61): text vectors, missing words, classes of texts and words, answers in a passage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from transept.blocks.encoder import MaskedHead, NextHead, PretrainHead, RowHead, SpanHead, TokenHead
from transept.blocks.seq2seq import SentenceHead
from transept.core.errors import InputError, TokenizerError
from transept.core.shapes import Bool, Float, Int, Tensor
from transept.inference.batches import by_length
from transept.inference.plan import NativeEncoder
from transept.inference.pooling import Pooling

Reader = nn.Module | NativeEncoder
Progress = Callable[[int, int], None]
Pair = tuple[str, str]
_NEXT = ("follows", "does not follow")


@runtime_checkable
class Texts(Protocol):
    """What the tasks need of a tokenizer."""

    native: Any
    after: tuple[int, ...]

    @property
    def mask_id(self) -> int | None: ...

    def encode(self, text: str, *, specials: bool = True, parse_specials: bool = False) -> list[int]: ...

    def encode_pair(self, a: str, b: str) -> tuple[list[int], list[int]]: ...

    def decode(self, ids: Sequence[int], skip_specials: bool = True) -> str: ...

    def token(self, id: int) -> str: ...

    def smuggled(self, text: str, ids: Sequence[int]) -> bool: ...

    def plain(self) -> Any: ...


@dataclass(frozen=True)
class Fill:
    """A word for a mask: its token, the text with the mask replaced, and its probability."""

    token: str
    id: int
    score: float
    text: str


@dataclass(frozen=True)
class Label:
    """The likeliest class and its probability, with all of them in `scores`; one class alone is a number, given as it is."""

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Tag:
    """A word, where it stands in the text, and its class by its first piece."""

    word: str
    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True)
class Answer:
    """A span of the context: context[start:end] == text."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Row:
    """A tokenised input: `spans` are the characters of each token, None for special ones; `text` numbers the text that each token is of."""

    ids: list[int]
    segments: list[int]
    spans: list[tuple[int, int] | None]
    text: list[int | None]


def embed(
    model: Reader,
    tokenizer: Texts,
    texts: Sequence[str],
    pooling: Pooling,
    *,
    limit: int | None,
    truncate: bool = False,
    batch: int = 32,
    progress: Progress | None = None,
) -> Float[Tensor, "n d"]:
    """A vector for each text, in the order given; `limit` is the longest input in tokens.

    Texts go through in batches of like length. Raises InputError for an empty text, and for one that is too long unless `truncate` is set,
    which warns of what it cut.
    """
    rows = [_encode(tokenizer, text, i) for i, text in enumerate(texts)]
    rows = within(rows, limit, truncate, len(tokenizer.after))
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    done = 0
    for group in _alike(rows, batch, model):
        ids, mask = _tensors([rows[i] for i in group], _device(model))
        with torch.inference_mode():
            vectors = pooling(_states(model, ids, mask), mask)
        for i, vector in zip(group, vectors, strict=True):
            out[i] = vector
        done += len(group)
        if progress is not None:
            progress(done, len(rows))
    return torch.stack(out).clone() if out else torch.empty(0, getattr(model, "dim", 0))


def fill_mask(model: Reader, tokenizer: Texts, text: str, *, top: int, limit: int | None) -> list[list[Fill]]:
    """The `top` likeliest words for each mask in the text, likeliest first."""
    if top < 1:
        raise InputError(f"top is {top}; at least one word has to be asked for")
    head = _head(model, (MaskedHead, PretrainHead), "fill masks", "masked-language form")
    if tokenizer.mask_id is None:
        raise TokenizerError("this model's tokenizer has no mask token")
    ids = within([tokenizer.encode(text, parse_specials=True)], limit, None, 0)[0]
    where = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    if not where:
        raise InputError(f"the text has no mask: put {tokenizer.token(tokenizer.mask_id)} where a word is wanted")
    with torch.inference_mode():
        states = _states(model, torch.tensor([ids], device=_device(model)), None)
        chances = head(states).logits[0, where].float().softmax(-1)
    best = chances.topk(min(top, chances.shape[-1]))
    return [
        [_filled(tokenizer, ids, at, int(i), float(p)) for p, i in zip(scores, found, strict=True)]
        for at, scores, found in zip(where, best.values, best.indices, strict=True)
    ]


def classify(
    model: Reader,
    tokenizer: Texts,
    texts: Sequence[str | Pair],
    labels: Sequence[str],
    *,
    limit: int | None,
    truncate: bool = False,
    batch: int = 32,
) -> list[Label]:
    """The class of each text, or of each pair of texts; `labels` are the names of the classes."""
    head = _head(model, (RowHead, SentenceHead), "score classes of a text", "classification form")
    names = _NEXT if isinstance(head, NextHead) else tuple(labels) or tuple(f"LABEL_{i}" for i in range(head.out.out_features))
    rows, segments = [], []
    for i, text in enumerate(texts):
        if isinstance(head, NextHead) and isinstance(text, str):
            raise InputError(f"text {i} stands alone, but this model judges pairs: give (first, second)")
        row = Row(_encode(tokenizer, text, i), [], [], []) if isinstance(text, str) else aligned(tokenizer, *text)
        rows.append(row.ids)
        segments.append(row.segments or [0] * len(row.ids))
    cut = within(rows, limit, truncate, len(tokenizer.after))
    segments = [kinds[: len(row)] for kinds, row in zip(segments, cut, strict=True)]
    out: dict[int, Label] = {}
    for group in _alike(cut, batch, model):
        ids, mask = _tensors([cut[i] for i in group], _device(model))
        kinds, _ = _tensors([segments[i] for i in group], _device(model))
        with torch.inference_mode():
            logits = model(ids, mask=mask, segments=kinds).logits.float()
        scores = logits if logits.shape[-1] == 1 else logits.softmax(-1)
        out |= {i: _label(names, row.tolist()) for i, row in zip(group, scores, strict=True)}
    return [out[i] for i in range(len(cut))]


def tag(model: Reader, tokenizer: Texts, text: str, labels: Sequence[str], *, limit: int | None) -> list[Tag]:
    """The class of each word that stands between spaces, read at its first piece (row 60)."""
    _head(model, (TokenHead,), "score classes of words", "token-classification form")
    _encode(tokenizer, text, 0)
    row = aligned(tokenizer, text)
    within([row.ids], limit, None, 0)
    with torch.inference_mode():
        chances = model(torch.tensor([row.ids], device=_device(model))).logits[0].float().softmax(-1)
    best = chances.max(-1)
    words, at = _words(text), 0
    out: list[Tag] = []
    for i, span in enumerate(row.spans):
        if span is None:
            continue
        # A piece may begin with the space before its word.
        first = next((c for c in range(*span) if not text[c].isspace()), None)
        while first is not None and at < len(words) and words[at][1] <= first:
            at += 1
        if first is not None and at < len(words) and words[at][0] <= first and (not out or out[-1].start != words[at][0]):
            start, end = words[at]
            out.append(Tag(text[start:end], start, end, labels[int(best.indices[i])], float(best.values[i])))
    return out


def answer(
    model: Reader,
    tokenizer: Texts,
    question: str,
    context: str,
    *,
    limit: int | None,
    stride: int = 128,
    longest: int = 30,
    batch: int = 8,
) -> Answer:
    """The likeliest span of the context, at most `longest` tokens; a long one is read in windows, `stride` tokens in common (row 59)."""
    head = _head(model, (SpanHead,), "find answers", "question-answering form")
    for i, text in enumerate((question, context)):
        _encode(tokenizer, text, i)
    pieces = windows(aligned(tokenizer, question, context), limit, stride)
    best: tuple[float, Answer] | None = None
    for at in range(0, len(pieces), batch):
        some = pieces[at : at + batch]
        ids, mask = _tensors([w.ids for w in some], _device(model))
        kinds, _ = _tensors([w.segments for w in some], _device(model))
        with torch.inference_mode():
            found = head(_states(model, ids, mask, segments=kinds))
        for window, start, end in zip(some, found.start.float(), found.end.float(), strict=True):
            candidate = _best_span(window, start, end, context, longest)
            if candidate is not None and (best is None or candidate[0] > best[0]):
                best = candidate
    if best is None:
        raise InputError("the context holds no token that could be an answer")
    return best[1]


def aligned(tokenizer: Texts, a: str, b: str | None = None) -> Row:
    """A text or a pair as tokens with the characters that each stands for; special tokens written in a text are ordinary text."""
    texts = (a,) if b is None else (a, b)
    written = any(tokenizer.smuggled(text, tokenizer.native.encode(text, add_special_tokens=False).ids) for text in texts)
    found = (tokenizer.plain() if written else tokenizer.native).encode(*texts)
    spans = [None if text is None else span for span, text in zip(found.offsets, found.sequence_ids, strict=True)]
    return Row(list(found.ids), list(found.type_ids), spans, list(found.sequence_ids))


def _encode(tokenizer: Texts, text: str, number: int) -> list[int]:
    if not text.strip():
        raise InputError(f"text {number} is empty")
    return tokenizer.encode(text)


def within(rows: list[list[int]], limit: int | None, truncate: bool | None, tail: int) -> list[list[int]]:
    """The rows, none longer than the limit; a cut row keeps its last `tail` tokens, which close it. `truncate` None: nothing can be cut."""
    long = [i for i, row in enumerate(rows) if limit is not None and len(row) > limit]
    if not long or limit is None:
        return rows
    first = f"text {long[0]} has {len(rows[long[0]])} tokens, but the model reads at most {limit}"
    if truncate is None:
        raise InputError(f"{first}: shorten it by {len(rows[long[0]]) - limit}")
    if not truncate:
        raise InputError(f"{first}: shorten it, or have its beginning read with truncate=True (--truncate)")
    warnings.warn(f"{len(long)} of {len(rows)} texts were cut to {limit} tokens: {first}", stacklevel=3)
    return [row if len(row) <= limit else [*row[: limit - tail], *(row[-tail:] if tail else [])] for row in rows]


def _alike(rows: Sequence[Sequence[int]], size: int, model: Reader) -> list[list[int]]:
    """The numbers of the rows in batches, longest first; where padding is computed, a batch ends before it is an eighth of a row."""
    if isinstance(model, NativeEncoder):
        return by_length(rows, size)
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if groups and len(groups[-1]) < size and len(rows[i]) * 8 >= len(rows[groups[-1][0]]) * 7:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _tensors(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"] | None]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, None if bool((lengths == longest).all()) else torch.arange(longest, device=device) < lengths[:, None]


def _states(model: Reader, ids: Tensor, mask: Tensor | None, **more: Tensor) -> Tensor:
    """The last states of an encoder, or of a decoder before its head (row 40)."""
    read = getattr(model, "states", None) or getattr(model, "hidden", None)
    if read is None:
        raise InputError("this model has no states of single tokens to make a text's vector of: load an encoder or a decoder")
    return read(ids, mask=mask, **more)


def _head(model: Reader, kinds: tuple[type[nn.Module], ...], what: str, form: str) -> Any:
    head = getattr(model, "head", None)
    if not (hasattr(model, "states") and isinstance(head, kinds)):
        having = "" if head is None else f" with the head {type(head).__name__}"
        raise InputError(f"this model{having} does not {what}: load a checkpoint of the {form}")
    return head


def _filled(tokenizer: Texts, ids: list[int], at: int, id: int, score: float) -> Fill:
    return Fill(tokenizer.token(id), id, score, tokenizer.decode([*ids[:at], id, *ids[at + 1 :]]))


def _label(names: Sequence[str], scores: list[float]) -> Label:
    best = max(range(len(scores)), key=scores.__getitem__)
    return Label(names[best], scores[best], dict(zip(names, scores, strict=True)))


def _words(text: str) -> list[tuple[int, int]]:
    out, at = [], 0
    for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        out.append((start, at))
    return out


def windows(row: Row, limit: int | None, stride: int) -> list[Row]:
    """The row, or as many overlapping rows as its context needs, each with the whole question."""
    inside = [i for i, text in enumerate(row.text) if text == 1]
    if limit is None or len(row.ids) <= limit or not inside:
        return [row]
    head, tail = range(inside[0]), range(inside[-1] + 1, len(row.ids))
    room = limit - len(head) - len(tail)
    if room <= 0:
        raise InputError(
            f"the question has {len(head)} tokens with its marks, but the model reads at most {limit} of question and context together"
        )
    step = max(1, room - min(stride, room // 2))
    out = []
    for at in range(0, max(len(inside) - room, 0) + step, step):
        columns = [*head, *inside[at : at + room], *tail]
        out.append(
            Row(
                [row.ids[i] for i in columns],
                [row.segments[i] for i in columns],
                [row.spans[i] for i in columns],
                [row.text[i] for i in columns],
            )
        )
    return out


def _best_span(window: Row, start: Tensor, end: Tensor, context: str, longest: int) -> tuple[float, Answer] | None:
    """The best pair start <= end within the context of one window: (sum of the two scores, answer)."""
    spans = {i: span for i, span in enumerate(window.spans) if window.text[i] == 1 and span is not None and context[slice(*span)].strip()}
    if not spans:
        return None
    inside = list(spans)
    where = torch.tensor(inside, device=start.device)
    first, last = start[where], end[where]
    gap = where[None, :] - where[:, None]
    total = (first[:, None] + last[None, :]).masked_fill((gap < 0) | (gap >= longest), float("-inf"))
    i, j = divmod(int(total.argmax()), len(inside))
    chance = first.log_softmax(0)[i] + last.log_softmax(0)[j]
    first_character = spans[inside[i]][0]
    text = context[first_character : spans[inside[j]][1]]
    begin = first_character + len(text) - len(text.lstrip())
    return float(total[i, j]), Answer(text.strip(), begin, begin + len(text.strip()), float(chance.exp()))


def _device(model: Reader) -> torch.device:
    return model.device if isinstance(model, NativeEncoder) else next(model.parameters()).device
