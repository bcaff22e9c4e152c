"""Convert factors to PEFT's form, without loss: one full-width pair for each layer.

PEFT computes ``delta W = alpha / r * B A`` on a whole layer. lorakit's other deltas are the same
product with more columns in B and rows in A, some of them zero:

- slices and grouped convolutions: `FactorForm.to_peft`;
- stacked experts: B has another order in the file, `lorakit.adapters.formats.peft.experts`;
- PiSSA's frozen initial factors: ``[B, -B0] [A; A0]``.

Every step only moves numbers or changes their sign.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.methods.lora.forms import NotExpressibleError, in_each_group


def to_peft(layer: StoredLayer) -> StoredLayer:
    """Return the layer as one full-width pair of factors, with DoRA's magnitudes of all rows.

    alpha grows with the rank of these factors, so that alpha / rank, PEFT's scaling, does not change. A tensor whose
    form is the same stays the same object.

    Raises:
        NotExpressibleError: PEFT's form cannot represent it exactly.
    """
    A, B = layer.form.to_peft(layer.A, layer.B)
    if layer.initial_A is not None and layer.initial_B is not None:
        A0, B0 = layer.form.to_peft(layer.initial_A, layer.initial_B)
        A, B = in_each_group(A, A0, layer.groups), torch.cat([B, -B0], dim=1)
    magnitude, B_bias = _all_magnitudes(layer), layer.B_bias
    if magnitude is not None and layer.groups > 1:
        raise NotExpressibleError("PEFT has no DoRA for grouped convolutions and stacked experts.")
    return replace(
        layer,
        A=A,
        B=B,
        alpha=layer.alpha * (layer.form.peft_rank(A) // layer.rank),
        magnitude=magnitude,
        B_bias=B_bias if B_bias is None else layer.form.bias_of_all_rows(B_bias, layer.B),
        slices=(),
        initial_A=None,
        initial_B=None,
        base_norms=None,
        grouped=False,
    )


def _all_magnitudes(layer: StoredLayer) -> Tensor | None:
    """Return DoRA's magnitudes of all rows: PEFT normalises every row, so the others get their base norm."""
    if layer.magnitude is None or not layer.slices:
        return layer.magnitude
    if layer.base_norms is None:
        raise NotExpressibleError(
            "PEFT's form of DoRA on slices of a fused projection needs the norms of the base's other rows. "
            "Save the adapter from a live model."
        )
    rows = layer.form.rows(layer.base_norms.device)
    return layer.base_norms.index_copy(0, rows, layer.magnitude)
