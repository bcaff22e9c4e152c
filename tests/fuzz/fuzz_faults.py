"""Checks of the readers that a test removes, three for each reader: the harness must find that each is missing.

A fault names a function and the condition of an `if`, or a type of an `except`, that is deleted from its source.
When a check moves, move the fault with it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """One check to remove."""

    reader: str
    function: str
    """Module and name, divided by a colon."""
    check: str
    """The condition of an `if`, or `except TYPE`."""


_FORMAT = "record.get('format') != 'lorakit' or type(version) is not int"
_HALVES = "not all((torch.equal(tensor.to(dtype).float(), tensor) for tensor in full))"

FAULTS = (
    # a number that is not finite, a tensor that nothing names, an exception of the library
    Fault(
        "safetensors",
        "lorakit.adapters.tensor_checks:check_tensor",
        "not tensor.is_meta and (not tensor.sum().isfinite()) and (not tensor.isfinite().all())",
    ),
    Fault("safetensors", "lorakit.adapters.formats.lorakit_json:_read", "tensors"),
    # a rank, DoRA without magnitudes, another method
    Fault(
        "peft",
        "lorakit.adapters.formats.peft.reading:_layer",
        "A.numel() and A.shape[:1] != (experts_count * rank,)",
    ),
    Fault(
        "peft",
        "lorakit.adapters.formats.peft.reading:_layer",
        "parts.keys() != expected",
    ),
    Fault(
        "peft", "lorakit.adapters.formats.peft.adapter_config:_check_supported", "kind != 'LORA'"
    ),
    # a checksum, the format, its version
    Fault(
        "lorakit_json",
        "lorakit.storage.records:require_checksum",
        "record.get(CHECKSUM) != _checksum(record)",
    ),
    Fault(
        "lorakit_json",
        "lorakit.adapters.formats.lorakit_json:_check_record",
        _FORMAT,
    ),
    Fault(
        "lorakit_json",
        "lorakit.adapters.formats.lorakit_json:_check_record",
        "version != FORMAT_VERSION",
    ),
    Fault("loralib", "lorakit.adapters.formats.loralib:_layer", "parts.keys() != expected"),
    # a place, missing weights, a number that 16 bits cannot hold
    Fault("gguf", "lorakit.models.gguf_header:_placed", "start < end"),
    Fault("gguf", "lorakit.models.gguf:_read_model", "info['missing_keys']"),
    Fault(
        "gguf",
        "lorakit.models.gguf:_smallest_dtype",
        _HALVES,
    ),
    # a key that occurs twice, the depth, an exception of the library
    Fault("yaml", "lorakit.storage.yaml_files:Loader.compose_mapping_node", "key.value in seen"),
    Fault("yaml", "lorakit.storage.yaml_files:Loader.compose_node", "self._depth > MAX_DEPTH"),
    Fault("yaml", "lorakit.storage.yaml_files:read_yaml", "except yaml.YAMLError"),
    # a byte order mark, a blank line, an exception of the library
    Fault("jsonl", "lorakit.data.bounded_files:open_data", "file.peek(3)[:3] == codecs.BOM_UTF8"),
    Fault("jsonl", "lorakit.data.readers:read_jsonl", "not line.strip()"),
    Fault("jsonl", "lorakit.data.readers:read_jsonl", "except RecursionError"),
    # the number of fields, a column without a name, an exception of the library
    Fault("csv", "lorakit.data.readers:read_csv", "len(record) != len(header)"),
    Fault("csv", "lorakit.data.readers:_checked_header", "not name"),
    Fault("csv", "lorakit.data.readers:read_csv", "except csv.Error"),
    # three exceptions of the library
    Fault("parquet", "lorakit.data.parquet:read_parquet", "except pyarrow.ArrowException"),
    Fault("parquet", "lorakit.data.parquet:read_parquet", "except OSError"),
    Fault("parquet", "lorakit.data.parquet:read_parquet", "except UnicodeDecodeError"),
    # a length, damaged files, an exception of the library
    Fault("tokenizer", "lorakit.models.tokenizer:read_tokenizer", "not (whole and length >= 1)"),
    Fault("tokenizer", "lorakit.models.tokenizer:tokenizer_of", "has_files"),
    Fault("tokenizer", "lorakit.models.tokenizer:tokenizer_of", "except Exception"),
    # the work, the size of a product, an exception of the library
    Fault("template", "lorakit.tasks.template_work:_Budget.charge", "self.spent > self.limit"),
    Fault("template", "lorakit.tasks.rendering:BoundedEnvironment.call_binop", "operator == '*'"),
    Fault("template", "lorakit.tasks.rendering:bounded_rendering", "except Exception"),
)


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Remove the check in this block, for every module that has imported the function."""
    module, path = fault.function.split(":")
    function: Any = importlib.import_module(module)
    for name in path.split("."):
        function = getattr(function, name)
    function = inspect.unwrap(function)
    original, function.__code__ = function.__code__, _without(function, fault.check)
    try:
        yield
    finally:
        function.__code__ = original


def _without(function: Any, check: str) -> CodeType:
    """Compile a function without a check. It is compiled inside a class, so that `super()` works."""
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source)
    remover = _Remover(check)
    remover.visit(tree)
    if not remover.count:
        raise LookupError(f"{function.__qualname__} has no check {check!r}; move the fault with it")
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list.clear()
    future = ast.parse("from __future__ import annotations").body
    wrapper = ast.parse("class _:\n    pass").body[0]
    assert isinstance(wrapper, ast.ClassDef)
    needs_class = "__class__" in function.__code__.co_freevars
    wrapper.body = [definition]
    tree.body = [*future, wrapper if needs_class else definition]
    code: Any = compile(ast.fix_missing_locations(tree), inspect.getfile(function), "exec")
    return _find(code, function.__name__)


def _find(code: CodeType, name: str) -> CodeType:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            return constant if constant.co_name == name else _find(constant, name)
    raise LookupError(name)


class _Remover(ast.NodeTransformer):
    """Deletes an `if` with its body (but not its `else`), or a type of an `except`."""

    def __init__(self, check: str) -> None:
        self.check, self.count = check, 0

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if ast.unparse(node.test) != self.check:
            return node
        self.count += 1
        return node.orelse or ast.Pass()

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:
        self.generic_visit(node)
        types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        left = [kind for kind in types if kind and f"except {ast.unparse(kind)}" != self.check]
        if len(left) < len(types):
            self.count += 1
            node.type = ast.Tuple(left, ast.Load())  # without types, it catches nothing
        return node
