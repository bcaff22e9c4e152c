"""A request to every background run on this machine: pause while something else is measured."""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def _lock_file() -> Path:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = str(os.getuid())
    return Path(tempfile.gettempdir()) / f"lorakit-quiet-{user}.lock"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ask the background runs of this user to pause. Several processes may ask at the same time.

    A killed process stops asking. Does nothing on Windows.
    """
    with _lock_file().open("a") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_quiet_asked() -> bool:
    """Return whether a process asks for quiet."""
    if sys.platform == "win32":
        return False
    with _lock_file().open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
