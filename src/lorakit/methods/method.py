"""The interface of a method: a frozen dataclass of settings. It imports no torch, so that configurations load fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

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


def describe(method: Method) -> str:
    """Return a method as text, with the settings that differ from its defaults."""
    fields = getattr(type(method), "__dataclass_fields__", {})
    changed = []
    for name, field in fields.items():
        value = getattr(method, name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            changed.append(f"{name}={_described(value)}")
    return f"{type(method).__name__}({', '.join(changed)})"


def _described(value: Any) -> str:
    if isinstance(value, tuple) and value and all(isinstance(item, Method) for item in value):
        return f"({', '.join(map(describe, value))})"
    return repr(value)


def as_names(setting: str, value: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return a setting that is a name or a list of names as a tuple.

    Raises:
        ConfigurationError: A name is empty.
    """
    entries = (value,) if isinstance(value, str) else value
    if not all(entries):
        raise ConfigurationError(f"{setting} is {value!r}, and a name in it is empty; remove it.")
    return entries
