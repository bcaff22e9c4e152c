"""Loading an adapter hashes the base once, notices changed weights, and does not walk the other adapters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import nn

import lorakit
from lorakit.adapters import formats, handle_of
from lorakit.adapters.attach import handle_for
from lorakit.adapters.formats import fingerprint
from lorakit.adapters.handle import Adapters
from lorakit.adapters.loading import build_modules
from lorakit.errors import WrongBaseError
from lorakit.methods.fake_modules import fake_modules
from lorakit.models.layers import ADAPTERS, AdapterSlot
from lorakit.models.tree import base_modules, is_of_adapter, walk

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
    before = handle.base_record("a").exact
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data.view(-1)[1] += 1
    assert handle.base_record("a").exact != before


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that PyTorch's functions visit."""
    modules: list[nn.Module] = []
    original = nn.Module.named_modules

    def counting(self: nn.Module, *args: object, **kwargs: object) -> object:
        for path, module in original(self, *args, **kwargs):  # type: ignore[arg-type]
            modules.append(module)
            yield path, module

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    return modules


def modules_of(handle: Adapters, name: str) -> set[int]:
    return {id(m) for module in handle.modules(name).values() for m in module.modules()}


def test_loading_visits_no_other_adapter(folder: Path, visited: list[nn.Module]) -> None:
    model = tiny_models.build("llama")
    handle = lorakit.load(model, folder, name="a")
    others = modules_of(handle, "a")
    visited.clear()
    lorakit.load(model, folder, name="b")
    handle.remove("b")
    assert not others & set(map(id, visited))


@dataclass(frozen=True)
class ReadsNumbers:
    """A method that fake tensors are not enough for."""

    def modules(self, model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
        del dtype
        assert model.get_input_embeddings().weight.sum().item()
        return {}


@pytest.mark.parametrize(
    "method",
    [
        lorakit.LoRA(rank=2, targets=("embedding", "attention.q"), tie_head=True),
        lorakit.BottleneckAdapter(size=4),
        lorakit.PrefixEmbedding(prefix_length=2),
        ReadsNumbers(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_building_modules_visits_no_adapter(
    method: Any, tmp_path: Path, visited: list[nn.Module]
) -> None:
    """A server builds them while another thread adds and removes adapters."""
    model = tiny_models.build("llama", tie_word_embeddings=True)
    if isinstance(method, ReadsNumbers):
        build = partial(fake_modules, method, model)
    else:
        handle = lorakit.attach(model, method, name="x")
        handle.save(tmp_path / "x")
        handle.detach()
        build = partial(build_modules, model, formats.read(tmp_path / "x"))
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets="all-linear"), name="a")
    handle.activate(None)
    others = modules_of(handle, "a")
    visited.clear()
    build()
    assert not others & set(map(id, visited))


def test_a_walk_goes_on_while_another_thread_adds_an_adapter() -> None:
    model = tiny_models.build("llama")
    expected = [at.path for at in walk(model)]
    paths = []
    for at in walk(model):
        paths.append(at.path)
        at.parent.register_module(ADAPTERS, AdapterSlot())
    assert paths == expected


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
