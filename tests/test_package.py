"""The names that `import lorakit` gives, at run time and to a type checker."""

from __future__ import annotations

import ast
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import pytest

import lorakit


@pytest.mark.parametrize("name", ["errors", "methods", "metrics", "tasks"])
def test_import_lorakit_gives_its_documented_modules(name: str) -> None:
    module = lorakit.__getattr__(name)  # an import elsewhere may have set the attribute
    assert isinstance(module, ModuleType)
    assert module.__name__ == f"lorakit.{name}"
    assert name in dir(lorakit)


def test_type_checkers_report_a_misspelt_name() -> None:
    """They see no ``__getattr__`` of a package, which would give every name."""
    packages = list(Path(lorakit.__file__).parent.rglob("__init__.py"))
    assert packages
    for path in packages:
        defined = [getattr(node, "name", "") for node in ast.parse(path.read_text("utf-8")).body]
        assert "__getattr__" not in defined, path


@pytest.mark.parametrize("config", [lorakit.TrainConfig, lorakit.EvaluateConfig])
def test_every_section_of_a_configuration_is_a_name_of_lorakit(config: type) -> None:
    sections = {
        kind.__name__
        for annotation in get_type_hints(config).values()
        for kind in (annotation, *get_args(annotation))
        if is_dataclass(kind)
    }
    assert "BaseConfig" in sections
    assert sections <= {*lorakit.__all__}
