"""The report of one training run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lorakit.configuration import setting
from lorakit.file_names import CONFIG
from lorakit.formatting import duration, percentage, rounded_count, shell_command, size
from lorakit.reporting import measures
from lorakit.reporting.axes import Mark
from lorakit.reporting.charts import Chart, Figure, Series, bar_chart, line_chart, running_mean
from lorakit.reporting.page import (
    Block,
    Cell,
    Code,
    Page,
    Samples,
    Section,
    Table,
    reference_label,
    sample,
)
from lorakit.reporting.run_record import RunRecord
from lorakit.reporting.run_settings import main_settings, settings_text
from lorakit.reporting.run_summary import in_sentence, key_figures, subtitle, summary
from lorakit.reporting.texts import compared, plain

SHOWN_SAMPLES = 12
SMOOTHED_FROM = 40
"""Least number of steps for drawing a running mean of the loss, which is noisy from batch to batch."""

PREDICTED = {
    "seconds": ("Time in training steps", duration),
    "tokens_per_second": ("Tokens a second", lambda value: f"{value:,.0f}"),
    "peak_memory": ("Peak memory", size),
    "adapter_bytes": ("Adapter file", size),
}
"""Quantities that can be predicted for a run: label and number format by key."""


def run_page(run: RunRecord, *, analysis: Sequence[Section] = ()) -> Page:
    """Return the page of a run.

    Args:
        run: The run.
        analysis: Sections about the adapter, placed after its size.
    """
    sections = [
        Section(title="Overview", blocks=[key_figures(run)]),
        Section(title="Scores", blocks=_scores(run)),
        Section(title="Curves", blocks=_curves(run)),
        Section(title="Samples", blocks=_samples(run)),
        Section(title="Adapter size", blocks=_adapter(run)),
        *analysis,
        Section(title="Speed and memory", blocks=_speed(run)),
        Section(title="Configuration", blocks=_configuration(run)),
        Section(title="Data and provenance", blocks=_origin(run)),
    ]
    return Page(
        kind="Training run",
        title=run.name,
        subtitle=subtitle(run),
        summary=summary(run),
        sections=sections,
    )


def loss_chart(runs: Sequence[RunRecord], split: str, name: str) -> Chart | None:
    """Return a chart of a metric over the steps of one or several runs, or None if no run has it."""
    several, validation = len(runs) > 1, split == "validation"
    score, is_rate = measures.score_name(name), name == "learning_rate"
    series: list[Series] = []
    for i, run in enumerate(runs):
        points = run.points(split, name)
        smooth = not validation and len(points) >= SMOOTHED_FROM
        if not (smooth and several):
            label = run.name if several else f"{score.lower()} of a step"
            series.append(
                Series(name=label, points=points, faint=smooth, dots=validation, colour=i)
            )
        if smooth:
            window = max(5, len(points) // 30)
            label = run.name if several else f"mean of {window} steps"
            series.append(Series(name=label, points=running_mean(points, window), colour=i))
    if not any(one.finite() for one in series):
        return None
    data = "Held-out" if validation else "Training"
    title = "Learning rate" if is_rate else f"{data} {in_sentence(score)}"
    marks = []
    if validation and not several and (best := runs[0].best_step):
        text = "best, but worse than before" if runs[0].never_improved else "best"
        marks = [Mark(at=best, text=text)]
    y_format = "~e" if is_rate else None
    return line_chart(title, series, x="step", y=score, marks=marks, y_format=y_format)


def curves_figure(charts: Sequence[Chart | None], caption: str) -> list[Block]:
    """Return a figure of the charts that are not None, if any."""
    drawn = tuple(chart for chart in charts if chart is not None)
    return [Figure(caption=caption, charts=drawn, name="curves")] if drawn else []


# --- sections ------------------------------------------------------------------------------------


def _scores(run: RunRecord) -> list[Block]:
    before, after, best = run.scores("before"), run.scores("after"), run.scores("best")
    if not after:
        return []
    step = run.best_step
    shows_best = step is not None and step != (run.result or {}).get("steps")
    columns = ["Score", "Of", "Before training", "After training", "Change", "Verdict"]
    if shows_best:
        columns.append(f"Best, step {step:,}")
    rows: list[list[Cell]] = []
    for name, value in after.items():
        old = before.get(name)
        verdict = None if old is None else run.better(name, value, old)
        row: list[Cell] = [
            measures.score_name(name),
            run.scored_on(name),
            old,
            value,
            None if old is None else measures.change(value, old),
            {True: "better", False: "worse", None: ""}[verdict],
        ]
        rows.append([*row, best.get(name)] if shows_best else row)
    caption = f"Scores on the validation data. {run.memorisation}".strip()
    return [Table(caption=caption, columns=tuple(columns), rows=rows)]


def _curves(run: RunRecord) -> list[Block]:
    names = [name for name in run.scores("after") if name != "perplexity"]
    charts = [loss_chart([run], "train", "loss")]
    charts += [loss_chart([run], "validation", name) for name in names]
    if rate := run.points("train", "learning_rate"):
        series = [Series(name="learning rate", points=rate)]
        charts.append(line_chart("Learning rate", series, x="step", y="rate", y_format="~e"))
    if norm := run.points("train", "gradient_norm"):
        series = [Series(name="gradient norm", points=norm)]
        charts.append(line_chart("Gradient norm, before clipping", series, x="step", y="norm"))
    return curves_figure(
        charts,
        "Over the optimizer's steps. The vertical axes start at the data, not at 0. "
        "Point at a curve to read its numbers.",
    )


def _samples(run: RunRecord) -> list[Block]:
    if not run.samples:
        return []
    first, last = run.samples[0]["step"], run.samples[-1]["step"]
    first_records = {str(r.get("prompt")): r for r in run.samples if r["step"] == first}
    samples = []
    for record in run.last_samples[:SHOWN_SAMPLES]:
        prompt, after = str(record.get("prompt")), str(record.get("output", ""))
        references = record.get("references")
        answers = [(f"Step {last:,}", plain(after))]
        if first != last and prompt in first_records:
            old, new = compared(str(first_records[prompt].get("output", "")), after)
            label = "Before training" if first == 0 else f"Step {first:,}"
            answers = [(label, old), (f"After {last:,} steps", new)]
        if isinstance(references, Sequence) and references:
            answers.append((reference_label(references), plain(str(references[0]))))
        samples.append(sample(record, answers))
    caption = (
        f"{len(samples)} of {len(run.last_samples)} validation prompts, with the texts that the model generated. Words "
        "that differ between the texts before and after are marked."
    )
    return [Samples(caption=caption, samples=tuple(samples))]


def _adapter(run: RunRecord) -> list[Block]:
    sizes = run.sizes
    if run.adapter_bytes is None or "base_bytes" not in sizes:
        return []
    bytes_of = {"base, in memory": sizes["base_bytes"], "adapter, its file": run.adapter_bytes}
    counts = {"base": sizes["base_parameters"], "trained": sizes["trained_parameters"]}
    charts = tuple(
        bar_chart(title, bars, x="", texts={name: shown(value) for name, value in bars.items()})
        for title, bars, shown in (("Bytes", bytes_of, size), ("Parameters", counts, rounded_count))
    )
    caption = "The adapter and its base, on one scale."
    return [Figure(caption=caption, charts=charts, name="adapter-size")]


def _speed(run: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    if rows := _measured(run):
        caption = "Measured and predicted quantities." if run.predicted else "Measured quantities."
        columns = ("Quantity", "Predicted", "Measured", "Measured / predicted")
        if not run.predicted:
            columns, rows = columns[::2], [row[::2] for row in rows]
        blocks.append(Table(caption=caption, columns=columns, rows=rows))
    if len(points := _throughput(run)) > 1:
        series = [Series(name="tokens a second", points=points)]
        chart = line_chart("Throughput", series, x="step", y="tokens a second")
        caption = "Tokens of the examples per second of training, without the time of evaluations."
        blocks.append(Figure(caption=caption, charts=(chart,), name="throughput"))
    return blocks


def _measured(run: RunRecord) -> list[tuple[Cell, ...]]:
    measured = {
        "seconds": run.total("seconds") or None,
        "tokens_per_second": run.tokens_per_second,
        "peak_memory": (run.result or {}).get("peak_memory") or None,
        "adapter_bytes": run.adapter_bytes,
    }
    rows: list[tuple[Cell, ...]] = []
    for key, (label, shown) in PREDICTED.items():
        if (value := measured[key]) is not None:
            expected = run.predicted.get(key)
            expected_text = None if expected is None else shown(expected)
            ratio = f"{value / expected:.2f}" if expected else None
            rows.append((label, expected_text, shown(value), ratio))
    tokens, computed = run.total("tokens"), run.total("computed_tokens")
    if tokens and computed:
        text = f"{computed:,.0f} ({percentage(computed, tokens)})"
        rows.append(("Tokens computed (share of the examples' tokens)", None, text, None))
    return rows


def _throughput(run: RunRecord) -> list[tuple[float, float]]:
    """Return tokens per second, averaged over groups of steps because single steps are noisy."""
    totals = [(record["step"], record.get("tokens"), record.get("seconds")) for record in run.train]
    whole = [t for t in totals if isinstance(t[1], (int, float)) and isinstance(t[2], (int, float))]
    every = max(1, len(whole) // 40)
    ends = [(0, 0, 0.0), *whole[every - 1 :: every]]
    return [
        (step, (tokens - tokens0) / (seconds - seconds0))
        for (_, tokens0, seconds0), (step, tokens, seconds) in itertools.pairwise(ends)
        if seconds > seconds0
    ]


def _configuration(run: RunRecord) -> list[Block]:
    caption, columns = "The most important settings.", ("Setting", "Value")
    label = "All settings of the run, with defaults"
    return [
        Table(caption=caption, columns=columns, rows=main_settings(run)),
        Code(text=settings_text(run), label=label, folded=True),
    ]


def _origin(run: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    if run.data:
        rows = [
            (split, part.get("source"), part.get("examples"), part.get("sha256"))
            for split, part in run.data.items()
        ]
        columns = ("Split", "Source", "Examples", "SHA-256")
        blocks.append(Table(caption="The data of the run.", columns=columns, rows=rows))
    facts = [
        ("Base model", setting(run.base, "name") or run.base_name),
        ("Revision", setting(run.base, "revision")),
        ("Class", setting(run.base, "class_name")),
        ("Weights", setting(run.base, "dtype")),
        ("SHA-256 of the weights", setting(run.base, "exact")),
    ]
    rows = [fact for fact in facts if fact[1]]
    blocks.append(Table(caption="The base model.", columns=("Fact", "Value"), rows=rows))
    if run.sessions:
        last = run.sessions[-1]
        facts = [
            ("Processor", last.get("processor")),
            ("Device", last.get("device")),
            ("Threads", last.get("threads")),
            ("System", last.get("platform")),
            *last.get("versions", {}).items(),
        ]
        dates = ", ".join(str(session.get("started", "")) for session in run.sessions)
        times = "once" if len(run.sessions) == 1 else f"{len(run.sessions)} times"
        caption = (
            f"The machine and software of the last start. The run was started {times}: {dates}."
        )
        rows = [(name, str(value)) for name, value in facts if value is not None]
        blocks.append(Table(caption=caption, columns=("Fact", "Value"), rows=rows))
    if run.command is not None:
        blocks.append(Code(text=run.command, label="The command that started the run"))
    again = ["--config", str(run.folder / CONFIG), "--output", f"{run.folder}-again"]
    label = "The command that repeats the run with all settings"
    blocks.append(Code(text=shell_command(["lorakit", "train", *again]), label=label))
    return blocks
