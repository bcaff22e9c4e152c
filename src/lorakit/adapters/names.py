"""Names of adapters on a model."""

from __future__ import annotations

import re

from torch import nn

from lorakit.adapters.activation import Activation
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.adapters.row_layout import RowLayout
from lorakit.errors import ConfigurationError

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""A name that an adapter can have, unless it is an attribute (`is_attribute`)."""


def is_attribute(name: str) -> bool:
    """Return whether the module that holds a layer's adapters has an attribute of this name, such as "train"."""
    return hasattr(LayerAdapters(nn.Identity(), Activation(), RowLayout("")), name)


def require_valid(name: str) -> None:
    """Raise a ConfigurationError if an adapter cannot have this name."""
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot name an adapter. Use letters, digits, '-' and '_', starting with a letter or digit."
        )
    if is_attribute(name):
        raise ConfigurationError(
            f"'{name}' is an attribute of PyTorch's modules or of lorakit's. Choose another name "
            f"(name='my_{name}')."
        )
