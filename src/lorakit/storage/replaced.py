"""Reading files that another process may replace meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lorakit.errors import AdapterFileError, LorakitError

_ATTEMPTS = 5

Version = TypeVar("Version")
Content = TypeVar("Content")


def read_unchanged(
    path: str | Path, version: Callable[[], Version], read: Callable[[Version], Content]
) -> Content:
    """Return what `read` makes of one version of an adapter; read again if it was replaced meanwhile.

    Args:
        path: The adapter, for the message.
        version: Returns something that two contents of the adapter never share, such as a digest.
        read: Reads the adapter; called with its version.

    Raises:
        AdapterFileError: The adapter was replaced during each of five attempts.
        LorakitError: As for `version` and `read`.
    """
    before = version()
    for _ in range(_ATTEMPTS):
        try:
            content = read(before)
        except (LorakitError, OSError):
            if (after := version()) == before:
                raise
        else:
            if (after := version()) == before:
                return content
        before = after
    raise AdapterFileError(
        f"'{path}' changed each time it was read. Write a new adapter into another folder and rename it."
    )
