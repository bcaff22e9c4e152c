"""Readers of data files. Each yields its rows in order, with the line of every row that it cannot read."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

from lorakit import storage
from lorakit.errors import DataError, nearest_path
from lorakit.formatting import size
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
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
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
    with _open(path) as file:
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
    rows, most = 0, _most_rows(path)
    while separator == ",":
        rows += 1
        if rows > most:
            raise _too_many_rows(path)
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
    with _open(path) as file:
        # Bytes that are not UTF-8 become surrogates, so that only their row is rejected.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.reader(_lines(text, path), delimiter=delimiter, strict=True)
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


def read_parquet(path: Path) -> Rows:
    """Read the rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_declared(file.metadata, file.schema_arrow.names, path)
            batches = (_values(batch, path) for batch in file.iter_batches(batch_size=1024))
            number = 0
            for number, values in enumerate(chain.from_iterable(batches), start=1):
                yield Row(values, f"{path}:row {number}")
            if number != file.metadata.num_rows:
                raise DataError(
                    f"{path}: its footer declares {file.metadata.num_rows:,} rows, but it has {number:,}; "
                    "copy or download it again"
                )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({error}); copy or download it again"
        ) from error


def _values(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch of Arrow columns as Python values."""
    names, columns, structs = batch.schema.names, [], lists_of_structs(batch.schema)
    for name, column in zip(names, batch.columns, strict=True):
        try:
            values = column.to_pylist()
            columns.append(list(map(without_nulls, values)) if name in structs else values)
        except (OverflowError, ValueError) as error:
            raise DataError(
                f"{path}: column {name!r} has a value that Python cannot hold ({error}); remove the column, or write "
                "it as text"
            ) from error
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def lists_of_structs(schema: Any) -> set[str]:
    """Return the columns of an Arrow schema that hold lists of structs, such as messages and tools."""
    import pyarrow

    return {
        column.name
        for column in schema
        if isinstance(getattr(column.type, "value_type", None), pyarrow.StructType)
    }


def without_nulls(value: Any) -> Any:
    """Return a value without the members of its objects that are null.

    Arrow gives all structs of a list the same members. In a list of tool calls each call has the arguments of all
    others, as nulls.
    """
    if isinstance(value, dict):
        return {name: without_nulls(x) for name, x in value.items() if x is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}


def _row(value: Any, origin: str) -> Row | Problem:
    if not isinstance(value, dict):
        return Problem(origin, f"found {json_type(value)}, expected an object {{...}}")
    if len(value) > MAX_COLUMNS:
        return Problem(origin, _too_many(len(value)))
    try:
        "".join(value).encode()
    except UnicodeEncodeError:
        return Problem(origin, "a key is not valid Unicode: it has half of a surrogate pair")
    return Row(value, origin)


def _too_many(columns: int) -> str:
    return f"{columns:,} columns, and the limit is {MAX_COLUMNS:,}; keep those that the task needs"


def _check_declared(metadata: Any, columns: list[str], path: Path) -> None:
    """Reject a Parquet file whose footer declares more than a file of its size holds."""
    if not columns:
        raise DataError(f"{path}: has no columns")
    if len(columns) > MAX_COLUMNS:
        raise DataError(f"{path}: {_too_many(len(columns))}")
    for name, times in Counter(columns).items():
        if times > 1:
            raise DataError(f"{path}: {times} columns have the name {name!r}; rename all but one")
    if metadata.num_rows > _most_rows(path):
        raise _too_many_rows(path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    _check_inflated(sum(max(group.total_byte_size, 0) for group in groups), path)


def _most_rows(path: Path) -> int:
    return FREE_ROWS + path.stat().st_size


def _too_many_rows(path: Path) -> DataError:
    return DataError(
        f"{path}: has more than {_most_rows(path):,} rows, too many for a file of {size(path.stat().st_size)}, so it "
        "is probably damaged or made to fill the memory. If you trust it, decompress it or write it as JSONL"
    )


def _check_inflated(count: int, path: Path) -> None:
    """Reject a compressed file of which `count` bytes are more than data compresses to its size."""
    file_size = path.stat().st_size
    if count > INFLATED_BYTES + INFLATED_RATIO * file_size:
        raise DataError(
            f"{path}: inflates from {size(file_size)} to at least {size(count)}, so it is probably damaged or made to "
            "fill the memory. If you trust it, decompress it first"
        )


def _checked_header(record: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in record]
    if len(header) > MAX_COLUMNS:
        raise DataError(f"{path}:1: {_too_many(len(header))}")
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


def _lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """Yield the lines of a file. Neither one long line nor blank lines can take all memory or time."""
    blank, most = 0, _most_rows(path)
    for number in count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise DataError(
                f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes; write one row on each line"
            )
        if number > most:
            raise _too_many_rows(path)
        blank = blank + 1 if line.isspace() else 0
        if blank > MAX_BLANK_LINES:
            raise DataError(
                f"{path}:{number}: more than {MAX_BLANK_LINES:,} blank lines in a row; remove them"
            )
        yield line


class _Inflated(io.RawIOBase):
    """The bytes of a gzip file, up to the limit of `_check_inflated`."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._file = gzip.open(path)  # noqa: SIM115 (closed with this object)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._file.readinto(buffer)
        self._count += read
        _check_inflated(self._count, self._path)
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
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
