"""Read and write loralib files (microsoft/LoRA): state dicts with ``<layer>.lora_A`` and ``<layer>.lora_B``.

Such a file holds no alpha, rank or configuration. Supported are the layouts of the official examples:
RoBERTa, DeBERTa (also with its older names), GPT-2 with its fused ``c_attn`` (a dictionary with
``model_state_dict``, keys with the prefix ``module.``), GPT-2 of the first release, and files of whole
models.
"""

from lorakit.adapters.formats.loralib.reading import read_loralib
from lorakit.adapters.formats.loralib.writing import SUFFIXES, write_loralib

__all__ = ["SUFFIXES", "read_loralib", "write_loralib"]
