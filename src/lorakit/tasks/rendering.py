"""Limits on the work of a chat template, which is a program from an untrusted file.

Jinja's sandbox keeps a template from files and Python's internals, but not from a product of strings with 10^9
characters or a loop without an end. Here every step and every new character is charged to a budget before it is
computed (`lorakit.tasks.template_work`); the deadline is a second limit for slow steps. Both work in any thread,
without signals or processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import Template, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lorakit.errors import DataError
from lorakit.tasks.task import BadRow
from lorakit.tasks.template_work import (
    CONSUMING,
    STEP,
    TooMuchError,
    admit,
    brace_format,
    charge,
    charge_product,
    filter_work,
    is_limited,
    limited_to_budget,
    method_work,
    percent_format,
    require_small,
    text_size,
    whole_numbers,
)

MAX_TEMPLATE = 1_000_000
"""Longest chat template, in characters; those of published models have up to 30,000."""


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
    try:
        with limited_to_budget(*inputs):
            yield
    except (TemplateSyntaxError, SyntaxError) as error:
        first, *_ = [*str(error).splitlines(), type(error).__name__]
        raise _refusal(name, f"line {error.lineno}: {first}") from error
    except RecursionError as error:
        raise _refusal(name, "it calls itself without an end, or is nested too deeply") from error
    except (SecurityError, OverflowError, MemoryError, TooMuchError) as error:
        raise _refusal(name, str(error) or "it needs more memory than there is") from error
    # Templates reject what their model does not support: a system role, two user turns in a row. They can also fail
    # with almost any exception of Python.
    except Exception as error:
        raise BadRow(f"was rejected by the chat template: {error}", "messages") from error


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
        return _compiled(chat_template) if is_limited() else original(chat_template)

    library._compile_jinja_template = compile_template


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    from transformers.utils import chat_template_utils as library

    if len(template) > MAX_TEMPLATE:
        raise TooMuchError(
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
            charge_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            require_small(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str | bytes):
            charge(percent_format(left, right))
        return self.admit(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method, a macro or a global after charging for it."""
        owner = getattr(function, "__self__", None)
        if owner is self:  # inserted by _Charging
            return function(*args)
        if isinstance(owner, str | bytes):
            args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
            charge(method_work(owner, function.__name__, args, kwargs))
        elif isinstance(owner, int):
            charge(whole_numbers(args, kwargs))
        return self.admit(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Charge for `str.format` and `str.format_map`."""
        bounded = super().wrap_str_format(value)
        if bounded is None:
            return None

        @functools.wraps(bounded)
        def format_text(*args: Any, **kwargs: Any) -> str:
            charge(brace_format(value.__self__, [*args, kwargs]))
            return bounded(*args, **kwargs)

        return format_text

    def step(self, units: int) -> None:
        """Charge for one turn of a loop or one call of a macro."""
        charge(STEP + units)

    def admit(self, value: Any) -> Any:
        """Charge for a new value. Items that a list repeats count each time."""
        return admit(value)

    def write(self, value: Any) -> Any:
        """Charge for the text of a value."""
        charge(text_size(value))
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
        if name in CONSUMING and isinstance(value, Iterator):
            value = list(value)
        charge(filter_work(name, value, parameters, kwargs))
        result = original(*first, value, *parameters, **kwargs)
        if not isinstance(result, Iterator):
            admit(result)
        return result

    return bounded
