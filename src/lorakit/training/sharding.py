"""The setting ``shard``: the weights of the base sharded over the processes of a run (`lorakit.models.sharding`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lorakit.adapters.installed import adapted_layers, base_weights
from lorakit.errors import ConfigurationError
from lorakit.formatting import size
from lorakit.models.base_config import BaseConfig
from lorakit.models.blocks import blocks_of
from lorakit.models.packed import PackedWeight
from lorakit.models.quantised import QuantisedWeight
from lorakit.models.sharding import (
    full_tensor,
    held_bytes,
    is_sharded,
    local_part,
    pop_reached,
    shard_blocks,
)
from lorakit.training.distributed import COMMAND, Processes
from lorakit.training.process_failures import CHECKED_FOR


def require_support(processes: Processes) -> None:
    """Reject ``shard`` for a run of one process, and with a PyTorch that is too old.

    Raises:
        ConfigurationError: With the command that starts several processes, or the version to install.
    """
    # The newest method that `shard_blocks` calls.
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigurationError(
            f"shard is true, but PyTorch {torch.__version__} cannot shard weights as lorakit needs it. Install PyTorch "
            "2.13 or newer, or set shard to false (--shard false)."
        )
    if processes.count == 1:
        raise ConfigurationError(
            f"shard is true, but this run has one process. Start several with {COMMAND}, or set shard to false "
            "(--shard false)."
        )


def require_shardable(model: nn.Module, base: BaseConfig) -> None:
    """Reject a base whose weights cannot be sharded.

    Raises:
        ConfigurationError: It has no blocks, skips blocks at random, or is quantised.
    """
    if not blocks_of(model):
        raise ConfigurationError(
            f"shard is true, but {type(model).__name__} has no list of blocks to shard. Set it to false."
        )
    # A process that skips a block would compute the next one with the weights that the others gather.
    rates = {name: rate for name, rate in vars(model.config).items() if name.endswith("layerdrop")}
    if dropped := [name for name, rate in rates.items() if rate]:
        raise ConfigurationError(
            f"shard is true, but '{base.name}' skips blocks at random ({dropped[0]} {rates[dropped[0]]}), and each "
            "process would skip others. Set it to 0 in the config.json of the base, or set shard to false (--shard "
            "false)."
        )
    for name, weight in base_weights(model):
        if isinstance(weight, (QuantisedWeight, PackedWeight)):
            raise ConfigurationError(
                f"shard is true, but '{name}' of '{base.name}' is quantised to {weight.kind}, and quantised weights "
                "cannot be sharded. Load the base in bfloat16, or set shard to false (--shard false)."
            )


def shard_base(model: nn.Module, device: torch.device) -> None:
    """Shard the weights of a base, with its adapter, over the processes, and drop all full copies.

    Where the adapter trains a copy of a base tensor, the original is dropped: a run computes with the copy only. The
    base's fingerprint has to be taken before.
    """
    for _, _, adapters in adapted_layers(model):
        for attribute in list(adapters.replaced):
            adapters.forget(attribute)
    shard_blocks(model, device)


@contextmanager
def gathering(processes: Processes) -> Iterator[None]:
    """Replace the error of a failed collective of a sharded model inside by one that names the failed process.

    Raises:
        LorakitError: Another process has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        with processes.communication():
            # The other waiting processes fail too, and record that they came this far: the missing ones are late.
            time.sleep(CHECKED_FOR)
            raise


def local_gradient_terms(parameters: Sequence[nn.Parameter]) -> list[float]:
    """Return this process's terms of sums over the processes about the gradients of sharded parameters.

    The terms are the squared norm of its parts, and for each parameter whether it has contributed to its gradient.
    """
    parts = [local_part(p.grad) for p in parameters if p.grad is not None]
    return [
        float(nn.utils.get_total_norm(parts)) ** 2,
        *(float(pop_reached(p)) for p in parameters),
    ]


def drop_unreached_gradients(parameters: Sequence[nn.Parameter], sums: Sequence[float]) -> float:
    """Drop the gradients to which no process has contributed; return the squared norm of all.

    `sums` are those of `local_gradient_terms` over the processes.
    """
    square, *counts = sums
    for parameter, count in zip(parameters, counts, strict=True):
        if not count:
            parameter.grad = None
    return square


def gather_in_first(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Return the tensors, gathered on the CPU if they are sharded; an empty dict in all processes but the first.

    All processes must call it.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        with full_tensor(tensor.detach()) as full:
            if processes.is_first:
                found[name] = full.cpu() if is_sharded(tensor) else tensor
    return found


def sharding_note(model: nn.Module, processes: Processes) -> str:
    """Return what each process holds of the model, for the user."""
    parameters = list(model.parameters())
    held, full = held_bytes(parameters), sum(p.numel() * p.element_size() for p in parameters)
    return f"weights sharded over {processes.count} processes: {size(held)} of {size(full)} in this one"
