"""How text is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.configuration import conform
from lorakit.errors import ConfigurationError, require_at_least

SEARCH = ("beams", "length_penalty")
"""Settings of `Decoding` that only a beam search has."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is generated: greedy by default, sampling above temperature 0, beam search above one beam.

    What is not set is None: a named task may set it, else it is what the field says.
    """

    max_new_tokens: int | None = None
    """Tokens generated per prompt at most, by default 128; an end-of-sequence token ends it earlier."""
    temperature: float | None = None
    """0, the default, takes the likeliest token each time; above it, tokens are drawn (1 = the model's own
    distribution)."""
    top_p: float | None = None
    """Draw from the likeliest tokens that hold this share of the probability; by default 1."""
    top_k: int | None = None
    """Draw from this many likeliest tokens; 0, the default, is all of them."""
    beams: int | None = None
    """Beams of a beam search; 1, the default, is none."""
    length_penalty: float | None = None
    """Exponent of the length by which a beam's log-likelihood is divided, by default 1; below it favours short
    texts."""
    no_repeat_ngram: int | None = None
    """Length of n-grams that may not occur twice in a text; 0, the default, allows all."""
    batch_size: int | None = None
    """Prompts generated together, by default 16."""
    seed: int | None = None
    """Seed of the draws, by default 0."""

    def __post_init__(self) -> None:
        conform(self, "decoding")
        least = {"max_new_tokens": 1, "beams": 1, "batch_size": 1}
        for name, value in self._given().items():
            if name not in ("length_penalty", "top_p"):
                require_at_least(f"decoding.{name}", value, least.get(name, 0))
        if self.seed is not None and self.seed >= 2**63:
            raise ConfigurationError(f"decoding.seed is {self.seed}; it must be below 2^63.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigurationError(
                f"decoding.top_p is {self.top_p}; it must be above 0 and at most 1."
            )
        if not self.temperature and ((self.top_p or 1) < 1 or self.top_k):
            raise ConfigurationError(
                "decoding.top_p and top_k choose among draws, but temperature 0 draws nothing. Set temperature, "
                "for example to 1."
            )
        if self.temperature and (self.beams or 1) > 1:
            raise ConfigurationError(
                "decoding.temperature and beams exclude each other: draw (beams 1) or search (temperature 0)."
            )

    def over(self, own: Mapping[str, Any] | None) -> Decoding:
        """Return these settings, and those of a task where nothing is set: not its search, where texts are drawn."""
        search = SEARCH if self.temperature else ()
        kept = {name: value for name, value in (own or {}).items() if name not in search}
        return Decoding(**{**kept, **self._given()})

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}
