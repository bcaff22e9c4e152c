"""PEFT's side of a case: the configuration that says the same, and live models of PEFT."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from covering_array import Case
from layouts import is_classifier
from logits import randomise
from peft.tuners.lora.layer import MultiheadAttention
from torch import nn

PEFT_SPEAKS = (
    # PEFT saves the frozen table beside an adapter on an embedding or a head, and says so.
    "Setting `save_embedding_layers` to `True`",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "fan_in_fan_out is set to ",  # PEFT corrects itself, layer by layer
    "`is_gradient_checkpointing` is deprecated",
    "LoRA adapter added to ConvNd layer with groups > 1",
)
"""Beginnings of warnings that PEFT gives on correct use; any other one fails a test."""


@contextmanager
def speaking_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        for beginning in PEFT_SPEAKS:
            warnings.filterwarnings("ignore", message=re.escape(beginning))
        yield


def _counts_out_proj_twice() -> bool:
    net = nn.Sequential(nn.MultiheadAttention(2, 1, bias=False)).eval()
    model = peft.get_peft_model(net, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    layer = model.base_model.model[0]
    out = layer.base_layer.out_proj
    before = out.weight.detach().clone()
    with torch.no_grad():
        out.lora_A["default"].weight.fill_(1.0)
        out.lora_B["default"].weight.fill_(1.0)
        layer.merge()
    return bool((out.weight - before > 1.5).all())


@functools.cache
def counts_out_proj_twice() -> bool:
    """Whether this PEFT computes ``W + 2 dW`` in the output projection of an attention module.

    It does up to 0.21.2 at least (https://github.com/huggingface/peft/pull/3774).
    """
    with speaking_peft(), torch.random.fork_rng(devices=[]):
        return _counts_out_proj_twice()


def _count_out_proj_once(adapted: peft.PeftModel) -> peft.PeftModel:
    """Halve PEFT's live scaling there, which no file holds: it then computes what the file says."""
    for module in adapted.modules():
        if isinstance(module, MultiheadAttention) and counts_out_proj_twice():
            scaling = module.base_layer.out_proj.scaling
            scaling.update({name: value / 2 for name, value in scaling.items()})
    return adapted


def target_modules(case: Case) -> str | list[str]:
    """PEFT has no roles: paths, names, its own "all-linear" or a regular expression."""
    # PEFT's "all-linear" takes DistilBERT's pre_classifier, as its trained modules do: an error.
    if case.targets == "all-linear" and case.train != "head":
        return "all-linear"
    if case.targets == "names":
        return list(case.entries)
    if case.targets == "regex":
        return case.entries[0]
    return sorted(case.expected)


def configuration(case: Case) -> peft.LoraConfig:
    # With this task type PEFT trains the classification head without being asked.
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
    """PEFT's adapter on the model, every tensor that it trains random."""
    with speaking_peft():
        adapted = _count_out_proj_once(peft.get_peft_model(model, config).eval())
    randomise((p for p in adapted.parameters() if p.requires_grad), seed)
    return adapted


def save(adapted: peft.PeftModel, folder: Path) -> Path:
    with speaking_peft():
        adapted.save_pretrained(folder)
    return folder


def load(model: nn.Module, folder: Path) -> peft.PeftModel:
    """PEFT's model of a folder; a missing or surplus key is a warning, and so an error."""
    with speaking_peft():
        return _count_out_proj_once(peft.PeftModel.from_pretrained(model, folder).eval())
