"""Shard the weights of a model's blocks over processes with FSDP2.

Each process holds a part of every block. A block gathers its weights from all processes before its forward pass and
before its backward pass, and drops them afterwards. So all processes must run the same passes. Embeddings, the
final norm and the head are not sharded, so that code can read them without a forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lorakit.models.blocks import blocks_of
from lorakit.models.layers import by_token
from lorakit.models.tree import is_of_adapter, without_wrappers

_REACHED = "_lorakit_reached"
"""Attribute of a sharded parameter that has got a gradient in this process."""


def shard_blocks(model: nn.Module, device: torch.device) -> None:
    """Shard the weights of the blocks over all processes, and move the model to `device`.

    The class of each block gets the prefix ``FSDP``. The tensors that adapters add are not sharded. A trained copy
    of a base tensor takes the place of that tensor and is sharded like it; its gradient is the sum over the processes.
    While the model is on the CPU, one block at a time moves to the device.
    """
    from torch.distributed.fsdp import share_comm_ctx  # older PyTorch cannot shard, and lacks it

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = blocks_of(model)
    unsharded = _unsharded_parameters(model, blocks)
    for block in blocks:
        block.register_forward_hook(_copy_views)  # before the hook of FSDP2
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=unsharded)
        assert isinstance(block, FSDPModule)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)  # Gloo has no other operation
        # A parameter may have a gradient in some processes only, and all of them must send the same tensors.
        block.set_reduce_scatter_unused_params(True)
        _mark_gradients(block)
    # Else each block, a root of FSDP2 of its own, keeps its full gradient until the backward pass has ended.
    share_comm_ctx(blocks)  # type: ignore[arg-type]
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_sharded(tensor):  # `model.to` could replace the sharded parameters
            tensor.data = tensor.data.to(device)


def _unsharded_parameters(model: nn.Module, blocks: list[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters that are not sharded: those of adapters, those with two uses, those that FSDP2 rejects.

    A parameter that two blocks share, or a block and another part of the model, would be sharded in one place only.
    """
    # A trained copy has the name of the base tensor first, and a second name inside the adapter.
    names = {parameter: name for name, parameter in model.named_parameters()}
    uses = Counter(p for block in blocks for p in block.parameters())
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            uses.update(module.parameters(recurse=False))
    return {
        p
        for p, name in names.items()
        if is_of_adapter(name) or uses[p] > 1 or not p.ndim or not p.is_contiguous()
    }


def _mark_gradients(block: nn.Module) -> None:
    """Let each sharded parameter that is trained record whether its backward pass has reached it in this process."""
    parts = {name: p for name, p in block.named_parameters() if is_sharded(p) and p.requires_grad}
    with gathered(block):  # FSDP2 uses the same full parameters in every pass
        full = dict(block.named_parameters())
        for name, part in parts.items():
            full[name].register_post_accumulate_grad_hook(partial(_mark, part))


def _mark(part: nn.Parameter, _: Tensor) -> None:
    setattr(part, _REACHED, True)


def pop_reached(part: nn.Parameter) -> bool:
    """Return whether a sharded parameter got a gradient in this process since the last call, and reset that.

    The gradient itself does not show it: FSDP2 adds up the parts of all processes, with zeros where there is none.
    """
    is_reached = getattr(part, _REACHED, False)
    setattr(part, _REACHED, False)
    return is_reached


@by_token
def _copy_views(block: nn.Module, args: Any, output: Any) -> Any:
    """Return a block's output without views, as FSDP2 needs it.

    FSDP2 gathers the weights for the backward pass in a hook on the output tensor. An operation in place on a view
    loses this hook.
    """

    def copied(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) and x.requires_grad and x._is_view() else x

    return tuple(map(copied, output)) if isinstance(output, tuple) else copied(output)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether FSDP2 or DeepSpeed's ZeRO-3 has sharded the tensor over processes."""
    return isinstance(tensor, DTensor) or "ds_id" in tensor.__dict__


def sharded_part(model: nn.Module) -> str | None:
    """Return the name of a module or parameter that is sharded over processes; None if none is."""
    for path, module in model.named_modules():
        # Between forward and backward FSDP2 may hold plain parameters.
        if isinstance(module, FSDPModule):
            return without_wrappers(path) or type(module).__name__
    return next(
        (without_wrappers(name) for name, p in model.named_parameters() if is_sharded(p)), None
    )


def full_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor with the parts of all processes; DeepSpeed empties what it shards."""
    return tensor.__dict__.get("ds_shape", tensor.shape)


@contextmanager
def full_tensor(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor with the parts of all processes, which must call this together."""
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    elif is_sharded(tensor):
        from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

        with GatheredParameters(tensor):
            yield tensor
    else:
        yield tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, without a copy; an unsharded tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the memory of `tensors` in this process."""
    return sum(part.numel() * part.element_size() for part in map(local_part, tensors))


def shard_like(full: Tensor, other: Tensor) -> Tensor:
    """Return a full tensor sharded as `other` is; all processes have the same values, so nothing is sent."""
    if not isinstance(other, DTensor):
        return full
    on_device = full.to(other.device)
    return distribute_tensor(on_device, other.device_mesh, other.placements, src_data_rank=None)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold the full weights of a sharded block inside the context; other modules always hold theirs."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def reset_after_error(model: nn.Module) -> None:
    """Make a model usable again after an exception inside a block, where FSDP2 skips its own hooks."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reset_iter_state()
