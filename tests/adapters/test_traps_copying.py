"""A copy of an adapted model is complete and independent of the original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import tiny_models
import torch
from adapter_machine import through_torch_save
from random_adapters import randomise
from tiny_models import assert_same_tensors, tensors_of
from torch import Tensor, nn

import lorakit
from lorakit.adapters import attach, handle_of
from lorakit.errors import AdapterStateError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}
METHODS = {
    "lora": LoRA(rank=2, alpha=3, targets="all-linear", dropout=0.1),
    "bias and head": LoRA(rank=2, targets="attention.qv", bias="all", train_modules="lm_head"),
    "full": FullFineTuning(),
}
IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture(params=COPIES)
def copied(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return COPIES[request.param]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_copy_is_whole_and_the_original_stays(
    copied: Callable[[nn.Module], nn.Module], method: str
) -> None:
    model = tiny_models.build("gpt2")  # tied head
    base, base_state = logits(model), tensors_of(model)
    randomise(attach(model, METHODS[method]))
    adapted, adapted_state = logits(model), tensors_of(model)
    assert (adapted - base).abs().max() > 1e-2

    twin = copied(model)
    handle = handle_of(twin)
    assert handle is not None
    assert handle is not handle_of(model)
    assert handle.model is twin
    assert torch.equal(logits(twin), adapted)

    handle.activate(None)
    assert torch.equal(logits(twin), base)
    handle.activate("default")
    handle.merge()
    handle.unmerge()
    assert torch.equal(logits(twin), adapted)
    handle.detach()
    assert torch.equal(logits(twin), base)
    assert_same_tensors(tensors_of(twin), base_state)
    assert handle_of(twin) is None
    assert vars(twin).keys() == vars(tiny_models.build("gpt2")).keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())

    assert torch.equal(logits(model), adapted)
    assert_same_tensors(tensors_of(model), adapted_state)


def test_training_the_copy_trains_no_tensor_of_the_original(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = tiny_models.build("gpt2")
    attach(model, METHODS["bias and head"])
    before = tensors_of(model)
    twin = copied(model)
    handle = handle_of(twin)
    assert handle is not None
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=1.0)
    twin(IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = twin.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert_same_tensors(tensors_of(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_copy_of_a_merged_model_gives_its_own_base_back(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = tiny_models.build("gpt2")
    base, base_state = logits(model), tensors_of(model)
    adapters = attach(model, LoRA(rank=2, targets=("embedding", "attention.qv")))
    randomise(adapters)
    adapters.merge()
    merged = logits(model)
    twin = copied(model)
    handle = handle_of(twin)
    assert handle is not None
    assert handle.merged == {"default": 1.0}
    assert torch.equal(logits(twin), merged)
    handle.detach()
    assert torch.equal(logits(twin), base)
    assert_same_tensors(tensors_of(twin), base_state)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert torch.equal(logits(model), merged)


def test_copy_saves_itself(copied: Callable[[nn.Module], nn.Module], tmp_path) -> None:
    model = tiny_models.build("llama")
    randomise(attach(model, METHODS["lora"]))
    twin = copied(model)
    handle = handle_of(twin)
    assert handle is not None
    randomise(handle, seed=1)
    assert (logits(twin) - logits(model)).abs().max() > 1e-2
    twin.save_pretrained(tmp_path / "twin")
    loaded = type(twin).from_pretrained(tmp_path / "twin", attn_implementation="eager")
    torch.testing.assert_close(logits(loaded), logits(twin), atol=2e-4, rtol=0)


def test_the_handle_is_found_in_a_module_around_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = attach(model, LoRA(rank=2, targets="0"))
    average = torch.optim.swa_utils.AveragedModel(model)
    assert lorakit.handle_of(nn.ModuleDict({"model": model})) is adapters
    assert lorakit.handle_of(average).model is average.module
    assert lorakit.handle_of(nn.ModuleList([model, average])) is None  # which of the two?
    assert lorakit.handle_of(model[0]) is None
    with pytest.raises(AdapterStateError, match="another root"):
        attach(nn.ModuleList([model]), LoRA(rank=2, targets="0"))
