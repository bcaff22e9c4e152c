"""The low-rank factors of one blend of adapters, and a check that they have not changed since they were copied."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.choice import Blend
from lorakit.methods.module import LowRank
from lorakit.models.optimizer_steps import optimizer_steps
from lorakit.ops.autocast import wide_dtype


class Layout(Protocol):
    """How a layer receives the rows of a batch (`RowLayout`)."""

    def is_in_order(self, shape: torch.Size) -> bool: ...


class LayerAdaptersLike(Protocol):
    """What this module and `stacks` use of `LayerAdapters`, whose import would be circular."""

    @property
    def layout(self) -> Layout: ...

    replaced: dict[str, nn.Parameter]
    _modules: dict[str, Any]

    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...


_versions = operator.attrgetter("_version")
_SETTING = (bool, int, float, str)


class BlendFactors:
    """The low-rank factors of one blend on each layer, and the state of their tensors when this object was built.

    `is_active` says that `activate` chose the blend, so that its trained copies are in place.
    """

    def __init__(
        self, blend: Blend, layers: Iterable[LayerAdaptersLike], *, is_active: bool
    ) -> None:
        self.dtype = torch.float32
        """The dtype in which the products are computed: wide enough for all factors."""
        self.ranks: dict[LayerAdaptersLike, int] = {}
        """The sum of ranks on each layer where the blend only adds low-rank products."""
        self.others: set[LayerAdaptersLike] = set()
        """The layers where the blend has another effect."""
        self._acting: dict[LayerAdaptersLike, list[tuple[Any, float]]] = {}
        self._places: list[tuple[dict[str, Any], str]] = []
        parts: list[nn.Module] = []
        for adapters in layers:
            parts += self._read(adapters, blend, is_active)
        # `is_current` checks thousands of tensors in each step, so it maps C functions over lists. Keeping the objects
        # prevents Python from reusing their identities.
        self._objects = [owner[name] for owner, name in self._places]
        self._owners = [owner for owner, _ in self._places]
        self._names = [name for _, name in self._places]
        self._dicts = [d for part in parts for d in (part._parameters, part._buffers)]
        self._settings = _settings(parts)
        self._values = self._current_values()
        # Aliases prevent PyTorch from reusing the addresses.
        self._tensors = [tensor for part in parts for tensor in _tensors(part)]
        self._kept = [tensor.detach() for tensor in self._tensors]
        self._state = self._current_state()

    def _read(self, adapters: LayerAdaptersLike, blend: Blend, is_active: bool) -> list[nn.Module]:
        """Read the factors on a layer, and return the modules that they are computed from."""
        acting, rank = [], 0
        places: list[tuple[dict[str, Any], str]] = []
        parts: list[nn.Module] = []
        for name, weight in blend:
            module = adapters._modules.get(name)
            if module is None or (module.leaves_output and (is_active or not module.trained)):
                continue
            product = None if module.trained and not is_active else module.low_rank()
            own = [*module.modules(), *module.source]
            if product is None or not all(_is_plain(t) for part in own for t in _tensors(part)):
                self.others.add(adapters)
                return []
            acting.append((module, weight))
            rank += len(product.A)
            self.dtype = wide_dtype(product.A, product.B, torch.empty(0, dtype=self.dtype))
            parts += own
            places.append((adapters._modules, name))
            for part in own:
                places += [(part._modules, child) for child in part._modules]
                places += [
                    (part.__dict__, n) for n, v in part.__dict__.items() if isinstance(v, Tensor)
                ]
        if acting:
            self._acting[adapters], self.ranks[adapters] = acting, rank
        self._places += places
        return parts

    def products(self, adapters: LayerAdaptersLike) -> Iterator[LowRank]:
        """Yield what the blend adds to a layer's output, each product scaled by its weight."""
        for module, weight in self._acting.get(adapters, ()):
            product = module.low_rank()
            yield product._replace(scaling=weight * product.scaling)

    def is_current(self) -> bool:
        """Return whether no tensor and no setting has changed since this object was built."""
        if not all(map(operator.is_, map(dict.get, self._owners, self._names), self._objects)):
            return False
        values = self._current_values()
        return (
            len(values) == len(self._values)
            and all(map(operator.is_, values, self._values))
            and self._state == self._current_state()
        )

    def _current_values(self) -> list[Tensor | None]:
        return [value for owner in self._dicts for value in owner.values()]

    def _current_state(self) -> tuple[Any, ...]:
        return (
            optimizer_steps(),
            [*map(_versions, self._tensors)],
            [*map(Tensor.data_ptr, self._tensors)],
            [[*map(read, modules)] for read, modules in self._settings],
        )


def _settings(parts: Iterable[nn.Module]) -> list[tuple[Callable[[Any], Any], list[Any]]]:
    """Return functions that read the settings of modules, each with the `__dict__` of the modules that it reads."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for part in parts:
        names = [name for name, value in part.__dict__.items() if isinstance(value, _SETTING)]
        groups.setdefault(tuple(names), []).append(part.__dict__)
    readers = [(operator.itemgetter(*names), modules) for names, modules in groups.items()]
    # A new attribute may hide one of the class.
    return [*readers, (len, [part.__dict__ for part in parts])]


def _tensors(part: nn.Module) -> list[Tensor]:
    """Return the tensors of a module, without those of the modules inside it."""
    every = (*part._parameters.values(), *part._buffers.values(), *part.__dict__.values())
    return [tensor for tensor in every if isinstance(tensor, Tensor)]


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is whole outside its layer's call (FSDP's are not), and counts its versions."""
    whole = type(tensor) in (Tensor, nn.Parameter) and tensor.untyped_storage().size() > 0
    return whole and not tensor.is_inference()
