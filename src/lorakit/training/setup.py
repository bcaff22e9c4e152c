"""From a configuration to everything the loop works with: data, base, adapter, loss, step plan."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import storage
from lorakit.adapters import Adapters, attach
from lorakit.adapters.formats import base_record
from lorakit.compute.base import check_context, open_base
from lorakit.compute.batching import Collate, collator
from lorakit.compute.computation import Computation, choose_computation, confirm_computation
from lorakit.compute.objective import Objective, RegressionLoss
from lorakit.data import DataTask, ExampleSet, load_examples, task_of
from lorakit.data.batches import BatchSampler
from lorakit.errors import ConfigurationError
from lorakit.methods import Method
from lorakit.methods.trained import with_head
from lorakit.models.compiling import compile_blocks
from lorakit.models.dtypes import compute_dtype, dtype_name
from lorakit.models.heads import classification_head
from lorakit.models.loading import Base
from lorakit.tasks import Example, Task, file_of, generic_task, task_type
from lorakit.training.checkpoint import Inputs, State
from lorakit.training.config import TrainConfig
from lorakit.training.environment import versions
from lorakit.training.mixed_precision import let_norms_compute
from lorakit.training.schedule import StepPlan, rate_factor
from lorakit.training.warm_start import warm_start

T = TypeVar("T")

ADAPTER = "default"
"""Name of the trained adapter on its model."""


@dataclass(kw_only=True)
class Job:
    """What a run works with, once its settings have become objects."""

    config: TrainConfig
    base: Base
    adapters: Adapters
    collate: Collate
    train: ExampleSet
    validation: ExampleSet | None
    scored: Sequence[Example]
    """The validation examples that evaluations during training score."""
    computation: Computation
    plan: StepPlan

    @property
    def model(self) -> PreTrainedModel:
        """The base model, with the adapter on it."""
        return self.base.model

    @property
    def objective(self) -> Objective:
        """The training loss."""
        return self.computation.objective

    @property
    def task(self) -> type[Task]:
        """What is trained and scored."""
        return task_type(self.train.task)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""
        return compute_dtype(self.config.base.dtype, self.device)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the trained tensors, and the frozen start that PiSSA subtracts."""
        buffers = {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if f".adapters.{ADAPTER}." in name
        }
        return {**self.parameters, **buffers}

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the run's precision where trained tensors are float32 masters of base weights.

        Thin matrices need no autocast, since their product casts them itself.
        """
        return autocast_of(self.dtype, self.adapters, self.device)

    def rate_factor(self, step: int) -> float:
        """Return the factor on the peak learning rate after `step` finished steps."""
        settings = self.config.optimizer
        return rate_factor(
            step, total=self.plan.total, warmup=settings.warmup, schedule=settings.schedule
        )

    def is_over(self, state: State) -> bool:
        """Return whether the last step is done, or early stopping has made it so."""
        return state.stopped_early or state.step >= self.plan.total

    def evaluates_after(self, step: int) -> bool:
        """Return whether the validation data is scored after `step` finished steps."""
        every = self.config.evaluation.every or self.plan.steps_per_epoch
        return step % every == 0 or step == self.plan.total

    def saves_after(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` finished steps; the last is written anyway."""
        every = self.config.checkpoints.every or self.plan.steps_per_epoch
        return step % every == 0 and step < self.plan.total

    @property
    def inputs(self) -> Inputs:
        """The base, the data and a task's own file as they were read, by which a resumed run knows them again."""
        sets = {"train data": self.train, "validation data": self.validation}
        weights = base_record(self.model).weights
        file = file_of(self.train.task)
        return {
            "base model": {
                "source": self.config.base.name,
                "sha256": weights.exact or weights.dtype,
            },
            **{
                split: {"source": data.report.source, "sha256": data.sha256}
                for split, data in sets.items()
                if data is not None
            },
            **({"task": {"source": str(file), "sha256": storage.sha256(file)}} if file else {}),
        }

    def save_adapter(self, folder: Path, state: State) -> None:
        """Write the adapter as it is now, with how it was made."""
        sets = {"train": self.train, "validation": self.validation}
        provenance = {
            "config": self.config.as_dict(),
            "data": {
                split: {"source": data.report.source, "sha256": data.sha256, "examples": len(data)}
                for split, data in sets.items()
                if data is not None
            },
            "task": self.task.name,
            "generic_task": generic_task(self.task).name,
            "encoding": self.config.data.encoding or next(iter(self.task.encodings), None),
            "labels": list(self.train.labels),
            "seed": self.config.seed,
            "versions": versions(),
            "step": state.step,
            "train_loss": state.train_loss,
            "scores": state.scores,
            "scores_before": state.scores_before,
        }
        self.adapters.save(
            folder, ADAPTER, tokenizer=self.base.tokenizer, provenance=provenance, overwrite=True
        )

    def describe(self) -> list[str]:
        """Return what the user should know at the start, line by line."""
        lines = [f"base      {self.base.source.name}", f"train     {self.train.report}"]
        lines[1:1] = [
            f"          {note}" for note in (self.base.source.note, *self.base.notices) if note
        ]
        if self.validation is not None:
            part = (
                ""
                if len(self.scored) == len(self.validation)
                else f" ({len(self.scored):,} scored)"
            )
            lines.append(f"held out  {self.validation.report}{part}")
        trained = sum(p.numel() for p in self.parameters.values())
        dtype = dtype_name(self.dtype)
        lines.append(
            f"method    {self.config.method}: {trained:,} trained parameters, computed in {dtype} on {self.device}"
        )
        lines.append(
            f"steps     {self.plan.total:,} of {self.config.batch_size} x {self.config.accumulation} examples, "
            f"{self.plan.steps_per_epoch:,} per epoch"
        )
        if self.computation.note:
            lines.append(f"loss      {self.computation.note}")
        return lines

    def held_out_objective(self) -> Objective:
        """The loss that evaluation reports: that of training, without label smoothing."""
        if isinstance(self.objective, RegressionLoss):
            return self.objective
        return dataclasses.replace(self.objective, label_smoothing=0.0)  # type: ignore[type-var]


def prepare(config: TrainConfig) -> Job:
    """Load data, base and adapter.

    Raises:
        LorakitError: A setting does not fit the data or the model, or one of these cannot be read.
    """
    task = task_of(config.data)
    _check_task(config, task)
    base = open_base(config.base, task, seed=config.seed)
    assert base.tokenizer is not None  # open_base refuses a base without
    data = dataclasses.replace(config.data, task=task.name)
    sets = {
        split: load_examples(data, split, base.tokenizer, labels=task.labels)
        for split in ("train", "validation")
        if split == "train" or config.validates
    }
    return assemble(config, task, base, sets["train"], sets.get("validation"))


def assemble(
    config: TrainConfig,
    task: DataTask,
    base: Base,
    train: ExampleSet,
    validation: ExampleSet | None = None,
) -> Job:
    """Put the adapter on a loaded `base` and settle how batches and the loss are computed.

    Raises:
        LorakitError: A setting does not fit the data or the model.
    """
    model = base.model
    adapters = attach_method(base, config, task)
    for examples in (train, validation):
        if examples is not None:
            check_context(base, examples.examples)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    choice = choose_computation(
        model,
        task,
        training=True,
        packing=config.packing,
        compiled=config.compile,
        label_smoothing=config.label_smoothing,
    )
    with autocast_of(compute_dtype(config.base.dtype, model.device), adapters, model.device):
        computation = confirm_computation(choice, base, train.examples)
    if config.compile:
        compile_blocks(model)
    model.train()
    # From here on the global generator serves dropout alone.
    torch.manual_seed(config.seed)
    return Job(
        config=config,
        base=base,
        adapters=adapters,
        collate=collator(base, packed=computation.packed),
        train=train,
        validation=validation,
        scored=spread(validation.examples if validation else [], config.evaluation.limit),
        computation=computation,
        plan=StepPlan(
            BatchSampler(
                train.lengths, config.batch_size, config.seed, groups=groups_of(config, train)
            ),
            accumulation=config.accumulation,
            epochs=config.epochs,
            max_steps=config.max_steps,
        ),
    )


def autocast_of(
    dtype: torch.dtype, adapters: Adapters, device: torch.device
) -> AbstractContextManager[Any]:
    """Compute in `dtype` where trained tensors are float32 masters of base weights."""
    trains_base = any(module.trained for module in adapters.modules(ADAPTER).values())
    if dtype == torch.float32 or not trains_base:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def groups_of(config: TrainConfig, train: Sequence[Example]) -> list[str] | None:
    """What examples are grouped by in batches; None where their order is random."""
    return [example.prompt for example in train] if config.sampling == "grouped" else None


def attach_method(
    base: Base, config: TrainConfig, task: DataTask, method: Method | None = None
) -> Adapters:
    """Put what the run trains on its base, in float32: `method`, or by default what `config` says."""
    model = base.model
    if method is None and config.from_adapter is not None:
        adapters = warm_start(base, config.from_adapter, name=ADAPTER)
    else:
        # The head is new and random: frozen, it would leave nothing to learn from.
        head = [] if task.generates else classification_head(model)
        method = with_head(method or config.chosen_method, head)
        adapters = attach(model, method, name=ADAPTER, seed=config.seed)
    for parameter in adapters.trainable_parameters(ADAPTER):
        # Copies of base tensors come in the base's precision, in which small updates would be rounded away.
        parameter.data = parameter.data.float()
    let_norms_compute(model)
    return adapters


def _check_task(config: TrainConfig, task: DataTask) -> None:
    always = ("loss", "perplexity") if task.generates else ("loss",)
    scores = (*always, *task.type.quick_scores)
    if config.evaluation.metric not in scores:
        raise ConfigurationError(
            f"evaluation.metric is {config.evaluation.metric}, which task {task.name} does not have; it has "
            f"{', '.join(scores)}."
        )
    if config.evaluation.samples and not task.generates:
        raise ConfigurationError(
            f"evaluation.samples is {config.evaluation.samples}, but task {task.name} generates no text; set it "
            "to 0."
        )
    if config.label_smoothing and task.kind == "regression":
        raise ConfigurationError(
            "label_smoothing is for classes and tokens, and regression has neither; set it to 0."
        )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let the model's blocks be computed anew in the backward pass, instead of keeping what they computed."""
    # Non-reentrant: the reentrant kind gives no gradient where a block's input needs none, as below a frozen base.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its earlier name
        model.gradient_checkpointing_enable({"use_reentrant": False})


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """Take `limit` items at equal distances: neighbours in a file are often alike."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
