"""Figures show the numbers of the measures."""

from __future__ import annotations

import html
import re

import pytest
import tiny_models
import torch
from random_adapters import randomise
from sample_adapters import linear, randn, stored, trained_llama

from lorakit.adapters import attach
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.analysis import adapter_diff, adapter_similarity, adapter_spectrum
from lorakit.analysis import figures as drawn
from lorakit.analysis.amplification import AdapterAmplification, Amplification
from lorakit.analysis.drift import Drift, PieceDrift
from lorakit.analysis.intruders import AdapterIntruders, Intruders
from lorakit.analysis.report import Findings, comparison_sections, measure_page, run_sections
from lorakit.analysis.spectrum import UNTRAINED, AdapterSpectrum, Spectrum
from lorakit.formatting import number
from lorakit.methods.full import FullFineTuning
from lorakit.reporting import Figure
from lorakit.reporting.axes import OUTER
from lorakit.reporting.drawing import inline_svg


def labels(figure: Figure) -> list[str]:
    svgs = "".join(inline_svg(chart, 1) for chart in figure.charts)
    return [html.unescape(label) for label in re.findall(r'data-t="([^"]*)"', svgs)]


def wide(rank: int, blocks: int, seed: int) -> StoredAdapter:
    """Return an adapter of queries and values in a few blocks, with a high rank."""
    return stored(
        **{
            f"layers.{block}.{kind}": linear(
                A=randn(rank, 160, seed=seed + block), B=randn(150, rank, seed=seed + 50 + block)
            )
            for block in range(blocks)
            for kind in "qv"
        }
    )


def test_the_spectrum_s_shares() -> None:
    adapter = trained_llama().stored()
    found = adapter_spectrum(adapter)
    shown = labels(drawn.spectrum_figure(found))
    for name, layer in found.layers.items():
        for rank, share in enumerate(layer.energy.tolist(), 1):
            assert f"{name}, rank kept {rank}: {number(share)}" in shown
    for rank, share in enumerate(found.energy.tolist(), 1):
        assert f"share, rank kept {rank}: {number(share)}" in shown


def test_the_suggested_rank_is_marked() -> None:
    def texts(adapter: StoredAdapter, energy: float) -> str:
        figure = drawn.spectrum_figure(adapter_spectrum(adapter), energy)
        return inline_svg(figure.charts[0], 1)

    assert re.search(r"rank \d keeps 99\.9 %", texts(stored("linear"), 0.999))
    assert re.search(r"rank \d keeps 90 %", texts(stored("linear"), 0.9))
    assert "keeps" not in texts(stored(zero=linear(B=torch.zeros(20, 4))), 0.9)


@pytest.mark.parametrize("side", ["A", "B"])
def test_the_similarity_s_cells(side) -> None:
    found = adapter_similarity(wide(2, 3, 0), wide(6, 3, 20))
    figure = drawn.similarity_figure(found, side)
    shown = labels(figure)
    assert figure.columns == 4
    assert len(figure.charts) == 2 * 2 * 4  # kinds; whole and corner; three blocks and random
    layers = found.A if side == "A" else found.B
    for phi in (layers[f"layers.{block}.{kind}"].phi for block in range(3) for kind in "qv"):
        assert f"i 2, j 5: {number(float(phi[1, 4]))}" in shown


@pytest.mark.slow
def test_a_figure_of_high_ranks_stays_small() -> None:
    found = adapter_similarity(wide(128, 4, 0), wide(128, 4, 20))
    figure = drawn.similarity_figure(found)
    assert len(figure.charts) == 4  # one block and the random level of each kind
    assert sum(len(inline_svg(chart, 1)) for chart in figure.charts) < 1_300_000  # two in a page
    assert "i 64, j 64:" in " ".join(labels(figure))


def cells_of(figure: Figure) -> list[dict]:
    """Return the cells of all heat maps of a figure."""
    return [
        cell
        for chart in figure.charts
        if "heat map" in chart.alt
        for cell in chart.spec["layer"][0]["data"]["values"]
    ]


@pytest.mark.parametrize(
    ("count", "rank", "rows", "columns"),
    [(12, 64, 12, 64), (560, 64, 560, 28), (2_500, 8, 2_000, 8)],
)
def test_the_spectrum_of_a_large_adapter_is_drawn_in_part(count, rank, rows, columns) -> None:
    one = Spectrum(torch.linspace(4, 1, rank, dtype=torch.float64))
    layers = {f"layers.{i}.q": one for i in range(count)}
    figure = drawn.spectrum_figure(AdapterSpectrum(layers=layers))
    cells = cells_of(figure)
    assert len(cells) == rows * columns <= drawn.CELLS
    note = f"{rows:,} of {count:,} matrices and {columns} of {rank} ranks"
    assert (note in figure.caption) == (len(cells) < count * rank)
    # A row goes from the first rank to the last one without gaps, and its numbers are those of its ranks.
    row = [cell for cell in cells if cell["row"] == 0]
    assert [cell["j_from"] for cell in row] == [0.5, *(cell["j_to"] for cell in row[:-1])]
    assert row[-1]["j_to"] == rank + 0.5
    for cell in row:
        column = int(cell["j_to"])
        share = number(float(one.energy[column - 1]))
        assert cell["label"] == f"layers.0.q, rank kept {column}: {share}"
    assert f"layers.{count - 1}.q, rank kept {rank}: 1.000" in {cell["label"] for cell in cells}


def test_intruders_of_a_large_adapter_are_drawn_in_part() -> None:
    cosine = torch.tensor([0.75, 0.25] * 32)
    one = Intruders(singular_values=cosine, cosine=cosine, bound=cosine + 0.1, threshold=0.5)
    layers = {f"layers.{i}.q": one for i in range(560)}
    figure = drawn.intruders_figure(AdapterIntruders(layers=layers))
    assert len(cells_of(figure)) == 560 * 28
    assert "560 of 560 matrices and 28 of 64 vectors" in figure.caption
    crosses = figure.charts[0].spec["layer"][1]["data"]["values"]
    assert {cross["j"] for cross in crosses} == set(range(2, 29, 2))


def amplified(names: list[str], phi: torch.Tensor) -> AdapterAmplification:
    maps, widths = dict.fromkeys(names, phi), dict.fromkeys(names, 768)
    return AdapterAmplification(layers={}, phi=maps, widths=widths)


def test_maps_against_the_base_show_the_leading_directions() -> None:
    names = [f"layers.{block}.{kind}" for block in range(3) for kind in "qv"]
    figure = drawn.base_similarity_figure(amplified(names, torch.ones(256, 128)))
    assert len(cells_of(figure)) == 6 * drawn.LARGEST**2


@pytest.mark.parametrize(
    "names",
    [
        [
            f"roberta.encoder.layer.{i}.attention.self.{kind}"
            for i in (0, 11)
            for kind in ("q", "v")
        ],
        ["model.language_model.layers.15.self_attn.q_proj"],
    ],
)
def test_the_titles_of_maps_fit_a_phone(names) -> None:
    phi = torch.ones(8, 2)
    adapters = [
        stored(**{n: linear(A=randn(2, 16, seed=s), B=randn(16, 2, seed=s + 9)) for n in names})
        for s in (1, 2)
    ]
    figures = [
        drawn.base_similarity_figure(amplified(names, phi)),
        drawn.similarity_figure(adapter_similarity(*adapters)),
    ]
    for chart in (chart for figure in figures for chart in figure.charts):
        svg = inline_svg(chart, 1)
        (width,) = re.findall(r'viewBox="0 0 (\d+) ', svg)
        assert int(width) <= OUTER
        assert f">{chart.title}</text>" in svg  # not cut


def test_a_run_s_page_shows_its_spectrum_and_two_runs_what_they_share(tmp_path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        trained_llama(seed).save(tmp_path / name, "trained")
    (section,) = run_sections(tmp_path / "one")
    found = adapter_spectrum(tmp_path / "one")
    assert f"Rank {found.rank_for(0.9)} for all layers" in section.blocks[0].text
    assert sum(row[1] for row in section.blocks[2].rows) == len(found.layers)
    (section,) = comparison_sections(tmp_path / "one", tmp_path / "two")
    assert [type(block) for block in section.blocks] == [Figure, Figure]


@pytest.mark.parametrize(
    ("subject", "title"),
    [(".", "e2e/adapter"), ("../../sql", "out/sql"), ("/sql", "sql"), ("sql", "sql")],
)
def test_the_page_of_a_measure_names_the_folder(tmp_path, monkeypatch, subject, title) -> None:
    folder = tmp_path / "out" / "e2e" / "adapter"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    findings = Findings(
        facts={"notices": []}, rows={}, lines=[], draw=lambda: Figure(caption="", charts=())
    )
    page = measure_page("spectrum", "", [subject], findings, command="")
    assert page.title == title


def test_the_page_of_a_run_that_trained_nothing_says_so(tmp_path) -> None:
    from lorakit.adapters import formats

    formats.write(stored(zero=linear(B=torch.zeros(20, 4))), tmp_path / "one")
    (section,) = run_sections(tmp_path / "one")
    assert section.blocks[0].text == UNTRAINED


def test_adapters_without_a_matrix_in_common_are_said_to_have_none(tmp_path) -> None:
    from lorakit.adapters import formats

    formats.write(stored(a=linear()), tmp_path / "one")
    formats.write(stored(b=linear()), tmp_path / "two")
    (section,) = comparison_sections(tmp_path / "one", tmp_path / "two")
    assert "not compared" in section.blocks[0].text


@pytest.mark.slow
def test_the_differences_of_tensors_trained_in_full(tmp_path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        model = tiny_models.build("llama")
        handle = attach(model, FullFineTuning(top_layers=1), name="full")
        randomise(handle, scale=0.1, seed=seed)
        handle.save(tmp_path / name)
    found = adapter_diff(tmp_path / "one", tmp_path / "two")
    assert not found.layers
    shown = labels(drawn.diff_figure(found))
    for name, one in found.trained.items():
        assert f"{name} (whole), distance: {number(one.distance)}" in shown
        assert f"{name} (whole), angle: {number(one.angle)}" in shown


def test_the_series_of_table_7() -> None:
    one = Amplification(
        rank=2,
        base_norm=40.0,
        change_norm=6.0,
        projected=3.0,
        projected_own=24.0,
        projected_random=1.0,
        expected_random=1.5,
    )
    assert labels(drawn.amplification_figure(AdapterAmplification(layers={"q": one}))) == [
        "q, W's own directions: 24.00",
        "q, the change's directions: 3.000",
        "q, random directions: 1.500",
        "q, the change itself, ‖ΔW‖: 6.000",
        "q, factor: 2.000",
    ]


def test_crosses_mark_the_intruders() -> None:
    cosines = {"q": torch.tensor([0.75, 0.25, 0.625]), "v": torch.tensor([0.125])}
    layers = {
        name: Intruders(singular_values=cosine, cosine=cosine, bound=cosine + 0.1, threshold=0.5)
        for name, cosine in cosines.items()
    }
    figure = drawn.intruders_figure(AdapterIntruders(layers=layers))
    assert labels(figure) == [
        "q, singular vector 1: 0.7500",
        "q, singular vector 2: 0.2500",
        "q, singular vector 3: 0.6250",
        "v, singular vector 1: 0.1250",
    ]
    crosses = figure.charts[0].spec["layer"][1]["data"]["values"]
    assert crosses == [{"row": 0, "j": 2}, {"row": 1, "j": 1}]


def test_the_histogram_of_a_drift() -> None:
    piece = PieceDrift(text="", kl=[0.0, 1e-6, 0.5, 0.5, 20.0], changed=2, most={})
    found = Drift(texts=1, pieces=[piece], loss_base=2.0, loss_adapted=1.0)
    figure = drawn.drift_figure(found)
    bars = [
        re.fullmatch(r"(\S+) to (\S+): (\d) predictions", label).groups()
        for label in labels(figure)
    ]
    assert [int(count) for _, _, count in bars] == [2, 2, 1]
    assert float(bars[0][0]) == 1e-4  # the first bar includes all smaller divergences
    for (low, high, _), value in zip(bars[1:], (0.5, 20.0), strict=True):
        assert float(low) < value < float(high) < 1.5 * float(low)
    assert "mean 4.200." in figure.charts[0].alt


def test_panels_are_spread_from_the_first_to_the_last() -> None:
    layers = {str(i): torch.tensor(i) for i in range(9)}
    assert list(drawn.spread(layers)) == ["0", "4", "8"]
    assert list(drawn.spread(layers, 1)) == ["0"]
    assert list(drawn.spread({"a": 1})) == ["a"]
