"""What is trained: one file or folder for each method."""

from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.methods.module import AdapterModule, Method

__all__ = ["AdapterModule", "FullFineTuning", "LoRA", "Method"]
