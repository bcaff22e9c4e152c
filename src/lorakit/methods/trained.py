"""Base parameters that a method trains in full beside what it adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from lorakit.errors import ConfigurationError, TargetError, nearest
from lorakit.methods.method import Method
from lorakit.models.layers import is_inside, is_of_adapter


def modules_named(model: nn.Module, entries: Sequence[str]) -> list[str]:
    """Return the paths of the modules that ``train_modules`` names by path or by its end.

    Raises:
        TargetError: An entry names no module.
    """
    paths = [path for path, _ in model.named_modules() if not is_of_adapter(path)]
    found: dict[str, None] = {}
    for entry in entries:
        hits = [path for path in paths if path == entry or path.endswith(f".{entry}")]
        if not hits:
            raise TargetError(
                f"train_modules names '{entry}', and no module of the model is called that."
                + nearest(entry, {path.rsplit(".", 1)[-1] for path in paths})
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the base's own parameters, every name of a tied one included."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, _ in named if not is_of_adapter(name)]


def parameters_below(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the names of the base's parameters in the modules at `paths`."""
    return [n for n in parameter_names(model) if any(is_inside(n, path) for path in paths)]


def with_head(method: Method, head: Sequence[str]) -> Method:
    """Return the method with a new task head trained beside it, unless it names modules to train itself.

    Raises:
        ConfigurationError: It has no setting for that.
    """
    settings: Any = method
    parts = (method, *getattr(method, "methods", ()))
    if not head or any(getattr(part, "train_modules", ()) for part in parts):
        return method
    if "train_modules" not in method.__dataclass_fields__:
        raise ConfigurationError(
            f"The model has a new head ({', '.join(head)}), and {type(method).__name__} has no setting "
            "train_modules to train it with. Give it one, whose parameters trained_parameters names too."
        )
    return dataclasses.replace(settings, train_modules=tuple(head))
