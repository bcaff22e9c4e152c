"""Read a base's weights from its files under the adapter's names, and validate them against the record."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from random_adapters import randomise
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.adapters import formats
from lorakit.analysis import adapter_amplification, extract_adapter, open_weights, read_weights
from lorakit.analysis.deltas import weight_name
from lorakit.errors import AdapterFileError, BaseModelError, ConfigurationError, WrongBaseError
from lorakit.models.base_config import BaseConfig

ARCHITECTURES = ("llama", "gpt2", "gpt-neox", "roberta", "t5", "vit")
"""Two have other names on disk than in the model: gpt-neox for its head, vit for all weights."""


def saved(folder: Path, arch: str = "llama", **settings) -> lorakit.Adapters:
    """Save a tiny base in `folder`, and return a handle on the same model with a random adapter."""
    model = tiny_models.build(arch, **settings)
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return lorakit.attach(model, lorakit.LoRA(rank=2, targets="all-linear"), name="a")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_adapted_weight_is_found_and_the_base_is_recognised(arch, tmp_path):
    handle = saved(tmp_path / "base", arch)
    adapter = handle.stored()
    weights = open_weights(BaseConfig(name=str(tmp_path / "base")), adapter)
    assert weights.notices == []
    for path, layer in adapter.layers.items():
        name = weight_name(path, layer)
        assert torch.equal(weights[name], handle.model.get_parameter(name)), name


def test_files_in_shards(tmp_path):
    handle = saved(tmp_path / "base")
    folder = tmp_path / "base"
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for i, (name, tensor) in enumerate(whole.items()):
        halves[f"model-{i % 2 + 1}.safetensors"][name] = tensor
    for file, tensors in halves.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    listed = {name: file for file, tensors in halves.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    weights = open_weights(BaseConfig(name=str(folder)), handle.stored())
    assert weights.notices == []
    assert len(weights) == len(whole)

    (folder / "model-2.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"model-2.safetensors' is missing"):
        read_weights(BaseConfig(name=str(folder)))
    index.write_text("{}")
    with pytest.raises(BaseModelError, match="damaged"):
        read_weights(BaseConfig(name=str(folder)))


def test_an_index_of_an_earlier_save_is_ignored(tmp_path):
    """`save_pretrained` leaves it beside the new file, which transformers reads."""
    handle = saved(tmp_path / "base")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = open_weights(BaseConfig(name=str(tmp_path / "base")), handle.stored())
    assert len(weights) == len(load_file(tmp_path / "base" / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused(dtype, tmp_path):
    """Their codes are no weights: the scales are other tensors of the file."""
    handle = saved(tmp_path / "base")
    base = BaseConfig(name=str(tmp_path / "base"))
    (tmp_path / "int8").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "int8")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    codes = {n: (100 * W).to(dtype) if "proj" in n else W for n, W in weights.items()}
    save_file(codes, tmp_path / "int8" / "model.safetensors", metadata={"format": "pt"})
    adapter = dataclasses.replace(handle.stored(), base=None)
    quantised = open_weights(BaseConfig(name=str(tmp_path / "int8")), adapter)
    expected = f"in {str(dtype)[6:]}, so it is quantised.*Name the unquantised model"
    with pytest.raises(BaseModelError, match=expected):
        quantised[weight_name(*next(iter(adapter.layers.items())))]
    with pytest.raises(BaseModelError, match=expected):
        extract_adapter(base, tmp_path / "int8", targets="attention", rank=2)


def test_a_checkpoint_that_is_no_safetensors_file_is_loaded_as_a_whole(tmp_path):
    handle = saved(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "base" / "pytorch_model.bin")
    found = open_weights(BaseConfig(name=str(tmp_path / "base")), handle.stored())
    assert found.notices == []
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], weights[name])


def test_the_head_of_a_tied_base_without_a_record(tmp_path):
    """The file of the base has no head, and PEFT's folder does not record the class that has one."""
    model = tiny_models.build("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets=("head", "attention.q")))
    adapter = dataclasses.replace(handle.stored(), base=None)
    weights = open_weights(str(tmp_path / "base"), adapter)
    expected = model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(weights["lm_head.weight"], expected)


def test_another_base_is_refused(tmp_path):
    adapter = saved(tmp_path / "base").stored()
    other = BaseConfig(name=str(tmp_path / "other"))
    tiny_models.build("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBaseError, match="weights differ"):
        open_weights(other, adapter)
    (notice,) = open_weights(other, adapter, allow_other_base=True).notices
    assert "allow_other_base" in notice

    tiny_models.build("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(WrongBaseError, match="its class is Bert"):
        open_weights(BaseConfig(name=str(tmp_path / "bert")), adapter)


def test_the_base_that_the_adapter_records(tmp_path, monkeypatch):
    adapter = saved(tmp_path / "base").stored()
    weights = open_weights(None, adapter)
    assert weights.source.path_or_id == str(tmp_path / "base")
    adapter.base = None
    with pytest.raises(ConfigurationError, match=r"The adapter file does .* --base.name"):
        open_weights(None, adapter)
    weights = open_weights(str(tmp_path / "base"), adapter)
    assert "was not checked" in weights.notices[0]
    with pytest.raises(ConfigurationError, match=r"base is 5; it must be BaseConfig\(...\)"):
        open_weights(5, adapter)


def test_an_adapter_on_disk(tmp_path):
    handle = saved(tmp_path / "base")
    randomise(handle)
    handle.save(tmp_path / "adapter")
    weights = open_weights(None, tmp_path / "adapter")
    assert weights.notices == []
    found = adapter_amplification(tmp_path / "adapter", weights)
    assert found.layers.keys() == handle.stored().layers.keys()
    formats.write_loralib(handle.stored(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigurationError, match=r"a\.safetensors does not say which base"):
        open_weights(None, tmp_path / "a.safetensors", alpha=8)
    handle.model.config._name_or_path = "tiny.Q4_0.gguf"
    handle.save(tmp_path / "of-gguf")
    with pytest.raises(
        ConfigurationError, match=r"'tiny\.Q4_0\.gguf', which is not in this folder"
    ):
        open_weights(None, tmp_path / "of-gguf")
    with pytest.raises(AdapterFileError, match=r"is Adapters\(a.*pass adapters\.stored\(name\)"):
        open_weights(None, handle)


def test_a_weight_that_is_not_there(tmp_path):
    saved(tmp_path / "base")
    weights = read_weights(str(tmp_path / "base"))
    with pytest.raises(BaseModelError, match=r"no weight 'model.layers.9.self_attn.q_proj.weight'"):
        weights["model.layers.9.self_attn.q_proj.weight"]
    # A suffix that matches several names is rejected.
    assert "weight" not in weights


def test_a_damaged_file(tmp_path):
    saved(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BaseModelError, match="cannot be read"):
        read_weights(BaseConfig(name=str(tmp_path / "base")))


def test_a_decoder_of_images_and_text(tmp_path):
    """Its class has the suffix of encoder-decoders, and its tensors have other names on disk than in the model."""
    text = tiny_models.ARCHITECTURES["gemma3"]().to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | sizes)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets=r".*language_model.*q_proj"))
    randomise(handle, scale=0.1)
    adapter = handle.stored()
    base = BaseConfig(name=str(tmp_path / "base"))
    weights = open_weights(base, adapter)
    assert weights.notices == []
    for path in adapter.layers:
        name = f"{path}.weight"
        assert torch.equal(weights[name], handle.model.get_parameter(name))
    handle.merge(keep_base=False)
    model.save_pretrained(tmp_path / "tuned")
    made = extract_adapter(base, tmp_path / "tuned", targets=r".*language_model.*q_proj", rank=2)
    assert made.error < 1e-4
    assert made.layers.keys() == adapter.layers.keys()
    assert made.notices == []
