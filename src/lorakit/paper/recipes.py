"""The hyper-parameters behind the paper's tables, by name, as settings of a run.

A name is ``model/task/method@origin``. The origin is ``paper`` (the paper's own tables), ``code`` (the official
repository), ``prior`` (the earlier work that the paper quotes a row from) or ``derived`` (from a published one, for a
model of the same size). Where paper and code differ, both have a recipe. A name without an origin means the first of
these that exists.
"""

from __future__ import annotations

import functools

from lorakit.errors import ConfigurationError, nearest
from lorakit.paper.families.glue import GLUE
from lorakit.paper.families.gpt2 import GPT2
from lorakit.paper.families.gpt3 import GPT3
from lorakit.paper.recipe import ORIGINS, Recipe


@functools.cache
def recipes() -> dict[str, Recipe]:
    """Return every recipe by its full name, including the origin."""
    every = [recipe for family in (*GLUE, *GPT2, *GPT3) for recipe in family.recipes()]
    by_name = {recipe.name: recipe for recipe in every}
    assert len(by_name) == len(every), "two recipes have one name"
    return by_name


def recipe(name: str) -> Recipe:
    """Return a recipe by its name; without ``@origin`` the first of `ORIGINS` that exists.

    Raises:
        ConfigurationError: No recipe has this name; the message suggests the nearest.
    """
    by_name = recipes()
    candidates = [name] if "@" in name else [f"{name}@{origin}" for origin in ORIGINS]
    for candidate in candidates:
        if candidate in by_name:
            return by_name[candidate]
    without_origin = dict.fromkeys(full.partition("@")[0] for full in by_name)
    raise ConfigurationError(
        f"There is no recipe '{name}'.{nearest(name, [*without_origin, *by_name])} "
        "A name is model/task/method, for example roberta-base/mrpc/lora; 'lorakit recipes' lists them."
    )


def matching(words: str = "") -> list[Recipe]:
    """Return the recipes whose names contain all the words, in the order of the paper."""
    return [r for r in recipes().values() if all(word in r.name for word in words.lower().split())]
