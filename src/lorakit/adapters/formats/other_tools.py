"""Recognise adapter files of other tools, and name the way to use them."""

from __future__ import annotations

import re
from collections.abc import Collection

GGUF = ".gguf"
DIFFUSERS = "pytorch_lora_weights.safetensors"

_DIFFUSION = "It is an adapter of a diffusion model, which lorakit does not support."
_MLX = "It is an adapter of MLX. Merge it there with mlx_lm.fuse, and use the merged model."

_KEYS = (
    # kohya and diffusers; the latter's keys may also have PEFT's endings
    (
        r"lora_(unet|te)|(unet|text_encoder\w*)\.|.*transformer_blocks|.*\.lora_(up|down)",
        _DIFFUSION,
    ),
    (
        r".*\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b",
        "These are PEFT's names. Put the file into a folder as adapter_model.safetensors, or as adapter_model.bin if "
        "PyTorch wrote it, beside its adapter_config.json, and give the folder.",
    ),
    (r".*\.lora_[ab]$", _MLX),
    (
        r".*\.lora_[ab]\.weight$",
        "These are torchtune's names. Give the folder with the adapter_config.json that torchtune wrote.",
    ),
)


def hint_of_key(key: str) -> str:
    """Return what to do with a file that has this key of a factor, after a space; "" if no tool is recognised."""
    return next((f" {hint}" for pattern, hint in _KEYS if re.match(pattern, key)), "")


def hint_of_options(names: Collection[str]) -> str:
    """Return `hint_of_key` for an adapter_config.json without a peft_type."""
    return f" {_MLX}" if "lora_parameters" in names or "fine_tune_type" in names else ""


def hint_of_files(names: Collection[str]) -> str:
    """Return `hint_of_key` for a folder of these files without the configuration of an adapter."""
    return f" {_DIFFUSION}" if DIFFUSERS in names else ""


SHARDED = (
    "it was saved while DeepSpeed's ZeRO-3 or FSDP had the weights in shards. In a checkpoint of DeepSpeed, run "
    "zero_to_fp32.py with --exclude_frozen_parameters, and put its file beside adapter_config.json as "
    "adapter_model.bin. Otherwise save the adapter again with gathered weights."
)
"""What is wrong with an empty factor, and what to do."""
