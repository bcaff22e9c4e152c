"""A model moves to another dtype or device while merged or trained tensors replace the base's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from accelerate import cpu_offload
from random_adapters import randomise
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters import Adapters, attach, load
from lorakit.errors import AdapterStateError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method

IDS = torch.arange(3, 17).view(2, 7)
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2, targets="all-linear"),
    "tied embedding": LoRA(rank=2, targets=("embedding", "attention.qv")),
    "trained": LoRA(rank=2, targets="attention.qv", bias="all", train_modules=("ln_f",)),
    "full": FullFineTuning(),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def adapted(method: Method) -> tuple[PreTrainedModel, Adapters]:
    model = tiny_models.build("gpt2")  # tied head
    adapters = attach(model, method, seed=1)
    randomise(adapters)
    return model, adapters


def assert_tied(model: PreTrainedModel) -> None:
    assert model.lm_head.weight is model.transformer.wte.weight


def test_to_float64_while_merged(method: Method) -> None:
    base = logits(tiny_models.build("gpt2").double())
    model, adapters = adapted(method)
    merged = copy.deepcopy(model)
    merged._lorakit_adapters.merge()
    expected = logits(merged.double())
    adapters.merge()
    model.to(torch.float64)
    assert torch.equal(logits(model), expected)
    adapters.unmerge()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    adapters.activate(None)
    assert torch.equal(logits(model), base)
    assert_tied(model)
    adapters.detach()
    assert torch.equal(logits(model), base)
    assert_tied(model)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64}


def test_there_and_back_while_merged(method: Method) -> None:
    """float32 to float64 and back is lossless, so the base must be restored bit for bit."""
    base = logits(tiny_models.build("gpt2"))
    model, adapters = adapted(method)
    adapters.merge()
    merged = logits(model)
    model.double().float()
    assert torch.equal(logits(model), merged)
    adapters.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("state", ["active", "merged"])
def test_to_another_device(method: Method, state: str) -> None:
    """The meta device represents any device: parameters are replaced, because they cannot share data with it."""
    model, adapters = adapted(method)
    if state == "merged":
        adapters.merge()
    model.to("meta")
    if state == "merged":
        adapters.unmerge()
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    adapters.activate(None)
    adapters.detach()
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    fresh = tiny_models.build("gpt2")
    assert model.state_dict().keys() == fresh.state_dict().keys()
    # The empty model can load the base's tensors again.
    model.to_empty(device="cpu").load_state_dict(fresh.state_dict())
    assert torch.equal(logits(model), logits(fresh))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to move to")
@pytest.mark.parametrize("state", ["active", "merged"])
def test_to_the_gpu_and_back(method: Method, state: str) -> None:
    base = logits(tiny_models.build("gpt2"))
    model, adapters = adapted(method)
    expected = logits(model)
    if state == "merged":
        adapters.merge()
    model.cuda()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS.cuda()).logits.cpu(), expected, atol=1e-3, rtol=0)
    if state == "merged":
        adapters.unmerge()
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    with torch.no_grad():
        torch.testing.assert_close(model(IDS.cuda()).logits.cpu(), expected, atol=1e-3, rtol=0)
    adapters.activate(None)
    model.cpu()
    assert torch.equal(logits(model), base)
    adapters.detach()
    assert torch.equal(logits(model), base)
    assert_tied(model)


def test_attach_to_a_model_on_the_meta_device_then_load() -> None:
    """Build on the meta device, adapt, then materialise: the factors are on the devices of their layers."""
    with torch.device("meta"):
        model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2))
    assert {p.device.type for p in adapters.trainable_parameters()} == {"meta"}
    filled = tiny_models.build("llama")
    source = attach(filled, LoRA(rank=2))
    randomise(source)
    model.load_state_dict(filled.state_dict(), assign=True)
    assert {p.device.type for p in adapters.trainable_parameters()} == {"cpu"}


# --- layers that accelerate offloads -----------------------------------------------------------------

CPU = torch.device("cpu")
TWO_LINEAR = LoRA(rank=2, targets=("0", "1"))


def two_linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("method", [TWO_LINEAR, FullFineTuning()], ids=["lora", "full"])
def test_offloaded_layers_are_refused(method: Method, tmp_path: Path) -> None:
    attach(two_linear(), method).save(tmp_path / "adapter")
    model, x = two_linear(), torch.ones(3, 4)
    base = model(x)
    cpu_offload(model, CPU)
    with pytest.raises(AdapterStateError, match="accelerate has offloaded"):
        attach(model, method)
    with pytest.raises(AdapterStateError, match="accelerate has offloaded"):
        load(model, tmp_path / "adapter", allow_other_base=True)
    assert torch.equal(model(x), base)


def test_an_adapter_that_is_offloaded_later_is_an_error() -> None:
    model, x = two_linear(), torch.ones(3, 4)
    adapters = attach(model, TWO_LINEAR, name="a")
    cpu_offload(model, CPU)
    with pytest.raises(AdapterStateError, match="The adapter's tensors are on the meta device"):
        model(x)
    with (
        adapters.per_sample(["a", None, "a"]),
        pytest.raises(AdapterStateError, match="meta device"),
    ):
        model(x)
    with pytest.raises(AdapterStateError, match=r"'0\.weight' is on the meta device"):
        adapters.merge()
