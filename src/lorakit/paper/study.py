"""The parts of a study: methods with their settings, and data sets with their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorakit.errors import ConfigurationError, nearest
from lorakit.evaluation.score import Direction, directions_of
from lorakit.methods.registry import SECTIONS, default_rate
from lorakit.paper.published import PublishedTable
from lorakit.paper.resampling import ExampleSums
from lorakit.tasks.registry import task_type

_LADDER = (1.0, 3.0, 1 / 3, 9.0, 1 / 9, 27.0, 1 / 27)
"""Factors on a method's default learning rate, one per trial."""
MAX_TRIALS = len(_LADDER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of a table: a method with its settings."""

    key: str
    """Its name on the command line and in folders."""
    method: str
    """The paper's name of the method, as in its published rows."""
    settings: Mapping[str, Any]
    """Settings of `TrainConfig` by dotted name."""
    setting: str = ""
    """Distinguishes rows of one method, for example r=8."""
    published: str = ""
    """Parameters as printed in its published row, for example 0.8M, where the paper has several sizes of the method."""

    def rates(self, trials: int) -> list[float]:
        """Return the learning rates to try, ascending, with two significant digits."""
        middle = min(default_rate(SECTIONS[name]()) for name in self.method_names)
        return sorted(float(f"{middle * factor:.1e}") for factor in _LADDER[:trials])

    def wider(self, rates: list[float], best: float | None) -> list[float]:
        """Return the rates with the next one beyond `best`, if it is the smallest or the largest and there is one."""
        if best not in (rates[0], rates[-1]):
            return rates
        ladder = self.rates(MAX_TRIALS)
        at = ladder.index(best) + (1 if best == rates[-1] else -1)
        return sorted({*rates, *ladder[max(at, 0) : at + 1]})

    @property
    def method_names(self) -> tuple[str, ...]:
        """Names of its method, or of the parts of a combined one."""
        return tuple(self.settings["method"].split("+"))

    @property
    def label(self) -> str:
        """The method and its setting."""
        return f"{self.method} {self.setting}".strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One score of a data set, as the paper's table prints it."""

    name: str
    """Its column in the published table."""
    score: str
    """Its name in the scores of an evaluation."""
    scale: float = 1.0
    """Factor from the evaluation's unit to the table's."""
    digits: int = 1
    """Decimal places."""
    sums: ExampleSums | None = None
    """How the score follows from sums over the examples; None if it does not, or these are not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyData:
    """A data set of a study, and its columns in the table."""

    key: str
    """Its name on the command line and in folders."""
    task: str
    """Its task in `lorakit.tasks`."""
    columns: tuple[Column, ...]
    max_length: int = 128
    """Longest example, in tokens; longer ones are truncated."""
    limit: int | None = None
    """Training examples, where the table itself limits them (Table 16)."""
    scored: str | None = None
    """The validation set that the table scores; None for all."""
    commonest: float | None = None
    """Score, in the table's unit, of the answer that is most often right; None if it is zero or not known."""
    note: str = ""
    """What a reader of its scores must know."""

    @property
    def split(self) -> Literal["validation", "test"]:
        """The split that the table scores."""
        return task_type(self.task).scored_split

    @property
    def holds_out(self) -> bool:
        """Whether part of the training data is held out for choices, because the table scores the validation split."""
        return self.split == "validation"

    @property
    def metric(self) -> str:
        """The held-out score that selects the learning rate and the step."""
        task = task_type(self.task)
        return "loss" if task.kind == "text" else task.metric

    @property
    def direction(self) -> Direction:
        """Whether a lower or a higher metric is better."""
        return directions_of(task_type(self.task))[self.metric]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """The runs that reproduce a table of the paper."""

    table: PublishedTable
    base: str = "smollm2-135m"
    """The base model if the user names none."""
    data_sets: tuple[StudyData, ...]
    variants: tuple[Variant, ...]
    average: str | None = None
    """The column with the mean of all others; None if the table has no such column."""
    measures: Literal["scores", "amplification"] = "scores"
    """The source of the numbers: an evaluation, or the amplification of the base by the adapter."""
    notes: tuple[str, ...] = ()

    def choose(self, data_sets: tuple[str, ...] | None, variants: tuple[str, ...] | None) -> Study:
        """Return the study with only these data sets and variants, in the order of the table.

        Raises:
            ConfigurationError: A name is unknown or repeated, or none is named.
        """
        return replace(
            self,
            data_sets=_select("tasks", self.data_sets, data_sets),
            variants=_select("methods", self.variants, variants),
        )


def _select(option: str, items: tuple[Any, ...], keys: tuple[str, ...] | None) -> tuple[Any, ...]:
    if keys is None:
        return items
    by_key = {item.key: item for item in items}
    for key in keys:
        if key not in by_key:
            raise ConfigurationError(
                f"{option} names '{key}'; this table has {', '.join(by_key)}.{nearest(key, by_key)}"
            )
    if not keys or len(set(keys)) < len(keys):
        raise ConfigurationError(
            f"{option} is {', '.join(keys) or 'empty'}; name at least one, and name each once."
        )
    return tuple(item for key, item in by_key.items() if key in keys)
