"""The training loop."""

from __future__ import annotations

import time

from lorakit.training import checkpoint
from lorakit.training.config import TrainConfig
from lorakit.training.environment import sizes
from lorakit.training.interruption import Interruption
from lorakit.training.loggers import Loggers
from lorakit.training.memory import give_back, restart_peak
from lorakit.training.optimizer import build_optimizer, clip_gradients, require_finite, set_rate
from lorakit.training.progress import Reporter
from lorakit.training.run_folder import RunResult, open_run
from lorakit.training.setup import prepare
from lorakit.training.validation import validate


def train(config: TrainConfig) -> RunResult:
    """Train an adapter as `config` says; all that comes of it is in the folder ``config.output``.

    The loss of a step is the sum over the targets of all its batches divided by their number, so a step of 4 batches
    of 4 examples is that of one batch of 16. A run that is interrupted, at whatever instant, and resumed ends with the
    same weights as one that is not, bit for bit on a CPU.

    Raises:
        LorakitError: Something the user can mend: settings, data, base model, folder, a diverging loss.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; a checkpoint has been written.
    """
    with open_run(config) as run:
        if (finished := run.result()) is not None:
            return finished
        restart_peak()
        job = prepare(run.config)
        optimizer = build_optimizer(job.parameters, run.config.optimizer, run.config.peak_rate)
        run.claim()
        state = checkpoint.restore(run.checkpoints, job.weights, optimizer, inputs=job.inputs)
        keep = run.config.checkpoints.keep
        run.begin(state, job.device, sizes(job.model, job.parameters))
        with (
            Interruption() as interruption,
            Loggers(run, state) as log,
            Reporter(job, state) as show,
        ):
            if not state.started:
                validate(run, job, state, log, show)
            for groups in job.plan.steps(start=state.step):
                if job.is_over(state) or interruption.requested:
                    break
                began = time.perf_counter()
                batches = [job.collate([job.train[i] for i in group]) for group in groups]
                targets = sum(job.objective.count(batch) for batch in batches)
                loss = 0.0
                for batch in batches:
                    with job.autocast():
                        part = job.objective.loss_sum(job.model, batch) / targets
                    part.backward()
                    loss += part.item()
                rate = set_rate(optimizer, job.rate_factor(state.step))
                norm = clip_gradients(optimizer, run.config.optimizer.clip)
                require_finite(state.step, loss, norm, rate)
                optimizer.step()
                optimizer.zero_grad()
                state.advance(loss, batches, time.perf_counter() - began)
                log.step(state, loss, rate, norm)
                show.step(state, rate)
                if job.evaluates_after(state.step):
                    validate(run, job, state, log, show)
                    give_back()
                if job.saves_after(state.step):
                    checkpoint.save(run.checkpoints, state, job.weights, optimizer, keep=keep)
            checkpoint.save(run.checkpoints, state, job.weights, optimizer, keep=keep)
            if interruption.requested and not job.is_over(state):
                interruption.leave(
                    f"Stopped at step {state.step}. Go on with: {run.resume_command}"
                )
        job.save_adapter(run.adapter, state)
        return run.finish(state, job.device)
