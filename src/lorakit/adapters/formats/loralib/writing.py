"""Write loralib files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lorakit import storage
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer, located
from lorakit.adapters.formats.tensors import SAFETENSORS
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.methods.lora.forms import in_each_group
from lorakit.storage.tensors import safetensors_bytes

SUFFIXES = (SAFETENSORS, ".bin", ".pt", ".pth")
"""Suffixes of loralib files."""


def write_loralib(stored: StoredAdapter, path: str | Path) -> tuple[float, list[int]]:
    """Write one file for loralib's ``model.load_state_dict(..., strict=False)``.

    Args:
        stored: The adapter; one alpha must give the scaling of all layers, since the file records none.
        path: A ``.safetensors`` file; or ``.bin``, ``.pt``, ``.pth`` for code that uses `torch.load`
            (a pickle of plain tensors, which loads with ``weights_only=True``).

    Returns:
        The `lora_alpha` that a reader must set, and the different ranks r of the layers. They differ from the adapter's
        where loralib's scaling alpha / r or its rank does: with rsLoRA and PiSSA.

    Raises:
        AdapterFileError: loralib cannot represent the adapter, or it has `base_copies`.
        ConfigurationError: The suffix of `path` is not one of these.
        RunFolderError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigurationError(
            f"'{path}' must end in .safetensors, .bin, .pt or .pth, which determines the kind of file."
        )
    if not stored.layers or stored.modules:
        raise AdapterFileError(
            f"loralib has no method {type(stored.method).__name__}. Keep the adapter's folder."
        )
    stored.require_no_base_copies()
    state: dict[str, Tensor] = {}
    alphas, ranks = set(), set()
    for place, layer in stored.layers.items():
        with located(f"'{place}'"):
            A, B, rank = _to_loralib(layer)
        alphas.add(layer.alpha if layer.alpha / rank == layer.scaling else layer.scaling * rank)
        ranks.add(rank)
        state |= {f"{place}.lora_A": A, f"{place}.lora_B": B}
    if len(alphas) > 1:
        raise AdapterFileError(
            "a loralib file has one alpha for all layers, but these layers need "
            f"{', '.join(f'{alpha:g}' for alpha in sorted(alphas))}. Keep the adapter's folder."
        )
    state.update(stored.trained)
    with storage.atomic_file(path) as temporary:
        if path.suffix == SAFETENSORS:
            temporary.write_bytes(safetensors_bytes(state))
        else:
            with temporary.open("wb") as file:
                torch.save({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return alphas.pop(), sorted(ranks)


def _to_loralib(layer: StoredLayer) -> tuple[Tensor, Tensor, int]:
    """Return A, B and the rank of the equivalent loralib layer."""
    if layer.magnitude is not None:
        raise AdapterFileError("loralib has no DoRA. Keep the adapter's folder.")
    if layer.B_bias is not None:
        raise AdapterFileError("loralib has no bias of B (lora_bias). Keep the adapter's folder.")
    if layer.tied_head is not None:
        raise AdapterFileError("loralib has no tied head (tie_head). Keep the adapter's folder.")
    A, B = layer.form.to_loralib(layer.A, layer.B)
    _check_slices(layer)
    if layer.initial_A is None or layer.initial_B is None:
        return A, B, layer.rank
    # Subtract PiSSA's initial factors, slice by slice, at twice the rank.
    A0, B0 = layer.form.to_loralib(layer.initial_A, layer.initial_B)
    slices = max(1, len(layer.slices))
    return in_each_group(A, A0, slices), torch.cat([B, -B0], dim=1), 2 * layer.rank


def _check_slices(layer: StoredLayer) -> None:
    for piece in layer.slices:
        equal = (
            piece.groups == 1 and not piece.offset % piece.width and not piece.stride % piece.width
        )
        if not equal or piece.width != layer.slices[0].width:
            raise AdapterFileError(
                "loralib supports only slices of equal width, one after the other."
            )
    offsets = [piece.offset for piece in layer.slices]
    if offsets != sorted(offsets):
        raise AdapterFileError("loralib supports only slices in the order of their rows.")
