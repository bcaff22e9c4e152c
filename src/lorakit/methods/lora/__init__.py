"""LoRA: its settings (config), the choice of layers (build), and one file for each kind of layer."""

from lorakit.methods.lora.config import LoRA
from lorakit.methods.lora.layer import LoRALayer

__all__ = ["LoRA", "LoRALayer"]
