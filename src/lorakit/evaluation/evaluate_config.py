"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.configuration import strict
from lorakit.errors import require_suffix
from lorakit.evaluation.scoring_config import Score, ScoringConfig
from lorakit.methods.registry import use_method
from lorakit.models.base_config import BaseConfig


@strict
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoringConfig):
    """Settings of `lorakit evaluate`, which scores a base model with or without an adapter on held-out data."""

    base: BaseConfig | None = None
    """The base model; by default the base that the adapter records."""
    adapter: str | None = None
    """Adapter folder; omit to score the base model."""
    compare: bool = True
    """For a language model with an adapter, also score the base without it, which takes as long again. A classifier's
    base has no trained head, so it is not scored."""
    allow_other_base: bool = False
    """Allow a base other than the one recorded in the adapter."""
    method: str | None = None
    """Custom method of the adapter: path/to/file.py:Class."""
    scores: tuple[Score, ...] = ("loss", "text")
    """For text generation: the held-out loss, the scores of generated text (BLEU and ROUGE-L, or those of a named
    task), or both. Classification and regression always compute all their scores."""
    lowercase: bool = True
    """Lowercase generated text and references for BLEU. Named tasks ignore this setting."""
    output: str | None = None
    """Write each example's prompt, output and references to this .jsonl file, and a report beside it (.html)."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is not None:
            use_method(self.method)
        require_suffix("output", self.output, ".jsonl")
