"""JSON files, and records: JSON files that hold a checksum of their own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterFileError, LorakitError
from lorakit.formatting import size
from lorakit.storage.refusals import reading

CHECKSUM = "sha256"
"""The key under which a record holds the checksum of the rest."""
_CHUNK = 1 << 20
_MAX_JSON_BYTES = 1 << 28


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as UTF-8 JSON: sorted keys, two spaces, a newline at the end.

    Raises:
        ValueError, TypeError: `obj` holds NaN, an infinity or something JSON has no form for.
    """
    text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    Path(path).write_bytes(f"{text}\n".encode())


def read_json(path: str | Path, error: type[LorakitError] = AdapterFileError) -> dict[str, Any]:
    """Read a file whose content is one JSON object.

    Raises:
        error: The file cannot be read, is not JSON (with the position), or no object.
    """
    path = Path(path)
    with reading(path, error), path.open("rb") as file:
        data = file.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        raise error(
            f"'{path}' is larger than {size(_MAX_JSON_BYTES)}, too large for JSON settings."
        )
    with reading(path, error):
        text = data.decode()
    try:
        found = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as wrong:
        raise error(
            f"'{path}' is not JSON: line {wrong.lineno}, column {wrong.colno}: {wrong.msg}."
        ) from wrong
    except (ValueError, RecursionError) as wrong:
        raise error(f"'{path}' is not JSON as expected: {wrong}.") from wrong
    if not isinstance(found, dict):
        raise error(f"'{path}' holds a JSON {_json_name(found)}; an object, {{...}}, was expected.")
    return found


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write `record` as JSON, with a checksum of its content.

    Raises:
        ValueError, TypeError: As for `write_json`.
    """
    write_json(path, {**record, CHECKSUM: _checksum(record)})


def read_record(path: str | Path, error: type[LorakitError]) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises:
        error: The file cannot be read, is not JSON, or is not what was written.
    """
    record = read_json(path, error)
    require_checksum(record, path, error)
    del record[CHECKSUM]
    return record


def require_checksum(
    record: Mapping[str, Any], path: str | Path, error: type[LorakitError]
) -> None:
    """Hold what was read from `path` against the checksum in it.

    Raises:
        error: They do not agree.
    """
    if record.get(CHECKSUM) != _checksum(record):
        raise error(
            f"'{path}' does not have its own checksum: it is damaged, or was changed by hand. Restore it from a "
            "copy, or let lorakit write it again."
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


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' stands twice in one object")
    return found


def _json_name(value: Any) -> str:
    names = {list: "list", str: "string", bool: "true or false", int: "number", float: "number"}
    return names.get(type(value), "null")
