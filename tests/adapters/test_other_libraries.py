"""Models, wrappers and adapters of other libraries than transformers."""

from __future__ import annotations

import logging
from copy import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from huggingface_hub import PyTorchModelHubMixin
from random_adapters import randomise
from safetensors.torch import load_file, save_file
from tiny_models import logits
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters import attach, load
from lorakit.errors import AdapterStateError
from lorakit.methods import BottleneckAdapter
from lorakit.methods.lora.method import LoRA

pytestmark = [  # of PEFT
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

# --- save_pretrained of other libraries -----------------------------------------------------------


class OfAnotherLibrary(nn.Module):
    """Has the methods of a model of diffusers."""

    __module__ = "diffusers.models"

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out(self.to_q(x))

    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "weights.safetensors")

    def fuse_qkv_projections(self) -> None:
        self.to_q.weight.data.clone()


class OfTheHub(nn.Module, PyTorchModelHubMixin):
    """Contains a model that is adapted without it."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.inner = tiny_models.build("llama", tie_word_embeddings=tied)


def test_the_folder_of_another_library_holds_the_adapted_weights(tmp_path: Path) -> None:
    model, x = OfAnotherLibrary(), torch.randn(3, 8)
    base = model(x)
    adapters = attach(model, LoRA(rank=2, targets="to_q"))
    randomise(adapters)
    adapted, keys = model(x), list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == keys
    saved = OfAnotherLibrary()
    saved.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=False)
    torch.testing.assert_close(saved(x), adapted)
    assert not torch.allclose(adapted, base)
    adapters.detach()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "weights.safetensors").keys() == saved.state_dict().keys()


def test_a_model_of_the_hub_around_an_adapted_one_is_saved_adapted(tmp_path: Path) -> None:
    model = OfTheHub()
    randomise(attach(model.inner, LoRA(rank=2, targets="attention")))
    model.save_pretrained(tmp_path)
    saved = OfTheHub.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(saved.inner), logits(model.inner), atol=2e-4, rtol=0)


def test_another_library_saves_no_model_without_its_bottlenecks(tmp_path: Path) -> None:
    model = OfTheHub()
    attach(model.inner, BottleneckAdapter(size=2))
    with pytest.raises(AdapterStateError, match=r"load without the adapter: .*adapters\.save"):
        model.save_pretrained(tmp_path)


# --- layers that another library fuses, and adapters of PEFT --------------------------------------


def test_fusing_adapted_layers_is_refused() -> None:
    model = OfAnotherLibrary()
    adapters = attach(model, LoRA(rank=2, targets="to_q"))
    with pytest.raises(AdapterStateError, match=r"merge\(keep_base=False\) first"):
        model.fuse_qkv_projections()
    adapters.merge(keep_base=False)
    model.fuse_qkv_projections()


OPTIONS = peft.LoraConfig(r=2, target_modules=["k_proj"])


@pytest.mark.parametrize("left_over", [False, True])
def test_a_pass_with_an_adapter_of_peft_on_top_is_refused(left_over: bool) -> None:
    model = tiny_models.build("llama")
    if left_over:
        model.peft_config = {"before": copy(OPTIONS)}
    attach(model, LoRA(rank=2))
    wrapped = peft.get_peft_model(model, OPTIONS)
    with pytest.raises(AdapterStateError, match="PEFT has put an adapter on this model"):
        logits(wrapped)


# --- wrappers -------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A LightningModule or SentenceTransformer, which adds no parameter."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.model = tiny_models.build("llama")
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


def test_a_root_that_only_wraps_a_model_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    attach(Wrapper(pooling=nn.Identity()), LoRA(rank=2, targets="q_proj"))
    assert "Wrapper only wraps the LlamaForCausalLM at 'model'" in caplog.text
    assert "Attach to model.get_submodule('model') instead" in caplog.text


@pytest.mark.parametrize("root", ["head", "two models", "transformers", "plain", "compiled"])
def test_a_root_that_is_a_model_is_not_reported(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = {
        "head": lambda: Wrapper(head=nn.Linear(2, 2)),
        "two models": lambda: Wrapper(other=tiny_models.build("llama")),
        "transformers": lambda: tiny_models.build("llama"),
        "plain": lambda: nn.Sequential(nn.Linear(2, 2), nn.Identity()),
        "compiled": lambda: torch.compile(tiny_models.build("llama"), backend="eager"),
    }[root]()
    with caplog.at_level(logging.WARNING):
        attach(model, LoRA(rank=1, targets="0" if root == "plain" else "q_proj"))
    assert "wraps" not in caplog.text


def test_an_adapter_of_a_module_of_fabric_is_that_of_its_model(tmp_path: Path) -> None:
    fabric = nn.Module()
    fabric._forward_module = fabric._original_module = inner = tiny_models.build("llama")
    adapters = attach(fabric, LoRA(rank=2))
    randomise(adapters)
    assert adapters.model is inner
    adapters.save(tmp_path / "adapter")
    fresh: PreTrainedModel = tiny_models.build("llama")
    load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(inner))
