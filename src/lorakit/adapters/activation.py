"""Which adapters act now, and which acted when a checkpointed block first ran."""

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
    """A choice of adapters: by weight for the whole batch, or by name for each of its rows."""

    weights: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None

    @property
    def names(self) -> frozenset[str]:
        """Adapters that act on at least one row."""
        if self.rows is not None:
            return frozenset(name for name in self.rows if name is not None)
        return frozenset(name for name, _ in self.weights)

    def rows_of(self, name: str, batch: int) -> list[int]:
        """The rows of a batch on which an adapter acts, where adapters are chosen by row.

        Beam search repeats each row in place, and a flattened (batch, length) keeps rows together.
        """
        assert self.rows is not None
        repeat = max(min(batch, 1), batch // len(self.rows))  # an empty batch has no rows
        return [
            i * repeat + j for i, row in enumerate(self.rows) if row == name for j in range(repeat)
        ]

    def rows_by_adapter(self, batch: int) -> Iterator[tuple[str, list[int] | None]]:
        """Yield each adapter with the rows of the batch that it acts on; None is every row."""
        if self.rows is None:
            yield from ((name, None) for name, _ in self.weights)
            return
        for name in dict.fromkeys(self.rows):
            if name is not None:
                yield name, self.rows_of(name, batch)


class Moment(NamedTuple):
    """What a layer computes with: the choice of adapters, and the state of the forward pass."""

    active: Active
    pass_state: Any
    """State that the hooks of an adapter's modules keep for one pass (`Activation.pass_state`)."""


class Activation:
    """The choice in force on one model, shared by all of its adapted layers.

    Gradient checkpointing runs a block again in the backward pass, when the choice may have changed
    (a `per_sample` block has ended, another adapter is active). `current` then returns the choice of
    the first run, or refuses where its tensors are no longer in their places: gradients are never silently
    those of another adapter.
    """

    def __init__(self) -> None:
        self.active = Active()
        self.part: Active | None = None
        """The choice for a part of the batch, while a layer is computed anew for its rows alone."""
        self.names: set[str] = set()
        """All adapters of the model."""
        self.swapping: set[str] = set()
        """Adapters with trained copies of base tensors, which take their places in the model."""
        self.pass_state: Any = None
        """State of the current forward pass, set and cleared by the hooks that adapter modules declare. It is
        immutable, since it is recorded for recomputation in the backward pass."""
        self._records: WeakKeyDictionary[Any, Moment] = WeakKeyDictionary()
        """What held when a checkpoint first ran, for as long as it may run again."""

    def __getstate__(self) -> dict[str, Any]:
        # What may run again are passes of this model, not of a copy.
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _records=WeakKeyDictionary())

    def current(self) -> Active:
        """The choice that holds for the forward pass being run, first or again."""
        return self.moment().active

    def moment(self) -> Moment:
        """Return the choice and the pass state of the current forward pass, first run or recomputation."""
        now = Moment(self.part or self.active, self.pass_state)
        if torch.compiler.is_compiling():
            return now  # a compiled graph has the choice of its trace, guarded
        checkpoints = _checkpoints() + _reentrant_checkpoints()
        if not checkpoints:
            return now
        if self.part is None:  # a part is chosen by a layer that is itself run again
            again = next((checkpoint for checkpoint, second in checkpoints if second), None)
            now = now if again is None else self._replay(self._records.get(again, now))
        for checkpoint, second in checkpoints:
            if not second:
                self._records.setdefault(checkpoint, now)
        return now

    @property
    def recomputation_pending(self) -> bool:
        """Whether a checkpoint has run once, and may be run again by a backward pass."""
        return bool(self._records)

    def _replay(self, then: Moment) -> Moment:
        recorded = then.active
        if removed := recorded.names - self.names:
            raise AdapterStateError(
                f"'{min(removed)}' was removed between the forward and the backward pass of a checkpointed block. "
                "Remove it after backward() has returned."
            )
        if recorded != self.active and (recorded.names | self.active.names) & self.swapping:
            raise AdapterStateError(
                "The active adapter changed between the forward and the backward pass of a checkpointed block, and "
                "biases or modules trained in full have taken other places since. Keep it unchanged until "
                "backward() has returned."
            )
        return then


_SAVED_TENSOR_HOOKS: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


def _checkpoints() -> list[tuple[Any, bool]]:
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


_FIRST_RUN = CheckpointFunction.forward.__code__
_SECOND_RUN = CheckpointFunction.backward.__code__


def _reentrant_checkpoints() -> list[tuple[Any, bool]]:
    """The same of reentrant checkpoints: an autograd function runs the first time, its backward the second.

    Both have the function's context, which lives as long as the graph. The callers lead to it, unless something
    inside the block switches inference mode or forward-mode gradients.
    """
    if torch.is_inference_mode_enabled():
        return []
    if torch._C._is_fwd_grad_enabled() and torch._C._current_graph_task_id() == -1:
        return []  # the first run is without forward-mode gradients, which no_grad leaves on
    found = []
    caller = sys._getframe(1)
    while caller is not None:
        code = caller.f_code
        if code is _FIRST_RUN or code is _SECOND_RUN:
            found.append((caller.f_locals["ctx"], code is _SECOND_RUN))
        caller = caller.f_back
    return found
