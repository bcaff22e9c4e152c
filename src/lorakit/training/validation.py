"""Evaluation during training: scores, samples, the best adapter, early stopping."""

from __future__ import annotations

import math
from typing import Any

from lorakit.data.examples import evenly_spaced
from lorakit.errors import DivergenceError, LorakitError
from lorakit.evaluation.computed import ALONE, Progress, Workers
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate import Evaluation, generated, held_out
from lorakit.evaluation.inputs import by_prompt
from lorakit.evaluation.score import directions_of, is_better
from lorakit.formatting import counted
from lorakit.training.checkpoint import State
from lorakit.training.divergence import ADVICE
from lorakit.training.events import record_batch_sizes
from lorakit.training.interruption import Interrupted, Interruption
from lorakit.training.job import Job
from lorakit.training.loggers import Loggers
from lorakit.training.progress import Reporter
from lorakit.training.run_folder import RunFolder


def validate(
    run: RunFolder,
    job: Job,
    state: State,
    interruption: Interruption,
    show: Reporter,
    log: Loggers,
) -> None:
    """Score the validation data, and note in `state` whether the adapter is the best so far.

    Without validation data this does nothing. `state` also keeps the scores before the first step for comparison; the
    untrained adapter is never the best. If the run is interrupted, the evaluation ends between two batches and stays
    due.

    Raises:
        DivergenceError: The held-out loss is not finite.
    """
    if not job.scored:
        state.evaluated = True
        return
    try:
        scores, samples, notes = _evaluate(job, interruption)
    except Interrupted:
        return
    except DivergenceError as error:  # which advises another base
        if state.step == 0:
            raise
        raise DivergenceError(
            f"Training diverged at step {state.step}: the held-out loss is not finite. {ADVICE}"
        ) from error

    def record() -> None:
        for sample in samples:
            run.samples.append(step=state.step, **sample)

    job.processes.on_first(record)
    state.evaluated = True
    # A task of the user may score the same texts differently in another process.
    state.scores = job.processes.from_first(scores)
    record_batch_sizes(run, job, state)
    _require_usable(state.scores, job.task.name, job.config.evaluation.metric)
    log.scores(state)
    if state.step == 0:
        state.scores_before = state.scores
    else:
        notes += _compare_with_best(job, state)
    show.scores(state, notes)


def _compare_with_best(job: Job, state: State) -> list[str]:
    """Update the best scores, or the number of evaluations since them and early stopping; return notes for the user."""
    metric = job.config.evaluation.metric
    score, direction = state.scores[metric], directions_of(job.task)[metric]
    best, before = (scores.get(metric) for scores in (state.best_scores, state.scores_before))
    if not is_better(score, best, direction):
        state.without_best += 1
        state.stopped_early = job.is_out_of_patience(state) and state.step < job.step_plan.total
        return []
    state.best_step, state.best_scores, state.without_best = state.step, state.scores, 0
    is_worse = before is not None and is_better(before, score, direction)
    return ["best so far, but worse than before training" if is_worse else "best"]


def _evaluate(
    job: Job, interruption: Interruption
) -> tuple[dict[str, float], list[dict[str, Any]], list[str]]:
    """Return the scores of the validation data, the generated samples, and notes on what was scored."""
    settings, processes, sharded = job.config.evaluation, job.processes, job.config.shard
    workers = Workers(processes.rank, processes.count, interruption.gather)
    # Every pass of a model with sharded weights needs all processes: none may stop early, and all generate all texts.
    progress: Progress = (lambda *_: None) if sharded else interruption.check
    with job.autocast():
        evaluation = held_out(
            job.model,
            job.held_out_objective(),
            job.scored,
            job.collate,
            batch_size=job.evaluation_batch_size,
            task=job.task,
            progress=progress,
            workers=workers,
        )
        notes = [counted(len(job.scored), "example")]
        if not settings.samples:
            return evaluation.scores, [], notes
        sampled = _sample(job, progress, ALONE if sharded else workers)
    cut = f", {sampled.cut} cut at {settings.max_new_tokens} tokens" if sampled.cut else ""
    notes.append(f"texts of {counted(len(sampled.outputs), 'sample')}{cut}")
    return {**evaluation.scores, **sampled.scores}, sampled.outputs, notes


def _require_usable(scores: dict[str, float], task: str, metric: str) -> None:
    """Reject scores without `metric`, and non-finite scores, before the first step at the latest."""
    if metric not in scores:
        raise LorakitError(
            f"The scores of the validation data are {', '.join(scores)}, without {metric}, which evaluation.metric "
            f"names. Return {metric} from the score method of task {task}, or set evaluation.metric to one of these."
        )
    for name, score in scores.items():
        if not math.isfinite(score):
            raise LorakitError(
                f"The {name} of the validation data is {score}. If training has not diverged, fix the scores of task "
                f"{task}: they must be finite for all predictions. Return 0 where {name} is undefined."
            )


def _sample(job: Job, progress: Progress, workers: Workers) -> Evaluation:
    """Generate text for some validation prompts, and score it."""
    settings = job.config.evaluation
    assert job.validation is not None
    groups = by_prompt(job.validation)
    return generated(
        job.base,
        [example for group in evenly_spaced(groups, settings.samples) for example in group],
        Decoding(max_new_tokens=settings.max_new_tokens),
        batch_size=job.evaluation_batch_size,
        task=job.task,
        quick=True,
        progress=progress,
        workers=workers,
    )
