"""Measurements of this machine, kept in the user's cache folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit import storage
from lorakit.errors import BaseModelError, LorakitError
from lorakit.models.cache import cache_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def measurement_file(name: str, identity: Mapping[str, Any]) -> Path:
    """Return the path of a measurement, by what it is valid for: processor, threads, versions and others."""
    key = json.dumps(identity, sort_keys=True)
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_measurement(path: Path, kind: type[T]) -> T | None:
    """Return the measurement in a file, a dataclass; None if there is none or the file is damaged: measure again."""
    if not path.exists():
        return None
    try:
        return kind(**storage.read_record(path, BaseModelError)[_key(kind)])
    except (LorakitError, KeyError, TypeError):
        return None


def keep_measurement(path: Path, measured: DataclassInstance, identity: Mapping[str, Any]) -> None:
    """Write a measurement.

    Raises:
        LorakitError: The folder is not writable.
    """
    with storage.writing(path), storage.atomic_file(path) as temporary:
        record = {_key(type(measured)): dataclasses.asdict(measured)}
        storage.write_record(temporary, {**record, "identity": dict(identity)})


def _key(kind: type) -> str:
    return kind.__name__.lower()
