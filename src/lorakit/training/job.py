"""A prepared run: the objects that it works with, and the decisions that follow from its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import storage
from lorakit.adapters import Adapters
from lorakit.adapters.formats import BaseRecord, base_record
from lorakit.compute.batch_size import ADVICE, BatchSize
from lorakit.compute.batching import Collate, collator, target_counter
from lorakit.compute.computation import Computation
from lorakit.compute.objective import Objective, RegressionLoss
from lorakit.data import ExampleSet
from lorakit.extensions import file_of
from lorakit.methods.method import describe
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.loading import Base
from lorakit.tasks import Example, Task, generic_task, task_type
from lorakit.training.checkpoint import Inputs, State, fields_input
from lorakit.training.config import TrainConfig
from lorakit.training.distributed import Processes
from lorakit.training.environment import versions
from lorakit.training.optimizer import build_optimizer
from lorakit.training.run_folder import set_aside
from lorakit.training.schedule import Share, StepPlan, rate_factor

TRAINED = "default"
"""Name of the trained adapter on its model."""

CHECKPOINT_STEPS = 500
"""Default of checkpoints.every in a long epoch. A kill near its end must not cost the whole epoch."""


@dataclass(kw_only=True)
class Job:
    """The objects that a run works with."""

    config: TrainConfig
    base: Base
    adapters: Adapters
    train: ExampleSet
    validation: ExampleSet | None
    scored: Sequence[Example]
    """The validation examples scored during training."""
    computation: Computation = field(init=False)
    """Set once it has been tried."""
    step_plan: StepPlan
    processes: Processes

    @cached_property
    def collate(self) -> Collate:
        """Makes a batch of examples."""
        return collator(self.base, packed=self.computation.packed)

    @cached_property
    def share(self) -> Share:
        """The examples of a step that this process computes."""
        return Share(
            self.train,
            batch_size=self.batch_size,
            rank=self.processes.rank,
            count=self.processes.count,
            packed=self.computation.packed,
        )

    @cached_property
    def batch_size(self) -> BatchSize:
        """Examples per forward and backward pass of this process."""
        return self._batch_size(
            self.config.batch_size,
            advice=f"Set gradient_checkpointing to true. {ADVICE}",
            smaller="Lower batch_size and raise accumulation by the same factor.",
        )

    @cached_property
    def evaluation_batch_size(self) -> BatchSize:
        """Examples per forward pass of this process in evaluations."""
        return self._batch_size(
            self.config.evaluation.batch_size or self.config.batch_size,
            advice=ADVICE,
            smaller="Set a smaller evaluation.batch_size.",
        )

    def _batch_size(self, size: int, *, advice: str, smaller: str) -> BatchSize:
        rank, count = self.processes.rank, self.processes.count
        return BatchSize(
            size,
            advice=advice,
            process=f"Process {rank} of {count}" if count > 1 else "",
            # With sharded weights, all processes must run equally many passes.
            smaller=smaller if self.config.shard else "",
        )

    @cached_property
    def count_targets(self) -> Callable[[Example], int]:
        """Returns the number of targets of an example."""
        return target_counter(self.base)

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
        """The task of the training data."""
        return task_type(self.train.task)

    @property
    def device(self) -> torch.device:
        """The compute device."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return compute_dtype(self.config.base.dtype, self.device)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer updates, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        """AdamW over these parameters, with its state."""
        return build_optimizer(self.parameters, self.config.optimizer, self.config.peak_rate)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: the trained ones, and the frozen factors that PiSSA subtracts."""
        buffers = {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if f".adapters.{TRAINED}." in name
        }
        return {**self.parameters, **buffers}

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of a forward pass (see `autocast_of`)."""
        return autocast_of(self.dtype, self.adapters, self.device)

    def rate_factor(self, step: int) -> float:
        """Return the factor on the peak learning rate after `step` finished steps."""
        settings = self.config.optimizer
        return rate_factor(
            step, total=self.step_plan.total, warmup=settings.warmup, schedule=settings.schedule
        )

    def is_over(self, state: State) -> bool:
        """Return whether the run has made its last step and its evaluation, or was stopped early."""
        return state.stopped_early or (state.step >= self.step_plan.total and state.evaluated)

    def is_out_of_patience(self, state: State) -> bool:
        """Return whether as many evaluations as `evaluation.patience` have passed without a new best."""
        patience = self.config.evaluation.patience
        return patience is not None and state.without_best >= patience

    def evaluates_after(self, step: int) -> bool:
        """Return whether an evaluation is due after `step` finished steps."""
        every = self.config.evaluation.every or self.step_plan.steps_per_epoch
        return bool(self.scored) and (step % every == 0 or step == self.step_plan.total)

    def saves_after(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` finished steps."""
        default = min(self.step_plan.steps_per_epoch, CHECKPOINT_STEPS)
        every = self.config.checkpoints.every or default
        return step % every == 0 or step == self.step_plan.total

    @cached_property
    def base_record(self) -> BaseRecord:
        """The fingerprint of the base, taken once: training leaves the base unchanged."""
        return self.adapters.base_record(TRAINED, tokenizer=self.base.tokenizer)

    @cached_property
    def inputs(self) -> Inputs:
        """Digests of what a resumed run must match.

        That is the base, its tokenizer, the data, the files of a custom task and method, and the method of the adapter
        from which the run starts.
        """
        sets = {"train data": self.train, "validation data": self.validation}
        # The adapter's record excludes the parameters that are trained in full; a resumed run compares all.
        # Those that it includes have just been hashed.
        record = self.base_record
        if record.excluded:
            record = base_record(self.model, for_comparison=True)
        files = {"task": file_of(self.train.task)}
        files |= {f"method {name}": file_of(name) for name in self.config.method_names}
        start = self.config.from_adapter
        # Without defaults, so that a setting that a later version adds does not change the digest.
        described = describe(self.adapters.method(TRAINED), main=False)
        method = hashlib.sha256(described.encode()).hexdigest()
        return {
            "base model": {
                "source": self.config.base.name,
                "sha256": record.exact or record.dtype,  # without a hash, dtype is the reason
            },
            "base configuration": fields_input(self.config.base.name, record.configuration),
            "tokenizer": {
                "source": f"{self.config.base.name} (tokenizers {tokenizers.__version__})",
                "sha256": str(self.base_record.tokenizer),
            },
            **{
                split: {"source": data.report.source, "sha256": data.sha256}
                for split, data in sets.items()
                if data is not None
            },
            **{
                name: {"source": str(file), "sha256": storage.sha256(file)}
                for name, file in files.items()
                if file is not None
            },
            **({"method": {"source": start, "sha256": method}} if start else {}),
        }

    def save_adapter(self, folder: Path, state: State) -> None:
        """Write the current adapter and the record of its training in the first process; all processes call this."""
        sets = {"train": self.train, "validation": self.validation}
        provenance = {
            "config": self.config.as_dict(),
            "data": {split: data.record() for split, data in sets.items() if data is not None},
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
        # Before the others gather the tensors of a sharded adapter, and would wait for a process that fails here.
        with self.processes.together():
            if self.processes.is_first:
                set_aside(folder)
        with self.processes.together():
            if self.config.shard or self.processes.is_first:
                self.adapters.save(
                    folder,
                    TRAINED,
                    tokenizer=self.base.tokenizer,
                    provenance=provenance,
                    base=self.base_record,
                    overwrite=True,
                    is_main_process=self.processes.is_first,
                )

    def held_out_objective(self) -> Objective:
        """Return the training loss without label smoothing."""
        if isinstance(self.objective, RegressionLoss):
            return self.objective
        return dataclasses.replace(self.objective, label_smoothing=0.0)  # type: ignore[type-var]


def autocast_of(
    dtype: torch.dtype, adapters: Adapters, device: torch.device
) -> AbstractContextManager[Any]:
    """Return autocast to `dtype` if the adapter trains copies of base tensors, else a null context.

    The copies are float32 (see `attach_method`), and autocast computes their products in `dtype`. Low-rank factors
    need no autocast: `lorakit.ops.lora_linear` casts them.
    """
    trains_base = any(module.trained for module in adapters.modules(TRAINED).values())
    if dtype == torch.float32 or not trains_base:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
