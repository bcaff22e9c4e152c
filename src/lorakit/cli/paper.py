"""`lorakit paper`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.evaluation.config import BaseConfig
    from lorakit.paper.config import PaperConfig
    from lorakit.paper.grid import Grid
    from lorakit.paper.runs import Run

LISTS = ("--tasks", "--methods")
QUERY = re.compile(r"(query|query_proj|q_proj|q_lin|\bq)\W*$")
"""Names of query projections, whole or as a slice of a fused one."""


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
    if config.table == "table1":
        _latency(config)
    elif config.dry_run:
        _preview(config)
    else:
        _run(config)


def _latency(config: PaperConfig) -> None:
    from lorakit.cli.console import console
    from lorakit.paper.latency import PASSES, SETTINGS, run_latency

    if config.dry_run:
        for batch, length, share in SETTINGS:
            print(
                f"batch {batch}, length {length}, adapters of {share:.2%}: up to {PASSES} passes of each method"
            )
        return
    result = run_latency(config, say=_say)
    console().print(_table(result.head, result.rows, 3))
    for path in (result.page, result.data):
        print(path)


def _run(config: PaperConfig) -> None:
    from lorakit.cli.console import console
    from lorakit.paper.report import rows
    from lorakit.paper.run_table import run_table

    result = run_table(config, say=_say, amplification=_amplification)
    head, body, published = rows(result.comparison)
    study = result.comparison.grid.study
    console().print(f"\n{study.table.title}\n", markup=False)
    console().print(_table(head, body, published))
    for path in (result.page, result.data, result.figure, result.report):
        if path is not None:
            print(path)


def _amplification(adapter: Path, base: BaseConfig) -> dict[str, float]:
    """Return a row of table 7: of W_q in the block in the middle."""
    from lorakit.analysis import adapter_amplification
    from lorakit.analysis.base_weights import open_weights
    from lorakit.analysis.deltas import deltas_of, read
    from lorakit.errors import ConfigurationError

    stored = read(adapter)
    queries = [name for name in deltas_of(stored) if QUERY.search(name)]
    if not queries:
        raise ConfigurationError(
            f"Table 7 is about the query projections, and of {base.name} none was found under the usual names."
        )
    middle = queries[(len(queries) - 1) // 2]
    found = adapter_amplification(stored, open_weights(base, stored), only=f"^{re.escape(middle)}$")
    layer = next(iter(found.layers.values()))
    return {
        "from ΔW": layer.projected,
        "from W": layer.projected_own,
        "random": layer.expected_random,
        "norm of ΔW": layer.change_norm,
        "amplification": layer.factor,
    }


def _preview(config: PaperConfig) -> None:
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


def _predicted(grid: Grid, run: Run) -> list[str]:
    """Steps, memory and time of a run, as the planner reckons them."""
    from lorakit.errors import LorakitError
    from lorakit.formatting import duration, gigabytes
    from lorakit.planning import plan

    settings = grid.runner.train_config(run)
    waits = grid.config.budget is not None and settings.max_steps is None
    try:
        found = plan(settings, compare=False)
    except LorakitError as error:
        return ["not predicted", str(error)]
    drawn = [size for size in (grid.config.limit, run.data_set.limit) if size is not None]
    steps = settings.max_steps or found.steps
    if drawn and settings.max_steps is None:
        steps = round(settings.epochs * -(-min(drawn) // settings.batch_size))
    if waits or steps is None:
        return [
            "from the budget" if waits else f"{settings.epochs:g} epochs",
            gigabytes(found.chosen.memory.total),
            f"{found.chosen.seconds:.2f}s a step",
        ]
    time = duration(steps * found.chosen.seconds)
    return [f"{steps:,}", gigabytes(found.chosen.memory.total), time]


def _table(head: Sequence[str], body: Sequence[Sequence[str]], published: int):
    """The rows, those of ours apart from the published ones."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right")
    for i, row in enumerate(body):
        if i == published and i:
            table.add_section()
            table.add_row()
        table.add_row(*map(escape, row), style="bold" if i >= published else None)
    return table


def _say(text: str) -> None:
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
