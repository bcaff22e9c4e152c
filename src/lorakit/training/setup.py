"""Prepare a run from its configuration: data, base, adapter, loss, step plan."""

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
from lorakit.adapters import Adapters, attach
from lorakit.adapters.formats import BaseRecord, base_record
from lorakit.compute.base import (
    check_context,
    is_encoder_decoder,
    open_base,
    read_text_tokenizer,
)
from lorakit.compute.batch_size import ADVICE, BatchSize
from lorakit.compute.batching import Collate, collator, target_counter
from lorakit.compute.computation import Computation, choose_computation, confirm_computation
from lorakit.compute.objective import Objective, RegressionLoss
from lorakit.data import DataTask, ExampleSet, RowReader, load_examples, task_of
from lorakit.data.batches import BatchSampler
from lorakit.data.examples import evenly_spaced
from lorakit.errors import ConfigurationError
from lorakit.extensions import file_of
from lorakit.methods import Method
from lorakit.methods.lora.init import placeholders
from lorakit.methods.method import describe, with_head
from lorakit.models.compiling import compile_blocks
from lorakit.models.devices import pick_device
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.heads import classification_head
from lorakit.models.loading import Base
from lorakit.models.sharding import is_sharded
from lorakit.tasks import Example, Task, generic_task, task_type
from lorakit.tasks.template_kwargs import with_template_kwargs
from lorakit.training.checkpoint import Inputs, State, fields_input
from lorakit.training.config import TrainConfig
from lorakit.training.distributed import Processes
from lorakit.training.environment import versions
from lorakit.training.mixed_precision import cast_mixed_norms
from lorakit.training.optimizer import build_optimizer
from lorakit.training.run_folder import set_aside
from lorakit.training.schedule import Share, StepPlan, rate_factor
from lorakit.training.sharding import require_shardable, require_support, shard_base
from lorakit.training.warm_start import warm_start

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
        weights = record.weights
        files = {"task": file_of(self.train.task)}
        files |= {f"method {name}": file_of(name) for name in self.config.method_names}
        start = self.config.from_adapter
        # Without defaults, so that a setting that a later version adds does not change the digest.
        described = describe(self.adapters.method(TRAINED), main=False)
        method = hashlib.sha256(described.encode()).hexdigest()
        return {
            "base model": {
                "source": self.config.base.name,
                "sha256": weights.exact or weights.dtype,  # without a hash, dtype is the reason
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


def prepare(
    config: TrainConfig, processes: Processes | None = None, *, resumes: bool = False
) -> Job:
    """Load data, base and adapter, and choose how batches and the loss are computed.

    The dtype of `config` must be resolved (`resolve_dtype`), for all processes alike. Without `processes`, this process
    is the only one. If the run `resumes`, a checkpoint will replace the initial weights, which are then placeholders.

    Raises:
        LorakitError: The data, the base or the adapter cannot be read, or a setting does not fit them.
    """
    assert config.base.dtype != "auto"  # the base and `Job.dtype` could choose different dtypes
    processes = processes or Processes()
    if config.shard:
        require_support(processes)
    with processes.together():
        job = _opened(config, processes, resumes)
        # A single process may not need the digests, which take seconds.
        inputs = job.inputs if processes.count > 1 else {}
    processes.require_same({name: source["sha256"] for name, source in inputs.items()})
    if config.shard:  # from here on, all processes must run the same passes
        shard_base(job.model, job.base_record, pick_device(config.base.device))
    # The others have placeholders (PiSSA), or may differ in the last bits (DoRA's magnitudes).
    processes.copy_from_first(t for t in job.weights.values() if not is_sharded(t))
    return _confirmed(job)


def _opened(config: TrainConfig, processes: Processes, resumes: bool) -> Job:
    """Load data, base and adapter."""
    reader = RowReader()
    task = task_of(config.data, reader=reader)
    # With the task set, load_examples does not infer it again for each split.
    data = dataclasses.replace(config.data, task=task.name)
    dataclasses.replace(config, data=data)  # checks the settings that fit some tasks only
    # The parts of a sharded base move to the device one after the other.
    place = dataclasses.replace(config.base, device="cpu") if config.shard else config.base
    # Saved with the adapter.
    tokenizer = with_template_kwargs(read_text_tokenizer(config.base), data.chat_template_kwargs)
    encodes = is_encoder_decoder(config.base)
    sets = {
        split: load_examples(
            data, split, tokenizer, labels=task.labels, reader=reader, is_encoder_decoder=encodes
        )
        for split in ("train", "validation")
        if split == "train" or config.validates
    }
    base = open_base(place, task, seed=config.seed, tokenizer=tokenizer)
    is_replaced = resumes or not processes.is_first  # by a checkpoint, or by `prepare`
    with placeholders() if is_replaced else contextlib.nullcontext():
        job = _attached(config, task, base, sets["train"], sets.get("validation"), processes)
    if config.shard:
        require_shardable(base.model, config.base)
    return job


def assemble(config: TrainConfig, task: DataTask, base: Base, train: ExampleSet) -> Job:
    """Attach the adapter to a loaded `base` in this process, and choose how batches and the loss are computed.

    Raises:
        LorakitError: A setting does not fit the data or the model.
    """
    return _confirmed(_attached(config, task, base, train, None, Processes()))


def _attached(
    config: TrainConfig,
    task: DataTask,
    base: Base,
    train: ExampleSet,
    validation: ExampleSet | None,
    processes: Processes,
) -> Job:
    """Attach the adapter to a loaded `base`."""
    adapters = attach_method(base, config, task)
    for examples in (train, validation):
        if examples is not None:
            check_context(base, examples.examples)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(base.model)
    return Job(
        config=config,
        base=base,
        adapters=adapters,
        train=train,
        validation=validation,
        scored=evenly_spaced(validation.examples if validation else [], config.evaluation.limit),
        step_plan=step_plan_of(config, train),
        processes=processes,
    )


def _confirmed(job: Job) -> Job:
    """Choose how the run is computed, after a trial on a few examples, and put the model into training mode."""
    choice = choice_of(job.config, job.model, DataTask(name=job.train.task))
    examples = [*job.train.examples, *job.scored]  # both are packed
    with job.autocast():
        job.computation = confirm_computation(choice, job.base, examples)
    if job.config.compile:
        compile_blocks(job.model)
    job.model.train()
    return job


def choice_of(config: TrainConfig, model: PreTrainedModel, task: DataTask) -> Computation:
    """Return how a run is computed by its settings and the model's structure, before any trial."""
    return choose_computation(
        model,
        task,
        training=True,
        packing=config.packing,
        compiled=config.compile,
        label_smoothing=config.label_smoothing,
    )


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


def step_plan_of(config: TrainConfig, train: ExampleSet) -> StepPlan:
    """Return the examples of each step, in an order that does not depend on how a step is cut into batches."""
    groups = [example.prompt for example in train] if config.sampling == "grouped" else None
    size = config.batch_size * config.accumulation
    sampler = BatchSampler(train.lengths, size, config.seed, groups)
    return StepPlan(sampler, epochs=config.epochs, max_steps=config.max_steps)


def attach_method(
    base: Base, config: TrainConfig, task: DataTask, method: Method | None = None
) -> Adapters:
    """Attach to `base` the method that a run trains, with float32 parameters; `method` overrides that of `config`."""
    model = base.model
    if method is None and config.from_adapter is not None:
        adapters = warm_start(base, config.from_adapter, name=TRAINED)
    else:
        # The head is new and random, so it is trained as well.
        head = [] if task.generates else classification_head(model)
        method = with_head(method or config.chosen_method, model, head, base.new_weights)
        adapters = attach(model, method, name=TRAINED, seed=config.seed)
    for parameter in adapters.trainable_parameters(TRAINED):
        # Copies of base tensors have the base's dtype, in which small updates would round to nothing.
        parameter.data = parameter.data.float()
    # BitFit trains the bias of a LayerNorm in float32, next to a frozen weight in the base's dtype.
    cast_mixed_norms(model)
    return adapters


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the model's blocks in the backward pass instead of keeping their activations.

    Raises:
        ConfigurationError: transformers cannot recompute blocks of this architecture.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigurationError(
            f"gradient_checkpointing is true, but {type(model).__name__} does not support it. Set it to false; a "
            "smaller batch_size with more accumulation also needs less memory."
        )
    # Reentrant checkpoints give no gradient where a block's input requires none, as above a frozen embedding.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its earlier name
        model.gradient_checkpointing_enable({"use_reentrant": False})
