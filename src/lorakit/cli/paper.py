"""`lorakit paper`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.cli.parsing import parse
from lorakit.formatting import visible
from lorakit.paper.paper_config import PaperConfig

if TYPE_CHECKING:
    from lorakit.paper.grid import Grid
    from lorakit.paper.study import StudyData, Variant

CONFIGS = (PaperConfig,)


def run(argv: Sequence[str]) -> None:
    """Run a table of the paper, or list its runs."""
    config = parse(
        PaperConfig,
        "paper",
        "Run a table of the paper on your model: every method with the same data, training loop and metrics. Print the "
        "published rows and yours. After an interruption, the same command resumes and keeps finished runs.",
        argv,
        "table",
    )
    if config.reproduce:
        _reproduce(config)
    elif config.table == "table1":
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
                f"batch {batch}, length {length}, adapters with {share:.2%} of the parameters: up to {PASSES} passes "
                "per method"
            )
        return
    result = run_latency(config, say=_say)
    console().print(_table(result.head, result.published, result.measured))
    for path in (result.page, result.data):
        print(path)


def _run(config: PaperConfig) -> None:
    from lorakit.analysis import table7_row
    from lorakit.cli.console import console
    from lorakit.paper.report import rows
    from lorakit.paper.run_table import run_table

    result = run_table(config, say=_say, amplification=table7_row)
    study = result.comparison.grid.study
    console().print(f"\n{study.table.title}\n", markup=False)
    console().print(_table(*rows(result.comparison)))
    for path in (result.page, result.data, result.figure, result.report):
        if path is not None:
            print(path)


def _reproduce(config: PaperConfig) -> None:
    from lorakit.analysis import table7_row
    from lorakit.cli.console import console
    from lorakit.paper.reproduction import reproduce

    result = reproduce(config, _say, amplification=table7_row)
    head = ["run", "score", "recorded", "repeated", "difference", "verdict"]
    body = [
        [
            *(s.run, s.score, f"{s.recorded:.6g}", f"{s.repeated:.6g}"),
            *(f"{s.repeated - s.recorded:+.2g}", s.verdict),
        ]
        for s in result.scores
    ]
    console().print(_table(head, body))
    if not result.differences:
        print("\nEqual processor, threads, software and inputs: all scores must be equal.")
    for difference in result.differences:
        print(visible(difference))
    if not result.holds:
        sys.exit(1)


def _preview(config: PaperConfig) -> None:
    from lorakit.cli.console import console
    from lorakit.paper.grid import preview
    from lorakit.paper.report import parameters

    grid = preview(config)
    head = ["data", "method", "parameters", "rates", "runs", "steps", "memory", "time per run"]
    body = []
    for data_set in grid.study.data_sets:
        for variant in grid.study.variants:
            row = [data_set.key, variant.label]
            count = grid.setup.counts[data_set.key][variant.key]
            if count.left_out:
                row += ["left out", count.left_out]
            else:
                trials = grid.trials(data_set, variant)
                rates = ", ".join(f"{run.rate:g}" for run in trials)
                runs = str(grid.number_of_runs(data_set, variant))
                row += [
                    parameters(count.trained),
                    rates,
                    runs,
                    *_predicted(grid, data_set, variant),
                ]
            body.append(row + [""] * (len(head) - len(row)))
    console().print(_table(head, body))
    print(f"\n{grid.finished} of {grid.total} runs are finished, in {config.folder}")


def _predicted(grid: Grid, data_set: StudyData, variant: Variant) -> list[str]:
    """Return the planner's steps, memory and time for a scored run."""
    from lorakit.errors import LorakitError
    from lorakit.formatting import duration, size
    from lorakit.paper.runs import TableRun
    from lorakit.planning import plan

    run = TableRun(data_set=data_set, variant=variant, rate=variant.rates(1)[0], seed=0)
    settings = grid.runner.train_config(run)
    try:
        planned = plan(settings, compare=False)
    except LorakitError as error:
        return ["not predicted", str(error)]
    memory, seconds = size(planned.peak(planned.chosen)), planned.chosen.seconds
    steps = settings.max_steps or planned.steps
    if settings.max_steps is None:
        if grid.config.budget is not None:
            return ["from the budget", memory, f"{seconds:.2f}s per step"]
        rows = grid.setup.rows.get(data_set.key)
        if rows is not None:
            steps = round(settings.epochs * -(-rows // settings.batch_size))
    if steps is None:
        return [f"{settings.epochs:g} epochs", memory, f"{seconds:.2f}s per step"]
    return [f"{steps:,}", memory, duration(steps * seconds)]


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], measured: Sequence[Sequence[str]] = ()
):
    """Return a console table: the rows, then the measured ones in bold."""
    from lorakit.cli.console import literal, table

    result = table(head, rows, left=2)
    if rows:
        result.add_row()
    for row in measured:
        result.add_row(*map(literal, row), style="bold")
    return result


def _say(text: str) -> None:
    print(visible(text, keep="\n"), file=sys.stderr, flush=True)
