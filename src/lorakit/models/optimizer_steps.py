"""The number of steps of all optimizers of the process: a fused one writes its parameters without a new `_version`."""

from __future__ import annotations

from torch.optim.optimizer import register_optimizer_step_post_hook

_count = 0


def optimizer_steps() -> int:
    """Return the number of steps since this module was imported."""
    return _count


def _add(*_: object) -> None:
    global _count
    _count += 1


register_optimizer_step_post_hook(_add)
