"""Standard error of a run, whose terminal or reader can end before the run does."""

from __future__ import annotations

import errno
import os
import sys
from typing import IO, Any, cast


def error_output() -> IO[str] | None:
    """Return standard error, which drops text once its terminal or pipe is closed; None if the process has none.

    Ctrl-C in ``lorakit train 2>&1 | tee log`` ends tee before the run prints what it does.
    """
    return None if sys.stderr is None else cast(IO[str], _Terminal(sys.stderr))


class _Terminal:
    """A stream on which writing does not fail after its terminal or the reader of its pipe has gone."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self, error: OSError) -> None:
        """Redirect the stream to the null device if `error` is of a closed terminal or pipe, else raise the error."""
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise error
        # With its buffer: if Python cannot flush it at exit, it replaces the exit status by 120.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
