"""Peak memory and work of one training step of a model without weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.hooks import RemovableHandle

from lorakit.compute.objective import Batch, Objective
from lorakit.models.blocks import stacks
from lorakit.models.layers import by_token
from lorakit.ops import linear_cross_entropy
from lorakit.planning.ledger import KINDS, Kind, Ledger, Segment, Work

row_chunks = linear_cross_entropy.row_chunks

Blocks = list[tuple[nn.Module, int]]
"""The remaining blocks of a shortened model in order, each with the number of blocks that it represents."""


@dataclass(frozen=True)
class Step:
    """A forward and backward pass."""

    peak: dict[Kind, int]
    """Bytes alive at the peak, without weights and optimizer state."""
    work: Work
    widest: int
    """Bytes of the largest matrix that a product reads."""


def shorten(model: nn.Module) -> Blocks:
    """Delete the blocks of `model` that equal both of their neighbours, and return the remaining ones.

    Blocks are equal if their parameters, including an adapter's, have the same names, shapes and dtypes and are
    trained or not. Of a run of equal blocks the first, the second and the last remain; the second represents all
    between the first and the last.
    """
    remaining: Blocks = []
    for path, names in stacks(model).items():
        stack: Blocks = []
        for _, run in groupby(map(model.get_submodule, names), key=_signature):
            equal = list(run)
            if len(equal) > 3:
                stack += [(equal[0], 1), (equal[1], len(equal) - 2), (equal[-1], 1)]
            else:
                stack += [(block, 1) for block in equal]
        model.set_submodule(path, nn.ModuleList(block for block, _ in stack))
        remaining += stack
    return remaining


def _signature(block: nn.Module) -> tuple[Any, ...]:
    tensors = [
        (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()
    ]
    return (type(block), *tensors)


def run_step(
    model: nn.Module,
    blocks: Blocks,
    objective: Objective,
    batch: Batch,
    *,
    autocast: AbstractContextManager[Any],
    accumulates: bool,
) -> Step:
    """Run a step of `model`, whose parameters are fake tensors, on a batch of ordinary ones, in a `FakeTensorMode`.

    `blocks` are those that `shorten` returned. With `accumulates`, gradients of an earlier batch of the step exist;
    they are not counted.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if accumulates else None
    gradients = [p.grad for p in trained if p.grad is not None]
    known = [*model.parameters(), *model.buffers(), *batch.values(), *gradients]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0) or 0
    ledger = Ledger(known, vocabulary)
    handles = _mark_blocks(ledger, [block for block, _ in blocks])

    def count_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.set_kind(parameter.grad, "gradients")

    handles += [p.register_post_accumulate_grad_hook(count_gradient) for p in trained]
    try:
        with ledger, _short_loss(ledger):
            with autocast, ledger.saved_tensors():
                loss = objective.loss_sum(model, batch)
            ledger.mark(None)
            loss.backward()
            ledger.close()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    return _whole_step(ledger.segments, [times for _, times in blocks])


@contextmanager
def _short_loss(ledger: Ledger) -> Iterator[None]:
    """Compute the loss of fake tensors in its first and last chunk only; the first counts for all others.

    The blocks of a chunk's logits are computed in the same way.
    """

    def chunks(hidden: Tensor, chunk: int) -> Iterator[slice]:
        first, *others = row_chunks(hidden, chunk)
        if not isinstance(hidden, FakeTensor):  # a real model, in another thread
            yield from (first, *others)
            return
        outer = ledger.repeated  # of the chunk around a block
        ledger.repeated = outer * max(1, len(others))
        yield first
        ledger.repeated = outer
        yield from others[-1:]

    with mock.patch.object(linear_cross_entropy, "row_chunks", chunks):
        yield


def _mark_blocks(ledger: Ledger, blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
    """Mark in the ledger where the forward and the backward pass of each block begin and end."""
    in_backward = False

    def mark_block(number: int, block: nn.Module) -> list[RemovableHandle]:
        @by_token
        def begin_forward(*_: Any) -> None:
            if not in_backward:  # checkpointing calls the block again in the backward pass
                ledger.mark(number)

        @by_token
        def end_forward(_: nn.Module, __: Any, output: Any) -> None:
            if in_backward:
                return
            ledger.mark(None)
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(begin_backward)

        def begin_backward(_: Tensor) -> None:
            nonlocal in_backward
            in_backward = True
            ledger.mark(number)

        return [
            block.register_forward_pre_hook(begin_forward),
            block.register_forward_hook(end_forward),
        ]

    return [handle for n, block in enumerate(blocks) for handle in mark_block(n, block)]


def _whole_step(segments: list[Segment], repeats: list[int]) -> Step:
    """Return the step of the whole model: repeat the segments of the i-th block `repeats[i]` times."""
    missing: dict[Kind, int] = dict.fromkeys(KINDS, 0)  # bytes of earlier repetitions
    peak, total, widest = dict(missing), Work(), 0
    for segment in segments:
        times = 1 if segment.block is None else repeats[segment.block]
        growth = {kind: segment.end[kind] - segment.start[kind] for kind in KINDS}
        # Every repetition adds or frees the same memory, so the peak is in the first or the last one.
        for repetition in range(times):
            if repetition:
                missing = {kind: missing[kind] + growth[kind] for kind in KINDS}
            alive = {kind: missing[kind] + segment.peak[kind] for kind in KINDS}
            if sum(alive.values()) > sum(peak.values()):
                peak = alive
        total += segment.work.times(times)
        widest = max(widest, segment.widest)
    return Step({kind: max(0, peak[kind]) for kind in KINDS}, total, widest)
