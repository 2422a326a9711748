"""Text as it is generated: ids in, complete characters out, and all pieces together are the decoding of all ids."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest from U+0100 on (Radford et al. 2019)."""
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + n): byte for n, byte in enumerate(rest)}


ALPHABET = byte_alphabet()


def token_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a token outside the alphabet stands for its own text."""
    if all(letter in ALPHABET for letter in token):
        return bytes(ALPHABET[letter] for letter in token)
    return token.encode("utf-8")


class ByteStream:
    """Stream over a byte-level vocabulary: bytes are held until they make a character."""

    def __init__(self, token: Callable[[int], str], skipped: frozenset[int]) -> None:
        self.token = token
        self.skipped = skipped
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Sequence[int]) -> str:
        """The text that became complete with `ids`."""
        fresh = [ids] if isinstance(ids, int) else ids
        return self.decoder.decode(b"".join(token_bytes(self.token(n)) for n in fresh if n not in self.skipped))

    def finish(self) -> str:
        """What was still held; bytes that never became a character are U+FFFD."""
        return self.decoder.decode(b"", final=True)


class WindowStream:
    """Stream over any other decoder: new text is what decoding gains behind the last emitted token.

    Byte tokens (`<0x..>`) are held until their run ends, since one bad byte changes how the whole run is written.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], held: frozenset[int], skipped: frozenset[int]) -> None:
        self.decode = decode
        self.held = held
        self.skipped = skipped
        self.ids: list[int] = []
        self.seen = 0

    def push(self, ids: int | Sequence[int]) -> str:
        """The text that became complete with `ids`."""
        pieces = []
        for n in [ids] if isinstance(ids, int) else ids:
            if n in self.skipped:
                continue
            self.ids.append(n)
            if n not in self.held:
                pieces.append(self.gain())
        return "".join(pieces)

    def gain(self) -> str:
        before, after = self.decode(self.ids[: self.seen]) if self.seen else "", self.decode(self.ids)
        self.ids = self.ids[self.seen :] if before or not self.seen else self.ids
        self.seen = len(self.ids)
        return after[len(before) :]

    def finish(self) -> str:
        """What was still held."""
        return self.gain() if len(self.ids) > self.seen else ""


Stream = ByteStream | WindowStream
