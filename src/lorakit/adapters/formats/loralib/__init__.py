"""Files of loralib (microsoft/LoRA): a state dict with ``<layer>.lora_A`` and ``<layer>.lora_B``.

Such a file holds neither alpha nor rank nor a configuration. Read are the layouts of the official
examples: RoBERTa, DeBERTa (its older names too), GPT-2 with its fused ``c_attn`` (a dictionary with
``model_state_dict``, keys behind ``module.``), GPT-2 of the first release, and whole-model files.
"""

from lorakit.adapters.formats.loralib.reading import read_loralib
from lorakit.adapters.formats.loralib.writing import write_loralib

__all__ = ["read_loralib", "write_loralib"]
