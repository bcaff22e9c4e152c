"""Write a comparison as Markdown and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.paper.comparison import Comparison, OwnRow
from lorakit.paper.grid import Grid, held_out_scores
from lorakit.paper.notes import own_notes
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.resampling import RESAMPLES
from lorakit.version import __version__

_EMPTY = "-"


def write(config: PaperConfig, page: str, record: dict[str, Any]) -> tuple[Path, Path]:
    """Write the Markdown page and the JSON file of a table; return their paths."""
    contents = {".md": page, ".json": json.dumps(record, indent=1, ensure_ascii=False) + "\n"}
    paths = []
    for suffix, text in contents.items():
        paths.append(config.folder / f"{config.table}{suffix}")
        with storage.atomic_file(paths[-1]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths[0], paths[1]


def markdown(comparison: Comparison) -> str:
    """Return the Markdown page: the rows, LoRA's differences, the learning rates and the notes."""
    parts = [
        f"# {title(comparison)}",
        _introduction(comparison),
        table(*rows(comparison)),
        *_differences(comparison),
        *_trials(comparison),
        *_computing_time(comparison.grid),
        *_notes(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return the content of the page and the records of all runs, as JSON values."""
    grid = comparison.grid
    return {
        "table": grid.study.table.name,
        "title": grid.study.table.title,
        "model": grid.config.base.name,
        "command": grid.config.command,
        "lorakit": __version__,
        "statistic": _statistic(grid),
        "columns": list(comparison.columns),
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
            for row in comparison.published
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
            for row in comparison.own
        ],
        "lora_against": [asdict(difference) for difference in comparison.differences],
        "runs": [asdict(record) for record in grid.all_records()],
        "steps": grid.setup.steps,
        "timing": grid.setup.timing,
    }


def rows(comparison: Comparison) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Return the table as text: the header, the published rows and the measured rows."""
    head = ["model", "method", "parameters", *comparison.columns]
    published = [
        [
            row.model,
            f"{row.label} {row.setting}".strip(),
            row.parameters or _EMPTY,
            *(str(row.cells[name]) for name in comparison.columns),
        ]
        for row in comparison.published
    ]
    measured = [
        [
            comparison.grid.config.base.name,
            row.variant.label,
            parameters(row.trained),
            *(_cell(row, name, comparison.digits[name]) for name in comparison.columns),
        ]
        for row in comparison.own
    ]
    return head, published, measured


def parameters(count: int | None) -> str:
    """Format a number of parameters in millions, as the paper does: 0.30M."""
    if count is None:
        return _EMPTY
    return f"{count / 1e6:,.2f}M" if count >= 1e4 else f"{count / 1e6:.4f}M"


def _cell(row: OwnRow, column: str, digits: int) -> str:
    cell = row.cells.get(column)
    if cell is None:
        return _EMPTY
    if cell.spread is None:
        return f"{cell.value:.{digits}f}"
    mean = f"{cell.mean:.{digits}f} ± {cell.spread:.{digits}f}"
    return mean if cell.mean == cell.value else f"{cell.value:.{digits}f} ({mean})"


def title(comparison: Comparison) -> str:
    """Return the title: the table and the base model."""
    number = comparison.grid.study.table.name.removeprefix("table")
    return f"Table {number} on {comparison.grid.config.base.name}"


def _introduction(comparison: Comparison) -> str:
    grid = comparison.grid
    finished = grid.finished
    progress = f"{finished} of {grid.total} runs are finished. " if finished < grid.total else ""
    return (
        f"{grid.study.table.title}. {progress}The published rows come first. The rows in bold are measured on "
        f"`{grid.config.base.name}`: {_statistic(grid)}.\n\n```console\n$ {grid.config.command}\n```"
    )


def _statistic(grid: Grid) -> str:
    seeds = grid.config.seeds
    if seeds == 1:
        return "score of one seed"
    if grid.study.table.statistic == "median":
        return f"median of {seeds} seeds, in brackets their mean ± their standard deviation (n - 1)"
    return f"mean of {seeds} seeds ± their standard deviation (n - 1)"


def table(
    head: Sequence[str], body: Sequence[Sequence[str]], measured: Sequence[Sequence[str]] = ()
) -> str:
    """Return a Markdown table, right-aligned from the third column, with the measured rows in bold at the end."""
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    bold = [[cell if cell == _EMPTY else f"**{cell}**" for cell in row] for row in measured]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body, *bold))


def _differences(comparison: Comparison) -> list[str]:
    """Return the section on LoRA minus each other method, measured and published."""
    if not comparison.differences:
        return []
    by_other: dict[str, dict[str, str]] = {}
    for difference in comparison.differences:
        digits = comparison.digits[difference.column]
        text = f"{difference.value:+.{digits}f}"
        if difference.interval is not None:
            low, high = difference.interval
            text += f" [{low:+.{digits}f}, {high:+.{digits}f}], {difference.verdict}"
        if difference.over_examples is not None:
            low, high = difference.over_examples
            text += f" {{{low:+.{digits}f}, {high:+.{digits}f}}}"
        if difference.published is not None:
            text += f" (paper {difference.published[1]:+.{digits}f})"
        by_other.setdefault(difference.other, {})[difference.column] = text
    body = [
        [comparison.labels[other], *(cells.get(name, _EMPTY) for name in comparison.columns)]
        for other, cells in by_other.items()
    ]
    return [
        "## LoRA against the other methods",
        "The mean difference of the runs with the same seed; a positive one means that LoRA is better. "
        f"{_intervals(comparison)}In round brackets is the difference of the two published scores, on the paper's "
        "first model with both methods (their notes are below); of several sizes of a method, it is the one that is "
        f"also run here. {comparison.chance_note}".rstrip(),
        table(["LoRA minus", *comparison.columns], body),
    ]


def _intervals(comparison: Comparison) -> str:
    """Return what the intervals of the differences mean."""
    text = "There is no verdict: it needs runs with at least two common seeds, whose differences are not all equal. "
    if any(difference.interval is not None for difference in comparison.differences):
        text = (
            "In square brackets is its 95 % confidence interval: Student's t over the seeds, whose differences are "
            "assumed to be normally distributed. It covers the initialisation, the order of the data and dropout. It "
            "does not cover the choice of the scored examples or of the learning rate: on other examples, differences "
            "scatter more. LoRA is *ahead* or *behind* if the interval excludes zero. Otherwise the difference is "
            "*undecided*: these runs are compatible with every value in the interval. There is no verdict with one "
            "seed, for an average, or if all differences are equal and not zero. "
        )
    if any(difference.over_examples is not None for difference in comparison.differences):
        text += (
            "In braces is the 95 % interval of the difference over the choice of the scored examples, with the same "
            f"runs: {RESAMPLES:,} draws of as many examples, with replacement (paired bootstrap, Koehn 2004). "
        )
    return text


_SEEDS_CHOOSE = (
    "A rate with several seeds has their mean. Each rate is tried with one seed. Then the best rate so far gets its "
    "next seed, until the best one has all seeds. "
)


def _trials(comparison: Comparison) -> list[str]:
    """Return the section on the learning rates: all that were tried, with their held-out scores."""
    grid = comparison.grid
    lines = []
    for data_set, variant in grid.cells():
        trials = []
        chosen = grid.chosen_rate(data_set, variant)
        runs = grid.trials(data_set, variant)
        for run in runs:
            judged = grid.judged(run)
            if not judged:
                continue
            scores = held_out_scores(judged, data_set)
            outcome = [f"{statistics.fmean(scores):.4f}"] if scores else []
            if len(scores) > 1:
                outcome.append(f"({len(scores)} seeds)")
            if diverged := len(judged) - len(scores):
                outcome.append("diverged" if not scores else f"({diverged} diverged)")
            text = f"{run.rate:g}: {' '.join(outcome)}"
            trials.append(f"**{text}**" if run.rate == chosen else text)
        if len(runs) > 1 and chosen in (runs[0].rate, runs[-1].rate):
            trials.append("*outermost*")
        if trials:
            records = grid.records(data_set, variant)
            steps = ", ".join(f"{r.best_step} of {r.steps}" for r in records)
            count = sum(len(grid.judged(run)) for run in runs)
            lines.append(
                [data_set.key, variant.label, str(count), "; ".join(trials), steps or _EMPTY]
            )
    if not lines:
        return []
    return [
        "## Learning rates",
        "The number of runs that chose the rate, and the best held-out score of each rate; the chosen rate is in bold. "
        f"{_SEEDS_CHOOSE if grid.seeds_choose else ''}"
        "The last column is the step of each seed's best held-out score: the table scores the adapter of that step. "
        "*outermost* marks a choice that is the smallest or largest rate tried: a rate beyond it may be better.",
        table(["data", "method", "runs", "rate: held-out score", "best step"], lines),
    ]


def _computing_time(grid: Grid) -> list[str]:
    """Return the section on the time of the processor, by data set and method, with all learning rates and seeds."""
    hours: dict[str, dict[str, float]] = {}
    records = grid.all_records()
    for record in records:
        by_method = hours.setdefault(record.data_set, {})
        spent = record.processor_seconds / 3600
        by_method[record.variant] = by_method.get(record.variant, 0.0) + spent
    if not hours:
        return []
    processors = dict.fromkeys(r.processor for r in records if r.processor)
    variants = [v for v in grid.study.variants if any(v.key in by for by in hours.values())]
    body = [
        [key, *(f"{by[v.key]:.2f}" if v.key in by else _EMPTY for v in variants)]
        for key, by in hours.items()
    ]
    total = sum(sum(by.values()) for by in hours.values())
    return [
        "## Computing time",
        f"Hours of the processor in training steps and in scoring, over all threads, learning rates and seeds: "
        f"{total:.2f} in all. Processors: {', '.join(processors)}.",
        table(["data", *(v.label for v in variants)], body),
    ]


def _notes(comparison: Comparison) -> list[str]:
    return [
        "## Notes",
        "On these runs:\n\n" + "\n".join(f"- {note}" for note in own_notes(comparison)),
        "On the published numbers:\n\n"
        + "\n".join(f"- {note}" for note in comparison.published_notes),
    ]
