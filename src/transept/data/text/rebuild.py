"""Rebuilds a `tokenizer.json` mapping from older files: GPT-2's vocabulary and merges, BERT's word list, GGUF metadata.

Facts: pre-tokenizer patterns are those of the publishers' own tokenizer.json files, named by llama.cpp's `tokenizer.ggml.pre` ids
(docs/gguf.md of ggml; GPT-2: Radford et al. 2019; Llama 3: Meta 2024; Falcon: TII 2023; DeepSeek-V3: arXiv 2412.19437).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transept.core.errors import TokenizerError, nearest

Json = dict[str, Any]
BYTE_LEVEL: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY: Json = BYTE_LEVEL | {"use_regex": False}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>")


def split(*regexes: str) -> list[Json]:
    """Steps that isolate each match of each pattern, then write bytes as letters."""
    steps = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in regexes]
    return [*steps, BYTES_ONLY]


DIGITS: Json = {"type": "Digits", "individual_digits": True}
THREE_DIGITS: Json = {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False}
FALCON: list[Json] = [{"type": "Punctuation", "behavior": "Contiguous"}, BYTE_LEVEL, {**DIGITS, "individual_digits": False}, THREE_DIGITS]
PRE: dict[str, list[Json]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "gigachat", "jina-v1-en", "jina-v2-code"), [BYTE_LEVEL]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), [DIGITS, BYTE_LEVEL]),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe", "chatglm-bpe"), split(LLAMA3)),
    **dict.fromkeys(("qwen2", "stablelm2", "megrez"), split(QWEN2)),
    "deepseek-v3": split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3),
    "falcon": FALCON,
    "default": split(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3")


def added(entries: Iterable[tuple[int, str, bool]]) -> list[Json]:
    """The added_tokens field: (id, text, special)."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": n, "content": text, **plain, "special": special} for n, text, special in sorted(entries)]


def bookends(before: tuple[str, int] | None, after: tuple[str, int] | None) -> Json | None:
    """The post-processor that puts one token before and one after each text; None where there is neither."""
    ends = [end for end in (before, after) if end]
    if not ends:
        return None

    def around(name: str, kind: int) -> list[Json]:
        first = [{"SpecialToken": {"id": before[0], "type_id": kind}}] if before else []
        last = [{"SpecialToken": {"id": after[0], "type_id": kind}}] if after else []
        return [*first, {"Sequence": {"id": name, "type_id": kind}}, *last]

    tokens = {text: {"id": text, "ids": [n], "tokens": [text]} for text, n in ends}
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1), "special_tokens": tokens}


def pair(cls: str, sep: str, vocab: Mapping[str, int], *, one: bool = False) -> Json:
    """The post-processor of `[CLS] a [SEP] b [SEP]`, with segments 0 and 1 (Devlin et al. 2018); of `<s> a </s></s> b </s>`, with `one`
    segment (Liu et al. 2019)."""
    first = [{"SpecialToken": {"id": cls, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    first.append({"SpecialToken": {"id": sep, "type_id": 0}})
    kind = 0 if one else 1
    second = [{"Sequence": {"id": "B", "type_id": kind}}, {"SpecialToken": {"id": sep, "type_id": kind}}]
    second = [{"SpecialToken": {"id": sep, "type_id": 0}}, *second] if one else second
    known = {text: {"id": text, "ids": [vocab[text]], "tokens": [text]} for text in (cls, sep)}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": known}


def document(model: Json, tokens: list[Json], *, normalizer: Json | None, pre: Json | None, post: Json | None, decoder: Json) -> Json:
    """A whole tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": normalizer,
        "pre_tokenizer": pre,
        "post_processor": post,
        "decoder": decoder,
        "model": model,
    }


def byte_pairs(vocab: Mapping[str, int], merges: Sequence[str], pre: str = "gpt-2", *, prefix_space: bool = False) -> Json:
    """Byte-level BPE (Radford et al. 2019) without special tokens."""
    if pre not in PRE:
        raise TokenizerError(f"tokenizer.ggml.pre is {pre!r}, a pre-tokenizer that is not known{nearest(pre, PRE)}")
    pairs = []
    for n, merge in enumerate(merges):
        left, found, right = merge[1:].partition(" ")
        if not found or not right:
            raise TokenizerError(f"merges[{n}] is {merge[:60]!r}; two tokens with a space between were expected")
        pairs.append([merge[0] + left, right])
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": pre in WHOLE_WORDS, "vocab": dict(vocab), "merges": pairs}
    steps = [step | {"add_prefix_space": prefix_space} if step["type"] == "ByteLevel" else step for step in PRE[pre]]
    split = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    return document(model, [], normalizer=None, pre=split, post=None, decoder=BYTE_LEVEL | {"add_prefix_space": True})


def gpt1(vocab: Mapping[str, int], merges: Sequence[str]) -> Json:
    """The first GPT's BPE over lower-case words that end in `</w>` (Radford et al. 2018)."""
    base = byte_pairs(vocab, merges)
    unk = "<unk>" if "<unk>" in vocab else None
    base["model"] |= {"unk_token": unk, "end_of_word_suffix": "</w>"}
    base["normalizer"], base["pre_tokenizer"] = bert_normalizer(lower=True), {"type": "BertPreTokenizer"}
    return base | {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}


def bert_normalizer(lower: bool) -> Json:
    return {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": lower}


def word_pieces(vocab: Mapping[str, int], lower: bool) -> Json:
    """BERT's WordPiece (Devlin et al. 2018): [CLS] a [SEP] b [SEP] with segments 0 and 1."""
    names = {name: text for name in ("cls", "sep", "unk", "pad", "mask") if (text := f"[{name.upper()}]") in vocab}
    if "unk" not in names:
        raise TokenizerError("the WordPiece vocabulary lacks [UNK]")
    model = {"type": "WordPiece", "unk_token": names["unk"], "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    post = pair(names["cls"], names["sep"], vocab) if "cls" in names and "sep" in names else None
    return document(
        model | {"vocab": dict(vocab)},
        added((vocab[text], text, True) for text in names.values()),
        normalizer=bert_normalizer(lower),
        pre={"type": "BertPreTokenizer"},
        post=post,
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


def scored_pieces(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], prefix_space: bool) -> Json:
    """SentencePiece BPE (Kudo and Richardson 2018) as merges: of all splits of a piece into pieces, the best score goes first."""
    vocab = {text: n for n, text in enumerate(tokens)}
    usable = {text: n for text, n in vocab.items() if kinds[n] in (NORMAL, USER, UNUSED)}
    found = []
    for text, n in usable.items():
        if kinds[n] == USER:
            continue
        for cut in range(1, len(text)):
            left, right = usable.get(text[:cut]), usable.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[n], n, left, right))
    merges = [[tokens[left], tokens[right]] for _, _, left, right in sorted(found)]
    unk = next((text for n, text in enumerate(tokens) if kinds[n] == UNKNOWN), tokens[0])
    model = {"type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": merges}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, space] if prefix_space else [space]
    back = [space | {"pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix_space else []
    decoder = {"type": "Sequence", "decoders": back + strip}
    return document(model, [], normalizer={"type": "Sequence", "normalizers": steps}, pre=None, post=None, decoder=decoder)


def field(metadata: Mapping[str, Any], name: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}", default)


def gguf_tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and kinds of a GGUF vocabulary. Errors: TokenizerError for a missing, doubled or lying list."""
    texts = field(metadata, "tokens")
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise TokenizerError("GGUF metadata: tokenizer.ggml.tokens is missing, or is no list of texts")
    tokens = [text or f"[EMPTY_{n}]" for n, text in enumerate(texts)]
    if len(set(tokens)) != len(tokens):
        twice = next(text for n, text in enumerate(tokens) if text in tokens[:n])
        raise TokenizerError(f"GGUF metadata: tokenizer.ggml.tokens holds {twice[:60]!r} twice")
    kinds = [int(kind) for kind in field(metadata, "token_type", ())] or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise TokenizerError(f"GGUF metadata: {len(kinds)} token types for {len(tokens)} tokens")
    return tokens, kinds


def gguf_ids(metadata: Mapping[str, Any], size: int, model: str) -> dict[str, int]:
    """Named special tokens of a GGUF file: bos, eos, unk, pad, mask, sep, cls, eot, eom."""
    found = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "bert": {}, "gpt2": {}}[model]
    keys = {"unk": "unknown", "pad": "padding", "sep": "seperator"}
    for name in ("bos", "eos", "unk", "pad", "mask", "sep", "cls", "eot", "eom"):
        value = field(metadata, f"{keys.get(name, name)}_token_id")
        if value is None:
            continue
        if not 0 <= int(value) < size:
            raise TokenizerError(f"GGUF metadata: {name} token id {value}; an id below {size} was expected")
        found[name] = int(value)
    return found


def from_gguf(metadata: Mapping[str, Any]) -> tuple[Json, dict[str, int], tuple[int, ...]]:
    """(tokenizer.json mapping, named special ids, ids that end a text) of a GGUF file's `tokenizer.ggml.*` fields."""
    model = field(metadata, "model")
    if model not in ("gpt2", "llama", "bert"):
        raise TokenizerError(f"GGUF metadata: tokenizer.ggml.model is {model!r}; one of 'gpt2', 'llama', 'bert' was expected")
    tokens, kinds = gguf_tokens(metadata)
    names = gguf_ids(metadata, len(tokens), model)
    pre = field(metadata, "pre") or "default"
    if model == "bert":
        source = gguf_words(tokens)
    elif model == "llama":
        scores = [float(score) for score in field(metadata, "scores", ())]
        if len(scores) != len(tokens):
            raise TokenizerError(f"GGUF metadata: {len(scores)} scores for {len(tokens)} tokens")
        source = scored_pieces(tokens, scores, kinds, bool(field(metadata, "add_space_prefix", True)))
    else:
        source = byte_pairs({text: n for n, text in enumerate(tokens)}, field(metadata, "merges", ()), pre)
    if model != "bert":
        special = {n for n, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)}
        users = {n for n, kind in enumerate(kinds) if kind == USER}
        source["added_tokens"] = added((n, tokens[n], n in special) for n in special | users)
        wants = {"bos": model == "llama" or pre in WHOLE_WORDS, "eos": False}
        ends = {end: field(metadata, f"add_{end}_token", wants[end]) for end in ("bos", "eos")}
        before, after = ((tokens[names[end]], names[end]) if ends[end] and end in names else None for end in ("bos", "eos"))
        source["post_processor"] = bookends(before, after)
    controls = {tokens[n]: n for n, kind in enumerate(kinds) if kind == CONTROL}
    stops = [names[name] for name in ("eos", "eot", "eom") if name in names] + [controls[t] for t in TURN_ENDS if t in controls]
    return source, names, tuple(dict.fromkeys(stops))


def gguf_words(tokens: Sequence[str]) -> Json:
    """WordPiece from GGUF's spelling, where a word's first piece begins with U+2581 and later pieces carry no `##`."""
    vocab = {}
    for n, text in enumerate(tokens):
        whole = text.startswith("[") and text.endswith("]") and len(text) > 2
        vocab[text[1:] if text.startswith("▁") else text if whole else "##" + text] = n
    if len(vocab) != len(tokens):
        raise TokenizerError("GGUF metadata: two WordPiece tokens have the same spelling")
    cased = any(letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for text in vocab if text[:1] != "[" for letter in text)
    return word_pieces(vocab, lower=not cased)
