"""What `lorakit paper` is asked to run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from lorakit.configuration import conform
from lorakit.errors import ConfigurationError, nearest, require_at_least
from lorakit.evaluation.config import BaseConfig, DType
from lorakit.paper.studies import STUDIES, study
from lorakit.paper.study import MAX_TRIALS, Study

TABLES = ("table1", *STUDIES, "table7")
"""The tables that can be run: of training runs, and those of latency (1) and amplification (7)."""

_NO_PART_OF_THE_COMMAND = ("table", "data", "output", "keep_weights", "device", "dry_run")
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """A table of the paper on a model of one's own: methods x data sets x seeds, each a training run.

    Raises:
        ConfigurationError: A value cannot work, or two settings exclude each other.
    """

    table: str
    """table1 to table7, table13 to table16, table18; numbers are those of arXiv version 2."""
    model: str | None = None
    """The base model: a hub id, a folder, a .gguf file or a short name. By default minilm-l6 or smollm2-135m."""
    tasks: tuple[str, ...] | None = None
    """Data sets of the table, separated by commas; by default all of them."""
    methods: tuple[str, ...] | None = None
    """Rows of the table, separated by commas; by default all of them."""
    seeds: int = 3
    """Runs behind each number; they differ in the adapter's start, the order of the data and dropout."""
    trials: int = 1
    """Learning rates tried, the same number for every method. The best on held-out data is taken; the data that is
    scored in the end plays no part."""
    budget: str | None = None
    """Time for the whole grid, for example 10m or 2h: a short timing turns it into a number of steps for each data
    set, the same for every method, which is written down and kept."""
    epochs: float | None = None
    """Passes over the training data, 3 without a budget; beside one, the most that a run makes."""
    limit: int | None = None
    """Train on this many examples of each data set, drawn at random once and the same for every run."""
    eval_limit: int | None = None
    """Score this many examples or prompts, from the first; by default all."""
    beams: int | None = None
    """Beams of the search that generates text (1 is greedy); by default those of the task."""
    batch_size: int = 16
    """Examples per step."""
    data: str | None = None
    """A folder with the data sets, each in a sub-folder (`mrpc/train.jsonl`); without it they are read from the hub."""
    output: str | None = None
    """Folder of the runs and the table; by default out/paper/TABLE-MODEL."""
    dtype: DType = "auto"
    """Precision of the computation; see base.dtype of `lorakit train`."""
    device: str = "auto"
    """Where it is computed: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    keep_weights: bool = True
    """Keep the adapter of every run; false deletes it once its scores are written down."""
    dry_run: bool = False
    """Show the runs, with their parameters, steps, memory and time, and run none."""

    def __post_init__(self) -> None:
        conform(self)
        name = self.table if self.table.startswith("table") else f"table{self.table}"
        if name not in TABLES:
            known = ", ".join(sorted(TABLES, key=lambda name: int(name.removeprefix("table"))))
            raise ConfigurationError(
                f"table is {self.table!r}; it must be one of {known}.{nearest(name, TABLES)}"
            )
        object.__setattr__(self, "table", name)
        for option in ("seeds", "trials", "batch_size"):
            require_at_least(option, getattr(self, option), 1)
        for option, least in (("limit", 8), ("eval_limit", 1), ("beams", 1)):
            if (value := getattr(self, option)) is not None:
                require_at_least(option, value, least)
        if self.trials > MAX_TRIALS:
            raise ConfigurationError(
                f"trials is {self.trials}; at most {MAX_TRIALS} learning rates are tried."
            )
        if self.epochs is not None and not 0 < self.epochs < 1e6:
            raise ConfigurationError(f"epochs is {self.epochs}; it must be above 0 and below 1e6.")
        if self.budget is not None:
            _seconds(self.budget)  # one that cannot be read is an error here already
        _ = self.base  # so are a wrong dtype and device
        if self.table in STUDIES:
            _ = self.study

    @property
    def study(self) -> Study:
        """What is compared: the table's study, narrowed to `tasks` and `methods`."""
        return study(self.table).choose(self.tasks, self.methods)

    @property
    def base(self) -> BaseConfig:
        """The base model of every run."""
        default = STUDIES[self.table].base if self.table in STUDIES else "smollm2-135m"
        return BaseConfig(name=self.model or default, dtype=self.dtype, device=self.device)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        model = re.sub(r"[^\w.-]+", "-", Path(self.base.name).name or self.base.name)
        return Path(self.output or f"out/paper/{self.table}-{model}")

    @property
    def seconds(self) -> float | None:
        """The budget in seconds."""
        return None if self.budget is None else _seconds(self.budget)

    @property
    def command(self) -> str:
        """The command line that asks for the same numbers, without what is left at its default.

        Where the data lies is left open, and so is what no number depends on.
        """
        words = ["lorakit", "paper", self.table]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in _NO_PART_OF_THE_COMMAND or value == option.default:
                continue
            words += [
                f"--{option.name}",
                ",".join(value) if isinstance(value, tuple) else str(value),
            ]
        if self.data is not None:
            words += ["--data", "DATA"]
        return shlex.join(words)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigurationError(
            f"budget is {text!r}; write a number of seconds, minutes or hours, for example 90s, 10m or 2h."
        )
    return float(match[1]) * _UNITS[match[2]]
