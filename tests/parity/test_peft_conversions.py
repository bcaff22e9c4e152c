"""What PEFT converts when it loads a folder with transformers 5, in float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from logits import assert_differ, randomise
from peft_models import adapt, save
from peft_models import load as loaded_by_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

import lorakit
from lorakit.adapters import formats
from lorakit.errors import AdapterFileError

IDS = torch.arange(1, 13).view(2, 6)
ROUNDING = 1e-12
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same(model: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)


# --- names of transformers 4 ----------------------------------------------------------------------


def image_text_model(arch: str) -> PreTrainedModel:
    text, vision = {
        "gemma3": ("gemma3_text", "siglip_vision_model"),
        "llava": ("llama", "clip_vision_model"),
        "mistral3": ("mistral", "pixtral"),
        "paligemma": ("gemma", "siglip_vision_model"),
    }[arch]
    images = {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        arch,
        text_config=TEXT | {"model_type": text, "pad_token_id": 0},
        vision_config=SIZES | images | {"model_type": vision, "projection_dim": 16},
        image_token_index=60,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config).double().eval()


@pytest.mark.parametrize("arch", ["gemma3", "llava", "mistral3", "paligemma"])
def test_a_folder_with_names_of_transformers_4(arch: str, tmp_path: Path) -> None:
    base = image_text_model(arch)
    targets = [
        path
        for path, _ in base.named_modules()
        if "language_model" in path and path.endswith(("q_proj", "v_proj"))
    ]
    adapted = adapt(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    save(adapted, tmp_path)
    options = tmp_path / "adapter_config.json"
    written = json.loads(options.read_text())
    others = r".*(vision|visual).*"
    written |= {"target_modules": ["q_proj", "v_proj"], "exclude_modules": others}
    options.write_text(json.dumps(written))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    today, then = "model.language_model.", "language_model.model."
    renamed = {key.replace(f"model.{today}", f"model.{then}"): t for key, t in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, file)

    same(loaded_by_peft(image_text_model(arch), tmp_path), logits(adapted))
    model = image_text_model(arch)
    handle = lorakit.load(model, tmp_path)
    same(model, logits(adapted))
    handle.save(tmp_path / "ours")
    same(loaded_by_peft(image_text_model(arch), tmp_path / "ours"), logits(adapted))
    formats.write(formats.read(tmp_path), tmp_path / "converted")  # as `lorakit convert` does
    model = image_text_model(arch)
    lorakit.load(model, tmp_path / "converted")
    same(model, logits(adapted))

    save_file({k: t.clone() for k, t in (tensors | renamed).items()}, file)
    with pytest.raises(AdapterFileError, match=r"q_proj' has factors under two names"):
        lorakit.load(image_text_model(arch), tmp_path)


# --- names of experts -----------------------------------------------------------------------------


def mixture_of_experts() -> PreTrainedModel:
    experts = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("qwen3_moe", **TEXT, **experts, mlp_only_layers=[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.double().eval()


@pytest.mark.parametrize(
    ("targets", "is_told"),
    [
        (["q_proj"], False),
        (["q_proj", "gate_proj", "up_proj", "down_proj"], True),
        (["q_proj", "gate_proj"], True),  # PEFT refuses this folder
    ],
    ids=["attention", "all", "gate"],
)
def test_layers_that_peft_takes_for_experts(
    targets: list[str], is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT ignores the adapters of a dense block, whose layers have the experts' names of transformers 4."""
    model = mixture_of_experts()
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets=targets), seed=0)
    randomise(handle.trainable_parameters(), seed=1)
    handle.save(tmp_path / "adapter")
    expected = logits(model)
    message = "takes 'model.layers.0.mlp." in caplog.text and "for experts" in caplog.text
    assert message == is_told
    assert ("for experts" in (tmp_path / "adapter" / "README.md").read_text()) == is_told
    if len(targets) == 2:
        with pytest.raises(ValueError, match="without also targeting up_proj"):
            loaded_by_peft(mixture_of_experts(), tmp_path / "adapter")
    elif is_told:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys, and of the pattern that PEFT adds
            theirs = loaded_by_peft(mixture_of_experts(), tmp_path / "adapter")
        assert_differ(logits(theirs), expected)
    else:
        same(loaded_by_peft(mixture_of_experts(), tmp_path / "adapter"), expected)
    again = mixture_of_experts()
    lorakit.load(again, tmp_path / "adapter")
    same(again, expected)
