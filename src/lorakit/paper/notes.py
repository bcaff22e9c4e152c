"""Notes on how the measured numbers of a table were obtained."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lorakit.metrics import WITHOUT_JAVA
from lorakit.models.packaged import BY_NAME
from lorakit.paper.comparison import Comparison
from lorakit.paper.grid import Grid
from lorakit.paper.record import Record
from lorakit.paper.runs import FALLBACK_EPOCHS, HELD_OUT_SHARE, WARMUP


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
