"""`lorakit analyze`: measures of adapters, as tables, JSON, figures and reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli.analyze_options import (
    AmplificationConfig,
    DriftConfig,
    IntrudersConfig,
    OnBase,
    PairConfig,
    SimilarityConfig,
    SpectrumConfig,
)
from lorakit.cli.parsing import parse
from lorakit.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.adapters.formats.stored import StoredAdapter
    from lorakit.analysis.base_weights import Weights

MEASURES = {
    "spectrum": "Singular values of the weight update: effective rank, energy by rank, suggested rank",
    "similarity": "Overlap between the singular directions of two adapters (ranks, seeds, tasks)",
    "amplification": "How much the adapter amplifies directions of its base (the paper's Table 7 and figure 8)",
    "intruders": "Singular vectors of the adapted weights that match none of the base's",
    "diff": "Distance and angle between two adapters or checkpoints, and the layers that differ most",
    "drift": "KL divergence of the adapted model's predictions from the base's on a text",
}


def run(argv: Sequence[str]) -> None:
    """Parse the measure and its options, compute it, and print it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    name, *rest = argv
    if name not in MEASURES:
        raise ConfigurationError(
            f"Unknown measure '{name}'.{nearest(name, MEASURES)} Measures: {', '.join(MEASURES)}."
        )
    _RUN[name](rest)


def _overview() -> str:
    width = max(map(len, MEASURES))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in MEASURES.items())
    return (
        "usage: lorakit analyze MEASURE ADAPTER [OTHER] [--option VALUE ...]\n\n"
        f"Analyze adapters.\n\n{lines}\n\n'lorakit analyze MEASURE --help' lists the options."
    )


def _spectrum(argv: Sequence[str]) -> None:
    config = _parse(SpectrumConfig, "spectrum", argv, "adapter")
    from lorakit import analysis
    from lorakit.analysis import figures
    from lorakit.analysis.spectrum import UNTRAINED

    found = analysis.adapter_spectrum(config.adapter, alpha=config.alpha)
    facts = found.to_json(config.energy)
    rows = {
        name: {
            "rank": len(layer["singular_values"]),
            "norm": layer["norm"],
            "effective rank": layer["effective_rank"],
            "stable rank": layer["stable_rank"],
            "first direction": layer["energy_by_rank"][0],
            f"rank for {config.energy:.4g}": layer["suggested_rank"],
        }
        for name, layer in facts["layers"].items()
    }
    shares = ", ".join(
        f"{rank}: {found.energy[rank - 1]:.1%}" for rank in _ranks(len(found.energy))
    )
    lines = [
        f"Fraction of the total squared norm kept at rank {shares}.",
        f"Rank {facts['overall']['suggested_rank']} in every layer keeps {config.energy:.4g} of it.",
    ]
    if not found.norm:
        lines = [UNTRAINED]
    _show(
        "spectrum",
        config,
        facts,
        rows,
        lines,
        lambda: figures.spectrum_figure(found, config.energy),
    )


def _similarity(argv: Sequence[str]) -> None:
    config = _parse(SimilarityConfig, "similarity", argv, "first", "second")
    from lorakit import analysis
    from lorakit.analysis import figures

    found = analysis.adapter_similarity(
        config.first, config.second, alpha=config.alpha, only=config.only
    )
    facts = found.to_json()
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
        for name, layer in facts["layers"].items()
    }
    lines = [
        _shared(space, found.overall[side]) for side, space in (("A", "Input"), ("B", "Output"))
    ]
    lines.append(
        "Medians over the matrices. 1: one span contains the other. 0: the spans are orthogonal."
    )
    _show(
        "similarity",
        config,
        facts,
        rows,
        lines,
        lambda: figures.similarity_figure(found, config.side),
    )


def _shared(space: str, medians: dict[str, float]) -> str:
    return (
        f"{space} directions: the first directions overlap by {medians['phi_1_1']:.3g} "
        f"(random: {medians['random_1_1']:.2g}), the full spans by {medians['phi_whole']:.3g} "
        f"(random: {medians['random_whole']:.3g})."
    )


def _amplification(argv: Sequence[str]) -> None:
    config = _parse(AmplificationConfig, "amplification", argv, "adapter")
    from lorakit import analysis
    from lorakit.analysis import figures

    stored, weights = _opened(config)
    found = analysis.adapter_amplification(
        stored,
        weights,
        only=config.only,
        seed=config.seed,
        share=config.base_directions,
        progress=_progress,
    )
    facts = found.to_json()
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
            f"W on dW is {overall['over_random']:.3g} times W on random directions, and {overall['of_own']:.3g} times "
            "W on its own leading directions (medians over the matrices)."
        )
        lines.append(f"dW is {overall['factor']:.3g} times as large as W on dW (median).")
    lines.append("Frobenius norms; factor = |dW| / (W on dW).")
    draw = figures.base_similarity_figure if found.phi else figures.amplification_figure
    _show("amplification", config, facts, rows, lines, lambda: draw(found))


def _intruders(argv: Sequence[str]) -> None:
    config = _parse(IntrudersConfig, "intruders", argv, "adapter")
    from lorakit import analysis
    from lorakit.analysis import figures

    stored, weights = _opened(config)
    found = analysis.adapter_intruders(
        stored,
        weights,
        only=config.only,
        top=config.top,
        threshold=config.threshold,
        progress=_progress,
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
    _show(
        "intruders", config, found.to_json(), rows, lines, lambda: figures.intruders_figure(found)
    )


def _diff(argv: Sequence[str]) -> None:
    config = _parse(PairConfig, "diff", argv, "first", "second")
    from lorakit import analysis
    from lorakit.analysis import figures

    found = analysis.adapter_diff(config.first, config.second, alpha=config.alpha)
    both = {**found.layers, **{f"{name} (whole)": d for name, d in found.trained.items()}}
    rows = {
        name: {
            "first": one.first,
            "second": one.second,
            "distance": one.distance,
            "relative": one.relative,
            "angle": one.angle,
        }
        for name, one in both.items()
    }
    lines = []
    if found.layers:
        overall = found.overall
        angle = "-" if overall.angle is None else f"{overall.angle:.3g}"
        lines.append(
            f"Overall: norms {overall.first:.3g} and {overall.second:.3g}, distance {overall.distance:.3g} "
            f"({overall.relative:.3g} of the first norm), angle {angle} degrees."
        )
        lines.append(f"Largest distance: {', '.join(found.most_moved()[:3])}.")
    _show("diff", config, found.to_json(), rows, lines, lambda: figures.diff_figure(found))


def _drift(argv: Sequence[str]) -> None:
    config = _parse(DriftConfig, "drift", argv, "adapter", "text")
    from lorakit import analysis
    from lorakit.analysis import figures

    found = analysis.adapter_drift(
        config.adapter,
        config.text,
        base=config.base,
        allow_other_base=config.allow_other_base,
        limit=config.limit,
        max_length=config.max_length,
        batch_size=config.batch_size,
        progress=lambda done: _progress(f"{done} texts"),
    )
    most = sorted(found.texts, key=lambda text: -text.most["kl"])[:5]
    rows = {
        f"...{text.most['context'][-60:]!r}": {
            "KL": text.most["kl"],
            "base": repr(text.most["base"]),
            "adapted": repr(text.most["adapted"]),
        }
        for text in most
    }
    lines = [
        f"{found.positions:,} predictions on {len(found.texts):,} texts: KL(base || adapted) {found.kl:.4g} nats on "
        f"average, the most likely token changed in {found.changed:.2%}.",
        f"Loss on the texts: {found.loss_base:.4f} with the base, {found.loss_adapted:.4f} with the adapter.",
        "Largest changes:",
    ]
    _show(
        "drift",
        config,
        found.to_json(),
        rows,
        lines,
        lambda: figures.drift_figure(found),
        what="after",
        each=True,
        lines_first=True,
    )


CONFIGS = (
    AmplificationConfig,
    DriftConfig,
    IntrudersConfig,
    PairConfig,
    SimilarityConfig,
    SpectrumConfig,
)

_RUN: dict[str, Callable[[Sequence[str]], None]] = {
    "spectrum": _spectrum,
    "similarity": _similarity,
    "amplification": _amplification,
    "intruders": _intruders,
    "diff": _diff,
    "drift": _drift,
}


def _parse(config_class: type, name: str, argv: Sequence[str], *positional: str) -> Any:
    from lorakit.methods.registry import use_method

    config = parse(config_class, f"analyze {name}", f"{MEASURES[name]}.", argv, *positional)
    if config.method is not None:
        use_method(config.method)
    config.require_writable()
    return config


def _opened(config: OnBase) -> tuple[StoredAdapter, Weights]:
    from lorakit.analysis import open_weights
    from lorakit.analysis.deltas import read

    stored = read(config.adapter, alpha=config.alpha)
    return stored, open_weights(config.base, stored, allow_other_base=config.allow_other_base)


def _show(
    measure: str,
    config: Any,
    facts: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    lines: list[str],
    draw: Callable[[], Any],
    *,
    what: str = "matrix",
    each: bool | None = None,
    lines_first: bool = False,
) -> None:
    """Print the results as a table or as JSON, and write the figure and the report if set."""
    from lorakit.analysis.report import measure_page
    from lorakit.cli.layer_table import console, layer_table
    from lorakit.reporting import drawing
    from lorakit.training.environment import command

    # In the report, the line that introduces the table becomes its heading.
    heading = lines[-1].rstrip(":") + "." if lines_first else None
    if config.plot is not None:
        drawing.save(draw(), config.plot)
    if config.report is not None:
        names = ("adapter", "first", "second", "text")
        measure_page(
            measure,
            about=MEASURES[measure],
            subjects=[getattr(config, name) for name in names if hasattr(config, name)],
            lines=lines if heading is None else lines[:-1],
            heading=heading,
            rows=rows,
            what=what,
            drawn=[draw()],
            notices=facts["notices"],
            command=command(),
        ).write(config.report)
    if config.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    out: Console = console()
    table = layer_table(rows, each=config.layers if each is None else each, what=what)
    if not lines_first:
        out.print(table)
    for line in lines:
        out.print(line, markup=False)
    if lines_first:
        out.print(table)
    for notice in facts["notices"]:
        out.print(f"note: {notice}", markup=False)
    if config.plot is not None:
        out.print(f"Figure in {config.plot}.", markup=False)
    if config.report is not None:
        out.print(f"Report in {config.report}.", markup=False)


def _progress(what: str) -> None:
    """Print the current item, if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _ranks(count: int) -> list[int]:
    """Return the powers of two below `count`, then `count`."""
    return [rank for rank in (2**i for i in range(20)) if rank < count] + [count]
