"""Untrusted tensor files: damaged, with false headers, or with code."""

from __future__ import annotations

import json
import os
import pickle
import traceback
from pathlib import Path

import pytest
import torch
from at_rest import adapter, linear, numbers

from lorakit.adapters import formats
from lorakit.errors import AdapterFileError, RunFolderError
from lorakit.storage.tensors import read_safetensors


def as_safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        as_safetensors({}, length=2**63),
        as_safetensors({}, length=10**9),
        as_safetensors(b"{" * 1000),
        as_safetensors(b"[]"),
        as_safetensors({"a": entry()}),
        as_safetensors({"a": entry()}, b"\0" * 7),
        as_safetensors({"a": entry()}, b"\0" * 9),
        as_safetensors({"a": entry(shape=(2**62, 2**62))}, b"\0" * 8),
        as_safetensors({"a": entry(shape=(-2,))}, b"\0" * 8),
        as_safetensors({"a": entry(offsets=(8, 0))}, b"\0" * 8),
        as_safetensors({"a": entry(), "b": entry()}, b"\0" * 8),
        as_safetensors({"a": entry(dtype="X99")}, b"\0" * 8),
        as_safetensors({"a": {"dtype": "F32"}}),
        as_safetensors({"a": 3}),
        as_safetensors(b'{"a":' + json.dumps(entry()).encode() + b"," * 9 + b"}", b"\0" * 8),
        b"PK\x03\x04 a zip",
        b"\x80\x02}q\x00.",
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match="cannot be read as safetensors") as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    with pytest.raises(RunFolderError, match="cannot be read as safetensors"):
        read_safetensors(path, RunFolderError)


# --- pickles --------------------------------------------------------------------------------------


class Attack:
    """A pickle that creates a folder when an ordinary unpickler opens it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture(params=["loralib", "peft"])
def pickle_file(request, tmp_path: Path) -> tuple[Path, Path]:
    """The path of a pickle to write, and the path to read it by: itself, or a folder of PEFT."""
    if request.param == "loralib":
        return tmp_path / "loralib.bin", tmp_path / "loralib.bin"
    folder = tmp_path / "adapter"
    formats.write(adapter({"a": linear()}), folder)
    for file in ("lorakit.json", "adapter_model.safetensors"):
        (folder / file).unlink()
    return folder / "adapter_model.bin", folder


def refused(path: Path) -> str:
    """Return the message with which a file is refused; it must not recommend to trust the file."""
    with pytest.raises(AdapterFileError) as caught:
        formats.read(path, alpha=1)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_with_code_runs_none(tmp_path, pickle_file, as_zip):
    file, path = pickle_file
    trace = tmp_path / "trace"
    state = {"base_model.model.a.lora_A.weight": numbers(2, 6), "x": Attack(trace)}
    torch.save(state, file, _use_new_zipfile_serialization=as_zip)
    message = refused(path)
    assert str(file) in message
    assert "would run code" in message
    assert "convert it to .safetensors with the software that wrote it" in message
    assert not trace.exists()
    pickle.loads(pickle.dumps(Attack(trace)))  # the attack works on a reader that trusts the file
    assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"\x80\x02",
        pickle.dumps({"a": 1}),
        pickle.dumps([numbers(1).numpy()]),
        b"PK\x05\x06" + b"\0" * 18,
        b"(" * 10_000,
    ],
)
def test_what_is_no_pytorch_file(tmp_path, content):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    assert str(path) in refused(path)


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about these kinds of tensors
@pytest.mark.parametrize(
    "make",
    [
        lambda: numbers(2, 6).to("meta"),
        lambda: torch.nested.nested_tensor([numbers(2), numbers(3)]),
        lambda: numbers(2, 6).to_sparse(),
        lambda: torch.quantize_per_tensor(numbers(2, 6), 0.1, 0, torch.qint8),
        lambda: torch.zeros(1).expand(32_768, 32_768),  # 4 GB over 4 bytes
        lambda: bytearray(8),
        lambda: 3,
    ],
    ids=["meta", "nested", "sparse", "quantised", "expanded", "bytes", "number"],
)
def test_only_dense_tensors_are_read(pickle_file, make):
    file, path = pickle_file
    names = ("a.lora_A", "a.lora_B") if file == path else ("a.lora_A.weight", "a.lora_B.weight")
    torch.save(dict(zip(names, (make(), numbers(8, 2)), strict=True)), file)
    assert file.parent.name in refused(path)


def test_tied_tensors_are_read(tmp_path):
    shared = numbers(300, 2)
    names = {"a.lora_A": numbers(2, 6), "a.lora_B": numbers(8, 2), "x": shared, "y": shared}
    torch.save(names, tmp_path / "file.bin")
    assert formats.read(tmp_path / "file.bin", alpha=1).layers


# --- a system without memory or file handles ------------------------------------------------------
