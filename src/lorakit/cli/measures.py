"""The measures of `lorakit analyze`: each has a class of options and a function that computes its findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.cli.analyze_options import (
    AmplificationConfig,
    DriftConfig,
    IntrudersConfig,
    OnBase,
    OutputFiles,
    PairConfig,
    SimilarityConfig,
    SpectrumConfig,
)
from lorakit.formatting import number, percentage

if TYPE_CHECKING:
    from lorakit.adapters.formats.stored import StoredAdapter
    from lorakit.analysis.base_weights import Weights


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a measure, for the console, JSON, the figure and the report."""

    facts: dict[str, Any]
    """Values for JSON."""
    rows: dict[str, dict[str, Any]]
    """For each matrix, its numbers by heading."""
    lines: list[str]
    """Sentences about all matrices."""
    draw: Callable[[], Any]
    """Returns the figure."""
    what: str = "matrix"
    """Heading of the names of `rows`."""
    caption: str | None = None
    """Heading of the table. With a caption the table follows the lines, with one line per row."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """An entry of `MEASURES`."""

    about: str
    """What it measures, for help and reports."""
    options: type[OutputFiles]
    """Class of its options."""
    subjects: tuple[str, ...]
    """Options that name what is measured; arguments set them in this order."""
    find: Callable[[Any], Findings]
    """Computes the findings from the options."""


def _spectrum(config: SpectrumConfig) -> Findings:
    from lorakit import analysis
    from lorakit.analysis import figures
    from lorakit.analysis.spectrum import UNTRAINED

    found = analysis.adapter_spectrum(config.adapter, alpha=config.alpha)
    facts = found.to_json(config.energy)
    rows = {
        name: {
            "rank": layer["rank"],
            "norm": layer["norm"],
            "effective rank": layer["effective_rank"],
            "stable rank": layer["stable_rank"],
            "first direction": (layer["singular_values"][0] / (layer["norm"] or 1)) ** 2,
            f"rank for {config.energy:.4g}": layer["suggested_rank"],
        }
        for name, layer in facts["layers"].items()
    }
    shares = ", ".join(
        f"{rank}: {percentage(float(found.energy[rank - 1]))}" for rank in _ranks(len(found.energy))
    )
    lines = [
        f"Fraction of the total squared norm kept at rank {shares}.",
        f"Rank {facts['overall']['suggested_rank']} in every layer keeps {config.energy:.4g} of it.",
    ]
    if not found.norm:
        lines = [UNTRAINED]
    return Findings(
        facts=facts,
        rows=rows,
        lines=lines,
        draw=lambda: figures.spectrum_figure(found, config.energy),
    )


def _similarity(config: SimilarityConfig) -> Findings:
    from lorakit import analysis
    from lorakit.analysis import figures

    found = analysis.adapter_similarity(
        config.first, config.second, alpha=config.alpha, only=config.only
    )
    rows = {
        name: {
            f"{side} {heading}": layer[side][key]
            for side in "AB"
            for heading, key in (
                ("phi(1,1)", "phi_1_1"),
                ("whole", "phi_whole"),
                ("at random", "random_whole"),
            )
        }
        for name, layer in found.to_json()["layers"].items()
    }
    lines = [
        _shared(space, found.overall[side]) for side, space in (("A", "Input"), ("B", "Output"))
    ]
    lines.append(
        "Medians over the matrices. 1: one span contains the other. 0: the spans are orthogonal."
    )
    return Findings(
        facts=found.to_json(),
        rows=rows,
        lines=lines,
        draw=lambda: figures.similarity_figure(found, config.side),
    )


def _shared(space: str, medians: dict[str, float]) -> str:
    return (
        f"{space} directions: the first directions overlap by {number(medians['phi_1_1'])} "
        f"(random: {number(medians['random_1_1'])}), the full spans by {number(medians['phi_whole'])} "
        f"(random: {number(medians['random_whole'])})."
    )


def _amplification(config: AmplificationConfig) -> Findings:
    from lorakit import analysis
    from lorakit.analysis import figures
    from lorakit.cli.console import StatusLine

    stored, weights = _opened(config)
    with StatusLine() as show:
        found = analysis.adapter_amplification(
            stored,
            weights,
            only=config.only,
            seed=config.seed,
            base_directions=config.base_directions,
            progress=show,
        )
    rows = {
        name: {
            "rank": layer.rank,
            "|W|": layer.base_norm,
            "|dW|": layer.change_norm,
            "W on dW": layer.projected,
            "W on its own": layer.projected_own,
            "W on random": layer.expected_random,
            "factor": layer.factor,
        }
        for name, layer in found.layers.items()
    }
    lines = []
    if (overall := found.overall) is not None:
        lines.append(
            f"W on dW is {number(overall['over_random'])} times W on random directions, and "
            f"{number(overall['of_own'])} times W on its own leading directions (medians over the matrices)."
        )
        lines.append(f"dW is {number(overall['factor'])} times as large as W on dW (median).")
    lines.append("Frobenius norms; factor = |dW| / (W on dW).")
    draw = figures.base_similarity_figure if found.phi else figures.amplification_figure
    return Findings(facts=found.to_json(), rows=rows, lines=lines, draw=lambda: draw(found))


def _intruders(config: IntrudersConfig) -> Findings:
    from lorakit import analysis
    from lorakit.analysis import figures
    from lorakit.cli.console import StatusLine

    stored, weights = _opened(config)
    with StatusLine() as show:
        found = analysis.adapter_intruders(
            stored,
            weights,
            only=config.only,
            top=config.top,
            threshold=config.threshold,
            progress=show,
        )
    rows = {
        name: {
            "intruders": layer.count,
            "first at": next((j for j, x in enumerate(layer.is_intruder.tolist(), 1) if x), None),
            "smallest cosine": float(layer.cosine.min()),
            "largest singular value": float(layer.singular_values[0]),
            "last examined": float(layer.singular_values[-1]),
        }
        for name, layer in found.layers.items()
    }
    examined = sum(len(layer.cosine) for layer in found.layers.values())
    lines = [f"{found.count} of {examined} leading singular vectors match none of the base's."]
    return Findings(
        facts=found.to_json(), rows=rows, lines=lines, draw=lambda: figures.intruders_figure(found)
    )


def _diff(config: PairConfig) -> Findings:
    from lorakit import analysis
    from lorakit.analysis import figures

    found = analysis.adapter_diff(config.first, config.second, alpha=config.alpha)
    rows = {
        name: {
            "first": one.first,
            "second": one.second,
            "distance": one.distance,
            "relative": one.relative,
            "angle": one.angle,
        }
        for name, one in found.changes_and_trained.items()
    }
    lines = []
    if found.layers:
        overall = found.overall
        angle = "-" if overall.angle is None else number(overall.angle)
        lines.append(
            f"Overall: norms {number(overall.first)} and {number(overall.second)}, distance {number(overall.distance)} "
            f"({number(overall.relative)} of the first norm), angle {angle} degrees."
        )
        lines.append(f"Largest distance: {', '.join(found.most_moved()[:3])}.")
    return Findings(
        facts=found.to_json(), rows=rows, lines=lines, draw=lambda: figures.diff_figure(found)
    )


def _drift(config: DriftConfig) -> Findings:
    from lorakit import analysis
    from lorakit.analysis import figures
    from lorakit.cli.console import StatusLine

    with StatusLine() as show:
        found = analysis.adapter_drift(
            config.adapter,
            config.text,
            base=config.base,
            allow_other_base=config.allow_other_base,
            limit=config.limit,
            max_length=config.max_length,
            batch_size=config.batch_size,
            progress=lambda done: show(f"{done} pieces"),
        )
    most = sorted((piece.most for piece in found.pieces), key=lambda most: -most["kl"])[:5]
    rows = {
        f"{place}. ...{one['context'][-60:]!r}": {
            "KL": one["kl"],
            "base": repr(one["base"]),
            "adapted": repr(one["adapted"]),
        }
        for place, one in enumerate(most, 1)  # equal contexts are different rows
    }
    lines = [
        f"{found.positions:,} predictions on {found.texts:,} texts: KL(base || adapted) {number(found.kl)} nats "
        f"on average, the most likely token changed in {percentage(found.changed)}.",
        f"Loss on the texts: {number(found.loss_base)} with the base, {number(found.loss_adapted)} with the adapter.",
    ]
    return Findings(
        facts=found.to_json(),
        rows=rows,
        lines=lines,
        draw=lambda: figures.drift_figure(found),
        what="after",
        caption="Largest changes",
    )


def _opened(config: OnBase) -> tuple[StoredAdapter, Weights]:
    from lorakit.analysis import open_weights
    from lorakit.analysis.deltas import read
    from lorakit.compute.adapted import base_of
    from lorakit.compute.adapter_file import AdapterFile

    stored = read(config.adapter, alpha=config.alpha)
    base = base_of(config.base, AdapterFile(config.adapter, stored))  # its error names the file
    return stored, open_weights(base, stored, allow_other_base=config.allow_other_base)


def _ranks(count: int) -> list[int]:
    """Return the powers of two below `count`, then `count`."""
    return [rank for rank in (2**i for i in range(20)) if rank < count] + [count]


MEASURES = {
    "spectrum": Measure(
        about="Singular values of the weight update: effective rank, energy by rank, suggested rank",
        options=SpectrumConfig,
        subjects=("adapter",),
        find=_spectrum,
    ),
    "similarity": Measure(
        about="Overlap between the singular directions of two adapters (ranks, seeds, tasks)",
        options=SimilarityConfig,
        subjects=("first", "second"),
        find=_similarity,
    ),
    "amplification": Measure(
        about="How much the adapter amplifies directions of its base (the paper's Table 7 and figure 8)",
        options=AmplificationConfig,
        subjects=("adapter",),
        find=_amplification,
    ),
    "intruders": Measure(
        about="Singular vectors of the adapted weights that match none of the base's",
        options=IntrudersConfig,
        subjects=("adapter",),
        find=_intruders,
    ),
    "diff": Measure(
        about="Distance and angle between two adapters or checkpoints, and the layers that differ most",
        options=PairConfig,
        subjects=("first", "second"),
        find=_diff,
    ),
    "drift": Measure(
        about="KL divergence of the adapted model's predictions from the base's on a text",
        options=DriftConfig,
        subjects=("adapter", "text"),
        find=_drift,
    ),
}
