"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.configuration import conform
from lorakit.data.data_config import DataConfig
from lorakit.errors import ConfigurationError, require_at_least
from lorakit.evaluation.decoding import Decoding
from lorakit.methods.registry import use_method
from lorakit.models.base_config import BaseConfig

Score = Literal["loss", "text"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `lorakit evaluate` scores: a base model, with or without an adapter, on held-out data."""

    data: DataConfig
    """The data and how an example is read from it."""
    base: BaseConfig | None = None
    """The base model; by default the one that the adapter records."""
    adapter: str | None = None
    """Adapter folder; none scores the base alone."""
    allow_other_base: bool = False
    """Score an adapter on a base other than the one it records, knowing what that means."""
    method: str | None = None
    """A method of your own that the adapter was trained with: path/to/file.py:Class."""
    split: Literal["validation", "test"] | None = None
    """Which of the data's held-out parts is scored; by default test, and for a named task the part that published
    scores are of (validation for GLUE, whose tests have no public labels)."""
    scores: tuple[Score, ...] = ("loss", "text")
    """For text generation: the held-out loss, the scores of generated text (BLEU and ROUGE-L, or those of a named
    task), or both. Classification and regression always give all of theirs."""
    limit: int | None = None
    """Score this many prompts (all rows that share one count once), from the first; none scores all."""
    lowercase: bool = True
    """Compare generated text and references in lower case for BLEU; a named task has rules of its own."""
    decoding: Decoding | None = None
    """How text is generated; what is not set is as the named task has it, and greedy without one."""
    batch_size: int = 16
    """Examples per forward pass where nothing is generated."""
    output: str | None = None
    """Write each example's prompt, output and references to this .jsonl file."""
    overwrite: bool = False
    """Replace an existing output."""

    def __post_init__(self) -> None:
        conform(self)
        if self.method is not None:
            use_method(self.method)
        if not self.scores:
            raise ConfigurationError("scores is empty; name loss, text or both.")
        require_at_least("batch_size", self.batch_size, 1)
        if self.output is not None and Path(self.output).suffix != ".jsonl":
            raise ConfigurationError(
                f"output is {self.output!r}; it must end in .jsonl. The report goes beside it, in .html."
            )
        if self.limit is not None:
            require_at_least("limit", self.limit, 1)
