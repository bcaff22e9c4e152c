"""Map adapters of `nn.MultiheadAttention` to PEFT's form and back.

PEFT adapts both projections with one rank and one alpha. Its `MultiheadAttention.merge` adds the change of the output
projection twice, once by itself and once in `out_proj.merge`. Its forward pass merges for the call, so PEFT computes
``W + 2 dW`` there in training, in inference and merged. Every release with such adapters does, from 0.15.0 to
`LAST_VERSION`; a fix is proposed (https://github.com/huggingface/peft/pull/3774) and not released.

So lorakit reads such an adapter with twice the scaling on the output projection, and writes one that PEFT computes
correctly in this way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorakit.adapters.formats.layout import BaseLayout
from lorakit.adapters.formats.peft.factors import NotExpressibleError
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError
from lorakit.formatting import listed
from lorakit.methods.lora.forms import AttentionForm

LAST_VERSION = "0.21.2"
"""The last release of PEFT that is known to add the change twice."""


def attention_paths(
    layers: Mapping[str, StoredLayer], layout: BaseLayout | None = None
) -> set[str]:
    """Return the paths of the attention modules among the adapted layers, also if only their out_proj is adapted."""
    attention = {path for path, layer in layers.items() if isinstance(layer.form, AttentionForm)}
    if layout is not None:
        parents = {path.rpartition(".")[0] for path in layers if path.endswith(".out_proj")}
        attention |= {path for path in parents if layout.is_attention(path)}
    return attention


# --- reading -------------------------------------------------------------------------------------


def as_computed(layers: dict[str, StoredLayer], version: Any) -> list[str]:
    """Double the scaling of output projections, in place, as the PEFT that wrote the file does.

    `version` is the file's peft_version, which PEFT records since 0.18.

    Returns:
        A notice, if a layer was changed.

    Raises:
        AdapterFileError: The file is of a later PEFT, whose arithmetic is not known.
    """
    adapted = attention_paths(layers)
    paths = [f"{path}.out_proj" for path in adapted if f"{path}.out_proj" in layers]
    paths = [path for path in paths if layers[path].B.any()]
    if not paths:
        return []
    if version is not None and not _adds_twice(str(version)):
        raise AdapterFileError(
            f"it adapts '{paths[0]}' of an nn.MultiheadAttention, and was written by PEFT {version!s:.40}. PEFT up to "
            f"{LAST_VERSION} adds the change of this projection twice; lorakit does not know what this version does. "
            "Update lorakit, or merge the adapter with that PEFT and use the merged model."
        )
    for path in paths:
        layer = layers[path]
        layers[path] = replace(layer, scaling=2 * layer.scaling, alpha=2 * layer.alpha)
    found = (
        f"PEFT {version} adds"
        if version is not None
        else f"The file does not record its version of PEFT. All up to {LAST_VERSION} add"
    )
    return [
        f"{found} the change of an nn.MultiheadAttention's output projection twice (W + 2 dW). lorakit computes the "
        f"same: it doubled alpha of {listed([*map(repr, paths)], 1)}."
    ]


def _adds_twice(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    last = tuple(map(int, LAST_VERSION.split(".")))
    return numbers is not None and tuple(int(n[:9]) for n in numbers.groups()) <= last


# --- writing -------------------------------------------------------------------------------------


def both_projections(path: str, entries: Mapping[str, StoredLayer]) -> dict[str, StoredLayer]:
    """Return both projections of the attention module at `path`, as PEFT needs them.

    Both have one rank and one scaling s, padded with zeros. PEFT computes ``s B A`` on the input projection and
    ``2 s B A`` on the output projection, whose B is multiplied by a power of two, so that no number is rounded.

    Raises:
        NotExpressibleError: They have DoRA or other scalings.
    """
    names = (path, f"{path}.out_proj")
    present = {name: entries[name] for name in names if name in entries}
    if any(entry.magnitude is not None for entry in present.values()):
        raise NotExpressibleError(f"'{path}': PEFT has no DoRA for nn.MultiheadAttention.")
    first = next(iter(present.values()))
    scaling = present[path].scaling if path in present else first.scaling / 2
    factors = {name: entry.scaling / scaling for name, entry in present.items()}
    factors = {name: f / 2 if name != path else f for name, f in factors.items()}
    is_exact = all(abs(math.frexp(factor)[0]) == 0.5 for factor in factors.values())
    if not is_exact or len({entry.A.dtype for entry in present.values()}) > 1:
        raise NotExpressibleError(
            f"'{path}': PEFT has one alpha for an nn.MultiheadAttention, but its input and output "
            "projections have different scalings."
        )
    rank = max(entry.rank for entry in present.values())
    width = first.A.shape[1]  # in_proj and out_proj both have embed_dim inputs
    padded = {}
    for name, rows in zip(names, (3 * width, width), strict=True):
        A, B = first.A.new_zeros(rank, width), first.A.new_zeros(rows, rank)
        if name in present:
            entry = present[name]
            A[: entry.rank], B[:, : entry.rank] = entry.A, entry.B * factors[name]
        padded[name] = replace(first, A=A, B=B, scaling=scaling, alpha=scaling * rank)
    return padded


def written_notices(entries: Mapping[str, StoredLayer], attention: set[str]) -> list[str]:
    """Return a notice if the folder depends on PEFT's arithmetic."""
    factors = {path: entries[path].B for path in (f"{p}.out_proj" for p in sorted(attention))}
    paths = [path for path, B in factors.items() if B.is_meta or B.any()]
    if not paths:
        return []
    return [
        f"PEFT up to {LAST_VERSION} adds the change of an nn.MultiheadAttention's output projection twice. The folder "
        f"has half of it for {listed([*map(repr, paths)], 1)}, so that these versions compute what lorakit computes; "
        "a later PEFT may not."
    ]
