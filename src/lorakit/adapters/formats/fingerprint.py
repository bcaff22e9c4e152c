"""Which base model an adapter was made for, and whether a live model is that one.

A fingerprint has three parts: the architecture, the source's name, and a hash over the weights. The
weights are hashed twice, as they are and rounded to bfloat16, so that the same weights loaded in
another dtype are recognised as the same. Of a quantised weight the second hash is that of the weight
it was made from, so that a quantised base and the whole one are recognised as the same as well.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor, nn

from lorakit.adapters.formats.layout import BaseLayout, base_layout
from lorakit.adapters.installed import base_weights
from lorakit.errors import AdapterFileError, WrongBaseError
from lorakit.models.digests import Digests, digests
from lorakit.models.dtypes import FLOATS, dtype_name
from lorakit.models.quantised import KINDS, QuantisedWeight


class NamedSource(Protocol):
    """Where a base model came from (`lorakit.models.loading.Source`)."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...


@dataclass(frozen=True)
class ArchitectureRecord:
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
    """Their dtype; "nf4" or "int8" where a part is quantised so; "mixed"; or why they have no hash: "meta",
    "sharded", "quantised" (in a way that is not known here)."""
    exact: str | None
    """SHA-256 over the weights as they are."""
    bfloat16: str | None
    """SHA-256 over the weights rounded to bfloat16; None where those behind quantised ones are not known."""


@dataclass(frozen=True)
class BaseRecord:
    """The fingerprint of a base model."""

    architecture: ArchitectureRecord
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


_PARTS: dict[str, type] = {"architecture": ArchitectureRecord, "source": Origin, "weights": Weights}


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
        quantised in a way that is not known have no hash, and `Weights.dtype` says which of these it was.
    """
    left_out = set(exclude)
    weights = [(n, w) for n, w in base_weights(model) if n not in left_out]
    config: Any = getattr(model, "config", None)
    shapes = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        shapes.update(f"{name}\0{tuple(weight.shape)}\0".encode())
    if source is None:
        named = Origin(
            getattr(config, "_name_or_path", None) or None,
            getattr(config, "_commit_hash", None) or None,
        )
    else:
        named = Origin(source.name, source.revision)
    return BaseRecord(
        architecture=ArchitectureRecord(
            class_name=type(model).__name__.removeprefix("FSDP"),  # fully_shard adds it
            model_type=getattr(config, "model_type", None) or None,
            shapes=shapes.hexdigest(),
        ),
        source=named,
        weights=hash_weights(weights),
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
    packed = "quantised" in (recorded.weights.dtype, live.weights.dtype)
    if then.shapes != now.shapes and not packed:  # packed weights have shapes of their own
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
    if rounded_alike and not KINDS.isdisjoint({then.dtype, now.dtype}):
        return [f"{change}; before quantisation, rounded to bfloat16, they are the same."]
    if rounded_alike and then.dtype != now.dtype:
        return [f"{change}; rounded to bfloat16 they are the same."]
    named = recorded.source.name is not None and recorded.source.name == live.source.name
    same_source = named and recorded.source.revision == live.source.revision
    if then.bfloat16 is None or now.bfloat16 is None:
        unknown = then if then.bfloat16 is None and now.bfloat16 is not None else now
        if same_source:
            return [
                f"{change}, both of '{live.source.name}'. {unknown.dtype} weights cannot be compared."
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


def hash_weights(weights: Iterable[tuple[str, Tensor | QuantisedWeight]]) -> Weights:
    """Hash named weights; their order does not matter."""
    weights = list(weights)
    plain = [w for _, w in weights if isinstance(w, Tensor)]
    for reason, applies in (
        ("meta", _is_meta),
        ("sharded", _is_sharded),
        ("quantised", _is_packed),
    ):
        if any(applies(w) for w in plain):
            return Weights(reason, None, None)
    exact: dict[str, bytes] = {}
    rounded: dict[str, bytes | None] = {}
    # hashlib lets other threads run while it hashes; the largest go first to fill the threads evenly.
    by_size = sorted(weights, key=lambda item: -item[1].numel())
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = pool.map(_digests, (w for _, w in by_size))
        for (name, _), of_one in zip(by_size, found, strict=True):
            exact[name], rounded[name] = of_one
    known = {name: digest for name, digest in rounded.items() if digest is not None}
    return Weights(
        _name_dtypes(w for _, w in weights),
        _combine(exact),
        _combine(known) if known.keys() == rounded.keys() else None,
    )


def _digests(weight: Tensor | QuantisedWeight) -> Digests:
    return digests(weight) if isinstance(weight, Tensor) else weight.digests()


def _name_dtypes(weights: Iterable[Tensor | QuantisedWeight]) -> str:
    """The one dtype, or kind of quantisation, that says what the weights are; else "mixed"."""
    names = {dtype_name(w.dtype) if isinstance(w, Tensor) else w.kind for w in weights}
    names = (
        names & KINDS or names
    )  # beside quantised weights, norms and embeddings are always whole
    return names.pop() if len(names) == 1 else "mixed"


def _combine(digests: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0".encode())
        whole.update(digests[name])
    return whole.hexdigest()


def _is_meta(parameter: Tensor) -> bool:
    return parameter.device.type == "meta"


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")  # DTensor, DeepSpeed


def _is_packed(parameter: Tensor) -> bool:
    # Quantised weights are integers, or subclasses that make their numbers up when asked.
    plain = type(parameter) in (Tensor, nn.Parameter)
    return not plain or (parameter.dtype not in FLOATS and not parameter.dtype.is_complex)
