"""The interface of a method: a frozen dataclass of settings. It imports no torch, so that configurations load fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from lorakit.configuration import conform, default_of
from lorakit.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.module import AdapterModule


@runtime_checkable
class Method(Protocol):
    """A way to adapt a model, as a frozen dataclass of its settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """Return the modules to add, by path of the adapted layer. The model may be on the meta device.

        Args:
            model: The base model, which is not changed.
            dtype: Dtype of the new tensors; None is float32.

        Raises:
            TargetError: A target names no layer or one that cannot be adapted.
            ConfigurationError: A setting does not fit a layer (rank above its width).
        """
        ...

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of the base parameters that are trained in full, each through a copy."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainsModules:
    """Base of methods with a setting ``train_modules``: names of modules that are trained in full.

    It has no field, so that a subclass orders its own, and is a dataclass, so that the command line lists them.
    """

    if TYPE_CHECKING:
        train_modules: tuple[str, ...] | list[str] | str

    def __post_init__(self) -> None:
        conform(self)
        object.__setattr__(self, "train_modules", as_names("train_modules", self.train_modules))

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """Return no module (see `Method`)."""
        return {}

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters in ``train_modules`` (see `Method`)."""
        from lorakit.methods.trained import modules_named, parameters_below

        return parameters_below(model, modules_named(model, self.train_modules))


def require_method(method: object) -> None:
    """Require a method with its settings.

    Raises:
        ConfigurationError: It is the class of a method, or something else.
    """
    if isinstance(method, type) or not isinstance(method, Method):
        raise ConfigurationError(
            f"method is {method!r:.100}; it must be a method with its settings, for example LoRA(rank=8)."
        )


def describe(method: Method, *, main: bool = True) -> str:
    """Return a method as text, with the settings that differ from its defaults, and with `main` its main ones.

    Main settings are named by the class's `main_settings`.
    """
    fields = getattr(type(method), "__dataclass_fields__", {})
    shown = getattr(type(method), "main_settings", ()) if main else ()
    settings = []
    for name, field in fields.items():
        value = getattr(method, name)
        if value != default_of(field) or name in shown:
            settings.append(f"{name}={_described(value, main)}")
    return f"{type(method).__name__}({', '.join(settings)})"


def _described(value: Any, main: bool) -> str:
    if isinstance(value, tuple) and value and all(isinstance(item, Method) for item in value):
        return f"({', '.join(describe(item, main=main) for item in value)})"
    return repr(value)


def as_names(setting: str, value: tuple[str, ...] | list[str] | str) -> tuple[str, ...]:
    """Convert a setting that is one name or several to a tuple.

    Raises:
        ConfigurationError: A name is empty.
    """
    entries = (value,) if isinstance(value, str) else tuple(value)
    if not all(entries):
        raise ConfigurationError(f"{setting} is {value!r}, which has an empty name; remove it.")
    return entries


def with_head(
    method: Method, model: nn.Module, head: Sequence[str], new_weights: Sequence[str] = ()
) -> Method:
    """Add the modules with new, random weights to the method's ``train_modules``.

    These are the modules of the task head, unless ``train_modules`` names modules already, and every other module with
    new weights that the method does not train, such as a pooler.

    Args:
        method: The method to attach.
        model: The base model.
        head: Paths of the modules of the head; none if the model has no task head.
        new_weights: Names of the parameters that the checkpoint lacked.

    Raises:
        ConfigurationError: The method has no setting ``train_modules``.
    """
    from lorakit.models.tree import is_inside

    settings: Any = method
    parts = (method, *getattr(method, "methods", ()))
    named: tuple[str, ...] = getattr(method, "train_modules", ())
    added = [] if any(getattr(part, "train_modules", ()) for part in parts) else [*head]
    for name in sorted(set(new_weights) - set(method.trained_parameters(model))):
        if not is_inside(name, *added):
            added.append(next((p for p in head if is_inside(name, p)), name.rpartition(".")[0]))
    if not added:
        return method
    if "train_modules" not in method.__dataclass_fields__:
        raise ConfigurationError(
            f"The model has new modules ({', '.join(added)}), and {type(method).__name__} has no setting "
            "train_modules to train them with. Add the setting to the class, and return its parameters from "
            "trained_parameters."
        )
    return dataclasses.replace(settings, train_modules=(*named, *added))
