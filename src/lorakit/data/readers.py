"""Readers of data files. Each yields its rows in order, with the line of every row that it cannot read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorakit.errors import DataError
from lorakit.tasks.task import json_type


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the data."""

    values: dict[str, Any]
    origin: str
    """`file:line`, or `file:row n` for formats without lines."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is invalid, with the reason."""

    origin: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


Rows = Iterator[Row | Problem]

# A field may hold a whole document; data.too_long handles its length.
csv.field_size_limit(2**31 - 1)

JSON_BLANKS = re.compile(r"[ \t\r\n]*")


def reader_for(path: Path) -> Callable[[Path], Rows] | None:
    """Return the reader for a file name; None for an unknown format."""
    name = path.name.lower()
    for suffix, reader in READERS.items():
        if name.endswith(suffix) or (suffix not in BINARY and name.endswith(suffix + ".gz")):
            return reader
    return None


def lines_of(text: str) -> list[str]:
    """Split a text at line feeds only. str.splitlines() also splits at characters that valid JSON may contain."""
    return text.removesuffix("\n").split("\n") if text else []


def read_jsonl(path: Path) -> Rows:
    """Read one JSON object per line. Blank lines are skipped."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            origin = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Problem(
                    origin, f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1})"
                )
            except json.JSONDecodeError as error:
                yield Problem(origin, f"not valid JSON ({error.msg} at character {error.pos + 1})")
            except (ValueError, RecursionError) as error:
                # For example a number of 5,000 digits, or 10,000 brackets.
                yield Problem(origin, f"not readable as JSON ({error})")
            else:
                yield _row(value, origin)


def read_json(path: Path) -> Rows:
    """Read a list of JSON objects. Many .json files are JSONL: a file that starts with an object is read as such."""
    with _open(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"{":
        _reject_single_object(data, path)
        yield from read_jsonl(path)
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None
    yield from _json_list(text, path)


def _reject_single_object(data: bytes, path: Path) -> None:
    """Raise a DataError if the file is a single object over several lines. Its rows may be in a list inside."""
    if b"\n" not in data.strip():
        return
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return  # one row per line
    lists = [name for name, member in value.items() if isinstance(member, list)]
    advice = f" Save one of its lists: {', '.join(map(repr, lists[:5]))}." if lists else ""
    raise DataError(
        f"{path}: found one object, expected a list of objects ([{{...}}, ...]) or an object on each line.{advice}"
    )


def _json_list(text: str, path: Path) -> Rows:
    # Decode the objects one at a time: json.loads gives no line numbers.
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _after_blanks(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise DataError(
            f"{path}:1: found {text[position]!r}, expected a list of objects: [{{...}}, ...]"
        )
    position = _after_blanks(text, position + 1)
    separator = "]" if text[position : position + 1] == "]" else ","
    while separator == ",":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON ({error})") from None
        yield _row(value, f"{path}:{line}")
        position = _after_blanks(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            actual = repr(separator) if separator else "the end of the file"
            raise DataError(
                f"{path}: found {actual} after the object of line {line}, expected , or ]"
            )
        position = _after_blanks(text, position + 1)


def _after_blanks(text: str, position: int) -> int:
    match = JSON_BLANKS.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def read_csv(path: Path, delimiter: str = ",") -> Rows:
    """Read a header line, then one row per record. A quoted field may span lines."""
    with _open(path) as file:
        # Bytes that are not UTF-8 become surrogates, so that only their row is rejected.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None:
                    raise DataError(f"{path}:{line}: not a CSV header ({error})") from None
                yield Problem(f"{path}:{line}", f"not valid CSV ({error})")
                continue
            if not record:
                continue
            if header is None:
                header = _checked_header(record, path)
            elif len(record) != len(header):
                yield Problem(
                    f"{path}:{line}",
                    f"{len(record)} fields, but the header has {len(header)} columns",
                )
            else:
                yield Row(dict(zip(header, record, strict=True)), f"{path}:{line}")


def read_parquet(path: Path) -> Rows:
    """Read the rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            for number, values in enumerate(chain.from_iterable(batches), start=1):
                yield Row(values, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({error}); copy or download it again"
        ) from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}
BINARY = (".parquet",)


def _row(value: Any, origin: str) -> Row | Problem:
    if isinstance(value, dict):
        return Row(value, origin)
    return Problem(origin, f"found {json_type(value)}, expected an object {{...}}")


def _checked_header(record: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in record]
    for position, name in enumerate(header, start=1):
        if not name:
            raise DataError(
                f"{path}:1: column {position} of the header has no name; name every column once"
            )
        if header.count(name) > 1:
            raise DataError(
                f"{path}:1: the header names the column {name!r} more than once; rename one"
            )
    return header


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file, gzip or not. A read error becomes a DataError that names the file."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except EOFError:
        raise DataError(f"{path}: the gzip file is truncated; copy or download it again") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
