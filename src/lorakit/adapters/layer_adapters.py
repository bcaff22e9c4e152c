"""What sits on one adapted layer: its adapters by name, the hooks that run them, merged tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.activation import Activation, Active
from lorakit.errors import AdapterStateError
from lorakit.methods.module import AdapterModule, compute_dtype

CHILD = "adapters"
"""Name under which the adapters of a layer are its child module."""


class LayerAdapters(nn.ModuleDict):
    """The adapters on one layer, by name: the layer's child module `adapters`.

    Args:
        activation: The model-wide choice of active adapters.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        # Base parameters whose place a trained or merged tensor has taken. Kept in a plain dict, so
        # that the model lists neither; a buffer beside each follows the model to another device.
        self.replaced: dict[str, nn.Parameter] = {}
        self.merged = False

    # --- effect on the forward pass ----------------------------------------------------------------

    def before(self, layer: nn.Module) -> None:
        """Put effective weights in the place of those that the layer reads directly."""
        active = self._active_here()
        shadowing = [(n, w) for n, w in active.weights if n in self and self[n].shadows]
        if active.rows is not None and any(self[n].shadows for n in active.names if n in self):
            raise AdapterStateError(
                f"per_sample cannot give each row its own weights in a {type(layer).__name__}, which reads "
                "them whole. Run one batch for each adapter there."
            )
        for name in {attribute for n, _ in shadowing for attribute in self[n].shadows}:
            # In the instance's dict the tensor hides the parameter of that name for the call's length.
            layer.__dict__[name] = self.effective_weight(layer, name, shadowing)

    def after(self, layer: nn.Module, x: Any, output: Any) -> Any:
        """Return the layer's output with the effect of the active adapters."""
        active = self._active_here()
        if active.rows is not None:
            return self._adapt_rows(layer, x, output, active.rows)
        for name, weight in active.weights:
            if name in self and not self[name].shadows:
                output = self[name].adapt(layer, x, output, weight)
        return output

    def _active_here(self) -> Active:
        active = self.activation.current()
        if self.merged and active.names:
            raise AdapterStateError(
                "An adapter was merged between the forward and the backward pass of a checkpointed block. "
                "Merge after backward() has returned."
            )
        return active

    def _adapt_rows(
        self, layer: nn.Module, x: Tensor, output: Tensor, rows: tuple[str | None, ...]
    ) -> Tensor:
        if x.shape[0] % len(rows):
            raise AdapterStateError(
                f"per_sample names {len(rows)} rows, and {type(layer).__name__} got a batch of {x.shape[0]}. "
                "Give one name (or None) for each row of the batch."
            )
        # Beam search repeats each row in place, and a flattened (batch, length) keeps rows together.
        repeat = x.shape[0] // len(rows)
        for name in dict.fromkeys(rows):
            if name is None or name not in self:
                continue
            chosen = [i * repeat + j for i, row in enumerate(rows) if row == name for j in range(repeat)]
            index = torch.tensor(chosen, device=x.device)
            output = output.index_copy(
                0, index, self._adapt_chosen(layer, self[name], x[index], output[index])
            )
        return output

    @staticmethod
    def _adapt_chosen(
        layer: nn.Module, module: AdapterModule, x: Tensor, output: Tensor
    ) -> Tensor:
        if module.trained:  # other weights than the base's: compute these rows anew with them
            base = dict(layer._parameters)
            try:
                layer._parameters.update(module.trained)
                output = layer.forward(x)
            finally:
                layer._parameters.update(base)
        return module.adapt(layer, x, output, 1.0)

    # --- effective weights -------------------------------------------------------------------------

    def effective_weight(
        self, layer: nn.Module, attribute: str, weights: list[tuple[str, float]]
    ) -> Tensor:
        """``W + sum of weight * delta`` in float32 (or wider), rounded once to the dtype of W."""
        W = getattr(layer, attribute)
        total = None
        for name, weight in weights:
            whole = self[name].merged_weights(layer)
            if whole is not None and attribute in whole:
                return whole[attribute].to(W.dtype)
            delta = self[name].delta_weights(layer).get(attribute)
            if delta is None:
                continue
            delta = delta if weight == 1 else delta * weight
            total = delta if total is None else total + delta
        if total is None:
            return W
        wide = compute_dtype(W, total)
        return (W.to(wide) + total.to(wide)).to(W.dtype)

    def weights_changed_by(self, layer: nn.Module, names: list[str]) -> list[str]:
        """Attributes of the layer that merging these adapters replaces."""
        with torch.no_grad():
            return list(
                dict.fromkeys(
                    attribute
                    for name in names
                    if name in self
                    for attribute in (self[name].merged_weights(layer) or self[name].delta_weights(layer))
                )
            )

    # --- taking a parameter's place ------------------------------------------------------------------

    def replace(self, layer: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
        """Let `parameter` take the place of the layer's own, which is kept untouched."""
        assert attribute not in self.replaced
        original = layer._parameters[attribute]
        assert original is not None
        self.replaced[attribute] = original
        self.register_buffer(f"base_{attribute}", original.data, persistent=False)
        layer._parameters[attribute] = parameter

    def restore(self, layer: nn.Module, attribute: str) -> None:
        """Put the layer's own parameter back, moved to where the model has moved meanwhile."""
        original = self.replaced.pop(attribute)
        original.data = getattr(self, f"base_{attribute}")
        delattr(self, f"base_{attribute}")
        layer._parameters[attribute] = original

    def forget(self, attribute: str) -> None:
        """Drop the kept base parameter: what took its place stays for good."""
        del self.replaced[attribute]
        delattr(self, f"base_{attribute}")

    def base(self, layer: nn.Module, attribute: str) -> nn.Parameter:
        """The layer's own parameter, wherever it is at the moment."""
        return self.replaced.get(attribute) or layer._parameters[attribute]  # type: ignore[return-value]


# Module-level functions that reach their state through the layer: deepcopy and pickle keep them whole.


def before_forward(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of every adapted layer."""
    layer.adapters.before(layer)  # type: ignore[operator, union-attr]


def after_forward(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of every adapted layer."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    return layer.adapters.after(layer, x, output)  # type: ignore[operator, union-attr]


def remove_shadows(layer: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook that runs even when the layer raised, so that no effective weight outlives its call."""
    for module in layer.adapters.values():  # type: ignore[operator, union-attr]
        for attribute in module.shadows:
            layer.__dict__.pop(attribute, None)


def install_on(layer: nn.Module, activation: Activation) -> LayerAdapters:
    """Give the layer its `adapters` child and hook, unless it has them."""
    present = layer._modules.get(CHILD)
    if isinstance(present, LayerAdapters):
        return present
    if hasattr(layer, CHILD):
        raise AdapterStateError(
            f"This {type(layer).__name__} already has an attribute named '{CHILD}', where lorakit keeps its "
            "tensors. Remove what is attached there first."
        )
    adapters = LayerAdapters(activation)
    layer.register_module(CHILD, adapters)
    layer.register_forward_hook(after_forward, with_kwargs=True)
    return adapters


def add_module(layer: nn.Module, name: str, module: AdapterModule) -> None:
    """Put an adapter's module on a layer that has been installed on."""
    layer.adapters[name] = module  # type: ignore[index, operator, union-attr]
    if module.shadows and before_forward not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(before_forward, with_kwargs=True)
        layer.register_forward_hook(remove_shadows, always_call=True)


def remove_from(layer: nn.Module) -> None:
    """Take the `adapters` child and its hooks off the layer, leaving no trace."""
    ours = (before_forward, after_forward, remove_shadows)
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
        for key in [k for k, hook in hooks.items() if hook in ours]:
            del hooks[key]
            for flags in (
                layer._forward_hooks_with_kwargs,
                layer._forward_pre_hooks_with_kwargs,
                layer._forward_hooks_always_called,
            ):
                flags.pop(key, None)
    del layer._modules[CHILD]
