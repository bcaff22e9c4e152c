"""A checkpoint of compressed-tensors: its layers have no weight before the first pass, and copy in parameters after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import tiny_models
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from packed_models import matrix
from random_adapters import randomise
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import load_base
from lorakit.adapters import attach, load
from lorakit.errors import AdapterStateError
from lorakit.methods.lora import LoRA

ALL_LINEAR = LoRA(targets="all-linear", rank=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 8-bit weights, a scale for each row."""
    folder = tmp_path_factory.mktemp("compressed")
    model = tiny_models.build("llama")
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    settings = QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        format="int-quantized",
    )
    settings.quantization_status = QuantizationStatus.FROZEN
    apply_quantization_config(model, settings)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data = layer.weight.data.abs().amax(1, keepdim=True) / 127
    ModelCompressor(quantization_config=settings).compress_model(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings.quantization_status = QuantizationStatus.COMPRESSED
    record = model.config.to_dict() | {"quantization_config": settings.model_dump()}
    (folder / "config.json").write_text(json.dumps(record, default=str))
    return folder


def opened(checkpoint: Path) -> PreTrainedModel:
    return load_base(checkpoint, dtype="float32").model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(torch.arange(3, 17).view(2, 7)).logits


def test_adapters_before_and_after_the_first_pass(checkpoint: Path, tmp_path: Path) -> None:
    model = opened(checkpoint)
    fresh = attach(model, ALL_LINEAR, seed=0)
    assert "weight" not in model.model.layers[0].mlp.up_proj._parameters  # type: ignore[union-attr]
    randomise(fresh)
    expected = logits(model)
    fresh.save(tmp_path)
    fresh.detach()
    before = logits(model)

    twin = tiny_models.build("llama")
    with torch.no_grad():
        for path, layer in twin.named_modules():
            if type(layer) is nn.Linear:
                layer.weight.copy_(matrix(model.get_submodule(path)))
    torch.testing.assert_close(logits(twin), before)

    later = load(model, tmp_path)
    assert logits(model).equal(expected)
    with pytest.raises(AdapterStateError, match=r"q_proj.weight' is quantised \(CPUCache\)"):
        later.merge()
    later.detach()
    assert logits(model).equal(before)
