"""Modules that a method adds to layers: new tensors, and trained copies of base tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

_NONE: Mapping[str, nn.Parameter] = {}


class ModuleHook(NamedTuple):
    """A forward hook that an adapter's module registers on a module of the base."""

    run: Callable[..., Any]
    """A module-level function, so that deepcopy and pickle keep it. It finds its state on the hooked module.
    Called with (module, args, kwargs) before the forward pass, with (module, args, output) after it."""
    before: bool = False
    """Whether it runs before the forward pass."""


class LowRank(NamedTuple):
    """The product ``scaling * B A x`` of a linear layer."""

    A: Tensor
    """Shape (rank, in)."""
    B: Tensor
    """Shape (out, rank)."""
    scaling: float


class AdapterModule(nn.Module):
    """The tensors of one adapter on one layer of the base model, and their effect.

    A layer is any module of the base: a projection, a norm, a dropout, a whole block.

    Parameters and persistent buffers are saved in the adapter's file, so they must be floating-point tensors.

    A plain `AdapterModule` only holds trained copies of its layer's own parameters (`trained`: a bias, a whole
    classification head). Subclasses add an effect on the output.
    """

    scales: bool = True
    """Whether the effect is linear in the adapter's weight, so that adapters can be mixed by weight."""
    merges: bool = True
    """Whether the effect is a change of the layer's weights, so that the adapter can be merged. A subclass with an
    effect must then override `delta_weights` or `merged_weights`."""
    by_token: bool = False
    """Whether the effect on a token is independent of other tokens, so that some tokens of a batch can be computed
    without the others. A subclass that overrides `adapt` must set this flag."""
    layer_hooks: ClassVar[tuple[ModuleHook, ...]] = ()
    """Hooks on the adapted layer, in addition to the one that calls `adapt`."""
    backbone_hooks: ClassVar[tuple[ModuleHook, ...]] = ()
    """Hooks on the model's backbone, around each forward pass."""
    shadows: tuple[str, ...] = ()
    """Names of layer weights to replace during a call, for layers whose output nothing can be added to."""
    splits: bool = False
    """Whether a layer with these shadows can be called with some tokens of its input: the first axis of all its tensors
    has one entry for each token, and no token's output depends on others."""
    source: tuple[Any, ...] = ()
    """Other modules whose tensors `low_rank` reads."""

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """Trained copies of the layer's own parameters, by attribute."""
        return self._modules.get("trained", _NONE)  # type: ignore[return-value]

    def add_trained(self, attribute: str, copy: nn.Parameter) -> None:
        """Add a trained copy of one of the layer's parameters.

        Most adapters have none, and an empty module in each layer would double the memory that the modules need
        besides their tensors.
        """
        copies = self._modules.setdefault("trained", nn.ParameterDict())
        copies[attribute] = copy  # type: ignore[index]

    def adapt(self, layer: nn.Module, x: Any, output: Any, weight: float) -> Any:
        """Return `output` with the adapter's effect, scaled by the adapter's `weight`; the plain module has none.

        For a layer that returns a tuple, `output` is the first entry: a block's hidden states.
        """
        return output

    @property
    def leaves_output(self) -> bool:
        """Whether the module has no effect on the output: it only holds trained copies."""
        return type(self).adapt is AdapterModule.adapt and not self.shadows

    def low_rank(self) -> LowRank | None:
        """Return the product that `adapt` adds to the output, if that is its whole effect; else None.

        The steps of a generation read it again only after a change of a tensor, number or string of this module, of a
        module inside it or of `source`. Any other change acts from the next prompt on.
        """
        return None

    def shadow_factors(self, attribute: str) -> tuple[Tensor, Tensor, float] | None:
        """Return L (..., m, r), R (..., r, n) and a scale if ``scale * L R`` is the change of a weight in `shadows`.

        The layer then gets the change in this form (`LowRankSum`), and otherwise the sum of the weight and its change.
        """
        return None

    def delta_weights(self, layer: nn.Module) -> Mapping[str, Tensor]:
        """Return the tensors that a merge adds to the layer's weights, by attribute, in float32 (or wider)."""
        return {}

    def changed_weights(self, layer: nn.Module) -> list[str]:
        """Return the attributes of the layer's weights that a merge changes, without computing them if possible."""
        return list(self.merged_weights(layer) or self.delta_weights(layer))

    def merged_weights(self, layer: nn.Module) -> Mapping[str, Tensor] | None:
        """Return the merged weights if they are not the sum of W and a delta (DoRA), else None."""
        return None
