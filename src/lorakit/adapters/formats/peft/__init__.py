"""The format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

from lorakit.adapters.formats.peft.adapter_config import CONFIG_NAME, expected_layers
from lorakit.adapters.formats.peft.factors import NotExpressibleError
from lorakit.adapters.formats.peft.reading import PICKLE_NAME, option_notices, read_peft
from lorakit.adapters.formats.peft.writing import TENSORS_NAME, PeftForm, peft_form, write_peft

__all__ = [
    "CONFIG_NAME",
    "PICKLE_NAME",
    "TENSORS_NAME",
    "NotExpressibleError",
    "PeftForm",
    "expected_layers",
    "option_notices",
    "peft_form",
    "read_peft",
    "write_peft",
]
