"""Read untrusted tensor files, safetensors or PyTorch's pickles, without running their code."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lorakit.adapters.formats.pickles import check_storage, read_pickle
from lorakit.errors import AdapterFileError
from lorakit.storage.tensors import read_safetensors

SAFETENSORS = ".safetensors"


def read_tensors(path: Path, section: str | None = None) -> dict[str, Tensor]:
    """Read a file of named tensors by its suffix; a pickle keeps its order, safetensors are sorted by name.

    Args:
        path: The file.
        section: The key in a pickle under which the tensors may be.

    Raises:
        AdapterFileError: The file cannot be read, or holds anything but named tensors.
    """
    if path.suffix == SAFETENSORS:
        return dict(sorted(read_safetensors(path).items()))  # their order changes with each read
    content = read_pickle(path)
    # `dict.get` and `dict.items`: a pickle can put attributes in the place of an OrderedDict's methods.
    if isinstance(content, dict) and isinstance(inner := dict.get(content, section), dict):
        content = inner
    if not isinstance(content, dict):
        raise AdapterFileError(
            f"'{path}' holds a {type(content).__name__}; a dictionary of tensors was expected."
        )
    tensors = {}
    for key, value in dict.items(content):
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterFileError(
                f"'{path}' holds a {type(value).__name__} under {key!r}; a dictionary of names and "
                "tensors was expected."
            )
        tensors[key] = value.detach()
    check_storage(path, tensors)
    return tensors
