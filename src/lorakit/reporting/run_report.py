"""The report of one training run."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence

from lorakit.formatting import duration, percentage, rounded_count, size
from lorakit.reporting import measures
from lorakit.reporting.axes import Mark
from lorakit.reporting.charts import (
    Chart,
    Figure,
    Series,
    bar_chart,
    line_chart,
    running_mean,
)
from lorakit.reporting.differences import compared, plain
from lorakit.reporting.page import (
    Answer,
    Block,
    Cell,
    Code,
    Page,
    Sample,
    Samples,
    Section,
    Table,
)
from lorakit.reporting.run_record import RunRecord
from lorakit.reporting.run_settings import main_settings, setting, settings_text
from lorakit.reporting.run_summary import best_step, in_sentence, key_figures, subtitle, summary
from lorakit.training.run_folder import CONFIG

SHOWN_SAMPLES = 12
SMOOTHED_FROM = 40
"""Steps from which a mean is drawn over the loss of single steps, which varies with the batch."""

PREDICTED = {
    "seconds": ("Time in training steps", duration),
    "tokens_per_second": ("Tokens a second", lambda value: f"{value:,.0f}"),
    "peak_memory": ("Peak memory", size),
    "adapter_bytes": ("Adapter file", size),
}
"""What may be predicted of a run, by its key: the name and the form of the number."""


def run_page(
    run: RunRecord,
    *,
    analysis: Sequence[Section] = (),
) -> Page:
    """The page of a run.

    Args:
        run: The run.
        analysis: Sections about its adapter, which stand after the samples.
    """
    sections = [
        Section(title="Overview", blocks=[key_figures(run)]),
        _scores(run),
        _curves(run),
        _samples(run),
        _adapter(run),
        *analysis,
        _speed(run),
        _configuration(run),
        _origin(run),
    ]
    return Page(
        kind="Training run",
        title=run.name,
        subtitle=subtitle(run),
        summary=summary(run),
        sections=[section for section in sections if section is not None and section.blocks],
    )


def loss_chart(runs: Sequence[RunRecord], split: str, name: str) -> Chart | None:
    """A metric of one or several runs over the steps; None where no run has it."""
    several = len(runs) > 1
    series: list[Series] = []
    for place, run in enumerate(runs):
        points = run.points(split, name)
        label = run.name if several else f"{measures.score_name(name).lower()} of a step"
        if split == "validation":
            series.append(Series(name=label, points=points, dots=True, colour=place))
        elif len(points) < SMOOTHED_FROM:
            series.append(Series(name=label, points=points, colour=place))
        else:
            window = max(5, len(points) // 30)
            mean = running_mean(points, window)
            text = run.name if several else f"mean of {window} steps"
            if not several:
                series.append(Series(name=label, points=points, faint=True, colour=place))
            series.append(Series(name=text, points=mean, colour=place))
    series = [one for one in series if one.finite()]
    if not series:
        return None
    where = "Training" if split == "train" else "Held-out"
    title = f"{where} {in_sentence(measures.score_name(name))}"
    if name == "learning_rate":
        title = "Learning rate"
    marks = []
    if split == "validation" and not several and (best := best_step(runs[0])):
        marks = [Mark(at=best, text="best")]
    return line_chart(
        title,
        series,
        x="step",
        y=measures.score_name(name),
        marks=marks,
        y_format="~e" if name == "learning_rate" else None,
    )


# --- sections ------------------------------------------------------------------------------------


def _scores(run: RunRecord) -> Section | None:
    before, after, best = run.scores("before"), run.scores("after"), run.scores("best")
    if not after:
        return None
    step = best_step(run)
    shows_best = step is not None and run.result is not None and step != run.result.get("steps")
    columns = ["Score", "Before training", "After training", "Change", "Verdict"]
    if shows_best:
        columns.append(f"Best, step {step:,}")
    rows: list[list[Cell]] = []
    for name, value in after.items():
        old = before.get(name)
        verdict = None if old is None else measures.better(name, value, old)
        row: list[Cell] = [
            measures.score_name(name),
            old,
            value,
            None if old is None else measures.change(value, old),
            {True: "better", False: "worse", None: ""}[verdict],
        ]
        rows.append([*row, best.get(name)] if shows_best else row)
    caption = "Scores on the validation data, which the training does not see."
    return Section(
        title="Scores", blocks=[Table(caption=caption, columns=tuple(columns), rows=rows)]
    )


def _curves(run: RunRecord) -> Section | None:
    names = [name for name in run.scores("after") if name != "perplexity"]
    charts = [loss_chart([run], "train", "loss")]
    charts += [loss_chart([run], "validation", name) for name in names]
    rate = run.points("train", "learning_rate")
    norm = run.points("train", "gradient_norm")
    if rate:
        one = Series(name="learning rate", points=rate)
        charts.append(line_chart("Learning rate", [one], x="step", y="rate", y_format="~e"))
    if norm:
        one = Series(name="gradient norm", points=norm)
        charts.append(line_chart("Gradient norm, before clipping", [one], x="step", y="norm"))
    drawn = tuple(chart for chart in charts if chart is not None)
    if not drawn:
        return None
    caption = (
        "Over the optimizer's steps. The vertical axes begin where the data does, not at 0. "
        "Point at a curve to read its numbers."
    )
    return Section(title="Curves", blocks=[Figure(caption=caption, charts=drawn, name="curves")])


def _samples(run: RunRecord) -> Section | None:
    if not run.samples:
        return None
    first, last = run.samples[0]["step"], run.samples[-1]["step"]
    then = {str(r.get("prompt")): r for r in run.samples if r["step"] == first}
    now = [r for r in run.samples if r["step"] == last]
    shown = []
    for record in now[:SHOWN_SAMPLES]:
        prompt, after = str(record.get("prompt")), str(record.get("output", ""))
        references = record.get("references")
        answers = [Answer(label=f"Step {last:,}", pieces=plain(after))]
        if first != last and prompt in then:
            old, new = compared(str(then[prompt].get("output", "")), after)
            label = "Before training" if first == 0 else f"Step {first:,}"
            answers = [
                Answer(label=label, pieces=old),
                Answer(label=f"After {last:,} steps", pieces=new),
            ]
        if isinstance(references, Sequence) and references:
            more = f", one of {len(references)}" if len(references) > 1 else ""
            answers.append(Answer(label=f"Reference{more}", pieces=plain(str(references[0]))))
        shown.append(Sample(prompt=prompt.rstrip("\n"), answers=tuple(answers)))
    caption = (
        f"{len(shown)} of {len(now)} validation prompts, with what the model wrote. Marked are the words in which "
        "the texts before and after differ."
    )
    return Section(title="Samples", blocks=[Samples(caption=caption, samples=tuple(shown))])


def _adapter(run: RunRecord) -> Section | None:
    sizes = run.sizes
    if run.adapter_bytes is None or "base_bytes" not in sizes:
        return None
    kept = {"base, in memory": sizes["base_bytes"], "adapter, its file": run.adapter_bytes}
    counts = {"base": sizes["base_parameters"], "trained": sizes["trained_parameters"]}
    charts = (
        bar_chart("Bytes", kept, x="", texts={name: size(count) for name, count in kept.items()}),
        bar_chart(
            "Parameters",
            counts,
            x="",
            texts={name: rounded_count(count) for name, count in counts.items()},
        ),
    )
    caption = "The adapter beside the base that it is kept and loaded with, on one scale."
    return Section(
        title="Adapter size", blocks=[Figure(caption=caption, charts=charts, name="adapter-size")]
    )


def _speed(run: RunRecord) -> Section | None:
    predicted = run.predicted
    blocks: list[Block] = []
    if rows := _measured(run, predicted):
        heading = "Measured, beside what was predicted" if predicted else "Measured"
        columns = ("Quantity", "Predicted", "Measured", "Measured / predicted")
        if not predicted:
            columns, rows = columns[::2], [row[::2] for row in rows]
        blocks.append(Table(caption=f"{heading}.", columns=columns, rows=rows))
    if len(chart := _throughput(run)) > 1:
        one = Series(name="tokens a second", points=chart)
        drawn = line_chart("Throughput", [one], x="step", y="tokens a second")
        caption = "Tokens of the examples over the time of the steps, evaluations not counted."
        blocks.append(Figure(caption=caption, charts=(drawn,), name="throughput"))
    return Section(title="Speed and memory", blocks=blocks) if blocks else None


def _measured(run: RunRecord, predicted: Mapping[str, float]) -> list[tuple[Cell, ...]]:
    found: dict[str, float] = {}
    if seconds := run.total("seconds"):
        found["seconds"] = seconds
        found["tokens_per_second"] = (run.total("tokens") or 0) / seconds
    if run.result and run.result.get("peak_memory"):
        found["peak_memory"] = run.result["peak_memory"]
    if run.adapter_bytes is not None:
        found["adapter_bytes"] = run.adapter_bytes
    rows: list[tuple[Cell, ...]] = []
    for key, (label, shown) in PREDICTED.items():
        if key in found:
            expected = predicted.get(key)
            ratio = f"{found[key] / expected:.2f}" if expected else None
            rows.append(
                (label, None if expected is None else shown(expected), shown(found[key]), ratio)
            )
    tokens, computed = run.total("tokens"), run.total("computed_tokens")
    if tokens and computed:
        text = f"{computed:,.0f} ({percentage(computed, tokens)})"
        rows.append(("Tokens computed (of the examples' own)", None, text, None))
    return rows


def _throughput(run: RunRecord) -> list[tuple[float, float]]:
    """Tokens a second over stretches of steps: single steps are too short to be judged by."""
    totals = [(record["step"], record.get("tokens"), record.get("seconds")) for record in run.train]
    whole = [t for t in totals if isinstance(t[1], (int, float)) and isinstance(t[2], (int, float))]
    every = max(1, len(whole) // 40)
    ends = [(0, 0, 0.0), *whole[every - 1 :: every]]
    return [
        (step, (tokens - tokens0) / (seconds - seconds0))
        for (_, tokens0, seconds0), (step, tokens, seconds) in itertools.pairwise(ends)
        if seconds > seconds0
    ]


def _configuration(run: RunRecord) -> Section:
    text = settings_text(run)
    return Section(
        title="Configuration",
        blocks=[
            Table(
                caption="The settings that say most.",
                columns=("Setting", "Value"),
                rows=main_settings(run),
            ),
            Code(text=text, label="Every setting, defaults too (config.yaml)", folded=True),
        ],
    )


def _origin(run: RunRecord) -> Section:
    blocks: list[Block] = []
    data = run.provenance.get("data")
    if isinstance(data, Mapping) and data:
        rows = [
            (split, about.get("source"), about.get("examples"), about.get("sha256"))
            for split, about in data.items()
            if isinstance(about, Mapping)
        ]
        columns = ("Split", "Source", "Examples", "SHA-256")
        blocks.append(Table(caption="The data that was read.", columns=columns, rows=rows))
    weights = setting(run.base, "weights.exact")
    facts = [
        ("Base model", setting(run.base, "source.name") or run.base_name),
        ("Revision", setting(run.base, "source.revision")),
        ("Class", setting(run.base, "architecture.class_name")),
        ("Weights", setting(run.base, "weights.dtype")),
        ("SHA-256 of the weights", weights),
    ]
    known = [fact for fact in facts if fact[1]]
    blocks.append(Table(caption="The base.", columns=("Fact", "Value"), rows=known))
    if run.sessions:
        last = run.sessions[-1]
        versions = last.get("versions")
        rows = [
            ("Processor", last.get("processor")),
            ("Device", last.get("device")),
            ("Threads", last.get("threads")),
            ("System", last.get("platform")),
            *((versions or {}).items() if isinstance(versions, Mapping) else ()),
        ]
        begun = ", ".join(str(session.get("started", "")) for session in run.sessions)
        times = "once" if len(run.sessions) == 1 else f"{len(run.sessions)} times, the last time"
        caption = f"The machine and its software. The run was started {times} ({begun})."
        shown = [(name, str(value)) for name, value in rows if value is not None]
        blocks.append(Table(caption=caption, columns=("Fact", "Value"), rows=shown))
    if run.command is not None:
        blocks.append(Code(text=run.command, label="The command that made it"))
    again = shlex.join(["lorakit", "train", "--config", str(run.folder / CONFIG)])
    blocks.append(
        Code(
            text=f"{again} --output {shlex.quote(f'{run.folder}-again')}",
            label="The command that repeats it with every setting",
        )
    )
    return Section(title="Data and provenance", blocks=blocks)
