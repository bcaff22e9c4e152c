"""Readers of data files. Each yields its rows in order, with the line of every row that it cannot read."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.data.bounded_files import (
    MAX_COLUMNS,
    MAX_LINE,
    lines_in,
    most_rows,
    open_data,
    too_many_columns,
    too_many_rows,
)
from lorakit.data.parquet import read_parquet
from lorakit.data.rows import Problem, Row, Rows
from lorakit.errors import DataError
from lorakit.tasks.task import json_type

QUOTES = "Close it; a quote inside a text is written twice, in a quoted field"

csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # of the process: never lowered

JSON_BLANKS = re.compile(r"[ \t\r\n]*")


def reader_for(path: Path) -> Callable[[Path], Rows] | None:
    """Return the reader for a file name; None for an unknown format."""
    name = path.name.lower()
    for suffix, reader in READERS.items():
        if name.endswith(suffix) or (suffix != ".parquet" and name.endswith(suffix + ".gz")):
            return reader
    return None


def lines_of(text: str) -> list[str]:
    """Split a text at line feeds only. str.splitlines() also splits at characters that valid JSON may contain."""
    return text.removesuffix("\n").split("\n") if text else []


def text_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, without the byte order mark that editors on Windows write.

    Raises:
        DataError: The file cannot be read, or is not UTF-8 (with the line).
    """
    with storage.reading(path, DataError):
        data = path.read_bytes()
    text = _decoded(data.removeprefix(codecs.BOM_UTF8), path)
    return lines_of(text.replace("\r\n", "\n").replace("\r", "\n"))


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8."
        ) from None


def read_jsonl(path: Path) -> Rows:
    """Read one JSON object per line. Blank lines are skipped."""
    with open_data(path) as file:
        for number, line in enumerate(lines_in(file, path), start=1):
            origin = f"{path}:{number}"
            if not line.strip():
                continue
            is_list = number == 1 and line.lstrip().startswith(b"[")
            advice = "; if the file is one list, rename it to .json" if is_list else ""
            try:
                value = json.loads(line.decode("utf-8"), **storage.STRICT_JSON)
            except UnicodeDecodeError as error:
                yield Problem(
                    origin, f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1})"
                )
            except json.JSONDecodeError as error:
                where = f"{error.msg} at character {error.pos + 1}"
                yield Problem(origin, f"not valid JSON ({where}){advice}")
            except (ValueError, RecursionError) as error:
                # For example a duplicate key, a number of 5,000 digits, or 10,000 brackets.
                yield Problem(origin, f"not readable as JSON ({error})")
            else:
                row = _row(value, origin)
                yield Problem(origin, row.message + advice) if isinstance(row, Problem) else row


def read_json(path: Path) -> Rows:
    """Read a list of JSON objects. Many .json files are JSONL: a file that starts with an object is read as such."""
    with open_data(path) as file:
        data = file.read()
    if data.lstrip()[:1] == b"{":
        _reject_single_object(data, path)
        yield from read_jsonl(path)
        return
    yield from _json_list(_decoded(data, path), path)


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
    decoder = json.JSONDecoder(**storage.STRICT_JSON)
    line, counted = 1, 0
    position = _after_blanks(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise DataError(
            f"{path}:1: found {text[position]!r}, expected a list of objects: [{{...}}, ...]"
        )
    position = _after_blanks(text, position + 1)
    separator = ","
    if text[position : position + 1] == "]":
        separator, position = "]", _after_blanks(text, position + 1)
    rows, most = 0, most_rows(path)
    while separator == ",":
        rows += 1
        if rows > most:
            raise too_many_rows(path)
        line += text.count("\n", counted, position)
        counted = position
        origin = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
            yield _row(value, origin)
        except storage.StrictJsonError as error:
            _, position = json.JSONDecoder().raw_decode(text, position)
            yield Problem(origin, f"not readable as JSON ({error})")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: not valid JSON ({error})") from None
        position = _after_blanks(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            actual = repr(separator) if separator else "the end of the file"
            raise DataError(
                f"{path}: found {actual} after the object of line {line}, expected , or ]"
            )
        position = _after_blanks(text, position + 1)
    if position < len(text):
        line += text.count("\n", counted, position)
        raise DataError(
            f"{path}:{line}: found {text[position]!r} after the list, expected the end of the file; write one list, or "
            "one object on each line"
        )


def _after_blanks(text: str, position: int) -> int:
    match = JSON_BLANKS.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def read_csv(path: Path, delimiter: str = ",") -> Rows:
    """Read a header line, then one row per record. A quoted field may span lines, but not whole rows of a .tsv file."""
    with open_data(path) as file:
        # Bytes that are not UTF-8 become surrogates, so that only their row is rejected.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.reader(lines_in(text, path), delimiter=delimiter, strict=True)
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
                if str(error) == "unexpected end of data" and reader.line_num > line:
                    raise DataError(
                        f"{path}:{line}: a quote opens a field that does not end up to line {reader.line_num:,}, the "
                        f"last of the file. {QUOTES}"
                    ) from None
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
            elif delimiter == "\t" and _joins_rows(record):
                raise DataError(
                    f"{path}:{line}: a quote opens a field that joins the rows up to line {reader.line_num:,}. "
                    f"{QUOTES}. If it is one text, save the file as .csv or .jsonl"
                )
            else:
                yield Row(dict(zip(header, record, strict=True)), f"{path}:{line}")


def _joins_rows(record: list[str]) -> bool:
    """Whether two stray quotes have joined rows of tab-separated fields: each line of the record is a whole row."""
    lines = "\t".join(record).split("\n")
    return len(lines) > 1 and all(line.count("\t") == len(record) - 1 > 0 for line in lines)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}


def _checked_header(record: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in record]
    if len(header) > MAX_COLUMNS:
        raise DataError(f"{path}:1: {too_many_columns(len(header))}")
    counts = Counter(header)
    for position, name in enumerate(header, start=1):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{path}:1: column {position} of the header is not UTF-8; save the file as UTF-8"
            ) from None
        if not name:
            raise DataError(
                f"{path}:1: column {position} of the header has no name; name every column once"
            )
        if counts[name] > 1:
            raise DataError(
                f"{path}:1: the header names the column {name!r} more than once; rename one"
            )
    return header


def _row(value: Any, origin: str) -> Row | Problem:
    if not isinstance(value, dict):
        return Problem(origin, f"found {json_type(value)}, expected an object {{...}}")
    if len(value) > MAX_COLUMNS:
        return Problem(origin, too_many_columns(len(value)))
    try:
        "".join(value).encode()
    except UnicodeEncodeError:
        return Problem(origin, "a key is not valid Unicode: it has half of a surrogate pair")
    return Row(value, origin)
