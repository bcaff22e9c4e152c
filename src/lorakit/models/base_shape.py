"""Configuration of a base model, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import BaseModelError, LorakitError
from lorakit.models.base_config import BaseConfig
from lorakit.models.locating import locate, read_config
from lorakit.models.model_classes import ModelHead, model_class
from lorakit.models.sources import ModelSource, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GPT3 = "gpt3-175b"
"""GPT-3 175B (Brown et al. 2020, table 2.1), whose weights are not public."""


@dataclass(frozen=True)
class Shape:
    """Name and configuration of a base model."""

    name: str
    note: str
    config: PretrainedConfig
    trust_remote_code: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return bool(getattr(self.config, "is_encoder_decoder", False))


def shape_of(base: BaseConfig) -> Shape:
    """Read the configuration of a base model, without its weights.

    Raises:
        BaseModelError: The model does not exist, or its configuration cannot be read.
    """
    from transformers import GPT2Config

    if base.name.lower() == GPT3:
        note = (
            "GPT-3 175B, built into lorakit: 96 layers of width 12,288, 96 heads, 2,048 positions"
        )
        config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)
        return Shape(GPT3, note, config)
    source = resolve(base.name, revision=base.revision)
    located = locate(source, base.trust_remote_code, weights=False)
    try:
        config = read_config(located)
    except LorakitError:
        raise
    # A configuration is untrusted input; its readers raise almost any exception.
    except Exception as error:
        raise BaseModelError(_refusal(source, error)) from error
    return Shape(source.name, source.note, config, base.trust_remote_code)


def build_model(shape: Shape, task: ModelHead, **settings: Any) -> PreTrainedModel:
    """Build a model with a head for `task` and random weights; `settings` are those of `from_config`.

    Raises:
        BaseModelError: The architecture has no such head, or does not support a size.
    """
    trusts = shape.trust_remote_code  # None would make transformers ask on standard input
    try:
        return model_class(task).from_config(shape.config, trust_remote_code=trusts, **settings)
    # Architectures raise almost any exception for an unsupported head or size.
    except Exception as error:
        message = " ".join(str(error).split())
        if message.startswith("Unrecognized configuration class"):
            message = f"transformers has no head for the task '{task}' on this architecture"
        raise BaseModelError(
            f"'{shape.name}' cannot be built from its configuration: {message[:300].rstrip('.')}. Update "
            "transformers, or name another model."
        ) from error


def _refusal(source: ModelSource, error: Exception) -> str:
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return (
            f"'{source.name}' needs Python code of its own. Read that code, and if you trust it, set "
            "base.trust_remote_code."
        )
    return (
        f"The configuration of '{source.name}' cannot be read ({type(error).__name__}: {message[:300]}). "
        "Download or copy it again, or update transformers."
    )
