"""Files of named tensors, as safetensors. Not among the names of the package, which does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import AdapterFileError, LorakitError
from lorakit.storage.refusals import regular_file


def read_safetensors(path: Path, error: type[LorakitError] = AdapterFileError) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into memory of their own.

    Raises:
        error: The file is missing, truncated, or no safetensors file.
    """
    regular_file(path, error)
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: the library maps the file, and one changed on the disk would change under us.
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except Exception as wrong:  # the bytes are not ours: any part of the parser may trip over them
        raise error(
            f"'{path}' cannot be read as safetensors: {wrong}. The file is truncated, damaged or of "
            "another kind; fetch or save it again."
        ) from wrong


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors; the same tensors give the same bytes."""
    # A file holds each tensor once: two names for the same memory get a copy each.
    seen: set[int] = set()
    prepared: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        prepared[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    path.touch()
    mode = path.stat().st_mode
    save_file(prepared, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library leaves files that only their owner can read
