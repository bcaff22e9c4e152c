"""Convert factors to PEFT's form and back, without loss: one full-width pair for each layer.

PEFT computes ``delta W = alpha / r * B A`` on a whole layer. lorakit's other deltas are the same
product with more columns in B and rows in A, some of them zero:

- slices, grouped convolutions and loralib's convolutions: `FactorForm.to_peft`;
- stacked experts: B has another order in the file, `lorakit.adapters.formats.peft.experts`;
- PiSSA's frozen initial factors: ``[B, -B0] [A; A0]``.

Every step only moves numbers or changes their sign, so the inverse is exact to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError
from lorakit.methods.lora.forms import ConvForm, NotExpressibleError, in_each_group


def to_peft(layer: StoredLayer) -> StoredLayer:
    """Return the layer as one full-width pair of factors, with DoRA's magnitudes of all rows.

    alpha grows with the rank of these factors, so that alpha / rank, PEFT's scaling, does not change.

    Raises:
        NotExpressibleError: PEFT's form cannot represent it exactly.
    """
    A, B, B_bias = *_factors(layer), layer.B_bias
    magnitude = _all_magnitudes(layer)
    if magnitude is not None and layer.groups > 1:
        raise NotExpressibleError("PEFT has no DoRA for grouped convolutions and stacked experts.")
    return replace(
        layer,
        kind=ConvForm.kind if A.ndim > 2 else layer.kind,
        A=A,
        B=B,
        alpha=layer.alpha * (layer.form.peft_rank(A) // layer.rank),
        magnitude=magnitude,
        B_bias=B_bias if B_bias is None else layer.form.bias_of_all_rows(B_bias, layer.B),
        slices=(),
        initial_A=None,
        initial_B=None,
        base_norms=None,
        weight_shape=None,
        grouped=False,
    )


def _factors(layer: StoredLayer) -> tuple[Tensor, Tensor]:
    """Return A and B of `to_peft`."""
    A, B = layer.form.to_peft(layer.A, layer.B)
    if layer.initial_A is not None and layer.initial_B is not None:
        A0, B0 = layer.form.to_peft(layer.initial_A, layer.initial_B)
        A, B = in_each_group(A, A0, layer.groups), torch.cat([B, -B0], dim=1)
    return A, B


def peft_rank(layer: StoredLayer) -> int:
    """Return the rank of the layer in PEFT's form."""
    return layer.A.shape[0] * layer.form.taps * (1 if layer.initial_A is None else 2)


def from_peft(
    layer: StoredLayer,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    B_bias: Tensor | None = None,
) -> StoredLayer:
    """Undo `to_peft`, which returned A, B, magnitude and B_bias. `layer` has meta tensors of the original shapes.

    Raises:
        AdapterFileError: The tensors are not of that form.
    """
    trained_A, trained_B, extras = A, B, {}
    if layer.initial_A is not None:
        trained_A, A0 = _separate(A, layer.groups)
        trained_B, B0 = B.chunk(2, dim=1)
        A0, B0 = layer.form.from_peft(A0, -B0)
        extras |= {"initial_A": A0.contiguous(), "initial_B": B0.contiguous()}
    trained_A, trained_B = layer.form.from_peft(trained_A, trained_B)
    if magnitude is not None and layer.slices:
        rows = layer.form.rows()
        # PEFT's form lacks the base's norms of the adapted rows, which are never read.
        extras["base_norms"] = magnitude.index_fill(0, rows, 0)
        magnitude = magnitude[rows]
    if B_bias is not None and layer.slices:
        B_bias = B_bias[layer.form.rows()]
    restored = replace(
        layer,
        A=trained_A.contiguous(),
        B=trained_B.contiguous(),
        magnitude=magnitude,
        B_bias=B_bias,
        **extras,
    )
    same_shapes = (restored.A.shape, restored.B.shape) == (layer.A.shape, layer.B.shape)
    again_A, again_B = _factors(restored)
    same_factors = torch.equal(again_A, A) and torch.equal(again_B, B)
    if not (same_shapes and same_factors):
        raise AdapterFileError(
            "its lora_A and lora_B are not of the form that lorakit.json describes."
        )
    return restored


def _separate(both: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Undo `in_each_group`."""
    A, A0 = both.unflatten(0, (groups, -1)).chunk(2, dim=1)
    return A.flatten(0, 1), A0.flatten(0, 1)


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
