"""The report of an evaluation: scores, samples and, for labels, a confusion matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from lorakit.configuration import as_dict
from lorakit.data.examples import evenly_spaced
from lorakit.evaluation.evaluate import Evaluation
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.formatting import counted, number
from lorakit.reporting import measures
from lorakit.reporting.page import (
    Block,
    Code,
    KeyFigure,
    KeyFigures,
    Page,
    Samples,
    Section,
    Table,
    reference_label,
    sample,
)
from lorakit.reporting.run_settings import yaml_text
from lorakit.reporting.texts import Piece, compared, plain

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
    data, part = _data(config, result.split), scored_part(config, result.split)
    count = f"{counted(result.examples, 'example')}{answered(result)}"
    of_base = {key: f"base {number(value)}" for key, value in result.base_scores.items()}
    figures = tuple(
        KeyFigure(label=measures.score_name(key), value=number(value), note=of_base.get(key, ""))
        for key, value in result.scores.items()
    )
    rows = [
        (measures.score_name(key), value, *([result.base_scores.get(key)] if of_base else []))
        for key, value in result.scores.items()
    ]
    columns = ("Score", "Adapter", "Base") if of_base else ("Score", "Value")
    caption = f"Scores on {part}: {count}."
    if result.f1_class:
        caption += f" F1 is that of class {result.f1_class!r}, the second of two."
    table = Table(caption=caption, columns=columns, rows=rows)
    sections = [
        Section(title="Scores", blocks=[KeyFigures(figures=figures), table]),
        Section(title="Examples", blocks=_examples(result.outputs)),
        Section(title="Configuration", blocks=_configuration(config, command)),
    ]
    subject = "The adapter" if config.adapter else "The base model"
    listed = ", ".join(
        f"{measures.score_name(key)} {number(value)}"
        + (f" ({of_base[key]})" if key in of_base else "")
        for key, value in result.scores.items()
    )
    return Page(
        kind="Evaluation",
        title=str(name).rstrip("/"),
        subtitle=f"{data} · {part}",
        summary=[f"{subject} was evaluated on {data} ({part}, {count}): {listed}."],
        sections=sections,
    )


def scored_part(config: EvaluateConfig, split: str) -> str:
    """Return which data of the configuration is scored: a split, or a share of the training data."""
    if split == "validation" and (share := config.data.validation_fraction):
        return f"training data held out by validation_fraction {share:g}"
    return f"{split} data"


def answered(result: Evaluation) -> str:
    """Return how many prompts were answered by generated text, and how many answers were cut, after a comma."""
    texts = sum("references" in record for record in result.outputs)
    cut = f", {result.cut:,} cut at max_new_tokens" if result.cut else ""
    return f", {counted(texts, 'prompt')} answered{cut}" if texts else ""


def _data(config: EvaluateConfig, split: Literal["validation", "test"]) -> str:
    """Return a short name of the data."""
    if config.data.task_type is not None and config.data.own is not None:
        return config.data.task
    source = config.data.source(split)
    return ", ".join(source) if isinstance(source, list) else source or "its data"


def _examples(outputs: Sequence[dict[str, Any]]) -> list[Block]:
    if not outputs:
        return []
    selected = evenly_spaced(outputs, SHOWN_SAMPLES)
    labelled = "label" in outputs[0]
    classes = labelled and all(isinstance(record["output"], int) for record in outputs)
    blocks: list[Block] = _confusion(outputs) if labelled else []
    samples = []
    for record in selected:
        if labelled:
            wrong = classes and record["output"] != record["label"]
            answers = [
                (
                    "Predicted, wrong" if wrong else "Predicted",
                    (Piece(_label(record, "output"), changed=wrong),),
                ),
                ("Label", plain(_label(record, "label"))),
            ]
        else:
            references = record.get("references") or [""]
            output, reference = compared(record["output"], references[0])
            answers = [("Generated", output), (reference_label(references), reference)]
        samples.append(sample(record, answers))
    marked = "" if labelled else " Words that differ between text and reference are marked."
    if classes:
        wrong = sum(record["output"] != record["label"] for record in outputs)
        marked = f" Wrong predictions are marked: {wrong:,} of all {len(outputs):,}."
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
    value = float(record[key])
    return number(int(value) if value.is_integer() else value)


def _configuration(config: EvaluateConfig, command: str) -> list[Block]:
    settings = yaml_text(as_dict(config))
    blocks: list[Block] = [Code(text=settings, label="All settings", folded=True)]
    if command:
        blocks.insert(0, Code(text=command, label="The command that ran the evaluation"))
    return blocks
