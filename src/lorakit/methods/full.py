"""Full fine-tuning: train copies of the base weights, as an adapter that can be removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lorakit.configuration import strict
from lorakit.errors import ConfigurationError, TargetError
from lorakit.methods.method import TrainsModules

if TYPE_CHECKING:
    from torch import nn


@strict
@dataclass(frozen=True, kw_only=True)
class FullFineTuning(TrainsModules):
    """Train every parameter, or only those of the last blocks (FT and FT-Top2 of the paper's tables)."""

    default_rate: ClassVar[float] = 5e-5
    """Peak learning rate."""

    top_layers: int | None = None
    """Train only this many of the last blocks of each stack (and a new task head); None trains the whole model."""
    train_modules: tuple[str, ...] | str = ()
    """With top_layers: modules trained in addition to the last blocks (name suffixes), such as a new head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_layers is not None and self.top_layers < 1:
            raise ConfigurationError(
                f"top_layers is {self.top_layers!r}; it must be 1 or more, or None for the whole model."
            )

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of all parameters, or of those in the last blocks, with every name of a tied parameter."""
        from lorakit.methods.trained import modules_named, parameter_names, parameters_below
        from lorakit.models.blocks import stacks

        paths = modules_named(model, self.train_modules)
        if self.top_layers is None:
            return parameter_names(model)
        for stack in stacks(model).values() or [[]]:
            if self.top_layers > len(stack):
                raise TargetError(
                    f"top_layers is {self.top_layers}, and the model has {len(stack)} blocks. Use at most that many."
                )
            paths += stack[-self.top_layers :]
        return parameters_below(model, paths)
