"""What goes wrong in a run and does not end it, for its checkpoints and its report."""

from __future__ import annotations

from lorakit.errors import DivergenceError
from lorakit.training.checkpoint import State
from lorakit.training.job import Job
from lorakit.training.run_folder import OUT_OF_MEMORY, REWIND, RunFolder

SETTINGS = ("batch_size", "evaluation.batch_size")
"""Sizes that are halved when memory runs out, in the order of `State.batch_sizes`."""


def adopt_batch_sizes(job: Job, state: State) -> None:
    """Continue with the batch sizes that were halved before, because memory had run out.

    If the number of processes has changed or the weights are sharded, every process takes the smallest sizes: with
    sharded weights, all processes must run equally many passes.
    """
    stored, rank = state.batch_sizes, job.processes.rank
    alike = job.config.shard or len(stored) != job.processes.count
    before = range(len(stored)) if alike else [rank]
    for number, (setting, batch_size) in enumerate(
        zip(SETTINGS, (job.batch_size, job.evaluation_batch_size), strict=True)
    ):
        # Of any process: an event records the rank in its session, which may have had another number of processes.
        if any(
            event["event"] == OUT_OF_MEMORY and event["setting"] == setting
            for event in state.events
        ):
            fitted = min(stored[process][number] for process in before)
            batch_size.size = min(batch_size.configured, fitted)
    state.batch_sizes = _batch_sizes(job)


def record_batch_sizes(run: RunFolder, job: Job, state: State) -> None:
    """Record which processes have run out of memory since the last call. All processes must call this."""
    before, state.batch_sizes = state.batch_sizes, _batch_sizes(job)
    if state.batch_sizes == before:
        return
    for process, sizes in enumerate(zip(before, state.batch_sizes, strict=True)):
        for setting, old, new in zip(SETTINGS, *sizes, strict=True):
            if old != new:
                event = {"process": process, "setting": setting, "before": old, "after": new}
                state.events.append({"event": OUT_OF_MEMORY, "step": state.step, **event})
    job.processes.on_first(lambda: run.write_events(state))


def record_rewind(state: State, diverged: State, error: DivergenceError, rate: float) -> str:
    """Copy batch sizes, best score and events of the diverged run to the restored state, and count the rewind.

    `rate` is the new peak learning rate. Return a line for the user.
    """
    state.rewinds = diverged.rewinds + 1
    state.batch_sizes = diverged.batch_sizes
    # best/ has this adapter, also if it is from a step that no longer exists.
    state.best_step, state.best_scores = diverged.best_step, diverged.best_scores
    reason = str(error).split(". ")[0]
    event = {"from_step": diverged.step, "learning_rate": rate, "reason": reason}
    state.events = [*diverged.events, {"event": REWIND, "step": state.step, **event}]
    return (
        f"{reason}. Back to step {state.step}, with half the learning rate: {rate:.3g} at its peak."
    )


def _batch_sizes(job: Job) -> list[list[int]]:
    return job.processes.gather([job.batch_size.size, job.evaluation_batch_size.size])
