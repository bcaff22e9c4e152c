"""`lorakit convert`: the tensors and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import load_file
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer

import lorakit
from lorakit.adapters import formats
from lorakit.cli import main

TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
TENSORS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Write an adapter folder with a tokenizer that has a custom chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<|tool|>"])
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=2))
    return adapters.save(tmp_path / "adapter", tokenizer=tokenizer)


def convert(source: Path, target: Path, *options: str) -> None:
    assert main(["convert", str(source), str(target), *options]) == 0


def test_the_tokenizer_comes_along(adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "converted")
    found = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert found.chat_template == TEMPLATE
    assert found.tokenize("<|tool|>") == ["<|tool|>"]
    assert formats.read(tmp_path / "converted").notices == []  # the checksums cover all files


def test_nothing_else_comes_along(adapter: Path, tmp_path: Path) -> None:
    before = {path.name for path in adapter.iterdir()}
    for name in ("optimizer.pt", "notes.md", "trainer_state.json"):
        (adapter / name).write_text("{}")
    convert(adapter, tmp_path / "converted")
    assert {path.name for path in (tmp_path / "converted").iterdir()} == before


def test_in_place_nothing_is_lost(adapter: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    convert(adapter, adapter, "--overwrite", "true")
    after = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert before.keys() == after.keys()
    assert all(before[n] == after[n] for n in before if n.startswith("token") or n == TENSORS)


def test_there_and_back_the_tensors_are_the_same(adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "lora.bin", "--to", "loralib")
    convert(tmp_path / "lora.bin", tmp_path / "back", "--alpha", "16")
    before, after = load_file(adapter / TENSORS), load_file(tmp_path / "back" / TENSORS)
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
