"""The adapters of a model: attach, activate, merge, save, load, detach."""

from lorakit.adapters.attach import attach
from lorakit.adapters.handle import Adapters, handle_of
from lorakit.adapters.loading import load
from lorakit.adapters.peft_model import from_peft
from lorakit.adapters.summary import Counts, Summary, count_parameters

__all__ = [
    "Adapters",
    "Counts",
    "Summary",
    "attach",
    "count_parameters",
    "from_peft",
    "handle_of",
    "load",
]
