"""What to score a model on: settings of an evaluation, and of the scores of a computed adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lorakit.configuration import conform, strict
from lorakit.data.data_config import DataConfig
from lorakit.errors import ConfigurationError, require_at_least
from lorakit.evaluation.decoding import Decoding

Score = Literal["loss", "text"]
ScoredSplit = Literal["validation", "test"]


@strict
@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Data and settings for scoring."""

    data: DataConfig = field(default_factory=DataConfig)
    """Held-out data, and the format of its examples."""
    split: ScoredSplit | None = None
    """Split to score. The default is the split of the file that you name, test or validation. If you name both or
    neither, it is test, but for a named task the split of published scores (validation for GLUE, whose test sets have
    no public labels)."""
    scores: tuple[Score, ...] = ("loss",)
    """For text generation: the held-out loss, the scores of generated text (BLEU and ROUGE-L, or those of a named
    task), or both. Classification and regression always compute all their scores."""
    limit: int | None = None
    """Score only this many prompts, evenly spaced over the file; null scores all. Rows with the same prompt count
    once."""
    decoding: Decoding | None = None
    """Settings of text generation. Unset ones have the values of the named task; without a task, decoding is greedy."""
    batch_size: int = 16
    """Examples per forward pass of the loss; decoding.batch_size is for generation."""

    def __post_init__(self) -> None:
        conform(self)
        if not self.scores:
            raise ConfigurationError("scores is empty; name loss, text or both.")
        require_at_least("batch_size", self.batch_size, 1)
        require_at_least("limit", self.limit, 1)

    def scored_split(self, data: DataConfig | None = None) -> ScoredSplit:
        """Return the split to score, of `data` if its task has been resolved.

        Data that the configuration names comes before the data of a named task, then the split of the task's published
        scores, then test data.

        Raises:
            ConfigurationError: There is no such data.
        """
        data = data or self.data
        if self.split is not None:
            if not data.has(self.split):
                raise ConfigurationError(
                    f"split is {self.split}, but data has no {self.split} data. Set data.{self.split} or split."
                )
            return self.split
        preferred: ScoredSplit = "test" if data.task_type is None else data.task_type.scored_split
        order: tuple[ScoredSplit, ...] = (preferred, "test", "validation")
        for has_data in (data.names, data.has):
            for split in order:
                if has_data(split):
                    return split
        raise ConfigurationError(
            "There is no data to score. Name a file, --data.test FILE, or a share of the training data, --data.train "
            "FILE --data.validation_fraction 0.1."
        )
