"""`lorakit report`, and the reports that train and evaluate write at their end."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny_runs

from lorakit.cli import main
from lorakit.cli.report import try_to_write, write_run_report
from lorakit.cli.train import _summary
from lorakit.data import DataConfig
from lorakit.evaluation.evaluate import Evaluation
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.models.base_config import BaseConfig
from lorakit.reporting.evaluation_report import evaluation_page
from lorakit.training import environment, validation
from lorakit.training.run_folder import RunResult


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a base and data."""
    folder = tmp_path_factory.mktemp("report")
    tiny_runs.save_base(folder / "base")
    tiny_runs.write_rows(folder / "train.jsonl", tiny_runs.pairs(16))
    tiny_runs.write_rows(folder / "validation.jsonl", tiny_runs.pairs(4, seed=1))
    return folder


def train(folder: Path, output: Path, *options: str) -> list[str]:
    return [
        *("train", "--base.name", str(folder / "base"), "--base.dtype", "float32"),
        *("--data.train", str(folder / "train.jsonl")),
        *("--data.validation", str(folder / "validation.jsonl")),
        *("--max_steps", "2", "--batch_size", "4", "--output", str(output), *options),
    ]


@pytest.fixture(scope="module")
def runs(folder) -> list[Path]:
    found = [folder / "one", folder / "two"]
    for seed, run in enumerate(found):
        arguments = train(folder, run, "--seed", str(seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["/usr/bin/lorakit", *arguments])
            assert main(arguments) == 0
    return found


@pytest.mark.slow
def test_training_ends_in_a_report(call, folder, tmp_path) -> None:
    status, out, _ = call(*train(folder, tmp_path / "run"))
    assert status == 0
    assert f"report   {tmp_path / 'run' / 'report.html'}" in out
    assert "\n2 steps in " in out
    assert "note     2 steps are few; raise --max_steps (now 2) if the scores are low\n" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h1>run</h1>" in page
    predicted = json.loads((tmp_path / "run" / "prediction.json").read_text())
    assert {"seconds", "tokens_per_second", "peak_memory", "adapter_bytes"} < predicted.keys()
    assert "Measured / predicted" in page
    # A new run in the same folder replaces the old report.
    assert main(train(folder, tmp_path / "run", "--overwrite", "true", "--seed", "5")) == 0
    assert "seed: 5" in (tmp_path / "run" / "report.html").read_text()


def test_a_report_is_an_html_file(call) -> None:
    status, _, err = call("report", "run", "--output", "comparison")
    assert status == 1
    assert "output is 'comparison'; it must be a file name that ends in .html." in err


def test_the_summary_says_what_packing_saves(tmp_path) -> None:
    result = RunResult(
        **{"folder": tmp_path, "steps": 1, "stopped_early": False, "train_loss": 1.0},
        **{"best_step": None, "tokens": 2000, "computed_tokens": 1260, "seconds": 2.0},
        peak_memory=449 * 10**6,
    )
    expected = "1 step in 2s (2,000 tokens, 37.0 % of them saved by packing, 1,000 a second), "
    assert _summary(result) == f"{expected}peak memory 449 MB"
    padded = dataclasses.replace(result, steps=2, computed_tokens=2500)
    assert _summary(padded) == "2 steps in 2s (2,000 tokens, 1,000 a second), peak memory 449 MB"


@pytest.mark.slow
def test_resuming_says_what_it_did(call, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(*train(folder, Path("run"), "--resume"))
    assert status == 0
    assert out.startswith(f"--resume: no run in {tmp_path / 'run'}, so a new one starts\n")
    assert "nothing was trained" not in out
    _, out, _ = call(*train(folder, Path("run"), "--resume"))
    longer = "run was finished, so nothing was trained; a higher --max_steps makes it longer\n"
    assert out.startswith(longer)
    status, _, err = call(*train(folder, Path("run"), "--resume", "--epochs", "9"))
    assert status == 1
    assert "epochs was 3.0 and is 9.0" in err
    assert "--resume; a higher --max_steps makes it longer)" in err
    Path("run", "result.json").unlink()
    shutil.rmtree(Path("run", "checkpoints"))
    _, out, _ = call(*train(folder, Path("run"), "--resume"))
    assert out.startswith(
        f"--resume: the run in {tmp_path / 'run'} has no checkpoint, so it starts"
    )


@pytest.mark.slow
def test_a_short_run_names_the_options_for_more_steps(call, folder, tmp_path, monkeypatch) -> None:
    by_epochs = ["null" if word == "2" else word for word in train(folder, tmp_path / "second")]
    _, out, _ = call(*by_epochs, "--epochs", "0.5")
    assert "few; raise --epochs (now 0.5) or --max_steps if the scores are low\n" in out
    monkeypatch.setattr("lorakit.cli.train.FEW_STEPS", 2)
    _, out, _ = call(*train(folder, tmp_path / "third"))
    assert "adapter  " in out
    assert "few" not in out


@pytest.mark.slow
def test_a_run_that_only_got_worse_says_so(call, folder, tmp_path, monkeypatch) -> None:
    """Its best adapter is worse than the base, and scores of 2 texts say that they are of 2."""
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(
        validation, "held_out", lambda *_, **__: Evaluation(scores={"loss": next(losses)})
    )
    options = ["--evaluation.every", "1", "--evaluation.samples", "2"]
    options += ["--evaluation.max_new_tokens", "2"]
    status, out, err = call(*train(folder, tmp_path / "run", *options))
    assert status == 0
    note = "(4 examples, texts of 2 samples, 2 cut at 2 tokens, best so far, but worse than before training)"
    assert err.count(note) == 2
    assert ", best)" not in err
    assert re.search(r"best .*\(step 2; worse than before training\)", out)
    assert re.search(r"loss .*\(4 examples\)", out)
    assert re.search(r"bleu .*\(2 samples\)", out)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No evaluation was better than before training" in page
    assert "prefer the adapter in best/" not in page
    assert "best, but worse than before" in page  # the mark in the charts
    assert re.search(r"BLEU of 2 samples (fell|rose|stayed)", page)
    assert re.search(r"before [\d.e-]+, on 2 samples", page)


@pytest.mark.slow
def test_the_command_that_made_a_run_is_in_its_report(runs) -> None:
    record = json.loads((runs[0] / "environment.json").read_text())
    command = record["sessions"][0]["command"]
    assert command.startswith("lorakit train --base.name ")
    assert command in (runs[0] / "report.html").read_text()


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/opt/bin/lorakit", "train", "--output", "my run"], "lorakit train --output 'my run'"),
        (["/opt/lorakit/__main__.py", "plan"], "lorakit plan"),
        (["/opt/pytest/__main__.py"], "python -m pytest"),
        (["train.py", "--fast"], "python train.py --fast"),
        ([""], "python"),
    ],
)
def test_a_command_is_told_as_it_would_be_typed(monkeypatch, argv, command) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert environment.command() == command


@pytest.mark.slow
def test_a_finished_run_is_kept_where_its_report_cannot_be_drawn(
    call, folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    status, out, _ = call(*train(folder, tmp_path / "run"))
    assert status == 0
    assert "report   none." in out
    assert 'pip install "lorakit[report]"' in out
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()
    status, _, err = call("report", tmp_path / "run")
    assert status == 1
    assert 'pip install "lorakit[report]"' in err


@pytest.mark.parametrize(
    ("error", "reason"), [(MemoryError(), "MemoryError"), (RuntimeError("no memory"), "no memory")]
)
def test_a_report_that_fails_does_not_fail_its_command(error, reason) -> None:
    def write() -> Path:
        raise error

    assert try_to_write(write) == f"none. {reason}"


@pytest.mark.slow
def test_the_report_of_a_run_can_be_written_again(call, runs, tmp_path) -> None:
    before = (runs[0] / "report.html").read_text()
    status, out, _ = call("report", runs[0], "--figures", tmp_path / "figures")
    assert status == 0
    assert (runs[0] / "report.html").read_text() == before
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"01-curves.png", "01-curves.svg"} <= names
    assert out.count("figure   ") == len(names)
    drawn = (tmp_path / "figures" / "01-curves.png").read_bytes()
    argv = [
        "report",
        runs[1],
        "--output",
        tmp_path / "page.html",
        "--figures",
        tmp_path / "figures",
    ]
    status, _, err = call(*argv)
    assert (status, "01-curves.png' already exists" in err) == (1, True)
    assert (tmp_path / "figures" / "01-curves.png").read_bytes() == drawn
    assert not (tmp_path / "page.html").exists()
    assert call(*argv, "--overwrite")[0] == 0
    assert (tmp_path / "figures" / "01-curves.png").read_bytes() != drawn


@pytest.mark.slow
def test_a_prediction_is_kept_beside_the_run(call, runs, tmp_path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    seconds = json.loads((run / "result.json").read_text())["seconds"]
    assert write_run_report(run, predicted={"seconds": 2 * seconds}) == str(run / "report.html")
    assert call("report", run)[0] == 0
    assert "0.50" in (run / "report.html").read_text()


@pytest.mark.slow
def test_two_runs_are_compared(call, runs, tmp_path) -> None:
    target = tmp_path / "pages" / "both.html"
    argv = ["report", *runs, "--output", target]
    assert call(*argv)[0] == 0
    page = target.read_text()
    assert "The runs differ in seed." in page
    status, _, err = call(*argv)
    assert status == 1
    assert "already exists" in err
    assert call(*argv, "--overwrite", "true")[0] == 0


@pytest.mark.slow
def test_a_run_whose_adapter_was_deleted_is_a_finished_run(call, runs, tmp_path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    status, _, err = call("report", run)
    assert (status, err) == (0, "")
    page = (run / "report.html").read_text()
    assert "The trained weights were deleted." in page
    assert "is not finished" not in page
    both = tmp_path / "both.html"
    assert call("report", run, runs[1], "--output", both)[0] == 0
    cells = re.findall(
        r"Adapter file</th>(?:<td[^>]*>([^<]*)</td>)(?:<td[^>]*>([^<]*)</td>)", both.read_text()
    )
    assert [first for first, _ in cells] == ["deleted"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "runs"),
        (["nowhere"], "is not a run folder"),
        (["{one}", "{one}/"], "names a folder twice"),
        (["{one}", "--outptu", "x"], "--output"),
    ],
)
def test_a_wrong_call_is_one_clear_message(call, runs, argv, message) -> None:
    status, _, err = call("report", *(word.format(one=runs[0]) for word in argv))
    assert status == 1
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_evaluation_with_an_output_ends_in_a_report(call, folder, runs, tmp_path) -> None:
    output = tmp_path / "scores.jsonl"
    argv = [
        *("evaluate", "--adapter", runs[0] / "adapter", "--base.name", folder / "base"),
        *("--base.dtype", "float32", "--data.test", folder / "validation.jsonl"),
        *("--decoding.max_new_tokens", "4", "--output", output),
    ]
    status, out, err = call(*argv)
    assert status == 0
    assert f"report   {output.with_suffix('.html')}" in out
    assert "4 of 4 examples scored\n" in err  # progress, also without a terminal
    assert "4 of 4 prompts answered by the base" in err
    assert out.split()[:3] == ["score", "adapter", "base"]
    assert "on 4 examples of the test data, 4 prompts answered" in out
    page = output.with_suffix(".html").read_text()
    loss = next(line.split()[1] for line in out.splitlines() if line.startswith("loss"))
    number = r'<td class="number">([\d.]+)</td>'
    ((shown, of_base),) = re.findall(rf'<th scope="row">Loss</th>{number}{number}', page)
    assert float(shown) == pytest.approx(float(loss), abs=6e-4)
    before = json.loads((runs[0] / "result.json").read_text())["scores_before"]
    assert float(of_base) == pytest.approx(before["loss"], abs=6e-4)
    assert "(test data, 4 examples, 4 prompts answered" in page
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert page.count('<article class="sample">') == len(records)
    output.unlink()
    status, _, err = call(*argv)  # rejected before evaluation, like the output itself
    assert (status, "scores.html' already exists" in err) == (1, True)


@pytest.mark.parametrize("task", ["classification", "own.py:Own"])
def test_labels_are_counted_against_predictions(call, tmp_path, monkeypatch, task: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "from lorakit.tasks import Classification\nclass Own(Classification):\n    name = 'own'\n"
    )
    base = tiny_runs.save_base(tmp_path / "base", "bert")
    names = ("dry", "wet")
    labelled = [{**row, "label": names[row["label"]]} for row in tiny_runs.labelled(12)]
    rows = tiny_runs.write_rows(tmp_path / "rows.jsonl", labelled)
    output = tmp_path / "labels.jsonl"
    argv = ["evaluate", "--base.name", base, "--data.test", rows, "--output", output]
    status, out, err = call(*argv, "--base.dtype", "float32", "--data.task", task)
    assert (status, err.count("Traceback")) == (0, 0), err
    assert out.split("\n")[-5:-3] == [
        "on 12 examples of the test data",
        "f1 is that of class 'wet', the second of two",
    ]
    page = html.unescape(output.with_suffix(".html").read_text())
    assert "test data: 12 examples. F1 is that of class 'wet'" in page
    assert "Confusion matrix" in page
    assert "predicted wet" in page
    records = [json.loads(line) for line in output.read_text().splitlines()]
    wrong = [record["output_name"] for record in records if record["output"] != record["label"]]
    assert 0 < len(wrong) < 12
    assert re.findall(r"<mark>(\w+)</mark>", page) == wrong
    assert page.count("Predicted, wrong") == len(wrong)
    assert f"{len(wrong)} of all 12" in page
    records = [json.loads(line) for line in output.read_text().splitlines()]
    for key in ("output", "label"):
        assert [r[f"{key}_name"] for r in records] == [names[r[key]] for r in records]
    table = page.split("Confusion matrix")[-1].split("</table>")[0]
    counted = [
        [int(cell) for cell in re.findall(r'<td class="number">(\d+)</td>', row)]
        for row in table.split("<tr>")[2:]
    ]
    expected = [
        [sum(r["label"] == label and r["output"] == guess for r in records) for guess in (0, 1)]
        for label in (0, 1)
    ]
    assert counted == expected


def test_shown_examples_are_spread_over_all() -> None:
    """The first label alone would show no wrong prediction."""
    outputs = [{"prompt": f"text {i}", "label": int(i > 23), "output": 0} for i in range(47)]
    config = EvaluateConfig(
        base=BaseConfig(name="base"), data=DataConfig(test="rows.jsonl", task="classification")
    )
    page = evaluation_page(config, Evaluation(outputs=outputs, examples=47)).render()
    assert "24 of 47 examples, evenly spaced" in page
    assert page.count('<article class="sample">') == 24
    assert page.count("Predicted, wrong") == 11
