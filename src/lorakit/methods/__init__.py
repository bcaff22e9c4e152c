"""What is trained: one file or folder for each method."""

from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.methods.module import AdapterModule, Method

METHODS: dict[str, type[Method]] = {
    kind.__name__: kind for kind in (BitFit, BottleneckAdapter, FullFineTuning, LoRA)
}
"""Every method by the name under which a file records it."""

__all__ = [
    "METHODS",
    "AdapterModule",
    "BitFit",
    "BottleneckAdapter",
    "FullFineTuning",
    "LoRA",
    "Method",
]
