"""Strict, independent parsers. A reader of lorakit that accepts a file must agree with them.

Each raises ValueError for a malformed file. They share no code with lorakit, and no library with the reader that they
check, except where a comment says so.
"""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES

# --- JSON -----------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is duplicated")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def strict_json(data: bytes | str) -> Any:
    """Parse JSON without duplicate keys, NaN and infinities. Uses Python's json, as lorakit does."""
    text = data if isinstance(data, str) else data.decode()
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# --- rows -----------------------------------------------------------------------------------------


def strict_jsonl(data: bytes) -> list[dict[str, Any] | None]:
    """Return the object of each line that is not blank, None for a line that is not a JSON object."""
    rows: list[dict[str, Any] | None] = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            value = strict_json(line)
        except ValueError:
            value = None
        rows.append(value if isinstance(value, dict) else None)
    return rows


def strict_csv(data: bytes) -> list[list[str]]:
    """Parse RFC 4180 with a line feed, a carriage return or both after each record; skip empty records."""
    # A later check rejects the row of a surrogate.
    text = data.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    records: list[list[str]] = []
    record: list[str] = []
    place, ended = 0, True
    while place < len(text) or not ended:
        if text[place : place + 1] == '"':
            field, place = _quoted(text, place + 1)
        else:
            match = re.compile(r"[^,\r\n]*").match(text, place)
            assert match is not None
            field, place = match[0], match.end()
        record.append(field)
        ended = text[place : place + 1] != ","
        if ended:
            if record != [""] or text[place - 1 : place] == '"':  # a quoted text can be empty
                records.append(record)
            record = []
            if text[place : place + 1] not in ("", "\r", "\n"):
                raise ValueError("text after a closing quote")
        place += 2 if text[place : place + 2] == "\r\n" else 1
    return records


def _quoted(text: str, place: int) -> tuple[str, int]:
    field = ""
    while True:
        end = text.find('"', place)
        if end < 0:
            raise ValueError("a quote without an end")
        field += text[place:end]
        if text[end + 1 : end + 2] != '"':
            return field, end + 1
        field += '"'
        place = end + 2


# --- tensors --------------------------------------------------------------------------------------

SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def strict_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file; bfloat16 as float32."""
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\xff"))
    if length > len(data) - 8:
        raise ValueError("the header is longer than the file")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    place, tensors = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
        start, stop = entry["data_offsets"]
        if start != place or stop - start != dtype.itemsize * math.prod(entry["shape"]):
            raise ValueError(f"{name} has wrong offsets")
        array = np.frombuffer(body[start:stop], dtype).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        tensors[name], place = array, stop
    if place != len(body):
        raise ValueError("bytes after the last tensor")
    return tensors


# --- GGUF -----------------------------------------------------------------------------------------

GGUF_NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
"""The struct format of each value type of GGUF; type 8 is a string, type 9 an array."""
STRING, ARRAY = 8, 9


class Gguf:
    """The parts of a GGUF file, each of which a mutator can change before `dump`."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0
        if self._raw(4) != b"GGUF":
            raise ValueError("another magic number")
        self.version, tensors, fields = self._number("I"), self._number("Q"), self._number("Q")
        self.fields = [
            [self._string(), kind := self._number("I"), self._value(kind)] for _ in range(fields)
        ]
        self.tensors = [
            [
                self._string(),
                [self._number("Q") for _ in range(self._number("I"))],
                self._number("I"),
                self._number("Q"),
            ]
            for _ in range(tensors)
        ]
        self.alignment = next((v for k, _, v in self.fields if k == b"general.alignment"), 32)
        self._raw(-self._place % self.alignment)
        self.data = data[self._place :]
        self.counts = (0, 0)
        """Added to the numbers of tensors and fields in the header."""

    def dump(self) -> bytes:
        head = struct.pack(
            "<4sIQQ",
            b"GGUF",
            self.version,
            (len(self.tensors) + self.counts[0]) % 2**64,
            (len(self.fields) + self.counts[1]) % 2**64,
        )
        for name, kind, value in self.fields:
            head += self._text(name) + struct.pack("<I", kind) + self._packed(kind, value)
        for name, shape, kind, offset in self.tensors:
            head += self._text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            head += struct.pack("<IQ", kind, offset)
        return head + b"\0" * (-len(head) % self.alignment) + self.data

    def floats(self) -> dict[str, np.ndarray]:
        """Return the tensors of float32, float16 and bfloat16 numbers, as float32."""
        found = {}
        for name, shape, kind, offset in self.tensors:
            if kind not in (0, 1, 30):
                continue
            dtype = np.dtype({0: "<f4", 1: "<f2", 30: "<u2"}[kind])
            raw = self.data[offset : offset + dtype.itemsize * math.prod(shape)]
            array = np.frombuffer(raw, dtype).reshape(shape[::-1])
            if kind == 30:
                array = (array.astype("<u4") << 16).view("<f4")
            found[name.decode()] = array.astype("<f4")
        return found

    def check(self) -> None:
        """Raise ValueError if a name is duplicated, or tensors overlap or end beyond the file."""
        _unique([(k, None) for k, *_ in self.fields])
        _unique([(k, None) for k, *_ in self.tensors])
        place = 0
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        for name, shape, kind, offset in sorted(self.tensors, key=lambda t: t[3]):
            block, size = sizes[kind]
            if offset < place or offset % self.alignment or (shape and shape[0] % block):
                raise ValueError(f"{name!r} overlaps another tensor, or is not aligned")
            place = offset + math.prod(shape) // block * size
        if place > len(self.data):
            raise ValueError("the data is cut off")

    def _raw(self, count: int) -> bytes:
        if not 0 <= count <= len(self._data) - self._place:
            raise ValueError("the header is cut off")
        self._place += count
        return self._data[self._place - count : self._place]

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._raw(struct.calcsize(code)))[0]

    def _string(self) -> bytes:
        return self._raw(self._number("Q"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            of, count = self._number("I"), self._number("Q")
            return [of, [self._value(of) for _ in range(count)]]
        if kind >= len(GGUF_NUMBERS):
            raise ValueError("an unknown type of value")
        return self._number(GGUF_NUMBERS[kind])

    @staticmethod
    def _text(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    def _packed(self, kind: int, value: Any) -> bytes:
        """Return the bytes of a value; bytes under a number's type are written as they are."""
        if kind == STRING and isinstance(value, bytes):
            return self._text(value)
        if kind == ARRAY and isinstance(value, list):
            of, items = value
            return struct.pack("<IQ", of, len(items)) + b"".join(self._packed(of, v) for v in items)
        code = GGUF_NUMBERS[kind] if kind < len(GGUF_NUMBERS) else None
        if code is None or isinstance(value, (bytes, list)):
            return value if isinstance(value, bytes) else b""
        if code in "fd?":
            return struct.pack(f"<{code}", value)
        size = struct.calcsize(code)
        return (int(value) % 256**size).to_bytes(size, "little")
