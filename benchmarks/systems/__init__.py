"""The systems that train. Each module has ``train(prepared, settings, scratch) -> Trained``.

All of them use AdamW with the same constant learning rate, no weight decay, and the gradient clipped to
norm 1; the head of a classifier is trained beside the adapter. Loading, and what comes after the last
update, is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.examples import Prepared
from benchmarks.workloads import Order
from lorakit.models.loading import load_base


@dataclass(frozen=True)
class Trained:
    """What a system has trained."""

    order: Order
    """The order in which it took the examples."""
    in_float32: Callable[[], nn.Module]
    """Returns the trained model for scoring: what was trained, over the base in float32."""


def load_model(prepared: Prepared, dtype: str) -> nn.Module:
    """Return the row's base model, with the same new head each time where the task needs one."""
    task, labels = ("causal-lm", None)
    if prepared.workload.task == "classification":
        task, labels = "sequence-classification", 2
    return load_base(prepared.base, task=task, num_labels=labels, dtype=dtype).model  # type: ignore[arg-type]
