"""Read and validate the header of a GGUF file: its settings and its table of tensors.

The packages gguf and transformers trust the header: they read garbage where it is wrong, or loop for hours over a count
that the file cannot hold. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.errors import BaseModelError
from lorakit.formatting import size

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
"""The types of a setting with a fixed size, as `struct` formats."""
_STRING, _ARRAY = 8, 9
_SMALLEST_SETTING = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8
_MAX_DIMENSIONS = 4
_MAX_NAME = 1024
_SIZES = ("embedding_length", "feed_forward_length", "vocab_size")
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length")
"""Settings of every language model. transformers would take a default for a missing one."""


@dataclass(frozen=True)
class TensorEntry:
    """One line of the table of tensors."""

    name: str
    shape: tuple[int, ...]
    """In the order of the file: the length of a row comes first."""
    kind: int
    """A `gguf.GGMLQuantizationType`."""
    start: int
    """Position in the file in bytes."""
    bytes: int

    @property
    def elements(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A validated header."""

    settings: dict[str, Any]
    """Numbers and texts by name; an array is None."""
    tensors: tuple[TensorEntry, ...]


def read_float32(path: Path, tensor: TensorEntry) -> np.ndarray:
    """Read a tensor of kind F32, as one dimension."""
    return np.fromfile(path, "<f4", tensor.elements, offset=tensor.start)


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        BaseModelError: The file is not a GGUF file, or its header cannot be true: a count or length that the file
            cannot hold, a duplicate name, or a tensor that is unaligned, outside the file or overlaps another. Or
            the file is one part of a split model.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(_Cursor(data))
            _require_whole(path, header.settings)
            _check_sizes(header.settings, header.tensors)
            return header
    except ValueError as wrong:  # also of mmap, for an empty file
        raise BaseModelError(
            f"'{path}' is damaged, or of a kind that lorakit cannot read: {wrong}. If it was copied or downloaded, "
            "copy or download it again."
        ) from None


class _Cursor:
    """Read values from the bytes of a file, never past their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def skip(self, count: int, what: str) -> int:
        """Skip some bytes and return the position of the first."""
        if count > self.left:
            raise ValueError(f"{what} ends after the end of the file")
        start = self.position
        self.position += count
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        start = self.skip(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8 text") from None

    def count(self, smallest: int, what: str) -> int:
        """Read a number of items of at least this many bytes each."""
        count = self.number("Q", what)
        if count * smallest > self.left:
            raise ValueError(f"{what} is {count:,}, more than the file can hold")
        return count


def _parse(cursor: _Cursor) -> Header:
    if cursor.data[:4] != b"GGUF":
        raise ValueError("it does not start with the word GGUF")
    cursor.skip(4, "the header")
    if (version := cursor.number("I", "the header")) not in _VERSIONS:
        raise ValueError(f"its GGUF version is {version}; 2 and 3 can be read")
    tensor_count = cursor.count(_SMALLEST_TENSOR, "the number of tensors")
    settings: dict[str, Any] = {}
    for _ in range(cursor.count(_SMALLEST_SETTING, "the number of settings")):
        name = cursor.text("the name of a setting")
        if name in settings:
            raise ValueError(f"the setting '{name}' is duplicated")
        settings[name] = _value(cursor, cursor.number("I", "a setting"), f"the setting '{name}'")
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}; a power of two was expected")
    entries = [_entry(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.position // alignment) * alignment  # rounded up
    return Header(settings, _placed(entries, data_start, alignment, len(cursor.data)))


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    """Read a setting; return None for an array."""
    if kind in _SCALARS:
        value = cursor.number(_SCALARS[kind], what)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{what} is {value}; a finite number was expected")
        return value
    if kind == _STRING:
        return cursor.text(what)
    if kind != _ARRAY:
        raise ValueError(f"{what} has the unknown type {kind}")
    of = cursor.number("I", what)
    if of in _SCALARS:
        width = struct.calcsize(_SCALARS[of])
        cursor.skip(width * cursor.count(width, f"the length of {what}"), what)
    elif of == _STRING:
        for _ in range(cursor.count(8, f"the length of {what}")):
            cursor.skip(cursor.number("Q", what), what)
    else:
        raise ValueError(f"{what} is an array of type {of}, which cannot be read")
    return None


def _entry(cursor: _Cursor) -> TensorEntry:
    """Read a line of the table; `start` is relative to the first tensor."""
    sizes = _block_sizes()
    name = cursor.text("the name of a tensor")
    if not 0 < len(name) <= _MAX_NAME:
        raise ValueError(f"the name of a tensor has {len(name):,} characters")
    what = f"the entry of tensor '{name}'"
    dimensions = cursor.number("I", what)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor '{name}' has {dimensions:,} dimensions; 1 to 4 were expected")
    shape = tuple(cursor.number("Q", what) for _ in range(dimensions))
    kind, offset = cursor.number("I", what), cursor.number("Q", what)
    if kind not in sizes:
        raise ValueError(f"tensor '{name}' has the unknown type {kind}")
    block, block_bytes = sizes[kind]
    if 0 in shape or shape[0] % block:
        raise ValueError(
            f"tensor '{name}' has shape {shape}; its type needs rows of a multiple of {block}"
        )
    return TensorEntry(name, shape, kind, offset, math.prod(shape) // block * block_bytes)


@functools.cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """Return the weights and the bytes of a block, by the type of a tensor."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): value for kind, value in GGML_QUANT_SIZES.items()}


def _placed(
    entries: list[TensorEntry], data_start: int, alignment: int, length: int
) -> tuple[TensorEntry, ...]:
    """Return the entries with their positions in the file, in its order."""
    placed: dict[str, TensorEntry] = {}
    end = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.name)):
        name, start = entry.name, data_start + entry.start
        if name in placed:
            raise ValueError(f"tensor '{name}' is duplicated")
        if entry.start % alignment:
            raise ValueError(
                f"tensor '{name}' is not aligned: {entry.start:,} is no multiple of {alignment}"
            )
        if start + entry.bytes > length:
            raise ValueError(
                f"tensor '{name}' of shape {entry.shape} takes {size(entry.bytes)} and ends after the end of the file"
            )
        if start < end:
            other = list(placed)[-1]
            raise ValueError(f"tensor '{name}' overlaps tensor '{other}'")
        placed[name] = TensorEntry(name, entry.shape, entry.kind, start, entry.bytes)
        end = start + entry.bytes
    return tuple(placed.values())


def _require_whole(path: Path, settings: dict[str, Any]) -> None:
    """Reject a part of a split model: each part has some of the tensors, and only the first has the settings."""
    parts = settings.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise BaseModelError(
            f"'{path}' is one of {parts} parts of a model. Join them with: llama-gguf-split --merge FIRST_PART "
            "MODEL.gguf, and name MODEL.gguf; or name the original model."
        )


def _check_sizes(settings: dict[str, Any], tensors: tuple[TensorEntry, ...]) -> None:
    """Reject a number of layers or a width that no tensor has, before a model of that size is built."""
    architecture = settings.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("it does not name its architecture (general.architecture)")
    largest = max((max(entry.shape) for entry in tensors), default=0)
    limits = {"block_count": len(tensors), **dict.fromkeys(_SIZES, largest)}
    required = [*_REQUIRED, "attention.head_count"]
    if architecture == "llama":
        required.append("attention.layer_norm_rms_epsilon")
    for name in required:
        if f"{architecture}.{name}" not in settings:
            raise ValueError(f"the setting '{architecture}.{name}' is missing")
    for name, limit in limits.items():
        value = settings.get(f"{architecture}.{name}")
        if isinstance(value, int) and value > limit:
            raise ValueError(
                f"the setting '{architecture}.{name}' is {value:,}, but its tensors allow at most {limit:,}"
            )
