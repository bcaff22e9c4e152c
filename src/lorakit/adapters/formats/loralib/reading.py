"""Read loralib files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.formats.other_tools import hint_of
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer, located, rank_notices
from lorakit.adapters.formats.tensors import read_tensors
from lorakit.configuration import is_finite
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.methods.lora import LoRA
from lorakit.models.layers import RowSlice
from lorakit.models.tree import is_inside, parents

EnableLora = Mapping[str, Sequence[bool]]

ASSUMED_KINDS = (
    "The file does not record the kinds of its layers. Those named like an embedding count as embeddings, all others "
    "as linear layers. If one is of another kind, such as a convolution, PEFT cannot load a folder made from this "
    "file. Then load the file on its base and save it: lorakit.load(model, FILE, alpha=...).save(FOLDER)."
)
"""Notice about a file without weights; `check_targets`, which has the model, removes it."""

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])")
_DEBERTA_OLD = re.compile(r"(?P<start>.+\.)(?P<name>\w+)_lora_(?P<factor>[ab])\.weight")
_GPT2_FIRST = re.compile(
    r"(?P<start>.+\.attn)\.(?P<letter>[qkv])_proj_adapter(?P<factor>[12])\.weight"
)
_TABLE = re.compile(r"(^|[._])(?!\w*_(out|proj)$)(wte|wpe|embed\w*|\w*embeddings?)$")
"""End of the path of an embedding table."""
_GPT2_FUSED = "c_attn"
_GPT2_BASE_NAMES = {"g": "weight", "w": "weight", "b": "bias"}
"""OpenAI's names of GPT-2's parameters -> those of transformers: g and b are of a norm, w and b of a Conv1D."""


def read_loralib(
    path: str | Path, *, alpha: float | None, enable_lora: EnableLora | None = None
) -> StoredAdapter:
    """Read a loralib file.

    Args:
        path: A ``.bin``, ``.pt``, ``.pth`` or ``.safetensors`` file.
        alpha: The `lora_alpha` of the layers, which the file does not record.
        enable_lora: The adapted slices of fused layers, by the end of their path, in the form of
            loralib's MergedLinear: ``{"c_attn": [True, False, True]}``. Needed for layouts other
            than the official one of GPT-2 (q and v, or all three).

    Returns:
        The adapter. Tensors other than factors are `trained` (a head, biases); in a file of a whole
        model, those of its body are `base_copies`.

    Raises:
        ConfigurationError: `alpha` is missing, or the adapted slices are ambiguous.
        AdapterFileError: The file is damaged or unsafe, or factors are missing.
    """
    path = Path(path)
    if alpha is not None and (not is_finite(alpha) or alpha == 0):
        raise ConfigurationError(
            f"alpha is {alpha!r}; a finite number other than 0 was expected (0 would disable the adapter)."
        )
    with located(f"'{path}'"):
        factors, others = _sort(_state_dict(path))
        if not factors:
            raise AdapterFileError(
                f"it holds no lora_A and lora_B, so it is not a loralib file.{hint_of(others)}"
            )
        if alpha is None:
            raise ConfigurationError(
                "it is a loralib file, which does not record alpha. Set alpha (--alpha 16) to the lora_alpha it was "
                "trained with; the official scripts use 16 for RoBERTa, 32 for DeBERTa and GPT-2."
            )
        layers = {
            layer_path: _layer(layer_path, parts, others, float(alpha), enable_lora or {})
            for layer_path, parts in factors.items()
        }
        return _adapter(layers, others, float(alpha))


def _state_dict(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path, section="model_state_dict")
    # Data-parallel training adds the prefix "module." to every key.
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the factors by layer, with unified names, and the other tensors."""
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            layer_path, part = match["path"], match["factor"]
        elif match := _DEBERTA_OLD.fullmatch(key):
            layer_path, part = f"{match['start']}{match['name']}_proj", match["factor"].upper()
        elif match := _GPT2_FIRST.fullmatch(key):
            layer_path = f"{match['start']}.{_GPT2_FUSED}"
            part = f"{'A' if match['factor'] == '1' else 'B'}_{match['letter']}"
        elif "lora_" in key or "_adapter" in key:
            raise AdapterFileError(
                f"'{key}' is not a name of loralib; names that end in .lora_A or .lora_B were expected."
                f"{hint_of([key])}"
            )
        else:
            others[key] = tensor
            continue
        if part in factors.setdefault(layer_path, {}):
            raise AdapterFileError(f"'{layer_path}' has factors under two names.")
        factors[layer_path][part] = tensor
    return factors, others


def _layer(
    layer_path: str,
    parts: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    alpha: float,
    enable_lora: EnableLora,
) -> StoredLayer:
    """Return a layer from its factors; the shape of its weight in `others`, if any, shows its type."""
    if any("_" in part for part in parts):
        return _first_gpt2_layer(layer_path, parts, alpha)
    if parts.keys() != {"A", "B"}:
        missing = "B" if "A" in parts else "A"
        raise AdapterFileError(
            f"'{layer_path}' has no lora_{missing}. Download or save the file again."
        )
    A, B = parts["A"], parts["B"]
    if A.ndim != 2 or B.ndim != 2 or 0 in (*A.shape, *B.shape) or A.shape[0] % B.shape[1]:
        raise AdapterFileError(
            f"'{layer_path}': lora_A has shape {tuple(A.shape)} and lora_B has shape {tuple(B.shape)}; "
            "lora_A (rank, in) and lora_B (out, rank) were expected."
        )
    n_in, n_out = A.shape[1], B.shape[0]
    rank = B.shape[1]
    weight = others.get(f"{layer_path}.conv.weight", others.get(f"{layer_path}.weight"))
    is_table = _TABLE.search(layer_path) is not None
    options: dict[str, Any] = {"kind": "linear"}
    if weight is None and is_table:
        options = {"kind": "embedding"}
    elif weight is not None and weight.ndim > 2:
        options = {"kind": "conv-loralib", "weight_shape": tuple(weight.shape)}
        rank = A.shape[0] // weight.shape[-1]
    elif weight is not None and tuple(weight.shape) == (n_in, n_out) != (n_out, n_in):
        # Stored as (in, out): GPT-2's layout, or an embedding table, which its name shows.
        options = {"kind": "embedding"} if is_table else {"kind": "linear", "transposed": True}
    else:
        weight_rows = None if weight is None else _rows_of(weight, A)
        options["slices"] = _slices(layer_path, A, B, weight_rows, enable_lora)
        options["transposed"] = layer_path.rpartition(".")[2] == _GPT2_FUSED
    with located(f"'{layer_path}'"):
        return StoredLayer(A=A, B=B, scaling=alpha / max(1, rank), alpha=alpha, **options)


def _rows_of(weight: Tensor, A: Tensor) -> int | None:
    """Return the number of output rows of a weight stored as (out, in) or (in, out), the larger if both fit A."""
    sides = [
        weight.shape[1 - i] for i in (0, 1) if weight.ndim == 2 and weight.shape[i] == A.shape[1]
    ]
    return max(sides, default=None)


def _slices(
    layer_path: str, A: Tensor, B: Tensor, n_out: int | None, enable_lora: EnableLora
) -> tuple[RowSlice, ...]:
    """Return the slices of loralib's MergedLinear, each with rank rows of A; none for a plain layer.

    Args:
        layer_path: Path of the layer.
        A: lora_A, (adapted slices * rank, in).
        B: lora_B, (sum of the adapted slices' widths, rank).
        n_out: Output rows of the whole layer; None if the file has no weight that shows them.
        enable_lora: As for `read_loralib`.
    """
    count = A.shape[0] // B.shape[1]
    enabled = next(
        (flags for end, flags in enable_lora.items() if f".{layer_path}".endswith(f".{end}")), None
    )
    if enabled is None:
        if count == 1 and n_out in (None, B.shape[0]):
            return ()
        if layer_path.rpartition(".")[2] == _GPT2_FUSED and count in (2, 3):
            enabled = (True, count == 3, True)
        elif n_out is not None and n_out == B.shape[0]:
            enabled = (True,) * count
        else:
            raise ConfigurationError(
                f"'{layer_path}' is a fused layer with {count} adapted slices, but the file does not record which. "
                "Set them as in loralib's MergedLinear: lorakit.adapters.formats.read_loralib(path, alpha=..., "
                f"enable_lora={{'{layer_path.rpartition('.')[2]}': [True, False, True]}}), and write() the result to a "
                "folder."
            )
    if sum(map(bool, enabled)) != count or B.shape[0] % count:
        raise ConfigurationError(
            f"enable_lora names {sum(map(bool, enabled))} slices for '{layer_path}', but its factors have {count}. "
            f"Write True for {count}."
        )
    width = B.shape[0] // count
    stride = len(enabled) * width
    return tuple(
        RowSlice(groups=1, stride=stride, offset=i * width, width=width)
        for i, flag in enumerate(enabled)
        if flag
    )


def _first_gpt2_layer(layer_path: str, parts: Mapping[str, Tensor], alpha: float) -> StoredLayer:
    """Return a layer of the first release: q_proj_adapter1 (A), q_proj_adapter2 (B), slices of c_attn."""
    letters = [letter for letter in "qkv" if f"A_{letter}" in parts or f"B_{letter}" in parts]
    expected = {f"{factor}_{letter}" for factor in "AB" for letter in letters}
    if parts.keys() != expected:
        raise AdapterFileError(
            f"'{layer_path}' has factors {sorted(parts)}; {sorted(expected)} were expected."
        )
    As, Bs = ([parts[f"{factor}_{letter}"] for letter in letters] for factor in "AB")
    if (
        any(t.ndim != 2 for t in (*As, *Bs))
        or len({(a.shape, b.shape) for a, b in zip(As, Bs, strict=True)}) > 1
    ):
        raise AdapterFileError(
            f"'{layer_path}': the factors of its slices differ in shape. Download or save the file again."
        )
    width = Bs[0].shape[0]
    slices = tuple(
        RowSlice(groups=1, stride=3 * width, offset="qkv".index(letter) * width, width=width)
        for letter in letters
    )
    scaling = alpha / max(1, As[0].shape[0])
    A, B = torch.cat(As), torch.cat(Bs)
    return StoredLayer(
        kind="linear", A=A, B=B, scaling=scaling, alpha=alpha, slices=slices, transposed=True
    )


def _adapter(
    layers: dict[str, StoredLayer], others: Mapping[str, Tensor], alpha: float
) -> StoredAdapter:
    trained, copies = _trained_and_copies(layers, others)
    biases = [name for name in trained if name.rpartition(".")[2] == "bias"]
    modules = _outermost([name for name in trained if name not in biases], layers)
    biases = [name for name in biases if not name.startswith(tuple(f"{m}." for m in modules))]
    bias = "none"
    if biases:
        of_adapted_layers = all(name.rpartition(".")[0] in layers for name in biases)
        bias = "lora_only" if of_adapted_layers else "all"
    rank, _ = Counter(layer.rank for layer in layers.values()).most_common(1)[0]
    notices = rank_notices(layers)
    if not copies and any(not layer.slices for layer in layers.values()):
        notices.append(ASSUMED_KINDS)
    if copies:
        notices.append(
            "The file holds a whole model; its base weights are only compared with the model's."
        )
    return StoredAdapter(
        method=LoRA(
            rank=rank,
            alpha=alpha,
            targets=_targets(layers),
            bias=bias,
            rank_pattern={p: layer.rank for p, layer in layers.items() if layer.rank != rank},
            train_modules=tuple(modules),
        ),
        layers=layers,
        trained=trained,
        base_copies=copies,
        notices=notices,
    )


def _trained_and_copies(
    layers: Mapping[str, StoredLayer], others: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate trained tensors from copies of frozen base weights.

    Only the file of a whole model has copies; it is recognised by the weight of an adapted layer.
    """
    is_whole_model = any(
        f"{layer_path}.{name}" in others
        for layer_path in layers
        for name in ("weight", "w", "conv.weight")
    )
    if not is_whole_model:
        return {_base_name(name, layers): tensor for name, tensor in others.items()}, {}
    roots = {layer_path.partition(".")[0] for layer_path in layers}
    body = {name: tensor for name, tensor in others.items() if name.partition(".")[0] in roots}
    trained, copies = {}, {}
    for name, tensor in others.items():
        if not tensor.is_floating_point():
            continue  # position ids
        if name in body:
            copies[_base_name(name, layers)] = tensor
        # A head that equals the embedding is tied to it, not trained.
        elif not any(tensor.shape == t.shape and tensor.equal(t) for t in body.values()):
            trained[_base_name(name, layers)] = tensor
    return trained, copies


def _base_name(name: str, layers: Mapping[str, StoredLayer]) -> str:
    """Return the base's name of a tensor: without loralib's `conv` level, and with GPT-2's long names."""
    layer_path, _, attribute = name.rpartition(".")
    if layer_path.endswith(".conv") and layer_path.removesuffix(".conv") in layers:
        layer_path = layer_path.removesuffix(".conv")
    return f"{layer_path}.{_GPT2_BASE_NAMES.get(attribute, attribute)}" if layer_path else name


def _outermost(names: Iterable[str], layers: Mapping[str, StoredLayer]) -> list[str]:
    """Return the largest modules that contain a trained tensor and no adapted layer: the heads."""
    modules: dict[str, None] = {}
    for name in names:
        free = [
            p for p in parents(name) if not any(is_inside(layer_path, p) for layer_path in layers)
        ]
        if free:
            modules[free[0]] = None
    return list(modules)


def _targets(layers: Mapping[str, StoredLayer]) -> tuple[str, ...]:
    """Return targets that select the same layers."""
    targets: dict[str, None] = {}
    for layer_path, layer in layers.items():
        for piece in layer.slices:
            if layer_path.rpartition(".")[2] == _GPT2_FUSED and piece.stride == 3 * piece.width:
                targets[f"attention.{'qkv'[piece.offset // piece.width]}"] = None
        if not layer.slices:
            targets[layer_path.rpartition(".")[2]] = None
    return tuple(targets) or tuple(layers)
