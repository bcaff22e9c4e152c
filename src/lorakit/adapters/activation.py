"""Which adapters act now, and which acted when a checkpointed block first ran."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from lorakit.errors import AdapterStateError


@dataclass(frozen=True)
class Active:
    """A choice of adapters: by weight for the whole batch, or by name for each of its rows."""

    weights: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None

    @property
    def names(self) -> frozenset[str]:
        """Adapters that act on at least one row."""
        if self.rows is not None:
            return frozenset(name for name in self.rows if name is not None)
        return frozenset(name for name, _ in self.weights)


class Activation:
    """The choice in force on one model, shared by all of its adapted layers.

    Gradient checkpointing runs a block again in the backward pass, when the choice may have changed
    (a `per_sample` block has ended, another adapter is active). `current` then returns the choice of
    the first run, or refuses where it cannot know it: gradients are never silently those of another
    adapter.
    """

    def __init__(self) -> None:
        self.active = Active()
        self.swapping: set[str] = set()
        """Adapters with trained copies of base tensors, which take their places in the model."""
        self._reentrant: set[Active] = set()
        self._recomputing = False

    def current(self) -> Active:
        """The choice that holds for the forward pass being run, first or again."""
        if torch.compiler.is_compiling():
            return self.active  # a compiled graph has the choice of its trace, guarded
        frames = _checkpoint_frames()
        for frame, again in frames:
            if again:
                return self._replay(getattr(frame, _RECORD, self.active))
        for frame, _ in frames:
            if not hasattr(frame, _RECORD):
                setattr(frame, _RECORD, self.active)
        if not frames and torch._C._current_graph_task_id() != -1:
            self._check_reentrant()
        elif not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            self._remember_reentrant()
        return self.active

    @property
    def recomputation_pending(self) -> bool:
        """Whether a reentrant checkpoint has run once, and may be run again by a backward pass."""
        return bool(self._reentrant) and not self._recomputing

    def _replay(self, recorded: Active) -> Active:
        if recorded != self.active and (recorded.names | self.active.names) & self.swapping:
            raise AdapterStateError(
                "The active adapter changed between the forward and the backward pass of a checkpointed block, and "
                "biases or modules trained in full have taken other places since. Keep it unchanged until "
                "backward() has returned."
            )
        return recorded

    def _remember_reentrant(self) -> None:
        """Note the choice of a reentrant checkpoint's first run, which leaves no frame to find it by."""
        caller = sys._getframe()
        while caller is not None and caller.f_code is not _REENTRANT_FORWARD:
            caller = caller.f_back
        if caller is None:
            return
        if self._recomputing:  # a new step: the choices of the last one are spent
            self._reentrant.clear()
            self._recomputing = False
        self._reentrant.add(self.active)

    def _check_reentrant(self) -> None:
        self._recomputing = True
        if self._reentrant - {self.active}:
            raise AdapterStateError(
                "The active adapter changed between the forward and the backward pass, and reentrant gradient "
                "checkpointing runs the forward again. Keep it unchanged until backward() has returned, or use "
                "non-reentrant checkpointing: gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


_RECORD = "lorakit_active"
_SAVED_TENSOR_HOOKS: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_REENTRANT_FORWARD = CheckpointFunction.forward.__code__


def _checkpoint_frames() -> list[tuple[Any, bool]]:
    """The non-reentrant checkpoints being run, innermost first, and whether each runs for the second time.

    PyTorch pushes saved-tensor hooks around both runs. Their closures lead to one frame object, which
    lives as long as the checkpoint. Checkpoints can be nested, and only the top of the stack shows.
    """
    if _SAVED_TENSOR_HOOKS._top_saved_tensors_default_hooks(True) is None:
        return []
    stack = []
    while (hooks := _SAVED_TENSOR_HOOKS._top_saved_tensors_default_hooks(True)) is not None:
        stack.append(hooks)
        _SAVED_TENSOR_HOOKS._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(stack):
        _SAVED_TENSOR_HOOKS._push_saved_tensors_default_hooks(pack, unpack)
    return [found for pack, _ in stack if (found := _frame_of(pack)) is not None]


def _frame_of(pack_hook: Any) -> tuple[Any, bool] | None:
    pack_hook = inspect.unwrap(pack_hook)
    code = getattr(pack_hook, "__code__", None)
    if code is None:
        return None
    for name, cell in zip(code.co_freevars, pack_hook.__closure__ or (), strict=True):
        if name == "frame" and hasattr(cell.cell_contents, "recompute_fn"):
            return cell.cell_contents, False
        if name == "target_frame_ref":
            return cell.cell_contents(), True
    return None
