"""End a run with a checkpoint after the current step when Ctrl-C, SIGTERM or SIGHUP arrives."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lorakit.training.distributed import Processes
from lorakit.training.terminal import error_output

EXIT_TO_RESUME = 75
"""Exit status after SIGTERM or SIGHUP and a checkpoint: EX_TEMPFAIL of sysexits.h, a failure that a repetition cures.
128 + the signal's number would not tell that the run has saved its work."""

Signals = tuple[int, int]
"""Numbers of processes that have received SIGINT, and SIGTERM or SIGHUP."""

_HANGUP = getattr(signal, "SIGHUP", None)
"""The signal of a closed terminal; Windows has none."""


class Interruption:
    """Records the first SIGINT, SIGTERM or SIGHUP while entered; a second SIGINT or SIGTERM acts at once, as usual.

    SIGHUP means that the terminal was closed. It acts like SIGTERM. A shell and the system both send it, and some
    systems send it after SIGTERM, so another signal may already be recorded.

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
            for number in (signal.SIGINT, signal.SIGTERM, _HANGUP):
                # Respect signals that the parent ignores: nohup, a shell's background job.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(*self._previous)

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
        if self._received is not None:  # SIGHUP, which stays handled
            return
        self._received = signal.SIGTERM if number == _HANGUP else number
        if self._processes.count == 1:
            self._agreed = self._received
        self._restore(signal.SIGINT, signal.SIGTERM)
        self._print(
            f"\n{signal.Signals(number).name}: finishing this step, then writing a checkpoint "
            "(a second Ctrl-C or SIGTERM stops at once)."
        )

    def _print(self, text: str) -> None:
        if self._processes.is_first:
            print(text, file=error_output())

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))
