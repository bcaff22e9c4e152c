"""From a configuration and its batches to what a run of it holds and computes, without weights."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters import formats
from lorakit.compute.base import check_context, collator
from lorakit.compute.last_block import last_block
from lorakit.compute.objective import (
    ClassificationLoss,
    LanguageModellingLoss,
    Objective,
    RegressionLoss,
    SequenceToSequenceLoss,
    why_not_fused,
)
from lorakit.data import DataTask
from lorakit.methods import METHODS, Method
from lorakit.models.dtypes import compute_dtype
from lorakit.models.loading import Base, ModelHead
from lorakit.models.sources import ModelSource
from lorakit.planning.batches import Batches
from lorakit.planning.shape import Shape, base_bytes, build, new_mode, planning
from lorakit.planning.step import Step, run_step, shorten
from lorakit.tasks import Example, LanguageExample
from lorakit.training.config import TrainConfig
from lorakit.training.setup import (
    ADAPTER,
    attach_method,
    autocast_of,
    checkpoint_activations,
)

NEVER_PACKED = ("bloom", "falcon", "mpt")
"""Architectures whose attention counts positions by the row, whatever positions it is given."""


@dataclass(frozen=True)
class SimulatedRun:
    """What a run holds, in bytes, and computes, as far as its tensors tell."""

    method: str
    trained: int
    """Trained parameters."""
    total: int
    """Parameters of the base."""
    base: int
    adapter: int
    """Tensors that are trained, float32 masters."""
    optimizer: int
    """The two running means of AdamW."""
    fullest: Step
    """A forward and backward pass of the batch with the most tokens."""
    middle: Step
    """The same of a batch of middle size."""
    tokens: int
    """Tokens of the middle batch's examples, each counted in full."""
    computed: tuple[int, int]
    """Rows and width of the fullest batch, as it is computed."""
    packed: bool


def simulate(
    config: TrainConfig, shape: Shape, batches: Batches, *, device: torch.device
) -> SimulatedRun:
    """Set a run up as training does, on a model without weights, and run its steps.

    Raises:
        LorakitError: A setting does not fit the model or the data, as training would say.
    """
    task = batches.task
    fake, chosen = new_mode(), _method(config)
    with planning(fake):
        model = build(shape, config.base, _task(shape, task), len(task.labels), device=device)
        size, total = base_bytes(model), sum(p.numel() for p in model.parameters())
        base = Base(model, batches.tokenizer or _NO_TOKENIZER, _source(shape))
        adapters = attach_method(base, config, task, chosen)
        trained = adapters.trainable_parameters(ADAPTER)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        method = adapters.method(ADAPTER)
        buffers = sum(
            b.numel() * b.element_size()
            for m in adapters.modules(ADAPTER).values()
            for b in m.buffers()
        )
        model.train()
        objective = _objective(model, config, task)
        dtype = compute_dtype(config.base.dtype, device)
        autocast = autocast_of(dtype, adapters, model.device)
    check_context(base, [*batches.fullest, *batches.middle])
    packed = _packs(model, config, batches.fullest)
    make = collator(base, packed=packed)
    fullest, middle = make(batches.fullest), make(batches.middle)
    with planning(fake):
        short = shorten(model)
        accumulates = config.accumulation > 1
        step = run_step(
            model, short, objective, fullest, autocast=autocast, accumulates=accumulates
        )
        typical = step
        if middle["input_ids"].shape != fullest["input_ids"].shape:
            typical = run_step(
                model, short, objective, middle, autocast=autocast, accumulates=accumulates
            )
    count = sum(p.numel() for p in trained)
    rows, width = fullest["input_ids"].shape
    return SimulatedRun(
        method=type(method).__name__,
        trained=count,
        total=total,
        base=size,
        adapter=sum(p.numel() * p.element_size() for p in trained) + buffers,
        optimizer=8 * count,
        fullest=step,
        middle=typical,
        tokens=sum(map(len, batches.middle)),
        computed=(rows, width),
        packed=packed,
    )


def as_full(config: TrainConfig) -> TrainConfig:
    """The same run with full fine-tuning in its method's place."""
    methods = tuple(METHODS.values())
    sections = {
        f.name: type(value)()
        for f in dataclasses.fields(config)
        if isinstance(value := getattr(config, f.name), methods)
    }
    optimizer = dataclasses.replace(config.optimizer, lr_ratio=1.0)
    return dataclasses.replace(
        config,
        method="full",
        method_settings={},
        from_adapter=None,
        optimizer=optimizer,
        **sections,
    )


def _method(config: TrainConfig) -> Method:
    """What the run trains; of the adapter that it starts from, the weights are not needed."""
    if config.from_adapter is None:
        return config.chosen_method
    return formats.read(config.from_adapter).method


def _task(shape: Shape, task: DataTask) -> ModelHead:
    if task.kind == "classification":
        return "sequence-classification"
    if task.kind == "regression":
        return "regression"
    return "seq2seq-lm" if getattr(shape.config, "is_encoder_decoder", False) else "causal-lm"


def _source(shape: Shape) -> ModelSource:
    return ModelSource(name=shape.name, path_or_id=shape.name, kind="folder")


_NO_TOKENIZER: Any = SimpleNamespace(
    pad_token_id=0, eos_token_id=0, encode=lambda text, **options: []
)
"""What batches need of a tokenizer: it puts no token before a text."""


def _objective(model: PreTrainedModel, config: TrainConfig, task: DataTask) -> Objective:
    """The loss as training computes it, as far as a model's structure tells."""
    smoothing = config.label_smoothing
    block = None if config.compile else last_block(model)
    if task.kind == "regression":
        return RegressionLoss(last_block=block)
    if task.kind == "classification":
        return ClassificationLoss(label_smoothing=smoothing, last_block=block)
    if model.config.is_encoder_decoder:
        return SequenceToSequenceLoss(label_smoothing=smoothing)
    if not why_not_fused(model):
        return LanguageModellingLoss(path="fused", label_smoothing=smoothing, last_block=block)
    own = "logits_to_keep" in _accepted(model)
    return LanguageModellingLoss(
        path="own head" if own else "whole logits", label_smoothing=smoothing
    )


def _packs(model: PreTrainedModel, config: TrainConfig, examples: list[Example]) -> bool:
    """Whether training would pack batches, as far as a model's structure tells."""
    if not config.packing or model.config.is_encoder_decoder:
        return False
    if not isinstance(examples[0], LanguageExample) or model.config.model_type in NEVER_PACKED:
        return False
    return {"position_ids", "attention_mask"} <= _accepted(model.base_model)


def _accepted(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)
