"""The paper's figures for GPT-3 175B (Hu et al. 2021, sections 1, 4.2 and 6), and how they are calculated."""

from __future__ import annotations

import torch

from lorakit.adapters import count_parameters
from lorakit.methods import LoRA
from lorakit.models.base_config import BaseConfig
from lorakit.models.base_shape import GPT3, shape_of
from lorakit.planning.shape import build

PRINTED = 175_255.8e6
"""Parameters of full fine-tuning in the paper's Table 4."""

HALF = 2
"""Bytes per float16 number."""


def arithmetic() -> tuple[str, ...]:
    """Return one line per figure of the paper with its calculation. Counts come from the model's shape."""
    total, trainable = _counts()
    weights, adapter = PRINTED * HALF, trainable * HALF
    moments = 2 * weights
    return (
        f"parameters: the paper prints {PRINTED / 1e6:,.1f} million; the shape of Brown et al. has "
        f"{total / 1e6:,.1f} million",
        f"LoRA, r = 4 on q and v: 2 x 96 layers x 4 x (12,288 + 12,288) = {trainable:,} parameters",
        f"checkpoint: {trainable:,} x {HALF} bytes = {adapter / 1e6:.1f} MB = {adapter / 2**20:.1f} MiB "
        f"(the paper: 35 MB) instead of {weights / 1e9:,.1f} GB (350 GB)",
        f"fewer trained parameters: {PRINTED / 1e6:,.1f} / {trainable / 1e6:.2f} million = "
        f"{PRINTED / trainable:,.0f} times (10,000 times)",
        f"memory, full fine-tuning: weights {weights / 1e9:,.1f} + two moments {moments / 1e9:,.1f} GB at the same "
        f"precision = {(weights + moments) / 1e9:,.0f} GB; 1.2 TB with gradients and activations, "
        "which the paper does not itemise",
        f"memory, LoRA, without moments and gradients of frozen weights: {weights / 1e9:,.1f} GB (350 GB), "
        f"{1200 / (weights / 1e9):.2f} times less than 1.2 TB (3 times)",
    )


def _counts() -> tuple[int, int]:
    """Return the parameters of the model, and those of LoRA with r = 4 on q and v.

    They are counted on models of one and two of its equal blocks, which are quick to build.
    """
    base = BaseConfig(name=GPT3, dtype="bfloat16")
    shape = shape_of(base)
    layers, found = shape.config.num_hidden_layers, []
    for count in (1, 2):
        shape.config.num_hidden_layers = count
        with torch.device("meta"):
            model = build(shape, base, "causal-lm", 0, dtype=torch.bfloat16)
        found.append(count_parameters(model, LoRA(rank=4, targets="attention.qv")))
    one, two = found
    others = layers - 1
    return (
        one.total + others * (two.total - one.total),
        one.trainable + others * (two.trainable - one.trainable),
    )
