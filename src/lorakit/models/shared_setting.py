"""Settings of the process that several open blocks share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SharedSetting:
    """A setting of the process: the first of several open blocks changes it, and the last one restores it.

    `change` changes the setting, and returns the function that restores it.
    """

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change, self._open = change, 0
        self.lock = threading.Lock()
        """Held while the setting changes."""

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Change the setting in a ``with`` block, and restore it when the last open block ends."""
        with self.lock:
            if not self._open:
                self._restore = self._change()
            self._open += 1
        try:
            yield
        finally:
            with self.lock:
                self._open -= 1
                if not self._open:
                    self._restore()
