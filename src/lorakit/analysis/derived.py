"""Adapters computed from other adapters or models: their settings and their errors."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.compute.adapter_file import templates_of
from lorakit.compute.agreement import Agreement
from lorakit.errors import AdapterFileError
from lorakit.methods.lora import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK = ("task", "generic_task", "labels", "encoding")
"""Keys of the provenance that say, with the run's templates, which texts the original was trained on."""


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """Rank and error of one computed layer."""

    rank: int
    """Rank of the result."""
    norm: float
    """Frobenius norm of the exact change."""
    residual: float
    """Frobenius norm of the exact change minus the result."""

    @property
    def error(self) -> float:
        """The residual divided by the norm."""
        return self.residual / self.norm if self.norm else 0.0


@dataclass(frozen=True, kw_only=True)
class Derived:
    """An adapter computed from other adapters or models, with its errors."""

    adapter: StoredAdapter
    layers: dict[str, LayerResult]
    """By path."""
    notices: list[str] = field(default_factory=list)
    agreement: Agreement | None = None
    """For an extracted adapter: how the predictions of base and adapter differ from the fine-tuned model's. None if the
    models predict nothing, or cannot be compared."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """For an extracted adapter: the tokenizer of the fine-tuned model, if the base can use it."""

    @property
    def error(self) -> float:
        """Residual of all layers together divided by their norm, both Frobenius."""
        norm = math.hypot(*(layer.norm for layer in self.layers.values()))
        residual = math.hypot(*(layer.residual for layer in self.layers.values()))
        return residual / norm if norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values."""
        return {
            "parameters": self.adapter.num_parameters,
            "error": self.error,
            "layers": {
                path: {**vars(layer), "error": layer.error} for path, layer in self.layers.items()
            },
            "notices": self.notices,
            **({"agreement": vars(self.agreement)} if self.agreement else {}),
        }


def derive(original: StoredAdapter, layers: Mapping[str, StoredLayer]) -> StoredAdapter:
    """Return `original` with these layers and matching settings.

    The provenance that still applies is kept; `save` adds that of the result.
    """
    # Express each layer's scaling as alpha / rank, whichever rule the original used.
    layers = {
        path: dataclasses.replace(layer, alpha=layer.scaling * layer.rank)
        for path, layer in layers.items()
    }
    assert isinstance(original.method, LoRA)
    ranks_and_alphas = Counter((layer.rank, layer.alpha) for layer in layers.values())
    rank, alpha = ranks_and_alphas.most_common(1)[0][0]
    targets, init = original.method.targets, original.method.init
    if init == "pissa" and all(layer.initial_A is None for layer in layers.values()):
        init = "kaiming"
    method = dataclasses.replace(
        original.method,
        rank=rank,
        alpha=alpha,
        targets=targets if layers.keys() == original.layers.keys() else tuple(layers),
        scaling="standard",
        init=init,
        rank_pattern={p: layer.rank for p, layer in layers.items() if layer.rank != rank},
        alpha_pattern={p: layer.alpha for p, layer in layers.items() if layer.alpha != alpha},
    )
    return StoredAdapter(
        method=method,
        layers=layers,
        trained=dict(original.trained),
        base=original.base,
        layout=original.layout,
        provenance=inherited_provenance(original),
    )


def inherited_provenance(*originals: StoredAdapter) -> dict[str, Any]:
    """Return the provenance that also applies to an adapter computed from the originals: what all of them share.

    The task, its encoding and its templates are one format of the texts, so they remain together or not at all.
    """
    first = originals[0]
    dtype = first.setting("base", "dtype")
    records = [original.provenance for original in originals]
    kept = _agreed(records, ("data",))
    of_peft = [record["peft"] for record in records if isinstance(record.get("peft"), Mapping)]
    if len(of_peft) == len(records):
        kept["peft"] = _agreed(of_peft, list(of_peft[0]))
        versions = [record.get("peft_version") for record in of_peft]
        if all(versions):  # without one, `load` warns that it may be one before 0.18
            kept["peft"]["peft_version"] = versions[0]
    config: dict[str, Any] = {}
    if all(_format(other) == _format(first) for other in originals):
        kept |= {key: first.provenance[key] for key in TASK if key in first.provenance}
        config |= {"data": data} if (data := templates_of(first)) else {}
    if dtype is not None and all(other.setting("base", "dtype") == dtype for other in originals):
        config["base"] = {"dtype": dtype}
    return kept | ({"config": config} if config else {})


def _agreed(records: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, Any]:
    """Return the values that all records hold equally, of these keys."""
    first = records[0]
    return {
        key: first[key]
        for key in keys
        if all(key in record and record[key] == first[key] for record in records)
    }


def _format(original: StoredAdapter) -> list[Any]:
    """Return what decides how a later use of the adapter writes its texts."""
    return [*(original.provenance.get(key) for key in TASK), templates_of(original)]


def require_low_rank(stored: StoredAdapter) -> None:
    """Raise an AdapterFileError for an adapter without low-rank factors, with a bias of B or copies of base weights."""
    if not stored.layers or stored.modules or not isinstance(stored.method, LoRA):
        raise AdapterFileError(
            f"This adapter ({type(stored.method).__name__}) does not consist of low-rank factors, which compress "
            "and combine need. lorakit extract computes factors from a fully fine-tuned model."
        )
    if any(layer.B_bias is not None for layer in stored.layers.values()):
        raise AdapterFileError(
            "B of this adapter has a bias (lora_bias), which compress and combine do not support. Merge it "
            "into its base: lorakit merge."
        )
    stored.require_no_base_copies()
