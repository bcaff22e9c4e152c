"""`lorakit plan`."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from lorakit.cli.analyze_options import OutputFiles
from lorakit.cli.methods_in_files import options_of_other_methods
from lorakit.cli.parsing import parse
from lorakit.configuration import LocalPath
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, require_at_least
from lorakit.training.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.cli.console import StatusLine
    from lorakit.planning import Plan, Prediction

MADE_UP = "made-up"
"""Placeholder for data.train in a plan without data."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(OutputFiles, TrainConfig):
    """Options of `lorakit plan`, including those of `lorakit train` (data and output are optional)."""

    data: DataConfig = field(default_factory=DataConfig)
    """The training data. Without data.train, the plan uses synthetic examples, see length."""
    output: LocalPath = "out"
    """Run folder. A plan does not write to it."""
    length: int | None = None
    """Tokens per example, instead of reading the data. Default without data: data.max_length, the upper bound."""
    target_tokens: int | None = None
    """Target tokens per example; requires length. Default: half of length."""
    processes: int = 1
    """Number of processes on one machine that share each step. Memory and time are then those of one of them; on a CPU
    they share the cores."""
    calibrate: bool = False
    """First train a small random model in two short runs to measure the speed of this machine and its memory beyond
    tensors. Caches the result in the user's cache folder for later plans."""
    json: bool = False
    """Print JSON, with sizes in bytes."""
    plot: LocalPath | None = None
    """Plot the memory by part and the time per step to this file (.png, .svg or .pdf)."""

    def __post_init__(self) -> None:
        if not self.data.has("train"):
            named = dataclasses.replace(self.data, train=MADE_UP)
            object.__setattr__(self, "data", named)
        super().__post_init__()
        require_at_least("length", self.length, 2)
        require_at_least("processes", self.processes, 1)
        if self.shard and self.processes == 1:
            raise ConfigurationError(
                "shard is true, but the plan has one process; add their number, for example --processes 2."
            )
        if self.target_tokens is not None:
            require_at_least("target_tokens", self.target_tokens, 1)
            if self.length is None:
                raise ConfigurationError(
                    "target_tokens counts tokens of length; set length too, for example --length 512."
                )

    @property
    def run(self) -> TrainConfig:
        """The settings of the training run."""
        names = [f.name for f in dataclasses.fields(TrainConfig)]
        settings = {name: getattr(self, name) for name in names}
        # In a plan, overwrite applies to the report.
        return TrainConfig(**{**settings, "overwrite": False})


CONFIGS = (PlanConfig,)


def run(argv: Sequence[str]) -> None:
    """Plan and print."""
    config = parse(
        PlanConfig,
        "plan",
        "Predict the cost of a training run from its configuration, without loading weights: trained parameters, "
        "size on disk, peak memory by part and time per step, compared with full fine-tuning. Takes the options "
        "of lorakit train; --base.name gpt3-175b plans the paper's largest model.",
        argv,
        unused=options_of_other_methods,
    )
    from lorakit.models.collection import no_collection

    with no_collection():
        _run(config)
        # Otherwise Python searches all objects of PyTorch and transformers now and at exit, for more than a second.
        gc.freeze()


def _run(config: PlanConfig) -> None:
    from lorakit.cli.console import StatusLine, console, print_json

    config.require_writable()
    with StatusLine() as status:
        prediction = _plan(config, status)
    from lorakit.planning.report import memory_figure, plan_page

    written = config.write(
        partial(memory_figure, prediction), partial(plan_page, prediction, config.run)
    )
    if config.json:
        print_json(prediction.as_dict())
        return
    out = console()
    _print(out, prediction)
    for line in written:
        out.print(line, markup=False)


def _plan(config: PlanConfig, status: StatusLine) -> Plan:
    status("importing PyTorch and transformers")
    import torch

    from lorakit.models.processor import limit_processor, threads
    from lorakit.planning import plan

    made_up = config.data.train == MADE_UP
    length = config.length or (config.data.max_length if made_up else None)
    limit_processor()
    with threads(max(1, torch.get_num_threads() // config.processes)):
        return plan(
            config.run,
            length=length,
            target_tokens=config.target_tokens,
            processes=config.processes,
            calibrate=config.calibrate,
            progress=status,
        )


def _print(out: Console, plan: Plan) -> None:
    from lorakit.cli.console import table
    from lorakit.formatting import duration, size
    from lorakit.planning.report import shared_text

    def say(text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)

    say(f"base     {plan.base}, {plan.parameters:,} parameters, {plan.dtype} on {plan.device}")
    if plan.note:
        say(f"         {plan.note}")
    if plan.why_dtype:
        say(f"dtype    {plan.dtype}: {plan.why_dtype}")
    say(f"lengths  {plan.lengths}")
    packed = ", shared prefixes computed once" if plan.packed else ""
    say(f"batch    at most {plan.rows:,} x {plan.width:,} tokens{packed}")
    say(f"machine  {plan.machine.origin}")
    if plan.processes > 1:
        say(f"shared   {shared_text(plan)}")
    columns = [plan.chosen, *([plan.full] if plan.full else [])]
    out.print()
    out.print(table(["", *(prediction.method for prediction in columns)], _rows(plan, columns)))
    if plan.why_no_full:
        say(f"full fine-tuning: {plan.why_no_full}")
    out.print()
    if plan.device == "cpu":
        say(f"Loading the base briefly needs {size(plan.loading)}.")
    if plan.steps:
        total = plan.steps * plan.chosen.seconds
        say(f"The run: {plan.steps:,} steps, about {duration(total)} without evaluation.")
    for line in plan.paper:
        say(f"paper    {line}")


def _rows(plan: Plan, columns: Sequence[Prediction]) -> list[list[str]]:
    from lorakit.formatting import percentage, short_duration, size
    from lorakit.planning.planner import Memory

    def sizes(name: str) -> list[str]:
        return [size(getattr(p.memory, name)) for p in columns]

    parts = [f.name for f in dataclasses.fields(Memory)]
    step = ["in a step", *sizes("total")]
    loading_needs_most = any(plan.loading > p.memory.total for p in columns)
    return [
        ["trained parameters", *(f"{p.trained:,}" for p in columns)],
        ["share of the base", *(percentage(p.share) for p in columns)],
        ["saved file", *(size(p.file_bytes) for p in columns)],
        ["time per step", *(short_duration(p.seconds) for p in columns)],
        ["peak memory", *(size(plan.peak(p)) for p in columns)],
        *([step] if loading_needs_most else []),
        *([f"  {name}", *sizes(name)] for name in parts),
    ]
