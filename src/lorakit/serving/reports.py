"""The report of the run that an adapter comes from, as a file that a server may show."""

from __future__ import annotations

import os
from pathlib import Path

from lorakit import storage
from lorakit.errors import AdapterFileError, LorakitError
from lorakit.file_names import ADAPTER, BEST, REPORT
from lorakit.serving import folders

LARGEST = 20_000_000
"""Most bytes of a report."""


def find_report(folder: str, root: str | Path) -> Path | None:
    """Return the report of the run with this adapter folder; None if there is none that may be shown.

    A report must be in the folder `root`. Symbolic links may not lead out of it.
    """
    run, name = os.path.split(folder.rstrip(os.sep))
    path = Path(run, REPORT)
    if name not in (ADAPTER, BEST) or not folders.is_within(path, Path(root)):
        return None
    try:
        size = storage.regular_file(path).stat().st_size
    except (LorakitError, OSError):
        return None
    return path if size <= LARGEST else None


def read_report(path: Path) -> bytes:
    """Return the content of a report; a file that grows meanwhile is cut.

    Raises:
        AdapterFileError: The file cannot be read.
    """
    with storage.reading(path, AdapterFileError), storage.regular_file(path).open("rb") as file:
        return file.read(LARGEST)
