"""Settings for scoring an adapter that was computed from others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lorakit.data.data_config import DataConfig
from lorakit.errors import ConfigurationError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate_config import Score


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Data and settings for scoring a computed adapter and its inputs."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data to score the result and its inputs on, as in lorakit evaluate; without data nothing is scored."""
    split: Literal["validation", "test"] = "test"
    """Split of the data to score."""
    scores: tuple[Score, ...] = ("loss",)
    """For text generation: the loss of the split, the scores of generated text, or both."""
    limit: int | None = None
    """Score only the first prompts, up to this number; null scores all."""
    decoding: Decoding = field(default_factory=Decoding)
    """Decoding settings for generated text."""
    batch_size: int = 16
    """Examples per forward pass, except for generation."""

    def __post_init__(self) -> None:
        if self.data != DataConfig() and self.data.source(self.split) is None:
            raise ConfigurationError(
                f"split is {self.split}, but data has no {self.split} data. Set data.{self.split} or split."
            )
