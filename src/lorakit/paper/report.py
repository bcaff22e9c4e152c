"""Write a comparison as Markdown and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.metrics import WITHOUT_JAVA
from lorakit.models.packaged import BY_NAME
from lorakit.paper.comparison import Comparison, OwnRow
from lorakit.paper.grid import Grid, held_out_scores
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.record import Record
from lorakit.paper.resampling import RESAMPLES
from lorakit.paper.runs import FALLBACK_EPOCHS, HELD_OUT_SHARE, WARMUP
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


def own_notes(comparison: Comparison) -> Iterator[str]:
    """Yield notes on how the measured numbers were obtained."""
    grid = comparison.grid
    config, study, records = grid.config, grid.study, grid.all_records()
    yield _protocol(grid)
    yield _training(grid)
    if (model := BY_NAME.get(config.base.name.lower())) is not None:
        yield f"`{config.base.name}` is {model.description}. {model.note}".rstrip()
    if study.average in comparison.columns:
        yield (
            f"{study.average} is the mean of the columns. Its ± follows from theirs, taken as independent. Its "
            "difference is that of the means."
        )
    yield from _method_settings(grid)
    for row in comparison.own:
        if row.left_out:
            yield f"{row.variant.label} is left out: {row.left_out}"
    yield from _selected_seed(comparison)
    for data_set, variant in grid.cells():
        if seeds := grid.diverged_seeds(data_set, variant):
            yield (
                f"{variant.label} on {data_set.key}: training diverged with {len(seeds)} of {config.seeds} seeds "
                f"({', '.join(map(str, seeds))}); its numbers exclude them."
            )
    yield from _commonest(grid)
    yield from study.notes
    yield from (d.note for d in study.data_sets if d.note)
    yield from _sources(records)
    if config.eval_limit:
        yield (
            f"Only {config.eval_limit:,} examples or prompts are scored, evenly spaced over the file."
        )
    if beams := config.decoding.beams:
        yield f"Text is generated {'greedily' if beams == 1 else f'with {beams} beams'}."
    if any(name.endswith(WITHOUT_JAVA) for record in records for name in record.scores):
        yield "METEOR, ROUGE-L and CIDEr were computed without Java; see the guide to metrics."
    if config.limit:
        rows = {d.key: grid.setup.rows.get(d.key, config.limit) for d in study.data_sets}
        drawn = ", ".join(f"{count:,} of {key}" for key, count in rows.items())
        yield f"All runs train on the same rows, drawn at random once: {drawn}."


def _selected_seed(comparison: Comparison) -> Iterator[str]:
    """Yield a note on the bias of the choice, with the means of at least two other seeds than 0."""
    config = comparison.grid.config
    if config.trials == 1 or config.trial_epochs is not None:
        return
    means = [
        f"{row.variant.label} {statistics.fmean(others):.{comparison.digits[column]}f} on {column}"
        for column in comparison.columns
        if column != comparison.grid.study.average
        for row in comparison.own
        if column in row.cells
        if len(others := [v for seed, v in row.cells[column].seeds.items() if seed != 0]) > 1
    ]
    note = (
        "The scored runs also chose the learning rate, so their scores are on average a little too high: most of all "
        "that of seed 0, with which every rate was tried."
        if comparison.grid.seeds_choose
        else "The run with seed 0 also chose the learning rate, as the best of several runs, so its score is on "
        "average too high."
    )
    yield f"{note} Means of the other seeds: {', '.join(means)}." if means else note


def _method_settings(grid: Grid) -> Iterator[str]:
    """Yield the settings of each method in its scored runs, if the records have them."""
    for variant in grid.study.variants:
        sections = tuple(f"{name}." for name in variant.method_names)
        shown_section = sections[0] if len(sections) == 1 else ""
        records = [r for d in grid.study.data_sets for r in grid.records(d, variant)]
        values = {
            f"{name.removeprefix(shown_section)} {_setting(value)}": None
            for record in records
            # Older records have only what differs from the defaults.
            if "optimizer.clip" in record.settings
            for name, value in record.settings.items()
            if name.startswith(sections)
            and value is not False  # a dropout of 0 differs from the paper's
            and value not in (None, "none", [], {})
        }
        if values:
            yield f"Settings of {variant.label}: {', '.join(values)}."


def _setting(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sources(records: Sequence[Record]) -> Iterator[str]:
    """Yield a note if the runs were not all made with the same source files of lorakit."""
    sources = [record.source for record in records]
    if len(set(sources)) > 1:
        yield (
            f"Recorded states of lorakit's source files: {len(set(sources) - {''})}; {sources.count('')} of "
            f"{len(sources)} runs record none. Numbers can round differently in another state."
        )


def _commonest(grid: Grid) -> Iterator[str]:
    """Yield what a model scores that has learnt nothing but the commonest class."""
    scores = [
        f"{data_set.commonest} on {data_set.columns[0].name}"
        for data_set in grid.study.data_sets
        if data_set.commonest is not None and not grid.config.eval_limit
    ]
    if scores:
        yield f"A model that always answers with the commonest class scores {', '.join(scores)}."


def _protocol(grid: Grid) -> str:
    config = grid.config
    held_out = dict.fromkeys(
        f"{100 * grid.setup.held_out.get(d.key, HELD_OUT_SHARE):.3g} % of the training data, which are held out"
        if d.holds_out
        else "the validation set"
        for d in grid.study.data_sets
    )
    heads = dict.fromkeys(
        count.head for by_variant in grid.setup.counts.values() for count in by_variant.values()
    )
    head = " or ".join(f"{count:,}" for count in heads if count)
    length = (
        ", ".join(f"{count:,} steps on {key}" for key, count in grid.setup.steps.items())
        if grid.setup.steps
        else _epochs(config.epochs or FALLBACK_EPOCHS)
    )
    scored = " and ".join(dict.fromkeys(d.split for d in grid.study.data_sets))
    rates = f"{config.trials} learning rate{'s' if config.trials > 1 else ''}"
    if config.trial_epochs is not None:
        rates += f" in shorter runs of {_epochs(config.trial_epochs)}"
    if config.widen:
        rates += ", and more while the best one is outermost"
    batches = f"batches of {config.batch_size}"
    if config.sampling == "grouped":
        batches += " in which examples with the same prompt are together"
    return (
        f"Every run takes {length}, in {batches}. Every method tries {rates}. Learning rate and "
        f"step are chosen on {' or '.join(held_out)}, never on the {scored} data that the table scores."
        + (
            f" Parameter counts exclude the new task head, which every method trains too: {head} parameters."
            if head
            else ""
        )
    )


def _training(grid: Grid) -> str:
    """Return the settings of all runs, where the paper has others in other tables."""
    keys: dict[int, list[str]] = {}
    for data_set in grid.study.data_sets:
        keys.setdefault(data_set.max_length, []).append(data_set.key)
    lengths = " and ".join(f"{length} tokens on {', '.join(of)}" for length, of in keys.items())
    return (
        "AdamW trains without weight decay or label smoothing. The learning rate falls linearly after a warm-up over "
        f"{100 * WARMUP:g} % of the steps. Longer examples are truncated to {lengths}. The paper's own settings differ "
        "from table to table; 'lorakit recipes' lists them."
    )


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'' if count == 1 else 's'}"
