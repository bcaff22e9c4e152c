"""Training methods: one file or folder for each.

A method is a frozen dataclass of settings and imports no torch; the modules that it adds are imported on first use.
"""

from typing import TYPE_CHECKING, Any

from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.combined import Combined
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.methods.method import Method
from lorakit.methods.prefix import PrefixEmbedding, PrefixLayer
from lorakit.methods.registry import METHODS, use_method

if TYPE_CHECKING:
    from lorakit.methods.module import AdapterModule

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


if not TYPE_CHECKING:  # a type checker would take any misspelt name for this one

    def __getattr__(name: str) -> Any:
        if name == "AdapterModule":
            from lorakit.methods.module import AdapterModule

            return AdapterModule
        raise AttributeError(f"module 'lorakit.methods' has no attribute '{name}'")
