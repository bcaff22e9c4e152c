"""Every error a user can meet.

A message says what was found, what was expected, and what to write instead.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class LorakitError(Exception):
    """Base of all errors that lorakit raises on purpose; catch it to catch them all."""


class ConfigurationError(LorakitError):
    """A setting has a value that cannot work (rank 0, unknown key, two settings that exclude each other)."""


class TargetError(LorakitError):
    """A target names no layer, or a layer that cannot be adapted."""


class AdapterFileError(LorakitError):
    """An adapter file is damaged, incomplete, unsafe, or does not fit the model."""


class WrongBaseError(LorakitError):
    """An adapter was made for a base model other than the one it is loaded on."""


class AdapterStateError(LorakitError):
    """The adapters of a model are not in a state that allows the request (unknown name, already merged)."""


class BaseModelError(LorakitError):
    """A base model cannot be found or read."""


class DataError(LorakitError):
    """A data file, row or column is missing or malformed."""


class RunFolderError(LorakitError):
    """A folder cannot be written: it exists, is in use, or the disk is full."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice most like ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def require_at_least(name: str, value: float, least: float) -> None:
    """Raise a ConfigurationError unless the number `value` is finite and `least` or more."""
    if not least <= value < math.inf:  # NaN is neither
        raise ConfigurationError(
            f"{name} is {value!r}; it must be a finite number of {least} or more."
        )


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ConfigurationError that names the nearest unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ConfigurationError(
            f"{name} is {value!r}; it must be one of {', '.join(choices)}.{nearest(value, choices)}"
        )
