"""Adapters on stacked experts (PEFT's `target_parameters`) against PEFT, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from logits import assert_differ, assert_same
from peft_models import adapt, load, save
from random_adapters import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit
from lorakit.analysis.deltas import base_matrix, deltas_of, read
from lorakit.errors import AdapterFileError

# PEFT 0.21 compares the patterns with the adapted modules alone. It does apply them to parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")

ARCHITECTURES = ("Qwen3Moe", "mixtral", "GptOss")
ENTRIES = ["experts.gate_up_proj", "experts.down_proj"]
TOLERANCE = 1e-6
"""Of float64 outputs: transformers computes some norms and softmaxes in float32."""


def mixture(arch: str = "Qwen3Moe") -> nn.Module:
    model = tiny_models.build(arch).double().eval()
    model.config._experts_implementation = "eager"  # grouped products do not support float64
    return model


def output(model: nn.Module) -> Tensor:
    ids = torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        return model(input_ids=ids)[0]


def made_by_peft(folder: Path, arch: str = "Qwen3Moe", **options: Any) -> Tensor:
    """Save an adapter of PEFT on the experts, and return the model's output with it."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": ENTRIES}
    model = adapt(mixture(arch), peft.LoraConfig(**{**settings, **options}))
    save(model, folder)
    return output(model)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "o_proj"]},
        {"target_parameters": ["experts.down_proj"], "use_rslora": True},
        {"rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"experts.gate_up_proj": 5}},
    ],
    ids=str,
)
def test_an_adapter_of_peft_is_read(arch, options, tmp_path):
    expected = made_by_peft(tmp_path / "theirs", arch, **options)
    model = mixture(arch)
    assert_differ(expected, output(model))
    handle = lorakit.load(model, tmp_path / "theirs", trainable=True)
    assert_same(output(model), expected, TOLERANCE)
    handle.save(tmp_path / "ours")
    again = mixture(arch)
    lorakit.load(again, tmp_path / "ours")
    assert_same(output(again), expected, TOLERANCE)
    # The method in the file selects the same layers.
    fresh = mixture(arch)
    lorakit.attach(fresh, handle.method(handle.names[0]))
    adapted = {n for n, _ in fresh.named_parameters() if "lora_" in n}
    name = handle.names[0]
    assert {n.replace(".default", f".{name}") for n in adapted} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"targets": "experts"},
        {"targets": ["attention.qv", "experts.gate_up_proj"], "scaling": "rslora"},
        {"targets": "all-linear", "rank_pattern": {"down_proj": 1}},
        {"targets": "experts", "init": "pissa"},
    ],
    ids=str,
)
def test_peft_reads_an_adapter_of_lorakit(arch, options, tmp_path):
    model = mixture(arch)
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, alpha=3, **options), seed=0)
    randomise(handle)
    expected = output(model)
    assert_differ(expected, output(mixture(arch)))
    handle.save(tmp_path / "ours")
    record = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert all(entry.startswith("experts.") for entry in record["target_parameters"])
    theirs = load(mixture(arch), tmp_path / "ours")
    # PEFT rounds the product to the dtype of the weight at another place.
    assert_same(output(theirs), expected, 1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_live_model_of_peft_is_converted(arch):
    options = {"target_modules": ["q_proj"], "target_parameters": ENTRIES}
    theirs = adapt(mixture(arch), peft.LoraConfig(r=2, lora_alpha=3, **options))
    expected = output(theirs)
    handle = lorakit.from_peft(theirs)
    assert_same(output(handle.model), expected, 1e-5)
    assert not any(type(m).__module__.startswith("peft.") for m in handle.model.modules())


def test_names_without_a_module_beside_shared_experts(tmp_path):
    options = {"target_parameters": ["down_proj"], "target_modules": ["shared_experts.down_proj"]}
    expected = made_by_peft(tmp_path, "Glm4Moe", **options)
    model = mixture("Glm4Moe")
    lorakit.load(model, tmp_path)
    assert_same(output(model), expected, 1e-5)


def test_square_experts_in_a_file_of_peft_are_not_measured_against_the_base(tmp_path):
    """The file does not say whether gpt-oss stores them as (in, out)."""
    made_by_peft(tmp_path, target_parameters=["experts.down_proj"])
    stored = read(tmp_path)
    delta = next(iter(deltas_of(stored).values()))
    with pytest.raises(AdapterFileError, match=r"are square, and a file of PEFT"):
        base_matrix(stored, delta, {delta.path: torch.zeros(4, 16, 16)})


def changed(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ENTRIES[:1]}, "has factors for 2 weights, and target_parameters"),
        ({"target_parameters": []}, r"rank 2|disagree"),
        ({"target_parameters": [*ENTRIES, "experts.other"]}, "has factors for 2 weights"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters"),
        ({"target_parameters": [*ENTRIES, ""]}, "lists an empty name"),
        ({"r": 3}, "gives it rank 3"),
    ],
    ids=str,
)
def test_options_and_tensors_that_disagree(options, message, tmp_path):
    made_by_peft(tmp_path)
    changed(tmp_path, **options)
    with pytest.raises(AdapterFileError, match=message):
        lorakit.load(mixture(), tmp_path)


def test_factors_of_another_number_of_experts(tmp_path):
    made_by_peft(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    cut = {k: t[:4] if "lora_A" in k else t[:, :4] for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in cut.items()}, file)
    with pytest.raises(
        AdapterFileError, match=r"shape \(4, 32\), and this model's .* needs \(8, 32"
    ):
        lorakit.load(mixture(), tmp_path)


def test_an_adapter_on_other_parameters_is_refused_by_name(tmp_path):
    made_by_peft(tmp_path, target_parameters=["q_proj.weight"])
    with pytest.raises(
        AdapterFileError, match=r"q_proj\.weight', but of the parameters \(target_parameters\)"
    ):
        lorakit.load(mixture(), tmp_path)
