"""Limits on the work of a chat template, which is a program from an untrusted file.

Jinja's sandbox keeps a template from files and Python's internals, but not from a product of strings with 10^9
characters or a loop without an end. Here every step and every new character is charged to a budget before it is
computed; the deadline is a second limit for slow steps. Both work in any thread, without signals or processes.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Template, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lorakit.errors import DataError
from lorakit.tasks.task import BadRow

MAX_TEMPLATE = 1_000_000
"""Longest chat template, in characters; those of published models have up to 30,000."""
UNITS = 10_000_000
"""Work of one rendering: a unit is a character or a list item that the template makes; a step costs `_STEP`."""
UNITS_PER_CHARACTER = 100
"""More work for each character of the conversation."""
SECONDS = 10.0
"""Longest time of one rendering."""

_STEP = 20
"""Units of a loop's turn, a call, a filter or an arithmetic operation; UNITS of them take about a second."""
_ITEM = 8
"""Units of an item of a list: its bytes."""
_MAX_BITS = 4096
"""Largest whole number. Python multiplies larger ones slowly, and cannot print them."""


class _TooMuchError(Exception):
    """A rendering exceeds its limits."""


@dataclass
class _Budget:
    limit: float
    spent: float = 0
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    def charge(self, units: float) -> None:
        self.spent += units
        if self.spent > self.limit:
            raise _TooMuchError(
                f"it needs more than {self.limit:,.0f} units of work (steps and characters)"
            )
        if time.monotonic() > self.deadline:
            raise _TooMuchError(f"it ran for more than {SECONDS:g} seconds")

    @property
    def left(self) -> float:
        return self.limit - self.spent


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def bounded_rendering(name: str, *inputs: Any) -> Iterator[None]:
    """Bound the chat templates that transformers renders in this block, and convert their exceptions.

    Args:
        name: Name of the tokenizer, for messages.
        inputs: What is rendered: the messages, the tools and other variables. The limit grows with their size.

    Raises:
        DataError: The template is invalid, breaks the sandbox's rules or exceeds the limits.
        BadRow: The template rejects these messages.
    """
    _install()
    limit = UNITS + UNITS_PER_CHARACTER * sum(_size(list(inputs)))
    token = _budget.set(_Budget(limit))
    try:
        yield
    except (TemplateSyntaxError, SyntaxError) as error:
        first, *_ = [*str(error).splitlines(), type(error).__name__]
        raise _refusal(name, f"line {error.lineno}: {first}") from error
    except RecursionError as error:
        raise _refusal(name, "it calls itself without an end, or is nested too deeply") from error
    except (SecurityError, OverflowError, MemoryError, _TooMuchError) as error:
        raise _refusal(name, str(error) or "it needs more memory than there is") from error
    # Templates reject what their model does not support: a system role, two user turns in a row. They can also fail
    # with almost any exception of Python.
    except Exception as error:
        raise BadRow(f"was rejected by the chat template: {error}", "messages") from error
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=32)
def variables_of(template: str) -> frozenset[str]:
    """Return the names of the variables that a caller of a chat template can set.

    These are the names that it reads and does not set itself, or sets after a test whether they are defined.

    Raises:
        DataError: The template is invalid.
    """
    with bounded_rendering("the tokenizer"):
        environment: Any = _compiled(template).environment
        tree = environment.parse(template)
        names = list(tree.find_all(nodes.Name))
        own = {name.name for name in names if name.ctx == "store"}
        tested = {
            test.node.name
            for test in tree.find_all(nodes.Test)
            if isinstance(test.node, nodes.Name)
        }
        read = meta.find_undeclared_variables(tree) - environment.globals.keys()
        return frozenset(read - (own - tested))


def _refusal(name: str, reason: str) -> DataError:
    return DataError(
        f"the chat template of {name} cannot be rendered: {reason.rstrip('.')}. Correct "
        "chat_template.jinja (or chat_template in tokenizer_config.json) in the tokenizer's folder, or use the "
        "tokenizer of another model"
    )


@functools.cache
def _install() -> None:
    """Let transformers compile with limits inside `bounded_rendering`, and as before elsewhere."""
    from transformers.utils import chat_template_utils as library

    original = library._compile_jinja_template

    def compile_template(chat_template: str) -> Template:
        return original(chat_template) if _budget.get() is None else _compiled(chat_template)

    library._compile_jinja_template = compile_template


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    from transformers.utils import chat_template_utils as library

    if len(template) > MAX_TEMPLATE:
        raise _TooMuchError(
            f"it has {len(template):,} characters, and the limit is {MAX_TEMPLATE:,}"
        )
    # An environment of transformers with its filters and tags, made for this template alone.
    environment: Any = library._cached_compile_jinja_template("").environment
    environment.__class__ = BoundedEnvironment
    environment.prepare()
    return environment.from_string(template)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Charges the work of a template to the budget of its rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def prepare(self) -> None:
        """Set the limits on an environment that another class made."""
        self.optimized = False  # the optimizer computes constant expressions during compilation
        self.finalize = _charge_output
        self.filters = {name: _bounded_filter(name, f) for name, f in self.filters.items()}
        del self.globals["lipsum"]

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Charging(self).visit(source), *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product, power, sum or format after charging for it."""
        if operator == "*":
            _charge_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require_small(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str | bytes):
            _charge(_percent_format(left, right))
        return self.admit(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method, a macro or a global after charging for it."""
        owner = getattr(function, "__self__", None)
        if owner is self:  # inserted by _Charging
            return function(*args)
        if isinstance(owner, str | bytes):
            args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
            _charge(_method_work(owner, function.__name__, args, kwargs))
        elif isinstance(owner, int):
            _charge(_whole_numbers(args, kwargs))
        return self.admit(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Charge for `str.format` and `str.format_map`."""
        bounded = super().wrap_str_format(value)
        if bounded is None:
            return None

        @functools.wraps(bounded)
        def format_text(*args: Any, **kwargs: Any) -> str:
            _charge(_brace_format(value.__self__, [*args, kwargs]))
            return bounded(*args, **kwargs)

        return format_text

    def step(self, units: int) -> None:
        """Charge for one turn of a loop or one call of a macro."""
        _charge(_STEP + units)

    def admit(self, value: Any) -> Any:
        """Charge for a new value. Items that a list repeats count each time."""
        return _admit(value)

    def write(self, value: Any) -> Any:
        """Charge for the text of a value."""
        _charge(_text_size(value))
        return value


def _admit(value: Any) -> Any:
    if isinstance(value, int):
        _require_small(value.bit_length())
    items, characters = _size(value)
    if items + characters > _left():
        _charge(items + characters)
    # The texts in a list exist already.
    _charge(_STEP + (characters if isinstance(value, str | bytes) else items))
    return value


@pass_context  # without a context, jinja would call it during compilation
def _charge_output(context: Any, value: Any) -> Any:
    return context.environment.write(value)


class _Charging(NodeTransformer):
    """Inserts calls of `BoundedEnvironment` into a template."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self.environment = environment

    def get_visitor(self, node: Any) -> Any:
        """Return the method that changes a node; None for most nodes."""
        if isinstance(node, _BODIES):
            return self._body
        if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict):
            return self._collection
        return self._joined if isinstance(node, nodes.Concat) else None

    def _body(self, node: Any) -> Any:
        """Charge for each turn of a loop or call of a macro, and for the literal text that it writes."""
        self.generic_visit(node)
        written = sum(len(data.data) for data in _own_text(node.body))
        step = nodes.ExprStmt(self._call("step", nodes.Const(written)))
        node.body.insert(0, step.set_lineno(node.lineno).set_environment(self.environment))
        return node

    def _collection(self, node: Any) -> Any:
        """Charge for a list, tuple or mapping. A tuple may also be the target of an assignment."""
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call("admit", node)

    def _joined(self, node: Any) -> Any:
        """Charge for the parts that `~` joins."""
        self.generic_visit(node)
        node.nodes = [self._call("write", part) for part in node.nodes]
        return node

    def _call(self, method: str, argument: Any) -> Any:
        call = nodes.Call(nodes.EnvironmentAttribute(method), [argument], [], None, None)
        return call.set_lineno(argument.lineno or 1).set_environment(self.environment)


_BODIES = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


def _own_text(body: list[Any]) -> Iterator[nodes.TemplateData]:
    """Yield the literal texts of a body, without those of loops and macros inside it."""
    for node in body:
        if isinstance(node, nodes.TemplateData):
            yield node
        elif not isinstance(node, _BODIES):
            yield from _own_text(list(node.iter_child_nodes()))


def _bounded_filter(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    skipped = int(hasattr(original, "jinja_pass_arg"))  # the context or environment comes first

    @functools.wraps(original)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        first, (value, *parameters) = args[:skipped], args[skipped:]
        if name in _CONSUMING and isinstance(value, Iterator):
            value = list(value)
        _charge(_filter_work(name, value, parameters, kwargs))
        result = original(*first, value, *parameters, **kwargs)
        if not isinstance(result, Iterator):
            _admit(result)
        return result

    return bounded


_WIDTHS = {"ljust", "rjust", "center", "zfill", "batch", "slice", "round", "truncate"}
"""Methods and filters whose result can be as long as a number in their arguments."""
_QUADRATIC = {"urlize", "striptags", "wordwrap", "pprint", "xmlattr"}
"""Filters whose time can grow with the square of the text."""
_CONSUMING = {"join", "sum"}


def _filter_work(name: str, value: Any, parameters: list[Any], options: Mapping[str, Any]) -> float:
    if name in _WIDTHS:
        return _whole_numbers(parameters, options)
    if name == "sum":  # of numbers, unless it starts from a list
        return _text_size(value) ** 2 if parameters or options else 0
    if name in _QUADRATIC:
        return _text_size(value) ** 2
    if name == "tojson":
        items, characters = _size(value)
        return characters + items * (1 + _whole_numbers(parameters, options))
    if name == "format":
        return _percent_format(str(value), [*parameters, options])
    if name in ("replace", "indent", "join", "string", "escape", "e", "forceescape"):
        size = _text_size(value)
        _charge(size)
        arguments = [*parameters, *options.values()]
        if name == "join":
            count = len(value) if hasattr(value, "__len__") else size
            return count * _text_size(arguments)
        if name == "indent":
            return (1 + str(value).count("\n")) * (
                _whole_numbers(arguments, {}) + _text_size(arguments)
            )
        if name == "replace" and len(arguments) > 1:
            return str(value).count(str(arguments[0])) * _text_size(arguments)
    return 0


def _method_work(owner: Any, name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> float:
    """Return the units of a method of text that can make a long one."""
    if name in _WIDTHS:
        return _whole_numbers(args, options)
    if name == "expandtabs":
        return len(owner) * _whole_numbers(args, options)
    if name == "join":
        return _text_size(args) + len(owner) * sum(len(a) for a in args if hasattr(a, "__len__"))
    if name == "replace" and len(args) > 1 and isinstance(args[0], type(owner)):
        return owner.count(args[0]) * _text_size(args)
    if name == "translate":
        return len(owner) * _text_size(args)
    return 0


def _charge_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _require_small(left.bit_length() + right.bit_length())
    for text, count in ((left, right), (right, left)):
        if isinstance(count, int) and hasattr(text, "__len__"):
            _charge(sum(_size(text)) * max(count, 0))


_BRACES = re.compile(r"\{[^{}]*\}")
_NESTED = re.compile(r"\{[^{}]*:[^{}]*\{")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*")
_DIGITS = re.compile(r"\d+")


def _brace_format(text: str, arguments: list[Any]) -> float:
    if _NESTED.search(text.replace("{{", "")):
        raise _TooMuchError("it computes the width of a format; write the width as a number")
    return _format_work(_BRACES.findall(text), text, arguments)


def _percent_format(text: str | bytes, arguments: Any) -> float:
    fields = _PERCENT.findall(text if isinstance(text, str) else text.decode("latin-1"))
    work = _format_work(fields, text, arguments)
    if any("*" in f for f in fields):
        work += _whole_numbers(
            arguments if isinstance(arguments, list | tuple) else [arguments], {}
        )
    return work


def _format_work(fields: list[str], text: str | bytes, arguments: Any) -> float:
    widths = sum(min(int(d[:20]), 10**18) for f in fields for d in _DIGITS.findall(f))
    return len(text) + widths + len(fields) * _text_size(arguments)


def _whole_numbers(args: Any, options: Mapping[str, Any]) -> int:
    return sum(abs(value) for value in (*args, *options.values()) if isinstance(value, int))


def _text_size(value: Any) -> int:
    return sum(_size(value))


_VIEWS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


def _size(value: Any) -> tuple[int, int]:
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


def _require_small(bits: int) -> None:
    if bits > _MAX_BITS:
        raise _TooMuchError(f"it computes a number of more than {_MAX_BITS:,} bits")


def _charge(units: float) -> None:
    if (budget := _budget.get()) is not None:
        budget.charge(units)


def _left() -> float:
    budget = _budget.get()
    return float("inf") if budget is None else budget.left
