"""Create, save and load the PEFT model of a case, with the equivalent configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
from covering_array import Case
from layouts import is_classifier
from logits import randomise
from torch import nn

EXPECTED_WARNINGS = (
    # PEFT saves the frozen table with an adapter on an embedding or a head, and warns.
    "Setting `save_embedding_layers` to `True`",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "fan_in_fan_out is set to ",  # PEFT corrects the setting for each layer
    "`is_gradient_checkpointing` is deprecated",
    "LoRA adapter added to ConvNd layer with groups > 1",
    "`lora_bias=True` was passed but the targeted layer",
    "Adapter 'default': ",  # PEFT takes the bias of lora_B for a matrix in shards
)
"""Beginnings of warnings that PEFT raises on correct use. Any other warning fails a test."""


@contextmanager
def expected_peft_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for beginning in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=re.escape(beginning))
        yield


def target_modules(case: Case) -> str | list[str]:
    """Return the targets for PEFT, which has no roles: paths, names, "all-linear" or a regular expression."""
    # PEFT's "all-linear" and its trained modules both include DistilBERT's pre_classifier: an error.
    if case.targets == "all-linear" and case.train != "head":
        return "all-linear"
    if case.targets == "names":
        return list(case.entries)
    if case.targets == "regex":
        return case.entries[0]
    return sorted(case.expected)


def configuration(case: Case) -> peft.LoraConfig:
    # With this task type PEFT trains the classification head by default.
    trains_classifier = is_classifier(case.head) and case.train == "head"
    return peft.LoraConfig(
        task_type="SEQ_CLS" if trains_classifier else None,
        r=2,
        lora_alpha=3.0,
        target_modules=target_modules(case),
        lora_dropout=case.dropout,
        bias=case.bias,
        use_rslora=case.scaling == "rslora",
        use_dora=case.dora,
        rank_pattern=case.rank_pattern,
        alpha_pattern=case.alpha_pattern,
        modules_to_save=list(case.train_modules) or None,
        init_lora_weights="gaussian" if case.init == "gaussian" else True,
    )


def adapt(model: nn.Module, config: peft.LoraConfig, *, seed: int = 1) -> peft.PeftModel:
    """Add a PEFT adapter to the model and randomise every trained tensor."""
    with expected_peft_warnings():
        adapted = peft.get_peft_model(model, config).eval()
    randomise((p for p in adapted.parameters() if p.requires_grad), seed)
    return adapted


def save(adapted: peft.PeftModel, folder: Path) -> Path:
    with expected_peft_warnings():
        adapted.save_pretrained(folder)
    return folder


def load(model: nn.Module, folder: Path) -> peft.PeftModel:
    """Load a PEFT model from a folder. A missing or unexpected key raises a warning, which is an error in tests."""
    with expected_peft_warnings():
        return peft.PeftModel.from_pretrained(model, folder).eval()
