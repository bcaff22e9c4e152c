"""Replace base weights by merged tensors, and restore them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.choice import Blend
from lorakit.adapters.entry import remove_hooks
from lorakit.adapters.installed import (
    adapted_layers,
    packed_part,
    require_unsharded,
    unmergeable,
)
from lorakit.adapters.layer_adapters import LayerAdapters, after_forward
from lorakit.adapters.tensor_checks import check_merged
from lorakit.adapters.ties import separate_names, tied_names, unties
from lorakit.errors import AdapterStateError
from lorakit.models.quantised import dequantise_layer, dequantise_model, quantised_weight
from lorakit.models.tree import submodule, without_wrappers

_LOG = logging.getLogger(__name__)


@torch.inference_mode(False)  # the merged tensors outlive a caller's inference mode
@torch.no_grad()
def merge(model: nn.Module, blend: Blend) -> None:
    """Replace the weight of every layer that an active adapter changes by ``W + sum of weight * delta``.

    All merged tensors are computed before the first is swapped in, so an error changes nothing. For a weight
    that bitsandbytes quantised, the result is ``W_q`` plus the delta in the layer's compute dtype. Quantising
    it again would lose most of the delta.

    Raises:
        AdapterStateError: A weight has an unsupported quantisation or is not a parameter, or an adapter cannot
            be merged.
        AdapterFileError: An adapter or a merged weight holds NaN or infinity.
    """
    changes = _changes(model, blend)
    for change, tensors in [(change, change.tensors(blend)) for change in changes]:
        change.replace(tensors)
    if model.training:
        return  # the hooks record the passes of checkpointed blocks
    for _, layer, adapters in adapted_layers(model):
        # This saves 1 to 2 microseconds a call. Among other hooks it stays: they must run before or after the
        # adapter again once it is unmerged.
        if len(layer._forward_hooks) == 1:
            remove_hooks(layer, after_forward)
            adapters.activation.before_gradients = _restore_hooks


@torch.inference_mode(False)
@torch.no_grad()
def merge_permanently(model: nn.Module, blend: Blend, *, abandon: Callable[[], None]) -> None:
    """As `merge`, but drop the base weight of each layer before the next one is merged.

    This needs the memory of one more layer, and not of all. Every layer of a quantised base becomes an ordinary layer.
    `tie_word_embeddings` is cleared if the merge unties all that it ties. `abandon` is called if an error stops the
    merge between two layers, for example for lack of memory.

    Raises:
        AdapterStateError: As for `merge`, before anything has changed.
        AdapterFileError: As for `merge`; a merged weight may overflow between two layers.
    """
    changes = _changes(model, blend)
    kept = {name for names in tied_names(model) for name in names}  # to compare what was tied
    unquantised, has_begun = 0, False
    try:
        for change in changes:
            tensors = change.tensors(blend)
            has_begun |= bool(tensors or change.adapters.replaced)
            change.replace(tensors)
            unquantised += change.forget(kept)
        _record_untying(model)
        _separate_names(model)
        unquantised += sum(change.forget() for change in changes)
        # What another library has quantised stays as it is, and so does the mark of its model.
        others = 0 if packed_part(model) else dequantise_model(model)
    except BaseException:
        if has_begun:
            _LOG.error(
                "The merge has stopped between two layers. Load the model again: it is merged in part."
            )
            abandon()
        raise
    if unquantised or others:
        _LOG.warning(
            "The base was quantised: the merged model holds the dequantised weights (%d merged, %d others), not the "
            "original ones. To keep the original weights, merge into the base loaded unquantised.",
            unquantised,
            others,
        )


@dataclass(frozen=True)
class _Change:
    """The weights of a layer that a merge replaces."""

    path: str
    layer: nn.Module
    adapters: LayerAdapters
    attributes: list[str]

    def tensors(self, blend: Blend) -> dict[str, Tensor]:
        """Return the merged tensors.

        Raises:
            AdapterFileError: One overflows.
        """
        tensors = {}
        for attribute in self.attributes:
            W, _, merged = self.adapters.merge_weight(self.layer, attribute, blend)
            check_merged(f"{self.path}.{attribute}", merged, W)
            tensors[attribute] = merged
        return tensors

    def replace(self, tensors: dict[str, Tensor]) -> None:
        for attribute, weight in tensors.items():
            self.adapters.replace(self.layer, attribute, nn.Parameter(weight, requires_grad=False))

    def forget(self, kept: Collection[str] = ()) -> int:
        """Make the replaced tensors permanent, except those of these names in the model.

        Returns:
            Number of quantised layers that have become ordinary ones: 1 or 0.
        """
        unquantised = 0
        for attribute in list(self.adapters.replaced):
            if (f"{self.path}.{attribute}" if self.path else attribute) in kept:
                continue
            merged = self.layer._parameters[attribute]
            quantised = quantised_weight(self.layer, self.adapters.forget(attribute))
            if quantised is not None:
                assert merged is not None
                dequantise_layer(quantised, merged.data)
                unquantised += 1
        return unquantised


def _changes(model: nn.Module, blend: Blend) -> list[_Change]:
    """Return what merging these adapters changes, after all checks."""
    names = [name for name, _ in blend]
    require_mergeable(model, names)
    changes = []
    for path, layer, adapters in adapted_layers(model):
        attributes = adapters.weights_changed_by(path, layer, names)
        for attribute in attributes:
            W = getattr(layer, attribute)
            quantised = quantised_weight(layer, W)
            if quantised is not None:
                _ = quantised.dtype  # raises an error if it is not known
                if "forward" in layer.__dict__:
                    raise AdapterStateError(
                        f"The forward of the quantised layer '{path}' is wrapped (accelerate does so for a model that "
                        "is spread over devices or offloaded), so it would ignore a merged weight. Load the base on "
                        "one device, or unquantised."
                    )
        changes.append(_Change(path, layer, adapters, attributes))
    return changes


@torch.no_grad()
def merged_weights(model: nn.Module, blend: Blend) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield W, the merged weight before rounding and the merged weight, for each weight that a merge replaces.

    For a quantised weight, W is ``W_q``; all three are matrices (out, in).
    """
    for path, layer, adapters in adapted_layers(model):
        for attribute in adapters.weights_changed_by(path, layer, [name for name, _ in blend]):
            yield adapters.merge_weight(layer, attribute, blend)


def _restore_hooks(model: nn.Module) -> None:
    """Add the hooks that a merge has removed. Each was alone, so those registered since run after it."""
    for _, layer, adapters in adapted_layers(model):
        adapters.activation.before_gradients = None
        if after_forward not in layer._forward_hooks.values():
            layer.register_forward_hook(after_forward, with_kwargs=True, prepend=True)


def require_mergeable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise an AdapterStateError if one of these adapters cannot be merged: it would change the model's function."""
    require_unsharded(model)
    for name, reason in unmergeable(model, names):
        raise AdapterStateError(
            f"'{name}' cannot be merged: {reason}. Use it unmerged, with activate()."
        )


def unmerge(model: nn.Module) -> None:
    """Restore every base parameter."""
    for _, layer, adapters in adapted_layers(model):
        adapters.restore(layer)
    _restore_hooks(model)


def _separate_names(model: nn.Module) -> None:
    """Give each name of a parameter that the merge has untied in part a parameter of its own."""
    for names in tied_names(model):
        owners = [(submodule(model, n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names]
        tensors = {name: model.get_parameter(name) for name in names}
        own: dict[str, Tensor] = dict(tensors)
        separate_names([names], own)
        for name, (layer, attribute) in zip(names, owners, strict=True):
            if own[name] is not tensors[name]:
                flag = tensors[name].requires_grad
                layer._parameters[attribute] = nn.Parameter(own[name], requires_grad=flag)


def _record_untying(model: nn.Module) -> None:
    """Clear `tie_word_embeddings` if the merge has untied all that it ties."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    state = {without_wrappers(key): tensor for key, tensor in model.state_dict().items()}
    separated = (
        (first, other)
        for first, *others in tied_names(model)
        for other in others
        if state[first].data_ptr() != state[other].data_ptr()
    )
    if unties(model, state):
        config.tie_word_embeddings = False
    elif pair := next(separated, None):
        _LOG.warning(
            "'%s' and '%s' were one tensor and are two after the merge, which the configuration of %s cannot record. "
            "resize_token_embeddings() and tie_weights() would make them one again, without the adapter. Resize the "
            "base before you attach or load the adapter.",
            *pair,
            type(model).__name__,
        )
