"""Layers whose weight a class of transformers reads without calling them, found in its source.

The hook of an adapter runs when its layer is called. So an adapter on a layer that is never called has no effect:
Mamba's `dt_proj`, the projections of WavLM's attention, MobileBERT's head. The same holds in training for a layer whose
weight goes into a fused kernel there, and which is called in evaluation: Mamba's `out_proj`. Which layers these are
differs by version of transformers.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType

from torch import nn

_SCANNED = ("transformers.models.", "transformers_modules.")
"""Packages of the classes that are read: those of transformers, and those that a checkpoint brings."""

_OF_TENSOR = ("dtype", "device", "shape", "data")
"""Attributes of a weight that say nothing of its use."""


def never_calls(parent: nn.Module, name: str) -> bool:
    """Return whether a module uses the weight of its child `name` without calling it, always or in training."""
    # Some classes call a layer only if transformers quantised the model.
    is_quantised = hasattr(getattr(parent, "config", None), "_is_quantized")
    return name in _only_read(type(parent), is_quantised)


@functools.cache
def _only_read(kind: type[nn.Module], is_quantised: bool) -> frozenset[str]:
    """Return the attributes whose weight a class reads and which it neither calls nor passes on, or not in training."""
    methods = [
        method
        for owner in kind.__mro__
        if owner.__module__.startswith(_SCANNED)
        for name, value in vars(owner).items()
        if isinstance(method := inspect.unwrap(value) if callable(value) else value, FunctionType)
        if "init" not in name
    ]
    uses: dict[str, set[str]] = {"read": set(), "read in training": set(), "called": set()}
    if any("weight" in method.__code__.co_names for method in methods):
        try:
            for method in methods:
                tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
                for name, use in _uses(tree, [], is_quantised):
                    uses[use].add(name)
        except (OSError, SyntaxError):  # no source
            return frozenset()
    return frozenset(uses["read"] - uses["called"] | uses["read in training"])


def _uses(node: ast.AST, around: list[ast.AST], is_quantised: bool) -> Iterator[tuple[str, str]]:
    """Yield each attribute of `self` below a node, and its use; `around` are the outer nodes, the innermost last."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Load()):
            match around[-2:]:
                case [outer, ast.Attribute(attr="weight", ctx=ast.Load())]:
                    if not _is_harmless(outer):
                        in_training = any(map(_tests_training, around))
                        yield name, "read in training" if in_training else "read"
                case [*_, ast.Attribute(attr=attribute)] if attribute != "forward":
                    pass
                case _:
                    yield name, "called"
    for child in _children(node, is_quantised):
        yield from _uses(child, [*around, node], is_quantised)


def _children(node: ast.AST, is_quantised: bool) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and not is_quantised and "_is_quantized" in ast.unparse(node.test):
        yield from node.orelse
    else:
        yield from ast.iter_child_nodes(node)


def _tests_training(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "self.training" in ast.unparse(node.test)


def _is_harmless(outer: ast.AST) -> bool:
    """Return whether the expression around a weight reads no values: its dtype, or a test of its type."""
    if isinstance(outer, ast.Attribute):
        return outer.attr in _OF_TENSOR
    return isinstance(outer, ast.Call) and ast.unparse(outer.func) == "isinstance"
