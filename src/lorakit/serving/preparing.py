"""Read an adapter and check that mixed batches on this base can compute it; nothing is changed on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from lorakit.adapters.formats.fingerprint import BaseRecord
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.layer_adapters import LayerAdapters, why_not_by_token
from lorakit.adapters.loading import build_modules, check_base
from lorakit.adapters.row_layout import row_layouts
from lorakit.compute.adapted import require_new_weights
from lorakit.errors import AdapterFileError, AdapterStateError
from lorakit.methods.module import AdapterModule
from lorakit.models.heads import logits_layer
from lorakit.models.layers import ADAPTERS
from lorakit.models.loading import Base
from lorakit.models.tree import base_modules, submodule
from lorakit.serving.folders import Location


@dataclass(frozen=True)
class Prepared:
    """An adapter that can be installed on the model."""

    stored: StoredAdapter
    modules: dict[str, AdapterModule]
    """What it adds to layers, by their paths."""
    bytes: int
    """Size of its tensors on the model."""
    outputs: int | None
    """Number of its logits in a classification or regression head; None for a language model."""
    labels: tuple[str, ...]
    """Names of these logits; empty for regression and for a language model."""
    task: str | None
    """The recorded task."""


def prepare(
    base: Base,
    location: Location,
    *,
    allow_other_base: bool,
    tokenizer: str | None,
    record: BaseRecord,
) -> Prepared:
    """Read an adapter, check it as `lorakit.load` does, and build its modules.

    Args:
        base: The base, without active adapters.
        location: The adapter's files.
        allow_other_base: Accept an adapter that records another base, and log a warning.
        tokenizer: Digest of the tokenizer that its requests use.
        record: Fingerprint of the base, which does not change while it is served.

    Raises:
        AdapterFileError: The file is damaged or unsafe, or its tensors do not fit the model's layers.
        WrongBaseError: It was trained on another base.
        AdapterStateError: A batch of several adapters cannot use it.
    """
    model, path, stored = base.model, location.path, location.read()
    require_new_weights(base, stored, path)
    outputs, labels = _pad_head(stored, model, path)
    check_base(
        model,
        stored,
        allow_other_base=allow_other_base,
        tokenizer=tokenizer,
        record=None if base.new_weights else record,
    )
    modules = build_modules(model, stored)
    if not modules and not stored.trained:
        raise AdapterFileError(
            f"'{path}' changes no layer of this base, which would answer in its place. Load the adapter on the base it "
            "was trained on."
        )
    _require_mixable(model, stored, modules, path)
    own = [t for module in modules.values() for t in (*module.parameters(), *module.buffers())]
    size = sum(t.numel() * t.element_size() for t in {id(t): t for t in own}.values())
    copies = {id(t): t.numel() for t in stored.trained.values()}  # a tied one has several names
    size += sum(copies.values()) * model.dtype.itemsize
    task = stored.provenance.get("task")
    return Prepared(stored, modules, size, outputs, labels, task if isinstance(task, str) else None)


def _require_mixable(
    model: nn.Module, stored: StoredAdapter, modules: Mapping[str, AdapterModule], path: str
) -> None:
    """Reject an adapter that a batch with several adapters cannot compute, before its first forward pass."""
    if getattr(stored.method, "virtual_tokens", None):
        raise AdapterStateError(
            f"'{path}' has virtual tokens ({type(stored.method).__name__}), which a batch of several adapters cannot "
            "compute. Use `lorakit generate` with this adapter alone, or train LoRA."
        )
    attributes: dict[str, list[str]] = {}
    for name in stored.trained:
        owner, _, attribute = name.rpartition(".")
        attributes.setdefault(owner, []).append(attribute)
    known = dict(base_modules(model))
    layers = {p: known.get(p) or submodule(model, p) for p in (*modules, *attributes)}
    slots = {p: layer._modules.get(ADAPTERS) for p, layer in layers.items()}
    layouts = {p: s.layout for p, s in slots.items() if isinstance(s, LayerAdapters)}
    layouts |= row_layouts(model, [p for p in layers if p not in layouts])
    for p, layer in layers.items():
        reason = why_not_by_token(layer, layouts[p], modules.get(p), attributes.get(p, ()))
        if reason is not None:
            raise AdapterStateError(
                f"'{path}' cannot be used in a batch of several adapters: at '{p}', {reason}. Use `lorakit generate` "
                "or `lorakit predict` with this adapter alone, merge it into a base of its own (`lorakit merge`), or "
                "train LoRA on linear layers."
            )


# --- heads of classifiers -------------------------------------------------------------------------


def base_labels(model: nn.Module) -> tuple[int | None, tuple[str, ...]]:
    """Return number and names of the logits of the base's own head; None and no names for a language model."""
    if logits_layer(model) is None:
        return None, ()
    config: Any = model.config
    count = int(config.num_labels)
    return count, _names([str(config.id2label.get(i, i)) for i in range(count)], count)


def _pad_head(
    stored: StoredAdapter, model: nn.Module, path: str
) -> tuple[int | None, tuple[str, ...]]:
    """Pad an adapter's head with zero rows to the number of logits of the model's; return its own number and names.

    So heads with different numbers of labels are one product. The caller takes the first logits of each row. Factors
    on the head are not padded: their adapter needs the base's head with its own number of labels.

    Raises:
        AdapterFileError: The adapter has more labels than the model.
    """
    head = logits_layer(model)
    if head is None:
        return None, ()
    rows = int(submodule(model, head).out_features)  # type: ignore[arg-type]
    names = [name for name in stored.trained if name.rpartition(".")[0] == head]
    count = max((len(stored.trained[name]) for name in names), default=rows)
    if count > rows:
        raise AdapterFileError(
            f"'{path}' has {count} labels, and the base was opened with a head for {rows}. Start the server with the "
            f"most labels of all adapters: --num_labels {count}."
        )
    for name in names:
        tensor = stored.trained[name]
        missing = (0, 0) * (tensor.ndim - 1) + (0, rows - len(tensor))
        stored.trained[name] = F.pad(tensor, missing)  # (k, ...) to (rows, ...)
    recorded = stored.provenance.get("labels")
    return count, _names(recorded if isinstance(recorded, list) else [], count)


def _names(recorded: Sequence[Any], count: int) -> tuple[str, ...]:
    """Return the recorded names of labels, or those of transformers where two are equal; none for regression."""
    is_text = all(isinstance(name, str) for name in recorded)
    if is_text and len(recorded) == count == len(set(recorded)):
        return tuple(recorded)
    return () if count == 1 else tuple(f"LABEL_{i}" for i in range(count))
