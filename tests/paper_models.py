"""The models of the paper's tables on the meta device, without weights."""

from functools import cache

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)


def on_meta(config: PretrainedConfig, factory=AutoModel) -> PreTrainedModel:
    with torch.device("meta"):
        return factory.from_config(config)


def roberta(layers: int, width: int, factory=AutoModel) -> PreTrainedModel:
    return on_meta(
        RobertaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            num_labels=3,
        ),
        factory,
    )


def gpt2(layers: int, width: int, heads: int, positions: int = 1024) -> PreTrainedModel:
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=positions)
    return on_meta(config, AutoModelForCausalLM)


def deberta_xxl() -> PreTrainedModel:
    return on_meta(
        DebertaV2Config(
            num_hidden_layers=48,
            hidden_size=1536,
            num_attention_heads=24,
            intermediate_size=6144,
            vocab_size=128100,
        )
    )


_MODELS = {
    "roberta-base": lambda: roberta(12, 768),
    "roberta-base, 3 labels": lambda: roberta(12, 768, AutoModelForSequenceClassification),
    "roberta-large": lambda: roberta(24, 1024),
    "roberta-large, 3 labels": lambda: roberta(24, 1024, AutoModelForSequenceClassification),
    "deberta-xxl": deberta_xxl,
    "gpt2-medium": lambda: gpt2(24, 1024, 16),
    "gpt2-large": lambda: gpt2(36, 1280, 20),
    "gpt3-175b": lambda: gpt2(96, 12288, 96, positions=2048),
}


@cache
def paper_model(name: str) -> PreTrainedModel:
    """Return a model of the paper by name. It is cached, so do not change it."""
    return _MODELS[name]()
