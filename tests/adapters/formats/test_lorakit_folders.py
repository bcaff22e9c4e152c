"""lorakit folders: round trips are exact to the bit, and all damage is detected."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from at_rest import (
    adapter,
    assert_equal,
    contiguous,
    convolution,
    embedding,
    experts,
    fused,
    interleaved,
    linear,
    numbers,
    same_bits,
    with_dora,
    with_start,
)

import lorakit
from lorakit import storage
from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.errors import AdapterFileError, RunFolderError

PROVENANCE = {"seed": 3, "scores": {"loss": 1.25, "bleu": None}, "data": {"train": {"source": "é"}}}

ADAPTERS: dict[str, StoredAdapter] = {
    "plain": adapter({"a.0.q": linear(), "a.1.q": linear()}, provenance=PROVENANCE),
    "ranks": adapter({"a": linear(rank=2), "b": linear(rank=3), "c": linear(alpha=7.3)}),
    "rslora": adapter({"a": linear(scaling=3 / 2**0.5)}, settings={"scaling": "rslora"}),
    "fused": adapter({"a": fused(*contiguous(4, 0, 2)), "b": fused(*interleaved(2, 3, 1))}),
    "fused-dora": adapter({"a": with_dora(fused(*interleaved(2, 3, 0, 2))), "b": with_dora(linear())}),
    "pissa": adapter({"a": with_start(linear()), "b": with_start(fused(*contiguous(4, 1)))}),
    "embedding": adapter({"a": embedding(), "b": embedding(tied_head="lm_head")}),
    "conv": adapter({"a": convolution(), "b": convolution(rank=4, groups=2), "c": linear()}),
    "attention": adapter(
        {"m": fused(*contiguous(4, 0, 2), n_in=4, kind="attention"), "m.out_proj": linear(4, 4)}
    ),
    "bias-of-B": adapter(
        {"k": linear(4, 4, B_bias=numbers(4)), "m": linear(4, 12, B_bias=numbers(12))}
    ),
    "bias-of-B-on-slices": adapter(
        {"m": fused(*contiguous(4, 0, 2), n_in=4, B_bias=numbers(8))}
    ),
    "bias-of-some-B": adapter({"k": linear(4, 4), "m": linear(4, 12, B_bias=numbers(12))}),
    "in-proj": adapter({"m": linear(4, 12, kind="attention")}),
    "biases": adapter(
        {"a": linear()},
        trained={"a.bias": numbers(8), "norm.bias": numbers(4), "head.weight": numbers(3, 4)},
        settings={"bias": "all", "train_modules": ("head",)},
    ),
    "bfloat16": adapter(
        {"a": with_start(linear())}, trained={"a.bias": numbers(8, dtype=torch.float16)},
        settings={"bias": "lora_only"},
    ),
    "experts": adapter(
        {"a.down_proj": experts(n_in=3), "a.gate_up_proj": experts(), "b": linear()}
    ),
    "experts-pissa": adapter({"a.down_proj": with_start(experts())}),
    "experts-stored-as-in-out": adapter({"a.w": experts(transposed=True)}),
    # PEFT's format cannot represent these:
    "experts-dora": adapter({"a.down_proj": with_dora(experts())}),
    "experts-in-unknown-order": adapter({"a.w1": experts(), "a.w2": experts()}),
    "attention-scalings": adapter(
        {"m": linear(4, 12, kind="attention", alpha=3.0), "m.out_proj": linear(4, 4, alpha=5.0)}
    ),
    "grouped-dora": adapter({"a": with_dora(convolution(rank=4, groups=2))}),
    "half-a-module": adapter({"a": linear()}, trained={"a.bias": numbers(8)}),
    "full": StoredAdapter(
        method=lorakit.FullFineTuning(top_layers=1, train_modules=("head",)),
        trained={"a.weight": numbers(4, 4), "head.bias": numbers(4)},
    ),
}  # fmt: skip
for layer in (ADAPTERS["bfloat16"].layers["a"],):
    for name in ("A", "B", "initial_A", "initial_B"):
        setattr(layer, name, getattr(layer, name).bfloat16())
NOT_PEFT = (
    "attention-scalings",
    "bias-of-some-B",
    "experts-dora",
    "experts-in-unknown-order",
    "grouped-dora",
    "half-a-module",
    "full",
)


BESIDE = (
    *("fused", "fused-dora", "pissa", "conv", "attention", "bias-of-B-on-slices", "in-proj"),
    *("bfloat16", "experts", "experts-pissa", "experts-stored-as-in-out"),
)
"""Adapters whose form is another in PEFT's file, so that their own stands beside it."""


@pytest.mark.parametrize("name", ADAPTERS)
def test_everything_comes_back(tmp_path, name):
    stored = ADAPTERS[name]
    notices = formats.write(stored, tmp_path / "adapter")
    assert_equal(formats.read(tmp_path / "adapter"), stored)
    files = {"lorakit.json", "README.md"}
    if name in NOT_PEFT:
        assert "PEFT cannot" in notices[0]
        assert set(os.listdir(tmp_path / "adapter")) == files | {"lorakit_model.safetensors"}
    else:
        assert [n[:19] for n in notices] == (["PEFT up to 0.21.2 a"] if name == "attention" else [])
        peft_files = {"adapter_config.json", "adapter_model.safetensors"}
        peft_files |= {"lorakit_model.safetensors"} if name in BESIDE else set()
        assert set(os.listdir(tmp_path / "adapter")) == files | peft_files
        formats.read_peft(tmp_path / "adapter")  # it can also be read without lorakit.json


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_adapter_gives_the_same_bytes(tmp_path, name):
    for folder in ("one", "other"):
        formats.write(ADAPTERS[name], tmp_path / folder)
    formats.write(formats.read(tmp_path / "one"), tmp_path / "again")
    for file in os.listdir(tmp_path / "one"):
        contents = {(tmp_path / f / file).read_bytes() for f in ("one", "other", "again")}
        assert len(contents) == 1, file


def test_a_live_adapter_with_its_base(tmp_path):
    model = tiny_models.build("gpt-neox")
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets="attention.qv", dora=True), seed=0)
    handle.save(tmp_path / "adapter", provenance=PROVENANCE)
    stored = formats.read(tmp_path / "adapter")
    assert_equal(stored, handle.stored())
    assert stored.base is not None
    assert stored.base.class_name == "GPTNeoXForCausalLM"


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    formats.write(ADAPTERS["plain"], tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer").mkdir()
    (tmp_path / "adapter" / "tokenizer" / "vocabulary.txt").write_text("a b c")
    formats.write(ADAPTERS["plain"], tmp_path / "adapter")
    return tmp_path / "adapter"


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_flipped_bit_anywhere_is_found(folder):
    files = files_below(folder)
    assert len(files) == 5
    generator = torch.Generator().manual_seed(0)
    for name in files:
        data = (folder / name).read_bytes()
        places = torch.randint(8 * len(data), (12,), generator=generator).tolist()
        for place in (*places, 0, 8 * len(data) - 1):
            broken = bytearray(data)
            broken[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(broken)
            if name == "README.md":
                assert "was edited" in formats.read(folder).notices[0]
                continue
            with pytest.raises(AdapterFileError):
                formats.read(folder)
        (folder / name).write_bytes(data)
    assert_equal(formats.read(folder), ADAPTERS["plain"])


def test_a_truncated_or_missing_file_is_found(folder):
    for name in files_below(folder):
        data = (folder / name).read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 1):
            (folder / name).write_bytes(data[:length])
            if name == "lorakit.json" and length == len(data) - 1:
                assert_equal(formats.read(folder), ADAPTERS["plain"])  # except for a line end
            elif name != "README.md":
                with pytest.raises(AdapterFileError):
                    formats.read(folder)
        (folder / name).unlink()
        if name == "README.md":
            assert_equal(formats.read(folder), ADAPTERS["plain"])
        elif name == "lorakit.json":  # then the folder is read as a PEFT folder
            assert formats.read(folder).peft_config is not None
        else:
            with pytest.raises(AdapterFileError, match="does not exist"):
                formats.read(folder)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer/vocabulary.txt"])
def test_another_changed_file_is_damaged(folder, name):
    """Without lorakit.json, nothing would show the damage."""
    with (folder / name).open("ab") as file:
        file.write(b"a")
    with pytest.raises(AdapterFileError, match=r"Download or save the adapter again\.$"):
        formats.read(folder)


def test_an_edited_card_is_no_damage(folder):
    (folder / "README.md").write_text("my words")
    (folder / "notes.txt").write_text("a file of the user's own")
    stored = formats.read(folder)
    assert [n for n in stored.notices if "README.md' was edited" in n]
    assert_equal(stored, ADAPTERS["plain"])


def rewrite(folder: Path, change) -> None:
    """Change lorakit.json and recompute its checksum."""
    path = folder / "lorakit.json"
    record = json.loads(path.read_text())
    change(record)
    storage.write_record(path, record)


def set_in(*keys):
    *way, last, value = keys

    def change(record: dict) -> None:
        for key in way:
            record = record[key]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("format", "other"), "does not describe a lorakit adapter"),
        (set_in("format_version", "1"), "does not describe a lorakit adapter"),
        (set_in("format_version", 99), "format version 99.*Update lorakit"),
        (set_in("format_version", 1), "format version 1.*Save it again"),
        (set_in("future", 1), "unknown keys or lacks some: future"),
        (set_in("in_peft", {}), "the files have no tensor 'layers.a.0.q.A'"),
        (set_in("in_peft", "layers.a.0.q.A", "absent"), "does not match"),
        (set_in("in_peft", 7), "does not match"),
        (set_in("files", None), "does not match"),
        (set_in("files", "../outside", "0"), "'../outside', which can be outside"),
        (set_in("files", "/etc/passwd", "0"), "'/etc/passwd', which can be outside"),
        (set_in("files", "a\\..\\b", "0"), "which can be outside"),
        (set_in("files", "C:x", "0"), "which can be outside"),
        (set_in("files", "a\0b", "0"), "which can be outside"),
        (set_in("files", "tokenizer", "0"), "is not a file"),
        (set_in("files", "absent", "0"), "absent' does not exist"),
        (set_in("method", "name", "Prefix"), "its method is 'Prefix'"),
        (set_in("method", None), "does not match"),
        (set_in("method", "power", 3), r"settings that this lorakit does not know: \['power'\]"),
        (set_in("method", "rank", 0), "rank is 0"),
        (set_in("method", "targets", []), "targets is empty"),
        (set_in("method", "rank_pattern", 5), "rank_pattern is 5|does not match"),
        (set_in("layers", {}), "does not describe the tensor 'layers.a.0.q.A'"),
        (set_in("layers", []), "does not match"),
        (set_in("layers", "a.0.q", "kind", "attention-like"), "kind of layer is"),
        (set_in("layers", "a.0.q", "scaling", 0), "scaling is 0"),
        (set_in("layers", "a.0.q", "scaling", "1"), "scaling is '1'"),
        (set_in("layers", "a.0.q", "alpha", 1e308), "alpha is 1e\\+308"),
        (set_in("layers", "a.0.q", "alpha", 1e400), "not JSON|does not match|alpha is inf"),
        (
            set_in("layers", "a.0.q", "slices", [{"groups": 10**9, "stride": 8, "offset": 0, "width": 8}]),
            "needs",
        ),
        (
            set_in("layers", "a.0.q", "slices", [{"groups": 1, "stride": 8, "offset": 4, "width": 8}]),
            "does not lie within|needs",
        ),
        (set_in("layers", "a.0.q", "power", 3), "unknown settings or lacks some: power"),
        (set_in("base", {"class_name": "x"}), "record of the base model"),
        (set_in("base", []), "record of the base model"),
        (set_in("provenance", ["x"]), "does not match"),
    ],
)  # fmt: skip
def test_a_record_that_lies(folder, change, message):
    try:
        rewrite(folder, change)
    except ValueError:  # 1e400 is not valid JSON
        return
    with pytest.raises(AdapterFileError, match=message) as caught:
        formats.read(folder)
    assert "adapter" in str(caught.value)


def test_a_record_edited_by_hand(folder):
    path = folder / "lorakit.json"
    text = path.read_text()
    assert '"seed": 3' in text
    path.write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(AdapterFileError, match="edited by hand"):
        formats.read(folder)


def test_overwriting_what_is_no_adapter_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="files that are not an adapter's"):
        formats.check_replaceable(tmp_path)
    formats.check_replaceable(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    formats.check_replaceable(tmp_path / "empty")


@pytest.mark.parametrize(
    "other",
    ["checkpoint-10/optimizer.pt", "notes.md", "tokenizer_training/run.py", "second/README.md"],
)
def test_overwriting_an_adapter_deletes_nothing_beside_it(tmp_path, other):
    formats.write(ADAPTERS["full"], tmp_path)
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("years of work")
    with pytest.raises(RunFolderError, match=f"would delete them: {re.escape(other)}[.] Choose"):
        formats.check_replaceable(tmp_path)


# --- which format? ------------------------------------------------------------------------------


def test_paths_that_hold_no_adapter(tmp_path):
    with pytest.raises(AdapterFileError, match=r"does not exist.*hf download"):
        formats.read(tmp_path / "absent")
    with pytest.raises(
        AdapterFileError, match=r"neither lorakit.json nor adapter_config.json, only nothing"
    ):
        formats.read(tmp_path)
    formats.write(ADAPTERS["plain"], tmp_path / "run" / "adapter")
    with pytest.raises(AdapterFileError, match=r"Did you mean '.*run/adapter'\?"):
        formats.read(tmp_path / "run")
    for path in ("runn/adapter", "run/adaptr", "rum/adapters"):
        with pytest.raises(AdapterFileError, match=r"not exist\. Did you mean '/.*/run/adapter'\?"):
            formats.read(tmp_path / path)
    with pytest.raises(AdapterFileError, match=r"not exist\. Check the path"):
        formats.read(tmp_path / "run" / "zzz")
    for name in ("adapter_model.safetensors", "lorakit.json", "adapter_config.json"):
        with pytest.raises(AdapterFileError, match=r"Give the folder: '.*run/adapter'"):
            formats.read(tmp_path / "run" / "adapter" / name)
    (tmp_path / "mnli.bin").write_bytes(b"")
    (tmp_path / "run").rename(tmp_path / ".run")
    with pytest.raises(
        AdapterFileError, match=r"give the path of the file, for example '.*mnli.bin'"
    ):
        formats.read(tmp_path)
    (tmp_path / ".run" / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / ".run" / "adapter" / "lorakit.json").unlink()
    with pytest.raises(
        AdapterFileError, match=r"neither adapter_model.safetensors nor adapter_model.bin"
    ):
        formats.read(tmp_path / ".run" / "adapter")


def test_a_folder_of_links_into_a_cache(tmp_path):
    """A snapshot in the hub's cache is a folder of links."""
    formats.write(ADAPTERS["plain"], tmp_path / "adapter")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "adapter").iterdir():
        shutil.move(file, tmp_path / "blobs" / hashlib.sha256(file.name.encode()).hexdigest())
        (tmp_path / "snapshot" / file.name).symlink_to(
            Path("..", "blobs", hashlib.sha256(file.name.encode()).hexdigest())
        )
    stored = formats.read(tmp_path / "snapshot")
    same_bits(stored.layers["a.0.q"].A, ADAPTERS["plain"].layers["a.0.q"].A)
