"""The grid: no run is repeated, choices never use the scored data, and one process owns the folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit import load_base, storage
from lorakit.errors import ConfigurationError, DivergenceError, LorakitError, RunFolderError
from lorakit.evaluation.evaluate import Evaluation
from lorakit.models import dtype_choice
from lorakit.models.dtype_choice import DtypeChoice
from lorakit.paper import grid as grid_module
from lorakit.paper import runs as runs_module
from lorakit.paper.comparison import compare
from lorakit.paper.grid import open_grid, recorded_grid
from lorakit.paper.log import GridSetup, recorded_config
from lorakit.paper.paper_config import PaperConfig, PaperDataConfig
from lorakit.paper.record import Record
from lorakit.paper.report import markdown
from lorakit.paper.run_table import run_table
from lorakit.paper.runs import Runner, TableRun
from lorakit.tasks import TASKS


def silent(text: str) -> None:
    """Discard progress."""


def results(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a grid's records, by file."""
    # A recursive search would fail: another process deletes folders meanwhile.
    records = folder.glob("runs/*/*/rate-*.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in records}


def made_up(run: TableRun, held_out: float, **fields: Any) -> Record:
    """Return the record of a run that was not made."""
    return Record(
        data_set=run.data_set.key,
        variant=run.variant.key,
        rate=run.rate,
        seed=run.seed,
        held_out={"accuracy": held_out},
        **fields,
    )


def make_up(
    monkeypatch: pytest.MonkeyPatch,
    held_out: Callable[[TableRun], float | None],
    score: Callable[[TableRun], float] = lambda _: 0.5,
) -> None:
    """Replace training and scoring with made-up scores. A run without a held-out score is trained."""
    original = Runner._train

    def train(runner: Runner, run: TableRun) -> Record:
        found = held_out(run)
        return original(runner, run) if found is None else runner._write(run, made_up(run, found))

    def scored(_: Runner, run: TableRun) -> dict[str, Any]:
        return {"scores": {"accuracy": score(run), "f1": score(run)}}

    monkeypatch.setattr(Runner, "_train", train)
    monkeypatch.setattr(Runner, "_score", scored)


@pytest.fixture
def three_rates(table2: Callable[..., PaperConfig], kept: Path) -> PaperConfig:
    """A finished table with three rates of one method, copied for each test."""
    config = table2(methods=("lora",), seeds=1, trials=3)
    finished = replace(config, output=str(kept / "three rates"))
    run_table(finished, silent)
    shutil.copytree(finished.folder, config.folder)
    return config


@pytest.mark.slow
def test_a_table_from_runs_to_page(table2, kept):
    config = table2(output=str(kept / "two methods"))
    found = run_table(config, silent)
    # Two methods, each with two rates for the first seed and one run for the second seed.
    assert len(results(config.folder)) == 2 * 3
    page = found.page.read_text(encoding="utf-8")
    assert "| roberta-base | LoRA | 0.3M | 89.7 ± 0.7 |" in page
    assert "**LoRA**" in page
    data = json.loads(found.data.read_text(encoding="utf-8"))
    assert len(data["runs"]) == 6
    scored = [run for run in data["runs"] if run["scores"]]
    assert (
        len(scored) == 4
    )  # two seeds per method at the chosen rate; the other trials are not scored
    assert found.figure is not None
    assert found.figure.stat().st_size > 1000
    assert found.report is not None
    page = found.report.read_text()
    assert "Published in the paper." in page
    for row in found.comparison.own:
        assert row.variant.label in page
        for name, cell in row.cells.items():
            assert f"{cell.value:.{found.comparison.digits[name]}f}" in page
    for row in data["own"]:
        seeds = [run for run in scored if run["variant"] == row["key"]]
        assert list(row["cells"]["MRPC"]["seeds"].values()) == [
            100 * run["scores"]["accuracy"] for run in seeds
        ]


@pytest.mark.slow
def test_the_rate_is_that_of_the_best_held_out_score(three_rates):
    with open_grid(three_rates, silent) as grid:
        ((data_set, variant),) = grid.cells()
        records = [grid.runner.record(run) for run in grid.trials(data_set, variant)]
        best = max(record.held_out["accuracy"] for record in records)
        chosen = grid.chosen_rate(data_set, variant)
        assert chosen == next(r.rate for r in records if r.held_out["accuracy"] == best)


@pytest.mark.slow
@pytest.mark.parametrize(("best", "marked"), [(0, True), (1, False), (2, True)])
def test_a_choice_beyond_which_a_rate_may_do_better_is_marked(three_rates, best, marked):
    paths = sorted((three_rates.folder / "runs").rglob("rate-*.json"), key=_rate)
    for place, path in enumerate(paths):
        record = storage.read_record(path, RunFolderError)
        record["held_out"]["accuracy"] = 0.9 if place == best else 0.4
        storage.write_record(path, record)
    page = run_table(three_rates, silent).page.read_text(encoding="utf-8")
    assert ": 0.9000**" in page
    assert ("; *outermost* |" in page) == marked


def _rate(path: Path) -> float:
    return json.loads(path.read_text(encoding="utf-8"))["rate"]


@pytest.mark.slow
def test_no_choice_sees_the_data_that_is_scored(table2, data, tmp_path):
    """Different validation data changes the scores, but neither the chosen rates nor the weights."""
    other = tmp_path / "other"
    (other / "mrpc").mkdir(parents=True)
    train = (data / "mrpc" / "train.jsonl").read_text(encoding="utf-8")
    (other / "mrpc" / "train.jsonl").write_text(train, encoding="utf-8")
    lines = (data / "mrpc" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    flipped = [{**row, "label": 1 - row["label"]} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in flipped)
    (other / "mrpc" / "validation.jsonl").write_text(text, encoding="utf-8")
    found = []
    for name, root in (("a", data), ("b", other)):
        config = table2(data={"root": str(root)}, output=str(tmp_path / name), methods=("lora",))
        run_table(config, silent)
        records = [json.loads(text) for _, text in sorted(results(tmp_path / name).items())]
        found.append(records)
    for first, second in zip(*found, strict=True):
        assert first["held_out"] == second["held_out"]
        assert first["best_step"] == second["best_step"]
        assert bool(first["scores"]) == bool(second["scores"])
        if first["scores"]:
            assert first["scores"]["accuracy"] == pytest.approx(1 - second["scores"]["accuracy"])


def test_held_out_rows_are_no_training_rows(table2):
    config = table2(limit=16, methods=("lora",))
    with open_grid(config, silent) as grid:
        ((data_set, variant),) = grid.cells()
        run = grid.trials(data_set, variant)[0]
        settings = grid.runner.train_config(run).data
        assert settings.validation_fraction > 0
        assert settings.source("validation") == settings.source("train")
        assert "validation" not in str(settings.source("train"))


@pytest.mark.slow
def test_a_repeated_call_makes_no_run_again(table2, kept, monkeypatch):
    config = table2(output=str(kept / "two methods"))
    run_table(config, silent)
    before = results(config.folder)
    assert before
    monkeypatch.setattr(runs_module, "train", lambda config: pytest.fail("trained again"))
    monkeypatch.setattr(runs_module, "evaluate", lambda config: pytest.fail("scored again"))
    run_table(config, silent)
    assert results(config.folder) == before


def test_data_that_cannot_be_scored_is_refused_before_a_run(table2, data, tmp_path, monkeypatch):
    """The table reads it hours later: the last data set and the packages of its scores are checked first."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "rte" / "validation.jsonl").unlink()
    config = table2(data={"root": str(other)}, tasks=("mrpc", "rte"))
    with pytest.raises(LorakitError, match="rte"):
        run_table(config, silent)
    assert not results(config.folder)

    def missing(examples: object) -> None:
        raise ConfigurationError("Scoring needs the 'train' extra.")

    monkeypatch.setattr(TASKS["mrpc"], "check_scoring", missing)
    with pytest.raises(ConfigurationError, match="extra"):
        run_table(table2(output=str(tmp_path / "no package")), silent)
    assert not results(tmp_path / "no package")


@pytest.mark.slow
def test_a_failure_midway_keeps_what_was_done_and_the_same_call_goes_on(
    table2, tmp_path, monkeypatch
):
    config, real = table2(), runs_module.train
    calls = []

    def failing(settings):
        calls.append(settings.output)
        if len(calls) == 4:
            raise RunFolderError("the disk is full")
        return real(settings)

    monkeypatch.setattr(runs_module, "train", failing)
    with pytest.raises(RunFolderError, match="disk is full"):
        run_table(config, silent)
    before = results(tmp_path / "out")
    assert len(before) == 3
    run_table(config, silent)
    assert len(calls) == 3 + 1 + 3
    after = results(tmp_path / "out")
    assert {name: after[name] for name in before if b'"scores": {}' not in before[name]} == {
        name: text for name, text in before.items() if b'"scores": {}' not in text
    }


@pytest.mark.slow
def test_a_killed_process_loses_no_finished_run(table2, tmp_path):
    config = table2()
    words = [
        *(sys.executable, "-m", "lorakit", "paper", "table2", "--base.name", config.base.name),
        *("--tasks", "mrpc", "--methods", "bitfit,lora", "--seeds", "2", "--trials", "2"),
        *("--epochs", "1", "--data.root", config.data.root, "--output", config.output),
        *("--base.dtype", "float32", "--base.device", "cpu"),
    ]
    folder = tmp_path / "out"
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}
    )
    deadline = time.monotonic() + 120
    while len(results(folder)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results(folder)
    assert len(before) >= 2
    found = run_table(config, silent)
    after = results(folder)
    assert len(after) == 6
    for name, text in before.items():
        old, new = json.loads(text), json.loads(after[name])
        assert old["seconds"] == new["seconds"]  # the same run, not a repetition
    assert all("MRPC" in row.cells for row in found.comparison.own)


def test_two_processes_in_one_folder_are_refused(table2):
    config = table2()
    with (
        storage.lock_folder(config.folder),
        pytest.raises(RunFolderError, match="in use by another run"),
        open_grid(config, silent),
    ):
        pass


def test_other_settings_in_the_same_folder_are_refused(table2):
    with open_grid(table2(), silent):
        pass
    with (
        pytest.raises(ConfigurationError, match=r"trials was 2 and is 3.*choose another output"),
        open_grid(table2(trials=3), silent),
    ):
        pass
    with open_grid(table2(seeds=3, methods=("bitfit", "adapter_h", "lora")), silent) as grid:
        assert grid.total == 3 * (2 + 2)  # a grid without a budget may grow


def test_a_setting_that_an_older_log_lacks_had_its_default(table2, tmp_path):
    with open_grid(table2(), silent):
        pass
    path = tmp_path / "out" / "grid.json"
    log = storage.read_record(path, RunFolderError)
    assert log["settings"].pop("sampling") == "random"
    storage.write_record(path, log)
    with (
        pytest.raises(ConfigurationError, match="sampling was 'random' and is 'grouped'"),
        open_grid(table2(sampling="grouped"), silent),
    ):
        pass
    with open_grid(table2(), silent):
        assert storage.read_record(path, RunFolderError)["settings"]["sampling"] == "random"


@pytest.mark.parametrize("sampling", ["random", "grouped"])
def test_the_order_of_the_data_reaches_every_run_and_the_page(table2, sampling):
    with open_grid(table2(sampling=sampling), silent) as grid:
        runs = [run for cell in grid.cells() for run in grid.trials(*cell)]
        assert {grid.runner.train_config(run).sampling for run in runs} == {sampling}
        told = "in which examples with the same prompt are together" in markdown(compare(grid))
        assert told == (sampling == "grouped")


def test_a_folder_of_other_things_is_refused(table2, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("", encoding="utf-8")
    with (
        pytest.raises(RunFolderError, match=r"has no grid.json, but thesis.tex"),
        open_grid(table2(), silent),
    ):
        pass


def test_a_rate_at_which_training_diverges_is_not_chosen(table2, monkeypatch):
    config, real = table2(methods=("lora",), seeds=1), runs_module.train

    def diverging(settings):
        if settings.optimizer.learning_rate == 5e-4:
            raise DivergenceError("Training diverged at step 3")
        return real(settings)

    monkeypatch.setattr(runs_module, "train", diverging)
    found = run_table(config, silent)
    text = found.page.read_text(encoding="utf-8")
    assert "0.0005: diverged; **0.0015: " in text
    assert found.comparison.own[0].cells


def test_a_run_that_does_not_fit_into_memory_ends_the_table_and_is_not_recorded(
    table2, monkeypatch
):
    def failing(settings):
        raise LorakitError("Out of memory during step 1")

    monkeypatch.setattr(runs_module, "train", failing)
    config = table2(methods=("lora",), seeds=1, trials=1)
    with pytest.raises(LorakitError, match="Out of memory"):
        run_table(config, silent)
    assert not list(config.log_folder.glob("runs/*/*/*.json"))


def test_a_diverged_run_has_its_time_and_curve_and_no_checkpoints(table2, monkeypatch):
    def diverging(settings):
        folder = Path(settings.output)
        (folder / "checkpoints" / "step-000001").mkdir(parents=True)
        lines = [
            {"step": 0, "split": "validation", "accuracy": 0.5},
            {"step": 1, "split": "train", "loss": 2.0, "tokens": 9, "seconds": 0.25},
            {"step": 1, "split": "validation", "accuracy": 0.6},
            {"step": 2, "split": "train", "loss": None, "tokens": 18, "seconds": 0.5},
        ]
        storage.write_rows(folder / "metrics.jsonl", lines)
        sum(range(10**6))
        raise DivergenceError("Training diverged at step 3")

    monkeypatch.setattr(runs_module, "train", diverging)
    with open_grid(table2(methods=("lora",), seeds=1, trials=1), silent) as grid:
        grid.run(after_each=lambda: None)
        (run,) = grid.trials(*next(grid.cells()))
        record = grid.runner.record(run)
        assert not (grid.runner.folder / run.name / "checkpoints").exists()
    assert record.failure
    assert (record.steps, record.tokens, record.seconds) == (2, 18, 0.5)
    assert record.processor_seconds > 0
    assert record.curve == [
        {"step": 0, "accuracy": 0.5},
        {"step": 1, "accuracy": 0.6, "training loss": 2.0},
    ]


@pytest.mark.slow
def test_a_seed_with_which_training_diverges_is_told(table2, monkeypatch):
    """Its number is missing, no other seed replaces it, and the page reports it."""

    def diverging(settings):
        raise DivergenceError("Training diverged at step 3")

    monkeypatch.setattr(runs_module, "train", diverging)
    make_up(
        monkeypatch,
        lambda run: None if (run.data_set.key, run.seed) == ("mrpc", 1) else 0.5,
        lambda run: 0.5 + run.seed**2 / 10,
    )
    config = table2(tasks=("mrpc", "rte"), methods=("lora",), seeds=3, trials=1)
    found = run_table(config, silent)
    cells = found.comparison.own[0].cells
    assert list(cells["MRPC"].seeds) == [0, 2]
    assert list(cells["RTE"].seeds) == [0, 1, 2]
    assert cells["Avg"].mean == pytest.approx((cells["MRPC"].mean + cells["RTE"].mean) / 2)
    variances = [statistics.variance(cells[name].seeds.values()) for name in ("MRPC", "RTE")]
    assert cells["Avg"].spread == pytest.approx(sum(variances) ** 0.5 / 2)
    note = "LoRA on mrpc: training diverged with 1 of 3 seeds (1)"
    assert note in found.page.read_text(encoding="utf-8")
    assert found.report is not None
    assert note in found.report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_method_that_does_not_fit_the_base_is_left_out_with_its_reason(table2, monkeypatch):
    real = grid_module.count_parameters

    def refusing(model, method):
        if type(method).__name__ == "BitFit":
            raise ConfigurationError("it has no biases")
        return real(model, method)

    monkeypatch.setattr(grid_module, "count_parameters", refusing)
    found = run_table(table2(seeds=1, trials=1), silent)
    assert "BitFit is left out: it has no biases" in found.page.read_text(encoding="utf-8")
    assert [bool(row.cells) for row in found.comparison.own] == [False, True]


def test_parameters_are_counted_without_the_new_head(table2):
    with open_grid(table2(methods=("full", "lora")), silent) as grid:
        counts = grid.setup.counts["mrpc"]
    model = load_base(table2().base.name, task="sequence-classification", num_labels=2).model
    head = sum(p.numel() for p in model.classifier.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert counts["full"].head == counts["lora"].head == head
    assert counts["full"].trained == total - head
    assert counts["lora"].trained == 2 * 2 * (32 + 32) * 8  # two layers, q and v, rank 8


@pytest.mark.slow
def test_spread_and_verdict_follow_from_the_seeds(table2, monkeypatch):
    scores = {"bitfit": (0.4, 0.55, 0.5), "lora": (0.6, 0.5, 0.7)}
    make_up(monkeypatch, lambda _: 0.5, lambda run: scores[run.variant.key][run.seed])
    with open_grid(table2(seeds=3, trials=1), silent) as grid:
        grid.run(after_each=lambda: None)
        found = compare(grid)
    (difference,) = found.differences
    bitfit, lora = (row.cells["MRPC"] for row in found.own)
    by_seed = [lora.seeds[seed] - bitfit.seeds[seed] for seed in range(3)]
    assert difference.value == pytest.approx(statistics.fmean(by_seed))
    # Student's t for two degrees of freedom, from a printed table.
    half = 4.302653 * statistics.stdev(by_seed) / math.sqrt(3)
    assert difference.interval == pytest.approx(
        (difference.value - half, difference.value + half), rel=1e-6
    )
    low, high = difference.interval
    assert difference.verdict == ("ahead" if low > 0 else "behind" if high < 0 else "undecided")
    assert lora.mean == pytest.approx(statistics.fmean(lora.seeds.values()))
    assert difference.published == ("roberta-base", pytest.approx(89.7 - 92.7))


def test_every_run_has_the_dtype_of_the_first(
    table2: Callable[..., PaperConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster dtype may be another one when the grid is resumed."""
    lines: list[str] = []
    config = table2()
    config = replace(config, base=replace(config.base, dtype="auto"))
    for dtype in (torch.bfloat16, torch.float32):
        choice = DtypeChoice(dtype, "it is faster")
        monkeypatch.setattr(dtype_choice, "choose_dtype", lambda *_, c=choice, **__: c)
        with open_grid(config, lines.append) as grid:
            (run, *_) = grid.trials(*next(grid.cells()))
            assert grid.runner.settings(run)["base.dtype"] == "bfloat16"
    assert [line for line in lines if "faster" in line] == ["bfloat16: it is faster"]
    assert grid_module.preview(config).config.base.dtype == "bfloat16"


@pytest.mark.slow
def test_a_grid_continues_from_its_log_on_another_machine(
    logged_table, data, tmp_path, monkeypatch
):
    log = logged_table.log_folder
    assert not list(logged_table.folder.rglob("*.safetensors"))
    files = [path for path in log.rglob("*") if path.is_file() and path.name[0] != "."]
    assert len(files) == 1 + 2 * 3
    for path in files:
        assert path.stat().st_size < 8000
        text = path.read_text(encoding="utf-8")
        assert str(data) not in text
        assert str(logged_table.folder) not in text
    record = storage.read_record(log / "runs/mrpc/lora/rate-0.0005-seed-1.json", RunFolderError)
    assert record["settings"]["optimizer.learning_rate"] == 5e-4
    assert record["settings"]["seed"] == 1
    assert record["curve"][-1]["accuracy"] == record["held_out"]["accuracy"]
    assert record["curve"][-1]["training loss"] > 0
    assert {"base model", "train data"} <= record["inputs"].keys()
    assert record["versions"]["torch"] == version("torch")
    assert record["processor_seconds"] > 0

    monkeypatch.setattr(runs_module, "train", lambda config: pytest.fail("trained again"))
    before = results(log)
    found = run_table(logged_table, silent)
    moved = run_table(replace(logged_table, output=str(tmp_path / "other")), silent)
    assert moved.page.read_bytes() == found.page.read_bytes()
    assert results(log) == before


def test_a_log_may_have_a_method_on_a_part_of_its_data_sets(table2, tmp_path):
    log = tmp_path / "log"
    for task, method in (("mrpc", "lora"), ("rte", "bitfit")):
        with open_grid(table2(log=str(log), tasks=(task,), methods=(method,)), silent):
            pass
    config = replace(recorded_config(log), data=PaperDataConfig(root="DATA"))
    rows = compare(recorded_grid(config)).own
    assert [(row.variant.key, row.cells, row.left_out) for row in rows] == [
        ("bitfit", {}, ""),
        ("lora", {}, ""),
    ]
    assert all(row.trained for row in rows)


def test_the_computing_time_of_a_run_is_that_of_training_and_scoring(table2, monkeypatch):
    def train(runner, run):
        record = Record(
            data_set="mrpc", variant="lora", rate=run.rate, seed=0, processor_seconds=100.0
        )
        return runner._write(run, record)

    clock = iter((7.0, 9.5))  # scoring takes 2.5 seconds
    monkeypatch.setattr(runs_module, "time", SimpleNamespace(process_time=lambda: next(clock)))
    monkeypatch.setattr(Runner, "_train", train)
    monkeypatch.setattr(Runner, "_score", lambda *_: {"scores": {"accuracy": 0.5}})
    config = table2(methods=("lora",), seeds=1, trials=1)
    ((data_set,), (variant,)) = config.study.data_sets, config.study.variants
    run = TableRun(data_set=data_set, variant=variant, rate=5e-4, seed=0)
    record = Runner(config, GridSetup()).finish(run, scored=True)
    assert record.processor_seconds == 102.5


def test_a_record_tells_which_examples_were_scored(table2, monkeypatch):
    monkeypatch.setattr(runs_module, "evaluate", lambda _: Evaluation(sha256="a", cut=3))
    config = table2(methods=("lora",), seeds=1, trials=1)
    ((data_set,), (variant,)) = config.study.data_sets, config.study.variants
    run = TableRun(data_set=replace(data_set, columns=()), variant=variant, rate=5e-4, seed=0)
    for limit, scored in ((None, "a"), (5, "a 5")):
        fields = Runner(replace(config, eval_limit=limit), GridSetup())._score(run)
        assert (fields["scored"], fields["cut"]) == (scored, 3)


@pytest.mark.slow
def test_a_run_without_its_weights_is_trained_again_to_be_scored(table2, tmp_path):
    config = table2(log=str(tmp_path / "log"), methods=("lora",), seeds=1)
    with open_grid(config, silent) as grid:
        ((data_set, variant),) = grid.cells()
        for run in grid.trials(data_set, variant):
            grid.runner.finish(run, scored=False)
            grid.runner.delete_weights(run)
    found = run_table(config, silent)
    assert "MRPC" in found.comparison.own[0].cells


def test_a_run_interrupted_after_its_first_evaluation_is_not_scored(table2, tmp_path, monkeypatch):
    """A log has the run without its scores; the weights are on another machine, so that it is trained again."""
    with open_grid(
        table2(log=str(tmp_path / "log"), methods=("lora",), trials=1, seeds=1), silent
    ) as grid:
        (run,) = grid.trials(*next(grid.cells()))
        record = made_up(run, 0.8)
        grid.runner._write(run, record)
        monkeypatch.setattr(Runner, "_score", lambda *_: {"scores": {"accuracy": 0.5}})

        def interrupted(settings):
            (Path(settings.output) / "best").mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt

        monkeypatch.setattr(runs_module, "train", interrupted)
        for _ in range(2):  # the second call trains on
            with pytest.raises(KeyboardInterrupt):
                grid.run(after_each=lambda: None)
        assert grid.runner.record(run) == record


def test_all_seeds_have_one_rate_if_training_a_trial_again_changes_the_choice(table2, monkeypatch):
    """The log has unscored trials of another machine. Here the best one scores lower on held-out data."""
    make_up(monkeypatch, lambda _: 0.799, lambda _: 0.9)
    with open_grid(table2(methods=("lora",), trials=3), silent) as grid:
        (cell,) = grid.cells()
        for run, score in zip(grid.trials(*cell), (0.80, 0.81, 0.79), strict=True):
            grid.runner._write(run, made_up(run, score))
        assert grid.chosen_rate(*cell) == 5e-4
        grid.run(after_each=lambda: None)
        assert grid.chosen_rate(*cell) == 1.7e-4
        assert [r.seed for r in grid.records(*cell)] == [0, 1]


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (5e-4, [1.7e-4, 5e-4, 1.5e-3]),
        (1.9e-5, [1.9e-5, 5.6e-5, 1.7e-4, 5e-4, 1.5e-3]),
        (1.3e-2, [1.7e-4, 5e-4, 1.5e-3, 4.5e-3, 1.3e-2]),
    ],
)
def test_more_rates_are_tried_while_the_best_is_outermost(table2, monkeypatch, best, tried):
    make_up(monkeypatch, lambda run: -abs(math.log(run.rate / best)))
    with open_grid(table2(methods=("lora",), seeds=1, trials=3, widen=True), silent) as grid:
        grid.run(after_each=lambda: None)
        ((data_set, variant),) = grid.cells()
        assert [run.rate for run in grid.trials(data_set, variant)] == tried
        assert grid.chosen_rate(data_set, variant) == best
        assert grid.total == grid.finished == len(tried)


def test_short_trials_choose_the_rate_of_full_runs(table2, monkeypatch):
    def train(runner, run):
        epochs = runner.train_config(run).epochs
        held_out = run.rate if epochs == 0.5 else 1 - run.rate
        return runner._write(run, made_up(run, held_out, settings={"epochs": epochs}))

    monkeypatch.setattr(Runner, "_train", train)
    monkeypatch.setattr(Runner, "_score", lambda *_: {"scores": {"accuracy": 0.5, "f1": 0.5}})
    config = table2(methods=("lora",), seeds=2, trials=3, epochs=2.0, trial_epochs=0.5)
    with open_grid(config, silent) as grid:
        grid.run(after_each=lambda: None)
        ((data_set, variant),) = grid.cells()
        assert grid.chosen_rate(data_set, variant) == 1.5e-3
        trained = [(r.rate, r.seed, r.settings["epochs"]) for r in grid.all_records()]
        trials = [(rate, 0, 0.5) for rate in (1.7e-4, 5e-4, 1.5e-3)]
        assert trained == [*trials, (1.5e-3, 0, 2.0), (1.5e-3, 1, 2.0)]
        assert [r.settings["epochs"] for r in grid.records(data_set, variant)] == [2.0, 2.0]
        assert grid.total == grid.finished == 5
        page = markdown(compare(grid))
    assert "tries 3 learning rates in shorter runs of 0.5 epochs" in page
    assert "**0.0015: 0.0015**" in page


@pytest.mark.parametrize("diverges", [False, True])
def test_a_rate_that_one_seed_favours_is_not_chosen(table2, monkeypatch, diverges):
    """Of the best rate at seed 0, seed 1 learns nothing, or diverges: the next rate gets further seeds."""
    held_out = {1.7e-4: [0.63], 5e-4: [0.65, 0.66, 0.64], 1.5e-3: [0.66, 0.52], 4.5e-3: [0.5]}
    trained, scored = [], []

    def train(runner, run):
        trained.append((run.rate, run.seed))
        (runner.folder / run.name / "adapter").mkdir(parents=True)
        (runner.folder / run.name / "result.json").touch()
        failed = diverges and trained[-1] == (1.5e-3, 1)
        record = Record(
            data_set="mrpc",
            variant="lora",
            rate=run.rate,
            seed=run.seed,
            held_out={} if failed else {"accuracy": held_out[run.rate][run.seed]},
            failure="the loss is nan" if failed else "",
        )
        return runner._write(run, record)

    def score(runner, run):
        scored.append((run.rate, run.seed))
        return {"scores": {"accuracy": 0.5, "f1": 0.5}}

    monkeypatch.setattr(Runner, "_train", train)
    monkeypatch.setattr(Runner, "_score", score)
    config = table2(methods=("lora",), seeds=3, trials=3, widen=True, keep_weights=False)
    with open_grid(config, silent) as grid:
        (cell,) = grid.cells()
        assert grid.total == 5
        grid.run(after_each=lambda: None)
        assert grid.chosen_rate(*cell) == 5e-4
        assert [r.seed for r in grid.records(*cell)] == [0, 1, 2]
        assert grid.total == grid.finished == 7
        page = markdown(compare(grid))
    trials = [(rate, 0) for rate in held_out]
    assert trained == [*trials, (1.5e-3, 1), (5e-4, 1), (5e-4, 2)]  # none twice
    assert scored == [(1.5e-3, 0), (5e-4, 0), (5e-4, 1), (5e-4, 2)]
    best = "0.0015: 0.6600 (1 diverged)" if diverges else "0.0015: 0.5900 (2 seeds)"
    assert f"0.00017: 0.6300; **0.0005: 0.6500 (3 seeds)**; {best}; 0.0045: 0.5000" in page
    assert not list((config.folder / "runs").rglob("adapter"))


def test_short_trials_need_a_choice_and_no_budget(table2):
    for changes in ({"trials": 1}, {"trials": 3, "budget": "1h"}):
        with pytest.raises(ConfigurationError, match="trial_epochs is the length"):
            table2(trial_epochs=0.5, **changes)


def test_a_wider_search_needs_three_rates_and_no_budget(table2):
    for changes in ({"trials": 2}, {"trials": 3, "budget": "1h"}):
        with pytest.raises(ConfigurationError, match="widen searches beyond"):
            table2(widen=True, **changes)
