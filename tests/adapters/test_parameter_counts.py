"""Parameter counts without weights, against the paper's tables and the formula r (in + out), and file sizes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import torch
from paper_models import paper_model
from real_tensors import RealTensors

import lorakit
from lorakit.adapters.summary import count_parameters
from lorakit.errors import ConfigurationError
from lorakit.methods import AdapterModule
from lorakit.methods.lora.method import LoRA


def test_counting_builds_no_weights_and_changes_nothing():
    model = paper_model("gpt2-medium")
    before = set(dict(model.named_parameters()))
    count_parameters(model, LoRA(rank=4, targets="all-linear"))
    assert set(dict(model.named_parameters())) == before
    assert all(p.is_meta for p in model.parameters())


def test_a_compiled_model_has_the_names_of_its_model():
    model = tiny_models.build("llama")
    compiled = torch.compile(model, backend="eager")
    assert count_parameters(compiled, LoRA()) == count_parameters(model, LoRA())
    assert str(lorakit.targets(compiled)) == str(lorakit.targets(model))


def test_the_class_of_a_method_is_no_method():
    with pytest.raises(ConfigurationError, match="it must be a method with its settings"):
        count_parameters(tiny_models.build("llama"), LoRA)


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
def test_counting_allocates_nothing_and_draws_no_random_numbers(method):
    model = tiny_models.build("llama", tie_word_embeddings=True)
    state = torch.get_rng_state()
    with RealTensors() as real:
        counts = count_parameters(model, method)
    assert real.largest == 0
    assert torch.equal(torch.get_rng_state(), state)
    adapters = lorakit.attach(model, method)
    summary = adapters.summary()
    assert counts == summary.counts
    assert repr(summary) == str(summary)  # in a notebook


@dataclass(frozen=True)
class OneVectorForAllBlocks:
    """Train one vector that all blocks share."""

    def modules(self, model, dtype=None):
        vector = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
        modules = {}
        for path in ("model.layers.0.mlp", "model.layers.1.mlp"):
            modules[path] = AdapterModule()
            modules[path].vector = vector
        return modules

    def trained_parameters(self, model):
        return []


def test_a_shared_parameter_counts_once():
    model = tiny_models.build("llama")
    counts = count_parameters(model, OneVectorForAllBlocks())
    assert counts.by_layer == {"model.layers.0.mlp": 4}
    assert lorakit.attach(model, OneVectorForAllBlocks()).summary().counts == counts


@dataclass(frozen=True)
class AsWideAsTheWeight:
    """Train as many numbers as the weight has entries above zero."""

    def modules(self, model, dtype=None):
        module = AdapterModule()
        count = int((model.lm_head.weight > 0).sum())
        module.numbers = torch.nn.Parameter(torch.randn(count, dtype=dtype))
        return {"lm_head": module}

    def trained_parameters(self, model):
        return []


def test_a_method_that_reads_numbers_is_counted_too():
    model = tiny_models.build("llama")
    state = torch.get_rng_state()
    counts = count_parameters(model, AsWideAsTheWeight())
    assert counts.trainable == int((model.lm_head.weight > 0).sum())
    assert torch.equal(torch.get_rng_state(), state)


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
