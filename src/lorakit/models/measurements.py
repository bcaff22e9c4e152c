"""Measurements of this machine, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.errors import BaseModelError, LorakitError
from lorakit.models.cache import cache_folder


def measurement_file(name: str, identity: Mapping[str, Any]) -> Path:
    """Return the path of a measurement, by what it is valid for: processor, threads, versions and others."""
    key = json.dumps(identity, sort_keys=True)
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_measurement(path: Path, key: str) -> dict[str, Any] | None:
    """Return the measurement in a file, under `key`; None if there is none or the file is damaged: measure again."""
    if not path.exists():
        return None
    try:
        found = storage.read_record(path, BaseModelError)[key]
    except (LorakitError, KeyError):
        return None
    return found if isinstance(found, dict) else None


def keep_measurement(
    path: Path, key: str, measured: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Write a measurement.

    Raises:
        LorakitError: The folder is not writable.
    """
    with storage.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.atomic_file(path) as temporary:
            storage.write_record(temporary, {key: dict(measured), "identity": dict(identity)})
