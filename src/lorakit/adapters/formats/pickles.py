"""Read untrusted files of `torch.save` without running their code, in memory and time bounded by their size.

Everything that a file declares is compared with its size before `torch.load` reads it. `torch.load` itself trusts the
declared sizes, and accepts kinds of tensors that are invalid or huge in use.
"""

from __future__ import annotations

import io
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lorakit import storage
from lorakit.errors import AdapterFileError, is_momentary
from lorakit.formatting import size

_ZIP = b"PK\3\4"
"""The first bytes by which `torch.load` recognises a zip file."""
_LEGACY_PICKLES = 5
"""Pickles at the start of a file from before PyTorch 1.6: magic number, version, system, content, storage keys."""
_MAX_INSTRUCTIONS = 5_000_000
"""Some 15 per tensor are usual; this many take seconds."""
_MAX_SHARING = 4
"""A storage may have several names (tied weights), but all tensors together at most this multiple of the file."""

_PLAIN = re.compile(
    r"collections\.OrderedDict|collections\.Counter|_codecs\.encode|(builtins|__builtin__)\.(set|complex)"
    r"|torch\.(Size|device|bool|(?!Complex)\w+Storage|(bfloat|float|int|uint)\w+)"
    r"|torch\.storage\.(Typed|Untyped)Storage|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
)
"""Globals that the pickle of dense tensors may reference."""
_OTHER_KINDS = {
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no numbers",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch._utils._rebuild_parameter_with_state": "a parameter with attributes",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a subclass or with attributes",
    "builtins.bytearray": "a bytearray",  # bytearray(10**10) would fill the memory
    "__builtin__.bytearray": "a bytearray",
}
"""Globals that `torch.load` accepts and lorakit rejects, with the reason."""
_WARNINGS = threading.Lock()
"""Held while the warnings of the process are silent, so that two threads do not restore each other's silence."""
_CONVERT = "Convert the file to .safetensors with the software that wrote it, or ask its author to."


def read_pickle(path: Path) -> Any:
    """Read a file of `torch.save` that contains only dense tensors and plain containers.

    Raises:
        AdapterFileError: The file is missing or damaged, would run code, holds other kinds of tensors, or declares
            more than it holds.
    """
    storage.regular_file(path)
    try:
        for program in _programs(path):
            _check_program(path, program)
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about kinds of files that are rejected below
            return torch.load(path, map_location="cpu", weights_only=True)
    except AdapterFileError:
        raise
    except Exception as wrong:  # untrusted bytes: any part of the parser can fail
        if is_momentary(wrong):
            raise
        # `from None` hides PyTorch's message, which recommends weights_only=False.
        raise AdapterFileError(
            f"'{path}' is not a tensor file of safetensors or PyTorch, or it is truncated or damaged. Check "
            "the path, or download or save it again."
        ) from None


def check_storage(path: Path, tensors: dict[str, Tensor]) -> None:
    """Compare the declared sizes of tensors with the bytes that hold them.

    Raises:
        AdapterFileError: A tensor is larger than its storage (an expanded tensor), or all are larger than the file.
    """
    total, available = 0, path.stat().st_size
    for name, tensor in tensors.items():
        declared, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if declared > stored:
            raise AdapterFileError(
                f"'{path}' declares '{name}' with {size(declared)} over a storage of {size(stored)}: its values are "
                f"repeated. {_CONVERT}"
            )
        total += declared
    if total > _MAX_SHARING * available:
        raise AdapterFileError(
            f"'{path}' declares tensors of {size(total)} in a file of {size(available)}: many of them share their "
            f"values. {_CONVERT}"
        )


def _programs(path: Path) -> Iterator[IO[bytes]]:
    """Yield the pickles of a file, after a check of the zip file that holds them."""
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
        if not is_zip:
            file.seek(0)
            # `read` of an open file first allocates the length that a pickle declares, unlike that of a buffer.
            content = io.BytesIO(file.read())
            for _ in range(_LEGACY_PICKLES):
                yield content  # each check leaves the position at the next pickle
            return
    with zipfile.ZipFile(path) as archive:
        _check_archive(path, archive)
        for part in archive.infolist():
            if part.filename.lower().endswith(".pkl"):
                yield io.BytesIO(archive.read(part))


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Check the sizes and checksums of the parts of a zip file, which `torch.load` does not do."""
    parts = archive.infolist()
    if len(set(archive.namelist())) < len(parts):
        raise AdapterFileError(
            f"'{path}' is damaged: parts inside it have the same name. Download or save it again."
        )
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED:
            raise AdapterFileError(
                f"'{path}' was packed by other software than PyTorch: '{part.filename}' inside it is compressed. "
                f"{_CONVERT}"
            )
    declared, available = sum(part.file_size for part in parts), path.stat().st_size
    if declared > available:
        raise AdapterFileError(
            f"'{path}' is damaged: it declares parts of {size(declared)} in a file of {size(available)}. Download or "
            "save it again."
        )
    damaged = archive.testzip()
    if damaged is not None:
        raise AdapterFileError(
            f"'{path}' is damaged: the checksum of '{damaged}' inside it does not match. Download or save it again."
        )


def _check_program(path: Path, program: IO[bytes]) -> None:
    """Check what one pickle would create, without running it."""
    for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
        if count >= _MAX_INSTRUCTIONS:
            raise AdapterFileError(
                f"'{path}' has more than {_MAX_INSTRUCTIONS:,} pickle instructions; a file of tensors needs fewer. "
                f"{_CONVERT}"
            )
        if instruction.name != "GLOBAL":  # the only one that `weights_only` accepts
            continue
        name = str(argument).replace(" ", ".")
        if name in _OTHER_KINDS:
            raise AdapterFileError(
                f"'{path}' holds {_OTHER_KINDS[name]}; only dense tensors can be read. {_CONVERT}"
            )
        if not _PLAIN.fullmatch(name):
            raise AdapterFileError(
                f"'{path}' would run code ({name}) when it is opened. Tensor files need no code, so it was not "
                f"opened. {_CONVERT}"
            )
