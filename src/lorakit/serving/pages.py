"""Pages of the cache for keys and values: which are free, which requests hold them, and which prefixes they contain.

A page holds the keys and values of a fixed number of consecutive tokens, for all layers. A full page is known by a
key: a hash of its tokens and of the key of the page before it. The first page of a request has the salt of its
adapters as that key. So a prefix is reused only under the same content of the same adapters and weights: the keys and
values depend on them as much as on the tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

Key = bytes

ZEROS = 0
"""A page that is never written. Rows that are shorter than their group read its zeros."""


def first_key(salt: str) -> Key:
    """Return what stands for the page before the first one."""
    return hashlib.sha256(salt.encode()).digest()


def next_key(key: Key, tokens: Sequence[int]) -> Key:
    """Return the key of a full page, from the key of the page before it and its tokens."""
    return hashlib.sha256(key + array("q", tokens).tobytes()).digest()


class PagePool:
    """The pages by number: `count` of them, besides `ZEROS`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, ZEROS, -1))
        self._holders: Counter[int] = Counter()
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages that no request holds but whose content is known, the least recently used first."""

    @property
    def available(self) -> int:
        """Number of pages that no request holds."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """Return a page of unknown content, held once; forgets the prefix that was used least recently if needed.

        Raises:
            KeyError: Requests hold all pages.
        """
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self.forget([page])
        self._holders[page] = 1
        return page

    def find(self, key: Key) -> int | None:
        """Return the page of a prefix, or None. `hold` it before the next `take`."""
        return self._page_of.get(key)

    def is_held(self, page: int) -> bool:
        """Return whether a request holds the page."""
        return page in self._holders

    def hold(self, page: int) -> None:
        """Add a holder to a page that `find` returned."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def name(self, page: int, key: Key) -> None:
        """Record the content of a full page. A content that another page has keeps that page."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Remove one holder from each page. Pages of known content stay until their space is needed."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self, pages: Sequence[int]) -> None:
        """Forget the content of held pages, so that no later request reuses it (that of a request that failed)."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]
