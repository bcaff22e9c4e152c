"""What a study is: methods with their settings, compared on data sets with their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lorakit.errors import ConfigurationError, nearest
from lorakit.paper.published import PublishedTable
from lorakit.tasks.registry import task_type
from lorakit.training.config import DEFAULT_RATES

_LADDER = (1.0, 3.0, 1 / 3, 9.0, 1 / 9, 27.0, 1 / 27)
"""What a method's default rate is multiplied by, trial after trial."""
MAX_TRIALS = len(_LADDER)

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of a table: what is trained, and how."""

    key: str
    """Its name on the command line and in folders."""
    method: str
    """The paper's name of the method, which its published rows have too."""
    settings: Settings
    """Settings of `TrainConfig` by dotted name."""
    setting: str = ""
    """What tells it apart from other rows of its method."""

    def rates(self, trials: int) -> list[float]:
        """Return the learning rates to try, from small to large, two digits each."""
        middle = min(DEFAULT_RATES[name] for name in self.settings["method"].split("+"))
        return sorted(float(f"{middle * factor:.1e}") for factor in _LADDER[:trials])

    @property
    def label(self) -> str:
        """The method with its setting."""
        return f"{self.method} {self.setting}".strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One score of a data set, as the paper's table prints it."""

    name: str
    """Its column in the published table."""
    score: str
    """Its name among the scores of an evaluation."""
    scale: float = 1.0
    """From the evaluation's unit to the table's."""
    digits: int = 1
    """Digits after the point, as the table prints them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyData:
    """The data of one or several columns."""

    key: str
    """Its name on the command line and in folders."""
    task: str
    """The named task."""
    columns: tuple[Column, ...]
    max_length: int = 128
    """Longest example, in tokens; longer ones are cut."""
    limit: int | None = None
    """Training examples that the study itself asks for (Table 16)."""
    scored: str | None = None
    """Which of several validation sets the table is about; None for all."""

    @property
    def split(self) -> Literal["validation", "test"]:
        """The split that is scored at the end."""
        return task_type(self.task).scored_split

    @property
    def holds_out(self) -> bool:
        """Whether part of the training data is held out for choices, since the scored split is the validation one."""
        return self.split == "validation"

    @property
    def metric(self) -> str:
        """The score on held-out data that choices are made by."""
        task = task_type(self.task)
        return "loss" if task.kind == "text" else task.metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A table of the paper as something to run."""

    table: PublishedTable
    base: str
    """The model that is taken where none is named."""
    data_sets: tuple[StudyData, ...]
    variants: tuple[Variant, ...]
    average: str | None = None
    """The column with the mean over all others, where the table has one."""
    measures: Literal["scores", "amplification"] = "scores"
    """What the numbers are: scores of an evaluation, or what the adapter amplifies in its base."""
    notes: tuple[str, ...] = field(default=())

    def choose(self, data_sets: tuple[str, ...] | None, variants: tuple[str, ...] | None) -> Study:
        """Return the study with some data sets and variants only, in the order of the table.

        Raises:
            ConfigurationError: A name is none of the study's, or stands twice.
        """
        chosen_sets = _chosen("tasks", self.data_sets, data_sets)
        chosen_variants = _chosen("methods", self.variants, variants)
        return replace(self, data_sets=chosen_sets, variants=chosen_variants)


def _chosen(option: str, items: tuple[Any, ...], names: tuple[str, ...] | None) -> tuple[Any, ...]:
    if names is None:
        return items
    known = {item.key: item for item in items}
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"{option} names '{name}'; this table has {', '.join(known)}.{nearest(name, known)}"
            )
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(
            f"{option} is {', '.join(names) or 'empty'}; name each once, and at least one."
        )
    return tuple(item for key, item in known.items() if key in names)
