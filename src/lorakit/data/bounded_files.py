"""Opening of untrusted data files: no file can fill the memory, or take time without end."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

from lorakit.errors import DataError, nearest_path
from lorakit.formatting import size

MAX_LINE = 1 << 26
"""Longest line or CSV field, in bytes. A row may hold a whole book; data.too_long handles its length."""
MAX_BLANK_LINES = 1_000_000
"""Most blank lines in a row."""
MAX_COLUMNS = 10_000
"""Most columns."""
INFLATED_BYTES, INFLATED_RATIO = 1 << 26, 100
"""Most bytes that a compressed file inflates to, and more for each of its own bytes. Text shrinks to about a third,
repeated rows to a fiftieth, and a file that is made to fill the memory to a thousandth."""
FREE_ROWS = 1_000_000
"""Most rows or lines of a file, and more for each of its bytes. Only compressed ones could have more."""


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a file, gzip or not, and skip a byte order mark. A read error becomes a DataError that names the file."""
    try:
        is_gzip = path.name.lower().endswith(".gz")
        with io.BufferedReader(_Inflated(path), 1 << 17) if is_gzip else path.open("rb") as file:
            if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{path} is UTF-16. Convert it: iconv -f utf-16 -t utf-8 OLD > NEW")
            if file.peek(3)[:3] == codecs.BOM_UTF8:
                file.read(3)
            yield file
    except EOFError:
        raise DataError(f"{path}: the gzip file is truncated; copy or download it again") from None
    except FileNotFoundError:
        nearby = nearest_path(path)
        raise DataError(f"{path}: cannot be read (there is no such file).{nearby}") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def lines_in(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """Yield the lines of a file. Neither one long line nor blank lines can take all memory or time."""
    blank, most = 0, most_rows(path)
    for number in count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise DataError(
                f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes; write one row on each line"
            )
        if number > most:
            raise too_many_rows(path)
        blank = blank + 1 if line.isspace() else 0
        if blank > MAX_BLANK_LINES:
            raise DataError(
                f"{path}:{number}: more than {MAX_BLANK_LINES:,} blank lines in a row; remove them"
            )
        yield line


def most_rows(path: Path) -> int:
    """Return the most rows or lines that a file of this size can have."""
    return FREE_ROWS + path.stat().st_size


def too_many_rows(path: Path) -> DataError:
    """Return the error for a file with more than `most_rows`."""
    return DataError(
        f"{path}: has more than {most_rows(path):,} rows, too many for a file of {size(path.stat().st_size)}, so it "
        "is probably damaged or made to fill the memory. If you trust it, decompress it or write it as JSONL"
    )


def check_inflated(count: int, path: Path) -> None:
    """Reject a compressed file of which `count` bytes are more than data compresses to its size."""
    file_size = path.stat().st_size
    if count > INFLATED_BYTES + INFLATED_RATIO * file_size:
        raise DataError(
            f"{path}: inflates from {size(file_size)} to at least {size(count)}, so it is probably damaged or made to "
            "fill the memory. If you trust it, decompress it first"
        )


def too_many_columns(columns: int) -> str:
    """Return the message for more than `MAX_COLUMNS`."""
    return f"{columns:,} columns, and the limit is {MAX_COLUMNS:,}; keep those that the task needs"


class _Inflated(io.RawIOBase):
    """The bytes of a gzip file, up to the limit of `check_inflated`."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._file = gzip.open(path)  # noqa: SIM115 (closed with this object)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._file.readinto(buffer)
        self._count += read
        check_inflated(self._count, self._path)
        return read

    def close(self) -> None:
        self._file.close()
        super().close()
