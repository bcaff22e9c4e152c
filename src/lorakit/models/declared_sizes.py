"""Plausible numbers in the config.json of a base model, checked before transformers builds a model of that size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lorakit import storage
from lorakit.configuration import is_finite
from lorakit.errors import BaseModelError

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_OPTIONAL_LAYERS = ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers")
_WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "embedding_size"),
    *("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "d_kv"),
)
_POSITIONS = ("max_position_embeddings", "n_positions", "max_source_positions", "n_ctx")

MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS = 10_000, 2**20, 10**8, 2**40
"""Largest sizes: each is at least 50 times that of any published model."""
BOUNDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_LAYERS, (1, MAX_LAYERS)),
    **dict.fromkeys(_OPTIONAL_LAYERS, (0, MAX_LAYERS)),
    **dict.fromkeys(_WIDTHS, (1, MAX_WIDTH)),
    **dict.fromkeys(_POSITIONS, (1, MAX_POSITIONS)),
    "vocab_size": (1, MAX_VOCABULARY),
    "head_dim": (0, MAX_WIDTH),  # 0 in GLM: from the other widths
}
"""Least and largest value of the settings that determine the size of a model."""

_FINITE = re.compile(r".*(eps|epsilon|theta|dropout|drop|pdrop|initializer_range)$")
"""Other numbers that would make every output NaN."""


def check_declared(name: str, config: Mapping[str, Any], path: str | Path) -> None:
    """Check the numbers of a model's config.json, also against the weights if `path` is a folder, not a hub id.

    Raises:
        BaseModelError: A size is not plausible, or the weights have far fewer layers.
    """
    sizes = {}
    for field, key, value in _numbers(config):
        if key in BOUNDS and isinstance(value, int):
            least, most = BOUNDS[key]
            sizes[field] = value
            if not least <= value <= most:
                raise BaseModelError(
                    f"The config.json of '{name}' sets {field} to {_shown(value)}; a whole number from {least} to "
                    f"{most:,} was expected. Restore config.json from the model's source."
                )
        elif _FINITE.match(key) and not is_finite(value):
            raise BaseModelError(
                f"The config.json of '{name}' sets {field} to {_shown(value)}; a finite number was expected. Restore "
                "config.json from the model's source."
            )
    declared = {f: n for f, n in sizes.items() if f.rpartition(".")[2] in _LAYERS}
    found = _stored_layers(Path(path))
    # ALBERT's layers share their weights. Some checkpoints omit layers, whose names the loader then reports.
    if not declared or not found or "num_hidden_groups" in config:
        return
    field = max(declared, key=declared.__getitem__)
    if declared[field] > 2 * found:
        raise BaseModelError(
            f"The config.json of '{name}' sets {field} to {declared[field]:,}, but its files have the weights of "
            f"{found} layers. Restore config.json from the model's source."
        )


def _numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the dotted name, the last part of it, and the value of each number, also of nested sections.

    That of a quantisation is left out: it has no sizes of the model, and torchao's has a `dim` of -1.
    """
    for key, value in config.items():
        if key == "quantization_config":
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", str(key), value


def _shown(value: float) -> str:
    text = f"{value:,}"
    return text if len(text) <= 30 else f"a number of {len(text)} characters"


def _stored_layers(folder: Path) -> int:
    """Return the number of layers in the safetensors files of a folder; 0 where it is unknown."""
    if not folder.is_dir():
        return 0
    names: set[str] = set()
    is_whole = (folder / "model.safetensors").is_file()
    # transformers ignores an index beside that file: it is of another save.
    for index in () if is_whole else folder.glob("*.index.json"):
        weights = storage.read_json(index, BaseModelError).get("weight_map")
        names |= set(weights) if isinstance(weights, dict) else set()
    if not names:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                names |= set(tensors.keys())
    blocks = [re.search(r"(?:^|\.)(\d{1,9})\.", name) for name in names]
    return max((int(block[1]) + 1 for block in blocks if block), default=0)
