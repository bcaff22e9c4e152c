"""Layers that PEFT leaves out on mixtures of experts."""

from __future__ import annotations

from collections.abc import Collection

from transformers import conversion_mapping

from lorakit.formatting import listed

_TABLES: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
"""Model type -> the type whose names of experts it has. PEFT 0.21 selects by this private table."""

_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""PEFT's `_MOE_TARGET_MODULE_MAPPING`: the names that it replaces by those of stacked experts, on every path."""


def taken_for_experts(paths: Collection[str], model_type: str | None) -> list[str]:
    """Return a notice if PEFT would take adapted layers for experts.

    transformers 5 stacks the experts of these models in one tensor. PEFT therefore replaces their names in
    `target_modules`, also for the linear layers with the same names: those of shared experts and of dense blocks.

    Args:
        paths: The adapted layers.
        model_type: The base's type in transformers, or None if it is not known.
    """
    names = _NAMES.get(_TABLES.get(model_type or "", ""), ())
    left_out = sorted(path for path in paths if path.rpartition(".")[2] in names)
    if not left_out:
        return []
    return [
        f"PEFT with transformers 5 takes {listed([*map(repr, left_out)], 1)} for experts, because of the names. It "
        "ignores their adapters, or refuses the folder. Load it with lorakit, or merge it: lorakit merge ADAPTER "
        "OUTPUT."
    ]
