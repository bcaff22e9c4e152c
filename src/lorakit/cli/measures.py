"""The measures of `lorakit analyze`: a function for each, from its options to its findings."""

from __future__ import annotations

from lorakit import analysis
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis import Weights, figures
from lorakit.analysis.deltas import read
from lorakit.analysis.report import Findings
from lorakit.analysis.spectrum import UNTRAINED
from lorakit.cli.analyze_options import (
    AmplificationConfig,
    DriftConfig,
    IntrudersConfig,
    OnBase,
    PairConfig,
    SimilarityConfig,
    SpectrumConfig,
)
from lorakit.cli.console import StatusLine
from lorakit.compute.adapted import base_of
from lorakit.compute.adapter_file import AdapterFile
from lorakit.formatting import number, percentage


def spectrum(config: SpectrumConfig) -> Findings:
    """Measure the singular values of each matrix."""
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


def similarity(config: SimilarityConfig) -> Findings:
    """Compare the directions of two adapters."""
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


def amplification(config: AmplificationConfig) -> Findings:
    """Measure how much each matrix amplifies directions of the base."""
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


def intruders(config: IntrudersConfig) -> Findings:
    """Find singular vectors that match none of the base's."""
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


def diff(config: PairConfig) -> Findings:
    """Measure the distances and angles between two adapters."""
    found = analysis.adapter_diff(config.first, config.second, alpha=config.alpha)
    rows = {
        name: {**vars(one), "relative": one.relative, "angle": one.angle}
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


def drift(config: DriftConfig) -> Findings:
    """Compare the predictions on a text with and without an adapter."""
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
    stored = read(config.adapter, alpha=config.alpha)
    base = base_of(config.base, AdapterFile(config.adapter, stored))  # its error names the file
    return stored, analysis.open_weights(base, stored, allow_other_base=config.allow_other_base)


def _ranks(count: int) -> list[int]:
    """Return the powers of two below `count`, then `count`."""
    return [rank for rank in (2**i for i in range(20)) if rank < count] + [count]
