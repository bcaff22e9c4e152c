"""One optimizer step of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lorakit.training.optimizer import clip_gradients, require_finite, set_rate
from lorakit.training.setup import Job


def optimizer_step(
    job: Job, optimizer: Optimizer, batches: Sequence[Mapping[str, Tensor]], step: int
) -> tuple[float, float, float]:
    """Update the weights once; return the loss, the learning rate, and the gradient norm before clipping.

    Args:
        job: The run.
        optimizer: From `build_optimizer`, over the parameters of `job`.
        batches: The batches of this step.
        step: Number of finished steps, which determines the learning rate.

    Raises:
        LorakitError: The loss or the gradient norm is not finite; the weights are not updated.
    """
    loss = _accumulate_gradients(job, batches)
    rate = set_rate(optimizer, job.rate_factor(step))
    norm = clip_gradients(optimizer, job.config.optimizer.clip)
    require_finite(step, loss, norm, rate)
    optimizer.step()
    optimizer.zero_grad()
    return loss, rate, norm


def _accumulate_gradients(job: Job, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Run forward and backward on all batches of a step; return the mean loss over all their targets.

    The mean is over targets, not over batches, so a batch with more targets counts more. 4 batches of 4 examples give
    the gradient of one batch of 16.
    """
    target_count = sum(job.objective.count(batch) for batch in batches)
    loss = 0.0
    for batch in batches:
        with job.autocast():
            batch_share = job.objective.loss_sum(job.model, batch) / target_count
        batch_share.backward()
        loss += batch_share.item()
    return loss
