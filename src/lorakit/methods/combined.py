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
        if len(kinds) < 2:
            raise ConfigurationError(
                f"Combined has {len(kinds)} method(s); give it two or more, or use the one method directly."
            )
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ConfigurationError(
                    f"Combined has {kind} twice. Use one {kind} for all layers (LoRA's rank_pattern sets ranks "
                    "of single layers)."
                )
        if type(self).__name__ in kinds:
            raise ConfigurationError(
                "Combined cannot contain another Combined; list all methods in one."
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
        owner: dict[str, str] = {}
        for method in self.methods:
            for path, module in method.modules(model, dtype).items():
                kind = type(method).__name__
                if path in modules:
                    raise ConfigurationError(
                        f"{owner[path]} and {kind} both adapt '{path}', and a layer can have only one of them. Remove "
                        "it from the targets of one, or choose another kind."
                    )
                modules[path], owner[path] = module, kind
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
