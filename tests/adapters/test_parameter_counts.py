"""Parameter counts without weights, against the paper's tables and the formula r (in + out)."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DebertaV2Config,
    GPT2Config,
    PretrainedConfig,
    RobertaConfig,
)

from lorakit.adapters.summary import count_parameters
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.config import LoRA


def on_meta(config: PretrainedConfig, factory=AutoModel):
    with torch.device("meta"):
        return factory.from_config(config)


def roberta(layers, width):
    return on_meta(
        RobertaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
        )
    )


def gpt2(layers, width, heads, positions=1024):
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=positions)
    return on_meta(config, AutoModelForCausalLM)


def deberta_xxl():
    return on_meta(
        DebertaV2Config(
            num_hidden_layers=48,
            hidden_size=1536,
            num_attention_heads=24,
            intermediate_size=6144,
            vocab_size=128100,
        )
    )


MODELS = {
    "roberta-base": lambda: roberta(12, 768),
    "roberta-large": lambda: roberta(24, 1024),
    "deberta-xxl": deberta_xxl,
    "gpt2-medium": lambda: gpt2(24, 1024, 16),
    "gpt2-large": lambda: gpt2(36, 1280, 20),
    "gpt3-175b": lambda: gpt2(96, 12288, 96, positions=2048),
}


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(name):
        if name not in built:
            built[name] = MODELS[name]()
        return built[name]

    return get


@pytest.mark.parametrize(
    ("model", "method", "trainable"),
    [
        ("roberta-base", LoRA(rank=8), 294_912),
        ("roberta-large", LoRA(rank=8), 786_432),
        ("deberta-xxl", LoRA(rank=8), 2_359_296),
        ("deberta-xxl", LoRA(rank=16), 4_718_592),
        ("gpt2-medium", LoRA(rank=4), 393_216),
        ("gpt2-large", LoRA(rank=4), 737_280),
        ("gpt2-medium", FullFineTuning(), 354_823_168),
        ("gpt2-large", FullFineTuning(), 774_030_080),
        ("gpt2-medium", FullFineTuning(top_layers=2), 25_192_448),
        ("roberta-base", FullFineTuning(), 124_645_632),
        ("roberta-large", FullFineTuning(), 355_359_744),
        ("gpt3-175b", FullFineTuning(), 174_604_259_328),
        ("gpt3-175b", LoRA(rank=2, targets="attention.v"), 4_718_592),
        ("gpt3-175b", LoRA(rank=1), 4_718_592),
        ("gpt3-175b", LoRA(rank=1, targets="attention"), 9_437_184),
        ("gpt3-175b", LoRA(rank=4), 18_874_368),
        ("gpt3-175b", LoRA(rank=8, targets="attention.q"), 18_874_368),
        ("gpt3-175b", LoRA(rank=2, targets="attention"), 18_874_368),
        ("gpt3-175b", LoRA(rank=8), 37_748_736),
        ("gpt3-175b", LoRA(rank=4, targets="attention"), 37_748_736),
        ("gpt3-175b", LoRA(rank=64), 301_989_888),
        ("gpt3-175b", LoRA(rank=64, targets="attention"), 603_979_776),
    ],
    ids=str,
)
def test_counts_of_the_paper(models, model, method, trainable):
    counts = count_parameters(models(model), method)
    assert counts.trainable == trainable
    assert sum(counts.by_layer.values()) == trainable


def test_counting_builds_no_weights_and_changes_nothing(models):
    model = models("gpt2-medium")
    before = set(dict(model.named_parameters()))
    count_parameters(model, LoRA(rank=4, targets="all-linear"))
    assert set(dict(model.named_parameters())) == before
    assert all(p.is_meta for p in model.parameters())
