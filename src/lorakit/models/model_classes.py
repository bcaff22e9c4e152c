"""The classes of ``transformers`` for a model, by its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ModelHead = Literal[
    "causal-lm",
    "seq2seq-lm",
    "masked-lm",
    "sequence-classification",
    "regression",
    "image-classification",
    "base",
]
"""The model's head, by the task it is for."""

MODEL_CLASSES: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "base": "AutoModel",
}
_BY_SUFFIX: dict[str, ModelHead] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "image-classification",
}
"""Head of a model, by the suffix of its class name."""


def head_of_class(class_name: str, *, is_encoder_decoder: bool) -> ModelHead | None:
    """Return the head of a model class by its name; None if the name ends in none of the known heads.

    Decoders of images and text, such as Gemma 3, have the suffix of encoder-decoders; `is_encoder_decoder` tells them
    apart.
    """
    for suffix, head in _BY_SUFFIX.items():
        if class_name.endswith(suffix):
            return "causal-lm" if head == "seq2seq-lm" and not is_encoder_decoder else head
    return None


def model_class(task: ModelHead) -> Any:
    """Return the auto class of transformers for `task`."""
    import transformers

    return getattr(transformers, MODEL_CLASSES[task])


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the architecture is trained on masked tokens and has no decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes
