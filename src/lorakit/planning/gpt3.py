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
    base = BaseConfig(name=GPT3, dtype="bfloat16")
    with torch.device("meta"):
        model = build(shape_of(base), base, "causal-lm", 0, dtype=torch.bfloat16)
        counts = count_parameters(model, LoRA(rank=4, targets="attention.qv"))
    weights, adapter = PRINTED * HALF, counts.trainable * HALF
    moments = 2 * weights
    return (
        f"parameters: the paper prints {PRINTED / 1e6:,.1f} million; the shape of Brown et al. has "
        f"{counts.total / 1e6:,.1f} million",
        f"LoRA, r = 4 on q and v: 2 x 96 layers x 4 x (12,288 + 12,288) = {counts.trainable:,} parameters",
        f"checkpoint: {counts.trainable:,} x {HALF} bytes = {adapter / 1e6:.1f} MB = {adapter / 2**20:.1f} MiB "
        f"(the paper: 35 MB) instead of {weights / 1e9:,.1f} GB (350 GB)",
        f"fewer trained parameters: {PRINTED / 1e6:,.1f} / {counts.trainable / 1e6:.2f} million = "
        f"{PRINTED / counts.trainable:,.0f} times (10,000 times)",
        f"memory, full fine-tuning: weights {weights / 1e9:,.1f} + two moments {moments / 1e9:,.1f} GB at the same "
        f"precision = {(weights + moments) / 1e9:,.0f} GB; 1.2 TB with gradients and activations, "
        "which the paper does not itemise",
        f"memory, LoRA, without moments and gradients of frozen weights: {weights / 1e9:,.1f} GB (350 GB), "
        f"{1200 / (weights / 1e9):.2f} times less than 1.2 TB (3 times)",
    )
