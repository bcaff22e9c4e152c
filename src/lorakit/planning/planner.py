"""What a run will take: parameters, size on disk, memory and time, with full fine-tuning beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.errors import ConfigurationError, LorakitError
from lorakit.models.devices import pick_device
from lorakit.models.dtypes import compute_dtype, resolved_dtype
from lorakit.planning.batches import Batches, from_data, from_lengths
from lorakit.planning.gpt3 import arithmetic
from lorakit.planning.ledger import KINDS
from lorakit.planning.machine import (
    IMPORTS,
    INTERPRETER,
    SOFTWARE,
    UPDATE_BYTES,
    Machine,
    find_machine,
)
from lorakit.planning.products import time_products
from lorakit.planning.shape import GPT3, Shape, shape_of
from lorakit.planning.simulate import SimulatedRun, as_full, simulate
from lorakit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the fullest moment of training, above those of the interpreter with torch imported."""

    base: int
    """The base's weights, as they are kept."""
    adapter: int
    """What is trained, in float32: thin matrices, or copies of base tensors."""
    gradients: int
    """Gradients of what is trained that are there at that moment."""
    optimizer: int
    """The two running means of AdamW."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """Tensors as wide as the vocabulary."""
    temporary: int
    """What single operations need."""
    allocator: int
    """Freed memory between tensors, which the C library (on a GPU: torch) does not give back, and copies of
    matrices in the order in which products read them."""
    software: int
    """Libraries beyond torch, the tokenizer; none on a GPU, whose memory has no part in them."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What training by one method takes."""

    method: str
    trained: int
    """Trained parameters."""
    share: float
    """The same as a share of the base's."""
    file_bytes: int
    """Size of what is saved."""
    memory: Memory
    seconds: float
    """Time of an optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `lorakit plan` prints."""

    base: str
    note: str
    parameters: int
    """Parameters of the base."""
    dtype: str
    device: str
    lengths: str
    """Where the lengths of examples come from."""
    rows: int
    """Rows of the fullest batch, as it is computed."""
    width: int
    """Tokens of each of them."""
    packed: bool
    """Whether what examples share is computed once."""
    tokens: int
    """Tokens of an optimizer step, each example's counted in full."""
    steps: int | None
    """Optimizer steps of the run; None where the number of examples is not known."""
    machine: Machine
    loading: int
    """Bytes at the fullest moment of loading the base, above those of the interpreter with torch imported: where
    its file has another dtype, both are there for a moment."""
    chosen: Prediction
    """The run as configured."""
    full: Prediction | None
    """The same with full fine-tuning; None where the run is one, or it cannot be."""
    why_no_full: str = ""
    """Why full fine-tuning cannot stand beside it."""
    paper: tuple[str, ...] = ()
    """For GPT-3: the paper's arithmetic, line by line."""

    @property
    def process_peak(self) -> int:
        """Bytes that the process holds at most, or on a GPU what is allocated there."""
        if self.device != "cpu":
            return self.chosen.memory.total
        return INTERPRETER + max(self.loading, self.chosen.memory.total)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, sizes in bytes, with the sum of each memory beside its parts."""
        record = dataclasses.asdict(self)
        for name in ("chosen", "full"):
            prediction: Prediction | None = getattr(self, name)
            if prediction is not None:
                record[name]["memory"]["total"] = prediction.memory.total
        return record


def plan(
    config: TrainConfig,
    *,
    length: int | None = None,
    targets: int | None = None,
    compare: bool = True,
    machine: Machine | None = None,
) -> Plan:
    """Predict what a run takes, from its configuration alone: no weight is read or made.

    Args:
        config: The run.
        length: Tokens of an example; None reads the configured data.
        targets: Of them target tokens; None takes half.
        compare: Predict full fine-tuning as well.
        machine: What to reckon with; None takes this machine's calibration, or measures it for a moment.

    Raises:
        LorakitError: The base's configuration or the data cannot be read, or a setting does not fit them.
    """
    device, here = _device(config)
    gpu = device.type != "cpu"
    shape = shape_of(config.base)
    batches = _batches(config, shape, length, targets)
    dtype = compute_dtype(config.base.dtype, device)
    machine = machine or find_machine(device, dtype, here=here)
    tries = here and machine.here
    run = simulate(config, shape, batches, device=device)
    full, why = None, ""
    if compare and run.method != "FullFineTuning":
        try:
            full = simulate(as_full(config), shape, batches, device=device)
        except LorakitError as error:
            why = str(error)
    rows, width = run.computed
    return Plan(
        base=shape.name,
        note=shape.note,
        parameters=run.total,
        dtype=resolved_dtype(config.base.dtype, device),
        device=str(device),
        lengths=batches.source,
        rows=rows,
        width=width,
        packed=run.packed,
        tokens=run.tokens * config.accumulation,
        steps=batches.steps,
        machine=machine,
        loading=0 if gpu else _loading(shape, run, dtype),
        chosen=_predict(run, config, machine, device, tries=tries),
        full=full and _predict(full, config, machine, device, tries=tries),
        why_no_full=why,
        paper=arithmetic() if shape.name == GPT3 else (),
    )


def _loading(shape: Shape, run: SimulatedRun, dtype: torch.dtype) -> int:
    stored = getattr(shape.config, "dtype", None)
    if not isinstance(stored, torch.dtype) or stored == dtype:
        return IMPORTS + run.base
    return IMPORTS + run.base + run.total * stored.itemsize


def _device(config: TrainConfig) -> tuple[torch.device, bool]:
    """The run's device, and whether this machine has it: a run can be planned for another."""
    try:
        return pick_device(config.base.device), True
    except ConfigurationError:
        return torch.device(config.base.device), False


def _batches(config: TrainConfig, shape: Shape, length: int | None, targets: int | None) -> Batches:
    if length is None and shape.name != GPT3:
        return from_data(config)
    names = getattr(shape.config, "architectures", None) or []
    encoder = not any("LM" in name and "Masked" not in name for name in names) and bool(names)
    return from_lengths(config, length, targets, encoder=encoder)


def _predict(
    run: SimulatedRun, config: TrainConfig, machine: Machine, device: torch.device, *, tries: bool
) -> Prediction:
    gpu = device.type != "cpu"
    tried = time_products(run.middle.work.products, device, machine.estimate) if tries else {}
    peak = run.fullest.peak
    # Gradients that earlier batches of a step have left are there from its second batch on.
    gradients = 4 * run.trained if config.accumulation > 1 else peak["gradients"]
    software = machine.software
    if software is None:
        software = SOFTWARE
    of_step = gradients + sum(peak[kind] for kind in KINDS if kind != "gradients")
    memory = Memory(
        base=run.base,
        adapter=run.adapter,
        gradients=gradients,
        optimizer=run.optimizer,
        activations=peak["activations"],
        logits=peak["logits"],
        temporary=peak["temporary"],
        allocator=round(machine.slack * of_step + machine.packed * run.fullest.widest),
        software=0 if gpu else software,
    )
    return Prediction(
        method=run.method,
        trained=run.trained,
        share=run.trained / run.total,
        file_bytes=4 * run.trained,
        memory=memory,
        seconds=config.accumulation * machine.seconds(run.middle.work, tried)
        + run.trained * UPDATE_BYTES / machine.traffic,
    )
