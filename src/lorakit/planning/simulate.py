"""Simulate the steps of a run on a model without weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lorakit.compute.base import check_context, model_head
from lorakit.compute.batching import collator
from lorakit.errors import BaseModelError, LorakitError
from lorakit.methods import METHODS, FullFineTuning
from lorakit.models.base_shape import Shape
from lorakit.models.blocks import blocks_of
from lorakit.models.faster import make_faster
from lorakit.models.loading import Base
from lorakit.models.sources import ModelSource
from lorakit.models.tree import is_of_adapter
from lorakit.planning.batches import Batches
from lorakit.planning.shape import base_bytes, build, new_mode, planning
from lorakit.planning.step import Step, run_step, shorten
from lorakit.training.config import TrainConfig
from lorakit.training.job import TRAINED, autocast_of
from lorakit.training.setup import attach_method, choice_of, enable_gradient_checkpointing
from lorakit.training.warm_start import method_of


@dataclass(frozen=True)
class SimulatedRun:
    """Memory of a run's tensors, in bytes, and work of its steps."""

    method: str
    trained: int
    """Trained parameters."""
    file: int
    """Bytes of the tensors in the saved file."""
    total: int
    """Parameters of the base."""
    base: int
    blocks: int
    """The part of `base` in blocks, which several processes can shard."""
    widest_block: int
    """The largest block of `base`."""
    copies: int
    """Trained parameters that are copies of base tensors in blocks, which are sharded with them."""
    adapter: int
    """Trained tensors, in float32, and buffers of adapter modules."""
    fullest: Step
    """Step of the batch with the most tokens."""
    middle: Step
    """Step of the batch whose size is nearest to the mean."""
    mean: float
    """The mean size of a batch, as a multiple of the middle one's."""
    batches: int
    """Batches of an optimizer step."""
    rows: int
    """Rows of the fullest batch, after packing."""
    width: int
    """Tokens per row of the fullest batch, after packing and padding."""
    packed: bool


def simulate(
    config: TrainConfig,
    shape: Shape,
    batches: Batches,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> SimulatedRun:
    """Set up a run as training does on `device`, on a model without weights, and run a step of each batch.

    Raises:
        LorakitError: A setting does not fit the model or the data, with the message of training.
    """
    task = batches.task
    start, fake = config.from_adapter, new_mode()
    method = method_of(config)
    with planning(fake, device), _explained(shape.name):
        head = model_head(task, lambda: shape.is_encoder_decoder)
        model = build(shape, config.base, head, len(task.labels), dtype=dtype)
        size, total = base_bytes(model), sum(p.numel() for p in model.parameters())
        in_blocks = blocks_of(model)
        block_sizes = [base_bytes(block) for block in in_blocks] or [0]
        in_all_blocks = sum(p.numel() for block in in_blocks for p in block.parameters())
        # Every block is trained in the same way, so a few stand for all before their copies are made.
        is_full = start is None and method == FullFineTuning()
        blocks = shorten(model) if is_full else []
        source = ModelSource(name=shape.name, path_or_id=shape.name, kind="folder")
        base = Base(model, batches.tokenizer or _NO_TOKENIZER, source)
        adapters = attach_method(base, config, task, method)
        trained = adapters.trainable_parameters(TRAINED)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        buffers = [b for m in adapters.modules(TRAINED).values() for b in m.buffers()]
        count = total if is_full else sum(p.numel() for p in trained)
        copies = in_all_blocks if is_full else _copied_in(in_blocks)
        model.train()
        computation = choice_of(config, model, task)
        # The model without weights is on the CPU, the only device whose runs install these layers.
        if computation.faster == "layers" and device.type == "cpu":
            make_faster(model)
        autocast = autocast_of(dtype, adapters, model.device)
    # Outside `planning`, since the checks of a file's content read numbers that are not simulated.
    file = 4 * count if is_full else adapters.summary(TRAINED).file_bytes
    *selected, mean = batches.fullest_and_middle(packed=computation.packed)
    check_context(base, [*itertools.chain(*selected)])
    fullest, middle = map(collator(base, packed=computation.packed), selected)
    with planning(fake, device), _explained(shape.name):
        step = partial(
            run_step,
            model,
            blocks or shorten(model),
            computation.objective,
            autocast=autocast,
            accumulates=batches.per_step > 1,
        )
        fullest_step = middle_step = step(fullest)
        if middle["input_ids"].shape != fullest["input_ids"].shape:
            middle_step = step(middle)
    rows, width = fullest["input_ids"].shape
    return SimulatedRun(
        method=type(adapters.method(TRAINED)).__name__,
        trained=count,
        file=file,
        total=total,
        base=size,
        blocks=sum(block_sizes),
        widest_block=max(block_sizes),
        copies=copies,
        adapter=4 * count + sum(buffer.nbytes for buffer in buffers),
        fullest=fullest_step,
        middle=middle_step,
        mean=mean,
        batches=batches.per_step,
        rows=rows,
        width=width,
        packed=computation.packed,
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Convert the exceptions of a model that simulated tensors, which have a shape only, cannot run."""
    try:
        yield
    except LorakitError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise BaseModelError(
            f"'{name}' cannot be planned for this task: its forward pass depends on the values of tensors ({error}). "
            "Plan it for another task with --data.task, or train a few steps with --max_steps to measure it."
        ) from error
    # Architectures raise almost any exception.
    except Exception as error:
        message = " ".join(str(error).split())
        raise BaseModelError(
            f"'{name}' cannot be planned: {type(error).__name__}: {message[:300]}. Train a few steps with --max_steps "
            "to measure it."
        ) from error


def _copied_in(blocks: Sequence[nn.Module]) -> int:
    """Return the number of trained parameters in blocks that take the place of base parameters."""
    names = {p: name for block in blocks for name, p in block.named_parameters()}
    return sum(p.numel() for p, n in names.items() if p.requires_grad and not is_of_adapter(n))


def as_full(config: TrainConfig) -> TrainConfig:
    """Return the configuration with full fine-tuning as its method."""
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


_NO_TOKENIZER: Any = SimpleNamespace(
    pad_token_id=0, eos_token_id=0, encode=lambda text, **options: [0]
)
"""The parts of a tokenizer that batches use. It adds no special tokens."""
