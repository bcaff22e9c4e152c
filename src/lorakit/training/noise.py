"""Reject dropout in a run on several processes, where it would depend on their number."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import ConfigurationError
from lorakit.models.compiling import compiled_blocks_idle
from lorakit.models.sharding import own_part
from lorakit.training.checkpoint import random_states, restore_random_states
from lorakit.training.setup import ADAPTER, Job

TOLERANCE = 1e-4
"""Relative difference of two gradients without noise: kernels of a GPU may add in another order each time."""


def require_no_noise(job: Job) -> None:
    """Reject a model whose gradients depend on random numbers, if the run has several processes.

    Its settings do not show it reliably, so this computes the gradient of one example twice, with other random
    numbers, unless the first time draws none.

    Raises:
        ConfigurationError: The adapter or the base has dropout, or another kind of noise.
    """
    if job.processes.count == 1:
        return
    before = random_states()
    first = _gradient(job)
    draws = any(not torch.equal(before[name], state) for name, state in random_states().items())
    noisy = draws and not torch.allclose(
        first, _gradient(job), rtol=0, atol=TOLERANCE * float(first.abs().max())
    )
    restore_random_states(before)
    if noisy:
        raise ConfigurationError(
            f"{_source(job)}, which {job.processes.count} processes do not support yet: its random numbers would "
            "depend on the number of processes. Set it to 0, or train with one process."
        )


def _gradient(job: Job) -> Tensor:
    """Return the gradient of the first example; of split parameters, the part of this process."""
    parameters = list(job.parameters.values())
    with compiled_blocks_idle(job.model), job.autocast():
        loss = job.objective.loss_sum(job.model, job.collate([job.train[0]]))
        loss.backward()
    gradients = [own_part(p.grad).flatten() for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(gradients)


def _source(job: Job) -> str:
    """Return where the noise comes from: the adapter's dropout, or the settings of the base."""
    modules = job.adapters.modules(ADAPTER).values()
    rates = {rate for module in modules if (rate := getattr(module, "dropout", 0.0))}
    if rates:
        return f"lora.dropout is {max(rates)}"
    settings = job.model.config.get_text_config().to_dict()
    of_base = ", ".join(
        f"{name} {value}"
        for name, value in settings.items()
        if "drop" in name and isinstance(value, float) and value > 0
    )
    return f"The base '{job.base.source.name}' has dropout ({of_base or 'not among its settings'})"
