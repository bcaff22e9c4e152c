"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.compute.adapted_config import AdaptedConfig
from lorakit.configuration import LocalPath, strict
from lorakit.errors import require_suffix
from lorakit.evaluation.scoring_config import Score, ScoringConfig


@strict
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoringConfig, AdaptedConfig):
    """Settings of `lorakit evaluate`, which scores a base model with or without an adapter on held-out data."""

    adapter: LocalPath | None = None
    """Adapter folder; omit to score the base model."""
    compare: bool = True
    """For a language model with an adapter, also score the base without it, which takes as long again. A classifier's
    base has no trained head, so it is not scored."""
    scores: tuple[Score, ...] = ("loss", "text")
    """For text generation: the held-out loss, the scores of generated text (BLEU and ROUGE-L, or those of a named
    task), or both. Classification and regression always compute all their scores."""
    lowercase: bool = True
    """Lowercase generated text and references for BLEU. Named tasks ignore this setting."""
    output: LocalPath | None = None
    """Write each example's prompt, output and references to this .jsonl file, and a report beside it (.html)."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        ScoringConfig.__post_init__(self)
        AdaptedConfig.__post_init__(self)
        require_suffix("output", self.output, ".jsonl")
