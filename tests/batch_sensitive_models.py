"""Models whose scores after a prompt change with the other rows of its batch."""

from __future__ import annotations

import torch
import transformers
from tiny_models import build
from tiny_tokenizer import tiny_tokenizer

VOCABULARY = len(tiny_tokenizer())
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EQUAL = "only prompts of equal length share a batch"
READS_PADDING = {
    "a state": (
        transformers.RecurrentGemmaConfig(
            **_IDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            lru_width=32,
            attention_window_size=64,
        ),
        EQUAL,
    ),
    "a decoder without a mask": (
        transformers.ProphetNetConfig(
            **_IDS,
            hidden_size=32,
            num_decoder_layers=2,
            num_decoder_attention_heads=4,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
        ),
        EQUAL,
    ),
    # transformers broadcasts the state of each row over all rows.
    "a state of all rows": (
        transformers.RwkvConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=64
        ),
        "each prompt is computed alone",
    ),
}
"""Configurations, and the words of lorakit's notice."""


def spread(config):
    """Return a model whose weights are so large that padding changes its texts."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
            else:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


SHORT = 64
"""Tokens for which LongRoPE uses its short factors."""


def longrope_model():
    """Return a model whose long factors change every text."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 6.0, 10.0, 14.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    rope["original_max_position_embeddings"] = SHORT
    model = build(
        "phi3",
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        original_max_position_embeddings=SHORT,
        rope_parameters=rope,
    )
    model.generation_config.eos_token_id = None
    return model
