"""JSON files, files of JSON lines, and records: JSON files with a checksum of their content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterFileError, LorakitError
from lorakit.formatting import size
from lorakit.storage.atomic import atomic_file
from lorakit.storage.refusals import reading, regular_file

CHECKSUM = "sha256"
"""The key of the checksum in a record."""
_CHUNK = 1 << 20
_MAX_JSON_BYTES = 1 << 28
_MAX_DEPTH = 100
"""Deeper content would exceed Python's recursion limit where it is copied or written again."""
_TOO_DEEP = f"it is nested more than {_MAX_DEPTH} levels deep"
_MAX_DIGITS = 100
"""Enough for the 128-bit integers of random generators; a float64 can still hold such a number."""


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as UTF-8 JSON: sorted keys, two spaces, a newline at the end.

    Raises:
        ValueError, TypeError: `obj` holds NaN, an infinity or a type that JSON does not have.
    """
    text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    Path(path).write_bytes(f"{text}\n".encode())


def write_rows(path: str | Path, rows: Iterable[Any], *, overwrite: bool = True) -> None:
    """Write each row as one line of UTF-8 JSON, the whole file or nothing; see `atomic_file`.

    Raises:
        RunFolderError: The file cannot be written, or exists and `overwrite` is false.
        ValueError: A row holds NaN or an infinity.
    """
    with (
        atomic_file(path, overwrite=overwrite) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(f"{json_line(row)}\n" for row in rows)


def json_line(value: Any) -> str:
    """Return `value` as one line of JSON, with text in place of types that JSON does not have, such as dates.

    Raises:
        ValueError: `value` holds NaN or an infinity.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)


def finite(value: Any) -> Any:
    """Return a value with None in place of NaN and infinities, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    return list(map(finite, value)) if isinstance(value, list | tuple) else value


def read_json(path: str | Path, error: type[LorakitError] = AdapterFileError) -> dict[str, Any]:
    """Read a file whose content is one JSON object.

    Raises:
        error: The file is not a regular file, cannot be read, is not JSON (with the position), is not an object, or
            holds a duplicate key, a huge number or very deep nesting.
    """
    path = regular_file(Path(path), error)
    with reading(path, error):
        length = path.stat().st_size  # `read` reserves memory for as many bytes as it may return
        if length > _MAX_JSON_BYTES:
            raise error(
                f"'{path}' is larger than {size(_MAX_JSON_BYTES)}, the limit for a JSON file."
            )
        with path.open("rb") as file:
            text = file.read(length).decode()
    try:
        content = parse_json(text)
    except json.JSONDecodeError as wrong:
        raise error(
            f"'{path}' is not JSON: line {wrong.lineno}, column {wrong.colno}: {wrong.msg}. "
            "Restore it from a copy."
        ) from wrong
    except ValueError as wrong:
        raise error(f"'{path}' cannot be read as JSON: {wrong}. Restore it from a copy.") from wrong
    if not isinstance(content, dict):
        raise error(
            f"'{path}' holds a JSON {_json_name(content)}, expected an object, {{...}}. Restore it from a copy."
        )
    return content


def parse_json(text: str) -> Any:
    """Return the value of a JSON document that may come from anyone.

    Raises:
        json.JSONDecodeError: The text is not JSON.
        ValueError: It holds a duplicate key, NaN, a huge number, half a character or very deep nesting.
    """
    try:
        content = json.loads(text, **STRICT_JSON)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _reject_deep_nesting(content)
    _reject_lone_surrogates(text, content)
    return content


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write `record` as JSON, with a checksum of its content.

    Raises:
        ValueError, TypeError: As for `write_json`.
    """
    write_json(path, {**record, CHECKSUM: _checksum(record)})


def read_record(path: str | Path, error: type[LorakitError]) -> dict[str, Any]:
    """Read a record of `write_record`, without its checksum.

    Raises:
        error: The file cannot be read, is not JSON, or does not match its checksum.
    """
    record = read_json(path, error)
    require_checksum(record, path, error)
    del record[CHECKSUM]
    return record


def require_checksum(
    record: Mapping[str, Any], path: str | Path, error: type[LorakitError]
) -> None:
    """Validate a record read from `path` against its checksum.

    Raises:
        error: The checksum is missing or does not match.
    """
    if record.get(CHECKSUM) != _checksum(record):
        raise error(
            f"'{path}' does not match its checksum: it is damaged or was edited by hand. Restore it from a copy, "
            "or write it again with lorakit."
        )


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal. What others append meanwhile does not count."""
    digest = hashlib.sha256()
    left = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        while left and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _checksum(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class StrictJsonError(ValueError):
    """A JSON value that Python's json reads, but not everyone, or not as written."""


def _parse_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise StrictJsonError(
            f"a number has {len(digits):,} digits; at most {_MAX_DIGITS} are read"
        )
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        shown = digits if len(digits) <= _MAX_DIGITS else digits[:_MAX_DIGITS] + "..."
        raise StrictJsonError(f"the number {shown} is beyond the range of a 64-bit float")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise StrictJsonError(f"the key {key!r:.80} is duplicated")
        content[key] = value
    return content


def _reject_deep_nesting(content: Any) -> None:
    level = [[content]]
    for _ in range(_MAX_DEPTH + 1):
        children = (one.values() if isinstance(one, dict) else one for one in level)
        level = [c for several in children for c in several if isinstance(c, (dict, list))]
    if level:
        raise ValueError(_TOO_DEEP)


def _reject_lone_surrogates(text: str, content: Any) -> None:
    """Reject half a character: it cannot be written as UTF-8 again."""
    if "\\u" in text:  # only an escape can name one
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"a text has half a character (\\u{ord(half):04x})") from None


def _reject_constant(name: str) -> float:
    raise StrictJsonError(f"{name} is not a JSON number")


STRICT_JSON: dict[str, Any] = {
    "object_pairs_hook": _unique_keys,
    "parse_constant": _reject_constant,
    "parse_int": _parse_integer,
    "parse_float": _parse_float,
}
"""Options of `json.loads`: a StrictJsonError for a duplicate key, NaN, an infinity, or a number of too many digits."""


def _json_name(value: Any) -> str:
    names = {list: "list", str: "string", bool: "true or false", int: "number", float: "number"}
    return names.get(type(value), "null")
