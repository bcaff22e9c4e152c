"""Time, memory and loss, measured the same way for every system."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.examples import IGNORED, Prepared


class Meter:
    """Measures time and memory from the end of the warm-up to the end of the last update.

    An update ends after its optimizer step, which a global hook of torch reports for every library. So everything
    between two steps counts, including the construction of batches. Loading ends at the first forward call of a
    module.

    Args:
        warmup: Updates before the measurement.
        before: Bytes to subtract: those of the interpreter with torch imported.
    """

    def __init__(self, warmup: int, before: int) -> None:
        self._warmup = warmup
        self._before = before
        self._stamps: list[float] = []
        self._peak = 0
        self._loading = 0
        self.trained = 0
        """Number of trained parameters."""

    def __enter__(self) -> Meter:
        restart_peak()
        self._hooks = [
            register_optimizer_step_post_hook(self._after_step),
            register_module_forward_pre_hook(self._before_forward),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_forward(self, *_: Any) -> None:
        self._loading = peak_memory()
        self._hooks.pop().remove()  # only the first call matters, and a hook would slow down timed calls

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if len(self._stamps) == self._warmup - 1:
            restart_peak()
        self._peak = peak_memory()
        self.trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        self._stamps.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Seconds of each update after the warm-up."""
        counted = self._stamps[self._warmup - 1 :]
        return [after - before for before, after in pairwise(counted)]

    @property
    def memory(self) -> int:
        """Peak bytes during the counted updates, minus `before`."""
        return self._peak - self._before

    @property
    def loading_memory(self) -> int:
        """Peak bytes until the first forward call of a module, minus `before`."""
        return self._loading - self._before


def peak_memory() -> int:
    """Return the peak memory since :func:`restart_peak`, of the process or of its tensors on the GPU, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def restart_peak() -> None:
    """Reset the peak memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # man 5 proc


@torch.no_grad()
def held_out_logits(
    model: nn.Module, prepared: Prepared, batch_size: int = 8
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and labels of the held-out examples, batch by batch, sorted by length."""
    model.eval()
    device = next(model.parameters()).device
    examples = sorted(prepared.held_out, key=lambda example: len(example["input_ids"]))
    for start in range(0, len(examples), batch_size):
        batch = prepared.collate(examples[start : start + batch_size])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        yield model(**batch).logits.float(), labels


def held_out_loss(model: nn.Module, prepared: Prepared) -> float:
    """Return the mean cross-entropy of the held-out targets, from the logits of a float32 model."""
    total, count = 0.0, 0
    for logits, labels in held_out_logits(model, prepared):
        if prepared.workload.task == "completion":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total += F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return total / count


def right_labels(model: nn.Module, prepared: Prepared) -> list[bool]:
    """Return whether the model predicts the label of each held-out example, sorted by length."""
    right = []
    for logits, labels in held_out_logits(model, prepared):
        right += (logits.argmax(-1) == labels).tolist()
    return right
