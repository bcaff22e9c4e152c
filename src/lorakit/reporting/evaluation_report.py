"""The report of an evaluation: scores, samples, and for labels which were taken for which."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from lorakit.evaluation.evaluate import Evaluation
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.reporting import measures
from lorakit.reporting.differences import compared, plain
from lorakit.reporting.page import (
    Answer,
    Block,
    Cell,
    Code,
    KeyFigure,
    KeyFigures,
    Page,
    Sample,
    Samples,
    Section,
    Table,
)

SHOWN_SAMPLES = 24
MOST_CLASSES = 20


def evaluation_page(config: EvaluateConfig, found: Evaluation, command: str = "") -> Page:
    """The page of an evaluation.

    Args:
        config: What was scored.
        found: The scores and the records behind them.
        command: The command that made it.
    """
    what = config.adapter or (config.base.name if config.base is not None else "")
    task = config.data.task_type
    split = config.split or ("test" if task is None else task.scored_split)
    data = _data(config, split)
    count = len(found.outputs)
    figures = [
        KeyFigure(label=measures.score_name(name), value=f"{value:.4g}")
        for name, value in found.scores.items()
    ]
    rows: list[tuple[Cell, ...]] = [(measures.score_name(n), v) for n, v in found.scores.items()]
    table = Table(caption=f"Scores on {split} data.", columns=("Score", "Value"), rows=rows)
    sections = [
        Section(title="Scores", blocks=[KeyFigures(figures=tuple(figures)), table]),
        Section(title="Examples", blocks=_examples(found.outputs)),
        Section(title="Configuration", blocks=_configuration(config, command)),
    ]
    scored = (
        f" {count:,} {'prompt was' if count == 1 else 'prompts were'} answered." if count else ""
    )
    subject = "The adapter" if config.adapter else "The base model"
    listed = ", ".join(f"{measures.score_name(n)} {v:.4g}" for n, v in found.scores.items())
    return Page(
        kind="Evaluation",
        title=str(what).rstrip("/"),
        subtitle=f"{data} · {split}",
        summary=[f"{subject} was scored on the {split} part of {data}: {listed}.{scored}"],
        sections=[section for section in sections if section.blocks],
    )


def _data(config: EvaluateConfig, split: Literal["validation", "test"]) -> str:
    """What was scored, in a word or two."""
    if config.data.task_type is not None and config.data.own is not None:
        return config.data.task
    source = config.data.source(split)
    return ", ".join(source) if isinstance(source, list) else source or "its data"


def _examples(outputs: Sequence[dict[str, Any]]) -> list[Block]:
    if not outputs:
        return []
    step = max(1, len(outputs) // SHOWN_SAMPLES)
    chosen = outputs[::step][:SHOWN_SAMPLES]
    labelled = "label" in outputs[0]
    blocks: list[Block] = _confusion(outputs) if labelled else []
    shown = []
    for record in chosen:
        answers: tuple[Answer, ...]
        if labelled:
            answers = (
                Answer(label="Predicted", pieces=plain(_label(record, "output"))),
                Answer(label="Label", pieces=plain(_label(record, "label"))),
            )
        else:
            references = record.get("references") or [""]
            output, reference = compared(record["output"], references[0])
            more = f", one of {len(references)}" if len(references) > 1 else ""
            answers = (
                Answer(label="Generated", pieces=output),
                Answer(label=f"Reference{more}", pieces=reference),
            )
        shown.append(Sample(prompt=str(record["prompt"]).rstrip("\n"), answers=answers))
    marked = "" if labelled else " Marked are the words in which the text and its reference differ."
    caption = f"{len(shown)} of {len(outputs):,}, at equal distances.{marked}"
    return [*blocks, Samples(caption=caption, samples=tuple(shown))]


def _confusion(outputs: Sequence[dict[str, Any]]) -> list[Block]:
    pairs = Counter((record["label"], record["output"]) for record in outputs)
    labels = sorted({label for pair in pairs for label in pair})
    if not 2 <= len(labels) <= MOST_CLASSES or any(label != int(label) for label in labels):
        return []  # numbers, not classes
    names = {record[key]: _label(record, key) for record in outputs for key in ("output", "label")}
    rows = [[names[label], *(pairs[label, guess] for guess in labels)] for label in labels]
    caption = "Which label was taken for which: a row for each label, a column for each prediction."
    columns = ("Label", *(f"predicted {names[label]}" for label in labels))
    return [Table(caption=caption, columns=columns, rows=rows)]


def _label(record: dict[str, Any], key: str) -> str:
    """A label, or a predicted one, by its name where that is known."""
    if f"{key}_name" in record:
        return record[f"{key}_name"]
    number = float(record[key])
    return str(int(number)) if number == int(number) else f"{number:.4g}"


def _configuration(config: EvaluateConfig, command: str) -> list[Block]:
    settings = yaml.safe_dump(
        json.loads(json.dumps(dataclasses.asdict(config))),
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    blocks: list[Block] = [Code(text=settings, label="Every setting", folded=True)]
    if command:
        blocks.insert(0, Code(text=command, label="The command that made it"))
    return blocks
