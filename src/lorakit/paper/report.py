"""A comparison as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lorakit.metrics import WITHOUT_JAVA
from lorakit.paper.comparison import Comparison, Measured, OwnRow
from lorakit.paper.grid import Grid
from lorakit.version import __version__

_EMPTY = "-"


def markdown(found: Comparison) -> str:
    """Return the page of a table: the rows, what they say of LoRA, and how the runs were made."""
    parts = [
        f"# {title(found)}",
        _introduction(found),
        _table(found),
        *_differences(found),
        *_trials(found),
        *_notes(found),
    ]
    return "\n\n".join(parts) + "\n"


def as_dict(found: Comparison) -> dict[str, Any]:
    """Return everything that the page says, and every run behind it, as values that JSON can hold."""
    grid = found.grid
    return {
        "table": grid.study.table.name,
        "title": grid.study.table.title,
        "model": grid.config.base.name,
        "command": grid.config.command,
        "lorakit": __version__,
        "statistic": _statistic(grid),
        "columns": list(found.columns),
        "published": [
            {
                "model": row.model,
                "method": row.label,
                "setting": row.setting,
                "parameters": row.parameters,
                "cells": {
                    name: {"value": cell.value, "spread": cell.spread}
                    for name, cell in row.cells.items()
                },
            }
            for row in found.published
        ],
        "own": [
            {
                "key": row.variant.key,
                "method": row.variant.method,
                "setting": row.variant.setting,
                "settings": dict(row.variant.settings),
                "parameters": row.trained,
                "left_out": row.left_out,
                "cells": {name: asdict(cell) for name, cell in row.cells.items()},
            }
            for row in found.own
        ],
        "lora_against": [asdict(difference) for difference in found.differences],
        "runs": [asdict(record) for record in _records(grid)],
        "steps": grid.setup.steps,
        "timing": grid.setup.timing,
    }


def rows(found: Comparison) -> tuple[list[str], list[list[str]], int]:
    """Return the table as text: the head, the rows, and how many of them are published ones."""
    head = ["model", "method", "parameters", *found.columns]
    published = [
        [
            row.model,
            f"{row.label} {row.setting}".strip(),
            row.parameters or _EMPTY,
            *(str(row.cells[name]) for name in found.columns),
        ]
        for row in found.published
    ]
    own = [
        [
            found.grid.config.base.name,
            row.variant.label,
            parameters(row.trained),
            *(_cell(row, name, found.digits[name]) for name in found.columns),
        ]
        for row in found.own
    ]
    return head, published + own, len(published)


def parameters(count: int | None) -> str:
    """Return a number of parameters as the paper prints them: 0.30M."""
    if count is None:
        return _EMPTY
    return f"{count / 1e6:,.2f}M" if count >= 1e4 else f"{count / 1e6:.4f}M"


def _cell(row: OwnRow, column: str, digits: int) -> str:
    measured = row.cells.get(column)
    return _EMPTY if measured is None else _number(measured, digits)


def _number(measured: Measured, digits: int) -> str:
    text = f"{measured.value:.{digits}f}"
    return text if measured.spread is None else f"{text} ± {measured.spread:.{digits}f}"


def title(found: Comparison) -> str:
    """Return what was compared, in a few words."""
    number = found.grid.study.table.name.removeprefix("table")
    return f"Table {number} on {found.grid.config.base.name}"


def _introduction(found: Comparison) -> str:
    grid = found.grid
    done = f"{grid.finished} of {grid.total} runs are done. " if grid.finished < grid.total else ""
    return (
        f"{grid.study.table.title}. {done}The published rows first, then, in bold, those of `{grid.config.base.name}`: "
        f"the {_statistic(grid)}.\n\n```console\n$ {grid.config.command}\n```"
    )


def _statistic(grid: Grid) -> str:
    seeds = grid.config.seeds
    if seeds == 1:
        return "score of one seed"
    name = "median" if grid.study.table.statistic == "median" else "mean"
    return f"{name} of {seeds} seeds, ± their standard deviation"


def _table(found: Comparison) -> str:
    head, body, published = rows(found)
    bold = [[f"**{cell}**" if cell != _EMPTY else cell for cell in row] for row in body[published:]]
    return table(head, body[:published] + bold)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its numbers on the right."""
    lines = [
        "| " + " | ".join(head) + " |",
        "| " + " | ".join(["---", "---", *["---:"] * (len(head) - 2)]) + " |",
        *("| " + " | ".join(row) + " |" for row in body),
    ]
    return "\n".join(lines)


def _differences(found: Comparison) -> list[str]:
    """LoRA minus each other method, ours and the paper's."""
    if not found.differences:
        return []
    by_other: dict[str, dict[str, str]] = {}
    labels = {row.variant.key: row.variant.label for row in found.own}
    for difference in found.differences:
        digits = found.digits[difference.column]
        text = f"{difference.value:+.{digits}f}"
        if difference.spread is not None:
            text += f" ± {difference.spread:.{digits}f}, {difference.verdict}"
        if difference.published is not None:
            text += f" (paper {difference.published[1]:+.{digits}f})"
        by_other.setdefault(difference.other, {})[difference.column] = text
    body = [
        [labels[other], "", *(cells.get(name, _EMPTY) for name in found.columns)]
        for other, cells in by_other.items()
    ]
    body = [[row[0], *row[2:]] for row in body]
    head = ["LoRA minus", *found.columns]
    return [
        "## LoRA against the others",
        "Positive where LoRA is better. It is *ahead* or *behind* where the difference exceeds the standard deviation "
        "of a difference of two runs, else *level*; one seed decides nothing. In brackets the same difference in the "
        "paper, on its first model that has both methods.",
        table(head, body),
    ]


def _trials(found: Comparison) -> list[str]:
    """Every learning rate that was tried, and what decided."""
    grid = found.grid
    lines = []
    for data_set, variant in grid.cells():
        tried = []
        chosen = grid.chosen_rate(data_set, variant)
        for run in grid.trials(data_set, variant):
            record = grid.runner.record(run)
            if record is None:
                continue
            score = record.held_out.get(data_set.metric)
            text = "diverged" if record.failure or score is None else f"{score:.4f}"
            text = f"{run.rate:g}: {text}"
            tried.append(f"**{text}**" if run.rate == chosen else text)
        if chosen in grid.outermost_rates(variant):
            tried.append("*outermost*")
        records = grid.records(data_set, variant)
        if tried:
            epochs = ", ".join(f"{r.best_step} of {r.steps}" for r in records)
            lines.append([data_set.key, variant.label, "; ".join(tried), epochs or _EMPTY])
    if not lines:
        return []
    return [
        "## Learning rates",
        "The best score on held-out data for each rate that was tried (the chosen one in bold), and the step of each "
        "seed's best held-out score, which is the adapter that was scored. A choice is *outermost* where it is the "
        "smallest or largest rate tried: one beyond it may do better.",
        table(["data", "method", "rate: held-out score", "best step"], lines),
    ]


def _notes(found: Comparison) -> list[str]:
    return [
        "## Notes",
        "These runs:\n\n" + "\n".join(f"- {note}" for note in own_notes(found)),
        "The published numbers:\n\n"
        + "\n".join(f"- {note}" for note in found.grid.study.table.notes),
    ]


def own_notes(found: Comparison) -> list[str]:
    """Return what a reader of the numbers has to know of the runs behind them, a sentence or more each."""
    grid = found.grid
    own = [
        _how_chosen(grid),
        *(f"{row.variant.label} is left out: {row.left_out}" for row in found.own if row.left_out),
        *_diverged(grid),
        *grid.study.notes,
    ]
    if grid.config.eval_limit:
        own.append(f"Scores are those of the first {grid.config.eval_limit:,} examples or prompts.")
    if grid.config.beams:
        own.append(
            f"Text is generated {'greedily' if grid.config.beams == 1 else f'with {grid.config.beams} beams'}."
        )
    if any(name.endswith(WITHOUT_JAVA) for r in _records(grid) for name in r.scores):
        own.append(
            "METEOR, ROUGE-L and CIDEr were computed without Java; see the guide to metrics."
        )
    if grid.config.limit:
        own.append(
            f"Runs see {grid.config.limit:,} training examples, drawn once; all see the same."
        )
    return own


def _diverged(grid: Grid) -> Iterator[str]:
    for data_set, variant in grid.cells():
        if seeds := grid.diverged_seeds(data_set, variant):
            yield (
                f"{variant.label} on {data_set.key}: training diverged with {len(seeds)} of {grid.config.seeds} seeds "
                f"({', '.join(map(str, seeds))}); its numbers are those of the others."
            )


def _how_chosen(grid: Grid) -> str:
    parts = dict.fromkeys(
        "a part of the training data that is held out" if d.holds_out else "the validation set"
        for d in grid.study.data_sets
    )
    length = (
        ", ".join(f"{count:,} steps on {key}" for key, count in grid.setup.steps.items())
        if grid.setup.steps
        else f"{grid.config.epochs or 3:g} pass{'' if grid.config.epochs == 1 else 'es'} over the data"
    )
    scored = " and ".join(dict.fromkeys(d.split for d in grid.study.data_sets))
    return (
        f"Every run has {length}, batches of {grid.config.batch_size}, {grid.config.trials} learning "
        f"rate{'s' if grid.config.trials > 1 else ''} tried. Rate and step are chosen on {' or '.join(parts)}, never "
        f"on the {scored} data that is scored. Parameters leave out a new task head, which is trained too."
    )


def _records(grid: Grid) -> list[Any]:
    runs = {
        run.name: run
        for cell in grid.cells()
        for run in (*grid.trials(*cell), *grid.scored_runs(*cell))
    }
    found = (grid.runner.record(run) for run in runs.values())
    return [record for record in found if record is not None]
