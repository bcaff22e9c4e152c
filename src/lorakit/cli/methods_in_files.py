"""The method of a run on the command line, beside a file with the settings of another method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.methods.registry import SECTIONS, unused_settings


def options_of_other_methods(typed: Mapping[str, Any], in_file: Mapping[str, Any]) -> list[str]:
    """Return the options and sections that a file sets for another method than that of the command line.

    Args:
        typed: The options of the command line by dotted name. `method` names the method; `from_adapter` brings it.
        in_file: The options of the file.
    """
    if "method" not in typed:
        return unused_settings(typed) if "from_adapter" in typed else []
    unused = unused_settings({"method": typed["method"]})
    names = set(str(typed["method"]).split("+"))
    # A rate for LoRA is ten times too high for full fine-tuning.
    of_file = SECTIONS.keys() & {name.split(".")[0] for name in in_file}
    if "method" in in_file:
        of_file = set(str(in_file["method"]).split("+"))
    if of_file and not names <= of_file and "from_adapter" not in {**in_file, **typed}:
        unused.append("optimizer.learning_rate")
    if "lora" not in names:
        unused.append("optimizer.lr_ratio")
    return unused
