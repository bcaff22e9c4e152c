"""Progress of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.formatting import counted, duration, number, size, visible
from lorakit.models.dtypes import dtype_name
from lorakit.training.checkpoint import State
from lorakit.training.job import TRAINED, Job
from lorakit.training.memory import peak_memory
from lorakit.training.sharding import sharding_note
from lorakit.training.terminal import error_output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL = 10.0
"""Seconds between plain lines, so that a log file stays small."""

BAR, BAR_TERMINAL = 24, 110
"""Columns of the bar, and of the narrowest terminal that has room for it beside the numbers."""


class Reporter:
    """Shows loss, learning rate, tokens per second, time left and peak memory while entered, in the first process."""

    def __init__(self, job: Job, state: State) -> None:
        self._lines = first_lines(job)
        self._total, self._device = job.step_plan.total, job.device
        self._start = dataclasses.replace(state)
        self._console = _console(quiet=not job.processes.is_first)
        self._shown = time.monotonic()
        self._live: Progress | None = None
        self._task: TaskID

    def __enter__(self) -> Reporter:
        for line in self._lines:
            self.say(line)
        if self._start.step:
            self.say(f"resumed after step {self._start.step} of {self._total}")
        if self._console.is_terminal and not self._console.quiet:
            from rich.progress import BarColumn, Progress, TextColumn

            bar = [BarColumn(bar_width=BAR)] if self._console.width >= BAR_TERMINAL else []
            self._live = Progress(*bar, TextColumn("{task.description}"), console=self._console)
            self._live.start()
            step = self._start.step
            text = f"step {step}/{self._total}"
            self._task = self._live.add_task(text, total=self._total, completed=step)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def restart(self, state: State) -> None:
        """Measure speed and time left from `state` on."""
        self._start = dataclasses.replace(state)

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self._console.print(visible(text, keep="\n"), highlight=False, markup=False, soft_wrap=True)

    def step(self, state: State, rate: float) -> None:
        """Show a finished step."""
        now = time.monotonic()
        last = state.step == self._total
        if self._live is None and now - self._shown < PLAIN_INTERVAL and not last:
            return
        self._shown = now
        assert state.train_loss is not None  # a step is finished
        # Excludes evaluations, which would distort the speed and the time left.
        seconds = max(state.seconds - self._start.seconds, 1e-9)
        speed = (state.tokens - self._start.tokens) / seconds
        left = (self._total - state.step) * seconds / max(state.step - self._start.step, 1)
        parts = [
            f"step {state.step}/{self._total}",
            f"loss {number(state.train_loss)}",
            f"{duration(left)} left",
            f"{speed:,.0f} tokens/s",
            f"rate {rate:.2e}",
            size(peak_memory(self._device)),
        ]
        if self._live is None:
            self.say("  ".join(parts))
            return
        room = self._console.width - (BAR + 1 if len(self._live.columns) > 1 else 0)
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts.pop()  # the most important come first
        self._live.update(self._task, completed=state.step, description="  ".join(parts))

    def scores(self, state: State, notes: Sequence[str]) -> None:
        """Show the scores of an evaluation, and notes on them."""
        text = "  ".join(f"{name} {number(value)}" for name, value in state.scores.items())
        self.say(f"step {state.step}/{self._total}  validation: {text}  ({', '.join(notes)})")


def _console(*, quiet: bool) -> Console:
    """Return a console on standard error, which is no terminal in a notebook."""
    # rich draws from Python's generator when it is imported. A run restores the state of that generator.
    from rich.console import Console

    console = Console(stderr=True, file=error_output(), quiet=quiet)
    if console.is_jupyter:  # rich would display each line as an output of its own
        console = Console(file=console.file, quiet=quiet, force_jupyter=False, force_terminal=False)
    return console


def first_lines(job: Job) -> list[str]:
    """Return the lines printed at the start of a run."""
    lines = [f"base      {job.base.source.name}"]
    lines += [f"          {note}" for note in (job.base.source.note, *job.base.notices) if note]
    lines.append(f"train     {job.train.report}")
    lines += [f"          {note}" for note in job.config.data.template_notes]
    lines.append(f"task      {job.train.task}: {job.train.format}")
    if job.validation is not None:
        part = "" if len(job.scored) == len(job.validation) else f" ({len(job.scored):,} scored)"
        lines.append(f"held out  {job.validation.report}{part}")
    trained = sum(p.numel() for p in job.parameters.values())
    dtype, start = dtype_name(job.dtype), job.config.from_adapter
    method = job.config.method
    if start is not None:
        method = f"{type(job.adapters.method(TRAINED)).__name__} of {start}"
    lines.append(
        f"method    {method}: {trained:,} trained parameters, computed in {dtype} on {job.device}"
    )
    among = f", in {count} processes" if (count := job.processes.count) > 1 else ""
    lines.append(
        f"steps     {job.step_plan.total:,} of {job.config.batch_size} x {job.config.accumulation} examples, "
        f"{job.step_plan.steps_per_epoch:,} per epoch{among}"
    )
    examples = min(job.config.batch_size * job.config.accumulation, len(job.train))
    if examples < count:
        fewer = "" if job.config.shard else "start fewer, or "
        lines.append(
            f"          a step has {counted(examples, 'example')}, so {count - examples} of {count} processes have "
            f"none: {fewer}in a new run raise batch_size or accumulation."
        )
    warmup = job.config.optimizer.warmup
    if warmup > job.step_plan.total:
        reached = job.rate_factor(job.step_plan.total - 1)
        lines.append(
            f"          optimizer.warmup of {warmup:,.0f} steps is longer than the run: the learning rate ends at "
            f"{reached:.0%} of its peak. To reach the peak, set at most {job.step_plan.total:,}."
        )
    if job.config.shard:
        lines.append(f"          {sharding_note(job.model, job.processes)}")
    if job.batch_size.size < job.batch_size.configured:
        batch = counted(job.batch_size.size, "example")
        lines.append(f"memory    {batch} at a time: more did not fit in an earlier session")
    if job.computation.note:
        lines.append(f"loss      {job.computation.note}")
    return lines
