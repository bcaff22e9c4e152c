"""Full fine-tuning: the base weights themselves are trained, as an adapter that can be taken off again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.configuration import conform
from lorakit.errors import ConfigurationError, TargetError
from lorakit.methods.method import as_names

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.module import AdapterModule


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """Train every parameter, or those of the last blocks alone (FT and FT-Top2 of the paper's tables)."""

    top_layers: int | None = None
    """Train only this many of the last blocks of each stack (and a new task head); None trains the whole model."""
    train_modules: tuple[str, ...] | str = ()
    """With top_layers: modules trained beside the last blocks (name suffixes), such as a new head."""

    def __post_init__(self) -> None:
        conform(self)
        object.__setattr__(self, "train_modules", as_names("train_modules", self.train_modules))
        if self.top_layers is not None and self.top_layers < 1:
            raise ConfigurationError(
                f"top_layers is {self.top_layers!r}; it must be 1 or more, or None for the whole model."
            )

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """Full fine-tuning adds no module of its own (see `Method`)."""
        return {}

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Names of all parameters, or of those in the last blocks, every name of a tied one included."""
        from lorakit.methods.trained import modules_named, parameter_names, parameters_below
        from lorakit.models.blocks import stacks

        paths = modules_named(model, self.train_modules)
        if self.top_layers is None:
            return parameter_names(model)
        for stack in stacks(model).values() or [[]]:
            if self.top_layers > len(stack):
                raise TargetError(
                    f"top_layers is {self.top_layers}, and the model has {len(stack)} blocks to choose from."
                )
            paths += stack[-self.top_layers :]
        return parameters_below(model, paths)
