"""The systems to compare. Each module has ``train(prepared, settings, scratch) -> Trained``.

All use AdamW with the same constant learning rate, no weight decay, and gradients clipped to norm 1. Classifiers
also train their head. The time of loading, and of work after the last update, does not count.
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
    """The result of training with a system."""

    order: Order
    """The order of the examples."""
    in_float32: Callable[[], nn.Module]
    """Returns the trained model for scoring, with the base in float32."""


def load_model(prepared: Prepared, dtype: str) -> nn.Module:
    """Return the base model of the row, with the same new head each time if the task needs one."""
    task, labels = ("causal-lm", None)
    if prepared.workload.task == "classification":
        task, labels = "sequence-classification", 2
    return load_base(prepared.base, task=task, num_labels=labels, dtype=dtype).model  # type: ignore[arg-type]
