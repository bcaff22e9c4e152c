"""LoRA on the stacked experts of a mixture: one pair of factors for each expert and weight.

The experts' module reads its weights, (experts, out, in), without calling a layer. So the effective weights replace
them during the call, as sums that are not computed (`LowRankSum`). One module holds the adapters on all weights of the
experts, because they act in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.methods.lora.forms import ExpertsForm
from lorakit.methods.lora.layer import LoRALayer, unsupported
from lorakit.methods.module import AdapterModule
from lorakit.models.layers import RowSlice, StackedWeight, weight_shape


class StackedLoRA(LoRALayer):
    """One adapter's factors on one stacked weight: ``dW[e] = scaling * B[e] A[e]`` for each expert e."""

    form_class = ExpertsForm
    shadows = ("weight",)

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        if options.get("dora") and not (isinstance(layer, StackedWeight) and layer.is_declared):
            raise unsupported(
                layer, "dora (the class does not say which rows are outputs: is_transposed)"
            )
        super().__init__(layer, **options)

    @classmethod
    def dimensions(cls, layer: nn.Module) -> tuple[int, int]:
        experts, n_out, n_in = weight_shape(layer)
        return n_in, experts * n_out

    @classmethod
    def largest_rank(cls, layer: nn.Module, slices: tuple[RowSlice, ...]) -> int:
        return min(weight_shape(layer)[1:])

    def factor_shapes(self, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n_in, rows = self.dimensions(layer)
        return (self.form.groups * self.rank, n_in), (rows, self.rank)

    def stacked_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `shadow_factors` in the layout of the weight; None with DoRA, whose change is no product."""
        if self.magnitude is not None:
            return None
        A_ERI, B_EOR = (t.unflatten(0, (self.form.groups, -1)) for t in self.factors())
        L, R = (A_ERI.mT, B_EOR.mT) if self.form.transposed else (B_EOR, A_ERI)
        return L, R, self.scaling


class ExpertsLoRA(AdapterModule):
    """One adapter on the experts of a mixture, with a child for each adapted weight, by the weight's name."""

    by_token = True
    splits = True

    def __init__(self, weights: Mapping[str, StackedLoRA]) -> None:
        super().__init__()
        # A weight may have the name of an attribute of this class, which `add_module` refuses.
        self._modules.update(weights)
        self.__dict__["scales"] = all(module.scales for module in weights.values())

    @property
    def weights(self) -> dict[str, StackedLoRA]:
        """The factors on each adapted weight."""
        return {n: m for n, m in self._modules.items() if isinstance(m, StackedLoRA)}

    @property
    def shadows(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.weights)

    def shadow_factors(self, attribute: str) -> tuple[Tensor, Tensor, float] | None:
        return self.weights[attribute].stacked_factors()

    def delta_weights(self, layer: nn.Module) -> Mapping[str, Tensor]:
        def delta(name: str) -> Tensor:
            return self.weights[name].delta_weights(StackedWeight(layer, name))["weight"]

        return _OnDemand(self.weights, delta)

    def changed_weights(self, layer: nn.Module) -> list[str]:
        return list(self.weights)

    def merged_weights(self, layer: nn.Module) -> Mapping[str, Tensor] | None:
        def merged(name: str) -> Tensor:
            weights = self.weights[name].merged_weights(StackedWeight(layer, name))
            assert weights is not None  # it has DoRA's magnitudes
            return weights["weight"]

        dora = [name for name, module in self.weights.items() if module.magnitude is not None]
        return _OnDemand(dora, merged) if dora else None


class _OnDemand(Mapping[str, Tensor]):
    """Tensors that are computed when they are read: those of all experts together may not fit into memory."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = tuple(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without computing the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def on_experts(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """Return the modules by layer, with those of the stacked weights of experts in one module for the experts."""
    together: dict[str, AdapterModule] = {}
    stacked: dict[str, dict[str, StackedLoRA]] = {}
    for path, module in modules.items():
        if isinstance(module, StackedLoRA):
            experts, _, name = path.rpartition(".")
            stacked.setdefault(experts, {})[name] = module
        else:
            together[path] = module
    return together | {path: ExpertsLoRA(weights) for path, weights in stacked.items()}


def lora_layers(modules: Mapping[str, AdapterModule]) -> dict[str, LoRALayer]:
    """Return the LoRA layers among an adapter's modules; undo `on_experts`."""
    layers: dict[str, LoRALayer] = {}
    for path, module in modules.items():
        if isinstance(module, LoRALayer):
            layers[path] = module
        elif isinstance(module, ExpertsLoRA):
            layers |= {f"{path}.{name}": inside for name, inside in module.weights.items()}
    return layers
