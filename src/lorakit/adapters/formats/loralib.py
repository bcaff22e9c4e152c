"""Read and write loralib files (microsoft/LoRA): state dicts with ``<layer>.lora_A`` and ``<layer>.lora_B``.

Such a file holds no alpha, rank or configuration. Linear layers, embeddings and slices of a fused projection
(`MergedLinear`) are supported, in the layouts of the official examples: RoBERTa, DeBERTa (also with its older names),
GPT-2 with its fused ``c_attn`` (a dictionary with ``model_state_dict``, keys with the prefix ``module.``), and GPT-2 of
the first release.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit import storage
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer, located, rank_notices
from lorakit.adapters.formats.tensors import SAFETENSORS, SUFFIXES, read_tensors
from lorakit.configuration import is_finite
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.methods.lora import LoRA
from lorakit.methods.lora.forms import EmbeddingForm, LinearForm, in_each_group
from lorakit.models.layers import RowSlice
from lorakit.models.tree import is_inside, parents
from lorakit.storage.tensors import safetensors_bytes

ASSUMED_KINDS = (
    "The file does not record the kinds of its layers. Those named like an embedding count as embeddings, all others "
    "as linear layers. If one is of another kind, PEFT cannot load a folder made from this file. Then load the file on "
    "its base and save it: lorakit.load(model, FILE, alpha=...).save(FOLDER)."
)
"""Notice about a file that was not compared with a model yet; `with_kinds` removes it."""

_OLDER_NAMES = (
    (r"(.+\.\w+)_lora_a\.weight", r"\1_proj.lora_A"),  # DeBERTa
    (r"(.+\.\w+)_lora_b\.weight", r"\1_proj.lora_B"),
    (
        r"(.+\.attn)\.([qkv])_proj_adapter1\.weight",
        r"\1.c_attn.\2.lora_A",
    ),  # GPT-2, one pair for each slice
    (r"(.+\.attn)\.([qkv])_proj_adapter2\.weight", r"\1.c_attn.\2.lora_B"),
)
_FACTOR = re.compile(r"(?P<path>.+?)(?:(?<=\.c_attn)\.(?P<slice>[qkv]))?\.lora_(?P<factor>[AB])")
_TABLE = re.compile(r"(^|[._])(?!\w*_(out|proj)$)(wte|wpe|embed\w*|\w*embeddings?)$")
"""End of the path of an embedding table."""
_GPT2_FUSED = "c_attn"


# --- reading -------------------------------------------------------------------------------------


def read_loralib(path: str | Path, *, alpha: float | None) -> StoredAdapter:
    """Read a loralib file.

    Args:
        path: A ``.bin``, ``.pt``, ``.pth`` or ``.safetensors`` file.
        alpha: The `lora_alpha` of the layers, which the file does not record.

    Returns:
        The adapter. Tensors other than factors are `trained` (a head, biases).

    Raises:
        ConfigurationError: `alpha` is missing.
        AdapterFileError: The file is damaged or unsafe, or factors are missing, or it is not known which slices of a
            fused layer they adapt.
    """
    path = Path(path)
    if alpha is not None and (not is_finite(alpha) or alpha == 0):
        raise ConfigurationError(
            f"alpha is {alpha!r}; a finite number other than 0 was expected (0 would disable the adapter)."
        )
    with located(f"'{path}'"):
        factors, trained = _sort(_state_dict(path))
        if not factors:
            raise AdapterFileError(
                "it holds no lora_A and lora_B, so it is not a loralib file. A file with PEFT's names belongs into a "
                "folder, as adapter_model.safetensors beside its adapter_config.json."
            )
        if alpha is None:
            raise ConfigurationError(
                "it is a loralib file, which does not record alpha. Set alpha (--alpha 16) to the lora_alpha it was "
                "trained with; the official scripts use 16 for RoBERTa, 32 for DeBERTa and GPT-2."
            )
        if whole := next((p for p in factors if f"{p}.weight" in trained), None):
            raise AdapterFileError(
                f"it has the base's weight of '{whole}', so it is the file of a whole model. Write the adapter alone "
                "with loralib.lora_state_dict(model)."
            )
        layers = {
            layer_path: _layer(layer_path, parts, float(alpha))
            for layer_path, parts in factors.items()
        }
        return _adapter(layers, trained, float(alpha))


def with_kinds(stored: StoredAdapter, modules: Mapping[str, nn.Module]) -> None:
    """Give the layers of a loralib file the kinds of the model's layers, which the file does not record."""
    for path, layer in stored.layers.items():
        if not layer.slices and layer.kind in (LinearForm.kind, EmbeddingForm.kind):
            is_table = isinstance(modules.get(path), nn.Embedding)
            kind = EmbeddingForm.kind if is_table else LinearForm.kind
            stored.layers[path] = replace(layer, kind=kind)
    stored.notices = [notice for notice in stored.notices if notice != ASSUMED_KINDS]


def _state_dict(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path, section="model_state_dict")
    # Data-parallel training adds the prefix "module." to every key.
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the factors by layer, with today's names, and the other tensors."""
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        for older, today in _OLDER_NAMES:
            name = re.sub(f"{older}$", today, name)
        match = _FACTOR.fullmatch(name)
        if match is not None:
            part = match["factor"] + (match["slice"] or "")
            if part in factors.setdefault(match["path"], {}):
                raise AdapterFileError(f"'{match['path']}' has factors under two names.")
            factors[match["path"]][part] = tensor
        elif "lora_" in key or "_adapter" in key:
            raise AdapterFileError(
                f"'{key}' is not a name of loralib; names that end in .lora_A or .lora_B were expected. A file with "
                "PEFT's names belongs into a folder, as adapter_model.safetensors beside its adapter_config.json."
            )
        else:
            others[key] = tensor
    return factors, others


def _layer(layer_path: str, parts: Mapping[str, Tensor], alpha: float) -> StoredLayer:
    """Return a layer from its factors, which GPT-2's first release has for each slice."""
    letters = [letter for letter in "qkv" if f"A{letter}" in parts or f"B{letter}" in parts] or [""]
    expected = {f"{factor}{letter}" for factor in "AB" for letter in letters}
    if parts.keys() != expected:
        missing = sorted(f"lora_{part}" for part in expected - parts.keys())
        raise AdapterFileError(
            f"'{layer_path}' has no {missing[0] if missing else 'single form of factors'}. Download or save the file "
            "again."
        )
    try:
        A, B = (torch.cat([parts[f"{factor}{letter}"] for letter in letters]) for factor in "AB")
    except RuntimeError as error:
        raise AdapterFileError(
            f"'{layer_path}': the factors of its slices differ in shape ({error})."
        ) from None
    if A.ndim != 2 or B.ndim != 2 or 0 in (*A.shape, *B.shape) or A.shape[0] % B.shape[1]:
        raise AdapterFileError(
            f"'{layer_path}': lora_A has shape {tuple(A.shape)} and lora_B has shape {tuple(B.shape)}; "
            "lora_A (rank, in) and lora_B (out, rank) were expected."
        )
    slices = _slices(layer_path, A.shape[0] // B.shape[1], len(B), "".join(letters))
    is_table = _TABLE.search(layer_path) is not None and not slices
    with located(f"'{layer_path}'"):
        return StoredLayer(
            kind=EmbeddingForm.kind if is_table else LinearForm.kind,
            A=A,
            B=B,
            scaling=alpha / B.shape[1],
            alpha=alpha,
            slices=slices,
            transposed=_name(layer_path) == _GPT2_FUSED,
        )


def _slices(layer_path: str, count: int, rows: int, letters: str) -> tuple[RowSlice, ...]:
    """Return the slices of loralib's MergedLinear, each with rank rows of A; none for a plain layer.

    Args:
        layer_path: Path of the layer.
        count: Number of adapted slices.
        rows: Rows of B, those of all adapted slices.
        letters: The adapted ones of q, k and v, if the file names them. The official script adapts q and v, or all.
    """
    if count == 1 and not letters:
        return ()
    letters = letters or {2: "qv", 3: "qkv"}.get(count, "")
    if _name(layer_path) != _GPT2_FUSED or not letters or rows % count:
        raise AdapterFileError(
            f"'{layer_path}' is a fused layer with {count} adapted slices, but the file does not record which. lorakit "
            f"knows only those of GPT-2's {_GPT2_FUSED}. Train the adapter again with lorakit."
        )
    width = rows // count
    return tuple(
        RowSlice(groups=1, stride=3 * width, offset="qkv".index(letter) * width, width=width)
        for letter in letters
    )


def _adapter(
    layers: dict[str, StoredLayer], trained: dict[str, Tensor], alpha: float
) -> StoredAdapter:
    modules = {}  # the largest modules with a trained tensor and no adapted layer: the heads
    for name in trained:
        free = [p for p in parents(name) if not any(is_inside(path, p) for path in layers)]
        if free and _name(name) != "bias":
            modules[free[0]] = None
    biases = [name for name in trained if not is_inside(name, *modules)]
    of_adapted_layers = all(name.rpartition(".")[0] in layers for name in biases)
    rank, _ = Counter(layer.rank for layer in layers.values()).most_common(1)[0]
    is_assumed = any(not layer.slices for layer in layers.values())
    return StoredAdapter(
        method=LoRA(
            rank=rank,
            alpha=alpha,
            targets=_targets(layers),
            bias=("lora_only" if of_adapted_layers else "all") if biases else "none",
            rank_pattern={p: layer.rank for p, layer in layers.items() if layer.rank != rank},
            train_modules=tuple(modules),
        ),
        layers=layers,
        trained=trained,
        notices=[*rank_notices(layers), *([ASSUMED_KINDS] if is_assumed else [])],
    )


def _targets(layers: Mapping[str, StoredLayer]) -> tuple[str, ...]:
    """Return targets that select the same layers."""
    targets: dict[str, None] = {}
    for layer_path, layer in layers.items():
        for piece in layer.slices:
            targets[f"attention.{'qkv'[piece.offset // piece.width]}"] = None
        if not layer.slices:
            targets[_name(layer_path)] = None
    return tuple(targets)


def _name(path: str) -> str:
    return path.rpartition(".")[2]


# --- writing -------------------------------------------------------------------------------------


def write_loralib(stored: StoredAdapter, path: str | Path) -> tuple[float, list[int]]:
    """Write one file for loralib's ``model.load_state_dict(..., strict=False)``.

    Args:
        stored: The adapter; one alpha must give the scaling of all layers, since the file records none.
        path: A ``.safetensors`` file; or ``.bin``, ``.pt``, ``.pth`` for code that uses `torch.load`
            (a pickle of plain tensors, which loads with ``weights_only=True``).

    Returns:
        The `lora_alpha` that a reader must set, and the different ranks r of the layers. They differ from the adapter's
        where loralib's scaling alpha / r or its rank does: with rsLoRA and PiSSA.

    Raises:
        AdapterFileError: loralib cannot represent the adapter, or it has `base_copies`.
        ConfigurationError: The suffix of `path` is not one of these.
        RunFolderError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigurationError(
            f"'{path}' must end in .safetensors, .bin, .pt or .pth, which determines the kind of file."
        )
    if not stored.layers or stored.modules:
        raise AdapterFileError(
            f"loralib has no method {type(stored.method).__name__}. Keep the adapter's folder."
        )
    stored.require_no_base_copies()
    state: dict[str, Tensor] = {}
    alphas, ranks = set(), set()
    for place, layer in stored.layers.items():
        with located(f"'{place}'"):
            A, B, rank = _to_loralib(layer)
        alphas.add(layer.alpha if layer.alpha / rank == layer.scaling else layer.scaling * rank)
        ranks.add(rank)
        state |= {f"{place}.lora_A": A, f"{place}.lora_B": B}
    if len(alphas) > 1:
        raise AdapterFileError(
            "a loralib file has one alpha for all layers, but these layers need "
            f"{', '.join(f'{alpha:g}' for alpha in sorted(alphas))}. Keep the adapter's folder."
        )
    state.update(stored.trained)
    with storage.atomic_file(path) as temporary:
        if path.suffix == SAFETENSORS:
            temporary.write_bytes(safetensors_bytes(state))
        else:
            with temporary.open("wb") as file:
                torch.save({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return alphas.pop(), sorted(ranks)


def _to_loralib(layer: StoredLayer) -> tuple[Tensor, Tensor, int]:
    """Return A, B and the rank of the equivalent loralib layer; PiSSA's initial factors are subtracted in it."""
    width = layer.slices[0].width if layer.slices else 1
    offsets = [piece.offset for piece in layer.slices]
    obstacles = (
        (
            layer.kind not in (LinearForm.kind, EmbeddingForm.kind),
            f"factors of kind {layer.kind!r}",
        ),
        (layer.magnitude is not None, "DoRA"),
        (layer.B_bias is not None, "bias of B (lora_bias)"),
        (layer.tied_head is not None, "tied head (tie_head)"),
        (
            offsets != sorted(offsets)
            or any(s.groups > 1 or s.width != width or s.offset % width for s in layer.slices)
            or any(s.stride % width for s in layer.slices),
            "slices other than of equal width and in the order of their rows",
        ),
    )
    for applies, what in obstacles:
        if applies:
            raise AdapterFileError(f"loralib has no {what}. Keep the adapter's folder.")
    if layer.initial_A is None or layer.initial_B is None:
        return layer.A, layer.B, layer.rank
    A = in_each_group(layer.A, layer.initial_A, max(1, len(layer.slices)))
    return A, torch.cat([layer.B, -layer.initial_B], dim=1), 2 * layer.rank
