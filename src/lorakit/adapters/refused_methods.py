"""Methods of other libraries that would silently change what lorakit's adapters compute, as errors.

They hold for models of which any part has adapters. `replace_methods` finds each method by the name of its function.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.adapters.replaced_methods import OwnMethod
from lorakit.errors import AdapterStateError


def add_adapter(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Reject a new adapter of PEFT."""
    _refuse("add_adapter", "lorakit.attach(model, lorakit.LoRA(...), name=...)")


def load_adapter(model: nn.Module, own: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """Reject an adapter that PEFT would load."""
    _refuse("load_adapter", "lorakit.load(model, FOLDER, name=...)")


def _refuse(method: str, instead: str) -> None:
    raise AdapterStateError(
        f"The model has adapters of lorakit, and {method}() would wrap its layers for PEFT, so that adapters of both "
        f"act. Call {instead}, or detach() first."
    )


def fuse_qkv_projections(model: nn.Module, own: OwnMethod) -> Any:
    """Reject the fusion of layers, which copies the base's weights and never calls the adapted layers again."""
    raise AdapterStateError(
        "fuse_qkv_projections() would copy the weights of the base into new layers, without the adapters. Call "
        "merge(keep_base=False) first."
    )
