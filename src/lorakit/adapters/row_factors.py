"""DoRA's factors on the rows of a layer's output, kept between the steps of a generation.

They need the norms of all rows of ``W + scaling * B A``: for the one token of a decoding step as much work as for a
prompt, and far more than the step itself.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lorakit.methods.lora.layer import LoRALayer
from lorakit.models.optimizer_steps import optimizer_steps
from lorakit.models.quantised import quantised_weight
from lorakit.ops.derivatives import is_transformed


class RowFactors:
    """The factors of the modules of one model: one vector for each, as long as the module lives."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[LoRALayer, tuple[list[Any], Tensor]] = WeakKeyDictionary()

    def adapt(
        self, module: LoRALayer, layer: nn.Module, x: Tensor, output: Tensor, weight: float
    ) -> Tensor:
        """Return ``module.adapt(...)``, without computing factors that are known."""
        state = None if torch.is_grad_enabled() or is_transformed(x) else _state(module, layer)
        if state is None:
            return module.adapt(layer, x, output, weight)
        known = self._known.get(module)
        if known is None or known[0] != state:
            # The state was read before the factors: a concurrent change then invalidates them in the next call.
            known = self._known[module] = state, module.row_factors(layer)
        return module.adapt_rows(layer, x, output, known[1])


def _state(module: LoRALayer, layer: nn.Module) -> list[Any] | None:
    """Return a list that changes with what the factors depend on; None if a change could go unnoticed."""
    W = getattr(layer, module.form.weight_name)
    quantised = quantised_weight(layer, W)
    own = (module.lora_A, module.lora_B, module.magnitude, module.initial_A, module.initial_B)
    plain = [tensor for tensor in own if tensor is not None]
    plain += [W] if quantised is None else []
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in plain):
        return None
    tensors = plain if quantised is None else [*plain, *quantised.tensors]
    if any(t.is_inference() for t in tensors):  # without a count of versions
        return None
    return [
        optimizer_steps(),
        module.scaling,
        # A weak reference to a storage keeps no memory, and equals no reference to a later storage.
        *(
            (StorageWeakRef(t.untyped_storage()), t.data_ptr(), t.stride(), t._version)
            for t in tensors
        ),
    ]
