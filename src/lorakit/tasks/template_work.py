"""The work of a chat template: what each step costs, charged to a budget before it is computed."""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jinja2.utils import Namespace

UNITS = 10_000_000
"""Work of one rendering: a unit is a character or a list item that the template makes; a step costs `STEP`."""
UNITS_PER_CHARACTER = 100
"""More work for each character of the conversation."""
SECONDS = 10.0
"""Longest time of one rendering."""

STEP = 20
"""Units of a loop's turn, a call, a filter or an arithmetic operation; UNITS of them take about a second."""
_ITEM = 8
"""Units of an item of a list: its bytes."""
_MAX_BITS = 4096
"""Largest whole number. Python multiplies larger ones slowly, and cannot print them."""


class TooMuchError(Exception):
    """A rendering exceeds its limits."""


@dataclass
class _Budget:
    limit: float
    spent: float = 0
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    def charge(self, units: float) -> None:
        self.spent += units
        if self.spent > self.limit:
            raise TooMuchError(
                f"it needs more than {self.limit:,.0f} units of work (steps and characters)"
            )
        if time.monotonic() > self.deadline:
            raise TooMuchError(f"it ran for more than {SECONDS:g} seconds")

    @property
    def left(self) -> float:
        return self.limit - self.spent


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited_to_budget(*inputs: Any) -> Iterator[None]:
    """Limit the work in this block; the limit grows with the size of the inputs."""
    token = _budget.set(_Budget(UNITS + UNITS_PER_CHARACTER * sum(size_of(list(inputs)))))
    try:
        yield
    finally:
        _budget.reset(token)


def is_limited() -> bool:
    """Return whether the work is limited now."""
    return _budget.get() is not None


def admit(value: Any) -> Any:
    """Charge for a new value, and return it."""
    if isinstance(value, int):
        require_small(value.bit_length())
    items, characters = size_of(value)
    if items + characters > _left():
        charge(items + characters)
    # The texts in a list exist already.
    charge(STEP + (characters if isinstance(value, str | bytes) else items))
    return value


_WIDTHS = {"ljust", "rjust", "center", "zfill", "batch", "slice", "round", "truncate"}
"""Methods and filters whose result can be as long as a number in their arguments."""
_QUADRATIC = {"urlize", "striptags", "wordwrap", "pprint", "xmlattr"}
"""Filters whose time can grow with the square of the text."""
CONSUMING = {"join", "sum"}
"""Filters that read an iterator to its end."""


def filter_work(name: str, value: Any, parameters: list[Any], options: Mapping[str, Any]) -> float:
    """Return the units of a filter, beyond its result."""
    if name in _WIDTHS:
        return whole_numbers(parameters, options)
    if name == "sum":  # of numbers, unless it starts from a list
        return text_size(value) ** 2 if parameters or options else 0
    if name in _QUADRATIC:
        return text_size(value) ** 2
    if name == "tojson":
        items, characters = size_of(value)
        return characters + items * (1 + whole_numbers(parameters, options))
    if name == "format":
        return percent_format(str(value), [*parameters, options])
    if name in ("replace", "indent", "join", "string", "escape", "e", "forceescape"):
        size = text_size(value)
        charge(size)
        arguments = [*parameters, *options.values()]
        if name == "join":
            count = len(value) if hasattr(value, "__len__") else size
            return count * text_size(arguments)
        if name == "indent":
            return (1 + str(value).count("\n")) * (
                whole_numbers(arguments, {}) + text_size(arguments)
            )
        if name == "replace" and len(arguments) > 1:
            return str(value).count(str(arguments[0])) * text_size(arguments)
    return 0


def method_work(owner: Any, name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> float:
    """Return the units of a method of text that can make a long one."""
    if name in _WIDTHS:
        return whole_numbers(args, options)
    if name == "expandtabs":
        return len(owner) * whole_numbers(args, options)
    if name == "join":
        return text_size(args) + len(owner) * sum(len(a) for a in args if hasattr(a, "__len__"))
    if name == "replace" and len(args) > 1 and isinstance(args[0], type(owner)):
        return owner.count(args[0]) * text_size(args)
    if name == "translate":
        return len(owner) * text_size(args)
    return 0


def charge_product(left: Any, right: Any) -> None:
    """Charge for a product of numbers, or of a text or list with a number."""
    if isinstance(left, int) and isinstance(right, int):
        require_small(left.bit_length() + right.bit_length())
    for text, count in ((left, right), (right, left)):
        if isinstance(count, int) and hasattr(text, "__len__"):
            charge(sum(size_of(text)) * max(count, 0))


_BRACES = re.compile(r"\{[^{}]*\}")
_NESTED = re.compile(r"\{[^{}]*:[^{}]*\{")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*")
_DIGITS = re.compile(r"\d+")


def brace_format(text: str, arguments: list[Any]) -> float:
    """Return the units of `str.format`."""
    if _NESTED.search(text.replace("{{", "")):
        raise TooMuchError("it computes the width of a format; write the width as a number")
    return _format_work(_BRACES.findall(text), text, arguments)


def percent_format(text: str | bytes, arguments: Any) -> float:
    """Return the units of a format with ``%``."""
    fields = _PERCENT.findall(text if isinstance(text, str) else text.decode("latin-1"))
    work = _format_work(fields, text, arguments)
    if any("*" in f for f in fields):
        work += whole_numbers(arguments if isinstance(arguments, list | tuple) else [arguments], {})
    return work


def _format_work(fields: list[str], text: str | bytes, arguments: Any) -> float:
    widths = sum(min(int(d[:20]), 10**18) for f in fields for d in _DIGITS.findall(f))
    return len(text) + widths + len(fields) * text_size(arguments)


def whole_numbers(args: Any, options: Mapping[str, Any]) -> int:
    """Return the sum of the whole numbers in the arguments of a call, without their signs."""
    return sum(abs(value) for value in (*args, *options.values()) if isinstance(value, int))


def text_size(value: Any) -> int:
    """Return the units of the text of a value."""
    return sum(size_of(value))


_VIEWS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


def size_of(value: Any) -> tuple[int, int]:
    """Return the units of the items and of the characters in a nested value, as its text has them.

    Stops above the budget: a list of 40 levels that each repeat the one below has 10^12 items.
    """
    if isinstance(value, str | bytes):
        return _ITEM, len(value)
    items, characters, left = 0, 0, _left()
    todo = [value]
    while todo:
        value = todo.pop()
        items += _ITEM
        if isinstance(value, str | bytes):
            characters += len(value)
        elif isinstance(value, dict):
            todo += value.keys()
            todo += value.values()
        elif isinstance(value, _VIEWS):
            todo += value
        elif isinstance(value, Namespace):
            todo.append(value._Namespace__attrs)  # pyright: ignore[reportAttributeAccessIssue]
        waiting = _ITEM * len(todo)
        if items + characters + waiting > left:
            return items + waiting, characters
    return items, characters


def require_small(bits: int) -> None:
    """Reject a whole number of too many bits."""
    if bits > _MAX_BITS:
        raise TooMuchError(f"it computes a number of more than {_MAX_BITS:,} bits")


def charge(units: float) -> None:
    """Charge for work; raise a TooMuchError above the limits."""
    if (budget := _budget.get()) is not None:
        budget.charge(units)


def _left() -> float:
    budget = _budget.get()
    return float("inf") if budget is None else budget.left
