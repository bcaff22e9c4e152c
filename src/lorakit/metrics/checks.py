"""Validation of the inputs of metrics, and of the packages that they need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real

from lorakit.errors import ConfigurationError, DataError


def check_texts(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise a DataError unless each output is a text with a list of one or more reference texts."""
    check_pairs(outputs, references)
    for number, (output, group) in enumerate(zip(outputs, references, strict=True), start=1):
        if not isinstance(output, str):
            raise DataError(f"Output {number} is {output!r}, expected text.")
        if isinstance(group, str):
            raise DataError(
                f"The references of output {number} are one text, expected a list of texts; write [reference]."
            )
        if not isinstance(group, Sequence):
            raise DataError(
                f"The references of output {number} are {group!r}, expected a list of texts."
            )
        if not group:
            raise DataError(f"Output {number} has no reference, expected at least one.")
        for reference in group:
            if not isinstance(reference, str):
                raise DataError(f"A reference of output {number} is {reference!r}, expected text.")


def check_pairs(outputs: Sequence, references: Sequence) -> None:
    """Raise a DataError unless both are non-empty lists of the same length."""
    for name, values in (("outputs", outputs), ("references", references)):
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise DataError(f"The {name} are {values!r:.80}, expected a list.")
    if len(outputs) == 0:
        raise DataError("The list of outputs is empty, expected at least one.")
    if len(outputs) != len(references):
        raise DataError(
            f"Found {len(outputs)} outputs and {len(references)} references, expected equal numbers."
        )


def check_numbers(name: str, values: Sequence[float]) -> None:
    """Raise a DataError unless all `values` are finite numbers."""
    for number, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise DataError(f"{name} {number} is {value!r}, expected a finite number.")


def check_classes(name: str, values: Sequence[int], classes: int | None) -> None:
    """Raise a DataError unless all `values` are integers from 0, and below `classes` unless that is None."""
    for number, value in enumerate(values, start=1):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < 0 or (classes is not None and value >= classes):
            expected = "at least 0" if classes is None else f"from 0 to {classes - 1}"
            raise DataError(f"{name} {number} is {value!r}, expected a class index {expected}.")


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Turn an ImportError into a ConfigurationError that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"Scoring needs the '{extra}' extra ({error}). Install it: pip install \"lorakit[{extra}]\"."
        ) from None
