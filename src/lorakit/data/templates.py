"""Prompt templates: text with `{column}` fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from string import Formatter

from lorakit.errors import ConfigurationError, DataError, nearest
from lorakit.formatting import listed
from lorakit.tasks.task import BadRow, json_type


class Template:
    r"""A template such as `"Summarise:\n{dialogue}\nSummary:"`, rendered from the columns of a row.

    The syntax is that of `str.format` with plain names only: `{a.b}`, `{a[0]}` and `{a!r}` would give a configuration
    file access to attributes of objects. Double the braces for literal ones.

    Raises:
        ConfigurationError: The template is malformed.
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
                f"{self.name} {self.text!r}: {error}; write {{{{ and }}}} for literal braces"
            ) from None
        for literal, field, spec, conversion in pieces:
            if field is not None and (
                spec or conversion or not re.fullmatch(r"[^\W\d][^.\[\]!:{}]*", field)
            ):
                raise ConfigurationError(
                    f"{self.name} {self.text!r}: '{{{field}...}}' is not a plain column name; write {{column}}, "
                    "and {{ and }} for literal braces"
                )
            yield literal, field

    def check(self, columns: Iterable[str], source_name: str) -> None:
        """Raise a DataError if the data lacks a column of the template."""
        columns = list(columns)
        for field in self.fields:
            if field not in columns:
                raise DataError(
                    f"{source_name} has no column {field!r}, which {self.name} uses. Its columns are "
                    f"{listed(columns)}." + nearest(field, columns)
                )

    def render(self, value_of: Callable[[str], object]) -> str:
        """Return the text with each field replaced by `value_of(field)`, which raises KeyError for a missing one.

        Raises:
            BadRow: A value is missing or neither text, a number nor null, or all values are empty.
        """
        values = {field: self._text(value_of, field) for field in self.fields}
        # An optional column may be empty or null (Alpaca's `input`), but not all columns of the template.
        if self.fields and not any(value.strip() for value in values.values()):
            others = f", as is {', '.join(self.fields[1:])}" if len(self.fields) > 1 else ""
            raise BadRow(f"is empty{others}", self.fields[0])
        return "".join(
            literal + ("" if field is None else values[field]) for literal, field in self.parts
        )

    def _text(self, value_of: Callable[[str], object], field: str) -> str:
        try:
            value = value_of(field)
        except KeyError:
            raise BadRow("is missing", field) from None
        if value is None:
            return ""
        if not isinstance(value, str | int | float):
            raise BadRow(f"is {json_type(value)}, expected text", field)
        return str(value)
