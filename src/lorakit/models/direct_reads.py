"""Layers whose weight a class of transformers or timm reads without calling them, found in its source.

The hook of an adapter runs when its layer is called. So an adapter on a layer that is never called has no effect:
Mamba's `dt_proj`, the projections of WavLM's attention, `qkv` in timm's EVA and BEiT. The same holds in training for a
layer whose weight goes into a fused kernel there, and which is called in evaluation: Mamba's `out_proj`. Which layers
these are differs by version of a library, and by the settings of a model: EVA calls `qkv` if it has no bias.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

_SCANNED = ("transformers.models.", "transformers_modules.", "timm.")
"""Packages of the classes that are read. In others, which may call a layer in any way, nothing would be certain."""

_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""The layers that an attention of diffusers calls after `fuse_qkv_projections`, and those that it keeps and no longer
calls."""

_READERS = ("causal_conv1d_forward",)
"""Functions of transformers that get a layer, read its weight and do not call it."""

_OF_TENSOR = ("dtype", "device", "shape", "data")
"""Attributes of a weight that say nothing of its use."""

_OF_CONDITION = (
    *(ast.Attribute, ast.Name, ast.Constant, ast.expr_context),
    *(ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop),
)
"""The parts of a condition that can be evaluated without a call."""


def never_calls(parent: nn.Module, name: str) -> bool:
    """Return whether a module uses the weight of its child `name` without calling it, always or in training."""
    if getattr(parent, "fused_projections", False) and any(
        name in parts for fused, parts in _FUSED.items() if fused in parent._modules
    ):
        return True
    kind = type(parent)
    return name in _only_read(kind, tuple(_outcome(c, parent) for c in _conditions(kind).values()))


@functools.cache
def _only_read(kind: type[nn.Module], outcomes: tuple[bool | None, ...]) -> frozenset[str]:
    """Return the attributes whose weight a class reads and which it neither calls nor passes on, or not in training.

    `outcomes` are those of `_conditions`, None where unknown.
    """
    branches = dict(zip(_conditions(kind), outcomes, strict=True))
    uses: dict[str, set[str]] = {"read": set(), "read in training": set(), "called": set()}
    for tree in _methods(kind):
        for name, use in _uses(tree, [], branches):
            uses[use].add(name)
    return frozenset(uses["read"] - uses["called"] | uses["read in training"])


@functools.cache
def _methods(kind: type[nn.Module]) -> tuple[ast.AST, ...]:
    """Return the syntax trees of a class's methods; none if it reads no weight, or leaves its forward pass to torch."""
    of_forward = next(owner for owner in kind.__mro__ if "forward" in vars(owner))
    if of_forward.__module__.startswith("torch."):  # nn.Sequential calls its layers by position
        return ()
    methods = [
        method
        for owner in kind.__mro__
        if owner.__module__.startswith(_SCANNED)
        for name, value in vars(owner).items()
        if isinstance(method := inspect.unwrap(value) if callable(value) else value, FunctionType)
        if not re.search("init|reset", name)
    ]
    if all({"weight", *_READERS}.isdisjoint(method.__code__.co_names) for method in methods):
        return ()
    try:
        return tuple(ast.parse(textwrap.dedent(inspect.getsource(method))) for method in methods)
    except (OSError, SyntaxError):  # no source
        return ()


@functools.cache
def _conditions(kind: type[nn.Module]) -> dict[ast.AST, CodeType]:
    """Return each `if` of a class that depends on the settings of an instance alone, and its condition."""
    return {
        node: compile(ast.Expression(node.test), "<condition>", "eval")
        for tree in _methods(kind)
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.IfExp) and all(map(_is_of_settings, ast.walk(node.test)))
    }


def _is_of_settings(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name in ("self", "hasattr")
        case ast.Call(func=function):
            return isinstance(function, ast.Name)
        case ast.Attribute(attr="training"):
            return False
    return isinstance(node, _OF_CONDITION)


def _outcome(condition: CodeType, module: nn.Module) -> bool | None:
    """Return whether a condition of `_conditions` holds for a module, or None if it fails."""
    try:
        return bool(eval(condition, {"self": module}))
    except Exception:  # in a property, or for a tensor on the meta device
        return None


def _uses(
    node: ast.AST, around: list[ast.AST], branches: dict[ast.AST, bool | None]
) -> Iterator[tuple[str, str]]:
    """Yield each attribute of `self` below a node, and its use; `around` are the outer nodes, the innermost last."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Load()):
            match around[-2:]:
                case [outer, ast.Attribute(attr="weight", ctx=ast.Load())]:
                    if not _is_harmless(outer):
                        in_training = any(map(_tests_training, around))
                        yield name, "read in training" if in_training else "read"
                case [*_, ast.Call(func=ast.Name(id=function))] if function in _READERS:
                    yield name, "read"
                case [*_, ast.Attribute(attr=attribute)] if attribute != "forward":
                    pass
                case [*_, outer] if not _is_harmless(outer):
                    yield name, "called"
    for child in _children(node, branches.get(node)):
        yield from _uses(child, [*around, node], branches)


def _children(node: ast.AST, outcome: bool | None) -> Iterator[ast.AST]:
    """Yield the nodes below a node; of an `if` with a known outcome, only the branch that runs."""
    if isinstance(node, ast.If | ast.IfExp) and outcome is not None:
        branch = node.body if outcome else node.orelse
        yield from branch if isinstance(branch, list) else [branch]
    else:
        yield from ast.iter_child_nodes(node)


def _tests_training(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "self.training" in ast.unparse(node.test)


def _is_harmless(outer: ast.AST) -> bool:
    """Return whether the expression around a layer or weight reads no values: its dtype, or a test of its type."""
    if isinstance(outer, ast.Attribute):
        return outer.attr in _OF_TENSOR
    return isinstance(outer, ast.Call) and ast.unparse(outer.func) == "isinstance"
