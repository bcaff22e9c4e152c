"""Evaluation during training: scores, samples, the best adapter, early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorakit.data.examples import evenly_spaced
from lorakit.errors import DivergenceError, LorakitError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate import Evaluation, generated, held_out
from lorakit.evaluation.inputs import by_prompt
from lorakit.evaluation.score import directions_of, is_better
from lorakit.formatting import counted
from lorakit.training.checkpoint import State
from lorakit.training.divergence import ADVICE
from lorakit.training.events import record_batch_sizes
from lorakit.training.interruption import Interrupted, Interruption
from lorakit.training.loggers import Loggers
from lorakit.training.progress import Reporter
from lorakit.training.run_folder import RunFolder
from lorakit.training.setup import Job


def validate(
    run: RunFolder,
    job: Job,
    state: State,
    log: Loggers,
    show: Reporter,
    interruption: Interruption,
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
        scores, notes = _scores(run, job, state.step, interruption)
    except Interrupted:
        return
    except DivergenceError as error:  # which advises another base
        if state.step == 0:
            raise
        raise DivergenceError(
            f"Training diverged at step {state.step}: the held-out loss is not finite. {ADVICE}"
        ) from error
    state.evaluated = True
    settings = job.config.evaluation
    # A task of the user may score the same texts differently in another process.
    state.scores = job.processes.from_first(scores)
    record_batch_sizes(run, job, state)
    _require_usable(state.scores, job.task.name, settings.metric)
    log.scores(state)
    if state.step == 0:
        state.scores_before = state.scores
        show.scores(state, notes)
        return
    best, before = (s.get(settings.metric) for s in (state.best_scores, state.scores_before))
    score, direction = state.scores[settings.metric], directions_of(job.task)[settings.metric]
    if is_better(score, best, direction):
        is_worse = before is not None and is_better(before, score, direction)
        notes.append("best so far, but worse than before training" if is_worse else "best")
        state.best_step, state.best_scores, state.without_best = state.step, state.scores, 0
    else:
        state.without_best += 1
        state.stopped_early = job.is_out_of_patience(state) and state.step < job.step_plan.total
    show.scores(state, notes)


def _scores(
    run: RunFolder, job: Job, step: int, interruption: Interruption
) -> tuple[dict[str, float], list[str]]:
    """Return the scores of the validation data, and what they are of."""
    settings, share = job.config.evaluation, _share_of(job, interruption)
    with job.autocast():
        evaluation = held_out(
            job.model,
            job.held_out_objective(),
            job.scored,
            job.collate,
            batch_size=job.evaluation_batch_size,
            task=job.task,
            **share,
        )
        scores = evaluation.scores
        notes = [counted(len(job.scored), "example")]
        if settings.samples:
            sampled = _sample(run, job, step, {} if job.config.shard else share)
            scores = {**scores, **sampled.scores}
            cut = f", {sampled.cut} cut at {settings.max_new_tokens} tokens" if sampled.cut else ""
            notes.append(f"texts of {counted(len(sampled.outputs), 'sample')}{cut}")
    return scores, notes


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


def _sample(run: RunFolder, job: Job, step: int, share: Mapping[str, Any]) -> Evaluation:
    """Generate text for some validation prompts, record it in samples.jsonl, and score it.

    The processes share the prompts. If the weights are sharded, all generate the same texts.
    """
    settings = job.config.evaluation
    assert job.validation is not None
    groups = by_prompt(job.validation)
    evaluation = generated(
        job.base,
        [example for group in evenly_spaced(groups, settings.samples) for example in group],
        Decoding(max_new_tokens=settings.max_new_tokens),
        batch_size=job.evaluation_batch_size,
        task=job.task,
        quick=True,
        **share,
    )

    def record() -> None:
        for output in evaluation.outputs:
            run.samples.append(step=step, **output)

    job.processes.on_first(record)
    return evaluation


def _share_of(job: Job, interruption: Interruption) -> dict[str, Any]:
    """Return the arguments of an evaluation that all processes share, and that a signal ends."""
    processes = job.processes
    share = {"rank": processes.rank, "count": processes.count, "gather": interruption.gather}
    # Every pass of a model whose weights are sharded needs all processes, so none may leave one out.
    return share if job.config.shard else {**share, "progress": interruption.check}
