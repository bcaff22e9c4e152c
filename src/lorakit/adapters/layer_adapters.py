"""The adapters of one layer by name, and their effect on the layer's output.

`LayerAdapters.adapted` chooses the adapters, splits the batch into parts, and adds the product of each part.
"""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.activation import Activation, Block
from lorakit.adapters.choice import Blend, Choice, Part
from lorakit.adapters.row_layout import RowLayout
from lorakit.errors import AdapterStateError
from lorakit.methods.lora.layer import LoRALayer, output_is_unshared
from lorakit.methods.module import AdapterModule, LowRank
from lorakit.models.layers import input_parameter
from lorakit.models.parameter_swaps import ReplacedParameters, with_parameters
from lorakit.models.quantised import quantised_weight
from lorakit.ops.autocast import no_autocast, wide_dtype
from lorakit.ops.lora_linear import Product, Rows, lora_linear, put, take
from lorakit.ops.low_rank_sum import LowRankSum, concatenated


class Call(NamedTuple):
    """A call of a layer."""

    layer: nn.Module
    x: Tensor
    """The input that the adapters read."""
    args: tuple
    kwargs: Mapping[str, Any]

    def at(self, rows: Rows) -> Call:
        """Return the call with some entries of the first axis of every tensor."""
        if rows is None:
            return self
        x = take(self.x, rows)

        def part(value: Any) -> Any:
            if value is self.x:
                return x
            if not isinstance(value, Tensor) or len(value) == 1:
                return value  # one entry is for all rows
            if len(value) != len(self.x):
                raise AdapterStateError(
                    f"{type(self.layer).__name__} takes tensors with other numbers of rows, so it cannot compute some "
                    "rows only. Run one batch for each adapter."
                )
            return take(value, rows)

        args = tuple(map(part, self.args))
        return Call(self.layer, x, args, {name: part(v) for name, v in self.kwargs.items()})

    def with_input(self, x: Tensor) -> Call:
        """Return the call with another input."""
        args = tuple(x if value is self.x else value for value in self.args)
        kwargs = {name: x if value is self.x else value for name, value in self.kwargs.items()}
        return Call(self.layer, x, args, kwargs)


def after_forward(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of every adapted layer."""
    return layer.adapters.adapted(layer, args, kwargs, output)  # type: ignore[operator, union-attr]


class LayerAdapters(ReplacedParameters):
    """The adapters on one layer, by name: the layer's child module `adapters`."""

    def __init__(self, layer: nn.Module, activation: Activation, layout: RowLayout) -> None:
        super().__init__()
        self.activation, self.layout = activation, layout
        self.input = input_parameter(type(layer))
        """Position and name of the argument that the adapters read."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> AdapterModule: ...
        def keys(self) -> KeysView[str]: ...
        def values(self) -> ValuesView[AdapterModule]: ...
        def items(self) -> ItemsView[str, AdapterModule]: ...

    # --- the forward pass --------------------------------------------------------------------------------

    def adapted(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return the layer's output with the effect of the adapters that act in this call."""
        if isinstance(output, tuple):  # a block's hidden states and further outputs
            return (self.adapted(layer, args, kwargs, output[0]), *output[1:])
        choice = self.activation.current().choice
        acts = not choice.names.isdisjoint(self._modules)
        if not acts and (choice is self.activation.active or not self.replaced):
            return output
        position, name = self.input
        x: Any = args[position] if position < len(args) else kwargs.get(name)
        call = Call(layer, x, args, kwargs)
        if choice.whole is None and not self._has_rows(call, output, choice):
            return output  # it is empty
        delta, left = self._from_slots(call, output, choice)
        if delta is not None:
            output = output + delta
        products = self._products(call.x, choice, left)
        if products is None:
            return self._add_parts(call, output, choice, left)
        in_place = delta is not None or output_is_unshared(layer)
        return lora_linear(call.x, output, products, in_place=in_place) if products else output

    def _products(
        self, x: Tensor, choice: Choice, left: Collection[Blend] | None
    ) -> list[Product] | None:
        """Return the low-rank products of each part; None if an adapter has another effect on the layer.

        `left` are the blends that are not computed yet; None is all.
        """
        has_own_copies = choice is self.activation.active
        if self.replaced and not has_own_copies:
            return None
        low_rank: dict[str, LowRank] = {}
        for name in choice.names & self._modules.keys():
            module = self[name]
            if module.shadows or (not has_own_copies and module.trained):
                return None
            if (product := module.low_rank()) is None:
                return None
            low_rank[name] = product
        if low_rank and x.is_nested:
            return None
        parts: list[Part] = [(choice.whole or (), None)]
        if choice.whole is None:
            parts = choice.parts(x.shape[:-1].numel(), x.device)
        return [
            Product(rows, low_rank[name].A, low_rank[name].B, weight * low_rank[name].scaling)
            for blend, rows in parts
            if left is None or blend in left
            for name, weight in blend
            if name in low_rank
        ]

    def _add_parts(
        self, call: Call, output: Any, choice: Choice, left: Collection[Blend] | None
    ) -> Any:
        """Return the layer's output with the effect of each blend on its rows, which may be any effect."""
        if choice.whole is not None:
            return self._with_blend(call, output, choice.whole, choice)
        shape, x = output.shape, call.x
        if choice.unit == "token":
            axes = x.ndim - _features(call.layer)
            call = call.with_input(x.flatten(0, axes - 1))
            output = output.flatten(0, axes - 1)
        for blend, rows in choice.parts(len(call.x), x.device):
            if left is None or blend in left:
                values = self._with_blend(call.at(rows), take(output, rows), blend, choice)
                output = put(output, rows, values)
        return output.view(shape)

    def _with_blend(self, call: Call, output: Any, blend: Blend, choice: Choice) -> Any:
        """Return the layer's output with the effect of one blend, computed again if it has other parameters."""
        layer, parameters = call.layer, {}
        if choice is not self.activation.active and not (
            choice.whole is not None and self.hides_parameters
        ):
            parameters = self._to_swap(layer, blend)
        if choice.whole is None:
            parameters |= self.shadows(layer, blend)
        if parameters:
            return self._computed_again(call, blend, parameters)
        return self._with_modules(layer, call.x, output, blend)

    def _with_modules(self, layer: nn.Module, x: Any, output: Any, blend: Blend) -> Any:
        """Return the output of a layer that has a blend's parameters, with the effects of its modules."""
        block = self.activation.block
        slots = None if block is None or torch.is_grad_enabled() or self.training else block.slots
        for name, weight in blend:
            module: Any = self._modules.get(name)
            if module is None or module.shadows:
                continue
            if slots is not None and isinstance(module, LoRALayer) and module.magnitude is not None:
                output = module.adapt_rows(layer, x, output, slots.row_factors(module, layer))
            else:
                output = module.adapt(layer, x, output, weight)
        return output

    def _from_slots(
        self, call: Call, output: Any, choice: Choice
    ) -> tuple[Tensor | None, Collection[Blend] | None]:
        """Return what the block's slots add to the output, and the blends that they leave; None is all of them."""
        block, x = self.activation.block, call.x
        if block is None or block.slots is None or torch.compiler.is_compiling():
            return None, None
        if torch.is_grad_enabled() or self.training:
            block.slots.forget()
            return None, None
        if self.replaced or not isinstance(x, Tensor) or x.ndim < 2 or x.is_nested:
            return None, None
        serials, size = self.activation.serials, x.shape[:-1].numel()
        if choice.unit == "token" and size != sum(choice.tokens):
            return None, None
        step = block.slots.step(choice, serials, size, x.device)
        delta = None if step is None else block.slots.delta(self, step, x, output.dtype)
        return delta, None if step is None or delta is None else step.others

    def _has_rows(self, call: Call, output: Any, choice: Choice) -> bool:
        """Check that a layer sees the rows or tokens of a choice, and return whether there are any.

        Raises:
            AdapterStateError: It may see something else, or an adapter mixes the tokens of a row.
        """
        x = call.x
        for name, value in (("input", x), ("output", output)):
            if not isinstance(value, Tensor):
                raise self.layout.refuse(f"its {name} is a {type(value).__name__}")
        if not x.numel():
            return False
        self.layout.check(x, choice, axes=x.ndim - _features(call.layer))
        if choice.unit == "token":
            acting = [self[name] for name in choice.names if name in self._modules]
            copies = self.replaced or any(module.trained for module in acting)
            by_token = all(module.by_token or module.leaves_output for module in acting)
            if not by_token or (copies and not _computes_by_token(call.layer)):
                raise self.layout.refuse("the adapters there may mix the tokens of a sequence")
        return True

    def _computed_again(self, call: Call, blend: Blend, parameters: Mapping[str, Tensor]) -> Any:
        """Return the layer's output with other parameters and with the effect of one blend."""
        if reason := _why_not_computed_again(call.layer, parameters):
            raise self.layout.refuse(reason)
        inside = Block(Choice((blend,)), is_part=True)  # for the layers inside this one
        with with_parameters(call.layer, parameters) as layer:
            with self.activation.opened(inside):
                output = layer.forward(*call.args, **call.kwargs)
            if not isinstance(output, Tensor):
                raise self.layout.refuse(f"its output is a {type(output).__name__}")
            return self._with_modules(layer, call.x, output, blend)

    def _to_swap(self, layer: nn.Module, blend: Blend) -> dict[str, Tensor]:
        """Return the parameters that a blend needs on this layer and that are not in place now."""
        wanted: dict[str, Tensor] = {a: self.current_base(a) for a in self.replaced}
        for name, _ in blend:
            if name in self._modules:
                wanted.update(self[name].trained)
        return {a: tensor for a, tensor in wanted.items() if layer._parameters.get(a) is not tensor}

    # --- weights that a layer reads itself -----------------------------------------------------------------

    @property
    def hides_parameters(self) -> bool:
        """Whether hooks put the `effective_weights` in place for each call of the layer."""
        return any(module.shadows for module in self.values())

    def effective_weights(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the weights to use in one call, where an adapter cannot add its effect to the layer's output.

        `nn.MultiheadAttention`, for example, reads `out_proj.weight` without calling `out_proj`.
        """
        choice = self.activation.current().choice
        if choice.whole is None and (
            self.replaced or not all(self[n].splits for n in choice.names & self._modules.keys())
        ):
            raise AdapterStateError(
                f"per_sample cannot use different weights for each row of a {type(layer).__name__}, which reads its "
                "weights directly. Run one batch for each adapter."
            )
        if self.activation.merged is not None:
            return {}
        blend = choice.whole or ()  # rows that differ are computed again for each adapter
        tensors = self._to_swap(layer, blend)
        layer.__dict__.update(tensors)  # the adapters add to these
        return tensors | self.shadows(layer, blend)

    def shadows(self, layer: nn.Module, blend: Blend) -> dict[str, Tensor]:
        """Return the weights that the adapters of a blend put in place of the layer's for a call."""
        acting = [(n, w) for n, w in blend if n in self._modules and self[n].shadows]
        attributes = dict.fromkeys(a for name, _ in acting for a in self[name].shadows)
        return {attribute: self._shadow(layer, attribute, acting) for attribute in attributes}

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
                return self.merge_weight(layer, attribute, blend)[-1]
            L, R, scale = product
            products.append((L, R, weight * scale))
        return LowRankSum(getattr(layer, attribute), *concatenated(products))

    def merge_weight(
        self, layer: nn.Module, attribute: str, weights: Iterable[tuple[str, float]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return W, ``W + sum of weight * delta`` in float32 or wider, and the same rounded to the dtype of W.

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

    # --- what other code asks of a layer -------------------------------------------------------------------

    def acting(self, layer: nn.Module) -> list[AdapterModule] | None:
        """Return the modules of the active adapters; None if rows use different ones, or parameters need a swap."""
        choice = self.activation.choice
        names, blend = choice.names & self._modules.keys(), choice.whole or ()
        if names and choice.whole is None:
            return None
        if choice is not self.activation.active and self._to_swap(layer, blend):
            return None
        return [self[name] for name in names]

    def leave_output(self, layer: nn.Module) -> bool:
        """Return whether the layer computes its output from its own (or trained) parameters alone."""
        acting = self.acting(layer)
        return acting is not None and all(module.leaves_output for module in acting)


def why_not_by_token(
    layer: nn.Module, layout: RowLayout, module: AdapterModule | None, trained: Iterable[str]
) -> str | None:
    """Return why a choice by token cannot use an adapter on a layer, or None if it can.

    The adapter adds `module`, if it is not None, to the layer's output, and trains copies of the layer's attributes
    `trained`.

    A forward pass may refuse more: a layer that sees another number of tokens than the batch has, such as the pooler of
    an encoder, which sees the first token of each row.
    """
    if layout.refused is not None:
        return layout.refused
    shadows = module is not None and module.shadows and not module.splits
    if shadows or isinstance(layer, nn.MultiheadAttention):
        return "the model reads its weights directly"
    if module is not None:
        has_hooks = module.layer_hooks or module.backbone_hooks
        if has_hooks or not (module.by_token or module.leaves_output):
            return "the adapter there may mix the tokens of a sequence"
    trained = dict.fromkeys(trained)
    if trained and not _computes_by_token(layer):
        return f"the adapter trains it in full, and a {type(layer).__name__} may mix the tokens of a sequence"
    return _why_not_computed_again(layer, trained) if trained else None


def _why_not_computed_again(layer: nn.Module, parameters: Mapping[str, Any]) -> str | None:
    """Return why the layer's forward with other parameters may differ from a call of the layer; None if it cannot."""
    hooks = (
        *layer._forward_pre_hooks.values(),
        *layer._forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
    )
    for hook in hooks:
        if not (getattr(hook, "__module__", None) or "").startswith("lorakit."):
            return f"its hook {getattr(hook, '__qualname__', repr(hook))} would not run for rows with trained copies"
    if not parameters.keys() <= layer._parameters.keys() or is_parametrized(layer):
        return "its parameters are computed from other tensors"
    return None


def _computes_by_token(layer: nn.Module) -> bool:
    """Return whether the layer is of a type that computes each token on its own."""
    known = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)
    return isinstance(layer, known) or type(layer).__name__.endswith("RMSNorm")


def _features(layer: nn.Module) -> int:
    """Return how many of the last axes of the layer's input are not batch or length."""
    if isinstance(layer, nn.Embedding):
        return 0
    return layer.weight.ndim - 1 if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1
