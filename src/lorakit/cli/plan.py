"""`lorakit plan`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorakit.cli.analyze_options import Written
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, require_at_least
from lorakit.training.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.planning import Plan, Prediction

MADE_UP = "made-up"
"""Stands for the data of a plan that is given lengths alone."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """The settings of `lorakit train`, of which data and output may be left out, and how to plan."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data and how an example is read from it; without data.train examples are made up, see length."""
    output: str = "out"
    """Run folder; a plan writes nothing into it."""
    length: int | None = None
    """Tokens of an example, instead of reading the data; without either data.max_length, the most there can be."""
    targets: int | None = None
    """With length: how many of them are target tokens; by default half."""
    calibrate: bool = False
    """First train a small shape with random weights for two short runs, to fit how fast this machine computes and
    what it holds beyond tensors. Kept in the user's cache folder, and used from then on."""
    json: bool = False
    """Print JSON for programs, sizes in bytes."""
    plot: str | None = None
    """Draw the memory by its parts and the time of a step into this file (.png, .svg or .pdf)."""
    report: str | None = None
    """Write the plan as a page (.html)."""
    overwrite: bool = False
    """Replace an existing page."""

    def __post_init__(self) -> None:
        if not self.data.has("train"):
            named = dataclasses.replace(self.data, train=MADE_UP)
            object.__setattr__(self, "data", named)
        super().__post_init__()
        for name in ("length", "targets"):
            value = getattr(self, name)
            if value is not None:
                require_at_least(name, value, 2 if name == "length" else 1)
        if self.targets is not None and self.length is None:
            raise ConfigurationError(
                "targets is how many tokens of length are targets; set length too, for example --length 512."
            )

    @property
    def run(self) -> TrainConfig:
        """The settings of the run itself."""
        names = [f.name for f in dataclasses.fields(TrainConfig)]
        settings = {name: getattr(self, name) for name in names}
        # Here it is about the page.
        return TrainConfig(**{**settings, "overwrite": False})


def run(argv: Sequence[str]) -> None:
    """Plan and print."""
    from lorakit.cli.console import console
    from lorakit.cli.parsing import parse
    from lorakit.planning import plan
    from lorakit.planning.report import memory_figure, plan_page
    from lorakit.reporting import drawing
    from lorakit.training.environment import command

    config = parse(
        PlanConfig,
        "plan",
        "Predict what a training run takes, from its configuration alone and without weights: trained parameters, "
        "size on disk, peak memory by its parts, time per step, with full fine-tuning beside it. Options are those "
        "of lorakit train; --base.name gpt3-175b plans the paper's largest model.",
        argv,
    )
    files = Written(plot=config.plot, report=config.report, overwrite=config.overwrite)
    files.require_writable()
    if config.calibrate:
        from lorakit.models.devices import pick_device
        from lorakit.models.dtypes import compute_dtype
        from lorakit.planning.calibration import calibrate
        from lorakit.planning.machine import keep_calibration

        device = pick_device(config.base.device)
        dtype = compute_dtype(config.base.dtype, device)
        keep_calibration(calibrate(device, dtype), device, dtype)
    made_up = config.data.train == MADE_UP
    length = config.length or (config.data.max_length if made_up else None)
    found = plan(config.run, length=length, targets=config.targets)
    if config.plot is not None:
        drawing.save(memory_figure(found), config.plot)
    if config.report is not None:
        plan_page(found, config.run, command=command()).write(config.report)
    if config.json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return
    out = console()
    _print(out, found)
    if config.plot is not None:
        out.print(f"Figure in {config.plot}.", markup=False)
    if config.report is not None:
        out.print(f"Report in {config.report}.", markup=False)


def _print(out: Console, found: Plan) -> None:
    from rich.table import Table

    from lorakit.formatting import duration, size
    from lorakit.planning.machine import INTERPRETER

    def say(text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)

    say(f"base     {found.base}, {found.parameters:,} parameters, {found.dtype} on {found.device}")
    if found.note:
        say(f"         {found.note}")
    say(f"lengths  {found.lengths}")
    packed = ", shared prefixes computed once" if found.packed else ""
    say(f"batch    at its fullest {found.rows:,} x {found.width:,} tokens{packed}")
    say(f"machine  {found.machine.origin}")
    columns = [found.chosen, *([found.full] if found.full else [])]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for prediction in columns:
        table.add_column(prediction.method, justify="right")
    for name, values in _rows(columns):
        table.add_row(name, *values)
    out.print()
    out.print(table)
    if found.why_no_full:
        say(f"full fine-tuning: {found.why_no_full}")
    out.print()
    if found.device == "cpu":
        say(
            f"Memory is that above the interpreter with torch imported, about {size(INTERPRETER)}. Loading the base "
            f"takes {size(found.loading)} for a moment."
        )
    if found.steps:
        total = found.steps * found.chosen.seconds
        say(f"The run: {found.steps:,} steps, about {duration(total)} without evaluation.")
    for line in found.paper:
        say(f"paper    {line}")


def _rows(columns: Sequence[Prediction]) -> list[tuple[str, list[str]]]:
    from lorakit.formatting import short_duration, size
    from lorakit.planning.planner import Memory

    def sizes(name: str) -> list[str]:
        return [size(getattr(p.memory, name)) for p in columns]

    parts = [f.name for f in dataclasses.fields(Memory)]
    return [
        ("trained parameters", [f"{p.trained:,}" for p in columns]),
        ("share of the base", [f"{p.share:.4%}" for p in columns]),
        ("saved file", [size(p.file_bytes) for p in columns]),
        ("time per step", [short_duration(p.seconds) for p in columns]),
        ("peak memory", sizes("total")),
        *((f"  {name}", sizes(name)) for name in parts),
    ]
