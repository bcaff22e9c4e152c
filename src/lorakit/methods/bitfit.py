"""BitFit: train the bias vectors only (Ben Zaken et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lorakit.configuration import strict
from lorakit.errors import TargetError
from lorakit.methods.method import TrainsModules

if TYPE_CHECKING:
    from torch import nn


@strict
@dataclass(frozen=True, kw_only=True)
class BitFit(TrainsModules):
    """Train every bias vector of the pre-trained model, including those of its norms.

    A transformer block of width d with its MLP at 4 d has 11 d biases. A classification head is not
    part of the pre-trained model: name it in ``train_modules``.
    """

    default_rate: ClassVar[float] = 1e-3
    """Peak learning rate. A bias only shifts the output of its layer: the paper uses eight times LoRA's rate (section
    D.4)."""

    train_modules: tuple[str, ...] | list[str] | str = ()
    """Modules trained in full, in addition to the biases (name suffixes), such as a new classification head."""

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of the biases, and of all parameters in ``train_modules`` (see `Method`).

        Raises:
            TargetError: The model has no biases, or an entry of train_modules names no module.
        """
        from lorakit.methods.trained import parameter_names
        from lorakit.models.heads import classification_head
        from lorakit.models.tree import is_inside

        heads = classification_head(model)
        biases = [
            name
            for name in parameter_names(model)
            if "bias" in name.rpartition(".")[2] and not is_inside(name, *heads)
        ]
        if not biases:
            raise TargetError(
                f"BitFit trains bias vectors, and {type(model).__name__} has none. Choose another method."
            )
        return list(dict.fromkeys([*biases, *super().trained_parameters(model)]))
