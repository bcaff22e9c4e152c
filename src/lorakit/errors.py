"""The errors that lorakit raises.

A message says what was found, what was expected, and what to write instead.
"""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.formatting import size, visible

_MAX_LINE, _SHOWN_AT_END = 2_000, 400
"""Longest line of a message, and how much of its end remains: names in a damaged file can have any length."""


class LorakitError(Exception):
    """Base class of all errors that lorakit raises.

    Args:
        lines: The message, one argument per line. Control characters in a line are escaped, since a message may quote
            names and texts of untrusted files.
    """

    # Without an `__init__`, which compiled code that raises an error could not call.
    def __str__(self) -> str:
        return "\n".join(_shortened(visible(str(line))) for line in self.args)


def _shortened(line: str) -> str:
    """Leave out the middle of a long line: the end usually says what to do."""
    if len(line) <= _MAX_LINE:
        return line
    start = _MAX_LINE - _SHOWN_AT_END
    left_out = len(line) - _MAX_LINE
    return f"{line[:start]} ... ({left_out:,} characters left out) ... {line[-_SHOWN_AT_END:]}"


class ConfigurationError(LorakitError):
    """A setting is invalid (rank 0, unknown key, two settings that exclude each other)."""


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


class DivergenceError(LorakitError):
    """A loss, a gradient or a weight is not finite, or the loss of a training run has exploded."""


_OUT_OF_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|alloc_failed|bad_alloc"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, PyTorch or the system raised `error` because memory ran out.

    PyTorch has a class for GPUs only. On CPUs, and in CUDA's libraries, it raises a RuntimeError.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        # Windows reports a full page file with a number of its own.
        return error.errno == errno.ENOMEM or "error 1455" in str(error).lower()
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error).lower()))


def is_momentary(error: BaseException) -> bool:
    """Return whether the system raised `error` for lack of memory or file handles, so a later call may succeed."""
    no_handles = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return no_handles or is_out_of_memory(error)


def requested_memory(error: BaseException) -> str:
    """Return how much memory `error` could not allocate, or "" if it does not say."""
    found = re.search(r"allocate ([\d.]+ (?:bytes|[KMGT]iB))", str(error))
    if found is None:
        return ""
    amount, unit = found[1].split()
    return f" (tried to allocate {size(int(amount)) if unit == 'bytes' else found[1]})"


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise a LorakitError when memory runs out in the block.

    Raises:
        LorakitError: Memory ran out.
    """
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        requested = requested_memory(error)
    raise LorakitError(
        f"Out of memory{requested}. Close other programs, or lower batch_size and data.max_length. base.device cpu "
        "uses the main memory. base.dtype nf4 loads the base in 4 bits, for all but a merge. `lorakit plan` "
        "predicts the memory of a training run."
    )


_SYNONYMS = {"4bit": "nf4", "int4": "nf4", "8bit": "int8", "fp32": "float32"}
"""Other libraries' names of dtypes. Spelling alone would match them wrongly or not at all."""


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that shares most characters with `word`, or None if all differ much."""
    word = _SYNONYMS.get(word, word)
    # 0.65 keeps `valid` for validation and `nf5` for nf4, and excludes words of a common suffix such as .json.
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=0.65)), None)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice closest to ``word``, or an empty string."""
    found = closest(word, choices)
    return "" if found is None else f" Did you mean '{found}'?"


def nearest_path(path: str | os.PathLike[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for an existing path like this one, or an empty string.

    Each part that does not exist is replaced by the entry of its folder with the closest name.
    """
    found = Path()
    for part in Path(os.path.expanduser(path)).parts:
        if not os.path.exists(found / part):  # False where permission is missing
            entries = os.listdir(found) if os.access(found, os.R_OK) and found.is_dir() else []
            found_part = closest(part, entries)
            if found_part is None:
                return ""
            part = found_part
        found /= part
    return f" Did you mean '{found}'?"


def require_at_least(
    name: str, value: float | None, least: float, *, below: float = math.inf
) -> None:
    """Raise a ConfigurationError unless `value` is None, or finite, at least `least` and below `below`."""
    if value is not None and not least <= value < below:  # also rejects NaN
        kind = "whole" if isinstance(value, int) else "finite"
        bounds = f"a {kind} number of {least} or more"
        if below < math.inf:
            bounds = f"at least {least} and below {below}"
        raise ConfigurationError(f"{name} is {value!r}; it must be {bounds}.")


def require_suffix(name: str, path: str | None, suffix: str) -> None:
    """Raise a ConfigurationError unless `path` is None, or a file name that ends in `suffix`."""
    if path is not None and Path(path).suffix != suffix:
        raise ConfigurationError(
            f"{name} is '{path}'; it must be a file name that ends in {suffix}."
        )


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ConfigurationError that suggests the closest choice unless `value` is one of them."""
    choices = list(choices)
    if value not in choices:
        raise ConfigurationError(
            f"{name} is {value!r}; it must be one of {', '.join(choices)}.{nearest(value, choices)}"
        )
