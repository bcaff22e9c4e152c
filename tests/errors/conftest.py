"""Fixtures: bases, adapters in every format, data and a shell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from random_adapters import randomise
from safetensors.torch import load_file, save_file
from tiny_runs import save_base, write_rows
from torch import nn
from user_mistakes import (
    RECORD,
    ROWS,
    Shell,
)

import lorakit
from lorakit.adapters import formats


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders: a base, one retrained with the same shapes, and a wider one."""
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "base")
    save_base(folder / "wider", intermediate_size=96)
    save_base(folder / "learned-positions", "gpt2")
    shutil.copytree(folder / "base", folder / "retrained")
    tensors = load_file(folder / "retrained" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(tensors, folder / "retrained" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def base(bases: Path) -> str:
    return str(bases / "base")


@pytest.fixture
def model(base: str) -> nn.Module:
    return lorakit.load_base(base, dtype="float32").model


@pytest.fixture(scope="session")
def saved(bases: Path) -> Path:
    """An adapter folder of lorakit: a PEFT folder with a lorakit.json."""
    adapters = lorakit.attach(
        lorakit.load_base(bases / "base", dtype="float32").model, lorakit.LoRA(rank=2)
    )
    randomise(adapters)
    return adapters.save(bases / "adapter")


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture
def peft_folder(adapter: Path) -> Path:
    """The same adapter from PEFT: without lorakit.json and checksums."""
    (adapter / RECORD).unlink()
    return adapter


@pytest.fixture
def loralib_file(saved: Path, tmp_path: Path) -> Path:
    formats.write_loralib(formats.read(saved), tmp_path / "lora.bin")
    return tmp_path / "lora.bin"


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_rows(tmp_path / "train.jsonl", ROWS)


@pytest.fixture
def shell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Shell:
    """A shell in an empty folder, which collects relative paths and stray files."""
    monkeypatch.chdir(tmp_path)
    return Shell(capsys, tmp_path)


@pytest.fixture(autouse=True)
def _plans(instant_products: None) -> None:
    """Nothing here looks at the times of a plan."""
