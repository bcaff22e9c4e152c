"""LoRA: its settings (method.py), the choice of a class for a layer (kinds.py), a file for each kind of layer."""

from lorakit.methods.lora.method import LoRA

__all__ = ["LoRA"]
