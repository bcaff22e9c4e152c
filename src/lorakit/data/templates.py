"""Prompt templates: text with `{column}` fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from string import Formatter

from lorakit.errors import ConfigurationError, DataError, nearest
from lorakit.tasks.task import BadRow, kind


class Template:
    r"""A text such as `"Summarise:\n{dialogue}\nSummary:"`, filled in from the columns of a row.

    Written like `str.format`, of which only plain names are allowed: `{a.b}`, `{a[0]}` or `{a!r}` would
    let a configuration file reach into objects. Literal braces are doubled.

    Raises:
        ConfigurationError: the text is not such a template.
    """

    def __init__(self, text: str, name: str = "template") -> None:
        self.text = text
        self.name = name
        self.parts = list(self._parse())
        self.fields = list(dict.fromkeys(field for _, field in self.parts if field is not None))

    def _parse(self) -> Iterable[tuple[str, str | None]]:
        try:
            pieces = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigurationError(
                f"{self.name} {self.text!r}: {error}; write {{{{ and }}}} for braces that stand for themselves"
            ) from None
        for literal, field, spec, conversion in pieces:
            if field is not None and (
                spec or conversion or not re.fullmatch(r"[^\W\d][^.\[\]!:{}]*", field)
            ):
                raise ConfigurationError(
                    f"{self.name} {self.text!r}: '{{{field}...}}' is not a plain column name; write {{column}}, "
                    "and {{ and }} for braces that stand for themselves"
                )
            yield literal, field

    def check(self, columns: Iterable[str], where: str) -> None:
        """Raise a DataError if the template names a column that the data does not have."""
        columns = list(columns)
        for field in self.fields:
            if field not in columns:
                raise DataError(
                    f"{where} has no column {field!r}, which {self.name} names; its columns are "
                    f"{', '.join(columns)}." + nearest(field, columns)
                )

    def render(self, value_of: Callable[[str], object]) -> str:
        """Return the text with each field replaced by `value_of(field)`.

        Raises:
            BadRow: a value is missing or is not text or a number, or all of them are empty.
        """
        values = {field: as_text(value_of(field), field) for field in self.fields}
        # An optional column may be empty (Alpaca's `input`), but not everything that a row contributes.
        if self.fields and not any(value.strip() for value in values.values()):
            what = (
                "is empty"
                if len(self.fields) == 1
                else f"is empty, as is {', '.join(self.fields[1:])}"
            )
            raise BadRow(what, self.fields[0])
        return "".join(
            literal + ("" if field is None else values[field]) for literal, field in self.parts
        )


def as_text(value: object, column: str) -> str:
    """Return a value as it stands in a prompt."""
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRow("is missing", column)
    if isinstance(value, int | float):
        return str(value)
    raise BadRow(f"is {kind(value)}, expected text", column)
