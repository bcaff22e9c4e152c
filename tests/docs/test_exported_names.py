"""The reference has every class and function that a public package exports."""

from __future__ import annotations

import inspect
import re
from importlib import import_module

import pages
import pytest

PACKAGES = (
    *("lorakit", "lorakit.adapters", "lorakit.analysis", "lorakit.methods", "lorakit.metrics"),
    *("lorakit.planning", "lorakit.reporting", "lorakit.tasks"),
)


def entries() -> list[str]:
    texts = [path.read_text("utf-8") for path in (pages.ROOT / "docs/reference").glob("*.md")]
    return [entry for text in texts for entry in re.findall(r"^::: (.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("package", PACKAGES)
def test_it_has_every_exported_name(package: str) -> None:
    module = import_module(package)
    exported = {
        name
        for name in module.__all__
        if inspect.isclass(value := getattr(module, name)) or inspect.isfunction(value)
    }
    page_of_errors = {"LorakitError"}
    assert exported - {entry.rpartition(".")[2] for entry in entries()} <= page_of_errors


def test_the_paper_s_entries_are_functions_and_classes() -> None:
    """A module of the same name cannot be called."""
    assert "lorakit.paper.run_table.run_table" in entries()
    index = pages.read("docs/reference/index.md")
    for path in re.findall(r"`(lorakit\.paper[\w.]*)`", index):
        module, _, name = path.rpartition(".")
        assert callable(getattr(import_module(module), name))
