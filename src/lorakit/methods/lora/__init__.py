"""LoRA: its settings (method.py), the class for each layer type (kinds.py), and one file for each class."""

from lorakit.methods.lora.method import LoRA

__all__ = ["LoRA"]
