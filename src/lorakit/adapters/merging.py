"""Replace base weights by merged tensors, and restore them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.choice import Blend
from lorakit.adapters.installed import (
    adapted_layers,
    packed_part,
    require_unsharded,
    unmergeable,
)
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.adapters.merge_check import require_equal
from lorakit.adapters.tensor_checks import check_merged, check_tensor
from lorakit.adapters.ties import separate_names, tied_names, unties
from lorakit.errors import AdapterStateError
from lorakit.models.layers import ADAPTERS
from lorakit.models.packed import packed_by
from lorakit.models.parameter_swaps import show_parameters
from lorakit.models.quantised import dequantise_layer, dequantise_model, quantised_weight
from lorakit.models.tree import submodule, without_wrappers

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergedLayer:
    """The weights of a layer that a merge replaces."""

    path: str
    layer: nn.Module
    adapters: LayerAdapters
    attributes: list[str]

    def tensors(self, blend: Blend) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return W, the merged weight before rounding and the merged weight, by attribute.

        For a quantised weight, W is ``W_q``; all three are matrices (out, in).

        Raises:
            AdapterFileError: A merged weight overflows.
            AdapterStateError: The merged layer would compute something else than the adapted one.
        """
        tensors = {a: self.adapters.merge_weight(self.layer, a, blend) for a in self.attributes}
        for attribute, (W, _, merged) in tensors.items():
            check_merged(f"{self.path}.{attribute}", merged, W)
        exact = {attribute: exact for attribute, (_, exact, _) in tensors.items()}
        require_equal(self.path, self.layer, self.adapters, blend, exact)
        return tensors

    def replace(self, tensors: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        """Put the merged tensors into the layer."""
        for attribute, (_, _, merged) in tensors.items():
            parameter = nn.Parameter(merged, requires_grad=False)
            self.adapters.replace(self.layer, attribute, parameter)

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


def merged_layers(model: nn.Module, blend: Blend) -> list[MergedLayer]:
    """Return what merging these adapters changes, after all checks that need no numbers of the merge.

    Raises:
        AdapterStateError: A weight is quantised in an unsupported way, is not a parameter or has no numbers; or an
            adapter's effect is not a change of weights; or the model is sharded.
        AdapterFileError: An adapter holds NaN or infinity, which a file or the merged model must not keep.
    """
    require_mergeable(model, [name for name, _ in blend])
    return [
        MergedLayer(path, layer, adapters, changed_weights(path, layer, adapters, blend))
        for path, layer, adapters in adapted_layers(model)
    ]


def changed_weights(
    path: str, layer: nn.Module, adapters: LayerAdapters, blend: Blend
) -> list[str]:
    """Return the attributes of a layer that a merge replaces; see `merged_layers`."""
    show_parameters(layer)  # after an interrupted call
    modules = {name: adapters[name] for name, _ in blend if name in adapters}
    for name, module in modules.items():
        for key, tensor in module.state_dict(prefix=f"{path}.{ADAPTERS}.{name}.").items():
            check_tensor(f"'{key}'", tensor)
    changed = dict.fromkeys(a for m in modules.values() for a in m.changed_weights(layer))
    for attribute in changed:
        if reason := _why_no_delta(layer, attribute):
            raise AdapterStateError(f"'{f'{path}.{attribute}'.lstrip('.')}' {reason}")
    return list(changed)


def _why_no_delta(layer: nn.Module, attribute: str) -> str | None:
    """Return why no delta can be added to a weight, with the fix; None if it can."""
    if (kind := packed_by(layer, attribute)) is not None:
        return (
            f"is quantised ({kind}), and lorakit reads only the numbers of bitsandbytes, so no delta can be added to "
            "it. Merge into the unquantised base: `lorakit merge FOLDER OUTPUT --base.name MODEL --allow_other_base "
            "true`."
        )
    parameter = layer._parameters.get(attribute)
    if attribute not in layer._parameters:
        return (
            "is computed from other tensors in each pass (as weight norm and pruning do), so a merged weight cannot "
            "replace it. Make it a parameter before you attach the adapter: torch.nn.utils.parametrize."
            "remove_parametrizations(layer, NAME), or torch.nn.utils.prune.remove(layer, NAME) after pruning."
        )
    if parameter is not None and parameter.is_meta:
        return (
            "is on the meta device (offloaded by accelerate, or not loaded), so no delta can be added to it. Merge "
            "into a base that is loaded without offloading: `lorakit merge FOLDER OUTPUT`."
        )
    quantised = quantised_weight(layer, getattr(layer, attribute))
    if quantised is not None:
        _ = quantised.dtype  # raises an error if it is not known
        if "forward" in layer.__dict__:
            return (
                "is quantised, and the forward of its layer is wrapped (accelerate does so for a model that is spread "
                "over devices or offloaded), so it would ignore a merged weight. Load the base on one device, or "
                "unquantised."
            )
    return None


def require_mergeable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise an AdapterStateError if the effect of one of these adapters is not a change of weights."""
    require_unsharded(model)
    if found := next(unmergeable(model, names), None):
        raise AdapterStateError(
            f"'{found[0]}' cannot be merged: its effect at '{found[1]}' is not a weight change. Use it unmerged, with "
            "activate()."
        )


# --- merging and unmerging ------------------------------------------------------------------------------


@torch.inference_mode(False)  # the merged tensors outlive a caller's inference mode
@torch.no_grad()
def merge(model: nn.Module, blend: Blend) -> None:
    """Replace the weight of every layer that an active adapter changes by ``W + sum of weight * delta``.

    All merged tensors are computed before the first is swapped in, so an error changes nothing. For a weight
    that bitsandbytes quantised, the result is ``W_q`` plus the delta in the layer's compute dtype. Quantising
    it again would lose most of the delta.

    Raises:
        AdapterStateError: As for `merged_layers` and `MergedLayer.tensors`.
        AdapterFileError: An adapter or a merged weight holds NaN or infinity.
    """
    layers = merged_layers(model, blend)
    for layer, tensors in [(layer, layer.tensors(blend)) for layer in layers]:
        layer.replace(tensors)


@torch.inference_mode(False)
@torch.no_grad()
def merge_permanently(model: nn.Module, blend: Blend, *, abandon: Callable[[], None]) -> None:
    """As `merge`, but drop the base weight of each layer before the next one is merged.

    This needs the memory of one more layer, and not of all. Every layer of a quantised base becomes an ordinary layer.
    `tie_word_embeddings` is cleared if the merge unties all that it ties. `abandon` is called if an error stops the
    merge between two layers, for example for lack of memory.

    Raises:
        AdapterStateError: As for `merge`.
        AdapterFileError: As for `merge`; a merged weight may overflow between two layers.
    """
    layers = merged_layers(model, blend)
    kept = {name for names in tied_names(model) for name in names}  # to compare what was tied
    unquantised, has_begun = 0, False
    try:
        for layer in layers:
            tensors = layer.tensors(blend)
            has_begun |= bool(tensors or layer.adapters.replaced)
            layer.replace(tensors)
            del tensors  # before the next layer's are computed
            unquantised += layer.forget(kept)
        _record_untying(model)
        _separate_names(model)
        unquantised += sum(layer.forget() for layer in layers)
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


def unmerge(model: nn.Module) -> None:
    """Restore every base parameter."""
    for _, layer, adapters in adapted_layers(model):
        adapters.restore(layer)


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
