"""The configuration of `lorakit paper`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorakit.configuration import LocalPath, as_dict, conform, flat_settings, strict
from lorakit.errors import ConfigurationError, require_at_least, require_choice
from lorakit.evaluation.decoding import Decoding
from lorakit.formatting import shell_command
from lorakit.models.base_config import BaseConfig
from lorakit.paper.studies import STUDIES
from lorakit.paper.study import MAX_TRIALS, Study
from lorakit.training.config import Sampling

CHANGE_NO_NUMBER = (
    *("output", "log", "reproduce", "keep_weights", "dry_run"),
    *("base.device", "data.root", "decoding.batch_size"),
)
"""Settings that change no number; grid.json and the command on a page do not have them."""
_OF_A_REPETITION = (
    *("table", "log", "reproduce", "output"),
    *("data.root", "base.device", "base.trust_remote_code"),
)
_OF_LATENCY = ("table", "base", "budget", "output", "dry_run")
_UNITS = {"s": 1, "m": 60, "h": 3600}


@strict
@dataclass(frozen=True, kw_only=True)
class PaperDataConfig:
    """Where the data sets of a table are."""

    root: LocalPath | None = None
    """Folder with the data of named tasks, one sub-folder per task (`mrpc/train.jsonl`). Omit to read them from the
    hub."""

    def __post_init__(self) -> None:
        conform(self, "data")


@strict
@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """Reproduce a table of the paper on your model: methods x data sets x seeds, each a training run.

    Raises:
        ConfigurationError: A value is invalid, or two settings exclude each other.
    """

    table: str
    """table1 to table7, table13 to table16, or table18, as numbered in arXiv version 2."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """The base model of every run. Without a name, minilm-l6 or smollm2-135m, by table."""
    data: PaperDataConfig = field(default_factory=PaperDataConfig)
    """The data sets of the table."""
    tasks: tuple[str, ...] | None = None
    """Data sets of the table, separated by commas. Default: all."""
    methods: tuple[str, ...] | None = None
    """Rows of the table, separated by commas. Default: all."""
    seeds: int = 3
    """Runs per number of the table, each with its own seed. They differ in the adapter's initialisation, the order of
    the data and dropout."""
    trials: int = 1
    """Learning rates to try first, the same number for every method. The best mean score on held-out data over the
    seeds selects the rate, never the data that the table scores."""
    widen: bool = False
    """While the best learning rate is the smallest or the largest, try the next one beyond it. Needs 3 trials or more,
    and no budget."""
    trial_epochs: float | None = None
    """Passes over the training data of the runs that choose the learning rate, usually fewer than `epochs`; the scored
    runs are then further ones. Default: `epochs`, and the first seed's scored run is one of them."""
    budget: str | None = None
    """Time for the whole grid, for example 10m or 2h. A short timing converts it to steps, the same for every method
    on a data set. A resumed grid keeps these steps."""
    epochs: float | None = None
    """Passes over the training data. Default: 3 without a budget; with a budget this is the maximum."""
    limit: int | None = None
    """Train on this many rows of each data set, drawn at random once and the same for every run. A row of WebNLG or
    DART has several examples."""
    eval_limit: int | None = None
    """Score only this many examples or prompts, evenly spaced over the file. Default: all."""
    decoding: Decoding = field(default_factory=Decoding)
    """Settings of text generation. Unset ones have the values of the task; one beam is greedy."""
    batch_size: int = 16
    """Examples per step."""
    sampling: Sampling = "random"
    """Order of the training data: random; or grouped, where examples with the same prompt share a batch, which is fast
    on E2E. Grouping changes the order of the examples, so scores differ."""
    output: LocalPath | None = None
    """Folder for the runs and the table. Default: out/paper/TABLE-MODEL."""
    log: LocalPath | None = None
    """Folder for grid.json and one small record per run, without weights, for example to publish it. A grid on another
    machine continues from it. Default: the output folder."""
    reproduce: str | None = None
    """Repeat the runs of a row of a log (DATA/METHOD or DATA/METHOD/SEED, such as rte/lora/0), and compare the
    scores."""
    keep_weights: bool = True
    """Keep the adapter of every run; false deletes it after it is scored."""
    dry_run: bool = False
    """List the runs with their parameters, steps, memory and time, and train nothing."""

    def __post_init__(self) -> None:
        conform(self)
        name = self.table if self.table.startswith("table") else f"table{self.table}"
        require_choice("table", name, ("table1", *STUDIES))
        object.__setattr__(self, "table", name)
        usual_base = STUDIES[name].base if name in STUDIES else "smollm2-135m"
        if not self.base.name:
            object.__setattr__(self, "base", replace(self.base, name=usual_base))
        least = {"seeds": 1, "trials": 1, "batch_size": 1, "limit": 8, "eval_limit": 1}
        for option, bound in least.items():
            require_at_least(option, getattr(self, option), bound)
        if self.trials > MAX_TRIALS:
            raise ConfigurationError(
                f"trials is {self.trials}; it must be at most {MAX_TRIALS} learning rates."
            )
        if self.reproduce and not re.fullmatch(r"[^/]+/[^/]+(/\d{1,6})?", self.reproduce):
            raise ConfigurationError(
                f"reproduce is {self.reproduce!r}; write DATA/METHOD or DATA/METHOD/SEED, for example rte/lora/0."
            )
        if self.widen and (self.trials < 3 or self.budget is not None):
            raise ConfigurationError(
                "widen searches beyond the outermost of at least 3 learning rates, in a time that no budget can bound. "
                "Set --trials 3, and leave --budget out."
            )
        for option in ("epochs", "trial_epochs"):
            value = getattr(self, option)
            if value is not None and not 0 < value < 1e6:
                raise ConfigurationError(f"{option} is {value}; it must be above 0 and below 1e6.")
        if self.trial_epochs is not None and (self.trials == 1 or self.budget is not None):
            raise ConfigurationError(
                "trial_epochs is the length of the runs that choose among several learning rates, without a budget. "
                "Set --trials 3, and leave --budget out."
            )
        # Reading these properties validates the budget, the tasks and the methods.
        _ = self.seconds
        if self.table in STUDIES:
            _ = self.study
        if self.reproduce:
            self._refuse_others(
                _OF_A_REPETITION, usual_base, "reproduce repeats runs with their recorded settings"
            )
        elif self.table not in STUDIES:
            self._refuse_others(
                _OF_LATENCY, usual_base, f"{self.table} times one model and trains nothing"
            )

    def _refuse_others(self, used: Collection[str], usual_base: str, purpose: str) -> None:
        """Reject settings that would have no effect. `used` are the others: sections, and settings by dotted name."""
        changed = self._changed_from(PaperConfig(table="table2", base=BaseConfig(name=usual_base)))
        if unused := [n for n in changed if not {n, n.split(".")[0]}.intersection(used)]:
            raise ConfigurationError(f"{purpose}. Leave {', '.join(unused)} out.")

    def _changed_from(self, usual: PaperConfig) -> dict[str, Any]:
        """Return the settings that differ from those of `usual`, by dotted name."""
        then = flat_settings(as_dict(usual))
        return {n: value for n, value in flat_settings(as_dict(self)).items() if value != then[n]}

    @property
    def study(self) -> Study:
        """The table's study, narrowed to `tasks` and `methods`.

        Raises:
            ConfigurationError: The table is table1, which does not consist of training runs.
        """
        require_choice("table", self.table, STUDIES)
        return STUDIES[self.table].choose(self.tasks, self.methods)

    @property
    def folder(self) -> Path:
        """The folder for the runs and the table."""
        model = re.sub(r"[^\w.-]+", "-", Path(self.base.name).name or self.base.name)
        return Path(self.output or f"out/paper/{self.table}-{model}")

    @property
    def log_folder(self) -> Path:
        """The folder for grid.json and the records of the runs."""
        return Path(self.log) if self.log else self.folder

    @property
    def drawn_data(self) -> Path:
        """The folder for training data that is drawn once."""
        return self.folder / "data"

    @property
    def seconds(self) -> float | None:
        """The budget in seconds; None without a budget."""
        if self.budget is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", self.budget.strip())
        if match is None or float(match[1]) == 0:
            raise ConfigurationError(
                f"budget is {self.budget!r}; write a number of seconds, minutes or hours, for example 90s, 10m or 2h."
            )
        return float(match[1]) * _UNITS[match[2]]

    @property
    def command(self) -> str:
        """The command line that reproduces the numbers, without options at their defaults.

        The data folder is printed as DATA. Options that change no number are omitted.
        """
        words = ["lorakit", "paper", self.table]
        for name, value in self._changed_from(PaperConfig(table=self.table)).items():
            if name not in CHANGE_NO_NUMBER:
                words += [f"--{name}", _argument(value)]
        if self.data.root is not None:
            words += ["--data.root", "DATA"]
        return shell_command(words)


def _argument(value: Any) -> str:
    """Return a value as one argument on the command line."""
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.15g}"
        case list():
            return ",".join(value)
    return str(value)
