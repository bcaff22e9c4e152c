"""Parameter counts and file size of an adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lorakit.adapters.installed import InstalledAdapter, base_weights, refuse_quantised
from lorakit.adapters.saving import file_bytes
from lorakit.formatting import percentage, size
from lorakit.methods.fake_modules import fake_modules
from lorakit.methods.method import Method, describe, require_method
from lorakit.models.parameter_swaps import named_base_parameters
from lorakit.models.tree import unwrapped, without_wrappers


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
    """Name, method, parameter counts and file size of an adapter; prints as text."""

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

    __repr__ = __str__


def summarise(model: nn.Module, adapter: InstalledAdapter) -> Summary:
    """Return the parameter counts and the file size of one adapter of a model."""
    modules = adapter.modules.items()
    counts = _counts(model, ((path, p) for path, module in modules for p in module.parameters()))
    return Summary(adapter.name, describe(adapter.method), counts, file_bytes(model, adapter))


def count_parameters(model: nn.Module, method: Method) -> Counts:
    """Count the parameters that `method` would train on `model`, which is not changed.

    It allocates no tensors and draws no random numbers, but for a method of your own that reads weights. The model may
    be on the meta device.

    Raises:
        TargetError: A target names no layer, or one that cannot be adapted.
        ConfigurationError: A setting does not fit the model, or `method` is no method with its settings.
    """
    require_method(method)
    model = unwrapped(model)
    modules = fake_modules(method, model)
    trained = [*map(without_wrappers, method.trained_parameters(model))]
    refuse_quantised(model, trained)
    base = {name: p for name, _, p in named_base_parameters(model, remove_duplicate=False)}
    return _counts(
        model,
        [
            *((path, p) for path, module in modules.items() for p in module.parameters()),
            *((name.rpartition(".")[0], base[name]) for name in trained),
        ],
    )


def _counts(model: nn.Module, trained: Iterable[tuple[str, nn.Parameter]]) -> Counts:
    """Count trained parameters, each given with the path of its layer; a shared one counts at its first path."""
    by_layer: Counter[str] = Counter()
    seen: set[int] = set()
    for path, parameter in trained:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            by_layer[path] += parameter.numel()
    total = sum(weight.numel() for _, weight in base_weights(model))
    return Counts(by_layer.total(), total, dict(by_layer))
