"""The adapters of one layer by name, and the hooks that run them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.adapters.activation import Activation
from lorakit.adapters.choice import Blend
from lorakit.adapters.entry import foreign_hooks, remove_hooks
from lorakit.adapters.mixed_batch import Call, adapt_by, adapt_by_part
from lorakit.adapters.row_layout import RowLayout
from lorakit.adapters.tensor_checks import check_tensor
from lorakit.errors import AdapterStateError
from lorakit.methods.module import AdapterModule, ModuleHook
from lorakit.models.layers import ADAPTERS, layer_input
from lorakit.models.packed import packed_by
from lorakit.models.parameter_swaps import (
    ReplacedParameters,
    hide_parameters,
    show_parameters,
)
from lorakit.models.quantised import quantised_weight
from lorakit.models.tree import base_modules
from lorakit.ops.autocast import no_autocast, wide_dtype
from lorakit.ops.low_rank_sum import LowRankSum, concatenated


class LayerAdapters(ReplacedParameters):
    """The adapters on one layer, by name: the layer's child module `adapters`."""

    def __init__(self, activation: Activation, layout: RowLayout) -> None:
        super().__init__()
        self.activation, self.layout = activation, layout

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> AdapterModule: ...
        def keys(self) -> KeysView[str]: ...
        def values(self) -> ValuesView[AdapterModule]: ...
        def items(self) -> ItemsView[str, AdapterModule]: ...

    # --- effect on the forward pass ----------------------------------------------------------------

    def effective_weights(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the weights to use in one call, where an adapter cannot add its effect to the layer's output.

        `nn.MultiheadAttention`, for example, reads `out_proj.weight` without calling `out_proj`.
        """
        choice = self.activation.moment().of_pass.choice
        blend = choice.whole
        # `adapt_by_part` calls a layer that splits again for each adapter.
        if blend is None and (
            self.replaced or not all(self[name].splits for name in choice.names & self.keys())
        ):
            raise AdapterStateError(
                f"per_sample cannot use different weights for each row of a {type(layer).__name__}, which reads its "
                "weights directly. Run one batch for each adapter."
            )
        blend = blend or ()
        tensors = self.parameters_to_swap(layer, blend)
        layer.__dict__.update(tensors)  # the adapters add to these
        return tensors | self.shadows(layer, blend)

    @property
    def hides_parameters(self) -> bool:
        """Whether hooks put the `effective_weights` in place for each call of the layer."""
        return any(module.shadows for module in self.values())

    def shadows(self, layer: nn.Module, blend: Blend) -> dict[str, Tensor]:
        """Return the weights that the adapters of a blend put in place of the layer's for a call."""
        shadowing = [(n, w) for n, w in blend if n in self and self[n].shadows]
        attributes = dict.fromkeys(a for name, _ in shadowing for a in self[name].shadows)
        return {attribute: self._shadow(layer, attribute, shadowing) for attribute in attributes}

    def _shadow(
        self, layer: nn.Module, attribute: str, blend: Iterable[tuple[str, float]]
    ) -> Tensor:
        """Return the effective weight, as a `LowRankSum` if all changes of it are products."""
        products = []
        for name, weight in blend:
            if attribute not in self[name].shadows:
                continue
            product = self[name].shadow_factors(attribute)
            if product is None or torch.compiler.is_compiling():
                return self.effective_weight(layer, attribute, blend)
            L, R, scale = product
            products.append((L, R, weight * scale))
        return LowRankSum(getattr(layer, attribute), *concatenated(products))

    def after(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return the layer's output with the effect of the active adapters."""
        if isinstance(output, tuple):  # a block's hidden states and further outputs
            return self._after_block(layer, args, kwargs, output)
        x = layer_input(layer, args, kwargs)
        step = self.activation.step
        if step is not None and (adapted := step.adapt(self, x, output)) is not None:
            return adapted
        of_pass = self.activation.moment().of_pass
        choice = of_pass.choice
        if choice is not self.activation.active:
            return adapt_by_part(self, Call(layer, x, args, kwargs), output, of_pass)
        # `activate` chose for the whole batch, and trained copies are in place. This runs in every call of the
        # layer, and a lookup in ModuleDict is slow.
        modules = self._modules
        for name, weight in choice.blends[0]:
            module = modules.get(name)
            if module is not None and not module.shadows:
                output = adapt_by(module, self.activation, layer, x, output, weight)  # type: ignore[arg-type]
        return output

    def _after_block(self, layer: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
        choice = self.activation.moment().of_pass.choice
        if choice is not self.activation.active and any(
            self.parameters_to_swap(layer, blend) for blend in choice.blends
        ):
            raise self.layout.refuse("it returns several tensors, which trained copies change")
        return (self.after(layer, args, kwargs, output[0]), *output[1:])

    def acting(self, layer: nn.Module) -> list[AdapterModule] | None:
        """Return the modules of the active adapters; None if rows use different ones, or parameters need a swap."""
        choice = self.activation.now.choice
        names, blend = choice.names & self.keys(), choice.whole or ()
        if names and choice.whole is None:
            return None
        if choice is not self.activation.active and self.parameters_to_swap(layer, blend):
            return None
        return [self[name] for name in names]

    def leave_output(self, layer: nn.Module) -> bool:
        """Return whether the layer computes its output from its own (or trained) parameters alone."""
        acting = self.acting(layer)
        return acting is not None and all(module.leaves_output for module in acting)

    def parameters_to_swap(self, layer: nn.Module, blend: Blend) -> dict[str, Tensor]:
        """Return the parameters that a blend needs on this layer and that are not in place now."""
        if self.activation.merged:
            return {}
        wanted: dict[str, Tensor] = {a: self.current_base(a) for a in self.replaced}
        for name, _ in blend:
            if name in self:
                wanted.update(self[name].trained)
        return {a: tensor for a, tensor in wanted.items() if layer._parameters.get(a) is not tensor}

    def changes(self, layer: nn.Module, blend: Blend) -> bool:
        """Whether the layer's output has to change for a blend."""
        return any(name in self for name, _ in blend) or bool(self.parameters_to_swap(layer, blend))

    # --- effective weights -------------------------------------------------------------------------

    def effective_weight(
        self, layer: nn.Module, attribute: str, weights: Iterable[tuple[str, float]]
    ) -> Tensor:
        """Return ``W + sum of weight * delta``, computed in float32 (or wider) and rounded once to the dtype of W."""
        return self.merge_weight(layer, attribute, weights)[-1]

    def merge_weight(
        self, layer: nn.Module, attribute: str, weights: Iterable[tuple[str, float]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return W, `effective_weight` before it is rounded, and `effective_weight`.

        For a quantised weight, W is ``W_q``; all three are matrices (out, in). An adapter whose merged weight is not a
        sum (DoRA) is always active alone and with weight 1 (`Adapters.activate`).
        """
        W = getattr(layer, attribute)
        quantised = quantised_weight(layer, W)
        dtype = W.dtype if quantised is None else quantised.dtype
        W = W if quantised is None else quantised.matrix()
        total = None
        for name, weight in weights:
            if name not in self:
                continue
            with no_autocast(W):
                merged = self[name].merged_weights(layer)
                if merged is not None and attribute in merged:
                    exact = merged[attribute]
                    return W, exact, exact.to(dtype)
                delta = self[name].delta_weights(layer).get(attribute)
            if delta is None:
                continue
            delta = delta if weight == 1 else delta * weight
            total = delta if total is None else total + delta
        if total is None:
            return W, W, W.to(dtype)
        wide = wide_dtype(W, total)
        exact = W.to(wide) + total.to(wide)
        return W, exact, exact.to(dtype)

    def weights_changed_by(
        self, path: str, layer: nn.Module, names: list[str], *, packed: bool = False
    ) -> list[str]:
        """Return the attributes of the layer at `path` that merging these adapters replaces.

        `packed` leaves out those that another library than bitsandbytes has quantised, instead of an error.

        Raises:
            AdapterStateError: One is not a parameter, so it cannot be replaced. Or it is on the meta device, or
                quantised by another library than bitsandbytes.
            AdapterFileError: An adapter holds NaN or infinity, which a file or the merged model must not keep.
        """
        show_parameters(layer)  # after an interrupted call
        modules = {name: self[name] for name in names if name in self}
        for name, module in modules.items():
            for key, tensor in module.state_dict(prefix=f"{path}.{ADAPTERS}.{name}.").items():
                check_tensor(f"'{key}'", tensor)
        changed = dict.fromkeys(a for m in modules.values() for a in m.changed_weights(layer))
        if packed:
            changed = [a for a in changed if packed_by(layer, a) is None]
        for attribute in changed:
            name = f"{path}.{attribute}" if path else attribute
            if (kind := packed_by(layer, attribute)) is not None:
                raise AdapterStateError(
                    f"'{name}' is quantised ({kind}), and lorakit reads only the numbers of bitsandbytes, so no delta "
                    "can be added to it. Merge into the unquantised base: `lorakit merge FOLDER OUTPUT --base.name "
                    "MODEL --allow_other_base true`."
                )
            if attribute not in layer._parameters:
                raise AdapterStateError(
                    f"'{name}' is computed from other tensors in each pass (as weight norm and pruning do), so a "
                    "merged weight cannot replace it. Before you attach the adapter, make it a parameter: "
                    f"torch.nn.utils.parametrize.remove_parametrizations(layer, '{attribute}'), for the old weight "
                    f"norm torch.nn.utils.remove_weight_norm(layer, '{attribute}'), or after pruning "
                    f"torch.nn.utils.prune.remove(layer, '{attribute}')."
                )
            parameter = layer._parameters[attribute]
            if parameter is not None and parameter.is_meta:
                raise AdapterStateError(
                    f"'{name}' is on the meta device (offloaded by accelerate, or not loaded), so no delta can be "
                    "added to it. Merge into a base that is loaded without offloading: `lorakit merge FOLDER OUTPUT`."
                )
        return list(changed)


# The hooks are module-level functions and find their state on the layer, so deepcopy and pickle work.


def after_forward(layer: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> Any:
    """Forward hook of every adapted layer."""
    adapters = layer._modules.get(ADAPTERS)
    if adapters is None:  # PyTorch's quantize_dynamic copies the hook, and calls it without kwargs
        raise AdapterStateError(
            f"This {type(layer).__name__} has replaced an adapted layer and lacks its adapters. Call "
            "merge(keep_base=False) before you convert the model."
        )
    return adapters.after(layer, args, kwargs, output)  # type: ignore[operator]


def shadow_weights(caller: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a module that reads adapted weights directly: hide them by the effective weights."""
    for layer in _read_by(caller):
        hide_parameters(layer, layer.adapters.effective_weights)  # type: ignore[union-attr]


def unshadow_weights(caller: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook that also runs after an exception: show the layer's own weights again."""
    for layer in _read_by(caller):
        show_parameters(layer)


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
    layer: nn.Module,
    owner: nn.Module,
    name: str,
    module: AdapterModule,
    activation: Activation,
    layout: RowLayout | None,
) -> None:
    """Add an adapter's module to a layer inside `owner`, with the `adapters` child and the hooks that it needs.

    `layout` may be None for a layer that already has an adapter.
    """
    if ADAPTERS not in layer._modules:
        assert layout is not None
        layer.register_module(ADAPTERS, LayerAdapters(activation, layout).train(layer.training))
        layer.register_forward_hook(after_forward, with_kwargs=True)
    layer.adapters[name] = module  # type: ignore[index, operator, union-attr]
    add_hooks(layer, module.layer_hooks)
    module.train(layer.training)
    caller = owner if isinstance(owner, nn.MultiheadAttention) else layer
    reads_weights = isinstance(caller, nn.MultiheadAttention) or module.shadows
    if reads_weights and shadow_weights not in caller._forward_pre_hooks.values():
        caller.register_forward_pre_hook(shadow_weights)
        caller.register_forward_hook(unshadow_weights, always_call=True)


def output_is_unadapted(layer: nn.Module) -> bool:
    """Return whether the layer computes its output from its own (or trained) parameters, and no hook changes it."""
    hooks = foreign_hooks(layer)
    adapters = layer._modules.get(ADAPTERS)
    if hooks == [after_forward] and isinstance(adapters, LayerAdapters):
        return adapters.leave_output(layer)
    return not hooks


def hooks_act_by_token(layer: nn.Module) -> bool:
    """Return whether no hook on the layer mixes tokens."""
    for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()):
        if hook is after_forward:
            acting = layer.adapters.acting(layer)  # type: ignore[operator, union-attr]
            if acting is None or not all(m.by_token or m.leaves_output for m in acting):
                return False
        elif not (getattr(hook, "by_token", False) or _is_of_fsdp(hook)):
            return False
    return True


def _is_of_fsdp(hook: Any) -> bool:
    """Whether a hook gathers and drops the weights of a module, and leaves its input and output as they are."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def add_hooks(module: nn.Module, hooks: Iterable[ModuleHook]) -> None:
    """Register the hooks that an adapter's module declares, each once."""
    for hook in hooks:
        if hook.before and hook.run not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook.run, with_kwargs=True)
        elif not hook.before and hook.run not in module._forward_hooks.values():
            module.register_forward_hook(hook.run)


def remove_adapter(layer: nn.Module, adapters: LayerAdapters, name: str) -> None:
    """Remove one of a layer's adapters, with the hooks that no other adapter on it needs."""
    show_parameters(layer)  # after an interrupted call
    removed = adapters[name]
    del adapters[name]
    needed = {hook for module in adapters.values() for hook in module.layer_hooks}
    remove_hooks(layer, *(hook.run for hook in {*removed.layer_hooks} - needed))
    if not adapters:
        del layer._modules[ADAPTERS]
        remove_hooks(layer, after_forward)


def remove_idle_hooks(model: nn.Module) -> None:
    """Remove the hooks of modules that no longer read an adapted weight."""
    for _, module in base_modules(model):
        if shadow_weights in module._forward_pre_hooks.values() and not _read_by(module):
            remove_hooks(module, shadow_weights, unshadow_weights)
