"""Parameter counts without weights, against the paper's tables and the formula r (in + out), and file sizes."""

from pathlib import Path

import pytest
import tiny_models
import torch
from paper_models import paper_model

import lorakit
from lorakit.adapters.summary import count_parameters
from lorakit.methods.lora.method import LoRA


def test_counting_builds_no_weights_and_changes_nothing():
    model = paper_model("gpt2-medium")
    before = set(dict(model.named_parameters()))
    count_parameters(model, LoRA(rank=4, targets="all-linear"))
    assert set(dict(model.named_parameters())) == before
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=8, targets="all-linear", init="pissa"),
        LoRA(rank=8, targets="mlp", dora=True),
        lorakit.BottleneckAdapter(size=8),
        lorakit.PrefixLayer(prefix_length=1000),
        LoRA(rank=2, targets="embedding", tie_head=True),
    ],
    ids=["pissa", "dora", "bottleneck", "vectors", "tied head"],
)
def test_counting_draws_no_random_numbers(method):
    model = tiny_models.build("llama", tie_word_embeddings=True)
    state = torch.get_rng_state()
    counts = count_parameters(model, method)
    assert torch.equal(torch.get_rng_state(), state)
    adapters = lorakit.attach(model, method)
    summary = adapters.summary()
    assert counts == summary.counts
    assert repr(summary) == str(summary)  # in a notebook


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": "attention.qv"},
        {"targets": "attention", "train_modules": ("ln_f",)},
        {"targets": "attention.qv", "init": "pissa"},
        {"targets": ("attention.qv", "mlp"), "dora": True},
        {"targets": "attention.qv", "lora_bias": True},
        {"targets": ("attention.qv", "embedding"), "tie_head": True},
        {"targets": "attention.qv", "dora": True},
        {"targets": "attention.qv", "train_modules": ("wte", "lm_head")},
    ],
)
def test_the_file_has_the_size_of_the_summary(settings, tmp_path):
    """PEFT's form has zeros beside the slices of a fused projection, twice PiSSA's rank, each tied module."""
    adapters = lorakit.attach(tiny_models.build("gpt2"), LoRA(rank=2, **settings))
    assert adapters.summary().file_bytes == tensor_bytes(adapters.save(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "of_output", [{}, {"alpha_pattern": {"0.out_proj": 32.0}}, {"rank_pattern": {"0.out_proj": 3}}]
)
def test_the_file_of_an_attention_module_has_the_size_of_the_summary(of_output, tmp_path):
    """PEFT has one rank for both projections, so the smaller one is padded."""
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    adapters = lorakit.attach(model, LoRA(rank=2, targets="0", **of_output))
    assert adapters.summary().file_bytes == tensor_bytes(adapters.save(tmp_path / "adapter"))


def test_the_file_has_the_size_of_the_summary_without_peft(tmp_path):
    convolution = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2, dilation=2))
    both = lorakit.Combined(methods=(LoRA(rank=2, targets="attention.qv"), lorakit.BitFit()))
    for model, method in (
        (convolution, LoRA(rank=2, targets="0")),
        (tiny_models.build("gpt2"), both),
    ):
        adapters = lorakit.attach(model, method, name="a")
        folder = adapters.save(tmp_path / type(method).__name__)
        assert not (folder / "adapter_config.json").exists()
        assert adapters.summary().file_bytes == tensor_bytes(folder)


def tensor_bytes(folder: Path) -> int:
    """Return the bytes of a folder's safetensors files without their headers."""
    contents = [file.read_bytes() for file in folder.glob("*.safetensors")]
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in contents)
