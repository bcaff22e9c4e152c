"""BitFit: the bias vectors are trained and nothing else (Ben Zaken et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.configuration import conform
from lorakit.errors import TargetError
from lorakit.methods.method import as_names

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.module import AdapterModule


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Train every bias vector of the pre-trained model, those of its norms included.

    A transformer block of width d with its MLP at 4 d has 11 d biases. A classification head is not
    part of the pre-trained model: name it in ``train_modules``.
    """

    train_modules: tuple[str, ...] | str = ()
    """Modules trained in full beside the biases (name suffixes), such as a new classification head."""

    def __post_init__(self) -> None:
        conform(self)
        object.__setattr__(self, "train_modules", as_names("train_modules", self.train_modules))

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """BitFit adds no module of its own (see `Method`)."""
        return {}

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Names of the biases, and of all parameters in ``train_modules`` (see `Method`).

        Raises:
            TargetError: The model has no biases, or an entry of train_modules names no module.
        """
        from lorakit.methods.trained import modules_named, parameter_names, parameters_below
        from lorakit.models.heads import classification_head
        from lorakit.models.layers import is_inside

        heads = classification_head(model)
        biases = [
            name
            for name in parameter_names(model)
            if "bias" in name.rpartition(".")[2] and not any(is_inside(name, h) for h in heads)
        ]
        if not biases:
            raise TargetError(
                f"BitFit trains bias vectors, and {type(model).__name__} has none. Choose another method."
            )
        below = parameters_below(model, modules_named(model, self.train_modules))
        return list(dict.fromkeys([*biases, *below]))
