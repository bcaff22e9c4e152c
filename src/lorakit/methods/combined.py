"""Several methods as one adapter: LoRA with prefixes (LoRA+PE and LoRA+PL of the paper's Table 15), or others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.configuration import strict
from lorakit.errors import ConfigurationError
from lorakit.methods.lora import LoRA
from lorakit.methods.method import Method, TrainsModules, require_method
from lorakit.methods.virtual_tokens import VirtualTokens, virtual_tokens_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.module import AdapterModule


@strict
@dataclass(frozen=True, kw_only=True)
class Combined(TrainsModules):
    """Combine several methods in one adapter with one name and one file.

    It trains the parameters of all of them.

    Raises:
        ConfigurationError: There are fewer than two methods, two of one kind, or two that need virtual tokens.
    """

    methods: tuple[Method, ...]
    """The methods, for example ``(LoRA(), PrefixEmbedding())``."""
    train_modules: tuple[str, ...] | list[str] | str = ()
    """Modules trained in full in addition (name suffixes), such as a new classification head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            require_method(method)
        kinds = [type(method).__name__ for method in self.methods]
        if len(kinds) < 2 or len({*kinds, "Combined"}) <= len(kinds):
            raise ConfigurationError(
                f"Combined has the methods {', '.join(kinds) or 'none'}. Give it two or more, each of another kind and "
                "none a Combined. One LoRA can have different ranks: rank_pattern sets those of single layers."
            )
        prefix_kinds = [type(m).__name__ for m in self.methods if hasattr(m, "virtual_tokens")]
        if len(prefix_kinds) > 1:
            raise ConfigurationError(
                f"{' and '.join(prefix_kinds)} both give vectors to the same virtual tokens. Choose one of them."
            )

    @property
    def virtual_tokens(self) -> VirtualTokens:
        """The virtual tokens that each sequence needs; none without a prefix method."""
        return virtual_tokens_of(self.methods)

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """Return the modules of all methods, by path (see `Method`).

        Raises:
            ConfigurationError: Two methods need the same layer.
        """
        modules: dict[str, AdapterModule] = {}
        for method in self.methods:
            added = method.modules(model, dtype)
            if both := sorted(modules.keys() & added.keys()):
                raise ConfigurationError(
                    f"{type(method).__name__} and an earlier method of Combined both adapt '{both[0]}', and a "
                    "layer can have only one of them. Remove it from the targets of one, or choose another kind."
                )
            modules |= added
        return modules

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of the base parameters that any of the methods trains (see `Method`).

        Raises:
            ConfigurationError: LoRA adapts one of these weights.
        """
        from lorakit.models.roles import resolve_targets

        names = [name for method in self.methods for name in method.trained_parameters(model)]
        names += super().trained_parameters(model)
        lora = lora_of(self)
        adapted = {place.path for place in resolve_targets(model, lora.targets)} if lora else set()
        for name in names:
            path, _, attribute = name.rpartition(".")
            if (path in adapted and "bias" not in attribute) or name in adapted:
                raise ConfigurationError(
                    f"'{name}' is trained in full, and LoRA adapts it as well. Remove it from LoRA's targets, or do "
                    "not train it in full."
                )
        return list(dict.fromkeys(names))


def parts(method: Method) -> tuple[Method, ...]:
    """Return the methods in a combination; for any other method, the method alone."""
    return method.methods if isinstance(method, Combined) else (method,)


def lora_of(method: Method) -> LoRA | None:
    """Return the LoRA in a method, or None."""
    return next((part for part in parts(method) if isinstance(part, LoRA)), None)
