"""Which gradient checkpoints are running: the only file that reads private names of PyTorch's checkpointing.

PyTorch offers no public way to ask whether code runs inside a checkpoint, or whether this is its first run or the
recomputation in the backward pass. `tests/models/test_checkpoints.py` fails first when one of these names moves:

- `torch.utils.checkpoint._CheckpointFrame.recompute_fn`, and the free variables `frame` and `target_frame_ref` of the
  saved-tensor hooks that hold it (non-reentrant checkpoints);
- `torch.utils.checkpoint.CheckpointFunction`: the local variable `ctx` of its forward and backward, and
  `ctx.run_function` (reentrant checkpoints);
- `torch.utils.checkpoint._CachingTorchDispatchMode` and `_CachedTorchDispatchMode` (selective checkpoints),
  `torch._C._len_torch_dispatch_stack`, `torch.utils._python_dispatch._get_current_dispatch_mode_stack`;
- `torch._C._autograd._top_saved_tensors_default_hooks`, `_push_...` and `_pop_saved_tensors_default_hooks`,
  `torch._C._is_fwd_grad_enabled` and `torch._C._current_graph_task_id`.

Tested with PyTorch 2.13 and 2.15.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple, NoReturn

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import (
    CheckpointFunction,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
)

from lorakit.errors import AdapterStateError

_HOOKS: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
_FIRST_RUN = CheckpointFunction.forward.__code__
_SECOND_RUN = CheckpointFunction.backward.__code__


class Checkpoint(NamedTuple):
    """One run of a checkpointed block."""

    key: Any
    """An object that lives as long as the checkpoint; the same one in both runs."""
    is_recomputation: bool
    """Whether this is the run in the backward pass."""


def running_checkpoints() -> list[Checkpoint]:
    """Return the checkpoints whose block is running in this thread, innermost first by kind.

    A reentrant checkpoint is not found if its block switches inference mode or forward-mode gradients.
    """
    return _non_reentrant() + _reentrant()


def caches_outputs() -> bool:
    """Whether a selective checkpoint caches the outputs of operations, which nobody may then modify in place."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack())


def forbid_recomputation(key: Any, error: Exception) -> None:
    """Make the recomputation of a checkpoint raise `error`, if there is one; `key` is `Checkpoint.key`."""

    def refuse(*_: Any) -> NoReturn:
        raise error

    setattr(key, "recompute_fn" if hasattr(key, "recompute_fn") else "run_function", refuse)


def _non_reentrant() -> list[Checkpoint]:
    """PyTorch pushes saved-tensor hooks around both runs, and exposes only the top of their stack."""
    if _HOOKS._top_saved_tensors_default_hooks(True) is None:
        return []
    stack = []
    while (hooks := _HOOKS._top_saved_tensors_default_hooks(True)) is not None:
        stack.append(hooks)
        _HOOKS._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(stack):
        _HOOKS._push_saved_tensors_default_hooks(pack, unpack)
    return [checkpoint for pack, _ in stack if (checkpoint := _of_hook(pack)) is not None]


def _of_hook(pack_hook: Any) -> Checkpoint | None:
    """Return the checkpoint of a saved-tensor hook; None for the hooks of other code.

    Raises:
        AdapterStateError: It is one of PyTorch's checkpoints, in a form that this version of lorakit does not know.
    """
    pack_hook = inspect.unwrap(pack_hook)
    code = getattr(pack_hook, "__code__", None)
    if code is None:
        return None
    for name, cell in zip(code.co_freevars, pack_hook.__closure__ or (), strict=True):
        if name == "frame" and hasattr(cell.cell_contents, "recompute_fn"):
            return Checkpoint(cell.cell_contents, is_recomputation=False)
        if name == "target_frame_ref":
            return Checkpoint(cell.cell_contents(), is_recomputation=True)
    if pack_hook.__module__ == "torch.utils.checkpoint":
        raise AdapterStateError(
            f"PyTorch {torch.__version__} marks its checkpoints in another way than the versions that lorakit knows, "
            "so a recomputation could use other adapters than its first run. Install an older PyTorch or a newer "
            "lorakit, or train without gradient checkpointing."
        )
    return None


def _reentrant() -> list[Checkpoint]:
    """The forward of the autograd function is the first run, its backward the recomputation.

    Both have the function's context, which lives as long as the graph, in their Python frame.
    """
    if torch.is_inference_mode_enabled():
        return []
    if torch._C._is_fwd_grad_enabled() and torch._C._current_graph_task_id() == -1:
        return []  # the first run disables forward-mode gradients, no_grad does not
    checkpoints = []
    caller = sys._getframe(1)
    while caller is not None:
        code = caller.f_code
        if code is _FIRST_RUN or code is _SECOND_RUN:
            checkpoints.append(Checkpoint(caller.f_locals["ctx"], code is _SECOND_RUN))
        caller = caller.f_back
    return checkpoints
