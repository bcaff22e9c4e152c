"""Loading an adapter hashes the base once, notices changed weights, and does not walk the other adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from random_adapters import randomise
from real_tensors import RealTensors
from torch import nn

import lorakit
from lorakit import storage
from lorakit.adapters import handle_of
from lorakit.adapters.attach import handle_for
from lorakit.adapters.formats import fingerprint
from lorakit.errors import AdapterFileError, WrongBaseError
from lorakit.models.layers import base_modules, is_of_adapter

LORA = lorakit.LoRA(rank=2, alpha=4, targets="attention.qv")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    handle = lorakit.attach(tiny_models.build("llama"), LORA, name="x")
    randomise(handle)
    return handle.save(tmp_path / "adapter")


def test_the_base_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    original = fingerprint.digests
    monkeypatch.setattr(fingerprint, "digests", lambda w: (hashed.append(w), original(w))[1])
    model = tiny_models.build("llama")
    for i in range(3):
        lorakit.load(model, folder, name=f"a{i}")
    assert len(hashed) == len(list(tiny_models.build("llama").parameters()))


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_changed_after_the_first_load_are_noticed(
    folder: Path, through_data: bool
) -> None:
    model = tiny_models.build("llama")
    lorakit.load(model, folder, name="a")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        (weight.data if through_data else weight).mul_(1.1)
    with pytest.raises(WrongBaseError, match="weights differ"):
        lorakit.load(model, folder, name="b")


def test_a_saved_record_never_holds_a_remembered_hash(folder: Path) -> None:
    """A write through `data` that no sample shows must not reach a file."""
    model = tiny_models.build("llama")
    handle = lorakit.load(model, folder, name="a")
    before = handle.base_record("a").weights.exact
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data.view(-1)[1] += 1
    assert handle.base_record("a").weights.exact != before


def test_loading_visits_no_other_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    handle = lorakit.load(model, folder, name="a")
    visited: list[nn.Module] = []
    others = {id(m) for module in handle.modules("a").values() for m in module.modules()}
    original = nn.Module.named_modules

    def counting(self: nn.Module, *args: object, **kwargs: object) -> object:
        for path, module in original(self, *args, **kwargs):  # type: ignore[arg-type]
            visited.append(module)
            yield path, module

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    lorakit.load(model, folder, name="b")
    handle.remove("b")
    assert not others & {id(module) for module in visited}


def test_a_false_size_in_a_small_file_allocates_nothing(tmp_path: Path) -> None:
    method = lorakit.Combined(methods=(LORA, lorakit.PrefixLayer(prefix_length=2)))
    model = tiny_models.build("llama")
    handle = lorakit.attach(model, method, name="x")
    record = handle.save(tmp_path / "adapter") / "lorakit.json"
    handle.detach()
    with RealTensors() as real:
        lorakit.load(model, tmp_path / "adapter").detach()
    expected = real.largest
    content = storage.read_record(record, AdapterFileError)
    assert '"prefix_length": 2' in json.dumps(content)
    content = json.loads(
        json.dumps(content).replace('"prefix_length": 2', '"prefix_length": 999999')
    )
    storage.write_record(record, content)
    with (
        RealTensors() as real,
        pytest.raises(
            AdapterFileError, match=r"shape \(2, 32\), and this model needs \(999999, 32\)"
        ),
    ):
        lorakit.load(model, tmp_path / "adapter")
    assert 0 < real.largest <= expected
    assert handle_of(model) is None


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_base_modules_are_the_named_modules_without_adapters(arch: str) -> None:
    model = tiny_models.build(arch)
    expected = list(model.named_modules())
    every = list(model.named_modules(remove_duplicate=False))
    lorakit.attach(model, LORA, name="x")
    assert list(base_modules(model)) == expected
    assert list(base_modules(model, remove_duplicate=False)) == every
    assert any(is_of_adapter(path) for path, _ in model.named_modules())


def test_a_kept_handle_survives_its_last_adapter(folder: Path) -> None:
    model = tiny_models.build("llama")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = handle_for(model)
    handle.keep()
    assert handle_of(model) is handle
    assert not any(p.requires_grad for p in model.parameters())
    for _ in range(2):
        assert lorakit.load(model, folder, name="a") is handle
        handle.remove("a")
        assert handle_of(model) is handle
    handle.detach()
    assert handle_of(model) is None
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not model._forward_hooks
    lorakit.load(model, folder, name="a").remove("a")
    assert handle_of(model) is None
