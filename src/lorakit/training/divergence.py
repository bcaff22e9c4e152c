"""When a run diverges: its loss, a gradient or a weight is not finite, or its loss explodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from torch import Tensor

from lorakit.errors import DivergenceError
from lorakit.models.sharding import local_part
from lorakit.training.checkpoint import State
from lorakit.training.distributed import Processes

LASTING = 10
"""Steps with a high loss after which it has exploded. Single steps can have a high loss: a batch of hard examples, or
of a few targets."""

MOST_REWINDS = 3
"""How often a run goes back to a checkpoint before it stops."""

SLOWDOWN = 0.5
"""Factor on the learning rate each time a run goes back."""

ADVICE = (
    "Lower optimizer.learning_rate or raise optimizer.warmup; if it happens in the first steps, check the data and try "
    "base.dtype float32."
)
"""What to do about a loss that is not finite, for messages."""


def require_finite(step: int, loss: float, norm: float, rate: float) -> None:
    """Raise unless the loss and the gradient norm of a step are finite.

    Raises:
        DivergenceError: One of them is NaN or infinite.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise DivergenceError(
        f"Training diverged at step {step + 1}: the loss is {loss:g} and the gradient norm {norm:g}, at learning "
        f"rate {rate:.3g}. This step did not update the weights. {ADVICE}"
    )


def require_finite_weights(step: int, weights: Mapping[str, Tensor], processes: Processes) -> None:
    """Raise in all processes unless all weights are finite in each.

    Raises:
        DivergenceError: A weight is NaN or infinite. A checkpoint of it must not replace a good one.
    """
    parts = ((name, local_part(weight)) for name, weight in weights.items())
    bad = next((n for n, w in parts if w.is_floating_point() and not w.isfinite().all()), None)
    for name in processes.gather(bad):
        if name is not None:
            raise DivergenceError(
                f"Training diverged: after step {step} {name} has values that are not finite. Start "
                "a new run with a lower optimizer.learning_rate; set from_adapter to start from this run's best/."
            )


def require_no_explosion(state: State, factor: float) -> None:
    """Raise if the loss has exploded after a step, and keep the highest usual loss in `state`.

    `factor` is the setting ``optimizer.explosion``; 0 accepts every loss.

    Raises:
        DivergenceError: Each of the last `LASTING` losses is more than `factor` times the highest usual loss.
    """
    earlier = state.losses[:-LASTING]
    if len(earlier) >= LASTING:
        state.usual_loss = max(state.usual_loss, median(earlier))
    if exploded(state, factor):
        raise DivergenceError(
            f"Training diverged at step {state.step}: the loss is {state.losses[-1]:.3g}, and in each of the last "
            f"{LASTING} steps it was more than {factor:g} times the usual {state.usual_loss:.3g}. Lower "
            "optimizer.learning_rate or raise optimizer.warmup. If this loss is normal for your data, raise "
            "optimizer.explosion and resume (--resume)."
        )


def exploded(state: State, factor: float) -> bool:
    """Return whether each of the last losses is more than `factor` times the highest usual loss."""
    return (
        0 < factor * state.usual_loss < min(state.losses[-LASTING:])
        and len(state.losses) >= 2 * LASTING
    )


def step_to_keep(step: int) -> int:
    """Return a step that is old enough to rewind to, however soon after `step` the run diverges."""
    # If the loss explodes at the next step, it has been high for the last LASTING - 1 steps.
    return max(step - LASTING, 0)


def last_good_step(state: State, factor: float) -> int:
    """Return the last step to rewind to: the one before the update that led to the first bad loss.

    `state` is the one in which a DivergenceError was raised.
    """
    first_bad_loss = state.step - LASTING + 1 if exploded(state, factor) else state.step + 1
    # The update of step `first_bad_loss - 1` produced the weights with that loss.
    return first_bad_loss - 2
