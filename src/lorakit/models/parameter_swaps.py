"""Use other tensors in place of a layer's parameters: for the length of a call, or until undone.

**For the length of a call**, a tensor in the instance's `__dict__` hides the parameter of that name:
`hide_parameters` and `show_parameters` in a pair of forward hooks, `hidden_parameters` around a block. Calls of one
layer that hide its parameters run one after the other, so that no thread computes with the tensors of another.
`with_parameters` gives a copy of the layer with other tensors and needs no such order.

**Until undone**, `ReplacedParameters` puts another parameter into the layer and keeps the original.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.models.faster_layers import FasterForward
from lorakit.models.frames import has_ended
from lorakit.models.layers import ADAPTERS, AdapterSlot
from lorakit.models.quantised import quantised_weight
from lorakit.models.tree import base_modules

# --- for the length of a call ------------------------------------------------------------------------

_RUNNING = "_calls_that_hide_parameters"
"""Attribute of a layer while such calls run: the calls, the innermost last."""
_CHANGED = threading.Condition()
"""Guards the running calls of all layers; notified when a call ends."""
_POLL = 0.1
"""Seconds between two checks for an interrupted call, which ends without notification."""


class _Call(NamedTuple):
    """A running call."""

    thread: int
    frame: FrameType
    """The frame that runs its hooks, or its `with` block."""
    outer: dict[str, Tensor]
    """Tensors that hide parameters for the call around this one, to be restored after it."""


class _Calls(list[_Call]):
    """The running calls of one layer, all in one thread; a copy of the layer has none."""

    def __reduce__(self) -> Any:  # for deepcopy and pickle
        return _Calls, ()


def hide_parameters(layer: nn.Module, tensors: Callable[[nn.Module], Mapping[str, Tensor]]) -> None:
    """Hide parameters of `layer` in a forward pre-hook; `show_parameters` in an `always_call` hook undoes it.

    Every call of the layer must run both hooks, also one with nothing to hide: a call waits until the calls in other
    threads have ended. After a KeyboardInterrupt PyTorch skips the second hook, so the next call undoes the first.
    While `torch.compile` traces, nothing waits.

    Args:
        layer: The module of the hook, or one whose weights it reads.
        tensors: Computes from `layer`, with its own parameters in place, the tensors by the name of the parameter.
    """
    if torch.compiler.is_compiling():
        _show(layer)
    else:
        _begin(layer, sys._getframe(2))  # the caller of the hook
    layer.__dict__.update(tensors(layer))


def show_parameters(layer: nn.Module) -> None:
    """Undo `hide_parameters` of the same call, and of interrupted calls."""
    if torch.compiler.is_compiling():
        _show(layer)
    else:
        _end(layer, sys._getframe(2))


@contextlib.contextmanager
def hidden_parameters(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Hide parameters of `layer` by `tensors` for the length of a `with` block, which gets the layer."""
    frame = None if torch.compiler.is_compiling() else sys._getframe(2)  # of the block
    if frame is not None:
        _begin(layer, frame)
    layer.__dict__.update(tensors)
    try:
        yield layer
    finally:
        _show(layer) if frame is None else _end(layer, frame)


def with_parameters(
    layer: nn.Module, tensors: Mapping[str, Tensor]
) -> contextlib.AbstractContextManager[nn.Module]:
    """Return a context manager that gives the layer with `tensors` in place of the parameters of their names.

    It gives a shallow copy of the layer, so other threads do not see the tensors. The copy shares children and buffers;
    an attribute that its forward sets is lost. A foreign `forward` that is an attribute of the instance (as accelerate
    sets) would still read the layer itself, so there `hidden_parameters` is used: no other thread may call the layer
    meanwhile.
    """
    own = layer.__dict__.get("forward")
    if torch.compiler.is_compiling() or not (own is None or isinstance(own, FasterForward)):
        return hidden_parameters(layer, tensors)
    twin = object.__new__(type(layer))  # without `__init__`, and FSDP's `__new__` calls it
    twin.__dict__.update(layer.__dict__)
    twin.__dict__["_parameters"] = {**layer._parameters, **tensors}
    if own is not None:
        twin.__dict__["forward"] = own.on(twin)
    for name in tensors:
        twin.__dict__.pop(name, None)
    return contextlib.nullcontext(twin)


def _begin(layer: nn.Module, frame: FrameType) -> None:
    """Wait for the calls of other threads, and show the layer's own parameters to this one."""
    with _CHANGED:
        own = threading.get_ident()
        while (running := _running(layer)) and running[-1].thread != own:
            _CHANGED.wait(_POLL)
        layer.__dict__.setdefault(_RUNNING, running).append(_Call(own, frame, _show(layer)))


def _end(layer: nn.Module, frame: FrameType) -> None:
    """End the call with this frame; after an exception the frame is no longer on the stack."""
    with _CHANGED:
        running = layer.__dict__.get(_RUNNING)
        if running and running[-1].frame is frame:
            _drop_last(layer, running)
        else:
            _running(layer)
        _CHANGED.notify_all()


def _running(layer: nn.Module) -> _Calls:
    """Drop the interrupted calls of a layer with their tensors, and return the others."""
    running = layer.__dict__.get(_RUNNING, _Calls())
    while running and has_ended(running[-1].frame):
        _drop_last(layer, running)
    if not running:
        _show(layer)  # tensors of an interrupted call that was compiled
    return running


def _drop_last(layer: nn.Module, running: _Calls) -> None:
    _show(layer)
    layer.__dict__.update(running.pop().outer)
    if not running:
        del layer.__dict__[_RUNNING]


def _show(layer: nn.Module) -> dict[str, Tensor]:
    """Show the layer's own parameters again, and return the tensors that hid them."""
    hiding = [name for name in layer._parameters if name in layer.__dict__]
    return {name: layer.__dict__.pop(name) for name in hiding}


# --- until undone --------------------------------------------------------------------------------------

MARK = "holds_merged_weights"
"""Name of a buffer of `ReplacedParameters`, which exists while a merged or trained tensor replaces a parameter.
In a state dict its key means that the layer's base keys contain an adapter's effect."""


def buffers_for(attributes: Iterable[str]) -> list[str]:
    """Return the names of the buffers of `ReplacedParameters` while these parameters are replaced."""
    names = [f"base_{attribute}" for attribute in attributes]
    return [MARK, *names] if names else []


class ReplacedParameters(AdapterSlot):
    """A child module of a layer that keeps the original parameters while others replace them.

    The replacement is an entry in the layer's `_parameters`, so it follows `to`, deepcopy, pickle and `state_dict`.
    """

    def __init__(self) -> None:
        super().__init__()
        # A plain dict hides the originals from `model.parameters()`; a buffer with the same data follows the model
        # to another device.
        self.replaced: dict[str, nn.Parameter] = {}
        self.unmoved: dict[str, Tensor] = {}
        """The buffers as they were registered: another object in their place shows that the model has moved."""
        self.quantised_class: type[nn.Module] | None = None
        """The layer's class, while a merged weight replaces a quantised one."""

    def replace(self, layer: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
        """Replace a parameter of the layer, and keep the original."""
        if attribute in self.replaced:  # a bias that is trained, and to which a bias of B is merged
            layer._parameters[attribute] = parameter
            return
        original = layer._parameters[attribute]
        assert original is not None
        with torch.inference_mode(False):  # load_state_dict writes into it
            mark = torch.ones(1, dtype=torch.uint8, device=original.device)
        # Nothing is allocated from here on, so a lack of memory leaves the layer as it was. So does an interrupt before
        # the original is in `replaced`; `restore` undoes one after it.
        self.register_buffer(MARK, mark)
        is_quantised = quantised_weight(layer, original) is not None
        if is_quantised:
            self.quantised_class = type(layer)
        else:
            self.unmoved[attribute] = original.data
            self.register_buffer(f"base_{attribute}", self.unmoved[attribute], persistent=False)
        self.replaced[attribute] = original
        if is_quantised:
            layer.__class__ = nn.Linear  # its base class, which can use a plain weight
        layer._parameters[attribute] = parameter

    def restore(self, layer: nn.Module) -> None:
        """Restore all replaced parameters of the layer, on the model's current device and dtype.

        After an interrupt another call completes it.
        """
        compatible = torch._has_compatible_shallow_copy_type  # pyright: ignore[reportPrivateImportUsage]
        for attribute, original in self.replaced.items():
            data = self._buffers.get(f"base_{attribute}")
            if data is None:  # a quantised weight has no buffer
                assert self.quantised_class is not None
                layer._parameters["weight"] = original
                layer.__class__ = self.quantised_class
                if original.device != (device := getattr(self, MARK).device):
                    layer.to(device)
                continue
            if compatible(original.data, data):
                original.data = data
            else:  # on another device type, which needs a new parameter object
                original = nn.Parameter(data, requires_grad=original.requires_grad)
            layer._parameters[attribute] = original
        self.replaced.clear()
        self._drop_unused()

    def forget(self, attribute: str) -> nn.Parameter:
        """Drop and return the original of a replaced parameter; the replacement stays."""
        original = self.replaced.pop(attribute)
        self._drop_unused()
        return original

    def _drop_unused(self) -> None:
        """Drop what belongs to no replaced parameter, also what an interrupt has left."""
        for name in self._buffers.keys() - buffers_for(self.replaced):
            delattr(self, name)
        for attribute in self.unmoved.keys() - self.replaced.keys():
            del self.unmoved[attribute]
        if "weight" not in self.replaced:
            self.quantised_class = None

    def current_base(self, attribute: str) -> Tensor:
        """Return the original of a replaced parameter; its data alone if the model has moved since."""
        has_moved = self._buffers.get(f"base_{attribute}") is not self.unmoved.get(attribute)
        return self.original_data(attribute) if has_moved else self.replaced[attribute]

    def original_data(self, attribute: str) -> Tensor:
        """Return the data of a replaced parameter on the model's current device."""
        data = self._buffers.get(f"base_{attribute}")
        return self.replaced[attribute].detach() if data is None else data


def base_parameter(layer: nn.Module, attribute: str) -> nn.Parameter:
    """Return the base's own parameter, also while a trained or merged tensor replaces it."""
    slot = layer._modules.get(ADAPTERS)
    replaced = slot.replaced.get(attribute) if isinstance(slot, ReplacedParameters) else None
    return layer._parameters[attribute] if replaced is None else replaced  # type: ignore[return-value]


def named_base_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield every name of each parameter of the base, its layer, and its tensor as before the first adapter.

    `remove_duplicate` yields a module that is at several paths once. A tied tensor always has all its names.
    """
    for path, layer in base_modules(model, remove_duplicate=remove_duplicate):
        for attribute, current in list(layer._parameters.items()):
            if current is not None:
                name = f"{path}.{attribute}" if path else attribute
                yield name, layer, base_parameter(layer, attribute)


def grouped_base_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> list[tuple[list[str], nn.Module, nn.Parameter]]:
    """Return each tensor of `named_base_parameters` once, with all its names and the layer of the first."""
    groups: dict[int, tuple[list[str], nn.Module, nn.Parameter]] = {}
    for name, layer, parameter in named_base_parameters(model, remove_duplicate=remove_duplicate):
        groups.setdefault(id(parameter), ([], layer, parameter))[0].append(name)
    return list(groups.values())
