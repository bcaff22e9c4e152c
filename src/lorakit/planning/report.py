"""The page of a plan: what a run will take, with full fine-tuning beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lorakit.formatting import duration, percentage, rounded_count, short_duration, size
from lorakit.planning.machine import INTERPRETER
from lorakit.planning.planner import Plan, Prediction
from lorakit.reporting import Figure, Page, RunRecord, Section
from lorakit.reporting.charts import Chart, bar_chart
from lorakit.reporting.page import Block, Cell, Code, KeyFigure, KeyFigures, Prose, Table
from lorakit.reporting.run_settings import main_settings, settings_text
from lorakit.reporting.run_summary import describe_method
from lorakit.reporting.stacked_bars import stacked_bar_chart
from lorakit.training.config import TrainConfig

FULL = "Full fine-tuning"

PARTS = {
    "base": "its weights, as they are kept",
    "adapter": "what is trained, in float32",
    "gradients": "those that are there at the fullest moment",
    "optimizer": "the two running means of AdamW",
    "activations": "what the forward pass keeps for the backward pass",
    "logits": "tensors as wide as the vocabulary",
    "temporary": "what single operations need at that moment",
    "allocator": "freed memory between tensors in use",
    "software": "libraries beyond torch, the tokenizer, the reading of data",
}
"""The parts of the memory, each in a few words."""

DRAWN = {
    "base": ("base",),
    "what is trained": ("adapter",),
    "gradients, optimizer": ("gradients", "optimizer"),
    "activations": ("activations",),
    "logits, temporary": ("logits", "temporary"),
    "allocator, software": ("allocator", "software"),
}
"""The parts as the figure shows them: as many as colours that can be told apart."""


def plan_page(found: Plan, config: TrainConfig, *, command: str) -> Page:
    """The page of a plan.

    Args:
        found: The plan.
        config: The run that was planned.
        command: The command that made it.
    """
    record = RunRecord(folder=Path(config.output), config=config.as_dict())
    sections = [
        Section(title="Overview", blocks=[_key_figures(found)]),
        Section(title="Memory and time", blocks=_memory(found)),
        Section(title="Sizes", blocks=_sizes(found)),
        Section(title="The paper's arithmetic", blocks=_paper(found)),
        Section(title="What it rests on", blocks=_grounds(found)),
        Section(title="Configuration", blocks=_configuration(record)),
        Section(title="Origin", blocks=[Code(text=command, label="The command that made it")]),
    ]
    return Page(
        kind="Plan of a training run",
        title=found.base,
        subtitle=f"{found.chosen.method} · {found.lengths}",
        summary=_summary(found, describe_method(record)),
        sections=[section for section in sections if section.blocks],
    )


def memory_figure(found: Plan) -> Figure:
    """The memory by its parts at the fullest moment of training, and the time of a step, a bar for each method."""
    bars = {
        name: {
            label: float(sum(getattr(prediction.memory, part) for part in parts))
            for label, parts in DRAWN.items()
        }
        for name, prediction in _columns(found)
    }
    memory = stacked_bar_chart("Peak memory by its parts", bars, shown=size)
    caption = (
        "Memory at the fullest moment of a step, its parts in the order of the legend. Point at one to read its "
        "numbers; the table has them all."
    )
    time = _bars(found, "Time per step", "seconds", short_duration)
    return Figure(caption=caption, charts=(memory, time), name="memory-and-time")


def sizes_figure(found: Plan) -> Figure:
    """What is trained and what is saved, a bar for each method."""
    charts = (
        _bars(found, "Trained parameters", "trained", rounded_count),
        _bars(found, "Saved file", "file_bytes", size),
    )
    return Figure(caption="Each chart has a scale of its own, from 0.", charts=charts, name="sizes")


def _bars(found: Plan, title: str, field: str, shown: Callable[[float], str]) -> Chart:
    numbers = {name: float(getattr(prediction, field)) for name, prediction in _columns(found)}
    texts = {name: shown(value) for name, value in numbers.items()}
    return bar_chart(title, numbers, x="", texts=texts)


def _columns(found: Plan) -> list[tuple[str, Prediction]]:
    """What stands beside each other: the run, and full fine-tuning where that is another."""
    own = FULL if found.chosen.method == "FullFineTuning" else found.chosen.method
    return [(own, found.chosen), *([(FULL, found.full)] if found.full else [])]


def _summary(found: Plan, what: str) -> list[str]:
    chosen, full = found.chosen, found.full
    count = rounded_count(chosen.trained)
    share = percentage(chosen.trained, found.parameters)
    sentences = [
        f"{what} on {found.base} trains {count} parameters, {share} of the base's "
        f"{rounded_count(found.parameters)}, and saves {size(chosen.file_bytes)}.",
        f"At its fullest moment it holds {size(chosen.memory.total)}, and a step of {found.tokens:,} tokens "
        f"takes {short_duration(chosen.seconds)}.",
    ]
    if found.steps:
        sentences[1] = (
            sentences[1][:-1]
            + f": {duration(found.steps * chosen.seconds)} for the run's {found.steps:,} steps, "
            "evaluation not counted."
        )
    if full:
        memory = full.memory.total / chosen.memory.total
        sentences.append(
            f"Full fine-tuning would hold {size(full.memory.total)}, {memory:.1f} times as much, save "
            f"{size(full.file_bytes)}, and take {short_duration(full.seconds)} for a step, "
            f"{full.seconds / chosen.seconds:.1f} times as long."
        )
    if found.loading > chosen.memory.total:
        sentences.append(
            f"Loading the base takes more for a moment than training does: {size(found.loading)}."
        )
    return sentences


def _key_figures(found: Plan) -> KeyFigures:
    chosen, full = found.chosen, found.full

    def beside(value: str | None) -> str:
        return f"full fine-tuning: {value}" if value else ""

    count = rounded_count(chosen.trained)
    figures = [
        KeyFigure(
            label="Peak memory",
            value=size(chosen.memory.total),
            note=beside(full and size(full.memory.total)),
        ),
        KeyFigure(
            label="Time per step",
            value=short_duration(chosen.seconds),
            note=beside(full and short_duration(full.seconds)),
        ),
        KeyFigure(
            label="Trained parameters",
            value=f"{chosen.trained:,}" if chosen.trained < 1e9 else count,
            note=f"{percentage(chosen.trained, found.parameters)} of the base's",
        ),
        KeyFigure(
            label="Saved file",
            value=size(chosen.file_bytes),
            note=beside(full and size(full.file_bytes)),
        ),
    ]
    return KeyFigures(figures=tuple(figures))


def _memory(found: Plan) -> list[Block]:
    columns = _columns(found)
    names = tuple(name for name, _ in columns)
    parts: list[tuple[Cell, ...]] = [
        (f"{name}: {what}", *(size(getattr(p.memory, name)) for _, p in columns))
        for name, what in PARTS.items()
    ]
    parts.append(("total", *(size(p.memory.total) for _, p in columns)))
    times: list[tuple[Cell, ...]] = [
        ("A step", *(short_duration(p.seconds) for _, p in columns)),
        ("Tokens a second", *(_rate(found.tokens / p.seconds) for _, p in columns)),
    ]
    if found.steps:
        run = (duration(found.steps * p.seconds) for _, p in columns)
        times.append((f"{found.steps:,} steps", *run))
    caption = "Every part of the memory. They are those of one moment, so that they add up."
    blocks: list[Block] = [
        memory_figure(found),
        Table(caption=caption, columns=("Part", *names), rows=parts),
    ]
    if found.device == "cpu":
        blocks.append(
            Prose(
                text="That is above what an interpreter holds with torch imported, about "
                f"{size(INTERPRETER)}. Loading the base takes {size(found.loading)} for a moment."
            )
        )
    blocks.append(Table(caption="The time.", columns=("Time", *names), rows=times))
    if found.why_no_full:
        blocks.append(Prose(text=f"Full fine-tuning is not shown. {found.why_no_full}"))
    return blocks


def _rate(value: float) -> Cell:
    return round(value) if value >= 10 else value


def _sizes(found: Plan) -> list[Block]:
    columns = _columns(found)
    rows: list[tuple[Cell, ...]] = [
        ("Trained parameters", *(f"{p.trained:,}" for _, p in columns)),
        ("Share of the base", *(f"{p.share:.4%}" for _, p in columns)),
        ("Saved file, bytes", *(f"{p.file_bytes:,}" for _, p in columns)),
    ]
    heads = ("Quantity", *(name for name, _ in columns))
    return [
        sizes_figure(found),
        Table(caption="The same in full.", columns=heads, rows=rows),
    ]


def _paper(found: Plan) -> list[Block]:
    if not found.paper:
        return []
    rows: Sequence[Sequence[Cell]] = [line.split(": ", 1) for line in found.paper]
    caption = (
        "How the figures of Hu et al. 2021 for GPT-3 175B come about; theirs stand in parentheses."
    )
    return [Table(caption=caption, columns=("Quantity", "Arithmetic"), rows=rows)]


def _grounds(found: Plan) -> list[Block]:
    shared = "computed once" if found.packed else "computed for each"
    facts: list[tuple[Cell, ...]] = [
        ("Base", f"{found.base}, {found.parameters:,} parameters"),
        ("About it", found.note),
        ("Computed", f"in {found.dtype} on {found.device}"),
        ("Lengths", found.lengths),
        ("Fullest batch", f"{found.rows:,} x {found.width:,} tokens; shared prefixes {shared}"),
        ("Machine", found.machine.origin),
    ]
    text = (
        "A prediction: the run's model was built without weights, and its operations counted. After the run its own "
        "report shows what was measured beside this."
    )
    table = Table(
        caption="What was counted, and how fast it is taken to be.",
        columns=("Fact", "Value"),
        rows=[fact for fact in facts if fact[1]],
    )
    return [Prose(text=text), table]


def _configuration(record: RunRecord) -> list[Block]:
    settings = Table(
        caption="The settings that say most.",
        columns=("Setting", "Value"),
        rows=main_settings(record),
    )
    return [
        settings,
        Code(text=settings_text(record), label="Every setting, defaults too", folded=True),
    ]
