"""The record of a finished run: what is needed to compare it with others, and to repeat it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.configuration import as_dict, flat_settings
from lorakit.data import DataConfig
from lorakit.errors import RunFolderError
from lorakit.metrics import WITHOUT_JAVA
from lorakit.models.base_config import BaseConfig
from lorakit.paper.resampling import of_lines
from lorakit.training.config import TrainConfig

_OF_ONE_MACHINE = ("output", "resume", "overwrite", "data.root", "data.train", "base.device")
"""Settings that a record leaves out: where files are, and how this call treats them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The saved outcome of a finished run; without held-out scores and inputs if training diverged.

    It says what is needed to repeat the run: settings, digests of base, data and source files, software, threads and
    processor.
    """

    data_set: str
    variant: str
    rate: float
    seed: int
    steps: int = 0
    best_step: int | None = None
    held_out: dict[str, float] = field(default_factory=dict)
    """Scores on held-out data at the best step. They select the learning rate."""
    seconds: float = 0.0
    """Time in training steps."""
    processor_seconds: float = 0.0
    """Time of the processor in training steps and in scoring, over all threads; of a run that diverged, in its last
    session."""
    peak_memory: int = 0
    """In bytes."""
    tokens: int = 0
    """Tokens of the examples of all steps."""
    failure: str = ""
    """How training diverged; empty if it did not."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores on the table's data; empty for a trial whose rate was not chosen."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """For each evaluation: the step, the held-out scores, and the mean training loss since the one before."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the run, by dotted name: all of its method and optimizer, others if they differ from the
    defaults."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of the base and of the data, by name."""
    processor: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    threads: list[int] = field(default_factory=list)
    """Threads of the sessions that trained and scored the run, each number once; empty if not recorded."""
    device: str = ""
    """Devices of these sessions, a CPU with its vector instructions; empty if not recorded."""
    source: str = ""
    """Digest of lorakit's source files; empty if not recorded."""
    scored: str = ""
    """Digest of the data that `scores` are of, then `eval_limit` if it is set; empty if not recorded."""
    cut: int = 0
    """Number of answers that were cut at the maximum number of new tokens."""
    sums: dict[str, list[str]] = field(default_factory=dict)
    """By the name of a score that is a function of sums over the examples (`Column.sums`): for each sum a line with the
    number that each scored example adds, in the order of the data. With those of another run they show how far the
    difference depends on the choice of the examples. Empty if not recorded."""

    @property
    def lacks_scores(self) -> bool:
        """Whether the run has not been scored, though its training did not diverge."""
        return not (self.scores or self.failure)

    def score(self, name: str) -> float | None:
        """Return a score, computed with Java or without; None if there is none."""
        return {column_of(key): value for key, value in self.scores.items()}.get(name)

    def summands(self, score: str, size: int) -> np.ndarray:
        """Return `sums` of a score, shape (examples, size).

        Raises:
            RunFolderError: They are damaged.
        """
        try:
            summands = of_lines(self.sums[score])
            if summands.ndim != 2 or summands.shape[1] != size:
                raise ValueError(f"it does not have {size} lines")
            return summands
        except ValueError as error:
            raise RunFolderError(
                f"The record of {self.data_set}/{self.variant} with rate {self.rate:g} and seed {self.seed} is "
                f"damaged: sums.{score}: {error}. Restore the file, or delete it to train this run again."
            ) from None


def column_of(score: str) -> str:
    """Return the name of a score without the mark that it was computed without Java."""
    return score.removesuffix(WITHOUT_JAVA)


def recorded_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that describe a run: those of its methods and optimizer, and others that are not defaults."""
    described = ("optimizer.", *(f"{name}." for name in config.method_names))
    own = {
        name: value
        for name, value in flat_settings(as_dict(config)).items()
        if name.startswith(described)
    }
    return {**changed_settings(config), **own}


def changed_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults, without those of one machine."""
    base, data = BaseConfig(name=config.base.name), DataConfig(task=config.data.task)
    usual = TrainConfig(base=base, data=data, output=config.output)
    usual_settings = flat_settings(as_dict(usual))
    changed = {
        name: value
        for name, value in flat_settings(as_dict(config)).items()
        if value != usual_settings.get(name) and name not in _OF_ONE_MACHINE
    }
    return {"base.name": config.base.name, "data.task": config.data.task, **changed}
