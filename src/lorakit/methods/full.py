"""Full fine-tuning: train copies of the base weights, as an adapter that can be removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lorakit.configuration import strict
from lorakit.errors import TargetError, require_at_least
from lorakit.methods.method import TrainsModules

if TYPE_CHECKING:
    from torch import nn


@strict
@dataclass(frozen=True, kw_only=True)
class FullFineTuning(TrainsModules):
    """Train every parameter, or only those of the last blocks (FT and FT-Top2 of the paper's tables).

    Parameters that require no gradient before the first adapter stay fixed.
    """

    default_rate: ClassVar[float] = 5e-5
    """Peak learning rate."""

    top_layers: int | None = None
    """Train only this many of the last blocks of each stack (and a new task head); None trains the whole model."""
    train_modules: tuple[str, ...] | list[str] | str = ()
    """With top_layers: modules trained in addition to the last blocks (name suffixes), such as a new head. Also modules
    to train although they were frozen before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("top_layers", self.top_layers, 1)

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of all parameters, or of those in the last blocks, with every name of a tied parameter.

        Parameters that were frozen before the first adapter, such as a table of sinusoidal positions, are left out
        unless `train_modules` names them.

        Raises:
            TargetError: The model has fewer blocks than `top_layers`, or all of these parameters are frozen.
        """
        from lorakit.methods.trained import (
            frozen_parameters,
            modules_named,
            parameter_names,
            parameters_below,
        )
        from lorakit.models.blocks import stacks

        named = modules_named(model, self.train_modules)
        names = parameter_names(model)
        if self.top_layers is not None:
            paths = list(named)
            for stack in stacks(model).values() or [[]]:
                if self.top_layers > len(stack):
                    raise TargetError(
                        f"top_layers is {self.top_layers}, and the model has {len(stack)} blocks. Use at most that "
                        "many."
                    )
                paths += stack[-self.top_layers :]
            names = parameters_below(model, paths)
        frozen = frozen_parameters(model).difference(parameters_below(model, named))
        trained = [name for name in names if name not in frozen]
        if names and not trained:
            raise TargetError(
                f"{self} trains nothing: requires_grad of all its parameters was False before the first adapter. Call "
                "model.requires_grad_(True) before attach()."
            )
        return trained
