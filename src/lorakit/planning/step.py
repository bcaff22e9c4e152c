"""One training step of a model without weights: what it holds at its fullest moment, and what it computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.compute.objective import Batch, Objective
from lorakit.models.blocks import stacks
from lorakit.models.layers import by_token
from lorakit.planning.ledger import KINDS, Kind, Ledger, Segment, Work

FORWARD, BACKWARD, HEAD = "forward", "backward", "head"


@dataclass(frozen=True)
class Step:
    """A forward and backward pass."""

    peak: dict[Kind, int]
    """Bytes alive at its fullest moment, beside weights and optimizer."""
    work: Work
    widest: int
    """Bytes of the largest matrix that a product reads."""


@dataclass
class Shortened:
    """A model of which a stretch of equal blocks is left out, for their first three say it all."""

    repeats: dict[nn.Module, int] = field(default_factory=dict)
    """A kept block that stands for several -> for how many."""
    blocks: list[nn.Module] = field(default_factory=list)
    """The kept blocks, in order."""


def shorten(model: nn.Module) -> Shortened:
    """Leave out of `model`, for good, the blocks that are like their neighbours on both sides.

    Blocks are alike that have parameters (an adapter's included) of the same names, shapes and dtypes, trained or
    not. Of a stretch of them the first, the second and the last are kept; the second stands for all in between.
    """
    kept = Shortened()
    for path, blocks in stacks(model).items():
        container = model.get_submodule(path)
        assert isinstance(container, nn.ModuleList)
        chosen: list[nn.Module] = []
        for _, run in groupby((model.get_submodule(block) for block in blocks), key=_signature):
            alike = list(run)
            if len(alike) > 3:
                kept.repeats[alike[1]] = len(alike) - 2
                alike = [alike[0], alike[1], alike[-1]]
            chosen += alike
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], nn.ModuleList(chosen))
        kept.blocks += chosen
    return kept


def _signature(block: nn.Module) -> tuple[Any, ...]:
    tensors = [
        (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()
    ]
    return (type(block), *tensors)


def run_step(
    model: nn.Module,
    short: Shortened,
    objective: Objective,
    batch: Batch,
    *,
    autocast: AbstractContextManager[Any],
    accumulates: bool,
) -> Step:
    """Run a step of `model`, whose parameters are fake tensors, inside their `FakeTensorMode`.

    Args:
        model: A model after `shorten`.
        short: What that left out.
        objective: Its loss.
        batch: A batch of ordinary tensors.
        autocast: The context of the forward pass.
        accumulates: Whether gradients of an earlier batch of the step are there already, which are not counted.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if accumulates else None
    gradients = [p.grad for p in trained if p.grad is not None]
    known = [*model.parameters(), *model.buffers(), *batch.values(), *gradients]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0) or 0
    ledger = Ledger(known, vocabulary)
    handles = _marks(ledger, short.blocks)
    handles += [p.register_post_accumulate_grad_hook(_note_gradient(ledger)) for p in trained]
    try:
        with ledger:
            with autocast, ledger.saved_tensors():
                loss = objective.loss_sum(model, batch)
            ledger.mark(f"{BACKWARD} {HEAD}")
            loss.backward()
            ledger.close()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    positions = {f"{n}": short.repeats[b] for n, b in enumerate(short.blocks) if b in short.repeats}
    return _whole(ledger.segments, positions)


def _marks(ledger: Ledger, blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
    """Let the ledger know where each block begins and ends, on the way forward and on the way back."""
    going_back = False

    def before(number: int) -> Callable[..., None]:
        @by_token
        def hook(*_: Any) -> None:
            if not going_back:  # a block that is checkpointed is called again
                ledger.mark(f"{FORWARD} {number}")

        return hook

    def after(number: int) -> Callable[..., None]:
        def reached(_: Tensor) -> None:
            nonlocal going_back
            going_back = True
            ledger.mark(f"{BACKWARD} {number}")

        @by_token
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if going_back:
                return
            ledger.mark(HEAD)
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(reached)

        return hook

    handles = []
    for number, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(before(number)))
        handles.append(block.register_forward_hook(after(number)))
    return handles


def _note_gradient(ledger: Ledger) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.note(parameter.grad, "gradients")

    return hook


def _whole(segments: list[Segment], repeats: dict[str, int]) -> Step:
    """The step of the whole model: segments of a block that stands for several come as often."""
    missing: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    peak, total, widest = dict(missing), Work(), 0
    for segment in segments:
        found = re.search(r"\d+$", segment.name)
        times = repeats.get(found[0], 1) if found else 1
        grows = segment.growth
        # What a repetition adds or takes away is the same each time: the fullest is the first or the last.
        for _ in range(times):
            reached = {kind: missing[kind] + segment.peak[kind] for kind in KINDS}
            if sum(reached.values()) > sum(peak.values()):
                peak = reached
            missing = {kind: missing[kind] + grows[kind] for kind in KINDS}
        missing = {kind: missing[kind] - grows[kind] for kind in KINDS}
        total += segment.work.times(times)
        widest = max(widest, segment.widest)
    return Step({kind: max(0, peak[kind]) for kind in KINDS}, total, widest)
