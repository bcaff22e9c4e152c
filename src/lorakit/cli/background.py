"""Run a command at the lowest priority, and pause it while this machine is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from lorakit.errors import ConfigurationError
from lorakit.storage import is_quiet_asked

IN_BACKGROUND = "LORAKIT_IN_BACKGROUND"
"""Environment variable that is set in a process of `run_in_background`."""
LOWEST = 19
"""Lowest priority of a process."""
POLL = 1.0
"""Seconds between two looks at whether the machine should be quiet."""

_CONTINUE_AT_THE_END = """
import os, signal, sys
sys.stdin.read()
os.killpg(int(sys.argv[1]), signal.SIGCONT)
"""
"""Waits for the end of its standard input, and continues a stopped process group."""


def run_in_background(command: Sequence[str]) -> int:
    """Run a command in a process of its own; return its exit status.

    The process has the lowest priority. It is stopped as a whole, in training and in scoring, while another process
    asks for quiet (`lorakit.storage.quiet`). SIGINT, SIGTERM and SIGHUP (a closed terminal) are passed on to it, so
    it saves its work. It goes on if this process is killed.

    Raises:
        ConfigurationError: The system cannot stop a process (Windows).
    """
    if not hasattr(signal, "SIGSTOP"):
        raise ConfigurationError(
            "background needs a system that can stop a process; Windows cannot. Leave --background out."
        )
    process = subprocess.Popen(
        command,
        env={**os.environ, IN_BACKGROUND: "1"},
        start_new_session=True,  # so that the signals below reach its own child processes too
    )
    # Not in a `preexec_fn`: it can hang where this process has other threads.
    os.setpriority(os.PRIO_PGRP, process.pid, LOWEST)
    # Linux shares the processor between sessions first, each with a priority of its own; absent elsewhere.
    with suppress(OSError):
        Path(f"/proc/{process.pid}/autogroup").write_text(str(LOWEST))

    def pass_on(signum: int, _: FrameType | None) -> None:
        _send(process, signum)
        _send(process, signal.SIGCONT)

    before = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    # A process that stays stopped would hold the locks of its run. Only another process can prevent that: the system
    # closes the pipe to it if this one is killed.
    continuing = subprocess.Popen(
        [sys.executable, "-IS", "-c", _CONTINUE_AT_THE_END, str(process.pid)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    paused = False
    try:
        with continuing:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL)
                if is_quiet_asked() != paused:
                    paused = not paused
                    _send(process, signal.SIGSTOP if paused else signal.SIGCONT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(process: subprocess.Popen[bytes], signum: int) -> None:
    # It may have ended. Until its exit status is read, macOS raises PermissionError then.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)
