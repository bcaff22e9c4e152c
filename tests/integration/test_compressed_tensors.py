"""A checkpoint of compressed-tensors: lorakit unpacks it. A model whose weights the library manages is refused."""

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
from random_adapters import randomise
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorakit import load_base
from lorakit.adapters import attach
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
        format="pack-quantized",
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


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(torch.arange(3, 17).view(2, 7)).logits


def test_lorakit_unpacks_it_while_loading(checkpoint: Path, tmp_path: Path) -> None:
    model = load_base(checkpoint, dtype="float32").model
    before = logits(model)
    adapters = attach(model, ALL_LINEAR, seed=0)
    randomise(adapters)
    expected = logits(model)
    adapters.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    adapters.unmerge()
    assert logits(model).equal(expected)
    adapters.merge(keep_base=False)
    model.save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not before.allclose(expected, atol=1e-3)


def test_a_model_that_it_manages_is_refused(checkpoint: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for _ in range(2):  # before and after the first pass, which unpacks the weights
        with pytest.raises(AdapterStateError, match="compressed-tensors manages the parameters"):
            attach(packed, ALL_LINEAR)
        expected = logits(packed)
    torch.testing.assert_close(logits(load_base(checkpoint, dtype="float32").model), expected)
