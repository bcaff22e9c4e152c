"""What is trained: one file or folder for each method."""

from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.combined import Combined
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.methods.module import AdapterModule, Method
from lorakit.methods.prefix import PrefixEmbedding, PrefixLayer
from lorakit.methods.registry import METHODS, use_method

__all__ = [
    "METHODS",
    "AdapterModule",
    "BitFit",
    "BottleneckAdapter",
    "Combined",
    "FullFineTuning",
    "LoRA",
    "Method",
    "PrefixEmbedding",
    "PrefixLayer",
    "use_method",
]
