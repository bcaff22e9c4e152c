"""End a run with a checkpoint when Ctrl-C, SIGTERM or SIGHUP arrives: after the current batch or step."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from lorakit.training.distributed import Processes
from lorakit.training.terminal import error_output

EXIT_TO_RESUME = 75
"""Exit status after SIGTERM or SIGHUP and a checkpoint: EX_TEMPFAIL of sysexits.h, a failure that a repetition cures.
128 + the signal's number would not tell that the run has saved its work."""

Signals = tuple[int, int]
"""Numbers of processes that have received SIGINT, and SIGTERM or SIGHUP."""

_HANGUP = getattr(signal, "SIGHUP", None)
"""The signal of a closed terminal; Windows has none."""

T = TypeVar("T")


class Interrupted(Exception):
    """A step or an evaluation has ended early, in all processes, because one of them has received a signal."""


@dataclass(frozen=True)
class _Stop:
    """Sent instead of a process's part of an evaluation."""

    received: Signals


class Interruption:
    """Records the first SIGINT, SIGTERM or SIGHUP while entered; a second SIGINT or SIGTERM acts at once, as usual.

    SIGHUP means that the terminal was closed. It acts like SIGTERM. A shell and the system both send it, and some
    systems send it after SIGTERM, so another signal may already be recorded.

    A single process gives up its step after the current batch (`check_alone`). The resumed run repeats the step.
    Several processes stop after the same step: the step at whose end all of them learn of the signal (`agree`). In an
    evaluation, a process that has received a signal leaves its part out (`check`), and the others learn of it when they
    gather the parts (`gather`).
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
                # Respect signals that the parent ignores (nohup, a shell's background job), and handlers of C code, for
                # which Python returns None.
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(*self._previous)

    @property
    def requested(self) -> bool:
        """Whether the run has to stop."""
        return self._agreed is not None

    def received(self) -> Signals:
        """Return (1, 0) after SIGINT, (0, 1) after SIGTERM or SIGHUP, and (0, 0) otherwise."""
        return int(self._received == signal.SIGINT), int(self._received == signal.SIGTERM)

    def agree(self, received: Signals) -> None:
        """Stop if a process has received a signal; `received` is summed over the processes."""
        interrupts, terminations = received
        if interrupts or terminations:
            self._agreed = signal.SIGTERM if terminations else signal.SIGINT

    def check(self, *_: object) -> None:
        """Raise Interrupted in all processes of an evaluation if this one has received a signal."""
        received = self.received()
        if any(received):
            self.gather(_Stop(received))

    def check_alone(self) -> None:
        """Raise Interrupted in a step if this process is the only one and has received a signal."""
        if self._processes.count == 1:
            self.check()

    def gather(self, part: T) -> list[T]:
        """Return the parts of all processes, by rank.

        Raises:
            Interrupted: A process has received a signal; raised in all processes.
        """
        parts = self._processes.gather(part)
        stops = [other.received for other in parts if isinstance(other, _Stop)]
        if stops:
            interrupts, terminations = map(sum, zip(*stops, strict=True))
            self.agree((interrupts, terminations))
            raise Interrupted
        return parts

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
        # An error here would end the step. Python refuses to print while a print that the signal interrupted waits for
        # the reader of a full pipe.
        with suppress(Exception):
            self._print(
                f"\n{signal.Signals(number).name}: ending this step or evaluation, then writing a checkpoint "
                "(a second Ctrl-C or SIGTERM stops at once)."
            )

    def _print(self, text: str) -> None:
        if self._processes.is_first:
            print(text, file=error_output())

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))
