"""The base model of the examples: `--model`, or by default a tiny random one."""

from __future__ import annotations

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

PAIRS = [
    {
        "prompt": "name: The Rice Boat, food: Indian\n",
        "completion": "The Rice Boat serves Indian food.",
    },
    {
        "prompt": "name: Blue Spice, area: riverside\n",
        "completion": "Blue Spice is by the riverside.",
    },
    {
        "prompt": "name: The Eagle, price: cheap\n",
        "completion": "The Eagle is a cheap place to eat.",
    },
    {"prompt": "name: Cotto, food: Italian\n", "completion": "Cotto is an Italian restaurant."},
]
TEXTS = [pair["prompt"] + pair["completion"] for pair in PAIRS]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="hub id or folder, for example HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--out", default="out/example", help="folder to write to")
    return parser.parse_args()


def load_base(name: str | None):
    """Return a causal language model and its tokenizer."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer = ByT5Tokenizer()  # byte-level: needs no vocabulary file
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer
