"""Options of the measures of `lorakit analyze`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.compute.adapted_config import AdaptedConfig, AdapterFileConfig
from lorakit.configuration import LocalPath
from lorakit.errors import require_suffix


@dataclass(frozen=True, kw_only=True)
class OutputFiles:
    """Output files of a command, and their formats."""

    json: bool = False
    """Print JSON."""
    plot: LocalPath | None = None
    """Write a figure to this file (.png, .svg or .pdf)."""
    report: LocalPath | None = None
    """Write an HTML report to this file (.html)."""
    overwrite: bool = False
    """Replace an existing report."""

    def require_writable(self) -> None:
        """Reject, before the computation, files that cannot be written after it.

        Raises:
            ConfigurationError: A file has the wrong suffix, or the package that draws charts is not installed.
            RunFolderError: A file exists, or cannot be written.
        """
        from lorakit import storage
        from lorakit.reporting import drawing

        if self.plot is not None:
            drawing.require_format(self.plot)
            storage.require_free_file(self.plot, overwrite=True)
        if self.report is not None:
            require_suffix("report", self.report, ".html")
            storage.require_free_file(self.report, overwrite=self.overwrite)
        if self.plot is not None or self.report is not None:
            drawing.require_drawing()

    def write(self, draw: Callable[[], Any], page: Callable[..., Any]) -> list[str]:
        """Write the figure and the report, if set; return a sentence for each. `page` takes a `command`."""
        from lorakit.reporting import drawing
        from lorakit.training.environment import command

        written = []
        if self.plot is not None:
            drawing.save(draw(), self.plot)
            written.append(f"Figure in {self.plot}.")
        if self.report is not None:
            page(command=command()).write(self.report)
            written.append(f"Report in {self.report}.")
        return written


@dataclass(frozen=True, kw_only=True)
class Shown(OutputFiles, AdapterFileConfig):
    """Options of measures that read adapter files."""

    alpha: float | None = None
    """alpha of a loralib file, which does not store it."""
    layers: bool = False
    """Print one line per matrix instead of one per kind of layer."""


@dataclass(frozen=True, kw_only=True)
class OnBase(Shown, AdaptedConfig):
    """Options of measures that also read the weights of the base."""

    adapter: LocalPath
    """Adapter folder (lorakit or PEFT), a loralib file, or a run's checkpoint folder."""
    only: str | None = None
    """Analyze only the matrices whose names match this regular expression."""


@dataclass(frozen=True, kw_only=True)
class SpectrumConfig(Shown):
    """Options of `lorakit analyze spectrum`."""

    adapter: LocalPath
    """Adapter folder (lorakit or PEFT), a loralib file, or a run's checkpoint folder."""
    energy: float = 0.9
    """Fraction of the squared norm that the suggested rank keeps."""


@dataclass(frozen=True, kw_only=True)
class PairConfig(Shown):
    """Options of `lorakit analyze diff`."""

    first: LocalPath
    """Adapter folder (lorakit or PEFT), a loralib file, or a run's checkpoint folder."""
    second: LocalPath
    """The other side of the comparison: another adapter, or a later checkpoint (RUN/checkpoints/step-000100)."""


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig(PairConfig):
    """Options of `lorakit analyze similarity`."""

    only: str | None = None
    """Analyze only the matrices whose names match this regular expression."""
    side: Literal["A", "B"] = "A"
    """Directions in the figure: A (input) or B (output)."""


@dataclass(frozen=True, kw_only=True)
class AmplificationConfig(OnBase):
    """Options of `lorakit analyze amplification`."""

    base_directions: float | None = None
    """Also compare the directions of the weight update with this fraction of the leading directions of the base, for
    example 0.1. The figure then shows this comparison, as the paper's figure 8."""
    seed: int = 0
    """Seed for the random directions."""


@dataclass(frozen=True, kw_only=True)
class IntrudersConfig(OnBase):
    """Options of `lorakit analyze intruders`."""

    top: int = 10
    """Number of leading singular vectors to examine in each matrix."""
    threshold: float = 0.5
    """A singular vector is an intruder if its cosines with all those of the base are below this."""


@dataclass(frozen=True, kw_only=True)
class DriftConfig(OutputFiles, AdaptedConfig):
    """Options of `lorakit analyze drift`."""

    adapter: LocalPath
    """Adapter folder (lorakit or PEFT)."""
    text: LocalPath
    """UTF-8 text file. Each non-blank line is one text."""
    limit: int | None = None
    """Number of texts to read, from the start. null reads all."""
    max_length: int = 512
    """Longer texts are split into pieces of this many tokens."""
    batch_size: int = 4
    """Texts per forward pass."""
