"""Runs a save in a forked process in which one call that changes the disk kills the process, or fails."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from lorakit.adapters.formats import fingerprint
from lorakit.errors import RunFolderError
from lorakit.storage import atomic

CHANGES = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"),
    *("fsync", "exchange"),
}
"""Audit events of Python that change the disk, beside the opening of a file to write; and two of our own."""

SAVED, REFUSED = 0, 3
"""Exit statuses of the process: the save succeeded, or raised a RunFolderError."""


def kill() -> None:
    """Kill this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """Fail as a write on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(save: Callable[[], object], step: int, fail: Callable[[], None]) -> int:
    """Run `save` in a forked process whose step-th change of the disk calls `fail` first; return the exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns about threads; the child starts none
        child = os.fork()
    if child == 0:
        status = 1
        try:
            fingerprint.ThreadPoolExecutor = _InThisThread
            _fail_at(step, fail)
            save()
            status = SAVED
        except RunFolderError as error:
            status = REFUSED if "disk full while writing" in str(error) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _InThisThread(contextlib.nullcontext):
    """In place of a pool: after PyTorch has used its own pool, new threads of a forked process cannot compute."""

    def __init__(self, **unused: Any) -> None:
        super().__init__(self)

    map = staticmethod(map)


def _fail_at(step: int, fail: Callable[[], None]) -> None:
    """Count the changes of the disk in this process, and call `fail` before the step-th."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...] = ()) -> None:
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            seen += 1
            if seen == step:
                fail()

    def counted(original: Callable[..., Any], event: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            count(event)
            return original(*arguments)

        return call

    os.fsync = counted(os.fsync, "fsync")
    atomic._exchange = counted(atomic._exchange, "exchange")
    sys.addaudithook(count)
