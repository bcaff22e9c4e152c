"""The limits on the page are those of the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def test_limits_are_those_of_the_code() -> None:
    rows = re.findall(
        r"^\|[^|]*\|[^|]*\|([^|]*)\|([^|]*`lorakit\.[^|]*)\|$", PAGE.read_text(), re.M
    )
    assert len(rows) > 15
    for values, constants in rows:
        names = [name.rpartition(".") for name in re.findall(r"`([\w.]+)`", constants)]
        found = [getattr(importlib.import_module(module), name) for module, _, name in names]
        assert values.strip() == ", ".join(f"{value:,}" for value in found)
