"""Recognise adapter files of other tools, and name the way to use them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAMES = (
    (  # kohya, ComfyUI and diffusers, whose keys may also have PEFT's endings
        r"lora_(unet|te\d?)_|(unet|diffusion_model|text_encoder\w*\.text_model|pytorch_lora_weights)\."
        r"|.*(transformer_blocks|\.to_(q|k|v|out)|\.lora_(up|down))\b",
        "It is an adapter of a diffusion model, not in a layout that lorakit reads. Load it with diffusers, and write "
        "its tensors as a PEFT folder: get_peft_model_state_dict(pipe.unet) as adapter_model.safetensors, and "
        "pipe.unet.peft_config[NAME].save_pretrained(FOLDER).",
    ),
    (
        r".*\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b",
        "These are PEFT's names. Put the file into a folder as adapter_model.safetensors, or as adapter_model.bin if "
        "PyTorch wrote it, beside its adapter_config.json, and give the folder.",
    ),
    (
        r"(.*\.lora_[ab]|fine_tune_type|lora_parameters)$",
        "It is an adapter of MLX. Merge it there with mlx_lm.fuse, and use the merged model.",
    ),
    (
        r".*\.lora_[ab]\.weight$",
        "These are torchtune's names. Give the folder with the adapter_config.json that torchtune wrote.",
    ),
)
"""Names of tensors, options or files, and what to do with them."""


def hint_of(names: Iterable[str]) -> str:
    """Return what to do with a file or folder that has these names, after a space; "" if no tool is recognised."""
    hints = (hint for name in names for pattern, hint in _NAMES if re.match(pattern, name))
    return next((f" {hint}" for hint in hints), "")
