"""Safetensors files. `lorakit.storage` does not re-export this module, because it imports torch."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from lorakit.errors import AdapterFileError, LorakitError, is_momentary
from lorakit.storage.atomic import copy_mode
from lorakit.storage.refusals import reading, regular_file

_METADATA = {"format": "pt"}


def read_safetensors(
    path: Path, error: type[LorakitError] = AdapterFileError, *, mapped: bool = False
) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    `mapped` copies the tensors out of a memory map, which needs half the memory. Only for files that nothing writes to:
    one that is cut meanwhile ends the process.

    Raises:
        error: The file is missing, truncated, or not a safetensors file; or the process has too many open files.
    """
    regular_file(path, error)
    with reading(path, error):
        try:
            if mapped:
                with safe_open(path, framework="pt") as file:
                    _require_unique_names(path)
                    # Without the copies, a later change of the file would change the tensors.
                    return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            with path.open("rb") as file:
                content = file.read(path.stat().st_size)
            tensors = load(content)
            _require_unique_names(content)
            del content
            # The copies are aligned as other tensors are: products of others may round differently.
            return {name: tensors.pop(name).clone() for name in list(tensors)}
        except Exception as wrong:  # damaged bytes can make any part of the parser raise
            if is_momentary(wrong):
                raise
            raise error(
                f"'{path}' cannot be read as safetensors: {wrong}. The file is truncated, damaged or of "
                "another type; download or save it again."
            ) from wrong


def _require_unique_names(source: Path | bytes) -> None:
    """Reject a header in which a name occurs twice; safetensors reads the last of them without a word."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a name in its header occurs twice")
        return content

    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        # safetensors has validated the length
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to a safetensors file. Equal tensors give equal bytes.

    safetensors writes another file and renames it to `path`: in `atomic_file`, use `safetensors_bytes`, which keeps the
    file and its lock.
    """
    save_file(_separate(tensors), path, metadata=_METADATA)
    use_default_mode(path)


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of the file that `write_safetensors` writes."""
    return save(_separate(tensors), metadata=_METADATA)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by sorted name, on the CPU; safetensors rejects shared memory, so copy all but the first."""
    seen: set[int] = set()
    prepared: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        prepared[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return prepared


def use_default_mode(*paths: Path) -> None:
    """Give safetensors files the mode of any new file; safetensors makes them readable by their owner only."""
    for path in paths:
        probe = path.with_name(f".{path.name}.mode")
        probe.touch()
        copy_mode(probe, path)
        probe.unlink()
