"""The training loop."""

from __future__ import annotations

import time

from lorakit.training import checkpoint
from lorakit.training.checkpoint import State
from lorakit.training.config import TrainConfig
from lorakit.training.environment import sizes
from lorakit.training.interruption import Interruption
from lorakit.training.loggers import Loggers
from lorakit.training.memory import release_free_memory, reset_peak_memory
from lorakit.training.optimizer import build_optimizer
from lorakit.training.progress import Reporter
from lorakit.training.run_folder import RunResult, open_run
from lorakit.training.setup import Job, prepare
from lorakit.training.step import optimizer_step
from lorakit.training.validation import validate


def train(config: TrainConfig) -> RunResult:
    """Train an adapter and write all results to the folder ``config.output``.

    A run can be interrupted at any instant and resumed: it reaches the same weights as an uninterrupted run, bit for
    bit on a CPU.

    Raises:
        LorakitError: The settings, the data, the base model or the folder are invalid, or the loss diverges.
        KeyboardInterrupt, SystemExit: The run received SIGINT (Ctrl-C) or SIGTERM, and has written a checkpoint.
    """
    with open_run(config) as run:  # run.config has the resolved dtype and learning rate
        if (finished := run.result()) is not None:
            return finished
        reset_peak_memory()
        job = prepare(run.config)
        optimizer = build_optimizer(job.parameters, run.config.optimizer, run.config.peak_rate)
        # The run folder changes only from here on: a run that fails in `prepare` leaves an old run intact.
        run.claim()
        # Without a checkpoint this is a new state.
        state = checkpoint.restore(run.checkpoints, job.weights, optimizer, inputs=job.inputs)
        keep = run.config.checkpoints.keep
        run.begin(state, job.device, sizes(job.model, job.parameters))
        with (
            Interruption() as interruption,
            Loggers(run, state) as log,
            Reporter(job, state) as show,
        ):
            if run.dtype_reason:
                show.say(f"dtype     {run.config.base.dtype}: {run.dtype_reason}")
            if run.extends:
                show.say(f"schedule  {_extension(job, state, run.extends)}")
            if not state.started:
                validate(run, job, state, log, show)
            for batches_of_indices in job.step_plan.steps(start=state.step):
                if job.is_over(state) or interruption.requested:
                    break
                began, processor_began = time.perf_counter(), time.process_time()
                batches = [
                    job.collate([job.train[i] for i in indices]) for indices in batches_of_indices
                ]
                loss, rate, norm = optimizer_step(job, optimizer, batches, state.step)
                state.advance(
                    loss,
                    batches,
                    time.perf_counter() - began,
                    time.process_time() - processor_began,
                )
                log.step(state, loss, rate, norm)
                show.step(state, rate)
                if job.evaluates_after(state.step):
                    validate(run, job, state, log, show)
                    release_free_memory()
                if job.saves_after(state.step):
                    checkpoint.save(run.checkpoints, state, job.weights, optimizer, keep=keep)
            checkpoint.save(run.checkpoints, state, job.weights, optimizer, keep=keep)
            if interruption.requested and not job.is_over(state):
                interruption.exit(
                    f"Stopped at step {state.step}. Resume with: {run.resume_command}"
                )
        job.save_adapter(run.adapter, state)
        return run.finish(state, job.device)


def _extension(job: Job, state: State, replaced: str) -> str:
    """Return how the learning rate continues in a run with more steps than before."""
    total, schedule = job.step_plan.total, job.config.optimizer.schedule
    rate = job.config.peak_rate * job.rate_factor(state.step)
    text = f"{schedule} over {total} steps, instead of {replaced}; the next step has the rate {rate:.2e}"
    if schedule == "constant":
        return f"{text}."
    return (
        f"{text}. The first {state.step} steps followed the shorter schedule, so the result differs from that of a "
        f"new run of {total} steps."
    )
