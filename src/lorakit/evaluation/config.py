"""Settings of evaluation and generation; training shares the ones that name the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lorakit.configuration import conform
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, require_at_least
from lorakit.methods.registry import use_method

DEVICES = ("cpu", "cuda", "mps", "xpu")

DType = Literal["auto", "float32", "bfloat16", "nf4", "int8"]
Score = Literal["loss", "text"]


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The base model: which one, and how it is computed."""

    name: str
    """A hub id, a local folder, a .gguf file, or a short name (smollm2-135m, minilm-l6)."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    dtype: DType = "auto"
    """Precision of the computation; auto is bfloat16 where the processor multiplies it natively, else float32.
    nf4 and int8 compute as auto does, over projections whose weights are kept in 4 or 8 bits."""
    device: str = "auto"
    """Where it is computed: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub repository. Only for repositories you have read."""

    def __post_init__(self) -> None:
        conform(self, "base")
        if not self.name:
            raise ConfigurationError("base.name is empty; name a model, for example smollm2-135m.")
        if self.device != "auto" and not re.fullmatch(
            rf"({'|'.join(DEVICES)})(:\d+)?", self.device
        ):
            raise ConfigurationError(
                f"base.device is {self.device!r}; write auto, cpu, cuda, cuda:1, mps or xpu."
            )

    def pick_device(self) -> torch.device:
        """Return the device that `device` stands for on this machine.

        Raises:
            ConfigurationError: The device named is not there.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        try:
            torch.empty(0, device=device)
            there = device.type != "cpu" or not device.index  # there is one, whatever its number
        except (AssertionError, RuntimeError):  # which of them depends on how torch was built
            there = False
        if not there:
            raise ConfigurationError(
                f"base.device is {self.device!r}, but this torch sees no such device. Write auto or cpu."
            )
        return device


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
