"""The method of a run on the command line, beside a file with the settings of another method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.training.config import DEFAULT_RATES


def options_of_other_methods(typed: Mapping[str, Any]) -> list[str]:
    """Return the options and sections that have no effect with the method of the command line.

    Args:
        typed: The options of the command line by dotted name. `method` names the method; `from_adapter` brings it.
    """
    if "method" not in typed and "from_adapter" not in typed:
        return []
    names = str(typed.get("method", "")).split("+")
    unused = [method for method in DEFAULT_RATES if method not in names]
    if "method" not in typed:  # the adapter sets the method
        unused += ["method", "method_settings"]
        return unused
    if all(name in DEFAULT_RATES for name in names):
        unused.append("method_settings")
    if "lora" not in names:
        unused.append("optimizer.lr_ratio")
    return unused
