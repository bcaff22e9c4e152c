"""Untrusted tensor files: damaged, with false headers, or with code."""

from __future__ import annotations

import collections
import errno
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
import warnings
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from at_rest import adapter, linear, numbers
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from lorakit.adapters import formats
from lorakit.adapters.formats import pickles
from lorakit.adapters.formats.pickles import read_pickle
from lorakit.cli import main
from lorakit.errors import AdapterFileError, RunFolderError
from lorakit.storage.tensors import read_safetensors, write_safetensors


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


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.integers(0, 300))
def test_no_bytes_make_it_stumble(tmp_path, junk, place):
    path = tmp_path / "file.safetensors"
    save_file({"a.lora_A": numbers(2, 3), "a.lora_B": numbers(4, 2)}, path)
    whole = path.read_bytes()
    for content in (junk, whole[:place] + junk + whole[place + len(junk) :]):
        path.write_bytes(content)
        try:
            stored = formats.read(path, alpha=1)
        except AdapterFileError:
            continue
        assert stored.layers  # numbers may have changed: a bare file has no checksum


def test_reading_does_not_hold_on_to_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"a": numbers(1000)}, path)
    found = read_safetensors(path)["a"]
    with path.open(
        "r+b"
    ) as file:  # with a memory map, this would change the tensor or crash the process
        file.truncate(0)
    assert torch.equal(found, numbers(1000))


def test_a_file_that_is_cut_while_it_is_read_ends_no_process(tmp_path):
    """A page of a memory map beyond the end of its file is a bus error, which no `except` catches."""
    path = tmp_path / "file.safetensors"
    save_file({"a": numbers(100_000)}, path)
    code = """
import sys
from pathlib import Path
from lorakit.errors import AdapterFileError
from lorakit.storage import tensors
path = Path(sys.argv[1])
original = tensors._require_unique_names
def cut(*arguments):
    original(*arguments)
    with path.open("r+b") as file:
        file.truncate(1000)
tensors._require_unique_names = cut
try:
    tensors.read_safetensors(path)
except AdapterFileError:
    pass
"""
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_names_for_the_same_memory_are_written_apart(tmp_path):
    whole = numbers(6, 4)
    tensors = {"a": whole, "b": whole, "part": whole[2:4], "turned": whole.T, "one": numbers(1)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


# --- pickles --------------------------------------------------------------------------------------


class Attack:
    """A pickle that creates a folder when an ordinary unpickler opens it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_the_attack_works_on_who_trusts_it(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", "loralib.bin"])
def test_a_pickle_with_code_is_not_opened(tmp_path, as_zip, name):
    trace, folder = tmp_path / "trace", tmp_path / "adapter"
    formats.write(adapter({"a": linear()}), folder)
    for file in ("lorakit.json", "adapter_model.safetensors"):
        (folder / file).unlink()
    state = {"base_model.model.a.lora_A.weight": numbers(2, 6), "x": Attack(trace)}
    torch.save(state, folder / name, _use_new_zipfile_serialization=as_zip)
    path = folder if name == "adapter_model.bin" else folder / name
    with pytest.raises(AdapterFileError, match=r"would run code \(\w+\.mkdir\)") as caught:
        formats.read(path, alpha=1)
    assert name in str(caught.value)
    assert ".safetensors" in str(caught.value)
    assert not trace.exists()


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
        b"\x80\x04\x8e" + (2**44).to_bytes(8, "little"),  # a text of 16 TiB
    ],
)
def test_what_is_no_pytorch_file(tmp_path, content):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError) as caught:
        formats.read(path, alpha=1)
    assert str(path) in str(caught.value)


def test_every_truncation_of_a_pytorch_file(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a.lora_A": numbers(2, 6), "a.lora_B": numbers(8, 2)}, buffer)
    data = buffer.getvalue()
    path = tmp_path / "file.bin"
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(AdapterFileError):
            read_pickle(path)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.bin", "w") as archive:
        archive.writestr("../../escape", "x")
    with pytest.raises(AdapterFileError):
        formats.read(tmp_path / "file.bin", alpha=1)
    assert os.listdir(tmp_path) == ["file.bin"]


def saved_pickle(path: Path, tensor: object, **more: object) -> Path:
    torch.save({"a.lora_A": tensor, "a.lora_B": numbers(8, 2), **more}, path)
    return path


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(numbers(2, 6), 0.1, 0, torch.qint8)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([numbers(2), numbers(3)])


def with_an_attribute() -> torch.Tensor:
    tensor = numbers(2, 6)
    tensor.numel = 3  # type: ignore[method-assign]
    return tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["loralib", "peft"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: numbers(2, 6).to("meta"), "a meta tensor"),
        (nested, "a nested tensor"),
        (lambda: numbers(2, 6).to_sparse(), "a sparse tensor"),
        (quantised, "a quantised tensor"),
        (with_an_attribute, "a tensor of a subclass or with attributes"),
        (lambda: bytearray(8), "a bytearray"),
    ],
)
def test_only_dense_tensors_are_read(tmp_path, make, kind, layout):
    path = tmp_path / "file.bin"
    if layout == "peft":
        formats.write(adapter({"a": linear()}), tmp_path / "adapter")
        for file in ("lorakit.json", "adapter_model.safetensors"):
            (tmp_path / "adapter" / file).unlink()
        path = tmp_path / "adapter" / "adapter_model.bin"
    saved_pickle(path, make())
    with pytest.raises(AdapterFileError, match=rf"holds {kind}.*Convert .* .safetensors") as caught:
        formats.read(path.parent if layout == "peft" else path, alpha=1)
    assert path.name in str(caught.value)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("as_zip", [True, False])
def test_an_expanded_tensor_is_not_read(tmp_path, as_zip):
    huge = torch.zeros(1).expand(32_768, 32_768)  # 4 GB over 4 bytes
    path = tmp_path / "file.bin"
    state = {"a.lora_A": huge, "a.lora_B": huge}
    torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    assert path.stat().st_size < 10_000
    with pytest.raises(AdapterFileError, match=r"'a.lora_A'.* 4.29 GB.* storage of 4 bytes"):
        formats.read(path, alpha=1)


def test_many_names_for_one_storage_are_not_read(tmp_path):
    shared = numbers(300, 300)
    names = {f"{i}.lora_A": shared for i in range(9)}
    torch.save(names, tmp_path / "file.bin")
    with pytest.raises(AdapterFileError, match=r"tensors of 3\.24 MB in a file of 36"):
        formats.read(tmp_path / "file.bin", alpha=1)


def test_tied_tensors_are_read(tmp_path):
    shared = numbers(300, 2)
    names = {"a.lora_A": numbers(2, 6), "a.lora_B": numbers(8, 2), "x": shared, "y": shared}
    torch.save(names, tmp_path / "file.bin")
    assert formats.read(tmp_path / "file.bin", alpha=1).layers


def rewritten(
    path: Path, replaced: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write a zip file again with other compression, or some members replaced."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {**members, **(replaced or {})}.items():
            archive.writestr(name, data)
    return path


def test_compressed_parts_are_not_unpacked(tmp_path):
    path = saved_pickle(tmp_path / "file.bin", torch.zeros(2, 1_000_000))
    rewritten(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(AdapterFileError, match=r"'.*data.*' inside it is compressed.*Convert"):
        formats.read(path, alpha=1)


def test_parts_larger_than_the_file(tmp_path):
    path = saved_pickle(tmp_path / "file.bin", numbers(2, 6))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        name = next(i.filename for i in archive.infolist() if i.filename.endswith("data/0"))
    entry = data.rindex(name.encode()) - 46  # in the central directory
    data[entry + 20 : entry + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match=r"parts of 2.15 GB in a file of"):
        formats.read(path, alpha=1)


@pytest.mark.parametrize("as_zip", [True, False])
def test_an_endless_pickle_is_not_read(tmp_path, monkeypatch, as_zip):
    monkeypatch.setattr(pickles, "_MAX_INSTRUCTIONS", 50)
    state = {f"a{i}": i for i in range(100)}
    torch.save(state, tmp_path / "file.bin", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(AdapterFileError, match="has more than 50 pickle instructions"):
        formats.read(tmp_path / "file.bin", alpha=1)


def test_no_advice_to_trust_the_file(tmp_path):
    path = tmp_path / "file.bin"
    torch.save({"a": numbers(2).numpy()}, path)
    with pytest.raises(AdapterFileError) as caught:
        formats.read(path, alpha=1)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert "Convert the file to .safetensors with the software that wrote it" in str(caught.value)


def test_a_dictionary_with_attributes_in_place_of_its_methods(tmp_path):
    content = collections.OrderedDict({"a.lora_A": numbers(2, 6), "a.lora_B": numbers(8, 2)})
    content.itemz = content.ket = content.keyz = 3  # type: ignore[attr-defined]
    torch.save(content, tmp_path / "file.bin")
    with zipfile.ZipFile(tmp_path / "file.bin") as archive:
        program = archive.read("file/data.pkl")
    for name, method in ((b"itemz", b"items"), (b"ket", b"get"), (b"keyz", b"keys")):
        assert name in program
        program = program.replace(name, method)
    path = rewritten(tmp_path / "file.bin", {"file/data.pkl": program})
    assert formats.read(path, alpha=1).layers


# --- a system without memory or file handles ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("folder", "lorakit.storage.tensors.load"),
        ("folder", "lorakit.adapters.formats.lorakit_json._build"),
        ("lora.bin", "torch.load"),
    ],
)
def test_a_sound_file_is_not_called_damaged_when_the_system_lacks_something(
    tmp_path, monkeypatch, capsys, name, reader
):
    path = tmp_path / name
    formats.write(adapter({"a": linear()}), tmp_path / "folder")
    formats.write_loralib(formats.read(tmp_path / "folder"), tmp_path / "lora.bin")
    short: Exception

    def fail(*_, **__):
        raise short

    monkeypatch.setattr(reader, fail)
    alpha = 3 if name == "lora.bin" else None
    for short in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(short)):
            formats.read(path, alpha=alpha)
    short = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    options = [] if alpha is None else ["--alpha", "3"]
    assert main(["convert", str(path), str(tmp_path / "out"), *options]) == 1
    assert "Out of memory. Close other programs" in capsys.readouterr().err
    short = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with pytest.raises(AdapterFileError, match="cannot be read: Too many open files"):
        formats.read(path, alpha=alpha)


def test_names_with_a_null_byte():
    with pytest.raises(AdapterFileError, match="does not exist"):
        formats.read("a\0b")


def test_two_threads_leave_the_warnings_of_the_process(tmp_path: Path, monkeypatch) -> None:
    """Without a lock, the second to end restores the silence that the first began."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.bin")
    load, first, second, done = torch.load, *(threading.Event() for _ in range(3))

    def overlapping(*args, **options):
        is_first = not first.is_set()
        (first if is_first else second).set()
        (second if is_first else done).wait(0.2)
        return load(*args, **options)

    def read() -> None:
        read_pickle(tmp_path / "a.bin")
        done.set()

    def read_later() -> None:
        first.wait(60)
        read_pickle(tmp_path / "a.bin")

    monkeypatch.setattr(torch, "load", overlapping)
    with warnings.catch_warnings():  # restores them for other tests
        before = [*warnings.filters]
        threads = [threading.Thread(target=target) for target in (read, read_later)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before
