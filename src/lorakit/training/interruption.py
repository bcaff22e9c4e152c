"""End a run with a checkpoint after the current step when Ctrl-C or SIGTERM arrives."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from lorakit.training.distributed import Processes

EXIT_TO_RESUME = 75
"""Exit status after SIGTERM and a checkpoint: EX_TEMPFAIL of sysexits.h, a failure that a repetition cures. 143 (128 +
SIGTERM) would not tell that the run has saved its work."""

Signals = tuple[int, int]
"""Numbers of processes that have received SIGINT, and SIGTERM."""


class Interruption:
    """Records the first SIGINT or SIGTERM while entered; a second signal acts at once, as usual.

    Several processes stop after the same step: the step at whose end all of them learn of the signal (`agree`).
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self._processes = processes or Processes()
        self._received: int | None = None
        self._agreed: int | None = None
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
        """Whether the run has to stop."""
        return self._agreed is not None

    @property
    def received(self) -> Signals:
        """The signal that this process has received."""
        return int(self._received == signal.SIGINT), int(self._received == signal.SIGTERM)

    def agree(self, received: Signals) -> None:
        """Stop if a process has received a signal; `received` is summed over the processes."""
        interrupts, terminations = received
        if interrupts or terminations:
            self._agreed = signal.SIGTERM if terminations else signal.SIGINT

    def exit(self, message: str) -> None:
        """Print `message` and end the run: with KeyboardInterrupt after SIGINT, else with `EXIT_TO_RESUME`."""
        self._print(message)
        if self._agreed == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_TO_RESUME)

    def _request(self, number: int, _: FrameType | None) -> None:
        self._received = number
        if self._processes.count == 1:
            self._agreed = number
        self._restore()
        self._print(
            f"\n{signal.Signals(number).name}: finishing this step, then writing a checkpoint "
            "(send it again to stop at once)."
        )

    def _print(self, text: str) -> None:
        if self._processes.is_first:
            print(text, file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
