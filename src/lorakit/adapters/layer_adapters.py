"""The adapters of one layer by name, the hooks that run them, and the base tensors that they replace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, ValuesView
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.adapters.activation import Activation, Active
from lorakit.errors import AdapterStateError
from lorakit.methods.module import AdapterModule, ModuleHook, merge_dtype
from lorakit.models.layers import ADAPTERS, AdapterSlot, layer_input
from lorakit.models.quantised import compute_quantised, compute_whole, quantised_weight

MARK = "holds_merged_weights"
"""Name of a buffer of `LayerAdapters`, which exists while a merged or trained tensor replaces a base parameter.
In a state dict its key means that the layer's base keys contain an adapter's effect."""


class LayerAdapters(AdapterSlot):
    """The adapters on one layer, by name: the layer's child module `adapters`.

    Args:
        activation: The active adapters of the whole model.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        # Base parameters that a trained or merged tensor replaces. A plain dict hides them from
        # `model.parameters()`; a buffer with the same data follows the model to another device.
        self.replaced: dict[str, nn.Parameter] = {}
        self.quantised_class: type[nn.Module] | None = None
        """The layer's class, while a merged weight replaces a quantised one."""
        self.merged = False

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> AdapterModule: ...
        def values(self) -> ValuesView[AdapterModule]: ...
        def items(self) -> ItemsView[str, AdapterModule]: ...

    # --- effect on the forward pass ----------------------------------------------------------------

    def shadow(self, layer: nn.Module) -> None:
        """Set the effective weights for one call, where an adapter cannot add its effect to the layer's output.

        `nn.MultiheadAttention`, for example, reads `out_proj.weight` without calling `out_proj`.
        """
        self.unshadow(layer)
        active = self._active_here()
        if active.rows is not None and any(
            self[n].shadows or self[n].trained for n in active.names if n in self
        ):
            raise AdapterStateError(
                f"per_sample cannot use different weights for each row of a {type(layer).__name__}, which reads its "
                "weights directly. Run one batch for each adapter."
            )
        shadowing = [(n, w) for n, w in active.weights if n in self and self[n].shadows]
        for name in {attribute for n, _ in shadowing for attribute in self[n].shadows}:
            # A tensor in the instance's `__dict__` hides the parameter of that name during the call.
            layer.__dict__[name] = self.effective_weight(layer, name, shadowing)

    def unshadow(self, layer: nn.Module) -> None:
        """Remove the effective weights that `shadow` has set."""
        for module in self.values():
            for attribute in module.shadows:
                layer.__dict__.pop(attribute, None)

    def after(self, layer: nn.Module, x: Any, output: Any) -> Any:
        """Return the layer's output with the effect of the active adapters."""
        if isinstance(output, tuple):  # a block's hidden states and further outputs
            return (self.after(layer, x, output[0]), *output[1:])
        active = self._active_here()
        if active.rows is not None:  # inside per_sample
            return self._adapt_rows(layer, x, output, active)
        # This runs in every call of the layer, and a lookup in ModuleDict is slow.
        modules = self._modules
        for name, weight in active.weights:
            module = modules.get(name)
            if module is not None and not module.shadows:
                output = module.adapt(layer, x, output, weight)  # type: ignore[operator]
        return output

    def all_active(self, condition: Callable[[AdapterModule], bool]) -> bool:
        """Return whether every active module meets a condition, and all rows of a batch use the same modules."""
        active = self.activation.active
        modules = [self[name] for name in active.names if name in self]
        return not (active.rows is not None and modules) and all(map(condition, modules))

    def _active_here(self) -> Active:
        """Return the adapters active in this pass; in a recomputed checkpoint, those of its first run."""
        active = self.activation.moment().active
        if self.merged and active.names:
            raise AdapterStateError(
                "An adapter was merged between the forward and the backward pass of a checkpointed block. "
                "Merge after backward() has returned."
            )
        return active

    def _adapt_rows(self, layer: nn.Module, x: Tensor, output: Tensor, active: Active) -> Tensor:
        """Apply each adapter of `per_sample` to its rows of the batch."""
        rows = active.rows
        assert rows is not None
        if x.shape[0] % len(rows):
            raise AdapterStateError(
                f"per_sample names {len(rows)} rows, and {type(layer).__name__} received a batch of {x.shape[0]}. "
                "Give one name (or None) for each row of the batch."
            )
        for name in dict.fromkeys(rows):
            if name is None or name not in self:
                continue
            index = torch.tensor(active.rows_of(name, x.shape[0]), device=x.device)
            output = output.index_copy(
                0, index, self._adapt_with(name, layer, x[index], output[index])
            )
        return output

    def _adapt_with(self, name: str, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Apply one adapter to rows of a batch; `x` and `output` contain only these rows."""
        module, activation = self[name], self.activation
        if module.trained:  # recompute these rows with the trained parameters
            base, previous_part = dict(layer._parameters), activation.part
            try:
                layer._parameters.update(module.trained)
                activation.part = Active(rows=(name,))  # for the layers inside this one
                output = layer.forward(x)
            finally:
                layer._parameters.update(base)
                activation.part = previous_part
        return module.adapt(layer, x, output, 1.0)

    # --- effective weights -------------------------------------------------------------------------

    def effective_weight(
        self, layer: nn.Module, attribute: str, weights: Iterable[tuple[str, float]]
    ) -> Tensor:
        """Return ``W + sum of weight * delta``, computed in float32 (or wider) and rounded once to the dtype of W.

        For a quantised W the deltas are added to ``W_q``, as a matrix (out, in). An adapter whose merged weight is
        not such a sum (DoRA) is always active alone and with weight 1 (`Adapters.activate`).
        """
        W = getattr(layer, attribute)
        quantised = quantised_weight(layer, W)
        dtype = W.dtype if quantised is None else quantised.dtype
        total = None
        for name, weight in weights:
            if name not in self:
                continue
            merged = self[name].merged_weights(layer)
            if merged is not None and attribute in merged:
                return merged[attribute].to(dtype)
            delta = self[name].delta_weights(layer).get(attribute)
            if delta is None:
                continue
            delta = delta if weight == 1 else delta * weight
            total = delta if total is None else total + delta
        if quantised is not None:
            W = quantised.matrix()
        if total is None:
            return W.to(dtype)
        wide = merge_dtype(W, total)
        return (W.to(wide) + total.to(wide)).to(dtype)

    def weights_changed_by(self, path: str, layer: nn.Module, names: list[str]) -> list[str]:
        """Return the attributes of the layer at `path` that merging these adapters replaces.

        Raises:
            AdapterStateError: One is not a parameter, so it cannot be replaced.
        """
        modules = [self[name] for name in names if name in self]
        changed = dict.fromkeys(a for module in modules for a in module.changed_weights(layer))
        for attribute in changed:
            if attribute not in layer._parameters:
                name = f"{path}.{attribute}" if path else attribute
                raise AdapterStateError(
                    f"'{name}' is computed from other tensors in each pass (as weight norm does), so a merged weight "
                    "cannot replace it. Before you attach the adapter, make it a parameter: "
                    f"torch.nn.utils.parametrize.remove_parametrizations(layer, '{attribute}'), or for the old weight "
                    f"norm torch.nn.utils.remove_weight_norm(layer, '{attribute}')."
                )
        return list(changed)

    # --- replacing parameters ------------------------------------------------------------------------

    def replace(self, layer: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
        """Replace a parameter of the layer, and keep the original."""
        assert attribute not in self.replaced
        original = layer._parameters[attribute]
        assert original is not None
        if quantised_weight(layer, original) is not None:
            self.quantised_class = compute_whole(layer)
        else:
            self.register_buffer(f"base_{attribute}", original.data, persistent=False)
        self.replaced[attribute] = original
        self.register_buffer(MARK, torch.ones(1, dtype=torch.uint8, device=original.device))
        layer._parameters[attribute] = parameter

    def restore(self, layer: nn.Module) -> None:
        """Restore all replaced parameters of the layer, on the model's current device and dtype."""
        for attribute in list(self.replaced):
            self._restore(layer, attribute)

    def _restore(self, layer: nn.Module, attribute: str) -> None:
        data = getattr(self, f"base_{attribute}", None)
        quantised_class = self.quantised_class
        original = self.forget(attribute)
        if data is None:  # a quantised weight has no buffer
            assert quantised_class is not None
            compute_quantised(layer, original, quantised_class)
            return
        compatible = torch._has_compatible_shallow_copy_type  # pyright: ignore[reportPrivateImportUsage]
        if compatible(original.data, data):
            original.data = data
        else:  # on another device type, which needs a new parameter object
            original = nn.Parameter(data, requires_grad=original.requires_grad)
        layer._parameters[attribute] = original

    def forget(self, attribute: str) -> nn.Parameter:
        """Drop and return the original of a replaced parameter; the replacement stays."""
        if f"base_{attribute}" in self._buffers:
            delattr(self, f"base_{attribute}")
        else:
            self.quantised_class = None
        original = self.replaced.pop(attribute)
        if not self.replaced:
            delattr(self, MARK)
        return original

    def base(self, layer: nn.Module, attribute: str) -> nn.Parameter:
        """Return the layer's own parameter, also while it is replaced."""
        replaced = self.replaced.get(attribute)
        return layer._parameters[attribute] if replaced is None else replaced  # type: ignore[return-value]

    @contextlib.contextmanager
    def base_weights_in_place(self, layer: nn.Module) -> Iterator[None]:
        """Restore the base's parameters for the length of a `with` block."""
        current = dict(layer._parameters)
        layer._parameters.update(self.replaced)
        try:
            yield
        finally:
            layer._parameters.update(current)


# The hooks are module-level functions and find their state on the layer, so deepcopy and pickle work.


def after_forward(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of every adapted layer."""
    x = layer_input(layer, args, kwargs)
    return layer._modules[ADAPTERS].after(layer, x, output)  # type: ignore[operator, union-attr]


def shadow_weights(caller: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a module that reads adapted weights directly: set the effective weights."""
    for layer in _read_by(caller):
        layer.adapters.shadow(layer)  # type: ignore[operator, union-attr]


def unshadow_weights(caller: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook that also runs after an exception: remove the effective weights."""
    for layer in _read_by(caller):
        layer.adapters.unshadow(layer)  # type: ignore[operator, union-attr]


def _read_by(caller: nn.Module) -> list[nn.Module]:
    """Return the adapted layers whose weights `caller` reads: itself, and the output projection of attention."""
    layers = [caller]
    if isinstance(caller, nn.MultiheadAttention):
        layers.append(caller.out_proj)
    return [layer for layer in layers if ADAPTERS in layer._modules]


def check_free(path: str, layer: nn.Module) -> None:
    """Reject a layer that already has an attribute with the name of the adapters' child module."""
    if hasattr(layer, ADAPTERS) and not isinstance(layer._modules.get(ADAPTERS), LayerAdapters):
        raise AdapterStateError(
            f"'{path}' ({type(layer).__name__}) already has an attribute named '{ADAPTERS}', which lorakit needs for "
            "its tensors. Remove that attribute first."
        )


def add_module(
    layer: nn.Module, owner: nn.Module, name: str, module: AdapterModule, activation: Activation
) -> None:
    """Add an adapter's module to a layer, with the `adapters` child and the hooks that it needs.

    Args:
        layer: The adapted layer.
        owner: Its parent module.
        name: Name of the adapter.
        module: Its tensors for this layer.
        activation: The active adapters of the whole model.
    """
    if ADAPTERS not in layer._modules:
        layer.register_module(ADAPTERS, LayerAdapters(activation))
        add_adapter_hook(layer)
    layer.adapters[name] = module  # type: ignore[index, operator, union-attr]
    add_hooks(layer, module.layer_hooks)
    layer.adapters.train(layer.training)  # type: ignore[operator, union-attr]
    caller = owner if isinstance(owner, nn.MultiheadAttention) else layer
    reads_weights = isinstance(caller, nn.MultiheadAttention) or module.shadows
    if reads_weights and shadow_weights not in caller._forward_pre_hooks.values():
        caller.register_forward_pre_hook(shadow_weights)
        caller.register_forward_hook(unshadow_weights, always_call=True)


def output_is_unadapted(layer: nn.Module) -> bool:
    """Return whether the layer computes its output from its own (or trained) parameters, and no hook changes it."""
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    adapters = layer._modules.get(ADAPTERS)
    if hooks == [after_forward] and isinstance(adapters, LayerAdapters):
        return adapters.all_active(_leaves_output)
    return not hooks


def _leaves_output(module: AdapterModule) -> bool:
    """Return whether the module has no effect on the output: it only holds trained copies."""
    return type(module).adapt is AdapterModule.adapt


def hooks_act_by_token(layer: nn.Module) -> bool:
    """Return whether no hook on the layer mixes tokens."""
    for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()):
        if hook is after_forward:
            if not layer.adapters.all_active(lambda m: m.by_token or _leaves_output(m)):  # type: ignore[operator, union-attr]
                return False
        elif not getattr(hook, "by_token", False):
            return False
    return True


def add_adapter_hook(layer: nn.Module) -> None:
    """Register the forward hook that applies the layer's adapters."""
    if after_forward not in layer._forward_hooks.values():
        layer.register_forward_hook(after_forward, with_kwargs=True)


def remove_adapter_hook(layer: nn.Module) -> None:
    """Remove the forward hook of a layer with nothing to apply; this saves 1 to 2 microseconds a call."""
    _remove_hooks(layer, after_forward)


def add_hooks(module: nn.Module, hooks: Iterable[ModuleHook]) -> None:
    """Register the hooks that an adapter's module declares, each once."""
    for hook in hooks:
        if hook.before and hook.run not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook.run, with_kwargs=True)
        elif not hook.before and hook.run not in module._forward_hooks.values():
            module.register_forward_hook(hook.run)


def remove_hooks(
    module: nn.Module, hooks: Iterable[ModuleHook], needed: Iterable[ModuleHook] = ()
) -> None:
    """Remove declared hooks from a module, except those in `needed`."""
    needed_functions = {hook.run for hook in needed}
    _remove_hooks(module, *(hook.run for hook in hooks if hook.run not in needed_functions))


def remove_adapter(layer: nn.Module, name: str) -> None:
    """Remove one adapter from a layer, with the hooks that no other adapter on it needs."""
    adapters = layer._modules[ADAPTERS]
    assert isinstance(adapters, LayerAdapters)
    adapters.unshadow(layer)
    removed = adapters[name]
    del adapters[name]
    remove_hooks(layer, removed.layer_hooks, [h for m in adapters.values() for h in m.layer_hooks])
    if not adapters:
        del layer._modules[ADAPTERS]
        _remove_hooks(layer, after_forward)


def remove_idle_hooks(model: nn.Module) -> None:
    """Remove the hooks of modules that no longer read an adapted weight."""
    for module in model.modules():
        if shadow_weights in module._forward_pre_hooks.values() and not _read_by(module):
            _remove_hooks(module, shadow_weights, unshadow_weights)


def _remove_hooks(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Remove forward hooks and pre-hooks by function, with PyTorch's flags for them."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, hook in hooks.items() if hook in functions]:
            del hooks[key]
            for flags in (
                module._forward_hooks_with_kwargs,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(key, None)
