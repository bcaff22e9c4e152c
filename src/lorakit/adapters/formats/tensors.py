"""Read untrusted tensor files, safetensors or PyTorch's pickles, without running their code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lorakit import storage
from lorakit.errors import AdapterFileError, is_momentary
from lorakit.storage.tensors import read_safetensors

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".bin", ".pt", ".pth")


def read_tensors(path: Path, section: str | None = None) -> dict[str, Tensor]:
    """Read a file of named tensors by its suffix; a pickle keeps its order, safetensors are sorted by name.

    Args:
        path: The file.
        section: The key in a pickle under which the tensors may be.

    Raises:
        AdapterFileError: The file cannot be read, would run code, or holds anything but named dense tensors.
    """
    if path.suffix == SAFETENSORS:
        return dict(sorted(read_safetensors(path).items()))  # their order changes with each read
    storage.regular_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and isinstance(content.get(section), dict):
            content = content[section]
        return _named(content)
    except Exception as wrong:  # untrusted bytes: any part of the parser can fail
        if is_momentary(wrong):
            raise
        # `from None` hides PyTorch's message, which recommends weights_only=False.
        reason = (
            wrong
            if isinstance(wrong, AdapterFileError)
            else "it is damaged, of another type, or would run code"
        )
        raise AdapterFileError(
            f"'{path}' is no file of named tensors: {reason}. Check the path, download or save the file again, or "
            "convert it to .safetensors with the software that wrote it."
        ) from None


def _named(content: object) -> dict[str, Tensor]:
    """Return the content of a pickle, if it is a dictionary of dense tensors."""
    if not isinstance(content, dict):
        raise AdapterFileError(f"it holds a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterFileError(f"it holds a {type(value).__name__} under {key!r:.80}")
        # A pickle can declare a tensor of any size over few bytes, and every copy would allocate it.
        is_dense = (
            value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
        )
        if not is_dense or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise AdapterFileError(f"'{key}' is not dense")
    return {key: value.detach() for key, value in content.items()}
