"""Safetensors files. `lorakit.storage` does not re-export this module, because it imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from lorakit.errors import AdapterFileError, LorakitError, is_momentary
from lorakit.storage.paths import reading

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
    with reading(path, error):
        try:
            # Copies: a later change of a mapped file would change its tensors, and unaligned tensors may round
            # their products differently.
            if mapped:
                with safe_open(path, framework="pt") as file:
                    return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            tensors = load(path.read_bytes())
            return {name: tensors.pop(name).clone() for name in list(tensors)}
        except OSError:
            raise
        except Exception as wrong:  # damaged bytes can make any part of the parser raise
            if is_momentary(wrong):
                raise
            raise error(
                f"'{path}' cannot be read as safetensors: {wrong}. The file is truncated, damaged or of "
                "another type; download or save it again."
            ) from wrong


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
        with suppress(OSError):  # a mounted share has modes of its own
            path.chmod(probe.stat().st_mode)
        probe.unlink()
