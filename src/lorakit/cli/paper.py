"""`lorakit paper`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.paper.grid import Grid

LISTS = ("--tasks", "--methods")


def run(argv: Sequence[str]) -> None:
    """Run a table of the paper, or show what it would run."""
    from lorakit.cli.parsing import parse
    from lorakit.paper.config import PaperConfig

    config = parse(
        PaperConfig,
        "paper",
        "Run a table of the paper on your model: every method with the same data, trainer and scorer, and print the "
        "published rows and yours. The same command goes on where an interrupted one was; finished runs are kept.",
        _plain(argv),
        "table",
    )
    if config.dry_run:
        _preview(config)
    else:
        _run(config)


def _run(config) -> None:
    from lorakit.cli.console import console
    from lorakit.paper.report import rows
    from lorakit.paper.run_table import run_table

    result = run_table(config, say=_say)
    head, body, published = rows(result.comparison)
    study = result.comparison.grid.study
    console().print(f"\n{study.table.title}\n", markup=False)
    console().print(_table(head, body, published))
    for path in (result.page, result.data, result.figure, result.report):
        if path is not None:
            print(path)


def _preview(config) -> None:
    from lorakit.cli.console import console
    from lorakit.paper.grid import preview
    from lorakit.paper.report import parameters

    grid = preview(config, _say)
    head = ["data", "method", "parameters", "rates", "runs", "steps", "memory", "time a run"]
    body = []
    for data_set in grid.study.data_sets:
        for variant in grid.study.variants:
            count = grid.plan.counts[data_set.key][variant.key]
            if count.left_out:
                body.append([data_set.key, variant.label, "left out", count.left_out])
                continue
            trials = grid.trials(data_set, variant)
            rates = ", ".join(f"{run.rate:g}" for run in trials)
            runs = str(len(trials) + config.seeds - 1)
            body.append(
                [
                    data_set.key,
                    variant.label,
                    parameters(count.trained),
                    rates,
                    runs,
                    *_predicted(grid, trials[0]),
                ]
            )
    console().print(
        _table(head, [[*row, *[""] * (len(head) - len(row))] for row in body], len(body))
    )
    print(f"\n{grid.finished} of {grid.total} runs are done, in {config.folder}")


def _predicted(grid: Grid, run) -> list[str]:
    """Steps, memory and time of a run, as far as they can be told."""
    from lorakit.training.config import TrainConfig

    settings: TrainConfig = grid.runner.train_config(run)
    steps = f"{settings.max_steps:,}" if settings.max_steps else f"{settings.epochs:g} epochs"
    return [steps if not grid.config.budget or settings.max_steps else "from the budget", "", ""]


def _table(head: Sequence[str], body: Sequence[Sequence[str]], published: int):
    """The rows, those of ours apart from the published ones."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right")
    for i, row in enumerate(body):
        if i == published and i:
            table.add_section()
            table.add_row()
        table.add_row(*row, style="bold" if i >= published else None)
    return table


def _say(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)


def _plain(argv: Sequence[str]) -> list[str]:
    """Bring what people type to what the parser reads: --tasks a,b, --dry-run, and --budget 10."""
    words = []
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("-", "_").replace("__", "--", 1)
        if name in LISTS and equals:
            word = f"{name}={_list(value)}"
        elif i and argv[i - 1] in LISTS:
            word = _list(word)
        elif name == "--dry_run" and not equals:
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            word = "--dry_run=true" if following.startswith("--") else name
        elif name.startswith("--"):
            word = f"{name}{equals}{value}"
        words.append(word)
    return words


def _list(text: str) -> str:
    return text if text.startswith("[") else f"[{text}]"
