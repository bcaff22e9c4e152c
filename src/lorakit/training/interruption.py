"""End a run with a checkpoint after the current step when Ctrl-C or SIGTERM arrives."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interruption:
    """Records the first SIGINT or SIGTERM while entered; a second signal acts at once, as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Python allows signal handlers in the main thread only; in other threads the signals act as usual.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Respect signals that the parent ignores: nohup, a shell's background job.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def exit(self, message: str) -> None:
        """Print `message` and exit as the signal would have: KeyboardInterrupt, or the shell's code for SIGTERM."""
        print(message, file=sys.stderr)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _request(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then writing a checkpoint "
            "(send it again to stop at once).",
            file=sys.stderr,
        )

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
