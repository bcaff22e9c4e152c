"""Check on a trial input that a layer computes what a merge assumes: its type's formula, such as ``W x + b``.

An adapter adds ``D x`` to a layer's output, and a merge adds ``D`` to W. Both have the same effect only if the output
to which the adapter adds is ``W x + b``. A subclass may compute something else, and a forward hook that runs before
the adapter's may change the output.

Only layers for which this is in doubt are tried: those whose forward method is not their type's own, and those with
such a hook. The trial has two samples, the layer's dtype and device, and fixed seeds; the global random generators
are restored. The forward method runs on a shallow copy of the layer in evaluation mode: attributes and buffers that it
sets are dropped, but a list that it appends to gets one more entry. A hook is called once, as in a forward pass: one
that counts or collects outputs sees one more. Hooks of PyTorch (FSDP, profilers) and of lorakit are trusted and not
called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module

from lorakit.adapters.layer_adapters import after_forward
from lorakit.models.layers import FORWARDS, call_forward, copy_of, kind_of_formula, trial_input
from lorakit.models.packed import packed_by
from lorakit.models.quantised import quantised_weight
from lorakit.ops.seeding import seeded


@torch.no_grad()
def why_not_linear(path: str, layer: nn.Module) -> str | None:
    """Return why the forward method of the layer at `path` does not compute its type's formula, or None if it does.

    Layers without a known type, quantised layers (whose formula has ``W_q``) and layers without values (on the meta
    device, or with fake tensors) are not tried.
    """
    kind = _kind(layer)
    if kind is None or quantised_weight(layer) is not None:
        return None
    if type(layer).forward is FORWARDS[kind] and "forward" not in layer.__dict__:
        return None
    name = f"the forward method of '{path}' ({type(layer).__name__})"
    with seeded(0, [layer.weight.device]):  # type: ignore[list-item, union-attr]
        try:
            x = trial_input(layer)
            output = call_forward(copy_of(layer), x.clone())
            expected = FORWARDS[kind](layer, x)
        except Exception as error:
            # Nothing else shows that the method computes the formula.
            return f"{name} raises {type(error).__name__} on a trial input ({error})"
    if isinstance(layer, nn.Embedding):
        expected = expected * getattr(layer, "embed_scale", 1)
    if _equal(output, expected):
        return None
    return f"{name} does not compute what {kind.__name__} computes"


@torch.no_grad()
def why_hooks_change_output(path: str, layer: nn.Module) -> str | None:
    """Return which forward hook that runs before the adapter's changes the output of the layer at `path`, or None."""
    hooks = list(_hooks_before_adapter(layer))
    if not hooks or _kind(layer) is None:
        return None
    with seeded(0, [layer.weight.device]):  # type: ignore[list-item, union-attr]
        x = trial_input(layer)
        output = call_forward(copy_of(layer), x.clone())
        for hook, with_kwargs in hooks:
            name = f"the forward hook {getattr(hook, '__qualname__', repr(hook))} on '{path}'"
            given = _hidden(output).clone()
            arguments = ((x,), {}) if with_kwargs else ((x,),)
            try:
                result = hook(layer, *arguments, output)
            except Exception as error:
                return f"{name} raises {type(error).__name__} on a trial input ({error})"
            if not _equal(output if result is None else result, given):
                return f"{name}, which runs before the adapter's, changes the output"
    return None


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """Return the layer's type with a known formula; None if there is none, or no values to try it with."""
    kind = kind_of_formula(layer)
    if kind is None or packed_by(layer) is not None:  # nothing merges into a packed layer
        return None
    weight: Any = layer.weight
    return None if weight.is_meta or isinstance(weight, FakeTensor) else kind


def _hooks_before_adapter(layer: nn.Module) -> Iterator[tuple[Callable[..., Any], bool]]:
    """Yield the forward hooks that run before the adapter's, and whether each takes keyword arguments."""
    for hooks, with_kwargs in (
        (torch_module._global_forward_hooks, torch_module._global_forward_hooks_with_kwargs),
        (layer._forward_hooks, layer._forward_hooks_with_kwargs),
    ):
        for key, hook in hooks.items():
            if hook is after_forward:
                return
            if not (getattr(hook, "__module__", None) or "").startswith(("torch.", "lorakit.")):
                yield hook, key in with_kwargs


def _hidden(output: Any) -> Any:
    """Return the output to which an adapter adds: the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _equal(actual: Any, expected: Tensor) -> bool:
    """Return whether two outputs are equal up to rounding, in each sample relative to its largest value."""
    actual = _hidden(actual)
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    # 1e-3 allows for TF32 products.
    tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps)
    actual = actual.to(expected.dtype)
    return all(
        torch.allclose(a, e, rtol=0, atol=tolerance * e.abs().max().item(), equal_nan=True)
        for a, e in zip(actual, expected, strict=True)
    )
