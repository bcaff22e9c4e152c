"""Read untrusted tensor files, safetensors or PyTorch's pickles, without running their code."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import storage
from lorakit.errors import AdapterFileError
from lorakit.storage.tensors import read_safetensors

SAFETENSORS = ".safetensors"


def _check_archive(path: Path) -> None:
    """Verify the checksum of each part of a zip file, which `torch.load` does not do.

    Raises:
        AdapterFileError: A part is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise AdapterFileError(
            f"'{path}' is damaged: {error}. Download or save it again."
        ) from error
    if damaged is not None:
        raise AdapterFileError(
            f"'{path}' is damaged: the checksum of '{damaged}' inside it does not match. Download or save it again."
        )


def read_pickle(path: Path) -> Any:
    """Read a file of `torch.save` that contains only tensors and plain containers.

    Raises:
        AdapterFileError: The file is missing or damaged, or would run code.
    """
    storage.regular_file(path)
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about kinds of files that are rejected below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # untrusted bytes: any part of the parser can fail
        # Its message is hidden, since it recommends weights_only=False.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code is not None:
            raise AdapterFileError(
                f"'{path}' would run code ({code[1].rstrip('.')}) when it is opened. Tensor files need no "
                "code, so it was not opened. Ask its author for a .safetensors file."
            ) from error
        raise AdapterFileError(
            f"'{path}' is not a tensor file of safetensors or PyTorch, or it is truncated or damaged. Check "
            "the path, or download or save it again."
        ) from error


def read_tensors(path: Path, section: str | None = None) -> dict[str, Tensor]:
    """Read a file of named tensors by its suffix.

    Args:
        path: The file.
        section: The key in a pickle under which the tensors may be.

    Raises:
        AdapterFileError: The file cannot be read, or holds anything but named tensors.
    """
    if path.suffix == SAFETENSORS:
        return read_safetensors(path)
    content = read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get(section), Mapping):
        content = content[section]
    if not isinstance(content, Mapping):
        raise AdapterFileError(
            f"'{path}' holds a {type(content).__name__}; a dictionary of tensors was expected."
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterFileError(
                f"'{path}' holds a {type(value).__name__} under {key!r}; a dictionary of names and "
                "tensors was expected."
            )
    return dict(content)
