"""The format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

from lorakit.adapters.formats.peft.factors import NotExpressibleError
from lorakit.adapters.formats.peft.reading import option_notices, read_peft
from lorakit.adapters.formats.peft.writing import PeftForm, peft_form, write_peft

__all__ = [
    "NotExpressibleError",
    "PeftForm",
    "option_notices",
    "peft_form",
    "read_peft",
    "write_peft",
]
