"""The method of a run on the command line, beside a file with the settings of another method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.methods.registry import unused_sections


def options_of_other_methods(typed: Mapping[str, Any]) -> list[str]:
    """Return the options and sections that have no effect with the method of the command line.

    Args:
        typed: The options of the command line by dotted name. `method` names the method; `from_adapter` brings it.
    """
    if "method" not in typed and "from_adapter" not in typed:
        return []
    method = str(typed.get("method", ""))
    unused = unused_sections(method)
    if "method" not in typed:  # the adapter sets the method
        return [*unused, "method", "method_settings"]
    return unused if "lora" in method.split("+") else [*unused, "optimizer.lr_ratio"]
