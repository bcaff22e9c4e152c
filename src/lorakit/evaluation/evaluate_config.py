"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorakit.configuration import conform, strict
from lorakit.data.data_config import DataConfig
from lorakit.errors import ConfigurationError, require_at_least, require_suffix
from lorakit.evaluation.decoding import Decoding
from lorakit.methods.registry import use_method
from lorakit.models.base_config import BaseConfig

Score = Literal["loss", "text"]


@strict
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `lorakit evaluate`, which scores a base model with or without an adapter on held-out data."""

    data: DataConfig
    """Held-out data, and the format of its examples."""
    base: BaseConfig | None = None
    """The base model; by default the base that the adapter records."""
    adapter: str | None = None
    """Adapter folder; omit to score the base model."""
    compare: bool = True
    """For text generation with an adapter, also score the base without it, which takes as long again. A classifier's
    base has no trained head, so it is not scored."""
    allow_other_base: bool = False
    """Allow a base other than the one recorded in the adapter."""
    method: str | None = None
    """Custom method of the adapter: path/to/file.py:Class."""
    split: Literal["validation", "test"] | None = None
    """Split to score. The default is test, or without test data validation. For a named task it is the split of
    published scores (validation for GLUE, whose test sets have no public labels)."""
    scores: tuple[Score, ...] = ("loss", "text")
    """For text generation: the held-out loss, the scores of generated text (BLEU and ROUGE-L, or those of a named
    task), or both. Classification and regression always compute all their scores."""
    limit: int | None = None
    """Score only the first prompts, this many; null scores all. Rows with the same prompt count once."""
    lowercase: bool = True
    """Lowercase generated text and references for BLEU. Named tasks ignore this setting."""
    decoding: Decoding | None = None
    """Settings of text generation. Unset ones have the values of the named task; without a task, decoding is greedy."""
    batch_size: int = 16
    """Examples per forward pass of the loss; decoding.batch_size is for generation."""
    output: str | None = None
    """Write each example's prompt, output and references to this .jsonl file, and a report beside it (.html)."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        conform(self)
        if self.method is not None:
            use_method(self.method)
        if not self.scores:
            raise ConfigurationError("scores is empty; name loss, text or both.")
        require_at_least("batch_size", self.batch_size, 1)
        require_suffix("output", self.output, ".jsonl")
        require_at_least("limit", self.limit, 1)
