"""`half` and `float` of a quantised model that carries adapters.

transformers rejects them by its flag `is_quantized`, which is cleared while the model has adapters (see
`lorakit.models.quantised.allow_training`). `replace_methods` finds each method by the name of its function.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.adapters.replaced_methods import OwnMethod
from lorakit.errors import AdapterStateError


def half(model: nn.Module, own: OwnMethod, *args: Any) -> Any:
    """Cast a model to float16, as its own `half`.

    Raises:
        AdapterStateError: transformers has quantised the model.
    """
    _refuse_quantised(model)
    return own(*args)


def float(model: nn.Module, own: OwnMethod, *args: Any) -> Any:
    """Cast a model to float32, as its own `float`.

    Raises:
        AdapterStateError: transformers has quantised the model.
    """
    _refuse_quantised(model)
    return own(*args)


def _refuse_quantised(model: nn.Module) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise AdapterStateError(
            "A quantised model cannot be cast to another dtype: its layers would compute with wrong numbers. Load it "
            "in this dtype: from_pretrained(..., dtype=...)."
        )
