"""The page about security names constants that exist."""

from __future__ import annotations

import importlib
import re

import pytest
from pages import ROOT

PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", re.findall(r"`(lorakit\.[a-z_.]+\.[A-Z_]+)`", PAGE))
def test_a_limit_is_in_the_code(name: str) -> None:
    module, _, constant = name.rpartition(".")
    assert getattr(importlib.import_module(module), constant) > 0
