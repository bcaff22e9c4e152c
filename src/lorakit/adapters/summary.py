"""Parameter counts and file size of an adapter."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from lorakit.adapters.installed import InstalledAdapter, base_weights, refuse_quantised
from lorakit.adapters.saving import file_bytes
from lorakit.formatting import percentage, size
from lorakit.methods.fake_modules import fake_modules
from lorakit.methods.method import Method, describe


@dataclass(frozen=True)
class Counts:
    """Parameter counts of an adapter and its base."""

    trainable: int
    """Parameters that the method trains: its own, and base parameters trained in full."""
    total: int
    """Parameters of the base."""
    by_layer: dict[str, int]
    """Trained parameters by the path of their layer."""

    @property
    def share(self) -> float:
        """Trained parameters divided by the base's parameters."""
        return self.trainable / self.total if self.total else 0.0


@dataclass(frozen=True)
class Summary:
    """Name, method, parameter counts and file size of an adapter; `str` formats them as text."""

    name: str
    method: str
    counts: Counts
    file_bytes: int
    """Size of the tensors in the adapter's file."""

    def __str__(self) -> str:
        counts = self.counts
        lines = [
            f"{self.name}: {self.method}",
            f"trainable {counts.trainable:,} of {counts.total:,} parameters ({percentage(counts.share)}), "
            f"file {size(self.file_bytes)}",
        ]
        # Blocks repeat, so group the same layer of all blocks in one line.
        groups: dict[str, list[int]] = {}
        for path, count in counts.by_layer.items():
            groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", path), []).append(count)
        width = max(map(len, groups), default=0)
        for pattern, sizes in groups.items():
            each = ", ".join(
                f"{n} x {size:,}" for size, n in sorted(Counter(sizes).items(), reverse=True)
            )
            lines.append(f"  {pattern:<{width}}  {each}")
        return "\n".join(lines)


def summarise(model: nn.Module, adapter: InstalledAdapter) -> Summary:
    """Return the parameter counts and the file size of one adapter of a model."""
    by_layer: dict[str, int] = {}
    seen: set[int] = set()
    for path, module in adapter.modules.items():
        unseen = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, unseen))
        if unseen:
            by_layer[path] = sum(p.numel() for p in unseen)
    counts = _counts(model, by_layer)
    return Summary(adapter.name, describe(adapter.method), counts, file_bytes(model, adapter))


def count_parameters(model: nn.Module, method: Method) -> Counts:
    """Count the parameters that `method` would train on `model`, which is not changed.

    It allocates no tensors and draws no random numbers, but for a method of your own that reads weights. The model may
    be on the meta device.

    Raises:
        TargetError: A target names no layer, or one that cannot be adapted.
        ConfigurationError: A setting does not fit the model.
    """
    modules = fake_modules(method, model)
    by_layer = Counter(
        {path: sum(p.numel() for p in m.parameters()) for path, m in modules.items()}
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = method.trained_parameters(model)
    refuse_quantised(model, trained)
    first_names: dict[int, str] = {}
    for name in trained:
        first_names.setdefault(id(parameters[name]), name)
    for name in first_names.values():
        by_layer[name.rpartition(".")[0]] += parameters[name].numel()
    return _counts(model, dict(by_layer))


def _counts(model: nn.Module, by_layer: dict[str, int]) -> Counts:
    total = sum(weight.numel() for _, weight in base_weights(model))
    return Counts(sum(by_layer.values()), total, by_layer)
