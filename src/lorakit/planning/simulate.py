"""From a configuration and its batches to what a run of it holds and computes, without weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from lorakit.adapters import formats
from lorakit.compute.base import check_context
from lorakit.compute.batching import collator
from lorakit.compute.computation import choose_computation
from lorakit.data import DataTask
from lorakit.methods import METHODS, Method
from lorakit.models.dtypes import compute_dtype
from lorakit.models.faster import make_faster
from lorakit.models.loading import Base, ModelHead
from lorakit.models.sources import ModelSource
from lorakit.planning.batches import Batches
from lorakit.planning.shape import Shape, base_bytes, build, new_mode, planning
from lorakit.planning.step import Step, run_step, shorten
from lorakit.training.config import TrainConfig
from lorakit.training.setup import (
    ADAPTER,
    attach_method,
    autocast_of,
    checkpoint_activations,
)


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
        computation = choose_computation(
            model,
            task,
            training=True,
            packing=config.packing,
            compiled=config.compile,
            label_smoothing=config.label_smoothing,
        )
        if computation.faster == "layers":
            make_faster(model)
        dtype = compute_dtype(config.base.dtype, device)
        autocast = autocast_of(dtype, adapters, model.device)
    check_context(base, [*batches.fullest, *batches.middle])
    make = collator(base, packed=computation.packed)
    fullest, middle = make(batches.fullest), make(batches.middle)
    with planning(fake):
        short = shorten(model)
        accumulates = config.accumulation > 1
        step = run_step(
            model, short, computation.objective, fullest, autocast=autocast, accumulates=accumulates
        )
        typical = step
        if middle["input_ids"].shape != fullest["input_ids"].shape:
            typical = run_step(
                model,
                short,
                computation.objective,
                middle,
                autocast=autocast,
                accumulates=accumulates,
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
        packed=computation.packed,
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
