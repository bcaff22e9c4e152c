"""What can be scored: the checks that every metric makes of what it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from lorakit.errors import ConfigurationError, DataError


def check_texts(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise a DataError unless there is a list of one or more reference texts for each output text."""
    check_pairs(outputs, references)
    for number, (output, group) in enumerate(zip(outputs, references, strict=True), start=1):
        if not isinstance(output, str):
            raise DataError(f"Output {number} is {output!r}, expected a text.")
        if isinstance(group, str):
            raise DataError(
                f"The references of output {number} are one text, expected a list of texts: write [reference]."
            )
        if not isinstance(group, Sequence):
            raise DataError(
                f"The references of output {number} are {group!r}, expected a list of texts."
            )
        if not group:
            raise DataError(f"Output {number} has no reference to be scored against.")
        for reference in group:
            if not isinstance(reference, str):
                raise DataError(
                    f"A reference of output {number} is {reference!r}, expected a text."
                )


def check_pairs(outputs: Sequence, references: Sequence) -> None:
    """Raise a DataError unless both are lists of the same length, one or more."""
    for name, values in (("outputs", outputs), ("references", references)):
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise DataError(f"The {name} are {values!r:.80}, expected a list.")
    if len(outputs) == 0:
        raise DataError("There is nothing to score: the list of outputs is empty.")
    if len(outputs) != len(references):
        raise DataError(
            f"{len(outputs)} outputs cannot be scored against {len(references)} references."
        )


def check_numbers(name: str, values: Sequence[float]) -> None:
    """Raise a DataError unless all `values` are finite numbers."""
    for number, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise DataError(f"{name} {number} is {value!r}, expected a finite number.")


def check_classes(name: str, values: Sequence[int], classes: int | None) -> None:
    """Raise a DataError unless all `values` are whole numbers from 0, and below `classes` where that is known."""
    for number, value in enumerate(values, start=1):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < 0 or (classes is not None and value >= classes):
            most = "" if classes is None else f" to {classes - 1}"
            raise DataError(
                f"{name} {number} is {value!r}, expected the index of a class, from 0{most}."
            )


def missing_package(error: ImportError, extra: str) -> ConfigurationError:
    """Return the error that names the extra which brings the package that could not be imported."""
    return ConfigurationError(
        f"Scoring needs the '{extra}' extra ({error}). Install it: pip install 'lorakit[{extra}]'."
    )
