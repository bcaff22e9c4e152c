"""`lorakit analyze`: tables, JSON, figures and reports of every measure, and its error messages."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_adapters import randomise
from tiny_runs import save_base
from tiny_tokenizer import SENTENCES

import lorakit
from lorakit import analysis
from lorakit.analysis.amplification import AdapterAmplification, Amplification
from lorakit.analysis.diff import AdapterDiff, Difference
from lorakit.analysis.drift import Drift, PieceDrift
from lorakit.analysis.intruders import AdapterIntruders, Intruders
from lorakit.analysis.report import Findings
from lorakit.analysis.similarity import AdapterSimilarity, Similarity
from lorakit.analysis.spectrum import AdapterSpectrum, Spectrum
from lorakit.cli import main, measures
from lorakit.cli.analyze import MEASURES
from lorakit.cli.options import missing_options
from lorakit.formatting import number_range
from lorakit.reporting.page import cell_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a tiny base, two adapters for it, and a text."""
    folder = tmp_path_factory.mktemp("analyze")
    save_base(folder / "base")
    model = lorakit.load_base(folder / "base", dtype="float32").model
    for name, rank in (("one", 2), ("two", 6)):
        handle = lorakit.attach(model, lorakit.LoRA(rank=rank, targets="all-linear"), name=name)
        randomise(handle, name, seed=rank)
        handle.save(folder / name, name)
    (folder / "text.txt").write_text("\n".join(SENTENCES))
    return folder


def calls(folder: Path) -> dict[str, list]:
    return {
        "spectrum": ["spectrum", folder / "one"],
        "similarity": ["similarity", folder / "one", folder / "two"],
        "amplification": ["amplification", folder / "one"],
        "intruders": ["intruders", folder / "one", "--top", "3"],
        "diff": ["diff", folder / "one", folder / "two"],
        "drift": [
            "drift",
            folder / "one",
            folder / "text.txt",
            "--base.dtype",
            "float32",
            "--base.name",
            folder / "base",
        ],
    }


@pytest.fixture
def found(monkeypatch) -> list[Findings]:
    """Collect the findings of every measure that is called."""
    collected: list[Findings] = []

    def collecting(measure: Callable) -> Callable:
        def find(config) -> Findings:
            collected.append(measure(config))
            return collected[-1]

        return find

    for name in MEASURES:
        monkeypatch.setattr(measures, name, collecting(getattr(measures, name)))
    return collected


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_prints_a_table_and_draws_a_figure(call, folder, tmp_path, measure, found):
    figure = tmp_path / f"{measure}.png"
    status, out, err = call("analyze", *calls(folder)[measure], "--plot", figure)
    assert (status, err) == (0, "")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"Figure in {figure}."[:40] in out.replace("\n", "")
    (findings,) = found
    assert all(line in out for line in findings.lines)
    if measure != "drift":
        assert len(findings.rows) == 14
        line = next(line for line in out.splitlines() if ".*.self_attn.q_proj" in line)
        both = [cells for name, cells in findings.rows.items() if name.endswith("self_attn.q_proj")]
        ranges = [number_range(cells[heading] for cells in both) for heading in both[0]]
        assert line.split() == ["model.layers.*.self_attn.q_proj", "2", *" ".join(ranges).split()]


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_prints_json(call, folder, measure, found):
    status, out, _ = call("analyze", *calls(folder)[measure], "--json", "true")
    assert status == 0
    assert json.loads(out) == found[0].facts


HEADINGS = {
    "spectrum": "rank, norm, effective rank, stable rank, first direction, rank for 0.9",
    "similarity": "A phi(1,1), A whole, A at random, B phi(1,1), B whole, B at random",
    "amplification": "rank, |W|, |dW|, W on dW, W on its own, W on random, factor",
    "intruders": "intruders, first at, smallest cosine, largest singular value, last examined",
    "diff": "first, second, distance, relative, angle",
    "drift": "KL, base, adapted",
}

SMALL = {
    "spectrum": AdapterSpectrum(layers={"q": Spectrum(torch.tensor([3.0, 2.0, 2.0, 1.0]))}),
    "similarity": AdapterSimilarity(
        A={"q": Similarity(torch.tensor([[0.5, 0.75]]), width=8)},
        B={"q": Similarity(torch.tensor([[0.125, 0.375]]), width=4)},
    ),
    "amplification": AdapterAmplification(
        layers={
            "q": Amplification(
                rank=2,
                base_norm=40.0,
                change_norm=6.0,
                projected=3.0,
                projected_own=24.0,
                projected_random=1.0,
                expected_random=1.5,
            )
        }
    ),
    "intruders": AdapterIntruders(
        layers={
            name: Intruders(
                singular_values=torch.tensor([9.0, 5.0, 4.0]),
                cosine=torch.tensor(cosine),
                bound=torch.ones(3),
                threshold=0.5,
            )
            for name, cosine in (("q", [0.75, 0.25, 0.375]), ("v", [0.875, 0.625, 0.75]))
        }
    ),
    "diff": AdapterDiff(
        layers={
            "q": Difference(first=3.0, second=4.0, distance=5.0),
            "v": Difference(first=6.0, second=8.0, distance=10.0),
        },
        trained={"head": Difference(first=2.0, second=0.0, distance=2.0)},
    ),
    "drift": Drift(
        texts=2,
        pieces=[
            PieceDrift(text="", kl=kl, changed=changed, most={**most, "kl": max(kl)})
            for kl, changed, most in (
                ([0.25, 0.75], 0, {"context": "the river", "base": " is", "adapted": " was"}),
                ([2.0], 1, {"context": 30 * "the ", "base": "pub", "adapted": "park"}),
            )
        ],
        loss_base=2.5,
        loss_adapted=1.5,
    ),
}
"""A small result of each measure."""

ROWS = {
    "spectrum": {"q": (4, 4.2426, 3.7467, 2, 0.5, 3)},
    "similarity": {"q": (0.5, 0.75, 0.25, 0.125, 0.375, 0.5)},
    "amplification": {"q": (2, 40, 6, 3, 24, 1.5, 2)},
    "intruders": {"q": (2, 2, 0.25, 9, 4), "v": (0, None, 0.625, 9, 4)},
    "diff": {
        "q": (3, 4, 5, 1.6667, 90),
        "v": (6, 8, 10, 1.6667, 90),
        "head (whole)": (2, 0, 2, 1, None),
    },
    "drift": {
        f"1. ...{15 * 'the '!r}": (2, "'pub'", "'park'"),
        "2. ...'the river'": (0.75, "' is'", "' was'"),
    },
}
"""Their numbers, worked out by hand to four decimals."""

LINES = {
    "spectrum": [
        "Fraction of the total squared norm kept at rank 1: 50.0 %, 2: 72.2 %, 4: 100.0 %.",
        "Rank 3 in every layer keeps 0.9 of it.",
    ],
    "similarity": [
        "Input directions: the first directions overlap by 0.5000 (random: 0.1250), "
        "the full spans by 0.7500 (random: 0.2500).",
        "Output directions: the first directions overlap by 0.1250 (random: 0.2500), "
        "the full spans by 0.3750 (random: 0.5000).",
    ],
    "amplification": [
        "W on dW is 2.000 times W on random directions, and 0.1250 times W on its own leading directions "
        "(medians over the matrices).",
        "dW is 2.000 times as large as W on dW (median).",
    ],
    "intruders": ["2 of 6 leading singular vectors match none of the base's."],
    "diff": [
        "Overall: norms 6.708 and 8.944, distance 11.18 (1.667 of the first norm), angle 90.00 degrees.",
        "Largest distance: v, q.",
    ],
    "drift": [
        "3 predictions on 2 texts: KL(base || adapted) 1.000 nats on average, "
        "the most likely token changed in 33.3 %.",
        "Loss on the texts: 2.500 with the base, 1.500 with the adapter.",
    ],
}


@pytest.mark.parametrize("measure", SMALL)
def test_each_number_stands_under_its_heading(monkeypatch, measure):
    monkeypatch.setattr(analysis, f"adapter_{measure}", lambda *_, **__: SMALL[measure])
    monkeypatch.setattr(measures, "_opened", lambda _: (None, None))
    options = MEASURES[measure][1]
    config = options(**dict.fromkeys(missing_options(options, {}), "name"))
    findings = getattr(measures, measure)(config)
    assert list(findings.rows) == list(ROWS[measure])
    for name, numbers in ROWS[measure].items():
        found = findings.rows[name]
        cells = [round(cell, 4) if isinstance(cell, float) else cell for cell in found.values()]
        assert (", ".join(found), tuple(cells)) == (HEADINGS[measure], numbers)
    assert findings.lines[: len(LINES[measure])] == LINES[measure]


def test_positions_with_equal_contexts_are_rows_of_their_own(call, folder, tmp_path):
    """A line is repeated, and its pieces count as one text."""
    (tmp_path / "text.txt").write_text("the price of the food is high " * 8 + "\nthe food\n" * 2)
    argv = ["drift", folder / "one", tmp_path / "text.txt", *calls(folder)["drift"][3:]]
    status, out, _ = call("analyze", *argv, "--max_length", "4")
    assert status == 0
    assert "predictions on 3 texts" in out
    for place in range(1, 6):
        assert f"{place}. ..." in out


def test_an_adapter_that_was_never_trained(call, folder, tmp_path):
    model = lorakit.load_base(folder / "base", dtype="float32").model
    lorakit.attach(model, lorakit.LoRA(rank=2, targets="mlp"), name="a").save(tmp_path / "fresh")
    status, out, _ = call(
        "analyze", "spectrum", tmp_path / "fresh", "--report", tmp_path / "p.html"
    )
    assert status == 0
    assert "The adapter is zero everywhere: it was never trained." in out
    assert "keeps" not in out
    assert "zero everywhere" in (tmp_path / "p.html").read_text()


def test_a_line_for_each_matrix(call, folder):
    _, grouped, _ = call("analyze", "spectrum", folder / "one")
    _, each, _ = call("analyze", "spectrum", folder / "one", "--layers", "true")
    assert "model.layers.0.self_attn.q_proj" not in grouped
    for block in (0, 1):
        assert f"model.layers.{block}.self_attn.q_proj" in each


def test_the_paper_s_figures(call, folder, tmp_path):
    for side in "AB":
        figure = tmp_path / f"similarity-{side}.svg"
        argv = ["similarity", folder / "one", folder / "two", "--only", "[qv]_proj", "--side", side]
        status, out, _ = call("analyze", *argv, "--plot", figure)
        assert status == 0
        assert "gate_proj" not in out
        assert "<svg" in figure.read_text()
    figure = tmp_path / "figure8.svg"
    argv = ["amplification", folder / "one", "--base_directions", "0.2", "--plot", figure]
    assert call("analyze", *argv)[0] == 0
    # 0.2 of the base's 32 directions are 6; the adapter has 2. Inputs have the width 64 or 32.
    labels = re.findall(r'aria-label="([^"]*): heat map of φ, (\d+) by (\d+)', figure.read_text())
    levels = {"down_proj": "0.09375", "gate_proj": "0.1875"}
    assert labels == [
        (f"{block}.mlp.{name}, random {level}", "6", "2")
        for name, level in levels.items()
        for block in (0, 1)
    ]


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["analyze", "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(f"\n  {measure} " in out for measure in MEASURES)
    for measure in MEASURES:
        with pytest.raises(SystemExit):
            main(["analyze", measure, "--help"])
        out = capsys.readouterr().out
        assert out.startswith(f"usage: lorakit analyze {measure}")
        assert "\n  (required" not in out.replace("  (required, type", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["spectrm", "x"], "Did you mean 'spectrum'?"),
        (["spectrum"], "adapter"),
        (["spectrum", "nowhere"], "does not exist"),
        (["spectrum", "{one}", "--energy", "2"], "above 0 and at most 1"),
        (["spectrum", "{one}", "--plot", "figure"], ".png, .svg or .pdf"),
        (["spectrum", "{one}", "--plot", "{one}/lorakit.json/figure.png"], "Cannot write"),
        (["intruders", "{one}", "--only", "nothing"], "none of the 14 names"),
        (
            ["amplification", "{one}", "--base_directions", "2"],
            "base_directions is 2.0; it is a share",
        ),
        (["diff", "{one}", "{base}"], "holds no adapter"),
        (["drift", "{one}", "{one}"], "cannot be read"),
    ],
)
def test_a_wrong_call_is_one_clear_message(call, folder, argv, message):
    status, _, err = call(
        "analyze", *(word.format(one=folder / "one", base=folder / "base") for word in argv)
    )
    assert status == 1
    assert message in err
    assert "Traceback" not in err


def test_figures_without_what_draws_them(call, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for option in ("plot", "report"):
        target = tmp_path / f"x.{'png' if option == 'plot' else 'html'}"
        status, out, err = call("analyze", "spectrum", folder / "one", f"--{option}", target)
        assert (status, out) == (1, "")  # rejected before the computation
        assert 'pip install "lorakit[report]"' in err


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_writes_a_page(call, folder, tmp_path, measure, found):
    page = tmp_path / "page.html"
    argv = [*calls(folder)[measure], "--report", page]
    status, out, err = call("analyze", *argv)
    assert (status, err) == (0, "")
    assert f"Report in {page}."[:40] in out.replace("\n", "")
    text = html.unescape(page.read_text())
    assert MEASURES[measure][0] in text
    (findings,) = found
    assert all(line in text for line in findings.lines)
    assert all(chart.alt in text for chart in findings.draw().charts)
    table = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in text.split("<tr>")[1:]]
    cells = [[name, *map(cell_text, row.values())] for name, row in findings.rows.items()]
    assert table == [[findings.what, *next(iter(findings.rows.values()))], *cells]
    if measure == "drift":  # the line that introduces the table is its caption, not a finding
        assert "<caption>Largest changes.</caption>" in text
        assert "Largest changes:" not in text
    status, _, err = call("analyze", *argv)
    assert (status, "already exists" in err) == (1, True)
