"""LoRA: its settings (method.py), the forms of A and B (forms.py), and the module for each layer type (kinds.py)."""

from lorakit.methods.lora.method import LoRA

__all__ = ["LoRA"]
