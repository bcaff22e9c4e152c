"""JSON files, files of JSON lines, and records: JSON files with a checksum of their content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterFileError, LorakitError
from lorakit.storage.atomic import atomic_file
from lorakit.storage.paths import reading, regular_file

CHECKSUM = "sha256"
"""The key of the checksum in a record."""


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


class StrictJsonError(ValueError):
    """JSON text that Python's json reads in another way than it is written."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise StrictJsonError(f"the key {key!r:.80} is duplicated")
        content[key] = value
    return content


def _reject_constant(name: str) -> float:
    raise StrictJsonError(f"{name} is not a JSON number")


STRICT_JSON: dict[str, Any] = {
    "object_pairs_hook": _unique_keys,
    "parse_constant": _reject_constant,
}
"""Options of `json.loads`: a StrictJsonError for a duplicate key, of which Python would use the last value, and for NaN
and infinities, which a template would write as text."""


def read_json(path: str | Path, error: type[LorakitError] = AdapterFileError) -> dict[str, Any]:
    """Read a file whose content is one JSON object.

    Raises:
        error: The file cannot be read, is not strict JSON (with the position), or is not an object.
    """
    with reading(path, error):
        text = regular_file(Path(path), error).read_text(encoding="utf-8")
    try:
        content = json.loads(text, **STRICT_JSON)
    except (ValueError, RecursionError) as wrong:
        raise error(f"'{path}' is not JSON: {wrong}. Restore it from a copy.") from wrong
    if not isinstance(content, dict):
        raise error(f"'{path}' does not hold a JSON object, {{...}}. Restore it from a copy.")
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


def _checksum(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
