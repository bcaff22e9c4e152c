"""`lorakit recipes`."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCORED = ("data.task", "data.max_length", "data.too_long")
"""Settings of a recipe that are those of scoring its adapter too."""


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """Which recipes to show."""

    words: str = ""
    """Show the recipes whose names hold all of these words: `mrpc`, or `roberta-large lora @code`."""
    json: bool = False
    """Print JSON: settings, decoding, source and notes of each."""


def run(argv: Sequence[str]) -> None:
    """List the recipes, or show the one that is left in full."""
    from rich.table import Table

    from lorakit.cli.console import console
    from lorakit.cli.parsing import parse
    from lorakit.errors import ConfigurationError
    from lorakit.paper.recipes import matching, recipe

    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if words:  # several words need no quotes
        argv = [" ".join(words), *argv[len(words) :]]
    config = parse(
        RecipesConfig,
        "recipes",
        "List the hyper-parameters of the paper, its code, and the work it quotes. "
        "One that a search leaves alone is shown in full.",
        argv,
        "words",
    )
    found = matching(config.words)
    if not found:
        raise ConfigurationError(
            f"No recipe's name holds '{config.words}'. A name is model/task/method@origin, for example "
            "roberta-base/mrpc/lora@paper."
        )
    exact = [r for r in found if config.words in (r.name, r.name.partition("@")[0])]
    if exact:
        found = [recipe(config.words)]
    if config.json:
        print(json.dumps([_record(r) for r in found], indent=2))
        return
    if len(found) == 1:
        _show(found[0])
        return
    table = Table(box=None, pad_edge=False)
    for name in ("recipe", "steps of", "epochs", "rate", "source"):
        table.add_column(name)
    for r in found:
        batch = r.settings["batch_size"] * r.settings.get("accumulation", 1)
        rate = r.settings["optimizer.learning_rate"]
        table.add_row(r.name, str(batch), str(r.settings["epochs"]), f"{rate:g}", r.source)
    console().print(table)


def _record(recipe: Any) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "source": recipe.source,
        "settings": recipe.settings,
        "decoding": recipe.decoding,
        "notes": recipe.notes,
    }


def _show(recipe: Any) -> None:
    print(f"{recipe.name}   ({recipe.source})\n")
    for name, value in recipe.settings.items():
        print(f"  {name:<28} {_text(value)}")
    if recipe.decoding:
        data = {k: v for k, v in recipe.settings.items() if k in SCORED}
        settings = {**data, **{f"decoding.{k}": v for k, v in recipe.decoding.items()}}
        options = " ".join(f"--{k} {_text(v)}" for k, v in settings.items())
        print(f"\nScore its adapter with: lorakit evaluate --adapter out/run/adapter {options}")
    print()
    for note in recipe.notes:
        print(f"- {note}")
    base = "" if "base.name" in recipe.settings else " --base.name YOUR-DECODER"
    print(f"\nlorakit train --recipe {shlex.quote(recipe.name)}{base} --output out/run")


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
