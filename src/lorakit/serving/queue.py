"""The waiting requests, in an order that is fair to every adapter."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out within a key; the keys take turns. So a key with many items delays the others by one."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        return (item for line in self._lines.values() for item in line)

    def put(self, key: str, item: T) -> None:
        """Add an item."""
        self._lines.setdefault(key, deque()).append(item)
        self._size += 1

    def turns(self) -> Iterator[T]:
        """Yield the first item of each key, in the order of their turns."""
        return (line[0] for line in list(self._lines.values()))

    def take(self, item: T) -> None:
        """Remove an item that `turns` yielded. Its key has its next turn after all others."""
        for key, line in self._lines.items():
            if line[0] is item:
                line.popleft()
                self._lines.move_to_end(key)
                self._size -= 1
                if not line:
                    del self._lines[key]
                return
        raise ValueError("the item is not the first of its key")

    def remove_where(self, condition: Callable[[T], bool]) -> list[T]:
        """Remove and return all items that meet a condition, which may change meanwhile in another thread."""
        removed = [item for item in self if condition(item)]
        if removed:
            gone = {id(item) for item in removed}
            for key, line in list(self._lines.items()):
                self._lines[key] = deque(item for item in line if id(item) not in gone)
                if not self._lines[key]:
                    del self._lines[key]
            self._size -= len(removed)
        return removed
