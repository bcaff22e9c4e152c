"""Map adapters of stacked experts (`target_parameters`) to PEFT's form and back.

PEFT wraps the experts' module once for each adapted weight, in the order of the weights in the module. So the keys of
the last weight start with the module's path, those of the one before it with ``<path>.base_layer``, and so on. The
experts are the rows of A, as here, and the innermost columns of B: (out, rank * experts).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from lorakit.adapters.formats.peft.factors import NotExpressibleError
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError
from lorakit.formatting import listed
from lorakit.models.patterns import endings

_ORDER = ("gate_up_proj", "up_proj", "down_proj")
"""The weights of experts in transformers, in their order in a module."""

_WRAPPER = ".base_layer"


def key_starts(layers: Mapping[str, StoredLayer]) -> dict[str, str]:
    """Return the start of PEFT's keys of each stacked weight among the layers, by path.

    Raises:
        NotExpressibleError: The order in which PEFT would wrap the weights of a module is not known.
    """
    starts = {}
    for module, names in _by_module(path for path in layers if layers[path].is_stacked).items():
        if len(names) > 1 and not {*names} <= {*_ORDER}:
            raise NotExpressibleError(
                f"'{module}' has adapters on {', '.join(sorted(names))}, whose order in PEFT's file is not known."
            )
        for depth, name in enumerate(reversed(_in_order(names))):
            starts[f"{module}.{name}"] = module + depth * _WRAPPER
    return starts


def paths(keys: Collection[str], target_parameters: Collection[str]) -> dict[str, str]:
    """Return the path of the stacked weight for each start of PEFT's keys that belongs to one.

    Args:
        keys: The starts of the keys of all layers in a file.
        target_parameters: PEFT's option.

    Raises:
        AdapterFileError: A module has factors for another number of weights than the option names.
    """
    names_by_owner: dict[str, set[str]] = {}
    for target in target_parameters:
        owner, _, name = target.rpartition(".")
        names_by_owner.setdefault(owner, set()).add(name)
    keys_by_module: dict[str, list[str]] = {}
    for key in keys:
        keys_by_module.setdefault(_without_wrappers(key), []).append(key)
    found: dict[str, str] = {}
    for module, wrapped in keys_by_module.items():
        # An entry without a module names the weight alone, which can only be one of experts here.
        owners = [*endings(module), *([""] if module.endswith("experts") else [])]
        names = {name for owner in owners for name in names_by_owner.get(owner, ())}
        if not names:
            continue
        if len(wrapped) != len(names) or (len(names) > 1 and not names <= {*_ORDER}):
            raise AdapterFileError(
                f"'{module}' has factors for {len(wrapped)} weights, and target_parameters names "
                f"{listed(sorted(names), 3)}. Load the adapter with PEFT, or merge it there."
            )
        ordered = sorted(wrapped, key=len, reverse=True)  # the innermost wrapper first
        found |= {
            key: f"{module}.{name}" for key, name in zip(ordered, _in_order(names), strict=True)
        }
    return found


def to_file(B: Tensor, experts: int) -> Tensor:
    """Return B (experts * out, rank) in PEFT's order, (out, rank * experts)."""
    return B.unflatten(0, (experts, -1)).permute(1, 2, 0).flatten(1).contiguous()


def from_file(B: Tensor, experts: int) -> Tensor:
    """Undo `to_file`."""
    return B.unflatten(1, (-1, experts)).permute(2, 0, 1).flatten(0, 1).contiguous()


def _by_module(paths: Iterable[str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        names.setdefault(module, []).append(name)
    return names


def _in_order(names: Collection[str]) -> list[str]:
    return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else 0)


def _without_wrappers(key: str) -> str:
    end = len(key)
    while key.endswith(_WRAPPER, 0, end):
        end -= len(_WRAPPER)
    return key[:end]
