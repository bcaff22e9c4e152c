"""Bottleneck adapters: small MLPs between the layers of a frozen model (Houlsby et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lorakit.configuration import strict
from lorakit.errors import ConfigurationError, require_at_least
from lorakit.methods.method import TrainsModules

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.bottleneck_module import Bottleneck
    from lorakit.methods.module import AdapterModule
    from lorakit.models.blocks import Site

Kind = Literal["houlsby", "lin", "pfeiffer"]
Nonlinearity = Literal["relu", "gelu", "silu"]


@strict
@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(TrainsModules):
    """Add ``f(x) = W_up act(W_down x + b_down) + b_up`` to the outputs of sub-layers or blocks.

    With u the output of an attention or MLP, and h that of a block:

    - ``houlsby`` (AdapterH, Houlsby et al. 2019): two in each block, ``u + f(u)`` after the attention and
      after the MLP, before the residual sum (three in the decoder of an encoder-decoder);
    - ``lin`` (AdapterL, Lin et al. 2020): one in each block, ``h + f(LayerNorm(h))`` with a trained
      LayerNorm;
    - ``pfeiffer`` (AdapterP, Pfeiffer et al. 2021): one in each block. If the block ends with a residual
      sum s, ``s + f(s)``; if it ends with a LayerNorm of s (BERT), ``LayerNorm(s + f(LayerNorm(s)))``.

    AdapterD (AdapterDrop, Rücklé et al. 2020) is any of them without the blocks in ``drop_layers``. An
    adapter of width d and bottleneck r has ``2 d r + r + d`` parameters, and 2 d more with ``lin``.

    Raises:
        ConfigurationError: A value cannot work.
    """

    default_rate: ClassVar[float] = 3e-4
    """Peak learning rate: that of nearly all adapter runs of the paper (Table 9)."""
    main_settings: ClassVar[tuple[str, ...]] = ("kind", "size")
    """Settings that are shown even if they have their defaults."""

    kind: Kind = "houlsby"
    """Positions of the adapters: houlsby (two in each block), lin or pfeiffer (one)."""
    size: int = 64
    """Width of the bottleneck, r."""
    activation: Nonlinearity | None = None
    """Nonlinearity; by default silu (swish) for houlsby and relu for the others, as in the paper's code."""
    drop_layers: tuple[int, ...] = ()
    """Blocks that get no adapter, counted from 0 in each stack of blocks (AdapterDrop)."""
    train_modules: tuple[str, ...] | list[str] | str = ()
    """Modules trained in full in addition (name suffixes): a new classification head, or LayerNorms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("size", self.size, 1)
        if min(self.drop_layers, default=0) < 0:
            raise ConfigurationError(
                f"drop_layers is {self.drop_layers}; blocks are counted from 0, so each must be 0 or more."
            )

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """Return one bottleneck for each position of this kind, by path (see `Method`).

        Raises:
            TargetError: The blocks of the model's architecture are unknown.
            ConfigurationError: `size` exceeds the width, or `drop_layers` names a block that does not exist.
        """
        from lorakit.models.blocks import block_outputs, residual_branches

        sites = residual_branches if self.kind == "houlsby" else block_outputs
        dropped = self._dropped(model)
        return {
            site.path: self._bottleneck(model, site, dtype)
            for site in sites(model)
            if site.block not in dropped
        }

    def _dropped(self, model: nn.Module) -> set[str]:
        from lorakit.models.blocks import stacks

        dropped = set()
        for stack in stacks(model).values():
            if max(self.drop_layers, default=-1) >= len(stack):
                raise ConfigurationError(
                    f"drop_layers names block {max(self.drop_layers)}, and the model has the blocks 0 to "
                    f"{len(stack) - 1}."
                )
            dropped.update(stack[i] for i in self.drop_layers)
        return dropped

    def _bottleneck(self, model: nn.Module, site: Site, dtype: torch.dtype | None) -> Bottleneck:
        import torch
        from torch import nn

        from lorakit.methods.bottleneck_module import Bottleneck
        from lorakit.models.tree import submodule

        if self.size > site.width:
            raise ConfigurationError(
                f"size {self.size} exceeds the width {site.width} of '{site.path}', so it is not a bottleneck. "
                f"Use at most {site.width}."
            )
        layer = submodule(model, site.path)
        device = next(submodule(model, site.block).parameters()).device
        return Bottleneck(
            site.width,
            self.size,
            activation=self.activation or ("silu" if self.kind == "houlsby" else "relu"),
            own_norm=self.kind == "lin",
            renormalise=self.kind == "pfeiffer" and isinstance(layer, nn.LayerNorm),
            options={"device": device, "dtype": dtype or torch.float32},
        )
