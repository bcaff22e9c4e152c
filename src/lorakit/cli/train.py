"""`lorakit train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.methods_in_files import options_of_other_methods
from lorakit.cli.next_commands import commands_for
from lorakit.cli.parsing import parse
from lorakit.file_names import CHECKPOINTS, CONFIG, RESULT
from lorakit.training.config import TrainConfig

if TYPE_CHECKING:
    from lorakit.reporting.run_record import RunRecord
    from lorakit.training.run_folder import RunResult

CONFIGS = (TrainConfig,)

FEW_STEPS = 50
"""Runs of fewer steps get a hint to train longer."""


def run(argv: Sequence[str]) -> None:
    """Train, then print the scores and the path of the adapter."""
    config = parse(
        TrainConfig,
        "train",
        "Train an adapter on your data, with base, data, method and schedule in one configuration. "
        "Writes the resolved configuration, metrics, checkpoints and the adapter to the run folder. "
        "--recipe NAME starts from the paper's settings ('lorakit recipes' lists them); other options override "
        "them.",
        argv,
        preset=("recipe", _recipe),
        unused=options_of_other_methods,
    )
    from lorakit.cli.report import write_run_report
    from lorakit.formatting import number
    from lorakit.reporting.run_record import read_run
    from lorakit.training.checkpoint import newest_step
    from lorakit.training.distributed import started_processes
    from lorakit.training.loop import train

    processes = started_processes()
    finished = _finished(config)
    if config.resume and processes.is_first and finished is None:
        folder = Path(config.output).resolve()
        if not (folder / CONFIG).exists():
            print(f"--resume: no run in {folder}, so a new one starts")
        elif not newest_step(folder / CHECKPOINTS):
            print(
                f"--resume: the run in {folder} has no checkpoint, so it starts from its first step"
            )
    result = train(config)
    if not processes.is_first:
        return
    if finished is not None and finished == _finished(config):
        longer = "" if result.stopped_early else "; a higher --max_steps makes it longer"
        print(f"{config.output} was finished, so nothing was trained{longer}")
    print(f"\n{_summary(result)}")
    planned_line, predicted = _planned(config, result, processes.count)
    report = write_run_report(result.folder, predicted=predicted)
    print(planned_line)
    record = read_run(result.folder)
    for name, value in result.scores.items():
        before = result.scores_before.get(name)
        of = f"  ({count})" if (count := record.scored_on(name)) else ""
        print(
            f"  {name:<12} {'' if before is None else f'{number(before)} -> '}{number(value)}{of}"
        )
    if result.steps < FEW_STEPS and not result.stopped_early:
        print(f"note     {_few_steps(config, result.steps)}")
    print(f"adapter  {result.adapter}")
    worse = "; worse than before training" if record.never_improved else ""
    if result.best is not None and (result.best_step != result.steps or worse):
        print(f"best     {result.best} (step {result.best_step}{worse})")
    print(f"report   {report}")
    print("next     " + "\n         ".join(_next(config, result, record)))


def _finished(config: TrainConfig) -> int | None:
    """Return when the run in the output folder was finished; None if it is not."""
    result = Path(config.output, RESULT)
    return result.stat().st_mtime_ns if result.exists() else None


def _summary(result: RunResult) -> str:
    """Return the steps, the tokens, the time and the memory of a run on one line."""
    from lorakit.formatting import counted, duration, percentage, size

    packed = ""
    if 0 < result.computed_tokens < result.tokens:  # 0 in records of runs that did not count them
        saved = percentage(result.tokens - result.computed_tokens, result.tokens)
        packed = f", {saved} of them saved by packing"
    speed = f"{result.tokens / max(result.seconds, 1e-9):,.0f} a second"
    early = ", stopped early" if result.stopped_early else ""
    return (
        f"{counted(result.steps, 'step')} in {duration(result.seconds)} ({result.tokens:,} tokens{packed}, {speed}), "
        f"peak memory {size(result.peak_memory)}{early}"
    )


def _recipe(name: str) -> dict[str, Any]:
    """Return the settings of a recipe, and print what they do not express."""
    from lorakit.paper.recipes import recipe
    from lorakit.training.distributed import started_processes

    found = recipe(name)
    for note in found.notes if started_processes().is_first else ():
        print(f"note: recipe {name}: {note}", file=sys.stderr)
    return found.settings


def _planned(
    config: TrainConfig, result: RunResult, processes: int
) -> tuple[str, dict[str, float] | None]:
    """Predict time and memory of the run. Return a line to print, and the numbers for the report.

    If planning fails, the line has the reason, and the numbers are None.
    """
    from lorakit.formatting import size
    from lorakit.planning import plan
    from lorakit.training.run_folder import read_settings

    try:
        # The memory that is free now could lead `auto` to another dtype than that of the run.
        dtype = read_settings(result.folder)["base"]["dtype"]
        ran = replace(config, base=replace(config.base, dtype=dtype))
        prediction = plan(ran, compare=False, processes=processes)
    except Exception as error:  # a failed prediction must not fail a finished run
        return f"planned  no prediction: {' '.join(str(error).split())}", None
    tokens = prediction.tokens / prediction.chosen.seconds
    peak = prediction.peak(prediction.chosen)
    line = (
        f"planned  {tokens:,.0f} tokens a second, peak memory {size(peak)} "
        f"('lorakit plan' shows its parts)"
    )
    return line, {
        "seconds": prediction.chosen.seconds * result.steps,
        "tokens_per_second": tokens,
        "peak_memory": peak,
        "adapter_bytes": prediction.chosen.file_bytes,
    }


def _few_steps(config: TrainConfig, steps: int) -> str:
    """Return a hint with the options that lengthen the run."""
    few = f"{steps} step{' is' if steps == 1 else 's are'} few; raise"
    if config.max_steps is not None:
        return f"{few} --max_steps (now {config.max_steps}) if the scores are low"
    return f"{few} --epochs (now {config.epochs:g}) or --max_steps if the scores are low"


def _next(config: TrainConfig, result: RunResult, record: RunRecord) -> list[str]:
    """Return the commands that use and show the adapter, with the file of a custom method."""
    from lorakit.formatting import shell_command
    from lorakit.methods.registry import is_user_method

    custom = [name for name in config.method_names if is_user_method(name)]
    method = ["--method", custom[0]] if custom else []
    adapter = str(result.adapter)
    options = shell_command(["--adapter", adapter, *method])
    task, methods = str(record.provenance.get("generic_task")), record.method.split("+")
    uses = commands_for(task, options, str(result.folder), methods)
    return [*uses, shell_command(["lorakit", "inspect", adapter, *method])]
