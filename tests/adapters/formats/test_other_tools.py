"""Files of other tools: the message names the way to use them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from at_rest import numbers
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.adapters import formats
from lorakit.errors import AdapterFileError

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        (f"{PREFIX}.lora_A.weight", "adapter_model.bin if PyTorch wrote it, beside"),
        (f"{PREFIX}.lora_A.default.weight", "beside its adapter_config.json"),
        (f"{PREFIX}.lora_magnitude_vector", "beside its adapter_config.json"),
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx_lm.fuse"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune's names"),
        ("lora_unet_down_blocks_0_proj_in.lora_down.weight", "a diffusion model"),
        ("lora_te1_text_model_q_proj.alpha", "a diffusion model"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "a diffusion model"),
        ("unet.mid_block.to_q.lora_A.weight", "a diffusion model"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "a diffusion model"),  # Wan
        ("diffusion_model.layers.0.ffn.lora_A.weight", "a diffusion model"),  # ComfyUI
        ("text_encoder.text_model.encoder.fc1.lora_A.weight", "a diffusion model"),
        ("text_encoder.block.0.q.lora_A.weight", "beside its adapter_config.json"),  # MusicGen
        ("a.lora_C", "were expected.$"),
    ],
)
def test_a_file_that_is_given_alone(key: str, hint: str, tmp_path: Path) -> None:
    save_file({key: numbers(2, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError, match=rf"is not a name of loralib; .*{hint}"):
        formats.read(tmp_path / "lora.safetensors", alpha=16)


def test_a_file_of_diffusers_in_its_old_layout(tmp_path: Path) -> None:
    save_file({"unet.to_q.lora.down.weight": numbers(2, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError, match="It is an adapter of a diffusion"):
        formats.read(tmp_path / "lora.safetensors", alpha=16)


@pytest.mark.parametrize("name", ["adapter.gguf", "adapter.GGUF"])
def test_a_gguf_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(AdapterFileError, match="Give the PEFT folder from which the GGUF file was"):
        formats.read(tmp_path / name)


def test_a_folder_of_mlx(tmp_path: Path) -> None:
    options = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(AdapterFileError, match=r"has no peft_type.* adapter of MLX\. Merge it"):
        formats.read(tmp_path)


def test_a_folder_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError, match="It is an adapter of a diffusion model") as caught:
        formats.read(tmp_path)
    assert "loralib" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT
def test_a_checkpoint_of_zero_3_and_its_repair(tmp_path: Path) -> None:
    """The keys of zero_to_fp32.py have the adapter's name, and its file is read like PEFT's."""
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(tiny_models.build("llama"), options)
    adapted.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.1
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    sound = load_file(file)
    # ZeRO-3 does not shard small parameters, so it may be the larger factor alone, or the head.
    for ending, name in (("lora_A.weight", "A"), ("lora_B.weight", "B"), ("lm_head.weight", "")):
        empty = {key: torch.empty(0) for key in sound if key.endswith(ending)}
        save_file({**sound, **empty}, file)
        with pytest.raises(
            AdapterFileError,
            match=rf"{name or 'lm_head.weight.'} is empty: .*--exclude_frozen_param",
        ):
            formats.read(tmp_path)
    file.unlink()
    trained = {key: t.detach() for key, t in adapted.named_parameters() if t.requires_grad}
    assert f"{PREFIX.partition('model.layers')[0]}lm_head.modules_to_save.default.weight" in trained
    torch.save(trained, tmp_path / "adapter_model.bin")
    lorakit.load(model := tiny_models.build("llama"), tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).logits, adapted(ids).logits)

    torch.save({**trained, "lm_head.weight": torch.ones(99, 32)}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"do not explain, the first 'lm_head\.weight'"):
        formats.read(tmp_path)


def test_a_loralib_file_in_a_folder_is_not_taken_for_a_diffusion_adapter(tmp_path: Path) -> None:
    """Keys of kohya begin with lora_te_, lora_te1_ or lora_unet_."""
    save_file({"layer.lora_A": torch.ones(2, 4)}, tmp_path / "lora_test.safetensors")
    with pytest.raises(AdapterFileError, match="For a loralib file, give the path of the file"):
        formats.read(tmp_path)
