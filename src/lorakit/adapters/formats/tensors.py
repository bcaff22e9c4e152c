"""Files of tensors from elsewhere: safetensors, and PyTorch's pickles, read without running their code."""

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
    """Hold each part of a zip file against its own checksum, which `torch.load` does not do.

    Raises:
        AdapterFileError: A part was changed.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise AdapterFileError(f"'{path}' is damaged: {error}. Fetch or save it again.") from error
    if damaged is not None:
        raise AdapterFileError(
            f"'{path}' is damaged: the checksum of '{damaged}' inside it is another. Fetch or save it again."
        )


def read_pickle(path: Path) -> Any:
    """Read what `torch.save` wrote, tensors and plain containers only.

    Raises:
        AdapterFileError: The file is missing or damaged, or asks to run code.
    """
    storage.regular_file(path)
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of files that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes are not ours: any part of the parser may trip over them
        # Its message is not passed on: it advises to open the file with weights_only=False.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted is not None:
            raise AdapterFileError(
                f"'{path}' asks to run code ({wanted[1].rstrip('.')}) when it is opened. Files of tensors "
                "need none, so it was not opened. Ask its author for a .safetensors file."
            ) from error
        raise AdapterFileError(
            f"'{path}' is no file of tensors, neither safetensors nor PyTorch's, or it is truncated or damaged. "
            "Check the path, or fetch or save it again."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors by its suffix.

    Raises:
        AdapterFileError: The file cannot be read, or holds something else.
    """
    if path.suffix == SAFETENSORS:
        return read_safetensors(path)
    return as_tensors(read_pickle(path), path)


def as_tensors(found: Any, path: Path) -> dict[str, Tensor]:
    """Check that what a pickle held is a mapping of names to tensors.

    Raises:
        AdapterFileError: It is something else.
    """
    if not isinstance(found, Mapping):
        raise AdapterFileError(
            f"'{path}' holds a {type(found).__name__}; a dictionary of tensors was expected."
        )
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterFileError(
                f"'{path}' holds a {type(value).__name__} under {key!r}; a dictionary of names and "
                "tensors was expected."
            )
    return dict(found)
