"""Predict the parameters, file size, memory and time of a run, and compare them with full fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorakit.errors import ConfigurationError, LorakitError, require_at_least
from lorakit.models.base_shape import GPT3, Shape, shape_of
from lorakit.models.devices import pick_device
from lorakit.models.dtype_choice import compute_dtype, resolve_dtype
from lorakit.models.dtypes import QUANTISATIONS
from lorakit.models.model_classes import head_of_class, is_encoder
from lorakit.models.processor import KERNELS, limit_processor
from lorakit.planning.batches import Batches, from_data, from_lengths
from lorakit.planning.gpt3 import arithmetic
from lorakit.planning.ledger import KINDS
from lorakit.planning.machine import (
    HOLES,
    IMPORTS,
    INTERPRETER,
    SOFTWARE,
    TOKEN_BYTES,
    UPDATE_BYTES,
    Machine,
    find_machine,
    keep_calibration,
)
from lorakit.planning.products import Timings, time_products
from lorakit.planning.shape import stored_quantisation
from lorakit.planning.simulate import SimulatedRun, as_full, simulate
from lorakit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of a step."""

    base: int
    """The base's weights in their storage dtype."""
    adapter: int
    """Trained parameters, in float32: low-rank matrices, or copies of base tensors."""
    gradients: int
    """Gradients that exist at the peak."""
    optimizer: int
    """The two running means of AdamW."""
    activations: int
    """Tensors saved for the backward pass."""
    logits: int
    """Tensors of vocabulary width."""
    temporary: int
    """Working memory of single operations, or of a checkpoint."""
    allocator: int
    """Freed memory between live tensors that the C library (on a GPU: torch) keeps, reordered copies of matrices that
    products make, and cached kernels of products."""
    software: int
    """The tokenizer, the training examples and imported libraries except torch; 0 on a GPU."""
    interpreter: int
    """The Python interpreter with torch imported; 0 on a GPU."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted cost of training with one method."""

    method: str
    trained: int
    """Trained parameters."""
    share: float
    """Trained parameters as a share of the base's."""
    file_bytes: int
    """Size of the saved file."""
    memory: Memory
    seconds: float
    """Seconds of an optimizer step."""
    sent: int = 0
    """Bytes that a process sends to the others in a step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predicted cost of a run, with the assumptions of the prediction."""

    base: str
    note: str
    parameters: int
    """Parameters of the base."""
    dtype: str
    why_dtype: str
    """Why `auto` became this dtype; "" for a dtype that the user set."""
    device: str
    lengths: str
    """Where the lengths of examples come from."""
    rows: int
    """Rows of the largest batch, after packing."""
    width: int
    """Tokens per row."""
    packed: bool
    """Whether shared prefixes are computed once."""
    tokens: int
    """Tokens of the examples of an optimizer step, without sharing prefixes."""
    steps: int | None
    """Optimizer steps of the run; None if the number of examples is unknown."""
    processes: int
    """Processes that share each step. Memory and time are those of the process with the most to compute."""
    sharded: bool
    """Whether they shard the weights of the blocks."""
    machine: Machine
    loading: int
    """Peak bytes while loading the base; 0 on a GPU. If the file has another dtype, or the base is quantised, both take
    memory for a moment."""
    chosen: Prediction
    """The run as configured."""
    full: Prediction | None
    """The run with full fine-tuning; None if the run already is one, or it was not predicted."""
    why_no_full: str = ""
    """Reason why full fine-tuning cannot be predicted."""
    paper: tuple[str, ...] = ()
    """For GPT-3: the paper's figures with their calculation, one per line."""

    def peak(self, prediction: Prediction) -> int:
        """Return the peak bytes of the process (on a GPU: of its allocations), in a step or while loading the base."""
        return max(self.loading, prediction.memory.total)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, with sizes in bytes, the peak, and the total of each memory."""
        record = dataclasses.asdict(self)
        for name in ("chosen", "full"):
            prediction: Prediction | None = getattr(self, name)
            if prediction is not None:
                record[name]["memory"]["total"] = prediction.memory.total
                record[name]["peak"] = self.peak(prediction)
        return record


def plan(
    config: TrainConfig,
    *,
    length: int | None = None,
    target_tokens: int | None = None,
    compare: bool = True,
    processes: int = 1,
    calibrate: bool = False,
    machine: Machine | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Predict the cost of a run from its configuration, without reading or creating weights.

    Args:
        config: The run.
        length: Tokens per example, at least 2; None reads the configured data.
        target_tokens: Target tokens per example, with `length`; None means half of it.
        compare: Predict full fine-tuning as well.
        processes: Number of processes on one machine that share each step. The speed is that of torch's current
            threads; call `lorakit.models.processor.threads` first if the processes will share the cores.
        calibrate: First calibrate this machine in the dtype of the run, about 20 seconds, and cache the result.
        machine: Speed to assume; None uses the calibration of this machine, or measures it briefly.
        progress: Called with the name of each stage that takes long.

    Raises:
        LorakitError: The base's configuration or the data cannot be read, or a setting does not fit them.
    """
    require_at_least("length", length, 2)
    require_at_least("target_tokens", target_tokens, 1)
    require_at_least("processes", processes, 1)
    if target_tokens is not None and length is None:
        raise ConfigurationError(
            "target_tokens counts tokens of length; set length too, for example --length 512."
        )
    try:
        device, here = pick_device(config.base.device), True
    except ConfigurationError:  # this machine does not have it
        device, here = torch.device(config.base.device), False
    if device.type == "cpu":
        limit_processor()
    progress("reading the base's configuration")
    shape = shape_of(config.base)
    progress("comparing dtypes")
    base, why_dtype = resolve_dtype(config.base, batch_size=config.batch_size, copies=processes)
    config = dataclasses.replace(config, base=base)
    dtype = compute_dtype(config.base.dtype, device)
    if calibrate:
        # At the top, it would import its program `trial` before that runs.
        from lorakit.planning import calibration

        progress("training a small model to calibrate")
        keep_calibration(calibration.calibrate(device, dtype), device, dtype)
    progress("reading the data")
    batches = _batches(config, shape, length, target_tokens, processes)
    examples = TOKEN_BYTES * batches.kept_tokens
    progress("measuring this machine")
    machine = machine or find_machine(device, dtype, here=here)
    progress("simulating a step")
    simulated = partial(simulate, shape=shape, batches=batches, dtype=dtype, device=device)
    run = simulated(config)
    sizes = batches.sizes(packed=run.packed, is_encoder_decoder=shape.is_encoder_decoder)
    if batches.steps is not None:
        sizes = min(sizes, batches.steps * batches.per_step)
    full, why = None, ""
    if compare and run.method != "FullFineTuning":
        progress("simulating a step of full fine-tuning")
        try:
            full = simulated(as_full(config))
        except LorakitError as error:
            why = str(error)
    timings = Timings({})
    if here and machine.here:
        progress("timing the products of a step")
        steps = [r.middle.work.products for r in (run, full) if r is not None]
        timings = time_products(steps, device, machine.estimate)
        if timings.note:
            machine = dataclasses.replace(machine, origin=f"{machine.origin}; {timings.note}")
    predict = partial(
        _predict,
        machine=machine,
        device=device,
        timings=timings,
        sizes=sizes,
        examples=examples,
        processes=processes,
        sharded=config.shard,
    )
    loading = examples + _loading(shape, run, config.base.dtype, dtype, sharded=config.shard)
    return Plan(
        base=shape.name,
        note="; ".join(filter(None, (shape.note, stored_quantisation(shape.config).note))),
        parameters=run.total,
        dtype=config.base.dtype,
        why_dtype=why_dtype,
        device=str(device),
        lengths=batches.source,
        rows=run.rows,
        width=run.width,
        packed=run.packed,
        tokens=batches.tokens,
        steps=batches.steps,
        processes=processes,
        sharded=config.shard,
        machine=machine,
        loading=loading if device.type == "cpu" else 0,
        chosen=predict(run),
        full=full and predict(full),
        why_no_full=why,
        paper=arithmetic() if shape.name == GPT3 else (),
    )


def _loading(
    shape: Shape, run: SimulatedRun, base_dtype: str, dtype: torch.dtype, *, sharded: bool
) -> int:
    """Return the peak bytes while loading a base and attaching the adapter, without the data set.

    `base_dtype` is the dtype of the base's weights, `dtype` that of its products. A run that shards the base does so
    when the trained parameters are whole.

    The file is mapped into memory. Weights in its dtype stay there, others are copies beside it. nf4 and int8 are made
    from the mapped weights, one layer after the other, unless the file has them.
    """
    stored = getattr(shape.config, "dtype", None)
    stored = stored if isinstance(stored, torch.dtype) else dtype
    copied = base_dtype in QUANTISATIONS or stored != dtype
    is_quantised = stored_quantisation(shape.config).kind
    file = run.base if is_quantised else run.total * stored.itemsize
    beside = max(file if copied else 0, 4 * run.trained if sharded else 0)
    return INTERPRETER + IMPORTS + run.base + beside


def _batches(
    config: TrainConfig, shape: Shape, length: int | None, target_tokens: int | None, processes: int
) -> Batches:
    if length is None and shape.name != GPT3:
        return from_data(config, processes)
    names = getattr(shape.config, "architectures", None) or []
    heads = {head_of_class(name, is_encoder_decoder=shape.is_encoder_decoder) for name in names}
    labelled = is_encoder(shape.config) or "sequence-classification" in heads
    return from_lengths(config, length, target_tokens, labelled=labelled, processes=processes)


def _predict(
    run: SimulatedRun,
    *,
    machine: Machine,
    device: torch.device,
    timings: Timings,
    sizes: int,
    examples: int,
    processes: int,
    sharded: bool,
) -> Prediction:
    base, whole, copies, gathered = run.base, run.trained, 0, 0
    if sharded:
        whole, copies = run.trained - run.copies, run.copies // processes
        # A sharded run drops the originals of trained copies, and gathers the copies, in float32.
        originals = run.copies * run.base // run.total
        gathered = run.blocks - originals + 4 * run.copies
        # A process holds its part, and while a block computes, the whole block.
        widest = run.widest_block * gathered // max(run.blocks, 1)
        base += (run.blocks - originals) // processes + widest - run.blocks
    held = whole + copies
    peak = _peak(run, processes, whole=whole, held=held)
    step_bytes = sum(peak.values())
    # Every size of a batch has kernels of its own.
    kernels = min(KERNELS, sizes * len(run.middle.work.products))
    slack = machine.slack + (HOLES if sizes > 1 and device.type == "cpu" else 0)
    freed = slack * step_bytes + machine.packed * run.fullest.widest
    # For a checkpoint, the first process gathers the copies and their means on the CPU, in few large buffers.
    saved = 12 * run.copies if sharded and device.type == "cpu" else 0
    if saved > step_bytes + freed:
        peak, freed = {**dict.fromkeys(KINDS, 0), "temporary": saved}, 0
    software = SOFTWARE if machine.software is None else machine.software
    memory = Memory(
        base=base,
        adapter=run.adapter - 4 * (run.trained - held),
        optimizer=8 * held,
        allocator=round(freed + kernels * machine.kernel),
        software=software + examples if device.type == "cpu" else 0,
        interpreter=INTERPRETER if device.type == "cpu" else 0,
        **peak,
    )
    others = processes - 1
    # A ring sends every part of the gradients to all processes but one, once for the sum and once for the result.
    sent = 2 * others * 4 * whole // processes
    if sharded:
        # Each batch gathers the blocks for the forward and for the backward pass, and adds up the copies' gradients.
        sent += run.batches * others * (2 * gathered + 4 * run.copies) // processes
    return Prediction(
        method=run.method,
        trained=run.trained,
        share=run.trained / run.total,
        file_bytes=run.file,
        memory=memory,
        seconds=run.batches * run.mean * machine.seconds(run.middle.work, timings.seconds)
        + held * UPDATE_BYTES / machine.traffic
        + sent / machine.sent,
        sent=sent,
    )


def _peak(run: SimulatedRun, processes: int, *, whole: int, held: int) -> dict[str, int]:
    """Return the bytes of a step's tensors at the peak: in the fullest batch, or when the processes add gradients.

    A process holds `whole` trained parameters whole, and `held` with its parts of sharded ones.
    """
    in_batch: dict[str, int] = {**run.fullest.peak}
    # From the second batch of a step on, the gradients of the earlier ones exist.
    in_batch["gradients"] = 4 * held if run.batches > 1 else min(in_batch["gradients"], 4 * held)
    if processes == 1:
        return in_batch
    # They travel as one flat copy.
    in_sum = {**dict.fromkeys(KINDS, 0), "gradients": 4 * held, "temporary": 4 * whole}
    return max(in_batch, in_sum, key=lambda peak: sum(peak.values()))
