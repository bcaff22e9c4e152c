"""Readers of data files: each yields its rows in order, and names the line of every row it cannot read."""

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
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorakit.errors import DataError
from lorakit.tasks.task import kind


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the data."""

    values: dict[str, Any]
    origin: str
    """`file:line`, or `file:row n` where there are no lines."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used, and why."""

    origin: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


Rows = Iterator[Row | Problem]

# A field may hold a whole document, whose length data.too_long is about.
csv.field_size_limit(2**31 - 1)

JSON_BLANKS = re.compile(r"[ \t\r\n]*")


def reader_for(path: Path) -> Callable[[Path], Rows] | None:
    """Return the reader for a file, by its name; None when its format is unknown."""
    name = path.name.lower()
    for suffix, reader in READERS.items():
        if name.endswith(suffix) or (suffix not in BINARY and name.endswith(suffix + ".gz")):
            return reader
    return None


def lines_of(text: str) -> list[str]:
    """The lines of a text, ended by line feeds alone: what else str.splitlines() parts at, JSON and prose may hold."""
    return text.removesuffix("\n").split("\n") if text else []


def read_jsonl(path: Path) -> Rows:
    """One JSON object per line. Blank lines are passed over."""
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
            except (
                ValueError,
                RecursionError,
            ) as error:  # a number of 5,000 digits, 10,000 brackets
                yield Problem(origin, f"not readable as JSON ({error})")
            else:
                yield _row(value, origin)


def read_json(path: Path) -> Rows:
    """A list of JSON objects; a file that starts with an object is read as JSONL, which many are."""
    with _open(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"{":
        _refuse_one_object(data, path)
        yield from read_jsonl(path)
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None
    yield from _json_list(text, path)


def _refuse_one_object(data: bytes, path: Path) -> None:
    """Refuse a file that is a single object over several lines, which holds its rows somewhere inside if at all."""
    if b"\n" not in data.strip():
        return
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return  # a row a line
    lists = [name for name, value in found.items() if isinstance(value, list)]
    inside = (
        f" It holds lists in {', '.join(map(repr, lists[:5]))}: write one of them." if lists else ""
    )
    raise DataError(
        f"{path}: found one object, expected a list of objects ([{{...}}, ...]) or an object on each line.{inside}"
    )


def _json_list(text: str, path: Path) -> Rows:
    # json.loads would give the objects without their lines, so the list is walked here.
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
    mark = "]" if text[position : position + 1] == "]" else ","
    while mark == ",":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON ({error})") from None
        yield _row(value, f"{path}:{line}")
        position = _after_blanks(text, position)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            found = f"{mark!r}" if mark else "the end of the file"
            raise DataError(
                f"{path}: found {found} after the object of line {line}, expected , or ]"
            )
        position = _after_blanks(text, position + 1)


def _after_blanks(text: str, position: int) -> int:
    match = JSON_BLANKS.match(text, position)
    assert match is not None  # it also matches nothing
    return match.end()


def read_csv(path: Path, delimiter: str = ",") -> Rows:
    """A header line, then one row per record; a quoted field may span lines."""
    with _open(path) as file:
        # Bytes that are not UTF-8 pass as surrogates, which mark the one row they stand in.
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


def read_tsv(path: Path) -> Rows:
    """As CSV, with tabs between the fields."""
    return read_csv(path, delimiter="\t")


def read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
BINARY = (".parquet",)


def _row(value: Any, origin: str) -> Row | Problem:
    if isinstance(value, dict):
        return Row(value, origin)
    return Problem(origin, f"found {kind(value)}, expected an object {{...}}")


def _checked_header(record: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in record]
    for position, name in enumerate(header, start=1):
        if not name:
            raise DataError(f"{path}:1: column {position} of the header has no name")
        if header.count(name) > 1:
            raise DataError(f"{path}:1: the header names the column {name!r} more than once")
    return header


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file or a gzip file, and say which file it was when reading fails."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except EOFError:
        raise DataError(f"{path}: the gzip file is cut off; copy or download it again") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
