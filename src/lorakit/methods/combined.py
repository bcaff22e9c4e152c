"""Several methods as one adapter: LoRA with prefixes (LoRA+PE and LoRA+PL of the paper's Table 15), or others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.configuration import conform
from lorakit.errors import ConfigurationError
from lorakit.methods.lora import LoRA
from lorakit.methods.method import Method, as_names
from lorakit.methods.virtual_tokens import VirtualTokens

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.module import AdapterModule


@dataclass(frozen=True, kw_only=True)
class Combined:
    """Train what several methods train, as one adapter with one name and one file.

    Its parameters are those of all together.

    Raises:
        ConfigurationError: There are fewer than two methods, two of one kind, or two that need virtual tokens.
    """

    methods: tuple[Method, ...]
    """The methods, for example ``(LoRA(), PrefixEmbedding())``."""
    train_modules: tuple[str, ...] | str = ()
    """Modules trained in full beside them (name suffixes), such as a new classification head."""

    def __post_init__(self) -> None:
        conform(self)
        object.__setattr__(self, "train_modules", as_names("train_modules", self.train_modules))
        kinds = [type(method).__name__ for method in self.methods]
        if len(kinds) < 2:
            raise ConfigurationError(
                f"Combined has {len(kinds)} method(s); give it two or more, or use the one by itself."
            )
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ConfigurationError(
                    f"Combined has {kind} twice. Say it in one: the settings of one {kind} hold for all of it "
                    "(LoRA has rank_pattern for layers that differ)."
                )
        if type(self).__name__ in kinds:
            raise ConfigurationError(
                "Combined cannot hold another Combined; name all methods in one."
            )
        taking = [type(m).__name__ for m in self.methods if hasattr(m, "virtual_tokens")]
        if len(taking) > 1:
            raise ConfigurationError(
                f"{' and '.join(taking)} both give vectors to the same virtual tokens. Choose one of them."
            )

    @property
    def virtual_tokens(self) -> VirtualTokens:
        """The virtual tokens that each sequence takes; none without a prefix method."""
        found = (getattr(method, "virtual_tokens", None) for method in self.methods)
        return next((tokens for tokens in found if tokens is not None), VirtualTokens())

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """The modules of all methods, by path (see `Method`).

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
                        f"{owner[path]} and {kind} both adapt '{path}', and one layer takes one of them. Leave it "
                        "out of the targets of one, or choose another kind."
                    )
                modules[path], owner[path] = module, kind
        return modules

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Names of the base parameters that any of the methods trains (see `Method`).

        Raises:
            ConfigurationError: A weight that LoRA adapts is one of them.
        """
        from lorakit.methods.trained import modules_named, parameters_below

        names = [name for method in self.methods for name in method.trained_parameters(model)]
        names += parameters_below(model, modules_named(model, self.train_modules))
        self._refuse_trained_twice(model, names)
        return list(dict.fromkeys(names))

    def _refuse_trained_twice(self, model: nn.Module, names: list[str]) -> None:
        from lorakit.models.roles import resolve_targets

        lora = lora_of(self)
        if lora is None or not names:
            return
        adapted = {place.path for place in resolve_targets(model, lora.targets)}
        for name in names:
            path, _, attribute = name.rpartition(".")
            if path in adapted and "bias" not in attribute:
                raise ConfigurationError(
                    f"'{name}' is trained in full, and LoRA adapts it as well. Leave it out of LoRA's targets, or "
                    "train it in one way alone."
                )


def parts(method: Method) -> tuple[Method, ...]:
    """The methods that a combination holds; any other is its own only part."""
    return method.methods if isinstance(method, Combined) else (method,)


def lora_of(method: Method) -> LoRA | None:
    """The LoRA in a method, if there is one."""
    return next((part for part in parts(method) if isinstance(part, LoRA)), None)
