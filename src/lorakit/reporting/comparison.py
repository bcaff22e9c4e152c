"""The page that compares runs: their scores, curves, costs, samples and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.configuration import flat_settings
from lorakit.formatting import duration, number, size
from lorakit.methods.registry import unused_settings
from lorakit.reporting import measures
from lorakit.reporting.page import Block, Cell, Code, Page, Samples, Section, Table, sample
from lorakit.reporting.run_record import RunRecord
from lorakit.reporting.run_report import SHOWN_SAMPLES, curves_figure, loss_chart
from lorakit.reporting.run_settings import setting_text, settings_text
from lorakit.reporting.run_summary import subtitle
from lorakit.reporting.texts import plain


def comparison_page(runs: Sequence[RunRecord], *, analysis: Sequence[Section] = ()) -> Page:
    """Return the page that compares runs.

    Args:
        runs: Two runs or more.
        analysis: Sections about their adapters.
    """
    runs = _distinct(runs)
    sections = [
        Section(title="Scores", blocks=[_scores(runs)]),
        Section(title="Curves", blocks=_curves(runs)),
        Section(title="Cost", blocks=[_costs(runs)]),
        Section(title="Samples", blocks=_samples(runs)),
        *analysis,
        Section(title="Settings", blocks=_settings(runs)),
        Section(
            title="Commands",
            blocks=[Code(text=r.command, label=r.name) for r in runs if r.command is not None],
        ),
    ]
    return Page(
        kind="Comparison of training runs",
        title=" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        subtitle="; ".join(dict.fromkeys(subtitle(run) for run in runs)),
        summary=_summary(runs),
        sections=sections,
    )


def _distinct(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Label the runs with different names: prefix equal names with parent folders until they differ."""
    paths = [run.folder.resolve().parts for run in runs]
    names = [run.name for run in runs]
    for count in range(2, max(map(len, paths)) + 1):
        names = [
            str(Path(*path[-count:])) if names.count(name) > 1 else name
            for path, name in zip(paths, names, strict=True)
        ]
    return [dataclasses.replace(run, label=name) for run, name in zip(runs, names, strict=True)]


def _summary(runs: Sequence[RunRecord]) -> list[str]:
    """Return the best run of each score, as far as the runs are comparable, and what differs between them."""
    digests, (_, counts) = {run.validation_data for run in runs}, _scored("loss", runs)
    same_data = len(digests - {None}) < 2 and len({*counts} - {""}) < 2
    differences, ranked = _differences(runs), _score_names(runs)
    other_tokens = "perplexity" in ranked and _have_other_tokens(runs)
    if other_tokens:
        ranked = [name for name in ranked if name != "loss"]
    sentences = []
    if same_data and differences.keys() - {"seed"}:
        sentences = [text for name in ranked if (text := _best(name, runs))]
    if sentences:
        sentences.append(
            "This page cannot show whether a difference between two runs exceeds chance: that requires several seeds "
            "of each."
        )
    if differences:
        shown = ", ".join(list(differences)[:6]) + (" and more" if len(differences) > 6 else "")
        sentences.append(f"The runs differ in {shown}.")
    else:
        sentences.append("The runs have the same settings.")
    if not same_data:
        sentences.append(
            "Their validation data differs: scores on different data are not comparable."
        )
    elif other_tokens:
        sentences.append("Their losses may be means over different tokens, so they are not ranked.")
    if unfinished := [run.name for run in runs if run.result is None]:
        sentences.append(f"Not finished, with the scores so far: {', '.join(unfinished)}.")
    elif differences.keys() == {"seed"} and len({run.data_digests for run in runs}) == 1:
        sentences.append("So differences between their scores are chance.")
    return sentences


def _have_other_tokens(runs: Sequence[RunRecord]) -> bool:
    """Return whether the losses of texts are means over other tokens, as those of other tokenizers and templates."""
    parts = zip(*(run.tokens_of_loss for run in runs), strict=True)
    return any(len({str(value) for value in part if value is not None}) > 1 for part in parts)


def _best(name: str, runs: Sequence[RunRecord]) -> str:
    """Return the sentence that names the best run of a score; "" if the runs are not comparable.

    They are if they are scored on the same number of examples, and if the score has one known direction in all.
    """
    scored, counts = _scored(name, runs)
    if len(scored) < 2 or name == "perplexity" or len(counts) > 1 or "" in counts:
        return ""
    direction, *others = {run.directions.get(name) for run in scored}
    if direction is None or others:
        return ""
    ranked = sorted(scored, key=lambda run: run.scores("after")[name], reverse=direction == "max")
    first, second = (run.scores("after")[name] for run in ranked[:2])
    if first == second:
        return ""
    return (
        f"{measures.score_name(name)} of {counts[0]} is best in {ranked[0].name} ({number(first)}), followed by "
        f"{ranked[1].name} ({number(second)})."
    )


def _scored(name: str, runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Return the runs that have a score, and the different numbers of examples that it is of."""
    scored = [run for run in runs if name in run.scores("after")]
    return scored, list(dict.fromkeys(run.scored_on(name) for run in scored))


def _scores(runs: Sequence[RunRecord]) -> Table:
    rows: list[list[Cell]] = []
    for name in _score_names(runs):
        _, counts = _scored(name, runs)
        of = counts[0] if len(counts) == 1 else " / ".join(count or "?" for count in counts)
        for time in ("before", "after"):
            values = [run.scores(time).get(name) for run in runs]
            rows.append([f"{measures.score_name(name)}, {time}", of, *values])
    caption = "Scores on the validation data of each run, before and after training."
    return Table(caption=caption, columns=("Score", "Of", *(run.name for run in runs)), rows=rows)


def _curves(runs: Sequence[RunRecord]) -> list[Block]:
    metrics = [
        ("train", "loss"),
        *(("validation", n) for n in _score_names(runs)),
        ("train", "learning_rate"),
    ]
    return curves_figure(
        [loss_chart(runs, split, name) for split, name in metrics if name != "perplexity"],
        "Over the optimizer's steps. Training curves of 40 steps and more are running means.",
    )


def _costs(runs: Sequence[RunRecord]) -> Table:
    quantities: dict[str, Callable[[RunRecord], Cell]] = {
        "Steps": lambda run: (run.result or {}).get("steps", len(run.train)),
        "Time in training steps": lambda run: duration(run.total("seconds") or 0),
        "Tokens a second": _speed,
        "Peak memory": lambda run: size(run.result["peak_memory"]) if run.result else None,
        "Trained parameters": lambda run: run.sizes.get("trained_parameters"),
        "Adapter file": _adapter_file,
        "Processor": _machine,
    }
    rows = [[name, *map(value, runs)] for name, value in quantities.items()]
    caption = (
        "The cost of each run. Times are comparable only on the same machine under the same load."
    )
    return Table(caption=caption, columns=("Quantity", *(run.name for run in runs)), rows=rows)


def _speed(run: RunRecord) -> str | None:
    return None if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"


def _adapter_file(run: RunRecord) -> str | None:
    if run.is_deleted:
        return "deleted"
    return size(run.adapter_bytes) if run.adapter_bytes else None


def _machine(run: RunRecord) -> str | None:
    if not run.sessions:
        return None
    last = run.sessions[-1]
    device = last.get("device")
    return str(last.get("processor") if device == "cpu" else device)


def _samples(runs: Sequence[RunRecord]) -> list[Block]:
    last = [{str(record.get("prompt")): record for record in run.last_samples} for run in runs]
    shared = [prompt for prompt in last[0] if all(prompt in records for records in last)]
    if not shared:
        return []
    samples = []
    for prompt in shared[:SHOWN_SAMPLES]:
        answers = [
            (run.name, plain(str(records[prompt].get("output", ""))))
            for run, records in zip(runs, last, strict=True)
        ]
        references = last[0][prompt].get("references")
        if isinstance(references, list) and references:
            answers.append(("Reference", plain(str(references[0]))))
        samples.append(sample(last[0][prompt], answers))
    caption = f"{len(samples)} of {len(shared)} validation prompts that all runs share, at their last evaluation."
    return [Samples(caption=caption, samples=tuple(samples))]


def _settings(runs: Sequence[RunRecord]) -> list[Block]:
    blocks: list[Block] = []
    if differences := _differences(runs):
        rows = [(name, *map(setting_text, values)) for name, values in differences.items()]
        columns = ("Setting", *(run.name for run in runs))
        blocks.append(Table(caption="Settings that differ.", columns=columns, rows=rows))
    blocks += [
        Code(text=settings_text(run), label=f"All settings of {run.name}", folded=True)
        for run in runs
    ]
    return blocks


def _differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the values of each setting that differs, by dotted name."""
    flat = [flat_settings(run.config) for run in runs]
    differences = {}
    for name in dict.fromkeys(name for settings in flat for name in settings):
        values = [_effective(name, settings, run) for settings, run in zip(flat, runs, strict=True)]
        configured = values if name == "method" else [settings.get(name) for settings in flat]
        known = [value for value in values if value != _OF_ADAPTER]
        # A setting with one value in all configurations is no difference because some runs do not use it.
        if name != "output" and _vary(configured) and _vary(known):
            differences[name] = values
    return differences


def _vary(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


_OF_ADAPTER = "as in from_adapter"
"""Value of a setting that the adapter brings from which a run starts."""


def _effective(name: str, settings: Mapping[str, Any], run: RunRecord) -> Any:
    """Return the value of a setting, or words if it has no effect. `settings` are those of the run by dotted name."""
    if name.split(".")[0] not in unused_settings(run.config):
        return settings.get(name)
    if run.config.get("from_adapter") is None:
        return "unused"
    return (run.method if name == "method" else "") or _OF_ADAPTER


def _score_names(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.scores("after")))
