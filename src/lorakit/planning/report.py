"""The HTML page of a plan: predicted cost of a run, compared with full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorakit.formatting import duration, percentage, rounded_count, short_duration, size
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
    "base": "the base's weights in their storage dtype",
    "adapter": "trained parameters in float32",
    "gradients": "gradients that exist at the peak",
    "optimizer": "AdamW's two running means",
    "activations": "tensors saved for the backward pass",
    "logits": "tensors of vocabulary width",
    "temporary": "working memory of single operations at the peak, or of a checkpoint",
    "allocator": "freed memory fragmented between live tensors, and cached kernels",
    "software": "libraries besides torch, the tokenizer, the training examples",
    "interpreter": "Python with torch imported",
}
"""The parts of the memory, each with a description."""

DRAWN = {
    "base": ("base",),
    "trained parameters": ("adapter",),
    "gradients, optimizer": ("gradients", "optimizer"),
    "activations": ("activations",),
    "logits, temporary": ("logits", "temporary"),
    "allocator, software": ("allocator", "software", "interpreter"),
}
"""The parts that each colour of the figure shows: more colours would look alike."""


def plan_page(plan: Plan, config: TrainConfig, *, command: str) -> Page:
    """Return the page of a plan.

    Args:
        plan: The plan.
        config: The run that was planned.
        command: Command that reproduces the page.
    """
    record = RunRecord(folder=Path(config.output), config=config.as_dict())
    sections = [
        Section(title="Overview", blocks=[_key_figures(plan)]),
        Section(title="Memory and time", blocks=_memory(plan)),
        Section(title="Sizes", blocks=_sizes(plan)),
        Section(title="The paper's arithmetic", blocks=_paper(plan)),
        Section(title="Assumptions", blocks=_assumptions(plan)),
        Section(
            title="Configuration",
            blocks=[
                Table(
                    caption="The main settings.",
                    columns=("Setting", "Value"),
                    rows=main_settings(record),
                ),
                Code(text=settings_text(record), label="All settings with defaults", folded=True),
            ],
        ),
        Section(
            title="Origin", blocks=[Code(text=command, label="Command that created this page")]
        ),
    ]
    return Page(
        kind="Plan of a training run",
        title=plan.base,
        subtitle=f"{plan.chosen.method} · {plan.lengths}",
        summary=_summary(plan, describe_method(record)),
        sections=sections,
    )


def memory_figure(plan: Plan) -> Figure:
    """Return bars of the peak memory by part and of the time of a step for each method."""
    bars = {
        name: {
            label: float(sum(getattr(prediction.memory, part) for part in parts))
            for label, parts in DRAWN.items()
        }
        for name, prediction in _columns(plan)
    }
    memory = stacked_bar_chart("Memory of a step by part", bars, shown=size)
    caption = (
        "Memory at the peak of a step; the parts follow the order of the legend. Hover over a part for its size; the "
        "table lists all parts."
    )
    time = _bars(plan, "Time per step", "seconds", short_duration)
    return Figure(caption=caption, charts=(memory, time), name="memory-and-time")


def sizes_figure(plan: Plan) -> Figure:
    """Return bars of the trained parameters and the saved file for each method."""
    charts = (
        _bars(plan, "Trained parameters", "trained", rounded_count),
        _bars(plan, "Saved file", "file_bytes", size),
    )
    return Figure(caption="Each chart has its own scale from 0.", charts=charts, name="sizes")


def shared_text(plan: Plan) -> str:
    """Return what several processes share and send, as a phrase."""
    shard = " and shard the blocks" if plan.sharded else ""
    return (
        f"{plan.processes} processes compute each step{shard}; memory and time are those of one. It sends "
        f"{size(plan.chosen.sent)} in a step"
    )


def _bars(plan: Plan, title: str, field: str, shown: Callable[[float], str]) -> Chart:
    numbers = {name: float(getattr(prediction, field)) for name, prediction in _columns(plan)}
    texts = {name: shown(value) for name, value in numbers.items()}
    return bar_chart(title, numbers, x="", texts=texts)


def _columns(plan: Plan) -> list[tuple[str, Prediction]]:
    """Return the predictions to compare by name: the run, and full fine-tuning if predicted."""
    own = FULL if plan.chosen.method == "FullFineTuning" else plan.chosen.method
    return [(own, plan.chosen), *([(FULL, plan.full)] if plan.full else [])]


def _summary(plan: Plan, method: str) -> list[str]:
    chosen, full = plan.chosen, plan.full
    count = rounded_count(chosen.trained)
    share = percentage(chosen.trained, plan.parameters)
    sentences = [
        f"{method} on {plan.base} trains {count} parameters, {share} of the base's "
        f"{rounded_count(plan.parameters)}, and saves {size(chosen.file_bytes)}.",
        f"Its peak memory is {size(plan.peak(chosen))}. A step of {plan.tokens:,} tokens takes "
        f"{short_duration(chosen.seconds)}.",
    ]
    if plan.steps:
        sentences.append(
            f"The run's {plan.steps:,} steps take {duration(plan.steps * chosen.seconds)} without evaluation."
        )
    if full:
        memory = plan.peak(full) / plan.peak(chosen)
        sentences.append(
            f"Full fine-tuning needs {size(plan.peak(full))} ({memory:.1f} times as much), saves "
            f"{size(full.file_bytes)} and takes {short_duration(full.seconds)} per step "
            f"({full.seconds / chosen.seconds:.1f} times as long)."
        )
    if plan.loading > chosen.memory.total:
        sentences.append(
            f"Loading the base briefly needs more memory than training: {size(plan.loading)}."
        )
    return sentences


def _key_figures(plan: Plan) -> KeyFigures:
    chosen, full = plan.chosen, plan.full

    def compared(label: str, text: Callable[[Prediction], str]) -> KeyFigure:
        note = f"full fine-tuning: {text(full)}" if full else ""
        return KeyFigure(label=label, value=text(chosen), note=note)

    count = chosen.trained
    trained = KeyFigure(
        label="Trained parameters",
        value=rounded_count(count),
        note=f"{percentage(count, plan.parameters)} of the base's",
    )
    return KeyFigures(
        figures=(
            compared("Peak memory", lambda p: size(plan.peak(p))),
            compared("Time per step", lambda p: short_duration(p.seconds)),
            trained,
            compared("Saved file", lambda p: size(p.file_bytes)),
        )
    )


def _table(
    plan: Plan, caption: str, name: str, rows: Mapping[str, Callable[[Prediction], Cell]]
) -> Table:
    """Return a table with a column for each prediction. `rows` has the text of a cell by row heading."""
    columns = _columns(plan)
    return Table(
        caption=caption,
        columns=(name, *(method for method, _ in columns)),
        rows=[(heading, *(cell(p) for _, p in columns)) for heading, cell in rows.items()],
    )


def _memory(plan: Plan) -> list[Block]:
    def part_size(part: str) -> Callable[[Prediction], str]:
        return lambda p: size(getattr(p.memory, part))

    parts = {f"{part}: {about}": part_size(part) for part, about in PARTS.items()}
    times: dict[str, Callable[[Prediction], Cell]] = {
        "A step": lambda p: short_duration(p.seconds),
        "Tokens a second": lambda p: _rate(plan.tokens / p.seconds),
    }
    if steps := plan.steps:
        times[f"{steps:,} steps"] = lambda p: duration(steps * p.seconds)
    caption = "All parts of the memory, at the same moment, so they add up."
    blocks: list[Block] = [
        memory_figure(plan),
        _table(plan, caption, "Part", {**parts, "in a step": part_size("total")}),
    ]
    if plan.device == "cpu":
        blocks.append(Prose(text=f"Loading the base briefly needs {size(plan.loading)}."))
    blocks.append(_table(plan, "The time.", "Time", times))
    if plan.why_no_full:
        blocks.append(Prose(text=f"Full fine-tuning is not shown. {plan.why_no_full}"))
    return blocks


def _rate(value: float) -> Cell:
    return round(value) if value >= 10 else value


def _sizes(plan: Plan) -> list[Block]:
    rows: dict[str, Callable[[Prediction], Cell]] = {
        "Trained parameters": lambda p: f"{p.trained:,}",
        "Share of the base": lambda p: percentage(p.share),
        "Saved file, bytes": lambda p: f"{p.file_bytes:,}",
    }
    return [sizes_figure(plan), _table(plan, "The exact numbers.", "Quantity", rows)]


def _paper(plan: Plan) -> list[Block]:
    if not plan.paper:
        return []
    rows: Sequence[Sequence[Cell]] = [line.split(": ", 1) for line in plan.paper]
    caption = "Calculation of the figures of Hu et al. 2021 for GPT-3 175B; the paper's values are in parentheses."
    return [Table(caption=caption, columns=("Quantity", "Arithmetic"), rows=rows)]


def _assumptions(plan: Plan) -> list[Block]:
    prefixes = "computed once" if plan.packed else "computed per example"
    facts: list[tuple[Cell, ...]] = [
        ("Base", f"{plan.base}, {plan.parameters:,} parameters"),
        ("Note", plan.note),
        ("Computed", f"in {plan.dtype} on {plan.device}"),
        ("Lengths", plan.lengths),
        ("Largest batch", f"{plan.rows:,} x {plan.width:,} tokens; shared prefixes {prefixes}"),
        ("Machine", plan.machine.origin),
        ("Processes", shared_text(plan) if plan.processes > 1 else ""),
    ]
    text = (
        "lorakit built the run's model without weights and counted its operations. After the run, its report "
        "compares this prediction with measurements."
    )
    table = Table(
        caption="The simulated run and the assumed machine.",
        columns=("Fact", "Value"),
        rows=[fact for fact in facts if fact[1]],
    )
    return [Prose(text=text), table]
