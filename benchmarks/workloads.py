"""Workloads: one per row of the training tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

SEED = 0

Task = Literal["completion", "classification"]
Data = Literal["e2e", "instruction", "samsum", "mrpc"]
Order = Literal["plain", "bucketed", "grouped"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, an adapter, data, and the number and size of updates."""

    name: str
    title: str
    data: Data = "e2e"
    base: str = "smollm2-135m"
    targets: str = "attention.qv"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    learning_rate: float = 1e-3
    full_learning_rate: float = 5e-5
    """Learning rate of full fine-tuning, which needs a smaller one."""
    batch_size: int = 16
    grouped: bool = False
    """Batch examples by prompt instead of at random, for every system."""
    checkpointing: bool = False
    """Use gradient checkpointing in every system."""
    warmup: int = 1
    """Updates before the measurement."""
    updates: int = 2
    """Counted updates per run."""
    epochs: int = 1
    """Passes over the examples; more than one to measure accuracy instead of speed."""
    quick_updates: int = 2
    """Counted updates of a quick run. 0 omits the row."""
    seed: int = SEED
    """Seed for the adapter, dropout and the order of the examples, but not for their selection."""
    compares_all: bool = False
    """Also run loralib, full fine-tuning and all of PEFT's settings. Otherwise PEFT runs in its default setting and in
    those that win where all are compared."""

    def on_gpu(self) -> Workload:
        """Return the workload with enough updates to measure a GPU."""
        return dataclasses.replace(self, warmup=5, updates=40, quick_updates=self.quick_updates * 5)

    @property
    def task(self) -> Task:
        """Task of the examples."""
        return "classification" if self.data == "mrpc" else "completion"

    @property
    def orders(self) -> tuple[Order, ...]:
        """The possible orders of the examples; lorakit's default is the last."""
        return ("grouped",) if self.grouped else ("plain", "bucketed")


WORKLOADS = (
    Workload(name="e2e", title="E2E NLG, q and v, batches of 16, random order", compares_all=True),
    Workload(
        name="e2e-grouped",
        title="E2E NLG, q and v, batches of 16, grouped by prompt",
        grouped=True,
    ),
    Workload(
        name="e2e-all",
        title="E2E NLG, all linear layers, batches of 16, random order",
        targets="all-linear",
        quick_updates=0,
    ),
    Workload(
        name="e2e-small",
        title="E2E NLG, q and v, batches of 4, random order",
        batch_size=4,
        updates=6,
        quick_updates=0,
    ),
    Workload(
        name="e2e-all-small",
        title="E2E NLG, all linear layers, batches of 4, random order",
        targets="all-linear",
        batch_size=4,
        updates=6,
        quick_updates=0,
    ),
    Workload(
        name="instruction",
        title="One instruction of 100 tokens before each short input, q and v, batches of 8, random order",
        data="instruction",
        batch_size=8,
        updates=3,
        quick_updates=0,
    ),
    Workload(
        name="distinct",
        title="SAMSum, dialogues that share nothing, q and v, batches of 4, random order",
        data="samsum",
        batch_size=4,
        updates=3,
        quick_updates=0,
    ),
    Workload(
        name="mrpc",
        title="MRPC with MiniLM-L6, q, k, v and o, dropout 0.1, batches of 16, random order",
        data="mrpc",
        base="minilm-l6",
        targets="attention",
        dropout=0.1,
        warmup=4,
        updates=16,
        quick_updates=16,
        compares_all=True,
    ),
    Workload(
        name="e2e-checkpointing",
        title="E2E NLG, q and v, batches of 16, random order, gradient checkpointing",
        checkpointing=True,
        quick_updates=0,
    ),
)
