"""Summary sentences and key figures of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.configuration import setting
from lorakit.formatting import duration, number, percentage, rounded_count, size
from lorakit.reporting import measures
from lorakit.reporting.page import KeyFigure, KeyFigures
from lorakit.reporting.run_record import RunRecord
from lorakit.reporting.run_settings import setting_text
from lorakit.training.run_folder import OUT_OF_MEMORY, REWIND

PEOPLE = ("Matthews", "Pearson", "Spearman")
"""Scores that are named after people."""


def subtitle(run: RunRecord) -> str:
    """Return method, base and data on one line."""
    data = setting(run.config, "data.train")
    parts = [run.method, run.base_name, setting_text(data) if data else ""]
    return " · ".join(part for part in parts if part)


def summary(run: RunRecord) -> list[str]:
    """Return the main results in sentences."""
    result, sizes = run.result, run.sizes
    steps = len(run.train) if result is None else result.get("steps", 0)
    seconds = run.total("seconds")
    subject = describe_method(run)
    if "trained_parameters" in sizes:
        trained, base = sizes["trained_parameters"], sizes["base_parameters"]
        subject += (
            f" ({rounded_count(trained)} trained parameters, {percentage(trained, base)} of the base's "
            f"{rounded_count(base)})"
        )
    time = f" in {duration(seconds)}" if seconds else ""
    verb = "has been" if result is None else "was"
    sentences = [f"{subject} {verb} trained for {steps:,} steps on {run.base_name}{time}."]
    if result is None:
        sentences.append("The run is not finished: this report shows its state so far.")
    return [*sentences, *_score_sentences(run), *_event_sentences(run), *_ending(run, steps)]


def describe_method(run: RunRecord) -> str:
    """Return the method with its main setting, as the subject of a sentence."""
    start = run.config.get("from_adapter")
    if start and not run.method:
        return f"The adapter {start}"
    first, *others = run.method.split("+")
    rank = run.methods.get("lora", {}).get("rank")
    if first == "lora" and rank is not None:
        subject = f"A LoRA adapter of rank {rank}{''.join(f' with {name}' for name in others)}"
    else:
        names = {"full": "The whole model", "bitfit": "BitFit: every bias"}
        subject = names.get(run.method, f"The method {run.method}")
    return f"{subject} from {start}" if start else subject


def key_figures(run: RunRecord) -> KeyFigures:
    """Return the most important numbers of a run."""
    figures = []
    before, after = run.scores("before"), run.scores("after")
    for name, value in list(after.items())[:4]:
        old = f"before {number(before[name])}" if name in before else ""
        of = f"on {count}" if (count := run.scored_on(name)) else ""
        label = f"Held-out {in_sentence(measures.score_name(name))}"
        figures.append(
            KeyFigure(label=label, value=number(value), note=", ".join(filter(None, (old, of))))
        )
    if not after and (loss := run.points("train", "loss")):
        figures.append(KeyFigure(label="Training loss, last step", value=number(loss[-1][1])))
    if run.adapter_bytes is not None:
        times = run.sizes.get("base_bytes", 0) / run.adapter_bytes
        # Full fine-tuning writes as much as the base.
        note = f"the base is {times:,.0f} times as large" if times >= 2 else ""
        figures.append(KeyFigure(label="Adapter file", value=size(run.adapter_bytes), note=note))
    if seconds := run.total("seconds"):
        note = f"{run.tokens_per_second:,.0f} tokens a second"
        figures.append(
            KeyFigure(label="Time in training steps", value=duration(seconds), note=note)
        )
    if run.result and (memory := run.result.get("peak_memory")):
        figures.append(KeyFigure(label="Peak memory", value=size(memory)))
    return KeyFigures(figures=tuple(figures))


def _score_sentences(run: RunRecord) -> list[str]:
    before, after = run.scores("before"), run.scores("after")
    sentences = []
    names = [name for name in after if name in before and name != "perplexity"][:4]
    changes = []
    for name in names:
        old, new = before[name], after[name]
        change = f"stayed at {number(new)}"
        if new != old:
            verb = "fell" if new < old else "rose"
            change = f"{verb} from {number(old)} to {number(new)}"
        count = run.scored_on(name)
        of = f" of {count}" if count else ""
        changes.append(f"{in_sentence(measures.score_name(name))}{of} {change}")
    if changes:
        verdicts = {run.better(name, after[name], before[name]) for name in names}
        verdict = ""
        if len(verdicts) == 1:
            verdict = {True: ": better", False: ": worse than before", None: ""}[verdicts.pop()]
        sentences.append(f"On held-out data, {_listed(changes)}{verdict}.")
    if not after and (losses := [value for _, value in run.points("train", "loss")]):
        sentences.append(
            f"The training loss went from {number(losses[0])} to {number(losses[-1])}. Without validation data, "
            "this report cannot show how well the model generalises."
        )
    return sentences


def _event_sentences(run: RunRecord) -> list[str]:
    sentences = []
    for event in run.events:
        step = event.get("step")
        if event.get("event") == OUT_OF_MEMORY:
            sentences.append(
                f"Process {event.get('process')} ran out of memory at step {step}: its {event.get('setting')} was "
                f"{event.get('after')} instead of {event.get('before')} from there on. Without dropout, this "
                "changes the result by rounding only."
            )
        if event.get("event") == REWIND:
            sentences.append(
                f"{event.get('reason')}. The run went back to step {step} and continued with half the learning rate."
            )
    return sentences


def _ending(run: RunRecord, steps: int) -> list[str]:
    sentences = []
    if run.never_improved:
        sentences.append(
            f"No evaluation was better than before training; the best one was at step {run.best_step:,}."
        )
    elif run.best_step is not None and run.best_step != steps:
        advice = "" if run.is_deleted else ": prefer the adapter in best/"
        sentences.append(
            f"The best validation score was at step {run.best_step:,}, before the end{advice}."
        )
    if (run.result or {}).get("stopped_early"):
        sentences.append("Training stopped early because the validation score no longer improved.")
    if run.is_deleted:
        sentences.append("The trained weights were deleted.")
    return sentences


def in_sentence(name: str) -> str:
    """Return a name for use inside a sentence: "loss", but "BLEU" and names of people stay capitalised."""
    is_proper = name[:2].isupper() or name.startswith(PEOPLE)
    return name if is_proper else name[0].lower() + name[1:]


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + parts[-1]
