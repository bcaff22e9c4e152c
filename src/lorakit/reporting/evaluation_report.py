"""The report of an evaluation: scores, samples and, for labels, a confusion matrix."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from lorakit.evaluation.evaluate import Evaluation
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.reporting import measures
from lorakit.reporting.differences import compared, plain
from lorakit.reporting.page import (
    Block,
    Code,
    KeyFigure,
    KeyFigures,
    Page,
    Sample,
    Samples,
    Section,
    Table,
    reference_label,
)
from lorakit.reporting.run_settings import yaml_text

SHOWN_SAMPLES = 24
MOST_CLASSES = 20


def evaluation_page(config: EvaluateConfig, result: Evaluation, command: str = "") -> Page:
    """Return the page of an evaluation.

    Args:
        config: The configuration of the evaluation.
        result: The scores and the outputs.
        command: The command that ran the evaluation.
    """
    name = config.adapter or (config.base.name if config.base is not None else "")
    task = config.data.task_type
    split = config.split or ("test" if task is None else task.scored_split)
    data = _data(config, split)
    count = len(result.outputs)
    scores = [(measures.score_name(key), value) for key, value in result.scores.items()]
    figures = tuple(KeyFigure(label=label, value=f"{value:.4g}") for label, value in scores)
    table = Table(caption=f"Scores on {split} data.", columns=("Score", "Value"), rows=scores)
    sections = [
        Section(title="Scores", blocks=[KeyFigures(figures=figures), table]),
        Section(title="Examples", blocks=_examples(result.outputs)),
        Section(title="Configuration", blocks=_configuration(config, command)),
    ]
    answered = (
        f" {count:,} {'prompt was' if count == 1 else 'prompts were'} answered." if count else ""
    )
    subject = "The adapter" if config.adapter else "The base model"
    listed = ", ".join(f"{label} {value:.4g}" for label, value in scores)
    return Page(
        kind="Evaluation",
        title=str(name).rstrip("/"),
        subtitle=f"{data} · {split}",
        summary=[f"{subject} was evaluated on the {split} split of {data}: {listed}.{answered}"],
        sections=sections,
    )


def _data(config: EvaluateConfig, split: Literal["validation", "test"]) -> str:
    """Return a short name of the data."""
    if config.data.task_type is not None and config.data.own is not None:
        return config.data.task
    source = config.data.source(split)
    return ", ".join(source) if isinstance(source, list) else source or "its data"


def _examples(outputs: Sequence[dict[str, Any]]) -> list[Block]:
    if not outputs:
        return []
    step = max(1, len(outputs) // SHOWN_SAMPLES)
    selected = outputs[::step][:SHOWN_SAMPLES]
    labelled = "label" in outputs[0]
    blocks: list[Block] = _confusion(outputs) if labelled else []
    samples = []
    for record in selected:
        if labelled:
            answers = [
                ("Predicted", plain(_label(record, "output"))),
                ("Label", plain(_label(record, "label"))),
            ]
        else:
            references = record.get("references") or [""]
            output, reference = compared(record["output"], references[0])
            answers = [("Generated", output), (reference_label(references), reference)]
        samples.append(Sample(prompt=str(record["prompt"]).rstrip("\n"), answers=answers))
    marked = "" if labelled else " Words that differ between text and reference are marked."
    caption = f"{len(samples)} of {len(outputs):,} examples, evenly spaced.{marked}"
    return [*blocks, Samples(caption=caption, samples=tuple(samples))]


def _confusion(outputs: Sequence[dict[str, Any]]) -> list[Block]:
    pairs = Counter((record["label"], record["output"]) for record in outputs)
    labels = sorted({label for pair in pairs for label in pair})
    if not 2 <= len(labels) <= MOST_CLASSES or any(label != int(label) for label in labels):
        return []  # a regression, or not 2 to 20 classes
    names = {record[key]: _label(record, key) for record in outputs for key in ("output", "label")}
    rows = [[names[label], *(pairs[label, guess] for guess in labels)] for label in labels]
    caption = "Confusion matrix: a row for each label, a column for each prediction."
    columns = ("Label", *(f"predicted {names[label]}" for label in labels))
    return [Table(caption=caption, columns=columns, rows=rows)]


def _label(record: dict[str, Any], key: str) -> str:
    """Return the name of a label or prediction, or else its number."""
    if f"{key}_name" in record:
        return record[f"{key}_name"]
    number = float(record[key])
    return str(int(number)) if number == int(number) else f"{number:.4g}"


def _configuration(config: EvaluateConfig, command: str) -> list[Block]:
    settings = yaml_text(json.loads(json.dumps(dataclasses.asdict(config))))
    blocks: list[Block] = [Code(text=settings, label="All settings", folded=True)]
    if command:
        blocks.insert(0, Code(text=command, label="The command that ran the evaluation"))
    return blocks
