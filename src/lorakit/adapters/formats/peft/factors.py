"""Convert factors to PEFT's form and back, without loss: one full-width pair for each layer.

PEFT computes ``delta W = alpha / r * B A`` on a whole layer. lorakit's other deltas are the same
product with more columns in B and rows in A, some of them zero:

- slices of a fused projection: A unchanged, B's blocks at the rows of their slice;
- PiSSA's frozen initial factors: ``[B, -B0] [A; A0]``;
- a grouped convolution: A with zeros at the input channels of the other groups;
- loralib's convolution, whose delta is ``[B_0 A | B_1 A | ...]`` over the K taps of the kernel's
  height: ``[B_0, B_1, ...]`` times a block-diagonal matrix with K copies of A.

Every step only moves numbers or changes their sign, so the inverse is exact to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError


class NotExpressibleError(AdapterFileError):
    """PEFT's format cannot represent an adapter."""


def to_peft(layer: StoredLayer) -> StoredLayer:
    """Return the layer as one full-width pair of factors, with DoRA's magnitudes of all rows.

    alpha grows with the rank of these factors, so that alpha / rank, PEFT's scaling, does not change.

    Raises:
        NotExpressibleError: PEFT's form cannot represent it exactly.
    """
    A, B = _full_width(layer, layer.A, layer.B)
    if layer.initial_A is not None and layer.initial_B is not None:
        A0, B0 = _full_width(layer, layer.initial_A, layer.initial_B)
        A, B = _interleave(A, A0, layer.groups), torch.cat([B, -B0], dim=1)
    magnitude = _all_magnitudes(layer)
    if magnitude is not None and layer.groups > 1:
        raise NotExpressibleError("PEFT has no DoRA for grouped convolutions.")
    return replace(
        layer,
        kind="conv" if layer.kind == "conv-loralib" else layer.kind,
        A=A,
        B=B,
        alpha=layer.alpha * (A.shape[0] // layer.rank),
        magnitude=magnitude,
        slices=(),
        initial_A=None,
        initial_B=None,
        base_norms=None,
        weight_shape=None,
        grouped=False,
    )


def peft_rank(layer: StoredLayer) -> int:
    """Return the rank of the layer in PEFT's form."""
    taps = layer.kernel_width if layer.kind == "conv-loralib" else 1
    return layer.A.shape[0] * taps * (1 if layer.initial_A is None else 2)


def from_peft(layer: StoredLayer, A: Tensor, B: Tensor, magnitude: Tensor | None) -> StoredLayer:
    """Undo `to_peft`.

    Args:
        layer: The original layer, with tensors on the meta device for their shapes.
        A: lora_A of `to_peft`.
        B: lora_B of `to_peft`.
        magnitude: DoRA's magnitudes of all rows, or None.

    Raises:
        AdapterFileError: The tensors are not of that form.
    """
    trained_A, trained_B, extras = A, B, {}
    if layer.initial_A is not None:
        trained_A, A0 = _separate(A, layer.groups)
        trained_B, B0 = B.chunk(2, dim=1)
        A0, B0 = _stored_width(layer, A0, -B0)
        extras |= {"initial_A": A0.contiguous(), "initial_B": B0.contiguous()}
    trained_A, trained_B = _stored_width(layer, trained_A, trained_B)
    if magnitude is not None and layer.slices:
        rows = layer.rows()
        # PEFT's form lacks the base's norms of the adapted rows, which are never read.
        extras["base_norms"] = magnitude.index_fill(0, rows, 0)
        magnitude = magnitude[rows]
    restored = replace(
        layer, A=trained_A.contiguous(), B=trained_B.contiguous(), magnitude=magnitude, **extras
    )
    same_shapes = (restored.A.shape, restored.B.shape) == (layer.A.shape, layer.B.shape)
    again = to_peft(restored)
    same_factors = torch.equal(again.A, A) and torch.equal(again.B, B)
    if not (same_shapes and same_factors):
        raise AdapterFileError(
            "its lora_A and lora_B are not of the form that lorakit.json describes."
        )
    return restored


def _full_width(layer: StoredLayer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return a pair of the layer's factors (A and B, or A0 and B0) as PEFT's pair for all rows and channels."""
    if layer.slices:
        blocks = torch.block_diag(*B.split([s.total for s in layer.slices]))
        placed = B.new_zeros(layer.slices[0].groups * layer.slices[0].stride, A.shape[0])
        return A, placed.index_copy(0, layer.rows(), blocks)
    if layer.kind == "conv" and layer.groups > 1 and layer.grouped:
        grouped = A.unflatten(0, (layer.groups, -1))
        n_in = A.shape[1]
        wide = A.new_zeros(layer.groups, grouped.shape[1], layer.groups * n_in, *A.shape[2:])
        for group, part in enumerate(grouped):
            wide[group, :, group * n_in : (group + 1) * n_in] = part
        return wide.flatten(0, 1), B
    if layer.kind == "conv-loralib":
        return _loralib_full_width(layer, A, B)
    return A, B


def _stored_width(layer: StoredLayer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `_full_width`: return the pair as `StoredLayer` holds it."""
    if layer.slices:
        blocks = B[layer.rows()].split([s.total for s in layer.slices])
        rank = layer.rank
        return A, torch.cat([b[:, i * rank : (i + 1) * rank] for i, b in enumerate(blocks)])
    if layer.kind == "conv" and layer.groups > 1 and layer.grouped:
        n_in = A.shape[1] // layer.groups
        parts = enumerate(A.unflatten(0, (layer.groups, -1)))
        return torch.cat([part[:, g * n_in : (g + 1) * n_in] for g, part in parts]), B
    if layer.kind == "conv-loralib":
        taps, rank = layer.kernel_width, layer.A.shape[0]
        n_in = layer.A.shape[1] // taps
        first = A[:rank].flatten(1)[:, : n_in * taps]
        return first, B.flatten(1).unflatten(1, (taps, rank)).flatten(0, 1)
    return A, B


def _loralib_full_width(layer: StoredLayer, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return loralib's pair as A (r * K * K, in, *kernel), block-diagonal, and B (out, r * K * K, 1, ...)."""
    if layer.weight_shape is None:
        raise NotExpressibleError(
            "loralib's factors of a convolution do not show its shape. Save the adapter from a live model."
        )
    taps, (n_out, _, *kernel) = layer.kernel_width, layer.weight_shape
    rank, n_in = A.shape[0], A.shape[1] // taps
    if n_in != layer.weight_shape[1]:
        raise NotExpressibleError(
            "loralib's factors of a grouped convolution mix its groups, but PEFT's cannot."
        )
    diagonal = torch.block_diag(*[A] * taps)
    wide = diagonal.view(taps * rank, n_in, *kernel)
    side_by_side = B.unflatten(0, (n_out, taps)).flatten(1)
    return wide, side_by_side.view(n_out, taps * rank, *(1 for _ in kernel))


def _interleave(A: Tensor, A0: Tensor, groups: int) -> Tensor:
    """``[A; A0]`` within each group: a grouped B reads only the channels of its own group."""
    parts = [t.unflatten(0, (groups, -1)) for t in (A, A0)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _separate(both: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Undo `_interleave`."""
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
    return layer.base_norms.index_copy(0, layer.rows(), layer.magnitude)
