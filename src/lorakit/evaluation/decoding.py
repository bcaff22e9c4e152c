"""Settings of text generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.configuration import conform, strict
from lorakit.errors import ConfigurationError, require_at_least


@strict
@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of text generation: greedy by default, sampling above temperature 0, beam search above one beam.

    A setting of None has the value of the named task, or else the default in its help text.
    """

    max_new_tokens: int | None = None
    """Maximum number of new tokens per prompt, by default 128. Generation stops earlier at an end-of-sequence token."""
    temperature: float | None = None
    """Sampling temperature. 0, the default, always chooses the likeliest token; 1 samples from the model's
    distribution."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability; by default 1."""
    top_k: int | None = None
    """Sample from this many likeliest tokens; 0, the default, samples from all."""
    beams: int | None = None
    """Number of beams; 1, the default, disables beam search."""
    length_penalty: float | None = None
    """Exponent of the length in beam search: scores are log-likelihood / length ** length_penalty. By default 1; lower
    values favour short texts."""
    no_repeat_ngram: int | None = None
    """Length of n-grams that must not occur twice in the new text; 0, the default, allows all. The prompt's do not
    count."""
    batch_size: int | None = None
    """Prompts per batch, by default 16."""
    seed: int | None = None
    """Seed of sampling, by default 0."""

    def __post_init__(self) -> None:
        conform(self, "decoding")
        least = {"max_new_tokens": 1, "beams": 1, "batch_size": 1}
        for name, value in self._settings().items():
            if name not in ("length_penalty", "top_p"):
                require_at_least(f"decoding.{name}", value, least.get(name, 0))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigurationError(
                f"decoding.top_p is {self.top_p}; it must be above 0 and at most 1."
            )
        if not self.temperature and ((self.top_p or 1) < 1 or self.top_k):
            raise ConfigurationError(
                "decoding.top_p and top_k need sampling, but temperature is 0, which is greedy. Set temperature, for "
                "example to 1."
            )
        if self.temperature and (self.beams or 1) > 1:
            raise ConfigurationError(
                "decoding.temperature and beams exclude each other: sample (beams 1) or search (temperature 0)."
            )

    @property
    def new_tokens(self) -> int:
        """Return the maximum number of new tokens, with its default."""
        return self.max_new_tokens or 128

    def over(self, defaults: Mapping[str, Any] | None) -> Decoding:
        """Return these settings, with `defaults` for the unset ones. Sampling ignores defaults of beam search."""
        ignored = ("beams", "length_penalty") if self.temperature else ()
        applied = {name: value for name, value in (defaults or {}).items() if name not in ignored}
        return Decoding(**{**applied, **self._settings()})

    def _settings(self) -> dict[str, Any]:
        """Return the settings other than None."""
        return {name: value for name, value in vars(self).items() if value is not None}
