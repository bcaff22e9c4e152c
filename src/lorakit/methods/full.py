"""Full fine-tuning: the base weights themselves are trained, as an adapter that can be taken off again."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.errors import ConfigurationError, TargetError
from lorakit.methods.module import AdapterModule
from lorakit.models.layers import is_of_adapter


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """Train every parameter, or those of the last blocks alone (FT and FT-Top2 of the paper's tables)."""

    top_layers: int | None = None
    """Train only this many of the last blocks (and a new task head); None trains the whole model."""
    train_modules: tuple[str, ...] = ()
    """With top_layers: modules trained beside the last blocks (name suffixes), such as a new head."""

    def __post_init__(self) -> None:
        if self.top_layers is not None and self.top_layers < 1:
            raise ConfigurationError(
                f"top_layers is {self.top_layers!r}; it must be 1 or more, or None for the whole model."
            )

    def modules(
        self, model: nn.Module, dtype: torch.dtype = torch.float32
    ) -> dict[str, AdapterModule]:
        """Full fine-tuning adds no module of its own (see `Method`)."""
        return {}

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Names of all parameters, or of those in the last blocks, every name of a tied one included."""
        names = [
            name
            for name, _ in model.named_parameters(remove_duplicate=False)
            if not is_of_adapter(name)
        ]
        if self.top_layers is None:
            return names
        blocks = _block_paths(names)
        if self.top_layers > len(blocks):
            raise TargetError(
                f"top_layers is {self.top_layers}, and the model has {len(blocks)} blocks to choose from."
            )
        wanted = tuple(f"{block}." for block in blocks[-self.top_layers :])
        heads = tuple(f"{module}." for module in self.train_modules)
        return [n for n in names if n.startswith(wanted) or any(f".{h}" in f".{n}" for h in heads)]


def _block_paths(names: list[str]) -> list[str]:
    """Paths of the model's blocks, in order: the numbered entries of its longest list of modules."""
    lists: dict[str, dict[str, None]] = {}
    for name in names:
        for match in re.finditer(r"\.\d+(?=\.)", name):
            lists.setdefault(name[: match.start()], {})[name[: match.end()]] = None
    return list(max(lists.values(), key=len, default={}))
