"""The training loop."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

from lorakit.errors import ConfigurationError, DivergenceError, LorakitError, memory_errors
from lorakit.evaluation.score import directions_of
from lorakit.models.devices import pick_device
from lorakit.models.float32_products import faster_float32
from lorakit.training import checkpoint
from lorakit.training.checkpoint import State
from lorakit.training.config import TrainConfig
from lorakit.training.distributed import Processes, joined
from lorakit.training.divergence import (
    MOST_REWINDS,
    SLOWDOWN,
    last_good_step,
    require_finite_weights,
    require_no_explosion,
    step_to_keep,
)
from lorakit.training.environment import sizes
from lorakit.training.events import adopt_batch_sizes, record_batch_sizes, record_rewind
from lorakit.training.interruption import Interrupted, Interruption
from lorakit.training.job import Job
from lorakit.training.loggers import Loggers, require_loggers
from lorakit.training.memory import reset_peak_memory, trim_heap
from lorakit.training.noise import own_generators
from lorakit.training.opening import open_run
from lorakit.training.optimizer import set_rate, slow_down
from lorakit.training.progress import Reporter
from lorakit.training.run_folder import RunFolder, RunResult
from lorakit.training.setup import prepare, step_plan_of
from lorakit.training.sharding import gather_in_first, gathering
from lorakit.training.step import optimizer_step
from lorakit.training.validation import validate

_LOG = logging.getLogger(__name__)


def train(config: TrainConfig) -> RunResult:
    """Train an adapter and write all results to the folder ``config.output``.

    A run can be interrupted at any instant and resumed: it reaches the same weights as an uninterrupted run, bit for
    bit on a CPU. `torchrun` starts it in several processes, which share each step and reach the same weights up to
    rounding where no dropout is set. A run seeds the global random generators, so a process should run one at a time.
    They end in the states that they had before.

    Raises:
        LorakitError: The settings, the data, the base model or the folder are invalid, or the loss diverges.
        KeyboardInterrupt, SystemExit: The run received SIGINT (Ctrl-C), or SIGTERM or SIGHUP (a closed terminal), and
            has written a checkpoint.
    """
    with (
        joined(config.base.device, timedelta(minutes=config.processes_timeout)) as processes,
        gathering(processes),
        own_generators(config.seed, pick_device(config.base.device)),
        open_run(config, processes) as run,  # run.config has the resolved dtype and learning rate
        _faster_products(config),
    ):
        if (finished := processes.on_first(run.result)) is not None:
            return finished
        processes.on_first(lambda: require_loggers(config.loggers))
        reset_peak_memory()
        job, state = _start(run, processes)
        if state.is_best:
            job.save_adapter(run.best, state)
        with (
            Interruption(processes) as interruption,
            Reporter(job, state) as show,
            Loggers(run, state, processes) as log,
        ):
            if run.dtype_reason:
                show.say(f"dtype     {run.config.base.dtype}: {run.dtype_reason}")
            if run.extends:
                show.say(f"schedule  {_extension(job, state, run.extends)}")
            while True:
                try:
                    _train_to_end(run, job, state, interruption, show, log)
                    break
                except DivergenceError as error:
                    state = _rewind(run, job, state, error)
                    show.restart(state)
                    log.restart(state)
        if interruption.requested and not job.is_over(state):
            # After the live line, which wraps what is printed beside it: the command stays on one line.
            interruption.exit(
                f"Stopped at step {state.step}. Resume with resume=True in Python, or with:\n"
                f"{run.resume_command(processes)}"
            )
        job.save_adapter(run.adapter, state)
        return processes.on_first(lambda: run.finish(state, job.device))


def _faster_products(config: TrainConfig) -> AbstractContextManager[None]:
    """Return `faster_float32` for a run on a CPU.

    Not with `compile`: torch.compile reads the setting that `faster_float32` changes, and then raises an error.
    """
    if config.compile or pick_device(config.base.device).type != "cpu":
        return nullcontext()
    return faster_float32()


def _train_to_end(
    run: RunFolder,
    job: Job,
    state: State,
    interruption: Interruption,
    show: Reporter,
    log: Loggers,
) -> None:
    """Train from `state`, which this changes, to the last step, or until the run is interrupted."""
    if not state.evaluated:  # a new run, or an interruption before or in an evaluation
        with _kept_weights(run, job, state):
            validate(run, job, state, interruption, show, log)
        if state.is_best and not job.is_over(state):
            _save_checkpoint(run, job, state)
    if state.step == 0 and job.config.optimizer.on_divergence == "rewind":
        _save_checkpoint(run, job, state)
    for examples in job.step_plan.steps(start=state.step):
        if job.is_over(state) or interruption.requested:
            break
        job.processes.set_stage(f"step {state.step + 1}")
        began, processor_began = time.perf_counter(), time.process_time()
        try:
            done = optimizer_step(job, examples, state.step, interruption)
        except Interrupted:  # the resumed run repeats the step
            break
        except LorakitError as error:
            # An example does not fit into memory. With gradient_checkpointing the run can go on from here.
            is_alone = job.processes.count == 1
            if state.step and is_alone and not isinstance(error, DivergenceError):
                _save_checkpoint(run, job, state)
            raise
        interruption.agree(done.signals)
        state.advance(
            done.loss,
            tokens=done.tokens,
            computed_tokens=done.computed_tokens,
            seconds=time.perf_counter() - began,
            processor_seconds=time.process_time() - processor_began,
        )
        log.step(state, done)
        show.step(state, done.rate)
        if done.halved:
            record_batch_sizes(run, job, state)
        require_no_explosion(state, job.config.optimizer.explosion)
        state.evaluated = not job.evaluates_after(state.step)
        # Little time may be left after a signal: the resumed run evaluates.
        if not state.evaluated and not interruption.requested:
            # An evaluation can take long, and fail.
            if job.saves_after(state.step):
                _save_checkpoint(run, job, state)
            with _kept_weights(run, job, state):
                validate(run, job, state, interruption, show, log)
            trim_heap()
        if interruption.requested:
            break
        if (job.saves_after(state.step) or state.is_best) and not job.is_over(state):
            _save_checkpoint(run, job, state)
    job.processes.set_stage("the end of the run")
    _save_checkpoint(run, job, state)


@contextmanager
def _kept_weights(run: RunFolder, job: Job, state: State) -> Iterator[None]:
    """Write the trained adapter to adapter/ if an evaluation inside the block fails, in a run of one process.

    A run cannot resume with a changed file of its task, but a new one can start from the adapter.
    """
    try:
        yield
    except DivergenceError:
        raise
    except Exception:
        if state.step and job.processes.count == 1:  # others could not take part
            job.save_adapter(run.adapter, dataclasses.replace(state, scores={}))
        raise


def _start(run: RunFolder, processes: Processes) -> tuple[Job, State]:
    """Prepare a run, and restore its newest checkpoint; without one, the state is a new one."""
    resumes = not run.config.overwrite and _has_checkpoint(run, processes)
    with memory_errors():  # `joined` tells the other processes
        job = prepare(run.config, processes, resumes=resumes)
        _require_longer(run, job)
        state = State(inputs=job.inputs)
    processes.require_same({"computation": job.computation.note})
    if resumes:
        state = _restore(run, job)
    _require_patience(run, job, state)
    slow_down(job.optimizer, SLOWDOWN**state.rewinds)
    adopt_batch_sizes(job, state)
    model_sizes, directions = sizes(job.model, job.parameters), directions_of(job.task)
    # The run folder changes only from here on: a run that fails above leaves an old run intact.
    processes.on_first(
        lambda: run.begin(state, job.device, model_sizes, directions, processes=processes.count)
    )
    return job, state


def _require_longer(run: RunFolder, job: Job) -> None:
    """Reject a `max_steps` below the number of steps that `epochs` gave to the run before."""
    if not run.extends.startswith("epochs"):
        return
    before = step_plan_of(dataclasses.replace(run.config, max_steps=None), job.train).total
    if job.step_plan.total < before:
        raise ConfigurationError(
            f"max_steps is {job.step_plan.total}, but the run in {run.path} has {run.extends}, which is {before} "
            "steps. A resumed run can only have more steps: raise max_steps, or start a new run."
        )


def _require_patience(run: RunFolder, job: Job, state: State) -> None:
    """Reject more steps for a run whose last evaluation would have stopped a longer run early."""
    if run.extends and job.is_out_of_patience(state) and job.evaluates_after(state.step):
        raise ConfigurationError(
            f"A longer run would have stopped early (evaluation.patience) at step {state.step}, where the run in "
            f"{run.path} ended. Start a new run from its weights with from_adapter."
        )


def _rewind(run: RunFolder, job: Job, diverged: State, error: DivergenceError) -> State:
    """Restore the newest checkpoint from before the run diverged, and continue with half the learning rate.

    Raises:
        DivergenceError: The settings are to stop, or there is no such checkpoint, or the run went back too often.
    """
    settings = job.config.optimizer
    if settings.on_divergence == "stop":
        raise error
    if diverged.rewinds == MOST_REWINDS:
        raise DivergenceError(
            f"{error} The run has gone back to a checkpoint {MOST_REWINDS} times, and now stops."
        ) from error
    last_good = last_good_step(diverged, settings.explosion)
    if not job.processes.on_first(lambda: checkpoint.delete_after(run.checkpoints, last_good)):
        raise DivergenceError(f"{error} No checkpoint is old enough to go back to.") from error
    job.optimizer.zero_grad()
    _has_checkpoint(run, job.processes)
    state = _restore(run, job)
    slow_down(job.optimizer, SLOWDOWN)
    rate = job.config.peak_rate * SLOWDOWN ** (diverged.rewinds + 1)
    line = record_rewind(state, diverged, error, rate)
    _save_checkpoint(run, job, state)
    job.processes.on_first(lambda: run.return_to(state))
    if job.processes.is_first:
        _LOG.warning("%s", line)
    return state


def _has_checkpoint(run: RunFolder, processes: Processes) -> bool:
    """Return whether the run has a checkpoint.

    Raises:
        ConfigurationError: Processes see different checkpoints, because they do not share the run folder.
    """
    found = checkpoint.checkpoints_in(run.checkpoints)
    processes.require_same({"newest checkpoint": str(found[-1]) if found else None})
    return bool(found)


def _restore(run: RunFolder, job: Job) -> State:
    """Restore the newest checkpoint in all processes."""
    with job.processes.together():
        state = checkpoint.restore(run.checkpoints, job.weights, job.optimizer, inputs=job.inputs)
    job.processes.require_same({"step": state.step, "train_loss": state.train_loss})
    return state


def _save_checkpoint(run: RunFolder, job: Job, state: State) -> None:
    """Write a checkpoint in the first process, then its adapter to best/ if it is the best so far.

    In this order a kill in between loses nothing: a resumed run writes best/ from the checkpoint.

    Raises:
        DivergenceError: A weight is not finite, in all processes.
    """
    require_finite_weights(state.step, job.weights, job.processes)
    rewinds = job.config.optimizer.on_divergence == "rewind"
    old = step_to_keep(state.step) if rewinds else None
    weights, of_optimizer = (
        gather_in_first(tensors, job.processes)
        for tensors in (job.weights, checkpoint.optimizer_tensors(job.optimizer))
    )

    def write() -> None:
        run.metrics.sync()
        run.samples.sync()
        checkpoint.save(
            run.checkpoints,
            state,
            weights,
            of_optimizer,
            keep=job.config.checkpoints.keep,
            old=old,
        )

    job.processes.on_first(write)
    if state.is_best:
        job.save_adapter(run.best, state)


def _extension(job: Job, state: State, replaced: str) -> str:
    """Return how the learning rate continues in a run with more steps than before."""
    total, schedule = job.step_plan.total, job.config.optimizer.schedule
    rate = set_rate(job.optimizer, job.rate_factor(state.step))
    text = f"{schedule} over {total} steps, instead of {replaced}; the next step has the rate {rate:.2e}"
    if schedule == "constant" or state.step == 0:
        return f"{text}."
    return (
        f"{text}. The first {state.step} steps followed the shorter schedule, so the result differs from that of a "
        f"new run of {total} steps."
    )
