"""The reference hides methods of the library's own use."""

from __future__ import annotations

import re
from pathlib import Path

import lorakit

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "adapters.md"


def test_what_the_reference_hides_exists() -> None:
    (filters,) = re.findall(r"filters: \[(.*)\]", PAGE.read_text("utf-8"))
    hidden = re.findall(r'"!\^(\w+)\$"', filters)
    assert {"add", "changing"} <= set(hidden)
    assert not [name for name in hidden if not hasattr(lorakit.Adapters, name)]
