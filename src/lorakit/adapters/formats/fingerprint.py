"""Fingerprints of base models, to check that a live model is the base of an adapter.

A fingerprint has the architecture, the name of the source, a hash of the weights, the fields of the configuration that
change the computation, and a hash of the tokenizer. A model without a configuration or tokenizer lacks the last two; a
part that is missing is not compared.
The weights are hashed twice: exactly, and rounded to bfloat16 to recognise the same weights in another
dtype. The second hash of a quantised weight is that of the original weight before quantisation, to
recognise a quantised base and the unquantised one as the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.adapters.installed import base_weights
from lorakit.configuration import conform, converted
from lorakit.errors import AdapterFileError, ConfigurationError, WrongBaseError
from lorakit.models.config_fields import changed_fields, computing_fields
from lorakit.models.digests import Digests, digests, known_digests, remember
from lorakit.models.dtypes import dtype_name
from lorakit.models.packed import PackedWeight
from lorakit.models.quantised import KINDS, QuantisedWeight
from lorakit.models.sharding import full_shape, is_sharded
from lorakit.models.sources import ModelSource
from lorakit.models.tokenizer import tokenizer_digest

PACKED = "quantised"
"""`BaseRecord.dtype` of a base that another library than bitsandbytes has quantised."""


class WeightHashes(NamedTuple):
    """The hashes of a model's weights."""

    dtype: str
    """The dtype; "nf4" or "int8" if some weights are quantised, "quantised" if by another library than bitsandbytes
    (without a hash if it hides the numbers); "mixed"; or the reason for no hash: "meta", "sharded"."""
    exact: str | None
    """SHA-256 of the weights in their own dtype."""
    bfloat16: str | None
    """SHA-256 of the weights rounded to bfloat16, of quantised ones before quantisation; None if not known."""


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """The fingerprint of a base model."""

    class_name: str
    model_type: str | None
    shapes: str
    """SHA-256 of the names and shapes of the parameters."""
    name: str | None
    """The source of the model; None if it is not known, as for `revision`."""
    revision: str | None
    dtype: str
    """`dtype`, `exact` and `bfloat16` are those of `WeightHashes`."""
    exact: str | None
    bfloat16: str | None
    excluded: tuple[str, ...] = ()
    """Names of the parameters that are not hashed, because the adapter replaces them."""
    configuration: dict[str, Any] | None = None
    """The fields of the configuration that change the computation (`lorakit.models.config_fields`); None if not known.
    """
    tokenizer: str | None = None
    """SHA-256 of the tokenizer (`lorakit.models.tokenizer`); None if not known."""

    @classmethod
    def from_json(cls, values: Any) -> BaseRecord:
        """Read the values of a record in a file.

        Raises:
            AdapterFileError: A value is missing, unknown or of another type.
        """
        try:
            record = cls(**converted(values, dict[str, Any], "it"))
            conform(record)
        except (ConfigurationError, TypeError) as error:
            raise AdapterFileError(
                f"the record of the base model is not valid: {error}. Download or save the adapter again."
            ) from error
        return record

    def __str__(self) -> str:
        revision = f" at revision {self.revision}" if self.name and self.revision else ""
        return f"'{self.name}'{revision}" if self.name else f"an unnamed {self.class_name}"


def base_record(
    model: nn.Module,
    source: ModelSource | None = None,
    exclude: Iterable[str] = (),
    tokenizer: Any = None,
    *,
    for_comparison: bool = False,
) -> BaseRecord:
    """Return the fingerprint of a model's base, without its adapters, merged or not.

    Args:
        model: The model; its weights are not moved or changed.
        source: The source of the model; the default is the one in its configuration.
        exclude: Names of parameters to skip, because an adapter replaces them (a head of its
            own, trained biases).
        tokenizer: The tokenizer, if it is known.
        for_comparison: Take the hashes that an earlier call computed of weights that have not changed since
            (`lorakit.models.digests.known_digests`).

    Returns:
        The record. A tied weight counts once. Weights have no hash if they are on the meta device,
        sharded over processes, or in a class that hides its numbers; `BaseRecord.dtype` holds the reason.
    """
    excluded = set(exclude)
    weights = [(n, w) for n, w in base_weights(model) if n not in excluded]
    config: Any = getattr(model, "config", None)
    shapes = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        shape = full_shape(weight) if isinstance(weight, Tensor) else weight.shape
        shapes.update(f"{name}\0{tuple(shape)}\0".encode())
    name, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if source is not None:
        name, revision = source.name, source.revision
    return BaseRecord(
        class_name=type(model).__name__.removeprefix("FSDP"),  # fully_shard adds it
        model_type=getattr(config, "model_type", None) or None,
        shapes=shapes.hexdigest(),
        name=name or None,
        revision=revision or None,
        **hash_weights(weights, reuse=for_comparison)._asdict(),
        excluded=tuple(sorted(excluded)),
        configuration=computing_fields(config),
        tokenizer=None if tokenizer is None else tokenizer_digest(tokenizer),
    )


def compare(recorded: BaseRecord, live: BaseRecord) -> list[str]:
    """Check that a live model is the base that an adapter was trained on.

    Args:
        recorded: The record in the adapter's file.
        live: The record of the model, with the same parameters excluded.

    Returns:
        Sentences about harmless differences (dtype, quantisation, sharding), and about another tokenizer. Weights that
        equal the training's bfloat16 weights after rounding are no difference.

    Raises:
        WrongBaseError: The architecture, the weights or the configuration differ.
    """
    for attribute, a, b in (
        ("class", recorded.class_name, live.class_name),
        ("model type", recorded.model_type, live.model_type),
    ):
        if a != b:
            raise _wrong_base(recorded, live, f"its {attribute} is {b}, not {a}")
    # A library that packs weights may pack them, and so their shapes, in another way.
    packed = PACKED in (recorded.dtype, live.dtype)
    if recorded.shapes != live.shapes and not packed:
        reason = "it has other parameters or other shapes (another size or vocabulary)"
        raise _wrong_base(recorded, live, reason)
    # Dropout and other fields of training do not change the adapted model.
    if changed := changed_fields(recorded.configuration, live.configuration, training=False):
        reason = f"its configuration differs in {', '.join(changed)} (trained -> this model)"
        raise _wrong_base(recorded, live, reason)
    return [*_compare_weights(recorded, live), *_compare_tokenizers(recorded, live)]


def _compare_tokenizers(recorded: BaseRecord, live: BaseRecord) -> list[str]:
    """A difference is no error: a newer version of tokenizers may write the same tokenizer in another form."""
    if None in (recorded.tokenizer, live.tokenizer) or recorded.tokenizer == live.tokenizer:
        return []
    return [
        "The adapter was trained with another tokenizer: the vocabulary, the rules, the special tokens or the chat "
        "template differ. Use the tokenizer that the adapter was trained with."
    ]


def _compare_weights(recorded: BaseRecord, live: BaseRecord) -> list[str]:
    """Compare the hashes; without hashes, the sources. Weights that were rounded twice pass if the revisions match."""
    if recorded.exact is not None and recorded.exact == live.exact:
        return []
    dtypes = {recorded.dtype, live.dtype}
    change = f"The adapter was trained on {recorded.dtype} weights and runs on {live.dtype} ones"
    if recorded.bfloat16 is None or live.bfloat16 is None:
        if recorded.name is None or live.name is None:
            return [
                f"{change}, which cannot be compared: make sure that it is the same base model."
            ]
        if recorded.name == live.name:  # most commits leave the weights as they are
            unhashed = live if live.bfloat16 is None else recorded
            bases = dict.fromkeys([str(recorded), str(live)])
            return [
                f"{change}, of {' and '.join(bases)}. {unhashed.dtype} weights cannot be compared."
            ]
        reason = f"it is {live}, and its weights cannot be compared"
        raise _wrong_base(recorded, live, reason)
    if recorded.bfloat16 == live.bfloat16:
        if not KINDS.isdisjoint(dtypes):
            return [f"{change}; the original weights, rounded to bfloat16, are the same."]
        if recorded.dtype == "bfloat16":
            return []  # these weights round to those of the training, so they are at least as precise
        if len(dtypes) == 2:
            return [f"{change}; rounded to bfloat16 they are the same."]
    reason = f"its {live.dtype} weights differ"
    # float32 is rounded to bfloat16 once, in the load or for the hash, so equal weights have equal hashes. Other
    # dtypes round a second time. A local path has no revision: its weights may have been replaced.
    if len(dtypes) == 2 and dtypes != {"float32", "bfloat16"}:
        if str(recorded) == str(live) and None not in (live.name, live.revision):
            return [f"{change}, both of {live}. Rounded twice, they cannot be compared."]
        reason += f", perhaps only by rounding (load it as in the training, in {recorded.dtype}, to compare them)"
    raise _wrong_base(recorded, live, reason)


def _wrong_base(recorded: BaseRecord, live: BaseRecord, reason: str) -> WrongBaseError:
    return WrongBaseError(
        f"The adapter was trained on {recorded}, but this model ({live}) is another base: {reason}. Load the adapter "
        "on its own base, or set allow_other_base (--allow_other_base) to load it anyway."
    )


# --- hashing -------------------------------------------------------------------------------------


def hash_weights(
    weights: Iterable[tuple[str, Tensor | QuantisedWeight | PackedWeight]], *, reuse: bool = False
) -> WeightHashes:
    """Hash named weights in any order; `reuse` takes earlier hashes of weights that have not changed since."""
    weights = list(weights)
    plain = [w for _, w in weights if isinstance(w, Tensor)]
    for reason, applies in (("meta", attrgetter("is_meta")), ("sharded", is_sharded)):
        if any(map(applies, plain)):
            return WeightHashes(reason, None, None)
    if any(isinstance(w, PackedWeight) and not w.tensors for _, w in weights):
        return WeightHashes(PACKED, None, None)
    known = {name: known_digests(_tensors(w)) if reuse else None for name, w in weights}
    hashed = {name: pair for name, pair in known.items() if pair is not None}
    # hashlib releases the GIL while it hashes. The largest weights go first, to balance the threads.
    by_size = sorted((w for w in weights if w[0] not in hashed), key=lambda w: -w[1].numel())
    if by_size:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            digests_of = pool.map(_digests, (w for _, w in by_size))
            hashed |= {name: pair for (name, _), pair in zip(by_size, digests_of, strict=True)}
    rounded = {name: d.bfloat16 for name, d in hashed.items() if d.bfloat16 is not None}
    return WeightHashes(
        _dtype_label(w for _, w in weights),
        _combine({name: d.exact for name, d in hashed.items()}),
        _combine(rounded) if rounded.keys() == hashed.keys() else None,
    )


def _digests(weight: Tensor | QuantisedWeight | PackedWeight) -> Digests:
    computed = digests(weight) if isinstance(weight, Tensor) else weight.digests()
    remember(_tensors(weight), computed)
    return computed


def _tensors(weight: Tensor | QuantisedWeight | PackedWeight) -> list[Tensor]:
    """Return the tensors that determine the digests of a weight, the parameter first; none if they are not known."""
    if isinstance(weight, PackedWeight):
        return weight.tensors
    return [weight] if isinstance(weight, Tensor) else [weight.packed, *weight.scales.values()]


def _dtype_label(weights: Iterable[Tensor | QuantisedWeight | PackedWeight]) -> str:
    """Return the kind of quantisation, else the one dtype of all weights, else "mixed"."""
    names = {_dtype_of(weight) for weight in weights}
    # A quantised model still has norms and embeddings in a dtype.
    names = names & {PACKED} or names & KINDS or names
    return names.pop() if len(names) == 1 else "mixed"


def _dtype_of(weight: Tensor | QuantisedWeight | PackedWeight) -> str:
    if isinstance(weight, PackedWeight):
        return PACKED
    return dtype_name(weight.dtype) if isinstance(weight, Tensor) else weight.kind


def _combine(digest_of: dict[str, bytes]) -> str:
    """Return one SHA-256 of the digests of all weights, by name, in the order of the names."""
    entries = (f"{name}\0".encode() + digest_of[name] for name in sorted(digest_of))
    return hashlib.sha256(b"".join(entries)).hexdigest()
