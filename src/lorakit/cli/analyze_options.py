"""The options of `lorakit analyze`'s measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorakit.errors import ConfigurationError
from lorakit.models.base_config import BaseConfig


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where a measure goes beside the screen."""

    json: bool = False
    """Print JSON for programs."""
    plot: str | None = None
    """Draw a figure into this file (.png, .svg or .pdf)."""
    report: str | None = None
    """Write figure, numbers and findings into this page (.html)."""
    overwrite: bool = False
    """Replace an existing page."""

    def require_writable(self) -> None:
        """Refuse, before the work, files that could not be written after it.

        Raises:
            ConfigurationError: A suffix does not fit, or what draws is not installed.
            RunFolderError: A file is in the way.
        """
        from lorakit import storage
        from lorakit.reporting import drawing

        if self.plot is not None:
            drawing.require_format(self.plot)
            storage.require_free_file(self.plot, overwrite=True)
        if self.report is not None:
            if not self.report.endswith(".html"):
                raise ConfigurationError(f"report is '{self.report}'; a page's name ends in .html.")
            storage.require_free_file(self.report, overwrite=self.overwrite)
        if self.plot is not None or self.report is not None:
            drawing.require_drawing()


@dataclass(frozen=True, kw_only=True)
class Shown(Written):
    """How a measure is shown."""

    alpha: float | None = None
    """The constant of a loralib file, which does not record it."""
    method: str | None = None
    """A method of your own that an adapter was trained with: path/to/file.py:Class."""
    layers: bool = False
    """One line for each matrix instead of one for each kind of layer."""


@dataclass(frozen=True, kw_only=True)
class OnBase(Shown):
    """What a measure that reads the base's weights looks at."""

    adapter: str
    """Adapter folder (lorakit's or PEFT's), a loralib file, or a run's checkpoint folder."""
    base: BaseConfig | None = None
    """The base model; by default the one that the adapter records."""
    allow_other_base: bool = False
    """Accept a base other than the one the adapter records, knowing what that means."""
    only: str | None = None
    """Look at the matrices in whose names this regular expression is found."""


@dataclass(frozen=True, kw_only=True)
class SpectrumConfig(Shown):
    """What `lorakit analyze spectrum` shows."""

    adapter: str
    """Adapter folder (lorakit's or PEFT's), a loralib file, or a run's checkpoint folder."""
    energy: float = 0.9
    """Share of the squared norm that the suggested rank keeps."""


@dataclass(frozen=True, kw_only=True)
class PairConfig(Shown):
    """What `lorakit analyze diff` compares."""

    first: str
    """Adapter folder (lorakit's or PEFT's), a loralib file, or a run's checkpoint folder."""
    second: str
    """What it is compared with: another adapter, or a later checkpoint (RUN/checkpoints/step-000100)."""


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig(PairConfig):
    """What `lorakit analyze similarity` compares."""

    only: str | None = None
    """Look at the matrices in whose names this regular expression is found."""
    side: Literal["A", "B"] = "A"
    """Which directions the figure shows: A, of the input, or B, of the output."""


@dataclass(frozen=True, kw_only=True)
class AmplificationConfig(OnBase):
    """What `lorakit analyze amplification` looks at."""

    base_directions: float | None = None
    """Also compare the change's directions with this share of the base's leading ones, for example 0.1; the
    figure then shows them, as the paper's figure 8."""
    seed: int = 0
    """Seed of the random directions."""


@dataclass(frozen=True, kw_only=True)
class IntrudersConfig(OnBase):
    """What `lorakit analyze intruders` looks at."""

    top: int = 10
    """Number of leading singular vectors to examine in each matrix."""
    threshold: float = 0.5
    """A vector whose cosines with all of the base's are below this is an intruder."""


@dataclass(frozen=True, kw_only=True)
class DriftConfig(Written):
    """What `lorakit analyze drift` compares."""

    adapter: str
    """Adapter folder (lorakit's or PEFT's)."""
    text: str
    """UTF-8 text file; each line that is not blank is one text."""
    base: BaseConfig | None = None
    """The base model; by default the one that the adapter records."""
    allow_other_base: bool = False
    """Accept a base other than the one the adapter records, knowing what that means."""
    method: str | None = None
    """A method of your own that the adapter was trained with: path/to/file.py:Class."""
    limit: int | None = None
    """Read the first texts only; none reads all."""
    max_length: int = 512
    """Longer texts are cut into pieces of this many tokens."""
    batch_size: int = 4
    """Texts computed together."""
