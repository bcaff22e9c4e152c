"""JSON files, and records: JSON files with a checksum of their content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterFileError, LorakitError
from lorakit.formatting import size
from lorakit.storage.refusals import reading

CHECKSUM = "sha256"
"""The key of the checksum in a record."""
_CHUNK = 1 << 20
_MAX_JSON_BYTES = 1 << 28


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as UTF-8 JSON: sorted keys, two spaces, a newline at the end.

    Raises:
        ValueError, TypeError: `obj` holds NaN, an infinity or a type that JSON does not have.
    """
    text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    Path(path).write_bytes(f"{text}\n".encode())


def read_json(path: str | Path, error: type[LorakitError] = AdapterFileError) -> dict[str, Any]:
    """Read a file whose content is one JSON object.

    Raises:
        error: The file cannot be read, is not JSON (with the position), or is not an object.
    """
    path = Path(path)
    with reading(path, error), path.open("rb") as file:
        data = file.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        raise error(f"'{path}' is larger than {size(_MAX_JSON_BYTES)}, the limit for a JSON file.")
    with reading(path, error):
        text = data.decode()
    try:
        content = json.loads(text, parse_constant=_reject_constant, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as wrong:
        raise error(
            f"'{path}' is not JSON: line {wrong.lineno}, column {wrong.colno}: {wrong.msg}. "
            "Restore it from a copy."
        ) from wrong
    except (ValueError, RecursionError) as wrong:
        raise error(f"'{path}' is not JSON: {wrong}. Restore it from a copy.") from wrong
    if not isinstance(content, dict):
        raise error(
            f"'{path}' holds a JSON {_json_name(content)}, expected an object, {{...}}. Restore it from a copy."
        )
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
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


class DuplicateKeyError(ValueError):
    """A JSON object names a key twice. Python would keep the last value."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dictionary; an `object_pairs_hook` for the readers of json.

    Raises:
        DuplicateKeyError: Two pairs have the same key.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise DuplicateKeyError(f"the key '{counts.most_common(1)[0][0]}' is duplicated")
    return content


def _json_name(value: Any) -> str:
    names = {list: "list", str: "string", bool: "true or false", int: "number", float: "number"}
    return names.get(type(value), "null")
