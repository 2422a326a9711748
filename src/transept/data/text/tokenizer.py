"""Text to token ids and back, for every published tokenizer file. Lecture rows 28 (tokenisation) and 53 ([CLS], [SEP], segments).

`tokenizer.json` is read as it is and never derived again from a class name, so ids are the publisher's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transept.core.errors import TokenizerError, nearest
from transept.data.text import marian, native, rebuild, sentencepiece, stream, template

NAMES = ("bos", "eos", "unk", "pad", "mask", "sep", "cls")
FILES = ("tokenizer.json", "vocab.json", "encoder.json", "vocab.txt")
MODELS = {
    "t5": ("spiece.model", sentencepiece.t5),
    "deberta-v2": ("spm.model", sentencepiece.deberta),
    "albert": ("spiece.model", sentencepiece.albert),
    "big_bird": ("spiece.model", sentencepiece.big_bird),
    "xlm-roberta": ("sentencepiece.bpe.model", sentencepiece.xlm_roberta),
}
"""SentencePiece's file by the kind of model, and how it is read: pieces and marks differ from kind to kind."""
# What the models of these kinds call their special pieces where their folders do not say it.
_BERT = {"bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]", "sep": "[SEP]", "cls": "[CLS]"}
USUAL = {
    "t5": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
    "deberta-v2": {**_BERT, "unk": "[UNK]", "pad": "[PAD]"},
    "albert": {**_BERT, "unk": "<unk>", "pad": "<pad>"},
    "big_bird": {**_BERT, "bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
    "xlm-roberta": {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>", "sep": "</s>", "cls": "<s>"},
}


class Tokenizer:
    """Token ids of one checkpoint. Made by `from_folder`, `from_gguf` or `train_bpe`; holds no state between calls."""

    def __init__(
        self,
        source: Mapping[str, Any],
        names: Mapping[str, int],
        *,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        context: int | None = None,
        where: str = "tokenizer",
        numbers: marian.Numbers | None = None,
    ) -> None:
        self.source = dict(source)
        self.where = where
        self.numbers = numbers
        built = native.build(self.source, where)
        self.native: Any = built if numbers is None else marian.Renumbered(built, numbers)
        self.named = dict(names)
        self.chat_template = chat_template
        self.context = context
        first = (names["eos"],) if "eos" in names else ()
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*first, *eos_ids)))
        added = self.source.get("added_tokens") or ()
        self.specials = frozenset(t["id"] for t in added if t.get("special")) | frozenset(self.named.values())
        self.natural = self.fallback()
        self.largest = max(self.native.get_vocab(with_added_tokens=True).values())
        self.before, self.after = self.bookends()
        self.literal = None

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder: `tokenizer.json`, or GPT-2's two files, or BERT's `vocab.txt`, or SentencePiece's models as
        T5, ALBERT, BigBird, DeBERTa, XLM-R and Marian have them.

        Errors: TokenizerError naming the file where nothing is there or something is damaged.
        """
        folder = Path(path)
        config = optional(folder / "tokenizer_config.json")
        if marian.fits(folder):
            source, numbers = marian.read(folder)
            longest = limit(config.get("model_max_length"))
            return cls(source, numbers.names, eos_ids=stops_of(folder), context=longest, where=str(folder), numbers=numbers)
        source = read_source(folder, config)
        usual = {} if (folder / "tokenizer.json").is_file() else USUAL.get(kind_of(folder), {})
        texts = usual | special_texts(config, optional(folder / "special_tokens_map.json"))
        ids = {token["content"]: token["id"] for token in source.get("added_tokens") or ()}
        vocab = source["model"].get("vocab") if isinstance(source.get("model"), Mapping) else None
        known = (dict(vocab) if isinstance(vocab, Mapping) else {}) | ids
        if isinstance(vocab, list):
            known = {row[0]: n for n, row in enumerate(vocab) if isinstance(row, list) and row and isinstance(row[0], str)} | ids
        names = {name: known[text] for name, text in texts.items() if text in known}
        marked = {names[name] for name in names}
        source["added_tokens"] = mark_special(source.get("added_tokens") or [], {n: t for t, n in known.items() if n in marked})
        if not (folder / "tokenizer.json").is_file():
            override_ends(source, config, names, {n: t for t, n in known.items() if n in marked})
        return cls(
            source,
            names,
            eos_ids=stops_of(folder),
            chat_template=read_template(folder, config),
            context=limit(config.get("model_max_length")),
            where=str(folder),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str = "GGUF metadata") -> Tokenizer:
        """The tokenizer that a GGUF file describes in `tokenizer.ggml.*` (models gpt2, llama, bert). Errors: TokenizerError."""
        source, names, stops = rebuild.from_gguf(metadata)
        if "bert" == rebuild.field(metadata, "model"):
            names = {t["content"][1:-1].lower(): t["id"] for t in source["added_tokens"]} | names
        context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        template = metadata.get("tokenizer.chat_template")
        chosen = template if isinstance(template, str) else None
        return cls(source, names, eos_ids=stops, chat_template=chosen, context=limit(context), where=where)

    def fallback(self) -> int | None:
        """The id that the model itself gives to what it does not know; plain text may contain it."""
        if self.numbers is not None:
            return self.numbers.names["unk"]
        model = self.source["model"]
        unk = model.get("unk_token")
        return model.get("unk_id") if unk is None else self.native.token_to_id(unk)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.largest + 1

    @property
    def bos_id(self) -> int | None:
        return self.named.get("bos")

    @property
    def unk_id(self) -> int | None:
        return self.named.get("unk")

    @property
    def pad_id(self) -> int | None:
        return self.named.get("pad")

    @property
    def mask_id(self) -> int | None:
        return self.named.get("mask")

    @property
    def cls_id(self) -> int | None:
        return self.named.get("cls")

    @property
    def sep_id(self) -> int | None:
        return self.named.get("sep")

    def token(self, id: int) -> str:
        """The text of one token as its vocabulary spells it. Errors: TokenizerError for an id outside the vocabulary."""
        found = self.native.id_to_token(id) if 0 <= id <= self.largest else None
        if found is None:
            raise TokenizerError(f"{self.where}: token id {id}; an id from 0 to {self.largest} was expected")
        return found

    def id(self, token: str) -> int:
        """The id of one token. Errors: TokenizerError with the nearest token."""
        found = self.native.token_to_id(token)
        if found is None:
            near = nearest(token, (t for t in self.native.get_vocab() if abs(len(t) - len(token)) < 3 and t[:1] == token[:1]))
            raise TokenizerError(f"{self.where}: no token {token!r} in the vocabulary{near}")
        return found

    def encode(self, text: str, *, specials: bool = True, parse_specials: bool = False) -> list[int]:
        """Ids of a text.

        specials: add what the checkpoint puts around a text (a beginning, [CLS] and [SEP]); a second beginning is never added.
        parse_specials: let `<|im_end|>` and the like inside the text become control tokens; otherwise they are ordinary text.
        A byte that the publisher's vocabulary lacks (SmolLM2 has no U+0004, for one) is left out, as the publisher leaves it out.
        """
        ids = self.core(text, parse_specials)
        if not specials:
            return ids
        before = self.before
        if before and ids[: len(before)] == list(before):
            before = ()
        after = () if self.after and tuple(ids[-len(self.after) :]) == self.after else self.after
        return [*before, *ids, *after]

    def encode_batch(self, texts: Iterable[str], *, specials: bool = True, parse_specials: bool = False) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text, specials=specials, parse_specials=parse_specials) for text in texts]

    def encode_pair(self, a: str, b: str) -> tuple[list[int], list[int]]:
        """(ids, segments) of two texts: BERT's `[CLS] a [SEP] b [SEP]` with 0 up to the first [SEP] and 1 after it."""
        with native.boundary(self.where):
            found = self.native.encode(a, b)
            if any(self.smuggled(text, self.native.encode(text, add_special_tokens=False).ids) for text in (a, b)):
                found = self.plain().encode(a, b)
        return list(found.ids), list(found.type_ids)

    def decode(self, ids: Sequence[int], skip_specials: bool = True) -> str:
        """The text of ids. Errors: TokenizerError for an id outside the vocabulary."""
        for n in ids:
            if not 0 <= n <= self.largest:
                raise TokenizerError(f"{self.where}: token id {n}; an id from 0 to {self.largest} was expected")
        kept = [int(n) for n in ids if not (skip_specials and n in self.specials)]
        return self.spelled(kept) if self.numbers is None else self.spelled(kept).rstrip()

    def spelled(self, ids: Sequence[int]) -> str:
        """The text of ids that are there; Marian's with the spaces at its end."""
        with native.boundary(self.where):
            return self.native.decode(list(ids), skip_special_tokens=False)

    def stream(self, skip_specials: bool = True) -> stream.Stream:
        """An incremental decoder: `push(id)` gives the text that became complete, `finish()` the rest."""
        skipped = self.specials if skip_specials else frozenset()
        decoder = self.source.get("decoder") or {}
        if decoder.get("type") == "ByteLevel":
            return stream.ByteStream(self.token, skipped)
        held = frozenset(n for text, n in self.native.get_vocab().items() if len(text) == 6 and text[:3] == "<0x" and text[5] == ">")
        return stream.WindowStream(self.spelled, held, skipped)

    def texts(self) -> dict[str, str]:
        """`{"bos_token": "<s>", ...}` as chat templates expect it."""
        return {f"{name}_token": self.token(self.named[name]) for name in NAMES if name in self.named}

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation under this checkpoint's chat template (`template.render`). Errors: TokenizerError where it has none."""
        if self.chat_template is None:
            raise TokenizerError(f"{self.where}: has no chat template; use generate with a plain prompt")
        settings: dict[str, Any] = {**self.texts(), **options}
        return template.render(self.chat_template, messages, **settings)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Ids of a rendered conversation: control tokens come from the template only, never from what somebody wrote.

        Each special token inside a message is fenced with private-use characters before rendering and encoded as plain text.
        """
        special = [self.token(n) for n in self.specials]
        written = json.dumps(list(messages), ensure_ascii=False, default=str)
        fence = next(chr(n) for n in range(0xF0000, 0xFFFFE) if chr(n) not in written and chr(n) not in (self.chat_template or ""))

        def fenced(value: Any) -> Any:
            if isinstance(value, str):
                for text in sorted((t for t in special if t in value), key=len, reverse=True):
                    value = fence.join(part if k % 2 else part.replace(text, fence + text + fence) for k, part in fences(value, fence))
                return value
            if isinstance(value, Mapping):
                return {key: fenced(inner) for key, inner in value.items()}
            return [fenced(inner) for inner in value] if isinstance(value, (list, tuple)) else value

        rendered = self.render([fenced(message) for message in messages], **options)
        ids: list[int] = []
        for k, part in fences(rendered, fence):
            ids += self.core(part, parse_specials=not k % 2) if part else []
        before = () if ids[: len(self.before)] == list(self.before) else self.before
        return [*before, *ids]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers and vLLM load them; Marian's three files
        as they were found."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if self.numbers is not None:
            for name, content in self.numbers.files.items():
                (target / name).write_bytes(content)
            marks = {"tokenizer_class": "MarianTokenizer"} | ({} if self.context is None else {"model_max_length": self.context})
            (target / "tokenizer_config.json").write_text(json.dumps(marks, indent=2) + "\n", encoding="utf-8")
            return
        (target / "tokenizer.json").write_text(json.dumps(self.source, ensure_ascii=False, indent=1), encoding="utf-8")
        texts = self.texts()
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **texts}
        if self.context is not None:
            config["model_max_length"] = self.context
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if len(self.eos_ids) > 1:
            config["eos_token_ids"] = list(self.eos_ids)
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", texts)):
            (target / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def core(self, text: str, parse_specials: bool) -> list[int]:
        """Ids without anything around them."""
        if not isinstance(text, str):
            raise TokenizerError(f"{self.where}: a {type(text).__name__} was found where a text was expected")
        with native.boundary(self.where):
            ids = self.native.encode(text, add_special_tokens=False).ids
            if not parse_specials and self.smuggled(text, ids):
                ids = self.plain().encode(text, add_special_tokens=False).ids
        return list(ids)

    def smuggled(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a special token was written out in the text."""
        if self.specials.intersection(ids) - {self.natural}:
            return True
        return self.natural is not None and self.natural in ids and self.token(self.natural) in text

    def plain(self) -> Any:
        """A second native tokenizer whose special tokens cannot be written: their spellings are replaced in the vocabulary."""
        if self.numbers is not None:
            return self.native
        if self.literal is None:
            source = json.loads(json.dumps(self.source))
            model, hidden = source["model"], self.specials - {self.natural}
            rest = [t for t in source.get("added_tokens") or () if t["id"] not in self.specials]
            added = {t["id"]: t["content"] for t in source.get("added_tokens") or ()}
            if isinstance(model["vocab"], dict):
                model["vocab"] = {(f"\U000f0000{n}" if n in hidden else t): n for t, n in model["vocab"].items()}
                taken = set(model["vocab"].values())
                model["vocab"] |= {f"\U000f0000{n}": n for n in added if n in hidden and n not in taken}
            else:
                model["vocab"] = [[f"\U000f0000{n}" if n in hidden else t, s] for n, (t, s) in enumerate(model["vocab"])]
            source["added_tokens"] = rest
            self.literal = native.build(source, self.where)
        return self.literal

    def bookends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts before and after one text."""
        with native.boundary(self.where):
            probes = ("a", " ", *(self.native.decode([n], skip_special_tokens=True) for n in range(min(self.largest + 1, 300))))
            found = next((text for text in probes if self.native.encode(text, add_special_tokens=False).ids), None)
            if found is None:
                return (), ()
            core = self.native.encode(found, add_special_tokens=False).ids
            full = self.native.encode(found, add_special_tokens=True).ids
        for start in range(len(full) - len(core) + 1):
            if full[start : start + len(core)] == core:
                return tuple(full[:start]), tuple(full[start + len(core) :])
        raise TokenizerError(f"{self.where}: field post_processor changes the tokens of the text itself")


def fences(text: str, fence: str) -> Iterable[tuple[int, str]]:
    """The parts between fences: even ones are the template's, odd ones are literal."""
    return enumerate(text.split(fence))


def optional(path: Path) -> dict[str, Any]:
    """A JSON mapping, or {} where the file is absent."""
    if not path.is_file():
        return {}
    found = native.read_json(path)
    if not isinstance(found, dict):
        raise TokenizerError(f"{path}: a {type(found).__name__} was found where a mapping was expected")
    return found


def stops_of(folder: Path) -> list[int]:
    """The ids that end a text, as the folder's configurations say."""
    found = (optional(folder / "generation_config.json") or optional(folder / "config.json")).get("eos_token_id")
    return [n for n in (found if isinstance(found, list) else [found]) if isinstance(n, int)]


def present(folder: Path) -> bool:
    """Whether a folder has a tokenizer that `from_folder` reads."""
    model = MODELS.get(kind_of(folder))
    return any((folder / name).is_file() for name in (*FILES, *(model or ())[:1]))


def kind_of(folder: Path) -> str:
    """The kind of model that a folder's configuration names."""
    return str(optional(folder / "config.json").get("model_type"))


def limit(value: Any) -> int | None:
    """A context length; None where the file says nothing or writes a number that stands for no limit."""
    return int(value) if isinstance(value, (int, float)) and 0 < value < 1 << 40 else None


def text_of(value: Any) -> str | None:
    """A token's text, which files write as a string or as a mapping with `content`."""
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) else None


def special_texts(config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, str]:
    """{"bos": "<s>", ...} from the two files; tokenizer_config.json has the last word, also where it says null."""
    found = {}
    for name in NAMES:
        key = f"{name}_token"
        text = text_of(config[key] if key in config else special.get(key))
        if text:
            found[name] = text
    return found


def mark_special(added: list[Any], texts: Mapping[int, str]) -> list[Any]:
    """Named special tokens are added tokens, whether or not tokenizer.json lists them."""
    have = {token["id"] for token in added}
    return [*added, *rebuild.added((n, text, True) for n, text in texts.items() if n not in have)]


def override_ends(source: dict[str, Any], config: Mapping[str, Any], names: Mapping[str, int], texts: Mapping[int, str]) -> None:
    """Honour add_bos_token / add_eos_token of a rebuilt vocabulary; a tokenizer.json says itself what it puts around a text."""
    if source.get("post_processor") is not None:
        return
    before, after = ((texts[names[e]], names[e]) if config.get(f"add_{e}_token") is True and e in names else None for e in ("bos", "eos"))
    source["post_processor"] = rebuild.bookends(before, after)


def read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the field of tokenizer_config.json; of several named ones the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 4 * template.SOURCE:
            raise TokenizerError(f"{path}: {path.stat().st_size} bytes; at most {4 * template.SOURCE} are allowed")
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {row.get("name"): row.get("template") for row in found if isinstance(row, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def read_source(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json mapping of a folder, read or rebuilt."""
    if (folder / "tokenizer.json").is_file():
        found = native.read_json(folder / "tokenizer.json", native.LARGEST)
        native.check(found, str(folder / "tokenizer.json"))
        return found
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return read_pairs(folder / vocab, folder / merges, config)
    if (folder / "vocab.txt").is_file():
        path = folder / "vocab.txt"
        if path.stat().st_size > native.LARGEST >> 4:
            raise TokenizerError(f"{path}: {path.stat().st_size} bytes; a word list was expected")
        words = path.read_text(encoding="utf-8").split("\n")
        vocab = {word.rstrip("\r"): n for n, word in enumerate(words[:-1] if words[-1] == "" else words)}
        return rebuild.word_pieces(vocab, lower=config.get("do_lower_case", True) is not False)
    name, rebuilt = MODELS.get(kind_of(folder), ("", sentencepiece.t5))
    if name and (folder / name).is_file():
        return rebuilt(sentencepiece.read(folder / name), config)
    raise TokenizerError(f"{folder}: no tokenizer; one of tokenizer.json, vocab.json with merges.txt, vocab.txt was expected")


def read_pairs(vocab_path: Path, merges_path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2's layout, or the first GPT's where words end in `</w>`."""
    vocab = native.read_json(vocab_path, native.LARGEST >> 2)
    if not isinstance(vocab, dict) or not all(isinstance(n, int) for n in vocab.values()):
        raise TokenizerError(f"{vocab_path}: a mapping from tokens to ids was expected")
    if merges_path.stat().st_size > native.LARGEST >> 2:
        raise TokenizerError(f"{merges_path}: {merges_path.stat().st_size} bytes; a list of merges was expected")
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    if any(token.endswith("</w>") for token in vocab):
        if "<|startoftext|>" in vocab:
            raise TokenizerError(f"{vocab_path}: CLIP's vocabulary; its tokenizer.json was expected beside it")
        return rebuild.gpt1(vocab, merges)
    source = rebuild.byte_pairs(vocab, merges, prefix_space=config.get("add_prefix_space") is True)
    extra = config.get("added_tokens_decoder")
    rows = {int(n): text_of(t) for n, t in extra.items() if str(n).isdigit()} if isinstance(extra, Mapping) else {}
    rows |= {vocab[text]: text for text in ("<|endoftext|>",) if text in vocab}
    source["added_tokens"] = rebuild.added((n, text, True) for n, text in rows.items() if text)
    return source
