"""The method of a run on the command line, beside a file with the settings of another method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.methods.registry import unused_sections


def options_of_other_methods(typed: Mapping[str, Any], in_files: Mapping[str, Any]) -> list[str]:
    """Return the options and sections that a file sets for another method than that of the command line.

    Args:
        typed: The options of the command line by dotted name. `method` names the method; `from_adapter` brings it.
        in_files: The options of the files.
    """
    if "method" not in typed and "from_adapter" not in typed:
        return []
    method = str(typed.get("method", ""))
    unused = unused_sections(method)
    if "method" not in typed:  # the adapter sets the method
        return [*unused, "method", "method_settings"]
    names = method.split("+")
    if "lora" not in names:
        unused.append("optimizer.lr_ratio")
    # A rate for LoRA is ten times too high for full fine-tuning. Without a method, the file is one for LoRA.
    if set(names) != set(str(in_files.get("method", "lora")).split("+")):
        unused.append("optimizer.learning_rate")
    return unused
