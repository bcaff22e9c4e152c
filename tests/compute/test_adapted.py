"""What an adapter's file says about the base to open."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

from lorakit import FullFineTuning, LoRA, attach
from lorakit.compute.adapted import recorded_base
from lorakit.compute.adapter_file import AdapterFile, opening_task
from lorakit.errors import ConfigurationError
from lorakit.methods.method import Method
from lorakit.models.base_config import BaseConfig


@pytest.mark.parametrize(
    ("arch", "method", "outputs"),
    [
        ("roberta", FullFineTuning(), 3),  # has two types of tokens
        ("gpt2", FullFineTuning(), 3),
        ("llama", FullFineTuning(), 3),
        ("llama", LoRA(rank=2, train_modules=("embed_tokens", "score")), 3),
        ("llama", LoRA(rank=2, train_modules=("embed_tokens",)), None),  # the base's own head
    ],
)
def test_the_number_of_outputs_is_that_of_the_head(
    arch: str, method: Method, outputs: int | None, tmp_path: Path
) -> None:
    model = tiny_models.build(arch, "sequence-classification", num_labels=3)
    attach(model, method).save(tmp_path / "adapter")
    adapter = AdapterFile.read(tmp_path / "adapter")
    assert adapter is not None
    task, found = opening_task(adapter)
    assert task is not None
    assert (task.name, found) == ("classification", outputs)


@pytest.mark.parametrize("name", ["models/a.gguf", "~no-such-user/a.gguf", "/a.gguf"])
def test_a_recorded_path_is_for_resolve_to_explain(name: str) -> None:
    assert recorded_base(BaseConfig(), name, None).name == name


@pytest.mark.parametrize("name", ["a.gguf", "a" * 300 + ".GGUF"])
def test_a_recorded_file_name_needs_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=f"--base.name PATH/{name}"):
        recorded_base(BaseConfig(), name, None)
