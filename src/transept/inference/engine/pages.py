"""The page table: which pages of the cache are free, which are shared, and which still hold a prefix that somebody may ask for again.

Pages are numbers from 1 on; page 0 belongs to nobody and holds zeros. Nothing here knows what a page contains
(Kwon et al. 2023, arXiv 2309.06180, section 4; row 82d).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from transept.core.errors import InputError

Key = bytes


def chain(salt: str, tokens: Sequence[int], size: int, known: Sequence[Key] = ()) -> list[Key]:
    """One key for each full page of tokens; a key stands for the salt and every token up to the page's end, so equal keys are equal
    prefixes.

    `known` are the keys of the first pages, which are not worked out again. sha256: tenants cannot make a prefix of another's collide.
    """
    keys = list(known)
    before = keys[-1] if keys else hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    for at in range(len(keys) * size, len(tokens) - size + 1, size):
        before = hashlib.sha256(before + array("q", tokens[at : at + size]).tobytes()).digest()
        keys.append(before)
    return keys


class Pages:
    """`total` pages of `size` tokens, each free, held by so many requests, or idle: held by none but still findable by its key.

    The sum of the three never changes. Idle pages are given away, the longest unused first, when no free one is left.
    """

    def __init__(self, total: int, size: int):
        if total < 1 or size < 1:
            raise InputError(f"a cache needs at least one page of one token, found {total} pages of {size}")
        self.total, self.size = total, size
        self.free = list(range(total, 0, -1))
        self.held: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.page_of: dict[Key, int] = {}
        self.key_of: dict[int, Key] = {}

    @property
    def available(self) -> int:
        """How many pages `take` could give."""
        return len(self.free) + len(self.idle)

    def needed(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.size)

    def take(self) -> int | None:
        """A page for one request, its content to be cleared; None where all are held."""
        if self.free:
            page = self.free.pop()
        elif self.idle:
            page, _ = self.idle.popitem(last=False)
            self.forget(page)
        else:
            return None
        self.held[page] = 1
        return page

    def match(self, keys: Sequence[Key]) -> list[int]:
        """The pages of the longest run of these keys, from the first on, that are there."""
        found = []
        for key in keys:
            page = self.page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def share(self, pages: Sequence[int]) -> None:
        """One more request holds these pages."""
        for page in pages:
            self.idle.pop(page, None)
            self.held[page] = self.held.get(page, 0) + 1

    def shared(self, page: int) -> bool:
        """True if writing to the page would change what another request reads, now or later: then it must be copied first."""
        return self.held[page] > 1 or page in self.key_of

    def drop(self, pages: Sequence[int], keep: bool = True) -> None:
        """One request holds these pages no longer; with keep=False what they contain is not offered to others."""
        # The last page first, so that of an idle prefix its end is given away before its beginning.
        for page in reversed(pages):
            self.held[page] -= 1
            if not keep:
                self.forget(page)
            if self.held[page] == 0:
                del self.held[page]
                if page in self.key_of:
                    self.idle[page] = None
                else:
                    self.free.append(page)

    def register(self, page: int, key: Key) -> None:
        """The page is full and holds what the key stands for; the first page of a key stays its page."""
        if key not in self.page_of and page not in self.key_of:
            self.page_of[key], self.key_of[page] = page, key

    def forget(self, page: int) -> None:
        """What the page contains is not offered to others any more."""
        key = self.key_of.pop(page, None)
        if key is not None:
            del self.page_of[key]
