"""Which base model an adapter was made for, and whether a live model is that one.

A fingerprint has three parts: the architecture, the source's name, and a hash over the weights. The
weights are hashed twice, as they are and rounded to bfloat16, so that the same weights loaded in
another dtype are recognised as the same.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.formats.layout import BaseLayout, base_layout
from lorakit.adapters.installed import base_parameters
from lorakit.adapters.stored import FLOATS, dtype_name
from lorakit.errors import AdapterFileError, WrongBaseError

_CHUNK = 1 << 22
"""Numbers hashed at a time: a large tensor is never copied whole."""


class NamedSource(Protocol):
    """Where a base model came from (`lorakit.models.loading.Source`)."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...


@dataclass(frozen=True)
class Architecture:
    """What a model is made of."""

    class_name: str
    model_type: str | None
    shapes: str
    """SHA-256 over the names and shapes of the parameters."""


@dataclass(frozen=True)
class Origin:
    """Where a model came from, as far as it says."""

    name: str | None
    revision: str | None


@dataclass(frozen=True)
class Weights:
    """A hash over a model's weights."""

    dtype: str
    """Their dtype; "mixed", or why they have no hash: "meta", "sharded", "quantised"."""
    exact: str | None
    """SHA-256 over the weights as they are."""
    bfloat16: str | None
    """SHA-256 over the weights rounded to bfloat16."""


@dataclass(frozen=True)
class BaseRecord:
    """The fingerprint of a base model."""

    architecture: Architecture
    source: Origin
    weights: Weights
    excluded: tuple[str, ...] = ()
    """Names of the parameters left out because the adapter brings its own."""
    layout: BaseLayout | None = field(default=None, compare=False, repr=False)
    """What else the formats need to know of a live model; not part of a file."""

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        parts = {name: vars(getattr(self, name)) for name in _PARTS}
        return {**parts, "excluded": list(self.excluded)}

    @classmethod
    def from_json(cls, found: Any) -> BaseRecord:
        """Read what `to_json` made.

        Raises:
            AdapterFileError: A part is missing or of another type.
        """
        parts: dict[str, Any] = {}
        for name, kind in _PARTS.items():
            part = found.get(name) if isinstance(found, Mapping) else None
            wanted = {f.name for f in fields(kind)}
            if not isinstance(part, Mapping) or set(part) != wanted:
                raise AdapterFileError(
                    f"the record of the base model has no valid '{name}'; it holds {part!r}, and "
                    f"{', '.join(sorted(wanted))} were expected."
                )
            if not all(isinstance(value, str | None) for value in part.values()):
                raise AdapterFileError(f"the record of the base model has a '{name}' of {part!r}.")
            parts[name] = kind(**part)
        excluded = found.get("excluded", [])
        if not isinstance(excluded, list) or not all(isinstance(n, str) for n in excluded):
            raise AdapterFileError("the record of the base model has an invalid 'excluded' list.")
        return cls(**parts, excluded=tuple(excluded))


_PARTS: dict[str, type] = {"architecture": Architecture, "source": Origin, "weights": Weights}


def base_record(
    model: nn.Module, source: NamedSource | None = None, exclude: Iterable[str] = ()
) -> BaseRecord:
    """Take the fingerprint of a model's base, whatever adapters it carries, merged or not.

    Args:
        model: The model; its weights stay where they are and as they are.
        source: Where it came from; by default what its configuration says.
        exclude: Names of parameters to leave out, since an adapter replaces them (a head of its
            own, trained biases).

    Returns:
        The record. A tied weight counts once. Weights on the meta device, sharded over processes or
        quantised have no hash, and `Weights.dtype` says which of these it was.
    """
    left_out = set(exclude)
    parameters = [(n, p) for n, p in base_parameters(model) if n not in left_out]
    config: Any = getattr(model, "config", None)
    shapes = hashlib.sha256()
    for name, parameter in sorted(parameters):
        shapes.update(f"{name}\0{tuple(parameter.shape)}\0".encode())
    if source is None:
        named = Origin(
            getattr(config, "_name_or_path", None) or None,
            getattr(config, "_commit_hash", None) or None,
        )
    else:
        named = Origin(source.name, source.revision)
    return BaseRecord(
        architecture=Architecture(
            class_name=type(model).__name__.removeprefix("FSDP"),  # fully_shard adds it
            model_type=getattr(config, "model_type", None) or None,
            shapes=shapes.hexdigest(),
        ),
        source=named,
        weights=hash_weights(parameters),
        excluded=tuple(sorted(left_out)),
        layout=base_layout(model),
    )


def compare(recorded: BaseRecord, live: BaseRecord) -> list[str]:
    """Whether a live model is the base that an adapter was made for.

    Args:
        recorded: From the adapter's file.
        live: Of the model, with the same parameters excluded.

    Returns:
        What differs without making it another base (dtype, quantisation, sharding), in sentences.

    Raises:
        WrongBaseError: The architecture or the weights are others.
    """
    then, now = recorded.architecture, live.architecture
    for what, a, b in (
        ("class", then.class_name, now.class_name),
        ("model type", then.model_type, now.model_type),
    ):
        if a != b:
            raise WrongBaseError(_other_base(recorded, live, f"its {what} is {b}, not {a}"))
    quantised = "quantised" in (recorded.weights.dtype, live.weights.dtype)
    if then.shapes != now.shapes and not quantised:  # packed weights have shapes of their own
        raise WrongBaseError(
            _other_base(
                recorded,
                live,
                "it has other parameters or other shapes (another size or vocabulary)",
            )
        )
    return _compare_weights(recorded, live)


def _compare_weights(recorded: BaseRecord, live: BaseRecord) -> list[str]:
    then, now = recorded.weights, live.weights
    if then.exact is not None and then.exact == now.exact:
        return []
    change = f"It was trained over {then.dtype} weights and runs over {now.dtype} ones"
    rounded_alike = then.bfloat16 is not None and then.bfloat16 == now.bfloat16
    if rounded_alike and then.dtype != now.dtype:
        return [f"{change}; rounded to bfloat16 they are the same."]
    named = recorded.source.name is not None and recorded.source.name == live.source.name
    same_source = named and recorded.source.revision == live.source.revision
    if then.exact is None or now.exact is None:
        if same_source:
            return [
                f"{change}, both of '{live.source.name}'. {now.dtype} weights cannot be compared."
            ]
        if recorded.source.name is None or live.source.name is None:
            return [
                f"{change}, which cannot be compared: make sure that it is the same base model."
            ]
        reason = f"it is {_describe(live)}, and its weights cannot be compared"
        raise WrongBaseError(_other_base(recorded, live, reason))
    if then.dtype != now.dtype and same_source:
        return [f"{change}, both of '{live.source.name}'; they differ by their rounding."]
    raise WrongBaseError(_other_base(recorded, live, f"its {now.dtype} weights are others"))


def _other_base(recorded: BaseRecord, live: BaseRecord, reason: str) -> str:
    return (
        f"The adapter was made for {_describe(recorded)}, and this model ({_describe(live)}) is another "
        f"base: {reason}. Load the adapter on its own base, or set allow_other_base if you mean it."
    )


def _describe(record: BaseRecord) -> str:
    name = record.source.name
    revision = f" at revision {record.source.revision}" if name and record.source.revision else ""
    return f"'{name}'{revision}" if name else f"an unnamed {record.architecture.class_name}"


# --- hashing -------------------------------------------------------------------------------------


def hash_weights(parameters: Iterable[tuple[str, Tensor]]) -> Weights:
    """Hash named weights; their order does not matter."""
    parameters = list(parameters)
    dtypes = Counter(dtype_name(p.dtype) for _, p in parameters)
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else "mixed"
    for reason, applies in (
        ("meta", _is_meta),
        ("sharded", _is_sharded),
        ("quantised", _is_packed),
    ):
        if any(applies(p) for _, p in parameters):
            return Weights(reason, None, None)
    exact: dict[str, bytes] = {}
    rounded: dict[str, bytes] = {}
    # hashlib lets other threads run while it hashes; the largest go first to fill the threads evenly.
    by_size = sorted(parameters, key=lambda item: -item[1].numel())
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(_hash_tensor, (p for _, p in by_size))
        for (name, _), (one, other) in zip(by_size, digests, strict=True):
            exact[name], rounded[name] = one, other
    return Weights(dtype, _combine(exact), _combine(rounded))


def _combine(digests: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0".encode())
        whole.update(digests[name])
    return whole.hexdigest()


def _hash_tensor(tensor: Tensor) -> tuple[bytes, bytes]:
    """Digests of a tensor's numbers as they are, and rounded to bfloat16."""
    shape = f"{tuple(tensor.shape)}\0"
    exact = hashlib.sha256(f"{dtype_name(tensor.dtype)}{shape}".encode())
    rounded = hashlib.sha256(f"bfloat16{shape}".encode())
    for chunk in _chunks(tensor.detach()):
        exact.update(_bytes(chunk))
        if tensor.dtype != torch.bfloat16:
            rounded.update(_bytes(chunk.to(torch.bfloat16)))
    if tensor.dtype == torch.bfloat16:
        return exact.digest(), exact.digest()
    return exact.digest(), rounded.digest()


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers in row-major order, some at a time, on the CPU."""
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), _CHUNK):
            yield flat[start : start + _CHUNK].cpu()
    else:
        for part in tensor if tensor.ndim > 1 else [tensor]:
            yield from _chunks(part.contiguous())


def _bytes(chunk: Tensor) -> memoryview:
    return chunk.contiguous().view(torch.uint8).numpy().data


def _is_meta(parameter: Tensor) -> bool:
    return parameter.device.type == "meta"


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")  # DTensor, DeepSpeed


def _is_packed(parameter: Tensor) -> bool:
    # Quantised weights are integers, or subclasses that make their numbers up when asked.
    plain = type(parameter) in (Tensor, nn.Parameter)
    return not plain or (parameter.dtype not in FLOATS and not parameter.dtype.is_complex)
