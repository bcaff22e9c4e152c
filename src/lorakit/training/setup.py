"""Prepare a run from its configuration: data, base, adapter, loss, step plan."""

from __future__ import annotations

import contextlib
import dataclasses

from transformers import PreTrainedModel

from lorakit.adapters import Adapters, attach
from lorakit.compute.base import (
    check_context,
    is_encoder_decoder,
    open_base,
    read_text_tokenizer,
)
from lorakit.compute.computation import Computation, choose_computation, confirm_computation
from lorakit.data import DataTask, ExampleSet, RowReader, load_examples, task_of
from lorakit.data.batches import BatchSampler
from lorakit.data.examples import evenly_spaced
from lorakit.errors import ConfigurationError
from lorakit.methods import Method
from lorakit.methods.lora.init import placeholders
from lorakit.methods.method import with_head
from lorakit.models.compiling import compile_blocks
from lorakit.models.devices import pick_device
from lorakit.models.heads import classification_head
from lorakit.models.loading import Base
from lorakit.models.sharding import is_sharded
from lorakit.tasks.template_kwargs import with_template_kwargs
from lorakit.training.config import TrainConfig
from lorakit.training.distributed import Processes
from lorakit.training.job import TRAINED, Job
from lorakit.training.mixed_precision import cast_mixed_norms
from lorakit.training.schedule import StepPlan
from lorakit.training.sharding import require_shardable, require_support, shard_base
from lorakit.training.warm_start import warm_start


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
        shard_base(job.model, pick_device(config.base.device))
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
