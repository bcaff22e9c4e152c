"""One optimizer step of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.compute.objective import SequenceToSequenceLoss
from lorakit.models.sharding import is_sharded
from lorakit.training.divergence import require_finite
from lorakit.training.interruption import Interruption, Signals
from lorakit.training.job import Job
from lorakit.training.noise import seed_batch
from lorakit.training.optimizer import clip_gradients, set_rate
from lorakit.training.schedule import Step
from lorakit.training.sharding import drop_unreached_gradients, local_gradient_terms


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of a step, over all processes."""

    loss: float
    """Mean loss over the targets."""
    rate: float
    """Learning rate."""
    norm: float
    """Gradient norm before clipping."""
    tokens: int
    """Tokens of the examples, without virtual tokens and savings by packing."""
    computed_tokens: int
    """Tokens that the model computed for them."""
    signals: Signals
    """Signals that a process has received."""
    halved: bool
    """Whether a process ran out of memory and halved its batch size."""


def optimizer_step(
    job: Job, examples: Step, step: int, interruption: Interruption | None = None
) -> StepResult:
    """Update the weights once. Each process computes its share of the examples and gets the same result.

    `step` is the number of finished steps, which determines the learning rate.

    Raises:
        Interrupted: This is the only process, and it has received a signal before its last batch; the weights are not
            updated.
        DivergenceError: The loss or the gradient norm is not finite; the weights are not updated.
        LorakitError: A single example does not fit into memory; the weights are not updated.
    """
    interruption = interruption or Interruption()
    before = job.batch_size.size
    part = job.batch_size.fit(
        lambda: _compute_share(job, examples, step, interruption.check_alone),
        lengths=[len(job.train[i]) for indices in job.share(examples) for i in indices],
        during=f"step {step + 1}",
    )
    own = (*part, *interruption.received(), job.batch_size.size < before)
    parameters = job.parameters.values()
    sharded = [p for p in parameters if is_sharded(p)]  # FSDP2 has summed their gradients
    unsharded = [p for p in parameters if not is_sharded(p)]
    sums = job.processes.sum_gradients(unsharded, [*own, *local_gradient_terms(sharded)])
    loss, (tokens, computed, *signals, halved) = sums[0], map(int, sums[1 : len(own)])
    square = drop_unreached_gradients(sharded, sums[len(own) :])
    rate = set_rate(job.optimizer, job.rate_factor(step))
    norm = clip_gradients(job.optimizer, job.config.optimizer.clip, square)
    require_finite(step, loss, norm, rate)
    job.optimizer.step()
    job.optimizer.zero_grad()
    return StepResult(
        loss=loss,
        rate=rate,
        norm=norm,
        tokens=tokens,
        computed_tokens=computed,
        signals=(signals[0], signals[1]),
        halved=bool(halved),
    )


def _compute_share(
    job: Job, examples: Step, step: int, check: Callable[[], None]
) -> tuple[float, int, int]:
    """Compute the gradients of this process's share of a step; return its loss, tokens and computed tokens."""
    for parameter in job.parameters.values():
        parameter.grad = None  # a failed attempt may have left some
    share = [[job.train[i] for i in indices] for indices in job.share(examples)]
    target_count = sum(job.count_targets(job.train[i]) for i in examples)
    # Each batch is made when it is needed: meanwhile a GPU computes the one before.
    loss, computed = _accumulate_gradients(job, map(job.collate, share), target_count, step, check)
    if job.config.shard:
        _take_part(job, examples, step)
    return loss, sum(len(example) for batch in share for example in batch), computed


def _accumulate_gradients(
    job: Job,
    batches: Iterable[Mapping[str, Tensor]],
    target_count: int,
    step: int,
    check: Callable[[], None],
) -> tuple[float, int]:
    """Run forward and backward on this process's batches of a step.

    The mean is over the targets of the whole step, not over batches, so a batch with more targets counts more. 4
    batches of 4 examples give the gradient of one batch of 16, in one process or in several. Return the batches' part
    of the step's mean loss, and the number of tokens in them.
    """
    is_encoder_decoder = isinstance(job.objective, SequenceToSequenceLoss)
    inputs = ("input_ids", "labels") if is_encoder_decoder else ("input_ids",)  # of the decoder
    shares, computed = [], 0
    for number, batch in enumerate(batches):
        check()
        computed += sum(batch[name].numel() for name in inputs)
        seed_batch(job, step, number)
        with job.autocast():
            batch_share = job.objective.loss_sum(job.model, batch) / target_count
        batch_share.backward()
        shares.append(batch_share.detach())
    # Read once, after the last batch: reading a loss waits for a GPU, which could compute the next batch meanwhile.
    return sum(torch.stack(shares).tolist()) if shares else 0.0, computed


def _take_part(job: Job, examples: Step, step: int) -> None:
    """Run as many passes as the process with the most batches, the surplus ones on an example of the step.

    Every pass gathers the weights from all processes. The loss of a surplus pass has the weight 0.
    """
    batches = job.share.of_all(examples)
    surplus = max(map(len, batches)) - len(batches[job.processes.rank])
    for _ in range(surplus):
        batch = job.collate([job.train[examples[0]]])
        with job.autocast():
            loss = job.objective.loss_sum(job.model, batch)
        (0.0 * loss).backward()
