"""Which adapters act now, and which acted when a checkpointed block first ran."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
        self._reentrant: set[Active] = set()
        self._recomputing = False

    def current(self) -> Active:
        """The choice that holds for the forward pass being run, first or again."""
        if torch.compiler.is_compiling():
            return self.active  # a compiled graph has the choice of its trace, guarded
        frame, again = _checkpoint_frame()
        if frame is not None:
            if not again:
                frame.lorakit_active = self.active
            return getattr(frame, "lorakit_active", self.active)
        if torch._C._current_graph_task_id() == -1:
            self._remember_for_reentrant()
            return self.active
        self._recomputing = True
        if self._reentrant - {self.active}:
            raise AdapterStateError(
                "The active adapter changed between the forward and the backward pass, and reentrant gradient "
                "checkpointing runs the forward again. Keep it unchanged until backward() has returned, or use "
                "non-reentrant checkpointing: gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        return self.active

    def _remember_for_reentrant(self) -> None:
        """Reentrant checkpointing first runs a block without gradients and leaves no trace to find it by."""
        if self._recomputing:
            self._reentrant.clear()
            self._recomputing = False
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            self._reentrant.add(self.active)


def _checkpoint_frame():
    """The frame of the non-reentrant checkpoint that is running, and whether it is the second run.

    PyTorch pushes saved-tensor hooks around both runs; their closures lead to one frame object that
    lives as long as the checkpoint. (None, False) outside of a checkpoint.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    code = getattr(hooks[0], "__code__", None) if hooks else None
    if code is None:
        return None, False
    for name, cell in zip(code.co_freevars, hooks[0].__closure__ or (), strict=True):
        if name == "frame" and hasattr(cell.cell_contents, "recompute_fn"):
            return cell.cell_contents, False
        if name == "target_frame_ref":
            return cell.cell_contents(), True
    return None, False
