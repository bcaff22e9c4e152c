"""`lorakit analyze`: tables, JSON, figures and reports of every measure, and its error messages."""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path

import pytest
from random_adapters import randomise
from tiny_runs import save_base
from tiny_tokenizer import SENTENCES

import lorakit
from lorakit.cli import main
from lorakit.cli.analyze import MEASURES
from lorakit.formatting import number


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


def run(capsys, *argv) -> tuple[int, str, str]:
    status = main(["analyze", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


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


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_prints_a_table_and_draws_a_figure(capsys, folder, tmp_path, measure):
    figure = tmp_path / f"{measure}.png"
    status, out, err = run(capsys, *calls(folder)[measure], "--plot", figure)
    assert (status, err) == (0, "")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"Figure in {figure}."[:40] in out.replace("\n", "")
    if measure != "drift":
        assert "model.layers.*.self_attn.q_proj" in out


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_prints_json(capsys, folder, measure):
    status, out, _ = run(capsys, *calls(folder)[measure], "--json", "true")
    assert status == 0
    facts = json.loads(out)
    if measure != "drift":
        assert len(facts["layers"]) == 14
    assert "notices" in facts


def test_positions_with_equal_contexts_are_rows_of_their_own(capsys, folder, tmp_path):
    """A line is repeated, and its pieces count as one text."""
    (tmp_path / "text.txt").write_text("the price of the food is high " * 8 + "\nthe food\n" * 2)
    argv = ["drift", folder / "one", tmp_path / "text.txt", *calls(folder)["drift"][3:]]
    status, out, _ = run(capsys, *argv, "--max_length", "4")
    assert status == 0
    assert "predictions on 3 texts" in out
    for place in range(1, 6):
        assert f"{place}. ..." in out


def test_an_adapter_that_was_never_trained(capsys, folder, tmp_path):
    model = lorakit.load_base(folder / "base", dtype="float32").model
    lorakit.attach(model, lorakit.LoRA(rank=2, targets="mlp"), name="a").save(tmp_path / "fresh")
    status, out, _ = run(capsys, "spectrum", tmp_path / "fresh", "--report", tmp_path / "p.html")
    assert status == 0
    assert "The adapter is zero everywhere: it was never trained." in out
    assert "keeps" not in out
    assert "zero everywhere" in (tmp_path / "p.html").read_text()


def test_a_line_for_each_matrix(capsys, folder):
    _, grouped, _ = run(capsys, "spectrum", folder / "one")
    _, each, _ = run(capsys, "spectrum", folder / "one", "--layers", "true")
    assert "model.layers.0.self_attn.q_proj" not in grouped
    for block in (0, 1):
        assert f"model.layers.{block}.self_attn.q_proj" in each


def test_the_paper_s_figures(capsys, folder, tmp_path):
    for side in "AB":
        figure = tmp_path / f"similarity-{side}.svg"
        argv = ["similarity", folder / "one", folder / "two", "--only", "[qv]_proj", "--side", side]
        status, out, _ = run(capsys, *argv, "--plot", figure)
        assert status == 0
        assert "gate_proj" not in out
        assert "<svg" in figure.read_text()
    figure = tmp_path / "figure8.svg"
    argv = ["amplification", folder / "one", "--base_directions", "0.2", "--plot", figure]
    assert run(capsys, *argv)[0] == 0
    # 0.2 of the base's 32 directions are 6; the adapter has 2. Inputs have the width 64 or 32.
    labels = re.findall(r'aria-label="([^"]*): heat map of φ, (\d+) by (\d+)', figure.read_text())
    levels = {"down_proj": "0.09375", "gate_proj": "0.1875"}
    assert labels == [
        (f"model.layers.{block}.mlp.{name}, at random up to {level}", "6", "2")
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
        (["amplification", "{one}", "--base_directions", "2"], "above 0 and at most 1"),
        (["diff", "{one}", "{base}"], "holds no adapter"),
        (["drift", "{one}", "{one}"], "cannot be read"),
    ],
)
def test_a_wrong_call_is_one_clear_message(capsys, folder, argv, message):
    status, _, err = run(
        capsys, *(word.format(one=folder / "one", base=folder / "base") for word in argv)
    )
    assert status == 1
    assert message in err
    assert "Traceback" not in err


def test_figures_without_what_draws_them(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for option in ("plot", "report"):
        target = tmp_path / f"x.{'png' if option == 'plot' else 'html'}"
        status, out, err = run(capsys, "spectrum", folder / "one", f"--{option}", target)
        assert (status, out) == (1, "")  # rejected before the computation
        assert 'pip install "lorakit[report]"' in err


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_writes_a_page(capsys, folder, tmp_path, measure):
    page = tmp_path / "page.html"
    argv = [*calls(folder)[measure], "--report", page]
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    assert f"Report in {page}."[:40] in out.replace("\n", "")
    text = html.unescape(page.read_text())
    assert text.count("<svg") >= 1
    assert MEASURES[measure].about in text
    _, facts, _ = run(capsys, *calls(folder)[measure], "--json", "true")
    if measure == "spectrum":
        for layer in json.loads(facts)["layers"].values():
            assert f'<td class="number">{number(layer["norm"])}</td>' in text
    if measure != "drift":
        assert all(name in text for name in json.loads(facts)["layers"])
    else:  # the line that introduces the table is its caption, not a finding
        assert "<caption>Largest changes.</caption>" in text
        assert "Largest changes:" not in text
    if measure in ("similarity", "amplification"):
        overall = json.loads(facts)["overall"]
        shown = overall["B"]["phi_whole"] if measure == "similarity" else overall["factor"]
        assert f" {number(shown)} " in text
    status, _, err = run(capsys, *argv)
    assert (status, "already exists" in err) == (1, True)
