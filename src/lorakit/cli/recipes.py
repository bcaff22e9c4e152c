"""`lorakit recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.cli.parsing import parse
from lorakit.file_names import ADAPTER, BEST
from lorakit.formatting import shell_command

SCORED = ("data.task", "data.max_length", "data.too_long")
"""Settings of a recipe that also apply when its adapter is scored."""


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """Select recipes."""

    words: tuple[str, ...] = ()
    """Show the recipes whose names contain all of these words: `mrpc`, or `roberta-large lora @code`."""
    json: bool = False
    """Print JSON: settings, decoding, source and notes of each recipe."""


CONFIGS = (RecipesConfig,)


def run(argv: Sequence[str]) -> None:
    """List the matching recipes, or show a single match in full."""
    from lorakit.cli.console import console, print_json, table
    from lorakit.errors import ConfigurationError
    from lorakit.paper.recipes import matching, recipe

    config = parse(
        RecipesConfig,
        "recipes",
        "List the hyper-parameters of the paper, of its code, and of the prior work that it quotes. "
        "A single match is shown in full.",
        argv,
        "words",
    )
    words = " ".join(config.words)
    matches = matching(words)
    if not matches:
        raise ConfigurationError(
            f"No recipe's name contains '{words}'. A name is model/task/method@origin, for example "
            "roberta-base/mrpc/lora@paper; 'lorakit recipes' lists them."
        )
    if any(words in (r.name, r.name.partition("@")[0]) for r in matches):
        matches = [recipe(words)]
    if config.json:
        print_json([asdict(r) for r in matches])
        return
    if len(matches) == 1:
        _show(matches[0])
        return
    rows = [
        (
            r.name,
            str(r.settings["batch_size"] * r.settings.get("accumulation", 1)),
            str(r.settings["epochs"]),
            f"{r.settings['optimizer.learning_rate']:g}",
            r.source,
        )
        for r in matches
    ]
    headings = ("recipe", "batch size", "epochs", "learning rate", "source")
    console().print(table(headings, rows, left=len(headings)))


def _show(recipe: Any) -> None:
    print(f"{recipe.name}   ({recipe.source})\n")
    for name, value in recipe.settings.items():
        print(f"  {name:<28} {_text(value)}")
    if recipe.decoding:
        data = {k: v for k, v in recipe.settings.items() if k in SCORED}
        settings = {**data, **{f"decoding.{k}": v for k, v in recipe.decoding.items()}}
        options = " ".join(f"--{k} {_text(v)}" for k, v in settings.items())
        # The paper scores the best epoch.
        folder = BEST if recipe.origin == "paper" else ADAPTER
        print(f"\nScore its adapter with: lorakit evaluate --adapter out/run/{folder} {options}")
    print()
    for note in recipe.notes:
        print(f"- {note}")
    base = "" if "base.name" in recipe.settings else " --base.name YOUR-DECODER"
    print(f"\nlorakit train --recipe {shell_command([recipe.name])}{base} --output out/run")


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
