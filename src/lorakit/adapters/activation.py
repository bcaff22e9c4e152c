"""The active adapters, and those that were active when a checkpointed block first ran."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils.checkpoint import CheckpointFunction

from lorakit.errors import AdapterStateError


@dataclass(frozen=True)
class Active:
    """The active adapters: by weight for the whole batch, or by name for each row."""

    weights: tuple[tuple[str, float], ...] = ()
    """Name and weight of each active adapter (see `Adapters.activate`)."""
    rows: tuple[str | None, ...] | None = None
    """Adapter name of each row of the batch, inside `Adapters.per_sample`; otherwise None."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the adapters that are active on at least one row."""
        if self.rows is not None:
            return frozenset(name for name in self.rows if name is not None)
        return frozenset(name for name, _ in self.weights)

    def rows_of(self, name: str, batch: int) -> list[int]:
        """Return the rows of a batch that use an adapter; requires `rows`.

        Beam search repeats each row in place, and a flattened (batch, length) keeps rows together.
        """
        assert self.rows is not None
        repeat = max(min(batch, 1), batch // len(self.rows))  # an empty batch has no rows
        return [
            i * repeat + j for i, row in enumerate(self.rows) if row == name for j in range(repeat)
        ]

    def rows_by_adapter(self, batch: int) -> Iterator[tuple[str, list[int] | None]]:
        """Yield each adapter with the rows of the batch that use it; None means every row."""
        if self.rows is None:
            yield from ((name, None) for name, _ in self.weights)
            return
        for name in dict.fromkeys(self.rows):
            if name is not None:
                yield name, self.rows_of(name, batch)


class Moment(NamedTuple):
    """The active adapters and the state of a forward pass."""

    active: Active
    pass_state: Any
    """See `Activation.pass_state`."""


class Activation:
    """The active adapters of one model, shared by all of its adapted layers.

    Gradient checkpointing runs a block again in the backward pass. Until then the active adapters may have
    changed (a `per_sample` block has ended, another adapter is active). `moment` then returns those of the
    first run. It raises an error if their tensors have left the model, because the gradients would silently
    be those of another adapter.
    """

    def __init__(self) -> None:
        self.active = Active()
        self.part: Active | None = None
        """The active adapter of some rows, while a layer is recomputed for these rows only."""
        self.names: set[str] = set()
        """Names of all adapters of the model."""
        self.swapping: set[str] = set()
        """Names of the adapters with trained copies of base tensors, which replace these tensors while active."""
        self.pass_state: Any = None
        """State of the current forward pass, set and cleared by the hooks that adapter modules declare. It is
        immutable, because a checkpoint records it for the recomputation."""
        self._records: WeakKeyDictionary[Any, Moment] = WeakKeyDictionary()
        """The moment of each checkpoint's first run; an entry is dropped with its checkpoint."""

    def __getstate__(self) -> dict[str, Any]:
        # The recorded checkpoints recompute this model, not a copy of it.
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _records=WeakKeyDictionary())

    def moment(self) -> Moment:
        """Return the active adapters and the pass state of the current forward pass, first run or recomputation."""
        now = Moment(self.part or self.active, self.pass_state)
        if torch.compiler.is_compiling():
            return now  # Dynamo guards on the active adapters
        checkpoints = _checkpoints() + _reentrant_checkpoints()
        if not checkpoints:
            return now
        # The layer that sets `part` has already looked up the record.
        if self.part is None:
            recomputed = next((checkpoint for checkpoint, again in checkpoints if again), None)
            now = now if recomputed is None else self._replay(self._records.get(recomputed, now))
        for checkpoint, again in checkpoints:
            if not again:
                self._records.setdefault(checkpoint, now)
        return now

    @property
    def recomputation_pending(self) -> bool:
        """Whether a backward pass may still recompute a checkpoint."""
        return bool(self._records)

    def _replay(self, first_run: Moment) -> Moment:
        """Return the moment of a checkpoint's first run, if its tensors are still in the model."""
        recorded = first_run.active
        if removed := recorded.names - self.names:
            raise AdapterStateError(
                f"'{min(removed)}' was removed between the forward and the backward pass of a checkpointed block. "
                "Remove it after backward() has returned."
            )
        if recorded != self.active and (recorded.names | self.active.names) & self.swapping:
            raise AdapterStateError(
                "The active adapter changed between the forward and the backward pass of a checkpointed block, and "
                "biases or modules trained in full were swapped. Keep the same adapter active until backward() "
                "has returned."
            )
        return first_run


_SAVED_TENSOR_HOOKS: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


def _checkpoints() -> list[tuple[Any, bool]]:
    """Return the running non-reentrant checkpoints, innermost first, each with True if this is the recomputation.

    PyTorch pushes saved-tensor hooks around both runs. Their closures reference one frame object, which
    lives as long as the checkpoint. Checkpoints can be nested, and PyTorch exposes only the top of the stack.
    """
    if _SAVED_TENSOR_HOOKS._top_saved_tensors_default_hooks(True) is None:
        return []
    stack = []
    while (hooks := _SAVED_TENSOR_HOOKS._top_saved_tensors_default_hooks(True)) is not None:
        stack.append(hooks)
        _SAVED_TENSOR_HOOKS._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(stack):
        _SAVED_TENSOR_HOOKS._push_saved_tensors_default_hooks(pack, unpack)
    return [frame for pack, _ in stack if (frame := _frame_of(pack)) is not None]


def _frame_of(pack_hook: Any) -> tuple[Any, bool] | None:
    """Return the checkpoint frame of a saved-tensor hook, and True in the recomputation; None for other hooks."""
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


_FIRST_RUN = CheckpointFunction.forward.__code__
_SECOND_RUN = CheckpointFunction.backward.__code__


def _reentrant_checkpoints() -> list[tuple[Any, bool]]:
    """Return the running reentrant checkpoints, as `_checkpoints` does.

    The autograd function's forward is the first run, and its backward the recomputation. Both have the
    function's context in their stack frame. It lives as long as the graph. A checkpoint is not found if its block
    switches inference mode or forward-mode gradients.
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
            checkpoints.append((caller.f_locals["ctx"], code is _SECOND_RUN))
        caller = caller.f_back
    return checkpoints
